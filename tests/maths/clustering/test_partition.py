from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import cdist, pdist, squareform
from sklearn.cluster import SpectralClustering
from sklearn.neighbors import kneighbors_graph, radius_neighbors_graph

from nni_topo.clustering import ALGORITHMS, GRAPHS
from nni_topo.errors import ConfigError, DataError
from nni_topo.maths.clustering import partition
from nni_topo.maths.clustering.partition import similarity_graph


def blobs(count: int = 4, size: int = 8, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Blobs of unit spread, 20 apart, in a shuffled order."""
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.repeat(np.arange(count), size))
    return generator.normal(size=(count * size, 3)) + 20.0 * labels[:, None], labels


def same_partition(one: np.ndarray, other: np.ndarray) -> bool:
    return bool(np.array_equal(one[:, None] == one, other[:, None] == other))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_blobs_that_lie_far_apart_are_found_by_every_algorithm(algorithm):
    points, labels = blobs()
    assert same_partition(partition(points, 4, algorithm), labels)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(("count", "expected"), [(1, np.zeros(6)), (6, np.arange(6))])
def test_the_trivial_partitions(algorithm, count, expected):
    points = np.random.default_rng(0).normal(size=(6, 2))
    np.testing.assert_array_equal(partition(points, count, algorithm), expected)


@given(st.integers(0, 50), st.integers(2, 9))
def test_kmeans_labels_every_point_by_the_nearest_mean(seed, count):
    points = np.random.default_rng(seed).normal(size=(24, 3))
    labels = partition(points, count, seed=seed)
    means = np.stack([points[labels == label].mean(0) for label in range(labels.max() + 1)])
    distances = cdist(points, means)
    chosen = distances[np.arange(len(points)), labels]
    assert len(means) == count
    assert (chosen <= distances.min(1) + 1e-2).all()


def test_clusters_are_numbered_by_their_first_points():
    points, _ = blobs(seed=5)
    labels = partition(points, 4)
    first = [int(np.flatnonzero(labels == label)[0]) for label in range(4)]
    assert labels[0] == 0
    assert first == sorted(first)


def test_dbscan_leaves_points_of_noise_alone():
    points = np.concatenate([np.linspace(0.0, 1.0, 10), [50.0, 90.0]])[:, None]
    labels = partition(points, 3, "dbscan")
    assert len(set(labels[:10])) == 1
    assert len({labels[0], labels[10], labels[11]}) == 3


def test_a_cluster_of_dbscan_has_as_many_points_as_are_asked_for():
    points = (10.0 * np.repeat(np.arange(3), 3) + np.tile([0.0, 0.1, 0.2], 3))[:, None]
    assert partition(points, 3, "dbscan").tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    pairs = np.array([0.0, 0.1, 10.0, 10.1])[:, None]
    assert partition(pairs, 2, "dbscan").tolist() == [0] * 4


def test_mixtures_of_full_covariances_follow_long_clusters_and_spherical_ones_cut_them():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 200)
    points = rng.normal(size=(400, 2)) * [2.5, 0.2] + 4.0 * labels[:, None] * [0.6, 0.8]
    assert same_partition(partition(points, 2, "gmm_full"), labels)
    assert not same_partition(partition(points, 2, "gmm"), labels)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_fewer_distinct_points_than_clusters_still_give_a_partition(algorithm):
    points = np.repeat(np.array([[0.0], [9.0]]), 5, axis=0)
    labels = partition(points, 4, algorithm)
    assert labels.max() < 4
    assert not set(labels[:5]) & set(labels[5:])


def test_bad_requests_are_refused():
    points = np.random.default_rng(0).normal(size=(6, 2))
    with pytest.raises(ConfigError, match="did you mean kmeans"):
        partition(points, 2, "kmean")
    with pytest.raises(ConfigError, match="graph must be given with algorithm='spectral' only"):
        partition(points, 2, "ward", graph="knn")
    with pytest.raises(DataError, match="points must be finite, got nan"):
        partition(np.array([[0.0], [np.nan]]), 1)
    with pytest.raises(DataError, match="at least one row and column"):
        partition(np.zeros((0, 2)), 1)


@pytest.mark.parametrize("others", [1, 3])
def test_equal_points_share_a_spectral_cluster_and_distinct_ones_have_their_own(others):
    points = np.concatenate([np.full((9, 3), 0.1), np.random.default_rng(others).normal(size=(others, 3))])
    labels = partition(points, others + 1, "spectral")
    assert labels.tolist() == [0] * 9 + list(range(1, others + 1))


# Six points on a line: k = 1 + ceil(ln 6) = 3, and the longest edge of the spanning tree joins 7 and 12.
LINE = np.array([0.0, 1.0, 3.0, 7.0, 12.0, 16.0])[:, None]


def edges(graph: np.ndarray) -> set[tuple[int, int]]:
    np.testing.assert_array_equal(graph, graph.T)
    return {(int(one), int(other)) for one, other in np.argwhere(np.triu(graph))}


def test_the_radius_is_the_smallest_at_which_the_graph_is_connected():
    graph = similarity_graph(pdist(LINE), "epsilon")
    assert edges(graph) == {(0, 1), (0, 2), (1, 2), (2, 3), (3, 4), (4, 5)}
    assert set(graph.ravel().tolist()) == {0.0, 1.0}


def test_a_pair_is_joined_if_one_is_among_the_three_nearest_of_the_other():
    graph = similarity_graph(pdist(LINE), "knn")
    # nearest of 0: 1, 3, 7; of 1: 0, 3, 7; of 3: 0, 1, 7; of 7: 3, 12, 1; of 12: 16, 7, 3; of 16: 12, 7, 3
    of_one = {(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3), (3, 4), (4, 5), (2, 4), (3, 5), (2, 5)}
    assert edges(graph) == of_one
    assert set(graph.ravel().tolist()) == {0.0, 1.0}


def test_points_equally_far_away_are_all_neighbours_or_none():
    # Two arcs of five points around a middle, k = 1 + ceil(ln 11) = 4: the nearest of a point on an arc are the other
    # four, and the middle is as far from all ten, so it is joined with all or, by k alone, with the first four.
    angles = np.concatenate([np.linspace(-0.2, 0.2, 5), np.pi + np.linspace(-0.2, 0.2, 5)])
    points = np.concatenate([[[0.0, 0.0]], 10.0 * np.stack([np.cos(angles), np.sin(angles)], axis=1)])
    points *= 1.0 + 1e-13 * np.random.default_rng(0).normal(size=(11, 1))  # rounding decides nothing
    graph = similarity_graph(pdist(points), "knn")
    assert graph[0].tolist() == [0.0] + [1.0] * 10
    assert graph[1:6, 1:6].sum() == graph[6:, 6:].sum() == 20
    assert graph[1:6, 6:].sum() == 0


@given(st.integers(0, 50), st.integers(3, 30))
@settings(max_examples=25, deadline=None)
def test_graphs_are_those_of_scikit_learn(seed, count):
    points = np.random.default_rng(seed).normal(size=(count, 3))
    distances = pdist(points)
    nearest = min(1 + int(np.ceil(np.log(count))), count - 1)
    theirs = kneighbors_graph(points, nearest).toarray()
    np.testing.assert_array_equal(similarity_graph(distances, "knn"), np.maximum(theirs, theirs.T))
    ours = similarity_graph(distances, "epsilon")
    radius = distances[squareform(ours) > 0].max()
    np.testing.assert_array_equal(ours, radius_neighbors_graph(points, radius * (1 + 1e-9)).toarray())
    assert connected_components(ours)[0] == 1
    # distances that differ by less than a millionth count as equal
    assert connected_components(radius_neighbors_graph(points, radius * (1 - 1e-5)))[0] == 2


@pytest.mark.parametrize("graph", GRAPHS)
def test_spectral_clusters_are_scikit_learns_on_the_graph(graph):
    points = np.random.default_rng(2).normal(size=(30, 4))
    affinities = similarity_graph(pdist(points), graph)
    theirs = SpectralClustering(5, affinity="precomputed", random_state=0, n_init=3).fit(affinities).labels_
    assert same_partition(partition(points, 5, "spectral", graph=graph), theirs)


def test_neighbours_follow_a_ring_around_a_blob():
    rng = np.random.default_rng(0)
    angles = np.linspace(0.0, 2.0 * np.pi, 60, endpoint=False)
    ring = 10.0 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    points, labels = np.concatenate([ring, rng.normal(size=(20, 2))]), np.repeat([0, 1], [60, 20])
    assert same_partition(partition(points, 2, "spectral", graph="knn"), labels)


@given(st.integers(0, 40))
@settings(max_examples=25, deadline=None)
def test_rounding_moves_no_point_between_the_clusters_of_dbscan(seed):
    generator = np.random.default_rng(seed)
    points = generator.integers(0, 4, size=(14, 2)).astype(float)
    moved = points * (1.0 + generator.integers(-4, 5, size=points.shape) * np.finfo(float).eps)
    for count in (2, 5):
        np.testing.assert_array_equal(partition(points, count, "dbscan"), partition(moved, count, "dbscan"))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [0.1, 2.5])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_points_that_are_all_equal_give_a_partition(algorithm, value):
    labels = partition(np.full((6, 3), value), 2, algorithm)
    assert labels[0] == 0
    assert set(labels) <= {0, 1}
