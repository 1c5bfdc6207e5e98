"""How much of a layer's spanning tree magnitude pruning keeps: bounds and measurements.

Source: Zeroth-Order Topological Insights into Iterative Magnitude Pruning, theorem 3.3, corollary 3.4 and appendix C.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike

from nni_topo.errors import ConfigError
from nni_topo.maths.topology.checks import as_chain, as_points
from nni_topo.maths.topology.layer_trees import network_tree
from nni_topo.rules import checked, whole


@checked(m=whole(1), n=whole(1))
def overlap_bound(m: int, n: int, density: float = 1.0) -> float:
    """Bound from below the expected share of a spanning tree among the largest weights.

    Of a layer with independent, identically distributed weights the ``m + n - 1`` largest are looked at, as many as its
    tree has. The bound adds up the probabilities that the next weight joins two nodes that nothing has touched.

    Parameters
    ----------
    m, n : int
        Inputs and outputs of the layer, at least 1, in either order.
    density : float, default=1.0
        Share of the ``m * n`` weights that aren't zero, in (0, 1], placed at random. At least
        ``(m + n - 1) / (m * n)``: fewer weights have no spanning tree.

    Returns
    -------
    float
        In (0, 1]; 1 if one side has a single node.

    Notes
    -----
    With ``p`` the density and ``k = min(m, n)``::

        1 / (m + n - 1) * sum over i in [0, k) of p (m - i) (n - i) / (p m n - i)

    The source prints no legible form for ``p < 1``; this one is derived anew: of the ``p m n - i`` weights left,
    ``p (m - i) (n - i)`` are expected between untouched nodes. Writing ``p m n`` into the denominator alone gives
    1.74 at ``(100, 100, 0.1)``, which bounds nothing.

    Examples
    --------
    >>> round(overlap_bound(100, 10), 3)
    0.049
    """
    alpha = m + n - 1
    least = alpha / (m * n)
    if not least <= density <= 1.0:
        raise ConfigError(f"density must be in [{least:.6g}, 1] for a {m} x {n} layer, got {density} (overlap_bound)")
    if min(m, n) == 1:
        return 1.0
    i = np.arange(min(m, n), dtype=np.float64)
    joins = density * (m - i) * (n - i) / (density * m * n - i)
    return min(1.0, float(joins.sum()) / alpha)


@checked()
def network_overlap_bound(widths: Sequence[int]) -> float:
    """Bound from below the expected share of a whole network's spanning tree among its largest weights.

    For global pruning: the largest weights are taken over all layers of a chain of linear layers, as many as the tree
    of the whole network has, and the tree is that of :func:`nni_topo.topology.network_tree`.

    Parameters
    ----------
    widths : sequence of int
        Numbers of inputs, of the neurons of each layer and of outputs, at least two numbers of at least 1.

    Returns
    -------
    float
        In (0, 1].

    Notes
    -----
    Derived here; the source bounds single layers only. All N weights are independent and identically distributed, as in
    :func:`overlap_bound`, so that every order of them is equally likely. The i-th largest weight belongs to the tree
    for certain if none of the larger ones touches its ends. A weight between two layers has c other weights at its
    ends, so that it is the i-th largest and untouched with probability ``1/N * product over j < i of (N - 1 - c - j) /
    (N - 1 - j)``, and the bound is the sum over all weights and the first ``alpha = nodes - 1`` places, divided by
    alpha. The source counts i touched nodes on both sides of a layer instead, which is at most as large: for a single
    layer of 100 x 10 this form gives 0.084 where :func:`overlap_bound` gives 0.049.

    Examples
    --------
    >>> round(network_overlap_bound([784, 300, 100, 10]), 3)
    0.189
    """
    sizes = list(widths)
    if len(sizes) < 2 or min(sizes) < 1:
        raise ConfigError(f"widths must be two or more numbers of at least 1, got {sizes} (network_overlap_bound)")
    counts = [entering * leaving for entering, leaving in pairwise(sizes)]
    total, alpha = sum(counts), sum(sizes) - 1
    padded = [0, *sizes, 0]
    places = np.arange(alpha, dtype=np.float64)
    certain = 0.0
    for layer, count in enumerate(counts):
        before, entering, leaving, after = padded[layer : layer + 4]
        # the input end has weights to both neighbouring layers, and so has the output end; each counts the weight once
        others = (before + leaving) + (entering + after) - 2
        factors = np.maximum(0.0, total - 1 - others - places[:-1]) / (total - 1 - places[:-1])
        untouched = np.cumprod(np.concatenate([[1.0], factors]))
        certain += count / total * float(untouched.sum())
    return certain / alpha


@checked()
def network_tree_overlap(weights: Sequence[ArrayLike]) -> float:
    """Measure the share of a whole network's maximum spanning tree among its largest weights.

    Parameters
    ----------
    weights : sequence of array_like
        As of :func:`nni_topo.topology.network_tree`.

    Returns
    -------
    float
        Of the ``nodes - 1`` largest |w| of all layers, the share that is in the tree, in (0, 1]. Of equal weights the
        first in the network's order counts as larger.

    Examples
    --------
    >>> network_tree_overlap([[[3.0], [1.0]], [[2.0, 4.0]]])
    1.0
    """
    matrices = as_chain(weights)
    tree = np.concatenate([mask.ravel() for mask in network_tree(matrices)])
    lengths = np.concatenate([np.abs(matrix).ravel() for matrix in matrices])
    alpha = int(tree.sum())
    largest = np.argsort(-lengths, kind="stable")[:alpha]
    return int(tree[largest].sum()) / alpha


@checked()
def tree_overlap(weight: ArrayLike) -> float:
    """Measure the share of a layer's maximum spanning tree among its largest weights.

    Parameters
    ----------
    weight : array_like, shape (out, in)
        Finite weights.

    Returns
    -------
    float
        Of the ``out + in - 1`` largest |w|, the share that is in the tree, in (0, 1]. Of equal weights the first
        in row-major order counts as larger.

    Examples
    --------
    >>> tree_overlap([[4.0, 3.0, 0.1], [2.0, 1.0, 0.2]])
    0.75
    """
    return network_tree_overlap([as_points(weight, "weight")])
