"""Bottleneck and Wasserstein distances between diagrams of H0, from their finite death times, sorted descending.

All births are 0, which makes both distances one-dimensional problems on sorted lists. They are solved exactly without a
general matching, over all p rows of ``first`` (p, r) against ``second`` (m,) at once.
"""

from __future__ import annotations

import numpy as np

from nni_topo.maths.topology.checks import FloatArray


def closed_bottleneck(first: FloatArray, second: FloatArray) -> FloatArray:
    """Return the bottleneck distances (p,), in O(p (r + m)).

    With d and e the sorted lists, the distance is the minimum over k of
    ``max(max_{i <= k} |d_i - e_i|, d_{k+1} / 2, e_{k+1} / 2)``: within a threshold t exactly the bars longer than 2 t
    need a partner, the longest bars are the best partners, and matching in sorted order is optimal.
    """
    shared = min(first.shape[1], len(second))
    longest = max(first.shape[1], len(second)) + 1
    # Bars past the end have length 0: matching with them is never better than dropping the other.
    dropped = np.zeros((len(first), longest))
    dropped[:, : first.shape[1]] = first
    dropped[:, : len(second)] = np.maximum(dropped[:, : len(second)], second)
    matched = np.zeros((len(first), shared + 1))
    np.abs(first[:, :shared] - second[:shared], out=matched[:, 1:])
    np.maximum.accumulate(matched, axis=1, out=matched)
    # Column k matches the k longest bars of both and drops the rest; the longest of these costs the most.
    costs: FloatArray = np.maximum(matched, 0.5 * dropped[:, : shared + 1]).min(axis=1)
    return costs


def closed_wasserstein(first: FloatArray, second: FloatArray, order: float) -> FloatArray:
    """Return the Wasserstein distances (p,), the ground metric being the maximum norm, in O(p r m).

    The cost |d - e|^order is convex, so whichever bars are matched, matching them in sorted order is optimal. The
    longest bars aren't always matched: of the bars (100, 1) and (1), the matching leaves the longest to the diagonal.
    So the distance is the cheapest alignment of two sorted lists, where a bar is matched, or dropped at (d / 2)^order;
    its recurrence is exact.
    """
    largest = max(first.max(initial=0.0), second.max(initial=0.0))
    if largest == 0.0:
        return np.zeros(len(first))
    # Powers of numbers up to 1 don't overflow, whatever the order; the unit comes back with the root.
    first, second = first / largest, second / largest
    # The alignment's recurrence runs along its anti-diagonals: `old[i]` is the least cost of the first i bars of
    # `first` against the first ``step - 1 - i`` of `second`, `older[i]` the same a step before. The cells of an
    # anti-diagonal don't depend on each other: r + m steps on arrays, instead of r m on cells. Cells outside of the
    # table are infinite, so they never win.
    # Transposed, so that the p diagrams lie next to each other in memory: slices of cells are contiguous.
    lists, rows, columns = first.T, first.shape[1], len(second)
    drop_first, drop_second = (0.5 * lists) ** order, (0.5 * second[:, None]) ** order
    older = np.full((rows + 1, len(first)), np.inf)
    # Two empty lists cost nothing: the one cell of the first anti-diagonal.
    old = older.copy()
    old[0] = 0.0
    for step in range(1, rows + columns + 1):
        # A fresh array each step: `older` is still read where `new` is written.
        new = np.full_like(old, np.inf)
        # The last bar of `second` is dropped. Its index falls as i rises, hence the reversal.
        low, high = max(0, step - columns), min(rows, step - 1)
        np.add(old[low : high + 1], drop_second[step - high - 1 : step - low][::-1], out=new[low : high + 1])
        # Or the last bar of `first` is dropped, from cell i - 1.
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
