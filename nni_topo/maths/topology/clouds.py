"""Euclidean distance matrices of point clouds, with a stated error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.distance import cdist
from scipy.stats import chi2

from nni_topo.errors import DataError
from nni_topo.maths.topology.checks import FloatArray, as_points
from nni_topo.rules import checked

_RELATIVE_ERROR = 1e-9
_BLOCK_ROWS = 256
_LARGEST_EXPONENT = 1022


@checked()
def with_origin(points: ArrayLike) -> FloatArray:
    """Append the zero vector to a point cloud, as its base point.

    A pruned neuron becomes the zero vector, so a neuron near the origin costs nothing to prune: with the
    origin in the cloud, distances say so.

    Parameters
    ----------
    points : array_like, shape (n, features)
        Finite coordinates.

    Returns
    -------
    ndarray of float64, shape (n + 1, features)
        The points in their order, then the origin: its index is n.

    Raises
    ------
    DataError
        If the points aren't a finite, non-empty matrix.

    Examples
    --------
    >>> with_origin([[3.0, 4.0]])
    array([[3., 4.],
           [0., 0.]])
    """
    cloud = as_points(points)
    return np.vstack([cloud, np.zeros((1, cloud.shape[1]))])


@checked()
def pairwise_distances(points: ArrayLike) -> FloatArray:
    """Compute all Euclidean distances of a point cloud.

    Parameters
    ----------
    points : array_like, shape (n, features)
        Finite coordinates; computed in float64 whatever their type.

    Returns
    -------
    ndarray of float64, shape (n, n)
        Symmetric, exactly 0 on the diagonal and between identical rows.

    Raises
    ------
    DataError
        If the points aren't a finite, non-empty matrix.

    Notes
    -----
    The squares come from a Gram matrix of the centred cloud, one matrix product. Where two points are so
    near each other that the subtraction cancels, the entry is computed again from the differences of the
    given coordinates. An entry d is within 1e-9 d of the exact distance, as long as d is above 1e-150
    times the largest coordinate. Of points with one coordinate it is the rounded difference.

    Time is O(n^2 features); memory the result, a copy of the points and a few MB.

    Examples
    --------
    >>> pairwise_distances([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]])
    array([[0., 5., 0.],
           [5., 0., 5.],
           [0., 5., 0.]])
    """
    cloud = as_points(points)
    largest = max(cloud.max(), -cloud.min())
    if largest == 0:
        return np.zeros((len(cloud), len(cloud)))
    # A power of two rescales without rounding, and keeps the squares from overflowing.
    exponent = min(-int(np.frexp(largest)[1]), _LARGEST_EXPONENT)
    cloud = cloud * np.ldexp(1.0, exponent)
    if cloud.shape[1] == 1:
        # Rounded differences keep the order of the points on their line, see `line_order`; a Gram matrix doesn't.
        lengths: FloatArray = cloud - cloud.T
        np.abs(lengths, out=lengths)
        return np.ldexp(lengths, -exponent, out=lengths)
    centred = cloud - cloud.mean(axis=0)
    norms = np.einsum("ij,ij->i", centred, centred)
    distances: FloatArray = centred @ centred.T
    # The share of |x|^2 + |y|^2 below which a Gram square may miss the stated error. The rounding of a sum of features
    # many products is at most features * eps times the sum of their sizes; a square root halves a relative error, and
    # the subtraction adds two roundings more.
    cancellation = float((cloud.shape[1] + 4) * np.finfo(np.float64).eps / _RELATIVE_ERROR)
    for start in range(0, len(cloud), _BLOCK_ROWS):
        # Rows of the Gram matrix become distances, from the diagonal on, and are mirrored.
        stop = min(start + _BLOCK_ROWS, len(cloud))
        block = distances[start:stop, start:]
        sizes = norms[start:stop, None] + norms[start:]
        np.subtract(sizes, 2.0 * block, out=block)
        # What lies above the diagonal is mirrored, so only there near points are worth a second look.
        cancelled = np.triu(block < cancellation * sizes, 1)
        np.sqrt(np.maximum(block, 0.0, out=block), out=block)
        for i in np.flatnonzero(cancelled.any(axis=1)):
            near = np.flatnonzero(cancelled[i])
            block[i, near] = cdist(cloud[start + i, None], cloud[start + near])[0]
        square = np.triu(block[:, : len(block)], 1)
        block[:, : len(block)] = square + square.T
        distances[stop:, start:stop] = distances[start:stop, stop:].T
    return np.ldexp(distances, -exponent, out=distances)


_FAILURE = 1e-3
# Rows that differ in so many features needn't be compared in all.
_FIRST_FEATURES = 8


@checked()
def projection_error(points: int, features: int, *, failure: float = _FAILURE) -> float:
    """Bound the relative error of all distances of a cloud after a random projection.

    Parameters
    ----------
    points : int
        Points of the cloud, at least 1; the origin counts as one if distances from it matter.
    features : int
        Features that are left, at least 1.
    failure : float, default 1e-3
        Chance in (0, 1) that any of the distances misses the bound.

    Returns
    -------
    float
        e >= 0 such that every distance d becomes one within ``[(1 - e) d, (1 + e) d]``, save for the chance; above 1,
        the lower end says nothing.

    Raises
    ------
    DataError
        If a number is out of range.

    References
    ----------
    S. Dasgupta and A. Gupta, An elementary proof of a theorem of Johnson and Lindenstrauss, Random Structures and
    Algorithms 22, 2003.

    Examples
    --------
    >>> round(projection_error(513, 1024), 3)
    0.128
    """
    pairs = _pairs(points, failure)
    if features < 1:
        raise DataError(f"a projection needs at least one feature, got {features}")
    high = 1.0
    while _misses(features, high) * pairs > failure:
        high *= 2.0
    return _last_step(0.0, high, lambda error: _misses(features, error) * pairs <= failure)


@checked()
def projected_features(points: int, error: float, *, failure: float = _FAILURE) -> int:
    """Return how many features a random projection needs to keep all distances of a cloud within a relative error.

    Parameters
    ----------
    points : int
        Points of the cloud, at least 1; the origin counts as one if distances from it matter.
    error : float
        In (0, 1), see `projection_error`.
    failure : float, default 1e-3
        Chance in (0, 1) that any of the distances misses the bound.

    Returns
    -------
    int
        At least 1; whatever the number of features before.

    Raises
    ------
    DataError
        If a number is out of range.

    Examples
    --------
    >>> projected_features(513, 0.25)
    274
    """
    pairs = _pairs(points, failure)
    if not 0.0 < error < 1.0:
        raise DataError(f"the error of a projection must be in (0, 1), got {error}")
    high = 1
    while _misses(high, error) * pairs > failure:
        high *= 2
    return math.ceil(_last_step(high // 2, high, lambda k: _misses(math.ceil(k), error) * pairs <= failure))


@checked()
def random_projection(columns: Iterable[FloatArray], features: int, seed: int) -> FloatArray:
    """Project a cloud that comes in chunks of its features.

    Parameters
    ----------
    columns : iterable of ndarray, shape (n, any)
        The cloud's features, one chunk after the other; only one is held at a time.
    features : int
        Features that are left, at least 1.
    seed : int
        Same seed and chunks, same projection.

    Returns
    -------
    ndarray of float64, shape (n, features)
        Expected squares of all distances are those of the cloud; `projection_error` bounds what they are. Points that
        are equal stay exactly equal, and the origin stays the origin.

    Raises
    ------
    DataError
        If there is no chunk or no feature is left.

    Examples
    --------
    >>> cloud = np.random.default_rng(0).normal(size=(2, 1000))
    >>> flat = random_projection([cloud[:, :600], cloud[:, 600:]], 400, seed=0)
    >>> flat.shape, bool(abs(np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(cloud[0] - cloud[1]) - 1) < 0.2)
    ((2, 400), True)
    """
    if features < 1:
        raise DataError(f"a projection needs at least one feature, got {features}")
    rng, total = np.random.default_rng(seed), None
    points = 0
    for given in columns:
        chunk = as_points(given, "a chunk of features")
        if points and len(chunk) != points:
            raise DataError(f"chunks must have a row per point, got {points} rows and {len(chunk)}")
        points = len(chunk)
        part = _product(chunk, rng.standard_normal((chunk.shape[1], features)))
        total = part if total is None else np.add(total, part, out=total)
    if total is None:
        raise DataError("a projection needs at least one chunk of features, got none")
    return np.asarray(total / math.sqrt(features))


def _product(rows: FloatArray, matrix: FloatArray) -> FloatArray:
    """Multiply rows by a matrix, equal ones only once: a BLAS may round them differently in different places."""
    if len(np.unique(_keys(rows[:, :_FIRST_FEATURES]))) == len(rows):
        return np.asarray(rows @ matrix)
    _, first, inverse = np.unique(_keys(rows), return_index=True, return_inverse=True)
    return np.asarray((rows[first] @ matrix)[inverse])


def _keys(rows: FloatArray) -> NDArray[np.void]:
    """Return each row's bytes; adding zero takes the sign off -0.0, so that equal rows have equal bytes."""
    keys = np.ascontiguousarray(rows + 0.0).view(np.dtype((np.void, rows.itemsize * rows.shape[1])))
    return np.asarray(keys.ravel())


def _pairs(points: int, failure: float) -> float:
    if points < 1:
        raise DataError(f"a cloud must have at least one point, got {points}")
    if not 0.0 < failure < 1.0:
        raise DataError(f"the chance to miss a bound must be in (0, 1), got {failure}")
    return 0.5 * points * (points - 1)


def _misses(features: int, error: float) -> float:
    """Return the chance that one distance moves by more than a share of it."""
    below = chi2.cdf(features * (1.0 - error) ** 2, features) if error < 1.0 else 0.0
    return float(below + chi2.sf(features * (1.0 + error) ** 2, features))


def _last_step(low: float, high: float, enough: Callable[[float], bool]) -> float:
    """Halve an interval, enough at its high end, down to rounding; return the high end."""
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
