"""Euclidean distance matrices of point clouds, with a stated error."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.spatial.distance import cdist

from nni_topo.maths.topology.checks import FloatArray, as_points
from nni_topo.rules import checked

_RELATIVE_ERROR = 1e-9
_BLOCK_ROWS = 256
_LARGEST_EXPONENT = 1022


@checked()
def with_origin(points: ArrayLike) -> FloatArray:
    """Append the zero vector, which a pruned neuron becomes, to a point cloud, as its base point.

    Parameters
    ----------
    points : array_like, shape (n, features)
        Finite coordinates.

    Returns
    -------
    ndarray of float64, shape (n + 1, features)
        The points in their order, then the origin: its index is n.

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

    Notes
    -----
    The squares come from a Gram matrix of the centred cloud, in O(n^2 features). Where two points are so near each
    other that the subtraction cancels, the entry is computed again from the differences of the coordinates. An entry d
    is within 1e-9 d of the exact distance, as long as d is above 1e-150 times the largest coordinate.

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
        # Rounded differences keep the order of the points on their line; a Gram matrix doesn't.
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
        # Entries above the diagonal are mirrored, so only these are computed again for near points.
        cancelled = np.triu(block < cancellation * sizes, 1)
        np.sqrt(np.maximum(block, 0.0, out=block), out=block)
        for i in np.flatnonzero(cancelled.any(axis=1)):
            near = np.flatnonzero(cancelled[i])
            block[i, near] = cdist(cloud[start + i, None], cloud[start + near])[0]
        square = np.triu(block[:, : len(block)], 1)
        block[:, : len(block)] = square + square.T
        distances[stop:, start:stop] = distances[start:stop, stop:].T
    return np.ldexp(distances, -exponent, out=distances)
