"""The bipartite graph of a layer: its inputs, its outputs, and an edge wherever a weight joins two of them.

A linear layer is the complete graph between its inputs and outputs. A convolution is the graph of its Toeplitz matrix:
one node per channel and position, and one edge per weight and output position. The matrix itself is
never built.

Source: Zeroth-Order Topological Insights into Iterative Magnitude Pruning, theorem 3.2 and its proof.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from nni_topo.errors import DataError
from nni_topo.maths.topology.checks import IntArray
from nni_topo.rules import checked


@dataclass(frozen=True, eq=False)
class LayerGraph:
    """Nodes and edges of a layer."""

    shape: tuple[int, int, int]  # output channels, input channels per group, weights per kernel; at least 1 each
    groups: int  # of a convolution; divides the output channels
    plane: IntArray  # (kernel, positions): which input position each weight of a kernel reads for each output position
    plane_inputs: int  # positions of one input channel, padding counted

    @property
    def inputs(self) -> int:
        """Number of input nodes."""
        return self.groups * self.shape[1] * self.plane_inputs

    @property
    def outputs(self) -> int:
        """Number of output nodes."""
        return self.shape[0] * self.plane_outputs

    @property
    def plane_outputs(self) -> int:
        """Positions of one output channel."""
        return int(self.plane.shape[1])

    @property
    def elements(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def edges(self) -> int:
        """Number of edges: weights times output positions."""
        return self.elements * self.plane_outputs

    @cached_property
    def components(self) -> int:
        """Number of connected components of the whole graph, including each input position that nothing reads."""
        per_plane = plane_components(self)
        unread = self.plane_inputs - len(np.unique(self.plane))
        # Channels of a group are joined wherever their plane has an edge; an unread position is a component in each.
        return self.groups * (per_plane - unread + self.shape[1] * unread)

    @property
    def forest_edges(self) -> int:
        """Number of edges of a spanning forest; inputs + outputs - 1 where the graph is connected."""
        return self.inputs + self.outputs - self.components

    def ends(self, elements: IntArray) -> tuple[IntArray, IntArray]:
        """Return the input and output nodes, each (n, positions), of the edges of elements (n,) of the flat weight."""
        pair, offset = np.divmod(elements, self.shape[2])
        output, entering = np.divmod(pair, self.shape[1])
        channel = output // (self.shape[0] // self.groups) * self.shape[1] + entering
        sources = channel[:, None] * self.plane_inputs + self.plane[offset]
        targets = output[:, None] * self.plane_outputs + np.arange(self.plane_outputs)
        return sources, targets


@checked()
def linear_graph(outputs: int, inputs: int) -> LayerGraph:
    """Return the complete bipartite graph of a linear layer, or of one gate of a recurrent layer.

    Parameters
    ----------
    outputs, inputs : int
        Rows and columns of the weight matrix, at least 1.

    Examples
    --------
    >>> graph = linear_graph(100, 784)
    >>> graph.edges, graph.forest_edges
    (78400, 883)
    """
    _require_positive("outputs", outputs)
    _require_positive("inputs", inputs)
    return LayerGraph((outputs, inputs, 1), 1, np.zeros((1, 1), dtype=np.intp), 1)


@checked()
def convolution_graph(
    weight_shape: Sequence[int],
    padded_size: Sequence[int],
    *,
    stride: Sequence[int] | int = 1,
    dilation: Sequence[int] | int = 1,
    groups: int = 1,
) -> LayerGraph:
    """Return the graph of a convolution's Toeplitz matrix.

    Parameters
    ----------
    weight_shape : sequence of int
        ``(out, in / groups, *kernel)``, one to three kernel dimensions.
    padded_size : sequence of int
        Size of the input in pixels with its padding on both sides, one per kernel dimension. Padding counts
        as input nodes.
    stride, dilation : int or sequence of int, default=1
        As in the layer, at least 1.
    groups : int, default=1
        As in the layer; divides ``out``.

    Examples
    --------
    >>> graph = convolution_graph((1, 1, 3, 3), (30, 30))
    >>> graph.edges, graph.inputs, graph.outputs
    (7056, 900, 784)
    """
    kernel, size = tuple(weight_shape[2:]), tuple(padded_size)
    if not kernel or len(kernel) != len(size):
        raise DataError(
            f"padded_size must have one entry per kernel dimension, got {size} for weights of shape "
            f"{tuple(weight_shape)} (convolution_graph)"
        )
    steps, gaps = _per_dimension(stride, len(size)), _per_dimension(dilation, len(size))
    for name, values in (("weight_shape", weight_shape), ("padded_size", size), ("stride", steps), ("dilation", gaps)):
        for value in values:
            _require_positive(name, value)
    _require_positive("groups", groups)
    if weight_shape[0] % groups:
        raise DataError(f"groups must divide the {weight_shape[0]} output channels, got {groups} (convolution_graph)")
    # Which input position each kernel weight reads at each output position, (kernel, positions): grown dimension by
    # dimension.
    plane = np.zeros((1, 1), dtype=np.intp)
    for width, length, step, gap in zip(kernel, size, steps, gaps, strict=True):
        positions = (length - gap * (width - 1) - 1) // step + 1
        if positions < 1:
            raise DataError(
                f"a kernel must fit into its padded input, got {width} weights {gap} apart in {length} pixels "
                "(convolution_graph)"
            )
        along = gap * np.arange(width)[:, None] + step * np.arange(positions)
        grown = plane[:, None, :, None] * length + along[None, :, None, :]
        plane = grown.reshape(plane.shape[0] * width, plane.shape[1] * positions)
    return LayerGraph((weight_shape[0], weight_shape[1], len(plane)), groups, plane, math.prod(size))


def plane_components(graph: LayerGraph, offsets: Sequence[int] | None = None) -> int:
    """Count the components of one input and one output plane, joined by the weights at flat kernel `offsets`."""
    chosen = graph.plane if offsets is None else graph.plane[list(offsets)]
    nodes = graph.plane_inputs + graph.plane_outputs
    targets = graph.plane_inputs + np.tile(np.arange(graph.plane_outputs), len(chosen))
    edges = coo_matrix((np.ones(chosen.size, dtype=np.int8), (chosen.ravel(), targets)), shape=(nodes, nodes))
    return int(connected_components(edges, directed=False, return_labels=False))


def _per_dimension(value: Sequence[int] | int, count: int) -> tuple[int, ...]:
    values = (value,) * count if isinstance(value, int) else tuple(value)
    if len(values) != count:
        raise DataError(f"stride and dilation must have {count} entries, got {values} (convolution_graph)")
    return values


def _require_positive(name: str, value: int) -> None:
    if value < 1:
        raise DataError(f"{name} must be at least 1, got {value} (layer graph)")
