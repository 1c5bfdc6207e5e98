"""Spanning trees: the zeroth persistent homology of a Vietoris-Rips complex."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from nni_topo.maths.ties import FLOOR, first_largest
from nni_topo.maths.topology.checks import BoolArray, FloatArray, as_distances, as_points
from nni_topo.maths.topology.clouds import pairwise_distances
from nni_topo.rules import checked

_CHUNK_ELEMENTS = 1 << 16


@checked()
def h0_deaths(distances: ArrayLike) -> FloatArray:
    """Compute the finite death times of H0 of a cloud.

    In the Vietoris-Rips filtration every point is born at 0, and components die along the edges of the minimum spanning
    tree; one component lives forever (H. Edelsbrunner and J. Harer, Computational Topology, 2010, chapter VII).

    Parameters
    ----------
    distances : array_like, shape (n, n)
        Finite symmetric distances, 0 on the diagonal.

    Returns
    -------
    ndarray of float64, shape (n - 1,)
        Death times in the unit of the distances, sorted descending; all are entries of `distances`.

    Examples
    --------
    >>> distances = abs(np.subtract.outer([0.0, 1.0, 5.0], [0.0, 1.0, 5.0]))
    >>> h0_deaths(distances)
    array([4., 1.])
    """
    matrix = as_distances(distances)
    return subset_deaths(matrix, np.ones((1, len(matrix)), dtype=np.bool_)).ravel()


@checked()
def distinct_points(points: ArrayLike) -> int:
    """Estimate how many different points a cloud has, if the others are noisy copies of them.

    Copies lie near each other and different points far apart, so that the death times of H0 fall into two groups. The
    estimate is the number of components between the groups, at the largest ratio of neighbouring death times.

    Parameters
    ----------
    points : array_like, shape (n, d)
        Finite points, such as a layer's filters, ``layer.weight.detach().flatten(1)``.

    Returns
    -------
    int
        From 2 to n - 1 for at least three points that aren't all equal; 2 for two different points, 1 for equal
        points.

    Notes
    -----
    A cloud without copies, or with copies of one point only, isn't recognised: in any cloud some ratio is the largest.
    Death times below 1e-12 of the longest are raised to it; of equally large ratios the one with the fewest components
    counts. In few dimensions copies with much noise look like different points. Time O(n^2 d), memory O(n^2).

    Examples
    --------
    >>> distinct_points([[0.0, 0.0], [0.1, 0.0], [4.0, 0.0], [4.0, 0.1], [0.0, 5.0]])
    3
    """
    cloud = as_points(points)
    if len(cloud) == 1:
        return 1
    deaths = h0_deaths(pairwise_distances(cloud))
    longest = float(deaths[0])
    if longest == 0.0:
        return 1
    if len(cloud) == 2:
        return 2
    ratios = -np.diff(np.log(np.maximum(deaths, FLOOR * longest)))
    return first_largest(ratios) + 2


def subset_deaths(distances: FloatArray, subsets: BoolArray) -> FloatArray:
    """Return the death times (p, k - 1), descending, of subsets (p, n) of k points each.

    Prim's algorithm runs over all subsets at once, O(p n) per step.
    """
    size = int(np.count_nonzero(subsets[0]))
    rows = max(1, _CHUNK_ELEMENTS // len(distances))
    chunks = []
    for start in range(0, len(subsets), rows):
        chunk = subsets[start : start + rows]
        # On whole rows of the distance matrix: gathering each subset's submatrix first would cost more than it saves.
        closed = np.where(chunk, 0.0, np.inf)
        to_tree = np.full(chunk.shape, np.inf)
        row = np.empty(chunk.shape)
        deaths = np.empty((size - 1, len(chunk)))
        starts = chunk.shape[1] * np.arange(len(chunk))
        newest = chunk.argmax(axis=1)
        for edge in range(size - 1):
            closed.ravel()[starts + newest] = np.inf
            np.take(distances, newest, axis=0, out=row, mode="clip")
            np.minimum(to_tree, row, out=to_tree)
            np.maximum(to_tree, closed, out=to_tree)
            newest = to_tree.argmin(axis=1)
            deaths[edge] = to_tree.ravel()[starts + newest]
        chunks.append(np.ascontiguousarray(deaths.T))
    deaths_of_subsets = np.concatenate(chunks)
    deaths_of_subsets.sort(axis=1)
    return np.ascontiguousarray(deaths_of_subsets[:, ::-1])
