"""What scripts of the benchmarks compute themselves, by hand: selections, recoveries, splits and tables."""

from __future__ import annotations

import functools
import itertools
import math
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from bench_modules import BENCHMARKS, imported
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from nni_topo import zoo
from nni_topo.clustering import Growth, grow
from nni_topo.maths.least_squares.greedy import Products, SampleMatrix, forward_selection
from nni_topo.runs.expected import RECORDED

PROJECT = Path(__file__).parents[1]
MANY = 1000


@functools.cache
def bench(folder: str, name: str) -> ModuleType:
    """A module of a folder of ``benchmarks/``."""
    with imported(BENCHMARKS / folder, name) as module:
        return module


# Exchanges behind forward selection


def readers(seed, channels, kinds):
    """Sums or samples of columns that are alike, and targets: selection takes some that it would give back."""
    found = []
    for place, (kind, block, outputs) in enumerate(kinds):
        rng, samples = np.random.default_rng(seed + place), 9 if kind is SampleMatrix else 60
        columns = rng.normal(size=(samples, channels * block)) @ rng.normal(size=(channels * block,) * 2)
        targets = columns @ rng.normal(size=(channels * block, outputs)) + rng.normal(size=(samples, outputs))
        targets /= np.linalg.norm(targets)
        ridge = 1e-4 * np.square(columns).sum(0)
        if kind is SampleMatrix:
            found.append(SampleMatrix(np.ascontiguousarray(columns.T), targets, ridge, block))
        else:
            found.append(Products(columns.T @ columns + np.diag(ridge), columns.T @ targets, block))
    return found


def left(layers, chosen):
    """Squared errors of the ridge solutions from some channels, less what no channel changes, by lstsq."""
    total = 0.0
    for layer in layers:
        own = np.concatenate([np.arange(layer.block) + channel * layer.block for channel in chosen])
        solution = np.linalg.lstsq(layer.gram[np.ix_(own, own)], layer.cross[own], rcond=None)[0]
        total -= float((solution * layer.cross[own]).sum())
    return total


def swapped(chosen, channels, parts=1):
    """All sets that one exchange leads to."""
    size = channels // parts
    others = sorted(set(range(channels)) - set(chosen))
    return [
        [new if each == old else each for each in chosen]
        for new, old in itertools.product(others, chosen)
        if new // size == old // size
    ]


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    kinds=st.lists(
        st.tuples(st.sampled_from([Products, SampleMatrix]), st.integers(1, 3), st.integers(1, 12)),
        min_size=1,
        max_size=3,
    ),
    parts=st.sampled_from([1, 2]),
)
def test_each_exchange_is_the_best_of_all_pairs(seed, kinds, parts):
    exchange = bench("", "exchange").exchange
    layers = readers(seed, 8, kinds)
    chosen = forward_selection(layers, 4, parts)[0].tolist()
    for _ in range(6):
        before = left(layers, chosen)
        best = min(left(layers, each) for each in swapped(chosen, 8, parts))
        after, taken = exchange(layers, chosen, 1, parts)
        if not len(taken):
            assert before - best <= 2e-5 * abs(before)
            np.testing.assert_array_equal(after, chosen)
            return
        assert left(layers, after) == pytest.approx(best, abs=2e-6 * abs(before))
        assert before - left(layers, after) == pytest.approx(taken[0], rel=1e-4, abs=1e-7 * abs(before))
        chosen = after.tolist()


# Rounding, loops of a network, sub-clustering


@pytest.mark.parametrize("reading", ["scott", "10"])
def test_a_cut_tree_is_what_grows_to_the_threshold(reading):
    rules = bench("clustering", "subcluster_rules")
    generator = np.random.default_rng(0)
    points = np.maximum(generator.normal(size=(50, 4)) @ generator.normal(size=(4, 60)), 0.0)
    covariance = np.cov(points, bias=True)
    layer = rules.GrownLayer(points, covariance, 12, 0.3, 0)
    tree = grow(points, covariance, 12, Growth(bins=rules.READINGS[reading].bins), energy=0.3, seed=0)
    assert layer.kept(rules.READINGS[reading]) == (len(tree.leaves), tree.depth)


def test_what_the_page_on_the_sources_says_the_nodes_leave():
    rules = bench("clustering", "subcluster_rules")
    page = (PROJECT / "docs" / "sources.md").read_text(encoding="utf-8")
    sizes = {
        "lenet300": (1, 28),
        "lenet5": (1, 32),
        "lenet5_like": (1, 28),
        "cnn12": (3, 32),
        "vgg16_modified": (3, 32),
    }
    found = {}
    for net, (channels, size) in sizes.items():
        model = zoo.create_model(net, num_classes=10, in_channels=channels, image_size=size)
        layers = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)][:-1]
        if net == "lenet5":
            layers.remove("classifier.fc1")
        found[net] = f"{100 * rules.removed_by_source(net, model, layers):.1f} %"
    report = bench("clustering", "subcluster_report")
    assert {net: f"{share} %" for net, share in report.TEXT_NODES_REMOVE.items()} == found
    assert found["lenet300"] in page
    assert found["lenet5"] in page
    for net, name in (("lenet5_like", "LeNet-5-like"), ("cnn12", "12-layer CNN"), ("vgg16_modified", "VGG-16 to the")):
        (row,) = (line for line in page.splitlines() if re.search(rf"\| {name}.*removed", line))
        assert f"{found[net]} removed" in row, net


# The BERT tutorial


# The comparison on networks that chose no default


def record(pruner, seed, tested, validated):
    step = {"accuracy_compensated": tested, "validation_compensated": validated}
    costs = {"flops": 1.0, "flops_before": 2.0, "params": 1.0, "params_before": 2.0, "accuracy_before": 0.9}
    cell = {"model": "ResNet-20", "data": "", "pruner": pruner, "seed": seed, "target": "10 % of the MACs left"}
    return {**costs, **step, **cell, "pruner_name": pruner.split(",")[0]}


def test_the_split_is_even_and_takes_no_image_that_a_default_was_chosen_on():
    labels = np.repeat(np.arange(10), 6000)
    train, test = bench("fresh_networks", "split").split(labels)
    assert not set(train) & set(test)
    assert np.bincount(labels[test]).tolist() == [500] * 10
    assert np.bincount(labels[train]).tolist() == [2_500] * 10


def test_what_distillation_leaves_is_the_table_of_the_package():
    module = bench("fresh_networks", "left_by_distillation")
    rows = module.shares_left(module.read())
    found = [(share, *module.limits(cells)) for share, cells in rows.items()]
    assert found == [pytest.approx(row, abs=0.005) for row in RECORDED]
    assert sum(map(module.held_for_others, rows.values())) >= 0.85 * sum(map(len, rows.values()))
    # The logarithms of three kinds, 0.05, 0.1 and 0.2, have the mean of 0.1, and are ln 2 apart; t is 2.92.
    kinds = [("a", 0.05), ("a", 0.05), ("b", 0.1), ("c", 0.2)]
    wide = 2.9200 * math.sqrt(4.0 / 3.0) * math.log(2.0)
    assert module.limits(kinds) == pytest.approx((0.1 * math.exp(-wide), min(0.1 * math.exp(wide), 1.0)), rel=1e-3)
    # Within a kind 0.05 and 0.2 differ from their mean by ln 4 / 2 each.
    varied = [("a", 0.05), ("a", 0.2), ("b", 0.1), ("c", 0.1)]
    wide = 2.9200 * math.sqrt(math.log(2.0) ** 2 * 2.0)
    assert module.limits(varied)[0] == pytest.approx(0.1 * math.exp(-wide), rel=1e-3)
    # The range of the kinds at 0.1 has no width: 0.1 of one of them is in it, and 0.2 isn't.
    assert module.held_for_others([("a", 0.1), ("b", 0.1), ("c", 0.2)]) == 2


def test_holm_is_that_of_its_definition():
    # sorted 0.001, 0.012, 0.04, 0.04, 0.2 times 5, 4, 3, 2, 1, and never below the one before
    found = bench("fresh_networks", "report").holm([0.001, 0.2, 0.012, 0.04, 0.04])
    assert found == pytest.approx([0.005, 0.2, 0.048, 0.12, 0.12])


def test_the_best_baseline_is_the_best_on_validation_images():
    tested = {"l1": (0.9,) * 3, "fpgm": (0.7,) * 3, "reconstruction": (0.72, 0.74, 0.79)}
    rows = {
        name: {seed: record(name, seed, value, 0.5 if name == "l1" else 0.6) for seed, value in enumerate(values)}
        for name, values in tested.items()
    }
    found = bench("fresh_networks", "report").compared(rows, "reconstruction", "accuracy_compensated")
    assert (found.baseline, found.networks) == ("fpgm", 3)
    assert (found.ours, found.theirs) == pytest.approx((75.0, 70.0))
    assert found.p == pytest.approx(stats.ttest_rel(tested["reconstruction"], tested["fpgm"]).pvalue)
