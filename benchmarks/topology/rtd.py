"""RTD-Lite: how far two clouds of the same points differ in which points form clusters, at every scale."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from nni_topo.errors import DataError
from nni_topo.maths.topology.checks import FloatArray, IntArray, as_distances
from nni_topo.rules import checked

_QUANTILE = 0.9  # of the distances between different points, which becomes 1


@checked()
def rtd_lite(first: ArrayLike, second: ArrayLike, *, normalise: bool = True) -> float:
    """Return RTD-Lite between two clouds of the same points: 0 if every scale has the same clusters in both.

    Point i of one cloud is point i of the other, such as one image in two layers of a network. The distance of a pair
    in the third, "minimum" cloud is the smaller of its two distances. RTD-Lite is by how much its minimum spanning
    tree is shorter than those of the two clouds, on average.

    Parameters
    ----------
    first, second : array_like, shape (n, n)
        Finite symmetric distances, 0 on the diagonal.
    normalise : bool, default=True
        Whether both matrices are divided by the 0.9 quantile of their distances between different points, so that the
        units of the clouds don't matter.

    Returns
    -------
    float
        At least 0; in units of the quantiles if ``normalise``, else in that of the distances. Symmetric in its
        arguments.

    Raises
    ------
    DataError
        If one isn't a distance matrix, their shapes differ, or ``normalise`` meets a cloud whose quantile is 0.

    See Also
    --------
    rtd_lite_loss : the same of tensors of points, differentiable.

    Notes
    -----
    Three spanning trees by Prim's algorithm: O(n^2) time and memory.

    References
    ----------
    E. Tulchinskii et al., RTD-Lite: Scalable Topological Analysis for Comparing Weighted Graphs in Learning Tasks,
    AISTATS 2025, arXiv:2503.11910.

    Examples
    --------
    >>> line = [0.0, 1.0, 5.0]
    >>> other = [0.0, 4.0, 5.0]
    >>> first, second = (abs(np.subtract.outer(x, x)) for x in (line, other))
    >>> rtd_lite(first, second, normalise=False)  # trees of 1 + 4 and 4 + 1, the minimum's of 1 + 1
    3.0
    >>> rtd_lite(first, 2.0 * first)
    0.0
    """
    one, two = _both(first, second, normalise)
    smaller = np.minimum(one, two)
    lengths = [float(matrix[tuple(spanning_edges(matrix).T)].sum()) for matrix in (one, two, smaller)]
    return max(0.0, (lengths[0] + lengths[1]) / 2.0 - lengths[2])


@checked()
def rtd_lite_loss(first: Tensor, second: Tensor) -> Tensor:
    """Return RTD-Lite between two clouds of the same points as a loss.

    Parameters
    ----------
    first, second : Tensor, shapes (n, features) and (n, other features)
        Points, at least two, in row i of both the same. Gradients flow to both.

    Returns
    -------
    Tensor, shape ()
        As :func:`rtd_lite` of their Euclidean distances, normalised. The edges of the trees are chosen on the CPU;
        their lengths, and so the gradients, stay on the device. The quantiles count as constants.

    Raises
    ------
    DataError
        If the tensors don't hold as many points, fewer than two, or NaN or infinity, or all points of one are equal.

    References
    ----------
    As of :func:`rtd_lite`.

    Examples
    --------
    >>> points = torch.tensor([[0.0], [1.0], [5.0]], requires_grad=True)
    >>> loss = rtd_lite_loss(points, torch.tensor([[0.0], [4.0], [5.0]]))
    >>> loss.backward()
    >>> bool(loss > 0), bool((points.grad != 0).any())
    (True, True)
    """
    for name, points in (("first", first), ("second", second)):
        if points.dim() != 2 or len(points) < 2:
            raise DataError(f"points must have shape (n, features) with n >= 2, got {tuple(points.shape)} ({name})")
        if not bool(torch.isfinite(points).all()):
            raise DataError(f"points must be finite, got NaN or infinity ({name})")
    if len(first) != len(second):
        raise DataError(f"both clouds must have the same number of points, got {len(first)} and {len(second)}")
    one = _normalised_distances(first)
    two = _normalised_distances(second).to(one)
    smaller = torch.minimum(one, two)
    return (_tree_length(one) + _tree_length(two)) / 2.0 - _tree_length(smaller)


def spanning_edges(distances: FloatArray) -> IntArray:
    """Return the edges (n - 1, 2) of a minimum spanning tree by Prim's algorithm; of equal ones the first point's.

    ``distances`` (n, n) were checked before.
    """
    points = len(distances)
    edges = np.empty((points - 1, 2), dtype=np.intp)
    to_tree = distances[0].copy()
    to_tree[0] = np.inf
    nearest = np.zeros(points, dtype=np.intp)  # the point of the tree that each other point is nearest to
    is_closed = np.zeros(points, dtype=np.bool_)
    is_closed[0] = True
    for edge in range(points - 1):
        newest = int(to_tree.argmin())
        edges[edge] = nearest[newest], newest
        is_closed[newest] = True
        row = distances[newest]
        is_nearer = row < to_tree
        is_nearer &= ~is_closed
        nearest[is_nearer] = newest
        to_tree[is_nearer] = row[is_nearer]
        to_tree[newest] = np.inf
    return edges


def _both(first: ArrayLike, second: ArrayLike, normalise: bool) -> tuple[FloatArray, FloatArray]:
    """Check two distance matrices and return them, normalised if asked."""
    one, two = as_distances(first), as_distances(second)
    if one.shape != two.shape:
        raise DataError(f"both clouds must have the same number of points, got {len(one)} and {len(two)}")
    if not normalise or len(one) == 1:
        return one, two
    return _normalised(one, "first"), _normalised(two, "second")


def _normalised(distances: FloatArray, what: str) -> FloatArray:
    unit = float(np.quantile(distances[np.triu_indices(len(distances), 1)], _QUANTILE))
    return distances / _checked_unit(unit, what)


def _normalised_distances(points: Tensor) -> Tensor:
    """Return the distances (n, n) of points, divided by their quantile."""
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    upper = distances.detach()[tuple(torch.triu_indices(len(points), len(points), 1, device=points.device))]
    unit = float(np.quantile(upper.to("cpu", torch.float64).numpy(), _QUANTILE))
    return distances / _checked_unit(unit, "points")


def _checked_unit(unit: float, what: str) -> float:
    if unit <= 0.0:
        raise DataError(f"the 0.9 quantile of distances must be above 0, got {unit} ({what})")
    return unit


def _tree_length(distances: Tensor) -> Tensor:
    """Return the length of the minimum spanning tree of distances (n, n), a tensor of shape ()."""
    edges = torch.from_numpy(spanning_edges(distances.detach().to("cpu", torch.float64).numpy()))
    start, end = edges.to(distances.device).T
    return distances[start, end].sum()
