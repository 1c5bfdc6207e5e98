"""Inner loops that numba compiles where it is installed (the extra ``fast``).

They are plain Python functions: without numba they never run, `spanning`, `matching` and `covering` do the
same with array operations.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nni_topo.errors import ConfigError
from nni_topo.maths.topology.checks import BoolArray, FloatArray


@functools.cache
def numba_available() -> bool:
    """Say whether numba can be imported."""
    try:
        import numba  # noqa: F401
    except ImportError:
        return False
    return True


def use_compiled(compiled: bool | None) -> bool:
    """Decide whether the compiled kernels run: as asked, by default where numba is installed."""
    if compiled and not numba_available():
        raise ConfigError('compiled=True needs numba, got none installed; install "nni-topo[fast]"')
    return numba_available() if compiled is None else compiled


@functools.cache
def compiled(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a kernel at its first use, and keep the machine code on disk."""
    import numba

    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(kernel, cache=True, **options)  # type: ignore[no-any-return]
    except RuntimeError:  # no directory to cache in
        return numba.njit(kernel, **options)  # type: ignore[no-any-return]


def prim(distances: FloatArray, subsets: BoolArray, deaths: FloatArray) -> None:
    """Write the tree edges of subsets (p, n) of k points each into deaths (p, k - 1), in Prim's order."""
    open_points = np.empty(deaths.shape[1] + 1, np.int64)
    to_tree = np.empty(deaths.shape[1] + 1)
    for q in range(len(subsets)):
        count = 0
        for i in range(len(distances)):
            if subsets[q, i]:
                open_points[count] = i
                to_tree[count] = np.inf
                count += 1
        count -= 1
        newest = open_points[count]
        for edge in range(count):
            nearest = 0
            best = np.inf
            for i in range(count - edge):
                length = min(distances[newest, open_points[i]], to_tree[i])
                to_tree[i] = length
                if length < best:
                    best = length
                    nearest = i
            deaths[q, edge] = best
            newest = open_points[nearest]
            open_points[nearest] = open_points[count - edge - 1]
            to_tree[nearest] = to_tree[count - edge - 1]


def wasserstein(first: FloatArray, second: FloatArray, order: float, costs: FloatArray) -> None:
    """Write into costs (p,) the least sums of powers that align first (p, r) with second (m,), both descending."""
    best = np.empty(len(second) + 1)
    dropped = (0.5 * second) ** order
    for q in range(len(first)):
        best[0] = 0.0
        for j in range(len(second)):
            best[j + 1] = best[j] + dropped[j]
        for i in range(first.shape[1]):
            length = first[q, i]
            drop = (0.5 * length) ** order
            diagonal = best[0]
            best[0] += drop
            for j in range(len(second)):
                gap = abs(length - second[j])
                match = diagonal + (gap * gap if order == 2.0 else gap**order)
                diagonal = best[j + 1]
                best[j + 1] = min(match, diagonal + drop, best[j] + dropped[j])
        costs[q] = best[len(second)]


def covered(gaps: FloatArray, halves: FloatArray, threshold: float) -> bool:
    """Say whether all rows above a threshold find distinct columns of gaps (n, m) within it, by augmenting paths."""
    column_of = np.full(gaps.shape[0], -1)
    row_of = np.full(gaps.shape[1], -1)
    seen_from = np.full(gaps.shape[1], -1)
    reached_from = np.full(gaps.shape[1], -1)
    queue = np.empty(gaps.shape[0], np.int64)
    for start in range(gaps.shape[0]):
        if halves[start] <= threshold:
            continue
        queue[0] = start
        head, tail, free = 0, 1, -1
        while head < tail and free < 0:
            row = queue[head]
            head += 1
            for column in range(gaps.shape[1]):
                if gaps[row, column] <= threshold and seen_from[column] != start:
                    seen_from[column] = start
                    reached_from[column] = row
                    if row_of[column] < 0:
                        free = column
                        break
                    queue[tail] = row_of[column]
                    tail += 1
        if free < 0:
            return False
        while free >= 0:
            row = reached_from[free]
            row_of[free] = row
            column_of[row], free = free, column_of[row]
    return True


def nearest_kept(distances: FloatArray, neighbours: NDArray[np.int32], subsets: BoolArray, nearest: FloatArray) -> None:
    """Write into nearest (p, n) each point's distance to the nearest point of each subset (p, n), none empty."""
    for q in range(len(subsets)):
        for i in range(len(distances)):
            rank = 0
            while not subsets[q, neighbours[i, rank]]:
                rank += 1
            nearest[q, i] = distances[i, neighbours[i, rank]]
