from __future__ import annotations

import itertools

import networkx as nx
import numpy as np
import pytest
import torch
from torch import nn

from nni_topo.errors import DataError
from nni_topo.maths.topology.layer_graphs import LayerGraph, plane_components
from nni_topo.topology import convolution_graph, linear_graph

LAYERS = {
    "plain": nn.Conv2d(2, 3, 3, padding=1),
    "stride": nn.Conv2d(2, 2, 3, stride=2, padding=1),
    "uneven": nn.Conv2d(1, 2, (2, 3), stride=(1, 2), padding=(0, 1)),
    "dilation": nn.Conv2d(2, 1, 3, dilation=2),
    "groups": nn.Conv2d(4, 6, 3, padding=1, groups=2),
    "depthwise": nn.Conv2d(3, 3, 3, padding=1, groups=3),
    "pointwise": nn.Conv2d(3, 4, 1),
    "skipping": nn.Conv2d(2, 2, 1, stride=2),
    "one dimension": nn.Conv1d(2, 3, 3, padding=2, dilation=2),
    "three dimensions": nn.Conv3d(1, 2, 2, padding=1),
}


def graph_of(layer: nn.Module, size: tuple[int, ...]) -> LayerGraph:
    padded = [length + 2 * pad for length, pad in zip(size, layer.padding, strict=True)]
    return convolution_graph(
        layer.weight.shape, padded, stride=layer.stride, dilation=layer.dilation, groups=layer.groups
    )


def toeplitz(layer: nn.Module, size: tuple[int, ...]) -> np.ndarray:
    """Feed the padded input's unit vectors through the layer, its weights numbered from 1: (outputs, inputs)."""
    padded = [length + 2 * pad for length, pad in zip(size, layer.padding, strict=True)]
    numbers = torch.arange(1.0, layer.weight.numel() + 1, dtype=torch.float64).reshape(layer.weight.shape)
    units = torch.eye(layer.in_channels * int(np.prod(padded)), dtype=torch.float64)
    convolve = {1: nn.functional.conv1d, 2: nn.functional.conv2d, 3: nn.functional.conv3d}[len(size)]
    images = units.reshape(len(units), layer.in_channels, *padded)
    out = convolve(images, numbers, stride=layer.stride, dilation=layer.dilation, groups=layer.groups)
    return out.flatten(1).T.numpy()


@pytest.mark.parametrize("name", LAYERS)
def test_the_edges_of_a_convolution_are_the_entries_of_its_toeplitz_matrix(name):
    layer = LAYERS[name]
    size = (5, 6, 4)[: layer.weight.dim() - 2]
    graph, matrix = graph_of(layer, size), toeplitz(layer, size)
    assert (graph.outputs, graph.inputs) == matrix.shape
    sources, targets = graph.ends(np.arange(graph.elements))
    built = np.zeros_like(matrix)
    np.add.at(built, (targets, sources), np.arange(1, graph.elements + 1)[:, None])
    np.testing.assert_array_equal(built, matrix)
    assert graph.edges == np.count_nonzero(matrix)
    reference = nx.Graph()
    reference.add_nodes_from(range(sum(matrix.shape)))
    reference.add_edges_from((i, len(matrix) + j) for i, j in np.argwhere(matrix))
    assert graph.components == nx.number_connected_components(reference)
    assert graph.forest_edges == sum(matrix.shape) - graph.components


def test_a_linear_layer_is_a_complete_graph():
    graph = linear_graph(3, 4)
    sources, targets = graph.ends(np.arange(12))
    assert {(int(i), int(o)) for i, o in zip(sources.ravel(), targets.ravel(), strict=True)} == set(
        itertools.product(range(4), range(3))
    )
    assert (graph.edges, graph.forest_edges, graph.components) == (12, 6, 1)


def test_components_of_some_weights_of_a_kernel():
    graph = convolution_graph((1, 1, 1, 3), (1, 5))
    assert plane_components(graph) == 1
    assert plane_components(graph, [0]) == 5  # three pairs, two input positions alone
    assert plane_components(graph, [0, 2]) == 2  # a chain over even positions, another over odd ones


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (((2, 2, 3, 3), (8,)), {}, "one entry per kernel dimension"),
        (((2, 2, 3, 3), (2, 8)), {}, "must fit into its padded input, got 3 weights 1 apart in 2 pixels"),
        (((2, 2, 3, 3), (8, 8)), {"stride": 0}, "stride must be at least 1, got 0"),
        (((2, 2, 3, 3), (8, 8)), {"stride": (1, 1, 1)}, "must have 2 entries"),
        (((3, 2, 3, 3), (8, 8)), {"groups": 2}, "must divide the 3 output channels, got 2"),
        (((2, 0, 3, 3), (8, 8)), {}, "weight_shape must be at least 1, got 0"),
        (((2, 2), ()), {}, "one entry per kernel dimension"),
    ],
)
def test_impossible_convolutions_are_refused(arguments, options, message):
    with pytest.raises(DataError, match=message):
        convolution_graph(*arguments, **options)


def test_an_empty_linear_layer_is_refused():
    with pytest.raises(DataError, match="inputs must be at least 1, got 0"):
        linear_graph(3, 0)
