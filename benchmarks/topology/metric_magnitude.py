"""Magnitude of a metric space: how many points a cloud has, seen at a scale."""

from __future__ import annotations

import numpy as np
import scipy.linalg
from numpy.typing import ArrayLike

from nni_topo.errors import DataError
from nni_topo.maths.ties import first_smallest
from nni_topo.maths.topology.checks import FloatArray, IntArray, as_distances, as_index
from nni_topo.rules import checked, number, whole

_POSITIVE = number(0.0, closed="neither")


@checked(scale=_POSITIVE)
def metric_magnitude(distances: ArrayLike, scale: float = 1.0) -> float:
    """Return the magnitude of a cloud: its effective number of points.

    With the similarities ``exp(-scale * distance)``, the weights of the points are those for which the similarities to
    every point sum to one. Their sum is the magnitude: 1 for points that lie on one place, n for n points far apart.

    Parameters
    ----------
    distances : array_like, shape (n, n)
        Finite symmetric distances, 0 on the diagonal. Points at distance 0 count as one.
    scale : float, default=1.0
        Above 0; in one over the unit of the distances. The larger, the more points count as different.

    Returns
    -------
    float
        From 1 to n for points of a Euclidean space.

    Raises
    ------
    DataError
        If the distances aren't a distance matrix, or their similarities aren't positive definite; those of points of a
        Euclidean space are.
    ConfigError
        If ``scale`` is out of its range.

    See Also
    --------
    magnitude_subset : which points to keep.

    References
    ----------
    T. Leinster, The magnitude of metric spaces, Documenta Mathematica 18 (2013), 857-905.

    Examples
    --------
    Two points at distance d have 1 + tanh(scale d / 2):

    >>> round(metric_magnitude([[0.0, 2.0], [2.0, 0.0]]), 6), round(1.0 + float(np.tanh(1.0)), 6)
    (1.761594, 1.761594)
    """
    matrix = as_distances(distances)
    firsts = _different_points(matrix)
    inverse = _inverse(matrix[np.ix_(firsts, firsts)], scale)
    return float(inverse.sum())


@checked(keep=whole(1), scale=_POSITIVE)
def magnitude_subset(distances: ArrayLike, keep: int, scale: float = 1.0, *, base: int | None = None) -> IntArray:
    """Return points of a cloud that keep much of its magnitude: the least is lost by each removal.

    Parameters
    ----------
    distances : array_like, shape (n, n)
        As in :func:`metric_magnitude`.
    keep : int
        How many points stay, in [1, n].
    scale : float, default=1.0
        As in :func:`metric_magnitude`.
    base : int or None, default=None
        Index of a point that always stays, such as the origin of a cloud of channels. None: no point does.

    Returns
    -------
    ndarray of int, shape (keep,)
        Their indices, ascending.

    Raises
    ------
    DataError
        As in :func:`metric_magnitude`, or if ``keep`` is larger than n.
    ConfigError
        If ``keep`` or ``scale`` is out of its range.

    Notes
    -----
    Backward elimination: removing a point of weight w costs w^2 over its entry on the diagonal of the inverse
    similarities, exactly; the inverse is updated after each removal. O(n^3) in all. A greedy search: no guarantee that
    the kept set has the largest magnitude of its size.

    Of points at distance 0 all but one go at first, the last one before the others; the base stays, else the first.
    Of removals that cost equally much the lowest index goes first.

    Examples
    --------
    >>> line = np.array([0.0, 0.1, 5.0, 9.0])
    >>> magnitude_subset(abs(np.subtract.outer(line, line)), 3)
    array([0, 2, 3])
    """
    matrix = as_distances(distances)
    points = len(matrix)
    if keep > points:
        raise DataError(f"keep must be at most the number of points, {points}, got {keep}")
    # The base comes first, so that it stays of points on its place.
    order = np.arange(points)
    if base is not None:
        order = np.concatenate([[as_index(base, points, "base")], np.delete(order, base)])
    left = order[_different_points(matrix[np.ix_(order, order)])]
    if keep >= len(left):
        copies = np.setdiff1d(order, left)
        return np.sort(np.concatenate([left, copies[: keep - len(left)]]))
    inverse = _inverse(matrix[np.ix_(left, left)], scale)
    while len(left) > keep:
        weights = inverse.sum(axis=1)
        costs = weights**2 / inverse.diagonal()
        if base is not None:
            costs[0] = np.inf
        gone = first_smallest(costs)
        others = np.arange(len(left)) != gone
        column = inverse[others, gone]
        inverse = inverse[np.ix_(others, others)] - np.outer(column, column) / inverse[gone, gone]
        left = left[others]
    return np.sort(left)


def _different_points(distances: FloatArray) -> IntArray:
    """Return the indices of the points that have distance 0 to no point before them."""
    is_copy = np.tril(distances == 0.0, -1).any(axis=1)
    return np.flatnonzero(~is_copy)


def _inverse(distances: FloatArray, scale: float) -> FloatArray:
    """Return the inverse of the similarities of points with distances above 0."""
    similarities = np.exp(-scale * distances)
    try:
        factor = scipy.linalg.cholesky(similarities, lower=True)
    except scipy.linalg.LinAlgError:
        raise DataError(
            f"similarities must be positive definite, as those of points of a Euclidean space are, got others at scale "
            f"{scale:g} (distances)"
        ) from None
    inverse: FloatArray = scipy.linalg.cho_solve((factor, True), np.eye(len(distances)))
    return inverse
