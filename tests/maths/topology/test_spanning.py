import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.csgraph import minimum_spanning_tree
from topology_clouds import make_cloud, make_subsets

from nni_topo.errors import DataError
from nni_topo.maths.topology.spanning import subset_deaths
from nni_topo.topology import distinct_points, h0_deaths, maximum_spanning_tree, pairwise_distances


def reference_deaths(distances: np.ndarray) -> np.ndarray:
    """Return SciPy's tree edges; it takes zeros for missing edges, so that it's given the edges' ranks, from 1."""
    lengths, ranks = np.unique(distances, return_inverse=True)
    tree = minimum_spanning_tree(1.0 + ranks.reshape(distances.shape)).tocoo()
    return lengths[np.sort(tree.data).astype(int) - 1][::-1]


@pytest.mark.parametrize("seed", range(30))
def test_batched_trees_equal_scipy_per_subset(seed):
    distances = pairwise_distances(make_cloud(seed))
    n = len(distances)
    for size in {1, min(2, n), (n + 1) // 2, n}:
        subsets = make_subsets(seed, 7, n, size)
        deaths = subset_deaths(distances, subsets)
        assert deaths.shape == (7, size - 1)
        for subset, row in zip(subsets, deaths, strict=True):
            np.testing.assert_array_equal(row, reference_deaths(distances[np.ix_(subset, subset)]))


@pytest.mark.parametrize("size", [5, 90, 200, 400])
def test_sparse_and_dense_subsets_in_several_chunks(size):
    distances = pairwise_distances(np.random.default_rng(0).normal(size=(400, 6)))
    subsets = make_subsets(1, 130, 400, size)
    deaths = subset_deaths(distances, subsets)
    for row in (0, 64, 129):
        expected = reference_deaths(distances[np.ix_(subsets[row], subsets[row])])
        np.testing.assert_array_equal(deaths[row], expected)


def test_deaths_by_hand():
    line = np.array([0.0, 1.0, 5.0, 5.0])
    distances = np.abs(np.subtract.outer(line, line))
    np.testing.assert_array_equal(h0_deaths(distances), [4.0, 1.0, 0.0])
    subsets = np.array([[True, False, True, False], [False, False, True, True]])
    np.testing.assert_array_equal(subset_deaths(distances, subsets), [[5.0], [0.0]])
    assert h0_deaths([[0.0]]).shape == (0,)


@given(st.integers(0, 10_000), st.floats(1e-3, 1e3))
@settings(max_examples=60, deadline=None)
def test_deaths_ignore_order_and_place_and_follow_scale(seed, scale):
    points = make_cloud(seed)
    rng = np.random.default_rng(seed)
    deaths = h0_deaths(pairwise_distances(points))
    moved = scale * (points[rng.permutation(len(points))] + rng.normal(size=points.shape[1]))
    np.testing.assert_allclose(h0_deaths(pairwise_distances(moved)), scale * deaths, rtol=1e-6, atol=1e-12 * scale)


@pytest.mark.parametrize(
    ("distances", "message"),
    [
        ([[0.0, 1.0]], r"got \(1, 2\)"),
        (np.empty((0, 0)), r"got \(0, 0\)"),
        ([[0.0, np.nan], [np.nan, 0.0]], "finite, got nan"),
        ([[0.0, 1.0], [2.0, 0.0]], r"symmetric, got 1.0 .* at \(0, 1\)"),
        ([[0.0, -1.0], [-1.0, 0.0]], ">= 0"),
        ([[1.0, 1.0], [1.0, 0.0]], "zero diagonal"),
    ],
)
def test_malformed_distances_are_refused(distances, message):
    with pytest.raises(DataError, match=message):
        h0_deaths(distances)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_maximum_spanning_tree_of_a_parameter(dtype):
    weight = torch.nn.Parameter(torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(dtype))
    np.testing.assert_array_equal(maximum_spanning_tree(weight), maximum_spanning_tree(weight.tolist()))


def test_maximum_spanning_tree_refuses_nan_and_other_shapes():
    with pytest.raises(DataError, match="weight must be finite"):
        maximum_spanning_tree([[np.nan]])
    with pytest.raises(DataError, match="weight must be a matrix"):
        maximum_spanning_tree(np.ones((2, 2, 3)))


def planted(seed, kinds, copies, noise):
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(kinds, 30))
    points = np.concatenate([centres, np.repeat(centres, copies, axis=0)])
    points[kinds:] += noise * generator.normal(size=(kinds * copies, 30))
    return points[generator.permutation(len(points))]


@pytest.mark.parametrize("kinds", [2, 5, 17])
@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("scale", [1.0, 1e-8, 1e6])
def test_planted_copies_are_told_from_different_points(kinds, copies, scale):
    assert distinct_points(scale * planted(kinds, kinds, copies, 0.05)) == kinds


def test_equal_points_are_copies_without_noise():
    assert distinct_points(planted(0, 6, 2, 0.0)) == 6
    assert distinct_points(np.ones((4, 3))) == 1
    assert distinct_points([[1.0, 2.0]]) == 1
    assert distinct_points([[1.0], [1.0]]) == 1
    assert distinct_points([[1.0], [1.5]]) == 2


def test_of_equally_large_gaps_the_one_with_the_fewest_components_counts():
    # deaths 100, 10 and 1: both ratios are 10
    assert distinct_points([[0.0], [1.0], [11.0], [111.0]]) == 2


def test_points_that_are_not_finite_are_refused():
    with pytest.raises(DataError, match="points must be finite"):
        distinct_points([[0.0], [np.nan]])
