import pickle

import numpy as np
import pytest
from topology_clouds import make_cloud, make_subsets

from nni_topo.errors import ConfigError, DataError
from nni_topo.topology import CRITERIA, SubsetFitness, h0_deaths, pairwise_distances, with_origin


@pytest.mark.parametrize("block", range(20))
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.quick_every(8)
def test_engines_agree_on_200_clouds(block, criterion):
    for seed in range(10 * block, 10 * block + 10):
        cloud = make_cloud(seed)
        base = len(cloud) if seed % 3 == 0 else None
        distances = pairwise_distances(cloud if base is None else with_origin(cloud))
        subsets = make_subsets(seed, 3, len(distances))
        knobs = {"homology_dimensions": ((0,), (1,), (0, 1))[seed % 3], "base": base}
        exact = SubsetFitness(distances, criterion, **knobs)(subsets)
        gudhi = SubsetFitness(distances, criterion, engine="gudhi", **knobs)(subsets)
        np.testing.assert_allclose(exact, gudhi, rtol=1e-9, atol=1e-9 * max(1.0, distances.max()), err_msg=str(seed))


@pytest.mark.parametrize("engine", ["exact", "gudhi"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_one_and_two_points(engine, criterion):
    def fitness(points, subsets):
        knobs = {"homology_dimensions": (0, 1), "engine": engine}
        return SubsetFitness(pairwise_distances(points), criterion, **knobs)(subsets)

    np.testing.assert_array_equal(fitness([[5.0]], [[True]]), [0.0])
    lost = 2.0 if criterion == "hausdorff" else 1.0
    values = fitness([[1.0], [3.0]], [[True, False], [False, True], [True, True]])
    np.testing.assert_allclose(values, [lost, lost, 0.0], atol=1e-15)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_keeping_all_points_loses_nothing(criterion):
    for seed in range(10):
        distances = pairwise_distances(make_cloud(seed))
        fitness = SubsetFitness(distances, criterion, homology_dimensions=(0, 1))
        np.testing.assert_allclose(fitness(np.ones((1, len(distances)), dtype=bool)), 0.0, atol=1e-12)


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
        slow = SubsetFitness(distances, criterion, homology_dimensions=(0, 1), engine="gudhi")(subsets)
        np.testing.assert_allclose(slow, both, atol=1e-8)


def test_subsets_are_scored_once():
    distances = pairwise_distances(np.random.default_rng(0).normal(size=(30, 3)))
    fitness = SubsetFitness(distances, "wasserstein")
    subsets = make_subsets(0, 8, 30, 10)
    first = fitness(np.vstack([subsets, subsets[:3]]))
    assert fitness.evaluations == 8
    np.testing.assert_array_equal(first[8:], first[:3])
    more = make_subsets(1, 2, 30, 12)
    again = fitness(np.vstack([subsets[::-1], more]))
    assert fitness.evaluations == 10
    np.testing.assert_array_equal(again[:8], first[:8][::-1])
    np.testing.assert_allclose(again, SubsetFitness(distances, "wasserstein")(np.vstack([subsets[::-1], more])))


def test_points_on_a_line_enclose_no_loops():
    line = np.array([0.0, 3.0, 1.0, 7.0, 4.5])
    distances = abs(np.subtract.outer(line, line))
    subsets = [[True, True, False, True, False], [False, True, True, True, True]]
    both = SubsetFitness(distances, "bottleneck_sum", homology_dimensions=(0, 1))
    alone = SubsetFitness(distances, "bottleneck")
    assert both(subsets).tolist() == alone(subsets).tolist()
    loops = SubsetFitness(distances, "wasserstein", homology_dimensions=(1,))
    assert loops(subsets).tolist() == [0.0, 0.0]


def test_the_base_point_counts_as_kept():
    distances = pairwise_distances(with_origin(np.random.default_rng(0).normal(size=(9, 3))))
    subsets = make_subsets(0, 5, 10, 4)
    subsets[:, 9] = False
    with_base = subsets | (np.arange(10) == 9)
    for criterion in CRITERIA:
        fitness = SubsetFitness(distances, criterion, base=9)
        np.testing.assert_array_equal(fitness(subsets), SubsetFitness(distances, criterion)(with_base))
        fitness(with_base)
        assert fitness.evaluations == 5
    assert SubsetFitness(distances, base=9)(np.zeros((1, 10), dtype=bool)).shape == (1,)


def test_fitness_travels_to_other_processes():
    distances = pairwise_distances(np.random.default_rng(0).normal(size=(12, 3)))
    subsets = make_subsets(0, 4, 12, 5)
    for criterion in CRITERIA:
        fitness = SubsetFitness(distances, criterion, homology_dimensions=(0, 1))
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(fitness))(subsets), fitness(subsets))


@pytest.mark.parametrize(
    ("knobs", "error", "message"),
    [
        ({"criterion": "hausdorf"}, ConfigError, "criterion must be a known name, got 'hausdorf'"),
        ({"engine": "ripser"}, ConfigError, "engine must be a known name"),
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
