import numpy as np
import pytest
from topology_clouds import make_cloud, make_subsets

from nni_topo.errors import ConfigError, DataError
from nni_topo.topology import (
    CRITERIA,
    SubsetFitness,
    bottleneck_distance,
    h0_deaths,
    pairwise_distances,
    rips_diagram,
    wasserstein_distance,
    with_origin,
)


def lost_by_gudhi(distances, subset, criterion, degrees):
    """What a subset loses, by GUDHI's simplex trees and distances of diagrams."""
    losses = []
    for degree in degrees:
        small, whole = (
            rips_diagram(distances=each, dimension=degree, engine="gudhi")
            for each in (distances[np.ix_(subset, subset)], distances)
        )
        if criterion == "wasserstein":
            losses.append(wasserstein_distance(small, whole))
        else:
            losses.append(bottleneck_distance(small, whole, engine="gudhi"))
    return max(losses) if criterion == "bottleneck" else sum(losses)


@pytest.mark.parametrize("block", range(10))
@pytest.mark.parametrize("criterion", ["bottleneck", "bottleneck_sum", "wasserstein"])
@pytest.mark.quick_every(6)
def test_the_fitness_is_gudhis_on_100_clouds(block, criterion):
    for seed in range(10 * block, 10 * block + 10):
        cloud = make_cloud(seed)
        base = len(cloud) if seed % 3 == 0 else None
        distances = pairwise_distances(cloud if base is None else with_origin(cloud))
        subsets = make_subsets(seed, 3, len(distances))
        degrees = ((0,), (1,), (0, 1))[seed % 3]
        found = SubsetFitness(distances, criterion, homology_dimensions=degrees, base=base)(subsets)
        if base is not None:
            subsets[:, base] = True
        expected = [lost_by_gudhi(distances, subset, criterion, degrees) for subset in subsets]
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9 * max(1.0, distances.max()), err_msg=str(seed))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_one_and_two_points(criterion):
    def fitness(points, subsets):
        return SubsetFitness(pairwise_distances(points), criterion, homology_dimensions=(0, 1))(subsets)

    np.testing.assert_array_equal(fitness([[5.0]], [[True]]), [0.0])
    lost = 2.0 if criterion == "hausdorff" else 1.0
    values = fitness([[1.0], [3.0]], [[True, False], [False, True], [True, True]])
    np.testing.assert_allclose(values, [lost, lost, 0.0], atol=1e-15)


@pytest.mark.parametrize("seed", range(20))
def test_bottleneck_is_at_least_half_the_first_lost_death_time(seed):
    distances = pairwise_distances(np.random.default_rng(seed).normal(size=(60, 20)))
    deaths = h0_deaths(distances)
    for kept in (15, 30, 45):
        values = SubsetFitness(distances, "bottleneck")(make_subsets(seed, 40, 60, kept))
        assert (values >= deaths[kept - 1] / 2).all()
        assert np.median(values) == deaths[kept - 1] / 2


def test_degrees_combine_by_maximum_and_by_sum():
    distances = pairwise_distances(np.random.default_rng(4).normal(size=(14, 2)))
    subsets = make_subsets(4, 6, 14, 8)
    for criterion, combined in (("bottleneck", np.maximum), ("bottleneck_sum", np.add), ("wasserstein", np.add)):
        parts = [SubsetFitness(distances, criterion, homology_dimensions=(d,))(subsets) for d in (0, 1)]
        both = SubsetFitness(distances, criterion, homology_dimensions=(0, 1))(subsets)
        assert (parts[1] > 0).any()
        np.testing.assert_allclose(both, combined(*parts), rtol=1e-12)


def test_subsets_that_come_again_have_the_fitness_they_had():
    distances = pairwise_distances(np.random.default_rng(0).normal(size=(30, 3)))
    fitness = SubsetFitness(distances, "wasserstein")
    subsets = make_subsets(0, 8, 30, 10)
    first = fitness(np.vstack([subsets, subsets[:3]]))
    np.testing.assert_array_equal(first[8:], first[:3])
    again = np.vstack([subsets[::-1], make_subsets(1, 2, 30, 12)])
    np.testing.assert_allclose(fitness(again), SubsetFitness(distances, "wasserstein")(again))


def test_the_base_point_counts_as_kept():
    distances = pairwise_distances(with_origin(np.random.default_rng(0).normal(size=(9, 3))))
    subsets = make_subsets(0, 5, 10, 4)
    subsets[:, 9] = False
    with_base = subsets | (np.arange(10) == 9)
    for criterion in CRITERIA:
        fitness = SubsetFitness(distances, criterion, base=9)
        np.testing.assert_array_equal(fitness(subsets), SubsetFitness(distances, criterion)(with_base))
    assert SubsetFitness(distances, base=9)(np.zeros((1, 10), dtype=bool)).shape == (1,)


@pytest.mark.parametrize(
    ("knobs", "error", "message"),
    [
        ({"criterion": "hausdorf"}, ConfigError, "criterion must be a known name, got 'hausdorf'"),
        ({"homology_dimensions": (0, -1)}, ConfigError, "each value an integer of at least 0"),
        ({"homology_dimensions": ()}, ConfigError, "homology_dimensions must be a sequence of at least 1"),
        ({"base": 2}, DataError, r"base must be a point's index in \[0, 2\), got 2"),
        ({"distances": [[0.0, np.inf], [np.inf, 0.0]]}, DataError, "finite, got inf"),
    ],
)
def test_bad_arguments_are_refused(knobs, error, message):
    with pytest.raises(error, match=message):
        SubsetFitness(**{"distances": [[0.0, 1.0], [1.0, 0.0]], **knobs})


def test_bad_populations_are_refused():
    fitness = SubsetFitness([[0.0, 1.0], [1.0, 0.0]])
    with pytest.raises(DataError, match=r"shape \(p, 2\)"):
        fitness([[True]])
    with pytest.raises(DataError, match="at least one point, got none in subset 1"):
        fitness([[True, False], [False, False]])


@pytest.mark.parametrize("kind", [np.bool_, np.int64, np.float64])
def test_covering_is_the_largest_or_the_mean_distance_to_the_nearest_kept_point(kind):
    distances = pairwise_distances(np.random.default_rng(2).normal(size=(30, 3)))
    subsets = make_subsets(2, 12, 30, 9)
    nearest = np.array([distances[:, subset].min(axis=1) for subset in subsets])
    for criterion, expected in (("hausdorff", nearest.max(axis=1)), ("cover", nearest.mean(axis=1))):
        found = SubsetFitness(distances, criterion)(subsets.astype(kind))
        np.testing.assert_allclose(found, expected, rtol=1e-12)
