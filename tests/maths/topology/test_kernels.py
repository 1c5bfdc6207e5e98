import importlib.util

import numpy as np
import pytest
from topology_clouds import make_cloud, make_subsets

from nni_topo.maths.topology import kernels, loops
from nni_topo.maths.topology.covering import neighbour_ranks
from nni_topo.maths.topology.matching import closed_wasserstein
from nni_topo.topology import SubsetFitness, h0_deaths, hausdorff_to_subset, pairwise_distances, rips_diagram


@pytest.mark.parametrize("seed", range(20))
def test_kernels_compute_what_numpy_does_before_they_are_compiled(seed):
    distances = pairwise_distances(make_cloud(seed))
    n = len(distances)
    subsets = make_subsets(seed, 4, n, (n + 1) // 2)

    deaths = np.empty((4, (n + 1) // 2 - 1))
    kernels.prim(distances, subsets, deaths)
    expected = h0_deaths(distances, subsets, compiled=False)
    np.testing.assert_array_equal(-np.sort(-deaths), expected)

    whole, largest = h0_deaths(distances, compiled=False), max(1.0, distances.max())
    for order in (1.0, 2.0, 2.5, 3.0):
        costs = np.empty(4)
        kernels.wasserstein(expected / largest, whole / largest, order, costs)
        np.testing.assert_allclose(
            costs ** (1 / order), closed_wasserstein(expected, whole, order, False) / largest, rtol=1e-9
        )

    nearest = np.empty(subsets.shape)
    kernels.nearest_kept(distances, neighbour_ranks(distances), subsets, nearest)
    np.testing.assert_array_equal(nearest.max(axis=1), hausdorff_to_subset(distances, subsets, compiled=False))
    np.testing.assert_allclose(nearest.mean(axis=1), SubsetFitness(distances, "cover", compiled=False)(subsets))


@pytest.mark.parametrize("seed", range(20))
def test_loops_before_they_are_compiled(seed):
    distances = pairwise_distances(make_cloud(seed))
    edges = loops.sort_edges(distances)
    bars = np.full((64, 2), np.inf)
    count = loops.write_loops(edges.starts, edges.ends, edges.lengths, np.arange(len(distances)), bars)
    found = bars[:count][bars[:count, 1] > bars[:count, 0]]
    expected = rips_diagram(distances=distances, dimension=1, compiled=False)
    np.testing.assert_array_equal(found[np.lexsort(found.T)], expected[np.lexsort(expected.T)])


def test_loops_ask_for_more_room():
    points = np.random.default_rng(0).normal(size=(60, 40))
    edges = loops.sort_edges(pairwise_distances(points))
    assert loops.write_loops(*edges[:3], np.arange(60), np.full((0, 2), np.inf)) == -1


def test_rows_find_columns_before_they_are_compiled():
    gaps = np.array([[1.0, 2.0], [1.0, 9.0], [3.0, 3.0]])
    halves = np.array([5.0, 5.0, 0.5])
    assert kernels.covered(gaps, halves, 2.0)
    assert not kernels.covered(gaps, halves, 1.0)
    assert not kernels.covered(gaps, np.array([5.0, 5.0, 5.0]), 4.0)
    assert kernels.covered(gaps[:, :0], np.zeros(3), 0.0)


@pytest.mark.slow
def test_without_numba_numpy_computes_and_asking_for_it_is_refused(bare_python):
    program = """
from nni_topo.errors import ConfigError
from nni_topo.topology import SubsetFitness, h0_deaths
print(h0_deaths([[0.0, 2.0], [2.0, 0.0]]), SubsetFitness([[0.0, 2.0], [2.0, 0.0]])([[True, False]]))
for refused in (h0_deaths, SubsetFitness):
    try:
        refused([[0.0]], compiled=True)
    except ConfigError as error:
        print(error)
"""
    message = 'compiled=True needs numba, got none installed; install "nni-topo[fast]"'
    assert bare_python(program).splitlines() == ["[2.] [2.]", message, message]


def test_kernels_are_compiled_by_default_where_numba_is():
    assert kernels.numba_available() is (importlib.util.find_spec("numba") is not None)
    assert kernels.use_compiled(None) is kernels.numba_available()
    assert kernels.use_compiled(False) is False


@pytest.mark.parametrize("order", [1.0, 2.0, 3.0])
def test_bars_without_a_partner_cost_half_their_length(order):
    costs = np.empty(2)
    kernels.wasserstein(np.array([[1.0, 0.8, 0.2], [1.0, 0.5, 0.0]]), np.array([0.9]), order, costs)
    np.testing.assert_allclose(costs, [0.1**order + 0.4**order + 0.1**order, 0.1**order + 0.25**order])


@pytest.mark.slow
def test_more_loops_than_a_word_has_bits_are_told_apart():
    distances = pairwise_distances(np.random.default_rng(1).normal(size=(110, 60)))
    edges = loops.sort_edges(distances)
    bars = np.full((256, 2), np.inf)
    count = loops.write_loops(edges.starts, edges.ends, edges.lengths, np.arange(len(distances)), bars)
    assert count > 80
    found = bars[:count][bars[:count, 1] > bars[:count, 0]]
    expected = rips_diagram(distances=distances, dimension=1, compiled=False)
    np.testing.assert_array_equal(found[np.lexsort(found.T)], expected[np.lexsort(expected.T)])
