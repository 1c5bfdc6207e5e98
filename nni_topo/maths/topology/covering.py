"""How well a subset covers its cloud, in the sense of the stability theorem.

The bottleneck distance between the Vietoris-Rips diagrams of a cloud and a subset is at most twice their
Hausdorff distance, in every degree [1]_: a subset that leaves no point far away keeps the whole topology. Taking the
farthest point each time covers a cloud at most twice as badly as the best choice [2]_.

References
----------
.. [1] F. Chazal, V. de Silva and S. Oudot, Persistence stability for geometric complexes, Geometriae Dedicata 173,
   2014, theorem 5.2.
.. [2] T. F. Gonzalez, Clustering to minimize the maximum intercluster distance, Theoretical Computer Science 38, 1985.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from nni_topo.maths.ties import first_largest
from nni_topo.maths.topology.checks import (
    BoolArray,
    FloatArray,
    IntArray,
    as_distances,
    as_index,
    as_subsets,
)
from nni_topo.rules import checked


@checked()
def hausdorff_to_subset(distances: ArrayLike, subsets: ArrayLike, base: int | None = None) -> FloatArray:
    """Compute the Hausdorff distance between a cloud and each of many subsets of it.

    Parameters
    ----------
    distances : array_like, shape (n, n)
        Finite symmetric distances, 0 on the diagonal.
    subsets : array_like of bool, shape (p, n)
        The kept points of each subset, at least one.
    base : int, optional
        Index of a point that every subset keeps, whatever its mask says: the origin of `with_origin`.

    Returns
    -------
    ndarray of float64, shape (p,)
        The largest distance from any point to the nearest kept one, in the unit of the distances.

    Examples
    --------
    >>> line = abs(np.subtract.outer([0.0, 1.0, 5.0], [0.0, 1.0, 5.0]))
    >>> hausdorff_to_subset(line, [[True, False, True], [True, True, False]])
    array([1., 4.])
    """
    matrix = as_distances(distances)
    return covers(matrix, as_subsets(subsets, len(matrix), base))[0]


def covers(distances: FloatArray, subsets: BoolArray) -> tuple[FloatArray, FloatArray]:
    """Return the maximum and the mean, each (p,), of the distances from all points to the nearest kept ones."""
    largest, mean = np.empty(len(subsets)), np.empty(len(subsets))
    for place, subset in enumerate(subsets):
        nearest = distances[subset].min(axis=0)
        largest[place], mean[place] = nearest.max(), nearest.mean()
    return largest, mean


@checked()
def farthest_point_order(distances: ArrayLike, start: int = 0) -> tuple[IntArray, FloatArray]:
    """Order a cloud's points so that each is the farthest from those before it.

    Parameters
    ----------
    distances : array_like, shape (n, n)
        Finite symmetric distances, 0 on the diagonal.
    start : int, default 0
        Index of the first point, such as the origin of `with_origin`.

    Returns
    -------
    order : ndarray of int, shape (n,)
        All points, from the start on; among equally far points, to 1e-6 of their distance, the lowest index first.
    radii : ndarray of float64, shape (n,)
        ``radii[i]`` is the Hausdorff distance between the cloud and ``order[: i + 1]``: never increasing,
        0 at the end.

    Examples
    --------
    >>> order, radii = farthest_point_order(abs(np.subtract.outer([0.0, 1.0, 5.0], [0.0, 1.0, 5.0])))
    >>> order, radii
    (array([0, 2, 1]), array([5., 1., 0.]))
    """
    matrix = as_distances(distances)
    count, largest = len(matrix), float(matrix.max())
    order, radii = np.empty(count, dtype=np.intp), np.empty(count)
    nearest = np.full(count, np.inf)
    newest = as_index(start, count, "start")
    # Chosen points are at -inf, so that their duplicates still come before them.
    for step in range(count):
        order[step] = newest
        np.minimum(nearest, matrix[newest], out=nearest)
        nearest[newest] = -np.inf
        # After the last point all are at -inf.
        radii[step] = max(nearest.max(), 0.0)
        # Relative to the cloud's diameter: gaps that are only rounding decide nothing.
        newest = first_largest(nearest, largest)
    return order, radii
