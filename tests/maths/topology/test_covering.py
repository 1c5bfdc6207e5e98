import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import directed_hausdorff
from topology_clouds import make_cloud, make_subsets

from nni_topo.errors import ConfigError, DataError
from nni_topo.topology import (
    SubsetFitness,
    bottleneck_distance,
    farthest_point_order,
    farthest_points,
    hausdorff_to_subset,
    pairwise_distances,
    rips_diagram,
    with_origin,
)


def mean_cover(distances, subsets, base=None):
    return SubsetFitness(distances, "cover", base=base)(subsets)


@pytest.mark.parametrize("seed", range(30))
def test_covers_equal_direct_computation(seed):
    points = make_cloud(seed)
    distances = pairwise_distances(points)
    subsets = make_subsets(seed, 9, len(points))
    nearest = [distances[subset].min(axis=0) for subset in subsets]
    np.testing.assert_array_equal(hausdorff_to_subset(distances, subsets), [row.max() for row in nearest])
    np.testing.assert_allclose(mean_cover(distances, subsets), [row.mean() for row in nearest], rtol=1e-12)
    expected = [directed_hausdorff(points, points[subset])[0] for subset in subsets]
    np.testing.assert_allclose(hausdorff_to_subset(distances, subsets), expected, rtol=1e-8, atol=1e-12)


def test_a_base_point_is_always_kept():
    distances = pairwise_distances(with_origin([[3.0], [-1.0], [10.0]]))
    subsets = np.array([[False, False, True, False], [False, False, False, True]])
    np.testing.assert_array_equal(hausdorff_to_subset(distances, subsets, 3), [3.0, 10.0])
    np.testing.assert_array_equal(mean_cover(distances, subsets, 3), [1.0, 3.5])
    assert not subsets[0, 3]


@pytest.mark.parametrize("size", [3, 40, 250])
@pytest.mark.parametrize("grid", [False, True])
@pytest.mark.quick_every(3)
def test_every_row_is_of_its_own_subset(size, grid):
    rng = np.random.default_rng(0)
    points = rng.integers(0, 9, size=(500, 3)) if grid else rng.normal(size=(500, 3))
    distances = pairwise_distances(points)
    subsets = make_subsets(1, 900, 500, size)
    values = hausdorff_to_subset(distances, subsets)
    means = mean_cover(distances, subsets)
    for row in (0, 523, 524, 899):
        nearest = distances[subsets[row]].min(axis=0)
        assert values[row] == nearest.max()
        assert means[row] == pytest.approx(nearest.mean(), rel=1e-12)


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("degree", [0, 1])
def test_stability_theorem(seed, degree):
    distances = pairwise_distances(make_cloud(seed))
    whole = rips_diagram(distances=distances, dimension=degree)
    for subset in make_subsets(seed, 3, len(distances)):
        kept = rips_diagram(distances=distances[np.ix_(subset, subset)], dimension=degree)
        bound = 2 * hausdorff_to_subset(distances, subset[None])[0]
        assert bottleneck_distance(kept, whole) <= bound + 1e-9


@pytest.mark.parametrize("seed", range(30))
def test_farthest_points_cover_greedily(seed):
    distances = pairwise_distances(make_cloud(seed))
    n = len(distances)
    order, radii = farthest_point_order(distances, start=n - 1)
    assert order[0] == n - 1
    assert sorted(order) == list(range(n))
    for count in range(1, n + 1):
        reached = distances[order[:count]].min(axis=0)
        assert radii[count - 1] == reached.max()
        if count < n:
            rest = np.setdiff1d(np.arange(n), order[:count])
            assert order[count] == rest[(reached[rest] >= (1.0 - 1e-6) * reached.max()).argmax()]


@pytest.mark.parametrize("seed", range(10))
def test_farthest_points_of_coordinates_are_those_of_distances(seed):
    points = np.random.default_rng(seed).normal(size=(40, 5))
    centre = np.square(points - points.mean(axis=0)).sum(axis=1).argmin()
    order, _ = farthest_point_order(pairwise_distances(points), start=centre)
    for count in (1, 7, 40):
        np.testing.assert_array_equal(farthest_points(points, count), order[:count])


def test_the_first_of_equally_far_points_is_chosen():
    # 3 and its copy are next to the mean, 3; 1 and 5 are 2 away from it. Copies come last, by index.
    assert farthest_points([[3.0], [5.0], [1.0], [3.0]], 4).tolist() == [0, 1, 2, 3]
    assert farthest_points([[2.0], [2.0]], 2).tolist() == [0, 1]


@given(st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_greedy_radius_is_at_most_twice_any_other(seed):
    distances = pairwise_distances(make_cloud(seed))
    n = len(distances)
    _, radii = farthest_point_order(distances, start=0)
    subsets = make_subsets(seed, 20, n)
    sizes = (subsets | (np.arange(n) == 0)).sum(axis=1)
    others = hausdorff_to_subset(distances, subsets, base=0)
    assert (radii[sizes - 1] <= 2 * others + 1e-9).all()


def test_malformed_arguments_are_refused():
    distances = np.ones((3, 3)) - np.eye(3)
    for cover in (hausdorff_to_subset, mean_cover):
        with pytest.raises(DataError, match="at least one point"):
            cover(distances, [[False] * 3])
        with pytest.raises(DataError, match=r"base must be a point's index in \[0, 3\), got 3"):
            cover(distances, [[True] * 3], base=3)
    with pytest.raises(DataError, match="start must be"):
        farthest_point_order(distances, start=-1)
    with pytest.raises(ConfigError, match=r"count must be in \[1, 3\], the number of points, got 4"):
        farthest_points(distances, 4)
    with pytest.raises(DataError, match="points must be finite, got nan"):
        farthest_points([[np.nan], [0.0]], 1)
    with pytest.raises(DataError, match="points must be a matrix"):
        farthest_points([1.0, 2.0], 1)
