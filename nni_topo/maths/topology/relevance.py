"""Distances between the neurons of a whole network, by which its persistence has degrees beyond 0.

A layer's own graph joins inputs to outputs only. It has no triangles, so that no loop of it is ever filled: each weight
outside of the spanning tree begins one, and none ends. Loops end where neurons of more than two layers are joined.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike

from nni_topo.errors import DataError
from nni_topo.maths.topology.checks import FloatArray, as_chain
from nni_topo.rules import checked


@checked()
def relevance_distances(weights: Sequence[ArrayLike]) -> FloatArray:
    """Compute the distances between all neurons of a chain of linear layers.

    Two neurons of different layers are as far apart as 1 less the relevance of the earlier one for the later one: the
    largest product of ``|w| / max |w|``, each layer divided by its own maximum, along a path between them. Neurons of
    one layer have distance 1, the largest there is.

    Parameters
    ----------
    weights : sequence of array_like, shapes (n_1, n_0), (n_2, n_1), ...
        Finite weights in the network's order, at least one layer, none all zero.

    Returns
    -------
    ndarray of float64, shape (nodes, nodes)
        In [0, 1], symmetric, with a zero diagonal; inputs first, then layer by layer. No metric in general, which
        :func:`nni_topo.topology.rips_diagram` doesn't need. There a bar that ends at 1 is one that no path ends.

    Notes
    -----
    The definition is this project's: the sources propose persistence beyond degree 0 without saying of what. Memory is
    8 bytes for each pair of nodes.

    Examples
    --------
    >>> relevance_distances([[[4.0], [2.0]], [[1.0, 5.0]]])[0]  # to itself, both hidden neurons, the output
    array([0. , 0. , 0.5, 0.5])
    """
    matrices = as_chain(weights)
    scaled = []
    for index, matrix in enumerate(matrices):
        sizes = np.abs(matrix)
        if not sizes.any():
            raise DataError(f"a layer must have a weight other than 0 to be scaled, got none (weights[{index}])")
        scaled.append((sizes / sizes.max()).T)
    firsts = np.cumsum([0, *(layer.shape[0] for layer in scaled), scaled[-1].shape[1]])
    spans = [slice(start, end) for start, end in pairwise(firsts)]
    distances = np.ones((firsts[-1], firsts[-1]))
    for start in range(len(scaled)):
        relevance = scaled[start]
        for end in range(start + 1, len(spans)):
            if end > start + 1:
                # The largest product over the neurons between.
                strongest = np.zeros((len(relevance), scaled[end - 1].shape[1]))
                for before, after in zip(relevance.T, scaled[end - 1], strict=True):
                    np.maximum(strongest, np.outer(before, after), out=strongest)
                relevance = strongest
            distances[spans[start], spans[end]] = 1.0 - relevance
            distances[spans[end], spans[start]] = 1.0 - relevance.T
    np.fill_diagonal(distances, 0.0)
    return distances
