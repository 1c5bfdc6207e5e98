"""Bottleneck and Wasserstein distances between persistence diagrams.

Diagrams of H0 have all births at 0, which makes both distances one-dimensional problems on sorted lists of
death times; they are solved exactly without a general matching.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from nni_topo.errors import DataError
from nni_topo.maths.topology.checks import ORDER, FloatArray, as_deaths
from nni_topo.rules import checked


@checked()
def h0_bottleneck(deaths_a: ArrayLike, deaths_b: ArrayLike) -> FloatArray | float:
    """Compute the bottleneck distance of H0 diagrams from their finite death times.

    Parameters
    ----------
    deaths_a : array_like, shape (r,) or (p, r)
        Death times of one diagram or of p diagrams, sorted descending.
    deaths_b : array_like, shape (m,)
        Death times of the diagram to compare with, sorted descending; m may differ from r.

    Returns
    -------
    float or ndarray of float64, shape (p,)
        Distances in the unit of the death times.

    Raises
    ------
    DataError
        If death times are negative, not finite or not sorted descending.

    Notes
    -----
    With d and e the sorted lists, the distance is the minimum over k of
    ``max(max_{i <= k} |d_i - e_i|, d_{k+1} / 2, e_{k+1} / 2)``: within a threshold t exactly the bars longer
    than 2 t need a partner, the longest bars are the best partners, and matching in sorted order is optimal.
    Cost O(p (r + m)).

    Examples
    --------
    >>> h0_bottleneck([3.0, 1.0], [3.5])
    0.5
    """
    first, second = np.atleast_2d(as_deaths(deaths_a, "deaths_a")), _one_list(deaths_b)
    return _like(deaths_a, closed_bottleneck(first, second))


def closed_bottleneck(first: FloatArray, second: FloatArray) -> FloatArray:
    """Do the work of `h0_bottleneck` on checked lists of shape (p, r) and (m,)."""
    shared = min(first.shape[1], len(second))
    longest = max(first.shape[1], len(second)) + 1
    # Bars past the end have length 0: matching with them is never better than dropping the other.
    dropped = np.zeros((len(first), longest))
    dropped[:, : first.shape[1]] = first
    dropped[:, : len(second)] = np.maximum(dropped[:, : len(second)], second)
    matched = np.zeros((len(first), shared + 1))
    np.abs(first[:, :shared] - second[:shared], out=matched[:, 1:])
    np.maximum.accumulate(matched, axis=1, out=matched)
    # Column k matches the k longest bars of both and drops the rest, of which the longest costs the most.
    costs: FloatArray = np.maximum(matched, 0.5 * dropped[:, : shared + 1]).min(axis=1)
    return costs


@checked(order=ORDER)
def h0_wasserstein(deaths_a: ArrayLike, deaths_b: ArrayLike, order: float = 2.0) -> FloatArray | float:
    """Compute the Wasserstein distance of H0 diagrams from their finite death times.

    Parameters
    ----------
    deaths_a : array_like, shape (r,) or (p, r)
        Death times of one diagram or of p diagrams, sorted descending.
    deaths_b : array_like, shape (m,)
        Death times of the diagram to compare with, sorted descending; m may differ from r.
    order : float, default 2
        Exponent q in [1, inf); the ground metric is the maximum norm, so a bar of length d lies d / 2
        from the diagonal.

    Returns
    -------
    float or ndarray of float64, shape (p,)
        Distances in the unit of the death times.

    Raises
    ------
    DataError
        If death times are negative, not finite or not sorted descending.
    ConfigError
        If the order isn't in [1, inf).

    Notes
    -----
    The cost |d - e|^q is convex, so whichever bars are matched, matching them in sorted order is optimal.
    Which bars those are isn't a matter of length alone: of the bars (100, 1) and (1), the matching leaves
    the longest to the diagonal. What remains is the cheapest alignment of two sorted lists, where a bar
    is matched or dropped at (d / 2)^q; the recurrence for it is exact and costs O(p r m).

    Examples
    --------
    >>> h0_wasserstein([4.0, 1.0], [1.0], order=1)
    2.0
    """
    first, second = np.atleast_2d(as_deaths(deaths_a, "deaths_a")), _one_list(deaths_b)
    return _like(deaths_a, closed_wasserstein(first, second, order))


def closed_wasserstein(first: FloatArray, second: FloatArray, order: float) -> FloatArray:
    """Do the work of `h0_wasserstein` on checked lists of shape (p, r) and (m,), over all p rows at once."""
    largest = max(first.max(initial=0.0), second.max(initial=0.0))
    if largest == 0.0:
        return np.zeros(len(first))
    # Powers of numbers up to 1 don't overflow, whatever the order; the unit comes back with the root.
    first, second = first / largest, second / largest
    # The alignment's recurrence runs along its anti-diagonals: `old[i]` is the least cost of the first i bars of
    # `first` against the first ``step - 1 - i`` of `second`, `older[i]` that of a step before. The cells of an
    # anti-diagonal don't depend on each other: r + m steps on arrays, instead of r m on cells. Cells outside of the
    # table are infinite, so they never win.
    # Turned, so that the p diagrams lie next to each other in memory: slices of cells are contiguous.
    lists, rows, columns = first.T, first.shape[1], len(second)
    drop_first, drop_second = (0.5 * lists) ** order, (0.5 * second[:, None]) ** order
    older = np.full((rows + 1, len(first)), np.inf)
    # Nothing aligned with nothing costs nothing: the one cell of the first anti-diagonal.
    old = older.copy()
    old[0] = 0.0
    for step in range(1, rows + columns + 1):
        # A fresh array each step: `older` is still read where `new` is written.
        new = np.full_like(old, np.inf)
        # The last bar of `second` is dropped. Its index falls as i rises, hence the reversal.
        low, high = max(0, step - columns), min(rows, step - 1)
        np.add(old[low : high + 1], drop_second[step - high - 1 : step - low][::-1], out=new[low : high + 1])
        # Or the last bar of `first` is, from the cell before in i.
        low, high = max(1, step - columns), min(rows, step)
        np.minimum(new[low : high + 1], old[low - 1 : high] + drop_first[low - 1 : high], out=new[low : high + 1])
        # Or the two are matched: both indices are one less, so the cell lies two anti-diagonals back.
        high = min(rows, step - 1)
        # Sums of terms that are all at least 0: nothing cancels, so that equal diagrams are at a distance of exactly 0.
        gaps = np.abs(lists[low - 1 : high] - second[step - high - 1 : step - low, None][::-1])
        matched = older[low - 1 : high] + gaps**order
        np.minimum(new[low : high + 1], matched, out=new[low : high + 1])
        older, old = old, new
    return np.asarray(largest * old[rows] ** (1.0 / order))


def _one_list(deaths: ArrayLike) -> FloatArray:
    times = as_deaths(deaths, "deaths_b")
    if times.ndim != 1:
        raise DataError(f"deaths_b must be one list of death times, got shape {times.shape}")
    return times


def _like(given: ArrayLike, distances: FloatArray) -> FloatArray | float:
    return float(distances[0]) if np.ndim(given) == 1 else distances
