"""What a metric chose is what the masks keep: through equal scores, large ones, single precision, and files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nni.compression.pruning.tools.sparse_gen import generate_sparsity
from torch import nn

from nni_topo import GeneticSearch, RandomPruner, StructuredPruner, TopologicalPruner
from nni_topo.errors import DataError
from nni_topo.hooks import ConfigAllocator, KeptSet, MetricCalculator, Planner, WeightCollector

LAYERS = {"op_types": ["Linear"], "sparse_ratio": 0.5}
TOGETHER = {**LAYERS, "global_group_id": 1}


def same(one, other):
    assert {name: set(targets) for name, targets in one.items()} == {name: set(each) for name, each in other.items()}
    for name, targets in one.items():
        for target, mask in targets.items():
            assert torch.equal(mask.double().expand_as(other[name][target]), other[name][target].double()), name


def equal_neurons():
    """Layers whose neurons lie as far from each other, and from the origin: all are worth the same."""
    model = nn.Sequential(*(nn.Linear(12, 12) for _ in range(3)))
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(torch.eye(12))
    return model


def searched(config):
    """A pruner whose search has nothing to tell subsets apart by, so that it ends anywhere."""
    search = GeneticSearch(generations=2, population_size=4, greedy_start=False)
    return TopologicalPruner(equal_neurons(), [config], solver=search)


@pytest.mark.parametrize("config", [LAYERS, TOGETHER, {"op_types": ["Linear"], "sparse_threshold": 0.4}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equal_scores_lose_no_choice_in_either_allocator_and_precision(config, dtype):
    pruner = searched({**config, "min_sparse_ratio": 0.25} if "sparse_threshold" in config else config)
    _, masks = pruner.compress()
    # Neither the first neurons stay nor the last, as they would if scores that are equal were ranked again.
    kept = masks["1"]["bias"].tolist()
    assert kept not in (sorted(kept), sorted(kept, reverse=True))
    metrics = pruner.calculator.calculate(pruner.collector.collect(pruner.context), pruner.context)
    rounded = KeptSet({m: {t: each.to(dtype) for t, each in targets.items()} for m, targets in metrics.items()})
    same(ConfigAllocator().allocate(rounded, pruner.context), masks)
    same(generate_sparsity(rounded, pruner.context.target_spaces), masks)


def test_neurons_that_are_worth_nothing_reach_a_threshold_of_zero():
    # Two corners, each five times: of the ten death times eight are zero, and none lies below zero.
    model = nn.Sequential(nn.Linear(2, 10))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2).repeat_interleave(5, 0))
    _, masks = TopologicalPruner(model, [{"op_names": ["0"], "sparse_threshold": 0.0}], solver="greedy").compress()
    assert bool(masks["0"]["bias"].all())


class LastOnes(MetricCalculator):
    """Every block is worth the same, whatever the layer; the last ones stay, so no order of scores is of any use."""

    def __init__(self, worth):
        self.worth = worth

    def calculate(self, data, context):
        rows = context.rows(lambda unit: np.full(unit.blocks, self.worth))
        return context.keep(
            {unit.name: np.arange(unit.blocks) >= unit.blocks - rows[unit.name] for unit in context.units}
        )


def last_ones(config, worth=1.0, **knobs):
    return StructuredPruner(equal_neurons(), [config], collector=WeightCollector(), calculator=LastOnes(worth), **knobs)


@pytest.mark.parametrize("worth", [0.0, 1e-300, 1.0, 2.0**53, 1e300])
def test_no_score_is_too_large_or_too_small_to_hold_a_choice(worth):
    _, masks = last_ones(TOGETHER, worth).compress()
    # 36 blocks of one size, of which 18 go; of equal ones those of the earlier layer first, and one always stays.
    assert [masks[name]["bias"].tolist() for name in "012"] == [
        [0.0] * 11 + [1.0],
        [0.0] * 7 + [1.0] * 5,
        [1.0] * 12,
    ]
    assert {mask.dtype for targets in masks.values() for mask in targets.values()} == {torch.float32}


def test_rounding_keeps_more_of_the_chosen_ones():
    _, masks = last_ones(TOGETHER, planner=Planner(round_to=4)).compress()
    assert [int(masks[name]["bias"].sum()) for name in "012"] == [4, 8, 12]
    assert masks["1"]["bias"].tolist() == [0.0] * 4 + [1.0] * 8


@pytest.mark.parametrize(("chosen", "got"), [([1, 1, 0, 0], "2, 0"), ([1, 0, 1, 1], "1, 2"), ([0] * 4, "0, 0")])
def test_parts_that_would_differ_or_be_emptied_are_refused(chosen, got):
    config = [{"op_names": ["0"], "sparse_ratio": 0.5, "internal_metric_block": 2}]
    context = RandomPruner(nn.Sequential(nn.Conv2d(4, 4, 1, groups=2)), config).context
    with pytest.raises(DataError, match=rf"equally many blocks, at least 1, got {got} \(0\.weight\)"):
        context.keep({"0.weight": np.array(chosen, dtype=bool)})
