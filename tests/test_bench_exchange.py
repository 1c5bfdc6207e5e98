from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from bench_modules import BENCHMARKS, imported
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nni_topo.errors import ConfigError
from nni_topo.maths.least_squares.greedy import Products, SampleMatrix, forward_selection
from nni_topo.pruners.reconstruction.pruner import ReconstructionPruner
from nni_topo.testing import toy_images

with imported(BENCHMARKS, "exchange") as _module:
    exchange, ExchangePruner = _module.exchange, _module.ExchangePruner

MANY = 1000
few = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 10_000)


def mixed(seed, samples, channels, block, outputs):
    """Columns that are alike, and targets of them: where forward selection takes what it would give back."""
    rng = np.random.default_rng(seed)
    columns = rng.normal(size=(samples, channels * block)) @ rng.normal(size=(channels * block,) * 2)
    targets = columns @ rng.normal(size=(channels * block, outputs)) + rng.normal(size=(samples, outputs))
    return columns, targets / np.linalg.norm(targets)


def products(columns, targets, block, ridge=1e-4):
    gram = columns.T @ columns
    return Products(gram + ridge * np.diag(np.diag(gram)), columns.T @ targets, block)


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


def readers(seed, channels, kinds, samples=9):
    found = []
    for place, (kind, block, outputs) in enumerate(kinds):
        columns, targets = mixed(seed + place, samples if kind is SampleMatrix else 60, channels, block, outputs)
        ridge = 1e-4 * np.square(columns).sum(0)
        found.append(
            SampleMatrix(np.ascontiguousarray(columns.T), targets, ridge, block)
            if kind is SampleMatrix
            else products(columns, targets, block)
        )
    return found


@few
@given(
    seed=seeds,
    kinds=st.lists(
        st.tuples(st.sampled_from([Products, SampleMatrix]), st.integers(1, 3), st.integers(1, 12)),
        min_size=1,
        max_size=3,
    ),
    parts=st.sampled_from([1, 2]),
)
def test_each_exchange_is_the_best_of_all_pairs(seed, kinds, parts):
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


@few
@given(seed=seeds, block=st.integers(1, 3), kind=st.sampled_from([Products, SampleMatrix]))
def test_the_error_falls_with_every_exchange_until_no_pair_is_better(seed, block, kind):
    layers = readers(seed, 12, [(kind, block, 5)])
    start = np.random.default_rng(seed).permutation(12)[:5]  # worse than selection: more to exchange
    errors = [left(layers, start)]
    after, taken = exchange(layers, start, MANY)
    errors += [left(layers, exchange(layers, start, count)[0]) for count in range(1, len(taken) + 1)]
    np.testing.assert_allclose(-np.diff(errors), taken, rtol=1e-3, atol=1e-7 * abs(errors[-1]))
    assert (np.diff(errors) < 0.0).all()
    assert min(left(layers, each) for each in swapped(after.tolist(), 12)) >= errors[-1] - 2e-5 * abs(errors[-1])


def test_what_selection_takes_first_goes_when_others_make_it_dispensable():
    # The target is the sum of two sources: the best single channel is nearly this sum, and both sources don't need it.
    rng = np.random.default_rng(0)
    sources = np.linalg.qr(rng.normal(size=(50, 2)))[0]
    columns = np.c_[sources.sum(1) + 0.1 * rng.normal(size=50), sources]
    layers = [products(columns, sources.sum(1, keepdims=True), 1)]
    chosen, _ = forward_selection(layers, 2)
    assert 0 in chosen
    after, taken = exchange(layers, chosen, MANY)
    assert sorted(after.tolist()) == [1, 2]
    assert len(taken) == 1


def test_exchanges_stay_within_a_part_and_take_the_place_of_what_goes():
    layers = readers(3, 8, [(Products, 2, 4)])
    start = [0, 1, 6, 7]
    after, taken = exchange(layers, start, MANY, parts=2)
    assert len(taken)
    assert (after // 4).tolist() == [0, 0, 1, 1]


def test_the_limit_holds_and_none_changes_nothing():
    layers = readers(7, 12, [(Products, 1, 5)])
    start = np.array([3, 1, 2, 0])
    assert exchange(layers, start, 0)[0].tolist() == [3, 1, 2, 0]
    assert len(exchange(layers, start, 1)[1]) == 1
    everything = np.arange(12)[::-1]
    assert exchange(layers, everything, MANY)[0].tolist() == everything.tolist()


@few
@given(seed=seeds)
def test_equal_exchanges_take_the_lowest_channels_whatever_rounding_says(seed):
    rng = np.random.default_rng(seed)
    sources = rng.normal(size=(40, 6))
    order = rng.permutation(12)
    columns, target = sources[:, order % 6], sources @ rng.normal(size=(6, 3))
    layer = products(columns, target / np.linalg.norm(target), 1)
    noise = 1.0 + 4.0 * np.finfo(float).eps * rng.integers(-1, 2, layer.gram.shape)
    upper = np.triu(layer.gram * noise)
    moved = Products(upper + np.triu(upper, 1).T, layer.cross * (1.0 + 4.0 * np.finfo(float).eps), 1)
    start = np.array([first for first in range(12) if order[first] % 6 < 1] + [*np.flatnonzero(order % 6 == 1)])
    after = exchange([layer], start, MANY)[0]
    np.testing.assert_array_equal(exchange([moved], start, MANY)[0], after)
    for channel in after:
        twin = int(np.flatnonzero((order % 6 == order[channel] % 6) & (np.arange(12) != channel))[0])
        assert channel < twin or channel in start


@pytest.mark.parametrize(
    ("chosen", "most", "parts", "message"),
    [
        ([0, 0], 1, 1, "chosen must be different channels"),
        ([0, 9], 1, 1, r"chosen must be different channels in \[0, 7\]"),
        ([0, 1], -1, 1, "most must be an integer of at least 0, got -1"),
        ([0, 1], 1, 3, "parts must divide 8 channels, got 3"),
        ([], 1, 1, r"keep must be in \[1, 8\], got 0"),
    ],
)
def test_bad_input_is_refused(chosen, most, parts, message):
    with pytest.raises(ConfigError, match=message):
        exchange(readers(1, 8, [(Products, 1, 2)]), chosen, most, parts)


def wide():
    """Many channels that are alike, so that forward selection takes some that it would give back."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 24, 3), nn.BatchNorm2d(24), nn.ReLU()),
        *(nn.Conv2d(24, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)),
    ).eval()


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.quick_every(2)
def test_the_pruner_exchanges_as_often_as_it_is_told(sequential):
    config_list = [{"op_names": ["0", "3"], "sparse_ratio": 0.75}]
    batches = [toy_images(32)]

    def masks(kind, **knobs):
        pruner = kind(wide(), config_list, calibration=batches, sequential=sequential, **knobs)
        found = pruner.compress()[1]
        return [found[name]["bias"] for name in ("0", "3")]

    plain, none = masks(ReconstructionPruner), masks(ExchangePruner, swaps=0)
    one, many, again = (masks(ExchangePruner, swaps=count) for count in (1, MANY, MANY))
    assert all(map(torch.equal, plain, none))
    assert all(map(torch.equal, many, again))
    assert {int((mine != theirs).sum()) for mine, theirs in zip(plain, one, strict=True)} <= {0, 2}
    assert [int(each.sum()) for each in many] == [6, 4]
    assert sequential or not all(map(torch.equal, plain, many))
