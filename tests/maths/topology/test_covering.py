import numpy as np
import pytest
from scipy.spatial.distance import directed_hausdorff
from topology_clouds import make_cloud, make_subsets

from nni_topo.errors import DataError
from nni_topo.topology import (
    SubsetFitness,
    bottleneck_distance,
    farthest_point_order,
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


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("degree", [0, 1])
@pytest.mark.quick_every(3)
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


def test_malformed_arguments_are_refused():
    distances = np.ones((3, 3)) - np.eye(3)
    for cover in (hausdorff_to_subset, mean_cover):
        with pytest.raises(DataError, match="at least one point"):
            cover(distances, [[False] * 3])
        with pytest.raises(DataError, match=r"base must be a point's index in \[0, 3\), got 3"):
            cover(distances, [[True] * 3], base=3)
    with pytest.raises(DataError, match="start must be"):
        farthest_point_order(distances, start=-1)
