"""Choices between numbers that are equal but for rounding: a few units in the last place must not flip them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nni_topo import TopologicalPruner
from nni_topo.maths.clustering.subclustering import Growth, grow, hoh_threshold
from nni_topo.maths.least_squares.greedy import Products, forward_selection
from nni_topo.maths.search.subsets import GeneticSearch, SubsetGeneticAlgorithm
from nni_topo.maths.ties import first_largest_along
from nni_topo.pruners.allocators import keep_highest
from nni_topo.pruners.cluster import best_of
from nni_topo.pruners.energy import cumulative_shares
from nni_topo.pruners.planner import Planner
from nni_topo.pruners.solving import solve_tolerance
from nni_topo.pruners.units import PruningUnit
from nni_topo.topology import farthest_point_order, pairwise_distances

seeds = st.integers(0, 10_000)
few = settings(max_examples=40, deadline=None)


def rounded_otherwise(values, seed, most=16):
    """Move every value by up to so many units in its last place, at random."""
    steps = np.random.default_rng(seed).integers(-most, most + 1, np.shape(values))
    values = np.asarray(values, dtype=np.float64)
    return values + steps * np.where(values == 0.0, 0.0, np.spacing(np.abs(values)))


def symmetric(matrix):
    upper = np.triu(matrix, 1)
    return upper + upper.T + np.diag(np.diagonal(matrix))


def unit(blocks, parts=1, elements=4, **keys):
    bounds = {"min_sparse_ratio": 0.0, "max_sparse_ratio": 1.0}
    target = {"sparse_ratio": None, "sparse_threshold": None, "global_group_id": None}
    return PruningUnit(
        name="layer",
        members=(("layer", "weight"),),
        blocks=blocks,
        parts=parts,
        elements=elements,
        **{**bounds, **target, **keys},
    )


def few_values(seed, size=12):
    return np.random.default_rng(seed).integers(1, 5, size).astype(float)


@given(seeds)
@few
def test_farthest_points(seed):
    grid = np.random.default_rng(seed).integers(0, 3, size=(12, 3)).astype(float)
    distances = pairwise_distances(grid)
    moved = symmetric(rounded_otherwise(distances, seed))
    np.testing.assert_array_equal(farthest_point_order(moved)[0], farthest_point_order(distances)[0])


@given(seeds, st.integers(1, 7))
@few
def test_least_squares_selection(seed, keep):
    generator = np.random.default_rng(seed)
    columns = generator.normal(size=(30, 8))
    columns[:, generator.permutation(8)[:5]] = columns[:, generator.integers(0, 8, 5)]
    target = columns @ generator.integers(-1, 2, size=(8, 2)).astype(float)
    gram, cross = columns.T @ columns, columns.T @ target
    moved = Products(symmetric(rounded_otherwise(gram, seed, 4)), rounded_otherwise(cross, seed, 4), 1)
    chosen = (forward_selection([layer], keep)[0] for layer in (moved, Products(gram, cross, 1)))
    np.testing.assert_array_equal(*chosen)


@given(seeds, st.integers(1, 6), st.sampled_from([1, 2]))
@few
def test_blocks_that_stay(seed, rows, parts):
    scores = few_values(seed)
    layer = unit(12, parts)
    kept = keep_highest(layer, rounded_otherwise(scores, seed), rows)
    np.testing.assert_array_equal(kept, keep_highest(layer, scores, rows))


def test_points_of_a_grid_are_pruned_by_the_search_and_not_by_their_index():
    # Five copies of each corner: all death times but four are equal.
    model = torch.nn.Sequential(torch.nn.Linear(3, 20))
    with torch.no_grad():
        model[0].weight.copy_(4.0 * torch.eye(4)[:, :3].repeat_interleave(5, 0) + 4.0)
    pruner = TopologicalPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.8}], solver="greedy")
    _, masks = pruner.compress()
    assert masks["0"]["weight"][:, 0].reshape(4, 5).tolist() == [[1.0, 0.0, 0.0, 0.0, 0.0]] * 4


@pytest.mark.parametrize("strict", [False, True])
@given(seeds)
@few
def test_scores_at_a_threshold(strict, seed):
    scores = few_values(seed)
    planner = Planner(strict=strict)
    passing = int((scores > 2.0).sum() if strict else (scores >= 2.0).sum())
    for losses in (scores, rounded_otherwise(scores, seed)):
        rows = planner.rows([unit(12, sparse_threshold=2.0)], lambda _, losses=losses: losses, torch.nn.Module())
        assert rows == {"layer": max(passing, 1)}


@pytest.mark.parametrize(("strict", "kept"), [(False, 3), (True, 1)])
def test_a_threshold_on_single_weights_is_met_as_it_is(strict, kept):
    # 0.5, 0.5 and what is above; one hair below 0.5 counts as 0.5 only where a loss is a sum of several elements.
    losses = np.array([0.1, 0.5, 0.5, 0.5 - 1e-12, 0.7])
    found = {}
    for elements in (1, 4):
        each = unit(5, elements=elements, sparse_threshold=0.5)
        rows = Planner(strict=strict).rows([each], lambda _: losses, torch.nn.Module())
        found[elements] = rows["layer"]
    assert found == {1: kept, 4: kept if strict else 4}


@given(seeds)
@few
def test_layers_under_one_budget(seed):
    profiles = [np.sort(few_values(seed + i))[::-1].copy() for i in range(3)]

    def removed(each):
        return solve_tolerance(each, [(0, 11)] * 3, lambda gone: 1.0 - sum(gone) / 36.0, 0.5)

    moved = [np.sort(rounded_otherwise(p, seed + i))[::-1].copy() for i, p in enumerate(profiles)]
    assert removed(moved) == removed(profiles)


def test_single_weights_are_ranked_as_they_are():
    scores = np.array([1.0, 1.0 + 1e-12, 1.0 + 2e-12])
    assert keep_highest(unit(3, elements=1), scores, 1).tolist() == [False, False, True]
    assert keep_highest(unit(3, elements=2), scores, 1).tolist() == [True, False, False]


@given(seeds)
@few
def test_energies(seed):
    energies = few_values(seed)
    shares = cumulative_shares(torch.from_numpy(energies))
    moved = cumulative_shares(torch.from_numpy(rounded_otherwise(energies, seed)))
    assert torch.equal(moved.argsort(), shares.argsort())
    torch.testing.assert_close(moved, shares, rtol=1e-12, atol=0.0)


@given(seeds)
@few
def test_survivors(seed):
    generator = np.random.default_rng(seed)
    labels, scores = generator.integers(-1, 3, 12), few_values(seed)
    np.testing.assert_array_equal(best_of(labels, rounded_otherwise(scores, seed)), best_of(labels, scores))


@given(seeds)
@few
def test_pairs_by_likeness(seed):
    likeness = np.random.default_rng(seed).integers(0, 3, size=(2, 5, 4)).astype(float)
    moved = torch.from_numpy(rounded_otherwise(likeness, seed))
    np.testing.assert_array_equal(first_largest_along(moved, 1).numpy(), likeness.argmax(1))


@given(seeds)
@settings(max_examples=15, deadline=None)
def test_genetic_searches(seed):
    def search(noise):
        fitness = lambda genes: rounded_otherwise(1.0 + (genes[:, :4].sum(1) // 2), noise.integers(1 << 30))  # noqa: E731
        search = SubsetGeneticAlgorithm(10, 4, fitness, GeneticSearch(generations=6), seed=seed)
        search.run()
        return search

    one, other = search(np.random.default_rng(1)), search(np.random.default_rng(2))
    np.testing.assert_array_equal(one.best_individual()[1], other.best_individual()[1])
    assert len(one.trace) == len(other.trace)


@given(seeds)
@settings(max_examples=15, deadline=None)
def test_histograms_and_splits(seed):
    generator = np.random.default_rng(seed)
    values = [generator.integers(0, 11, 9).astype(float) for _ in range(4)]
    moved = [rounded_otherwise(each, seed) for each in values]
    assert hoh_threshold(moved, 0.5) == pytest.approx(hoh_threshold(values, 0.5), rel=1e-12)
    points = np.kron(np.eye(4), np.ones((3, 1))) * 9.0 + generator.normal(size=(12, 4))
    covariance = np.kron(np.diag([2.0, 5.0, 5.0, 2.0]), np.ones((3, 3)))
    one, other = (
        grow(points, c, 4, Growth("max"), threshold=2.0, at_most=6)
        for c in (covariance, symmetric(rounded_otherwise(covariance, seed)))
    )
    assert [c.members for c in one.clusters] == [c.members for c in other.clusters]
    assert sum(not c.children for c in one.clusters) == 6
