from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from nni_topo import zoo
from nni_topo.errors import ConfigError, NniTopoError
from nni_topo.maths.search.weights import WeightSearch
from nni_topo.pruners.genetic_weight.pruner import GeneticWeightPruner
from nni_topo.pruners.registry import check_pruner_knobs
from nni_topo.runs.choices import load_prune_config
from nni_topo.speedup import masked_model
from nni_topo.testing import toy_evaluator, toy_model

SMALL = {"population_size": 8, "generations": 6, "random_rate": 0.05, "weakest_rate": 0.05}


def task(seed=0):
    """A classifier that needs two of its twenty inputs, its data, and labels it gets right."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 3))
    with torch.no_grad():
        model[0].weight[:, 2:] *= 0.01
    images = torch.randn(256, 20)
    with torch.no_grad():
        labels = model(images).argmax(1)
    return model, [(images[:128], labels[:128]), (images[128:], labels[128:])], (images, labels)


def accuracy(model, images, labels):
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).double().mean())


@pytest.mark.parametrize("layers", [["0"], ["0", "2"]])
def test_redundant_weights_go_and_the_masked_model_has_the_accuracy_reported(layers):
    model, batches, (images, labels) = task()
    pruner = GeneticWeightPruner(model, [{"op_names": layers}], validation=batches, search=SMALL)
    wrapped, masks = pruner.compress()
    measured = accuracy(wrapped, images, labels)
    pruner.unwrap_model()
    last = pruner.history.query("generation == 6").sort_values("fitness").iloc[-1]
    sizes = {name: masks[name]["weight"].numel() for name in layers}
    removed = 1 - sum(float(masks[name]["weight"].sum()) for name in layers) / sum(sizes.values())
    assert removed == pytest.approx(last.compression)
    assert removed > 0.3
    assert measured == last.accuracy == accuracy(masked_model(model, images[:2], masks), images, labels)
    assert last.fitness == pytest.approx(100 * (measured - 1.0) + removed)
    assert len(pruner.history) == 7 * 8


def test_validation_evaluate_and_evaluator_find_the_same():
    found = []
    for way in ("validation", "evaluate"):
        model, batches, (images, labels) = task()
        given = batches if way == "validation" else lambda net, i=images, l=labels: accuracy(net, i, l)  # noqa: E741
        pruner = GeneticWeightPruner(model, [{"op_names": ["0"]}], **{way: given}, search=SMALL)
        found.append(pruner.compress()[1]["0"]["weight"])
        pruner.unwrap_model()
    assert torch.equal(*found)
    model = toy_model()
    before = model.head.weight.detach().clone()
    pruner = GeneticWeightPruner(model, [{"op_names": ["head"]}], toy_evaluator(model), search=SMALL)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    assert 0 < float(masks["head"]["weight"].sum()) < 64
    assert torch.equal(model.head.weight, before)


@pytest.mark.parametrize("cap", [{"max_sparse_ratio": 0.25}, {"sparse_ratio": 0.25}])
def test_ratios_are_caps(cap):
    model, batches, _ = task()
    pruner = GeneticWeightPruner(
        model, [{"op_names": ["0"], **cap}], validation=batches, search={**SMALL, "alpha": 0.0, "damage_rate": 0.9}
    )
    _, masks = pruner.compress()
    assert int(masks["0"]["weight"].sum()) == 180


def test_the_file_of_the_example_is_one():
    path = Path(__file__).parents[3] / "configs" / "search_genetic_weight.yaml"
    config = load_prune_config(path)
    check_pruner_knobs(config.pruner, config.knobs, "configuration")
    model = zoo.create_model("small_cnn", num_classes=10, in_channels=1, image_size=8, seed=0)
    batches = [(torch.randn(8, 1, 8, 8), torch.arange(8))]
    knobs = {"search": {**config.knobs["search"], "generations": 1}}
    _, masks = GeneticWeightPruner(model, config.config_list, validation=batches, **knobs).compress()
    assert list(masks) == ["classifier.fc1"]


def test_history_names_lines_of_descent():
    model, batches, _ = task()
    pruner = GeneticWeightPruner(model, [{"op_names": ["0"]}], validation=batches, search=SMALL)
    assert pruner.history.empty
    pruner.compress()
    table = pruner.history
    assert list(table.columns) == [
        "generation", "individual", "fitness", "accuracy", "compression", "born", "partner"
    ]  # fmt: skip
    assert (table.born <= table.generation).all()
    assert not (table.individual == table.partner).any()
    lines = table.pivot(index="generation", columns="individual", values="fitness").to_numpy()
    assert (np.diff(lines, axis=0) >= 0).all()


BATCH = [(torch.zeros(2, 20), torch.tensor([0, 1]))]


@pytest.mark.parametrize(
    ("config", "knobs", "message"),
    [
        ({"op_names": ["0", "5"]}, {}, "a layer must be a known name, got '5'"),
        ({"op_names": ["0"], "target_names": ["bias"]}, {}, r"got bias without 0.weight \(0.bias\)"),
        ({"op_names": ["0"], "dependency_group_id": "a"}, {}, "dependency_group_id must be left out"),
        ({"op_names": ["0"], "sparse_threshold": 0.5}, {}, "sparse_threshold must be left out"),
        ({"op_names": ["0"], "granularity": "out_channel"}, {}, "granularity must be left out"),
        ({"op_names": ["0"], "min_sparse_ratio": 0.0}, {}, "min_sparse_ratio must be left out, got 0.0"),
        ({"op_names": ["0"], "global_group_id": "a"}, {}, "global_group_id must be left out, got a"),
        ({"op_names": ["0"], "internal_metric_block": 2}, {}, "internal_metric_block must be left out, got 2"),
        ({"op_names": ["0"]}, {"validation": []}, "at least one batch, got none"),
        ({"op_names": ["0"]}, {"validation": None}, "needs validation, evaluate or an evaluator"),
    ],
)
def test_bad_requests_are_refused_before_the_model_is_wrapped(config, knobs, message):
    model = task()[0]
    with pytest.raises(NniTopoError, match=message):
        GeneticWeightPruner(model, [config], **{"validation": BATCH, **knobs})
    assert not any(hasattr(module, "_nni_wrapper") for module in model.modules())


@pytest.mark.parametrize("rule", [{}, {"granularity": "default"}])
def test_an_unwrapped_model_is_wrapped_again(rule):
    pruner = GeneticWeightPruner(task()[0], [{"op_names": ["0"], **rule}], validation=BATCH)
    pruner.unwrap_model()
    pruner.wrap_model()
    assert list(pruner.context.target_spaces) == ["0"]


def test_an_accuracy_that_never_changes_is_told_after_the_first_generation(caplog):
    config_list = [{"op_names": ["0"]}]
    knobs = {"evaluate": lambda model: 0.5, "search": SMALL}
    GeneticWeightPruner(task()[0], config_list, **knobs).compress()
    (text,) = [each.getMessage() for each in caplog.records if "of generation 0" in each.getMessage()]
    assert "accuracy must differ between individuals" in text
    assert "got 0.5" in text
    assert len(caplog.records) == 1


def test_an_accuracy_that_changes_is_not_told(caplog):
    for beta in (1.0, 0.0):
        model, _, (images, _) = task()
        GeneticWeightPruner(
            model,
            [{"op_names": ["0"]}],
            evaluate=lambda net, given=images: float(net(given).detach().sigmoid().mean()),
            search={**SMALL, "alpha": 100.0, "beta": beta},
        ).compress()
    assert "of generation" not in caplog.text


def test_a_search_that_looks_at_nothing_is_refused():
    with pytest.raises(ConfigError, match="alpha or beta must be above 0"):
        WeightSearch(alpha=0.0, beta=0.0)


def test_individuals_without_damage_are_one_network_and_not_told(caplog):
    settings = {**SMALL, "damage_rate": 0.0, "beta": 1.0}
    GeneticWeightPruner(task()[0], [{"op_names": ["0"]}], evaluate=lambda model: 0.5, search=settings).compress()
    assert "of generation 0" not in caplog.text
    assert "of generation 1 " in caplog.text
