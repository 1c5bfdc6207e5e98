from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from nni_topo.analysis import overlap_bound, tree_overlap
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
