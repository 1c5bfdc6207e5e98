"""How much of a layer's spanning tree magnitude pruning keeps: bounds and measurements.

Source: Zeroth-Order Topological Insights into Iterative Magnitude Pruning, theorem 3.3, corollary 3.4 and appendix C.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from nni_topo.errors import ConfigError
from nni_topo.maths.topology.checks import as_points
from nni_topo.maths.topology.layer_trees import maximum_spanning_tree
from nni_topo.rules import checked, whole


@checked(m=whole(1), n=whole(1))
def overlap_bound(m: int, n: int, density: float = 1.0) -> float:
    """Bound from below the expected share of a spanning tree among the largest weights.

    The weights are independent and identically distributed; the ``m + n - 1`` largest are considered, as many as the
    tree has. The bound adds up the probabilities that the next weight joins two nodes without an edge so far.

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

    The source prints no legible form for ``p < 1``; this one is our derivation: of the ``p m n - i`` weights left,
    ``p (m - i) (n - i)`` are expected between nodes without an edge. With ``p m n`` only in the denominator it would be
    1.74 at ``(100, 100, 0.1)``, which is no bound.

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
    matrix = as_points(weight, "weight")
    tree = maximum_spanning_tree(matrix).ravel()
    alpha = int(tree.sum())
    largest = np.argsort(-np.abs(matrix).ravel(), kind="stable")[:alpha]
    return int(tree[largest].sum()) / alpha
