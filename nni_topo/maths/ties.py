"""Near ties: selection among numbers that differ only by rounding.

Sums differ by a few bits between processors, libraries and numbers of threads. So in every selection by computed
numbers, numbers within a relative tolerance count as equal, and of equal numbers the lowest index wins. Numbers that
aren't computed, such as single weights, need no tolerance.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.intp]

RELATIVE = 1e-6
FLOOR = 1e-12
AT_BOUND = 1e-10


def first_largest(values: ArrayLike, scale: float = 0.0) -> int:
    """Return the lowest index of values (n,), none of them NaN, that counts as the largest."""
    # The tolerance is 1e-6 of the largest, or 1e-12 of `scale`, the size of the numbers that the values were computed
    # from, so that rounding doesn't decide between tiny values, either. ``-inf`` is never chosen before a finite value.
    numbers = np.asarray(values)
    top = numbers.max()
    return int((numbers >= top - max(RELATIVE * abs(top), FLOOR * scale)).argmax())


def first_smallest(values: ArrayLike, scale: float = 0.0) -> int:
    """Return the lowest index whose value counts as the smallest; parameters are those of :func:`first_largest`."""
    return first_largest(np.negative(values), scale)


def first_largest_along(values: Tensor, dim: int) -> Tensor:
    """Apply :func:`first_largest` along a dimension of a tensor of values of at least 0, on its device."""
    top = values.amax(dim, keepdim=True)
    return (values >= top * (1.0 - RELATIVE)).byte().argmax(dim)


def descending(values: ArrayLike, scale: float = 0.0) -> IntArray:
    """Return the order of finite values, (n,) or (rows, n) row by row, from the largest down; near ties by index."""
    return np.argsort(-leveled(values, scale), axis=-1, kind="stable")


def leveled(values: ArrayLike, scale: float = 0.0) -> FloatArray:
    """Return finite values, (n,) or (rows, n) row by row, after values that count as equal are made equal."""
    # From the largest on, each value replaces those that lie below it by at most 1e-6 of it, or by 1e-12 of `scale` or
    # of the largest absolute value. Values without near ties are returned unchanged.
    numbers = np.array(values, dtype=np.float64)
    if not numbers.size:
        return numbers
    for row in numbers.reshape(-1, numbers.shape[-1]):
        order = np.argsort(-row, kind="stable")
        falling = row[order]
        largest = max(scale, abs(float(falling[0])), abs(float(falling[-1])))
        reach = np.maximum(RELATIVE * np.abs(falling), FLOOR * largest)
        if not (falling[:-1] - falling[1:] <= reach[:-1]).any():
            continue
        # The end of the run of equal values that each value would start; then from the largest on, one run after the
        # other.
        ends = np.searchsorted(-falling, reach - falling, side="right").tolist()
        start, values_of_row = 0, falling.tolist()
        while start < len(values_of_row):
            end = max(ends[start], start + 1)
            if end > start + 1:
                falling[start:end] = values_of_row[start]
            start = end
        row[order] = falling
    return numbers


def within(values: ArrayLike, bound: float) -> NDArray[np.bool_]:
    """Tell which values equal a bound to 1e-10 of it: a user may set a bound just above or below a value."""
    return np.abs(np.asarray(values, dtype=np.float64) - bound) <= AT_BOUND * abs(bound)


class Levels:
    """Levels values of successive calls: each becomes the earlier value that it counts as equal to."""

    def __init__(self) -> None:
        self._levels: list[float] = []

    def __call__(self, values: Iterable[float]) -> list[float]:
        """Return finite values, leveled among themselves and with all earlier ones."""
        settled = []
        for value in map(float, values):
            place = bisect_left(self._levels, value)
            neighbours = self._levels[max(place - 1, 0) : place + 1]
            equal = [level for level in neighbours if abs(level - value) <= RELATIVE * max(abs(level), abs(value))]
            if equal:
                settled.append(equal[0])
            else:
                self._levels.insert(place, value)
                settled.append(value)
        return settled
