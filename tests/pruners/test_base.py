from __future__ import annotations

import pytest
import torch
from nni.compression.pruning import LinearPruner

from nni_topo import Budget, create_pruner, dependency_groups, pruner_info
from nni_topo.errors import ConfigError
from nni_topo.pruners.random import RandomPruner
from nni_topo.testing import toy_evaluator, toy_images, toy_model

HALF = [{"op_names": ["hidden"], "sparse_ratio": 0.5}]


def test_training_arguments_are_refused_where_nothing_trains():
    with pytest.raises(ConfigError, match="max_steps and max_epochs must be None, got 3 and None"):
        RandomPruner(toy_model(), HALF).compress(max_steps=3)


def test_scheduled_ratios_rise_step_by_step():
    model = toy_model()
    pruner = RandomPruner(model, HALF, toy_evaluator(model))
    kept = []
    generate = pruner.generate_masks

    def recording():
        masks = generate()
        kept.append(int(masks["hidden"]["weight"][:, 0].sum()))
        return masks

    pruner.generate_masks = recording
    LinearPruner(pruner, interval_steps=2, total_times=4).compress(max_steps=10, max_epochs=None)
    assert kept == [14, 12, 10, 8]


def test_masks_made_once_at_the_first_step_on_request():
    model = toy_model()
    pruner = RandomPruner(model, HALF, toy_evaluator(model))
    pruner.first_step_gen = True
    pruner.interval_steps = 100
    pruner._fusion_compress(max_steps=2, max_epochs=None)
    assert int(pruner.get_masks()["hidden"]["weight"][:, 0].sum()) == 8


@pytest.mark.parametrize("name", ["reconstruction", "topological", "random"])
@pytest.mark.quick_every(2)
def test_a_pruner_says_which_masks_it_would_make_for_other_budgets(name, monkeypatch):
    def made(share, allocation="uniform"):
        budget = Budget(flops=share, allocation=allocation)
        knobs = {"calibration": [toy_images(32)]} if "calibration" in pruner_info(name).knobs() else {}
        return create_pruner(name, toy_model(), config, budget=budget, example_inputs=toy_images(2), **knobs)

    config = dependency_groups(toy_model(), toy_images(2), [{"op_names": ["stem", "inner", "hidden"]}])
    asked = made(0.8)
    counts = []
    collect = asked._collect_data
    monkeypatch.setattr(asked, "_collect_data", lambda: counts.append(1) or collect())
    for share in (0.7, 0.4):
        found = asked.masks_for(Budget(flops=share))
        other = made(share)
        wanted = other.compress()[1]
        for layer, masks in wanted.items():
            for target, mask in masks.items():
                assert mask is None or torch.equal(found[layer][target], mask)
        assert asked.planner.outcome == other.planner.outcome
    assert counts == [1]
    # Nothing is masked yet.
    assert all(mask is None or bool(mask.all()) for masks in asked.get_masks().values() for mask in masks.values())
    with pytest.raises(ConfigError, match="as the pruner's own, got params"):
        asked.masks_for(Budget(params=0.5))
    with pytest.raises(ConfigError, match="must have a budget"):
        RandomPruner(toy_model(), HALF).masks_for(Budget(flops=0.5))


def test_the_steps_of_a_pruner_make_its_masks_and_a_threshold_needs_no_new_scores():
    def pruner_at(threshold):
        config_list = [{"op_names": ["stem"], "sparse_threshold": threshold}]
        return create_pruner("energy", toy_model(), config_list, example_inputs=toy_images(2))

    pruner = pruner_at(0.1)
    metrics = pruner.score_blocks(pruner.collect_data())
    shares = metrics["stem"]["weight"].flatten().tolist()
    for threshold in (0.1, 0.5, 0.9):
        mask = pruner.masks_from(metrics, sparse_threshold=threshold)["stem"]["weight"].flatten(1).any(1)
        expected = pruner_at(threshold).generate_masks()["stem"]["weight"].flatten(1).any(1)
        assert torch.equal(mask, expected)
        assert int(mask.sum()) == max(1, sum(share > threshold for share in shares))
    assert torch.equal(pruner.masks_from(metrics)["stem"]["weight"].flatten(1).any(1), expected)


def test_from_compressor_passes_the_knobs_on():
    first = RandomPruner(toy_model(), HALF, seed=1)
    first.compress()
    second = RandomPruner.from_compressor(first, [{"op_names": ["stem"], "sparse_ratio": 0.5}], seed=5)
    assert second.seed == 5
    assert second.fused_compressors == [second, first]


def test_masks_move_to_the_layers_device(device):
    pruner = RandomPruner(toy_model().to(device), HALF)
    model, masks = pruner.compress()
    assert {mask.device for mask in masks["hidden"].values()} == {device}
    assert model.hidden.weight.device == model.hidden._nni_wrapper.weight_mask.device == device
    images = toy_images(2).to(device)
    assert model(images).device == device
    # masks made on the CPU are taken too
    pruner.update_masks({"hidden": {name: mask.cpu() for name, mask in masks["hidden"].items()}})
    assert {mask.device for mask in pruner.get_masks()["hidden"].values()} == {device}
    assert model(images).device == device
