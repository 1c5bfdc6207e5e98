"""Maximum spanning trees of layers: the weights that determine a layer's zeroth homology.

In the descending filtration of |w| components merge along the edges of the maximum spanning tree. Equal weights are
taken in row-major order, so that every tree is unique.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree

from nni_topo.errors import DataError
from nni_topo.maths.topology.checks import BoolArray, FloatArray, IntArray, as_points, as_tensor
from nni_topo.maths.topology.layer_graphs import LayerGraph, linear_graph, plane_components
from nni_topo.rules import checked

# Edges that are sorted at once: at first, per node, mostly enough for the complete forest; and at most.
_FIRST_PER_NODE = 16
_MOST_EDGES = 1 << 21
_SAMPLE = 1 << 16  # weights whose quantiles are the bounds of the batches


@checked()
def maximum_spanning_tree(weight: ArrayLike) -> BoolArray:
    """Mark the weights of a dense layer that form its maximum spanning tree.

    The layer is the complete bipartite graph between its inputs and outputs with edges |w|.

    Parameters
    ----------
    weight : array_like, shape (out, in)
        Finite weights.

    Returns
    -------
    ndarray of bool, shape (out, in)
        True on the out + in - 1 weights of the tree. Zero weights count as edges of length 0, and among
        equal |w| the first in row-major order is taken.

    Examples
    --------
    >>> maximum_spanning_tree([[3.0, -2.0], [1.0, 0.5]])
    array([[ True,  True],
           [ True, False]])
    """
    return channel_tree(as_points(weight, "weight"))


@checked()
def channel_tree(weight: ArrayLike, *, groups: int = 1) -> BoolArray:
    """Mark one weight per edge of a convolution's channel tree.

    Nodes are the input and output channels; the edge between two is the largest |w| of their kernel.

    Parameters
    ----------
    weight : array_like, shape (out, in / groups, *kernel)
        Finite weights; of a linear layer ``(out, in)``.
    groups : int, default=1
        Groups of the convolution, each with a tree of its own.

    Returns
    -------
    ndarray of bool, shape (out, in / groups, *kernel)
        True on ``out / groups + in / groups - 1`` weights per group. With these weights alone every channel
        stays connected.

    Examples
    --------
    >>> int(channel_tree(np.random.default_rng(0).normal(size=(8, 4, 3, 3))).sum())
    11
    """
    sizes = np.abs(as_tensor(weight, "weight"))
    if groups < 1 or len(sizes) % groups:
        raise DataError(f"groups must divide the {len(sizes)} output channels, got {groups} (channel_tree)")
    kernels = sizes.reshape(*sizes.shape[:2], -1)
    strongest = kernels.argmax(axis=2)
    graph = replace(linear_graph(*kernels.shape[:2]), groups=groups)
    rows, columns = np.unravel_index(spanning_forest(kernels.max(axis=2), graph).elements, strongest.shape)
    mask = np.zeros(kernels.shape, dtype=np.bool_)
    mask[rows, columns, strongest[rows, columns]] = True
    return mask.reshape(sizes.shape)


@checked()
def plane_trees(weight: ArrayLike, graph: LayerGraph) -> BoolArray:
    """Mark the weights that the spanning tree of each kernel's own Toeplitz graph uses.

    One input plane, one output plane and the kernel between them form a graph; its tree may hold several edges of a
    weight. This is the graph whose critical ratio the paper tabulates.

    Parameters
    ----------
    weight : array_like, shape (out, in / groups, *kernel)
        Finite weights.
    graph : LayerGraph
        The convolution's graph.

    Returns
    -------
    ndarray of bool, shape of the weight
        True where at least one edge of the weight is in its kernel's tree.

    Notes
    -----
    A weight is used if its edges join components that the larger weights of its kernel leave separate. This depends on
    which weights are larger and not on their values, so each set of weights is computed once.
    """
    sizes = np.abs(_check_weight(weight, graph))
    kernels = sizes.reshape(-1, graph.shape[2])
    order = np.argsort(-kernels, axis=1, kind="stable")
    components: dict[tuple[int, ...], int] = {(): graph.plane_inputs + graph.plane_outputs}
    final = plane_components(graph)
    used = np.zeros(kernels.shape, dtype=np.bool_)
    for kernel, ranking in enumerate(order.tolist()):
        larger: tuple[int, ...] = ()
        for offset in ranking:
            before = components[larger]
            if before == final:
                break
            larger = tuple(sorted((*larger, offset)))
            if larger not in components:
                components[larger] = plane_components(graph, larger)
            used[kernel, offset] = components[larger] < before
    return used.reshape(sizes.shape)


@dataclass(frozen=True, eq=False)
class Forest:
    """A maximum spanning forest of a layer's graph, strongest edge first; each array has an entry per edge."""

    elements: IntArray  # indices into the flattened weight
    sources: IntArray  # input nodes
    targets: IntArray  # output nodes
    lengths: FloatArray  # |w|, descending


@checked()
def spanning_forest(weight: ArrayLike, graph: LayerGraph) -> Forest:
    """Compute the maximum spanning forest of a layer's whole graph.

    Parameters
    ----------
    weight : array_like
        Finite weights, as many as the graph has elements.
    graph : LayerGraph
        The layer's graph.

    Returns
    -------
    Forest
        ``graph.forest_edges`` edges.

    Notes
    -----
    Kruskal's algorithm on batches of the largest weights: components that a batch joins are contracted before the next
    batch. It ends when the forest is complete, usually after a small part of the weights. Memory: about two copies of
    the weight and a few million edges.
    """
    flat = np.abs(_check_weight(weight, graph)).ravel()
    nodes, missing, edges_per_element = graph.inputs + graph.outputs, graph.forest_edges, graph.plane_outputs
    labels = np.arange(nodes)
    tree_edges: list[tuple[IntArray, IntArray, IntArray]] = []
    sample = np.sort(flat[:: max(1, len(flat) // _SAMPLE)])
    first_count = max(1, _FIRST_PER_NODE * nodes // edges_per_element)
    most = max(1, _MOST_EDGES // edges_per_element)
    for batch in _batches_by_size(flat, first_count, most, sample):
        sources, targets = (ends.ravel() for ends in graph.ends(batch))
        chosen, labels = _join_components(labels, sources, targets + graph.inputs)
        tree_edges.append((batch[chosen // edges_per_element], sources[chosen], targets[chosen]))
        missing -= len(chosen)
        if missing == 0:
            break
    elements, sources, targets = (np.concatenate(parts) for parts in zip(*tree_edges, strict=True))
    return Forest(elements, sources, targets, flat[elements])


def _batches_by_size(flat: FloatArray, count: int, most: int, sample: FloatArray) -> Iterator[IntArray]:
    """Yield elements (n,) in batches, largest first and equal ones in order: about ``count`` at first, then more."""
    # A forest is complete after a small part of the elements: the others are compared with a bound, and never sorted.
    # Bounds are quantiles of an ascending sample; they change the sizes of batches, but not the forest.
    bound, share = np.inf, count / len(flat)
    while bound > 0.0:
        place = len(sample) - 1 - int(share * len(sample))
        low = float(sample[place]) if place > 0 else 0.0
        batch = np.flatnonzero((flat >= low) & (flat < bound))
        batch = batch[np.argsort(-flat[batch], kind="stable")]
        # Equal elements lie within one pair of bounds, maybe all of them.
        yield from (batch[start : start + most] for start in range(0, len(batch), most))
        bound, share = low, 4.0 * share


def _join_components(labels: IntArray, sources: IntArray, targets: IntArray) -> tuple[IntArray, IntArray]:
    """Return which edges, given strongest first, join components, and the components' labels afterwards."""
    count = int(labels.max()) + 1
    low, high = labels[sources], labels[targets]
    apart = np.flatnonzero(low != high)
    low, high = np.minimum(low, high)[apart], np.maximum(low, high)[apart]
    _, first = np.unique(low * count + high, return_index=True)
    first.sort()
    apart, low, high = apart[first], low[first], high[first]
    ranks = np.arange(1.0, len(apart) + 1)
    tree = minimum_spanning_tree(csr_matrix((ranks, (low, high)), shape=(count, count)))
    _, merged = connected_components(tree, directed=False)
    chosen = np.sort(tree.data).astype(np.intp) - 1
    return apart[chosen], merged.astype(np.intp)[labels]


def _check_weight(weight: ArrayLike, graph: LayerGraph) -> FloatArray:
    values = as_tensor(weight, "weight")
    if values.size != graph.elements or len(values) != graph.shape[0]:
        raise DataError(f"weight must have the graph's {graph.shape} elements, got shape {values.shape}")
    return values
