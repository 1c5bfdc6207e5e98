from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nni_topo.clustering import Growth, grow, hoh_threshold, initial_clusters
from nni_topo.errors import ConfigError, DataError
from nni_topo.maths.clustering.subclustering import STATISTICS


def layer(nodes: int = 40, samples: int = 60, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rectified mixtures of a few signals, of very different strength; and their covariances."""
    generator = np.random.default_rng(seed)
    mixed = generator.normal(size=(nodes, 5)) @ generator.normal(size=(5, samples))
    points = np.maximum(mixed * generator.uniform(0.05, 2.0, size=(nodes, 1)), 0.0)
    return points, np.cov(points, bias=True)


def test_threshold_by_hand():
    # Ten bins of width 1 between 0 and 10: of the four values two lie below 2, three below 3.
    values = np.array([0.0, 1.5, 2.5, 10.0])
    assert hoh_threshold([values], 0.5, bins=10) == pytest.approx(2.0)
    assert hoh_threshold([values], 0.75, bins=10) == pytest.approx(3.0)
    assert hoh_threshold([values], 0.76, bins=10) == pytest.approx(10.0)


def test_threshold_by_hand_in_bins_of_scotts_width():
    # A standard deviation of 3.8487 and four values: a width of 8.4564, so two bins, [0, 5) and [5, 10].
    values = np.array([0.0, 1.5, 2.5, 10.0])
    assert hoh_threshold([values], 0.75) == pytest.approx(5.0)
    assert hoh_threshold([values], 0.76) == pytest.approx(10.0)
    # Two values are half their distance off their mean: a width of 1.39 distances, one bin.
    assert hoh_threshold([values[:2]], 0.1) == pytest.approx(1.5)


def test_threshold_is_the_upper_edge_of_the_fullest_bin_over_clusters():
    # Constant clusters are their own edges: 1, 1, 1.5 and 11; ten bins of width 1, the first one holds three.
    clusters = [np.array([value]) for value in (1.0, 1.0, 1.5, 11.0)]
    assert hoh_threshold(clusters, 0.5, bins=10) == pytest.approx(2.0)
    # A standard deviation of 4.26 and four values: a width of 9.4, two bins of 5.
    assert hoh_threshold(clusters, 0.5) == pytest.approx(6.0)


def test_of_equally_full_bins_the_lowest_counts():
    assert hoh_threshold([np.array([1.0]), np.array([3.0])], 0.5, bins=2) == pytest.approx(2.0)


@given(st.integers(0, 1000), st.integers(2, 300), st.floats(0.05, 0.95))
def test_scotts_bins_are_numpys(seed, count, energy):
    values = np.random.default_rng(seed).exponential(size=count)
    borders = np.histogram_bin_edges(values, "scott")
    counts, _ = np.histogram(values, borders)
    wanted = borders[1 + int((np.cumsum(counts) >= energy * count).argmax())]
    assert hoh_threshold([values], energy) == pytest.approx(wanted)


def test_growth_by_hand():
    # Two nodes that are alike and quiet, two that are loud and opposite: only the loud pair is split.
    points = np.array([[0.1, -0.1, 0.0], [0.1, -0.1, 0.05], [9.0, 8.0, 0.0], [9.0, 8.0, 3.0]])
    covariance = np.cov(points, bias=True)
    tree = grow(points, covariance, 2, Growth("max"), threshold=1.0)
    assert [tree.clusters[n].members for n in tree.initial] == [(0, 1), (2, 3)]
    assert tree.labels(4).tolist() == [0, 0, 1, 2]
    assert tree.clusters[1].children == (2, 3)
    assert tree.clusters[1].variance == pytest.approx(covariance[2:, 2:].max())
    assert tree.depth == 1


def test_dispersion_is_the_scatter_of_the_nodes_about_their_centre():
    points, covariance = layer(nodes=7)
    members = np.array([1, 2, 4, 6])
    about = points[members] - points[members].mean(0)
    expected = np.cov(about, bias=True)
    upper = expected[np.triu_indices(4)]
    growth = Growth()
    np.testing.assert_allclose(growth.values(covariance, members), np.abs(upper), atol=1e-12)
    assert growth.variance(covariance, members) == pytest.approx(np.abs(upper).mean())
    assert Growth("trace").variance(covariance, members) == pytest.approx(np.trace(expected))
    assert Growth(absolute=False).variance(covariance, members) == pytest.approx(upper.mean())
    assert growth.variance(covariance, members[:1]) == pytest.approx(0.0)


def test_a_single_node_says_nothing_of_how_tight_a_cluster_should_be():
    _, covariance = layer(nodes=9)
    pairs = [np.array([0, 1, 2]), np.array([3, 4])]
    alone = [np.array([node]) for node in range(5, 9)]
    assert Growth().threshold(covariance, [*pairs, *alone], 0.5) == Growth().threshold(covariance, pairs, 0.5) > 0
    assert Growth().threshold(covariance, alone, 0.5) == pytest.approx(0.0)


def test_loud_twins_stay_together_and_strangers_do_not():
    generator = np.random.default_rng(0)
    signals = 10.0 * generator.normal(size=(20, 400))
    points = np.concatenate([signals, signals + 0.01 * generator.normal(size=signals.shape)])
    covariance = np.cov(points, bias=True)
    together = {}
    for statistic in STATISTICS:
        tree = grow(points, covariance, 2, Growth(statistic), energy=0.5)
        labels = tree.labels(40)
        together[statistic] = int((labels[:20] == labels[20:]).sum())
    assert together["dispersion"] == together["trace"] == 20
    assert together["max"] < 5


def test_a_single_pass_splits_each_initial_cluster_once_at_most():
    points, covariance = layer(nodes=60)
    tree = grow(points, covariance, 4, Growth("trace", recursive=False), threshold=0.0)
    assert tree.depth == 1
    assert len(tree.leaves) == 8
    assert grow(points, covariance, 4, Growth("trace"), threshold=0.0).depth > 1
    deeper = grow(points, covariance, 4, Growth("trace", recursive=False), threshold=np.inf, at_least=12)
    assert len(deeper.leaves) == 12


@settings(max_examples=15)
@given(st.integers(0, 20), st.floats(0.05, 0.95), st.integers(1, 10), st.sampled_from(STATISTICS))
def test_no_leaf_varies_more_than_the_threshold(seed, energy, initial, statistic):
    points, covariance = layer(nodes=16, seed=seed)
    tree = grow(points, covariance, initial, Growth(statistic), energy=energy, seed=seed)
    for leaf in (tree.clusters[n] for n in tree.leaves):
        # a variance that is the threshold but for rounding counts as equal to it
        assert len(leaf.members) == 1 or leaf.variance <= tree.threshold * (1.0 + 1e-9)
    assert all(tree.clusters[p.parent].variance > tree.threshold for p in tree.clusters if p.parent is not None)


@settings(max_examples=15)
@given(st.integers(0, 20), st.integers(1, 10))
def test_leaves_partition_the_nodes_and_children_their_parent(seed, initial):
    points, covariance = layer(nodes=16, seed=seed)
    tree = grow(points, covariance, initial, Growth(), seed=seed)
    leaves = sorted(node for n in tree.leaves for node in tree.clusters[n].members)
    assert leaves == list(range(16))
    for cluster in tree.clusters:
        if cluster.children:
            halves = [node for n in cluster.children for node in tree.clusters[n].members]
            assert sorted(halves) == list(cluster.members)


def test_caps_hold_and_take_the_loudest_first():
    points, covariance = layer()
    free = grow(points, covariance, 3, Growth(), threshold=np.inf)
    assert len(free.leaves) == 3
    forced = grow(points, covariance, 3, Growth(), threshold=np.inf, at_least=7)
    assert len(forced.leaves) == 7
    assert forced.clusters[forced.clusters[3].parent].variance == max(c.variance for c in forced.clusters[:3])
    assert len(grow(points, covariance, 9, Growth(), threshold=0.0, at_most=5).leaves) == 5


def test_a_cluster_that_varies_exactly_as_much_as_the_threshold_is_not_split():
    points, covariance = layer()
    (whole,) = grow(points, covariance, 1, Growth(), threshold=np.inf).clusters
    assert len(grow(points, covariance, 1, Growth(), threshold=whole.variance).leaves) == 1
    for hair in (1 - 1e-13, 1 + 1e-13):  # what another processor's sums may differ by decides nothing
        assert len(grow(points, covariance, 1, Growth(), threshold=hair * whole.variance).leaves) == 1
    assert len(grow(points, covariance, 1, Growth(), threshold=(1 - 1e-9) * whole.variance).leaves) > 1


def test_clusters_above_the_threshold_are_split_beyond_the_least_number():
    points, covariance = layer()
    free = grow(points, covariance, 2, Growth("max"), threshold=0.5)
    assert len(free.leaves) > 4
    assert grow(points, covariance, 2, Growth("max"), threshold=0.5, at_least=3) == free


def test_nodes_that_are_all_alike_stay_together_however_loud():
    points = np.tile(np.array([5.0, -5.0, 1.0]), (6, 1))
    tree = grow(points, np.cov(points, bias=True), 1, Growth(), threshold=0.0)
    assert len(tree.leaves) == 1


def test_the_statistic_and_the_values_follow_their_knobs():
    covariance = np.array([[2.0, -1.0], [-1.0, 4.0]])
    members = np.array([0, 1])
    np.testing.assert_allclose(Growth("max").values(covariance, members), [2.0, 1.0, 4.0])
    np.testing.assert_allclose(Growth("max", absolute=False).values(covariance, members), [2.0, -1.0, 4.0])
    np.testing.assert_allclose(Growth("max", diagonal=False).values(covariance, members), [1.0])
    np.testing.assert_allclose(Growth("max", diagonal=False).values(covariance, members[:1]), [2.0])
    assert Growth("max").variance(covariance, members) == 4.0
    assert Growth("mean").variance(covariance, members) == pytest.approx(7.0 / 3.0)


def test_renaming_moves_members():
    points, covariance = layer(nodes=4)
    tree = grow(points, covariance, 2, Growth()).renamed(np.array([1, 3, 5, 7]))
    assert sorted(node for n in tree.leaves for node in tree.clusters[n].members) == [1, 3, 5, 7]
    assert tree.labels(8)[[0, 2, 4, 6]].tolist() == [-1] * 4


def test_initial_numbers():
    assert initial_clusters(0.05, 300) == 15
    assert initial_clusters(0.35, 6) == 3
    assert initial_clusters(20 / 300, 300) == 20
    assert initial_clusters(1e-6, 10) == 1
    assert initial_clusters(1.0, 10) == 10


def test_bad_requests_are_refused():
    with pytest.raises(ConfigError, match="statistic must be a known name, got 'median'"):
        Growth(statistic="median")
    with pytest.raises(ConfigError, match=r"share must be in \(0, 1\].*got 1.2"):
        initial_clusters(1.2, 10)
    with pytest.raises(DataError, match="got none"):
        hoh_threshold([], 0.5)
    with pytest.raises(DataError, match="must be finite"):
        hoh_threshold([np.array([np.inf, 1.0])], 0.5)
    points, covariance = layer(nodes=5)
    with pytest.raises(ConfigError, match=r"must be in \[1, 5\]"):
        grow(points, covariance, 6, Growth())
