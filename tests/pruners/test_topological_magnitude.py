from __future__ import annotations

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from nni.compression.pruning import LevelPruner
from torch import nn

from nni_topo.analysis import connectivity
from nni_topo.errors import ConfigError
from nni_topo.maths import topology
from nni_topo.pruners.rounds import prune_in_rounds
from nni_topo.pruners.topological_magnitude import TopologicalMagnitudePruner
from nni_topo.testing import toy_images, toy_model

LAYERS = [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.7}]


def masks_of(model: nn.Module, config: list[dict], **knobs) -> dict[str, dict[str, torch.Tensor]]:
    pruner = TopologicalMagnitudePruner(model, config, **knobs)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    return masks


def channel_trees(model: nn.Module) -> dict[str, np.ndarray]:
    return {
        name: topology.channel_tree(module.weight.detach().numpy(), groups=getattr(module, "groups", 1))
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    }


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.7])
def test_the_tree_and_then_the_largest_weights_stay(ratio):
    model = toy_model()
    trees = channel_trees(model)
    masks = masks_of(model, [{**LAYERS[0], "sparse_ratio": ratio}])
    assert set(masks) == set(trees)
    for name, tree in trees.items():
        size = np.abs(model.get_submodule(name).weight.detach().numpy())
        kept = masks[name]["weight"].bool().numpy()
        assert kept.sum() == kept.size - int(kept.size * ratio)
        assert kept[tree].all()
        if not kept.all():
            assert size[kept & ~tree].min(initial=np.inf) >= size[~kept].max()
        assert masks[name]["bias"].bool().all()


@pytest.mark.parametrize("knobs", [{}, {"on_subcritical": "clip"}])
def test_a_global_group_ranks_all_layers_and_leaves_every_tree(knobs):
    model = toy_model()
    trees = channel_trees(model)
    masks = masks_of(model, [{**LAYERS[0], "sparse_ratio": 0.8, "global_group_id": 1}], **knobs)
    kept = {name: targets["weight"].bool().numpy() for name, targets in masks.items()}
    total = sum(mask.size for mask in kept.values())
    assert sum(mask.sum() for mask in kept.values()) == total - int(0.8 * total)
    assert all(kept[name][tree].all() for name, tree in trees.items())
    size = {name: np.abs(model.get_submodule(name).weight.detach().numpy()) for name in kept}
    lost = max(size[name][~mask].max() for name, mask in kept.items())
    assert min(size[name][mask & ~trees[name]].min(initial=np.inf) for name, mask in kept.items()) >= lost


def test_a_threshold_keeps_the_tree_and_the_larger_weights():
    model = toy_model()
    tree = channel_trees(model)["hidden"]
    size = np.abs(model.hidden.weight.detach().numpy())
    masks = masks_of(model, [{"op_names": ["hidden"], "sparse_threshold": 0.3}])
    np.testing.assert_array_equal(masks["hidden"]["weight"].bool().numpy(), tree | (size >= 0.3))
    masks = masks_of(model, [{"op_names": ["hidden"], "sparse_threshold": 100.0}])
    np.testing.assert_array_equal(masks["hidden"]["weight"].bool().numpy(), tree)


@pytest.mark.parametrize("group", [{}, {"global_group_id": "all"}])
def test_a_ratio_beyond_the_critical_one_is_refused_with_its_layer_before_wrapping(group):
    model = toy_model()
    before = dict(model.named_parameters())
    config = [{"op_names": ["hidden", "head"], "sparse_ratio": 0.9, **group}]
    message = r"tree of 23 of 128 weights, .* at most 0.820312 \(compression 5.56522\), got 13 left.*\(hidden.weight\)"
    if group:
        message = r"tree of 42 of 192 weights, .* got 20 left.*\(hidden.weight\+head.weight\)"
    with pytest.raises(ConfigError, match=message):
        TopologicalMagnitudePruner(model, config)
    assert all(before[name] is parameter for name, parameter in model.named_parameters())
    masks = masks_of(model, config, on_subcritical="clip")
    trees = channel_trees(model)
    for name in ("hidden", "head"):
        np.testing.assert_array_equal(masks[name]["weight"].bool().numpy(), trees[name])


def test_the_highest_ratio_that_is_allowed_keeps_the_tree_alone():
    model = toy_model()
    pruner = TopologicalMagnitudePruner(copy.deepcopy(model), LAYERS)
    assert pruner.critical_ratios() == pytest.approx(
        {"stem": 216 / 10, "inner": 576 / 15, "hidden": 128 / 23, "head": 64 / 19}
    )
    masks = masks_of(model, [{"op_names": ["inner"], "sparse_ratio": 1 - 15 / 576}])
    np.testing.assert_array_equal(masks["inner"]["weight"].bool().numpy(), channel_trees(model)["inner"])


def test_toeplitz_graph():
    model = toy_model()
    graph = topology.convolution_graph((8, 8, 3, 3), (10, 10))
    weight = model.inner.weight.detach().numpy()
    wanted = topology.plane_trees(weight, graph)
    knobs = {"conv_graph": "toeplitz", "example_inputs": toy_images(1)}
    config = [{"op_names": ["inner"], "sparse_ratio": 0.99}]
    masks = masks_of(model, config, on_subcritical="clip", **knobs)
    np.testing.assert_array_equal(masks["inner"]["weight"].bool().numpy(), wanted)
    with pytest.raises(ConfigError, match=f"spanning tree of {wanted.sum()} of 576 weights"):
        TopologicalMagnitudePruner(model, config, **knobs)
    channel = channel_trees(model)["inner"].sum()
    assert channel < topology.plane_trees(weight, graph).sum()


def test_grouped_convolutions_and_one_dimension():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(2), nn.Conv1d(8, 2, 2))
    config = [{"op_types": ["Conv2d", "Conv1d"], "sparse_ratio": 0.95}]
    masks = masks_of(model, config, on_subcritical="clip")
    assert [int(masks[name]["weight"].sum()) for name in ("0", "1", "3")] == [10, 8, 9]


def test_no_channel_is_ever_cut_off_where_magnitude_pruning_cuts_many():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 10))
    images = torch.zeros(1, 1, 8, 8)
    config = [{"op_types": ["Linear"], "sparse_ratio": 0.97}]
    ours = masks_of(copy.deepcopy(model), config, on_subcritical="clip")
    found = connectivity(model, images, ours)
    assert found.outputs == found.channels == 1.0
    _, theirs = LevelPruner(copy.deepcopy(model), config).compress()
    assert connectivity(model, images, theirs).channels < 0.8


def test_rounds_take_equal_shares_rewind_and_never_bring_a_weight_back():
    model, start = toy_model(), copy.deepcopy(toy_model(seed=5).state_dict())
    pruner = TopologicalMagnitudePruner(model, LAYERS)
    found, starts = [], []

    def train():
        starts.append({name: value.detach().clone() for name, value in model.named_parameters()})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        nn.functional.cross_entropy(model(toy_images(8)), torch.arange(8) % 4).backward()
        optimizer.step()

    steps = [1 / 3, 2 / 3, 1.0]
    history = prune_in_rounds(pruner, steps, train, rewind=start, on_round=lambda _: found.append(pruner.get_masks()))
    masks = pruner.get_masks()
    assert [record.kept["inner.weight"] for record in history] == pytest.approx(
        [0.3**step for step in steps], abs=2 / 576
    )
    for name in masks:
        kept = [masks_then[name]["weight"].bool() for masks_then in found]
        assert all(bool((later <= earlier).all()) for earlier, later in pairwise(kept))
        for before, stays in zip(starts, kept, strict=True):
            weight = before[f"{name}._nni_wrapper.weight"]
            assert torch.equal(weight, start[f"{name}.weight"] * stays)
    assert connectivity(toy_model(), toy_images(1), masks).channels == 1.0


@pytest.mark.parametrize(
    ("config", "knobs", "message"),
    [
        (LAYERS, {"conv_graph": "toeplitz"}, "needs example_inputs"),
        ([{**LAYERS[0], "granularity": "out_channel"}], {}, "granularity must be left out, got out_channel"),
        ([{**LAYERS[0], "dependency_group_id": 1}], {}, "dependency_group_id must be left out, got 1"),
        ([{"op_names": ["head"]}], {}, r"sparse_ratio or a sparse_threshold, got neither \(config_list\[0\]\)"),
    ],
)
def test_bad_requests_are_refused_before_wrapping(config, knobs, message):
    model = toy_model()
    with pytest.raises(ConfigError, match=message):
        TopologicalMagnitudePruner(model, config, **knobs)
    assert not any(hasattr(module, "_nni_wrapper") for module in model.modules())


def test_a_maximum_that_leaves_too_much_to_others_is_refused_before_wrapping():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 20), nn.ReLU(), nn.Linear(20, 5))
    group = {"sparse_ratio": 0.8, "global_group_id": "all"}
    config = [{"op_names": ["0"], "max_sparse_ratio": 0.1, **group}, {"op_names": ["2"], **group}]
    with pytest.raises(ConfigError, match=r"must leave a layer its spanning tree.*\(0.weight\+2.weight\)"):
        TopologicalMagnitudePruner(model, config)
    assert not hasattr(model[0], "_nni_wrapper")
    masks = masks_of(model, config, on_subcritical="clip")
    assert (int(masks["0"]["weight"].sum()), int(masks["2"]["weight"].sum())) == (2304, 24)
