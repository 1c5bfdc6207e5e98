from __future__ import annotations

import networkx as nx
import numpy as np
import pytest
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import minimum_spanning_tree

from nni_topo.errors import DataError
from nni_topo.maths.topology import layer_trees
from nni_topo.topology import (
    LayerGraph,
    channel_tree,
    convolution_graph,
    linear_graph,
    maximum_spanning_tree,
    plane_trees,
    spanning_forest,
)

GRAPHS = {
    "linear": linear_graph(7, 11),
    "padded": convolution_graph((3, 2, 3, 3), (7, 7)),
    "stride": convolution_graph((2, 2, 3, 3), (9, 9), stride=2),
    "dilation": convolution_graph((2, 3, 3, 3), (9, 9), dilation=2),
    "groups": convolution_graph((4, 2, 3, 3), (6, 6), groups=2),
    "pointwise": convolution_graph((3, 4, 1, 1), (4, 4)),
    "skipping": convolution_graph((2, 2, 1, 1), (5, 5), stride=2),
    "covering": convolution_graph((2, 3, 2, 2), (2, 2)),
    "one pixel": convolution_graph((4, 3, 1, 1), (1, 1)),
    "one dimension": convolution_graph((3, 2, 4), (12,)),
}


def weights_of(graph: LayerGraph, kind: str, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = {
        "normal": rng.normal(size=graph.shape),
        "ties": rng.integers(-3, 4, size=graph.shape).astype(float),
        "equal": np.full(graph.shape, 0.5),
    }
    return values[kind]


def networkx_forest(weight: np.ndarray, graph: LayerGraph) -> nx.Graph:
    reference = nx.Graph()
    reference.add_nodes_from(range(graph.inputs + graph.outputs))
    sources, targets = graph.ends(np.arange(graph.elements))
    for element, size in enumerate(np.abs(weight).ravel()):
        for i, o in zip(sources[element], graph.inputs + targets[element], strict=True):
            reference.add_edge(int(i), int(o), weight=size)
    return nx.maximum_spanning_tree(reference)


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("kind", ["normal", "ties", "equal"])
def test_a_forest_has_networkxs_lengths_and_no_cycle(name, kind, monkeypatch):
    graph = GRAPHS[name]
    weight = weights_of(graph, kind)
    reference = networkx_forest(weight, graph)
    lengths = sorted((data["weight"] for *_, data in reference.edges(data=True)), reverse=True)
    for batch in (40, 1 << 21):  # several batches, and one
        monkeypatch.setattr(layer_trees, "_MOST_EDGES", batch)
        forest = spanning_forest(weight, graph)
        np.testing.assert_allclose(forest.lengths, lengths)
        np.testing.assert_array_equal(forest.lengths, np.abs(weight).ravel()[forest.elements])
        built = nx.Graph(zip(forest.sources.tolist(), (graph.inputs + forest.targets).tolist(), strict=True))
        assert len(forest.elements) == built.number_of_edges() == graph.forest_edges
        assert nx.is_forest(built)


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (1, 9), (9, 1), (3, 200)])
def test_dense_trees_equal_scipy(shape):
    weight = np.random.default_rng(1).normal(size=shape)
    rows, columns = np.indices(shape).reshape(2, -1)
    graph = coo_matrix((-np.abs(weight).ravel(), (rows, shape[0] + columns)), shape=(sum(shape),) * 2)
    tree = minimum_spanning_tree(graph.tocsr()).tocoo()
    expected = np.zeros(shape, dtype=bool)
    expected[tree.row, tree.col - shape[0]] = True
    np.testing.assert_array_equal(maximum_spanning_tree(weight), expected)


@pytest.mark.parametrize(("pruned", "scale"), [(0.0, 1.0), (0.999, 1.0), (0.0, 1e-9)])
def test_a_forest_of_many_weights_is_that_of_all_of_them_sorted(pruned, scale, monkeypatch):
    rng = np.random.default_rng(0)
    weight = scale * rng.normal(size=(40, 60))
    # The elements of a small sample are the least, and most of the others may be equal.
    weight.ravel()[:: weight.size // 50] *= 1e-3
    weight[rng.random(weight.shape) < pruned] = 0.0
    whole = maximum_spanning_tree(weight)
    for name, value in (("_FIRST_PER_NODE", 1), ("_MOST_EDGES", 7), ("_SAMPLE", 50)):
        monkeypatch.setattr(layer_trees, name, value)
    forest = spanning_forest(weight, linear_graph(*weight.shape))
    np.testing.assert_array_equal(np.flatnonzero(whole), np.sort(forest.elements))
    assert len(forest.elements) == sum(weight.shape) - 1
    assert (np.diff(forest.lengths) <= 0).all()


def test_a_channel_tree_keeps_the_largest_weight_of_each_tree_kernel():
    weight = np.random.default_rng(0).normal(size=(5, 4, 3, 2))
    mask = channel_tree(weight)
    strongest = np.abs(weight).max(axis=(2, 3))
    np.testing.assert_array_equal(mask.any(axis=(2, 3)), maximum_spanning_tree(strongest))
    np.testing.assert_allclose(np.abs(weight[mask]), strongest[maximum_spanning_tree(strongest)])
    np.testing.assert_array_equal(channel_tree(weight[:, :, 0, 0]), maximum_spanning_tree(weight[:, :, 0, 0]))


def test_groups_have_trees_of_their_own():
    weight = np.random.default_rng(0).normal(size=(6, 2, 3, 3))
    mask = channel_tree(weight, groups=3)
    for part in range(3):
        rows = slice(2 * part, 2 * part + 2)
        np.testing.assert_array_equal(mask[rows], channel_tree(weight[rows]))
    assert channel_tree(weight[:, :1], groups=6).sum() == 6
    with pytest.raises(DataError, match="groups must divide the 6 output channels, got 4"):
        channel_tree(weight, groups=4)


@pytest.mark.parametrize("name", ["padded", "stride", "groups", "pointwise", "one dimension"])
@pytest.mark.parametrize("kind", ["normal", "ties", "equal"])
def test_plane_trees_are_the_weights_in_each_kernels_own_tree(name, kind):
    graph = GRAPHS[name]
    weight = weights_of(graph, kind)
    used = plane_trees(weight, graph)
    plane = LayerGraph((1, 1, graph.shape[2]), 1, graph.plane, graph.plane_inputs)
    for o, i in np.ndindex(graph.shape[:2]):
        forest = spanning_forest(weight[o, i][None, None], plane)
        np.testing.assert_array_equal(np.flatnonzero(used[o, i]), np.unique(forest.elements))


def test_a_plane_tree_uses_seven_to_eight_of_nine_weights_on_average():
    weight = np.random.default_rng(0).normal(size=(16, 16, 3, 3))
    counts = plane_trees(weight, convolution_graph(weight.shape, (30, 30))).sum(axis=(2, 3))
    assert 7.0 < counts.mean() < 8.0
    assert counts.min() >= 3


def test_the_tree_of_a_whole_layer_uses_few_of_its_weights():
    weight = np.random.default_rng(0).normal(size=(8, 8, 3, 3))
    forest = spanning_forest(weight, convolution_graph(weight.shape, (18, 18)))
    used = np.unique(forest.elements)
    assert channel_tree(weight).sum() < len(used) < weight.size / 4


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (np.empty((0, 3)), "none of them empty, got shape"),
        (np.ones(3), "two or more dimensions"),
        ([[np.nan, 1.0]], "weight must be finite, got nan at index"),
        ([[np.inf, 1.0]], "weight must be finite, got inf"),
        (np.ones((2, 3)), "must have the graph's"),
    ],
)
def test_bad_weights_are_refused(weight, message):
    with pytest.raises(DataError, match=message):
        spanning_forest(weight, linear_graph(1, 2))


def test_all_zero_and_all_equal_layers_have_the_tree_of_the_first_row_and_column():
    for value in (0.0, 2.0):
        mask = maximum_spanning_tree(np.full((3, 4), value))
        expected = np.zeros((3, 4), dtype=bool)
        expected[0], expected[:, 0] = True, True
        np.testing.assert_array_equal(mask, expected)
