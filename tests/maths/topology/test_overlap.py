from __future__ import annotations

from fractions import Fraction
from itertools import pairwise, permutations

import numpy as np
import pytest

from nni_topo.analysis import (
    network_overlap_bound,
    network_tree_overlap,
    overlap_bound,
    tree_overlap,
)
from nni_topo.errors import ConfigError, DataError
from nni_topo.topology import maximum_spanning_tree

SHAPES = [(100, 10), (100, 100), (784, 100), (30, 40), (5, 3), (2, 2)]


def sparse_overlap(rng: np.random.Generator, m: int, n: int, density: float) -> float:
    """Overlap of the tree with the largest of the weights that aren't zero."""
    weight = rng.random((m, n)) * (rng.permutation(m * n) < round(density * m * n)).reshape(m, n)
    alpha = m + n - 1
    tree = maximum_spanning_tree(weight).ravel() & (weight.ravel() > 0)
    largest = np.argsort(-weight, axis=None, kind="stable")[:alpha]
    return tree[largest].sum() / alpha


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_the_bound_by_fractions(m, n):
    terms = [Fraction((m - i) * (n - i), m * n - i) for i in range(min(m, n))]
    assert overlap_bound(m, n) == pytest.approx(float(sum(terms) / (m + n - 1)), rel=1e-12)
    assert overlap_bound(n, m) == pytest.approx(overlap_bound(m, n), rel=1e-12)


def test_the_papers_lowest_bound():
    assert overlap_bound(100, 10) == pytest.approx(0.05, abs=0.002)
    assert overlap_bound(1, 50) == overlap_bound(50, 1) == overlap_bound(1, 1) == 1.0


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_random_layers_keep_the_bound(m, n):
    rng = np.random.default_rng(m + n)
    repeats = 4 if m * n > 50_000 else 40
    mean = np.mean([tree_overlap(rng.normal(size=(m, n))) for _ in range(repeats)])
    assert mean >= overlap_bound(m, n) - 0.02
    assert mean > 0.3


@pytest.mark.parametrize("density", [0.1, 0.3, 0.7])
def test_sparse_random_layers_keep_the_bound(density):
    rng = np.random.default_rng(0)
    mean = np.mean([sparse_overlap(rng, 100, 100, density) for _ in range(20)])
    assert mean >= overlap_bound(100, 100, density)


def test_the_obvious_reading_of_the_sparse_corollary_is_no_bound():
    i = np.arange(100)
    obvious = ((100 - i) * (100 - i) / (0.1 * 100 * 100 - i)).sum() / 199
    assert obvious == pytest.approx(1.74, abs=0.005)
    rng = np.random.default_rng(1)
    measured = np.mean([sparse_overlap(rng, 100, 100, 0.1) for _ in range(20)])
    assert measured == pytest.approx(0.84, abs=0.02)
    assert overlap_bound(100, 100, 0.1) < measured < obvious


@pytest.mark.parametrize("density", [0.05, 0.1, 0.3, 1.0])
def test_the_bound_never_exceeds_one(density):
    for m, n in ((100, 100), (200, 40), (41, 40)):
        assert 0.0 < overlap_bound(m, n, density) <= 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 3), "m must be an integer of at least 1, got 0"),
        ((3, -1), "n must be an integer of at least 1, got -1"),
        ((10, 10, 0.0), r"density must be in \[0.19, 1\] for a 10 x 10 layer, got 0.0"),
        ((10, 10, 0.1), "got 0.1"),
        ((10, 10, 1.5), "got 1.5"),
    ],
)
def test_impossible_bounds_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        overlap_bound(*arguments)


def test_overlap_by_hand():
    assert tree_overlap([[4.0, 3.0, 0.1], [2.0, 1.0, 0.2]]) == 0.75  # 1.0 closes a cycle, 0.2 joins the third input
    assert tree_overlap(np.ones((1, 7))) == 1.0
    with pytest.raises(DataError, match="finite"):
        tree_overlap([[np.nan]])


def edges_of(widths):
    """The edges of a chain of layers, as pairs of (layer, node)."""
    return [((k, i), (k + 1, j)) for k, (n, m) in enumerate(pairwise(widths)) for j in range(m) for i in range(n)]


@pytest.mark.parametrize("widths", [(2, 2), (1, 1, 1), (1, 2, 1), (2, 2, 1), (2, 1, 2, 1)])
def test_the_networks_bound_counts_the_weights_whose_ends_no_larger_one_touches(widths):
    edges, alpha = edges_of(widths), sum(widths) - 1
    untouched = orders = 0
    for order in permutations(edges):
        touched: set = set()
        for ends in order[:alpha]:
            untouched += touched.isdisjoint(ends)
            touched.update(ends)
        orders += 1
    assert network_overlap_bound(widths) == pytest.approx(untouched / orders / alpha, rel=1e-12)


def test_the_networks_bound_of_a_single_layer_is_at_least_the_papers():
    # 2 x 2: the largest is in the tree, the second with probability 1/3 for certain, the third never
    assert network_overlap_bound([2, 2]) == pytest.approx(float(Fraction(4, 9)))
    assert overlap_bound(2, 2) == pytest.approx(float(Fraction(4, 9)))
    for m, n in SHAPES:
        assert network_overlap_bound([m, n]) >= overlap_bound(m, n) - 1e-12
    assert network_overlap_bound([100, 10]) == pytest.approx(0.084, abs=0.0005)


@pytest.mark.parametrize("widths", [(20, 30, 10), (50, 10, 10, 5), (8, 8, 8, 8)])
def test_random_networks_keep_the_bound(widths):
    rng = np.random.default_rng(sum(widths))
    found = [network_tree_overlap([rng.normal(size=(m, n)) for n, m in pairwise(widths)]) for _ in range(40)]
    assert np.mean(found) >= network_overlap_bound(widths)


def test_the_overlap_of_a_network_by_hand():
    # a loop of four: 5 and 4 join a and both b, 3 the output, 2 would close the loop
    assert network_tree_overlap([[[5.0], [4.0]], [[3.0, 2.0]]]) == 1.0
    # three of the four largest are a loop's sides on one input pair: 6, 5, 4, 3 close it, the output needs 1
    assert network_tree_overlap([[[6.0, 5.0], [4.0, 3.0]], [[1.0, 0.5]]]) == 0.75


@pytest.mark.parametrize("widths", [[3], [3, 0], []])
def test_a_network_has_layers_of_at_least_one_node(widths):
    with pytest.raises(ConfigError, match="widths must be two or more numbers of at least 1"):
        network_overlap_bound(widths)
