"""Genes of one layer: which of its weights are used, and the mutations that take some away."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float64]
_FIRST_CHUNK = 1024


class GeneLayer:
    """One target's magnitudes, shape (weights,), at least 0: their ranking, and how many weights have to stay."""

    def __init__(self, magnitudes: NDArray[np.floating[Any]], cap: float = 1.0) -> None:
        self.magnitudes = magnitudes
        self.order = magnitudes.argsort(kind="stable").astype(np.int32)
        self.ascending = magnitudes[self.order]
        self.span = float(self.ascending[-1] - self.ascending[0])
        self.size = len(magnitudes)
        # `cap` is the largest share that may go; one weight stays in any case.
        self.least = max(1, self.size - int(self.size * cap))

    def drop_weakest(self, alive: BoolArray, floor: int, rate: float) -> int:
        """Remove the weakest remaining weight and those within ``rate`` of the range above it; return the new floor."""
        # Nothing remains below the rank `floor`, so that the search for the weakest needn't start at 0.
        first = self._weakest(alive, floor)
        bound = self.ascending.dtype.type(self.ascending[first] + rate * self.span)
        stop = max(int(np.searchsorted(self.ascending, bound)), first + 1)
        if stop - first > _FIRST_CHUNK:  # reading all magnitudes in a row beats a jump per weight
            survivors = alive & (self.magnitudes >= bound)
            if np.count_nonzero(survivors) >= self.least:
                alive[:] = survivors
                return stop
        ranks = first + np.flatnonzero(alive[self.order[first:stop]])
        allowed = np.count_nonzero(alive) - self.least
        alive[self.order[ranks[:allowed]]] = False
        return stop if len(ranks) <= allowed else int(ranks[allowed])

    def drop_random(self, alive: BoolArray, rate: float, rng: np.random.Generator) -> None:
        """Remove a share of the remaining weights at random."""
        kept = int(np.count_nonzero(alive))
        count = min(max(1, int(rate * kept)), kept - self.least)
        alive[random_subset(alive, kept, count, rng)] = False

    def revive(self, alive: BoolArray) -> bool:
        """Bring the strongest removed weights back until as many stay as have to; say whether any did."""
        missing = self.least - np.count_nonzero(alive)
        if missing <= 0:
            return False
        descending = self.order[::-1]
        alive[descending[~alive[descending]][:missing]] = True
        return True

    def _weakest(self, alive: BoolArray, floor: int) -> int:
        chunk = _FIRST_CHUNK
        while True:
            hits = alive[self.order[floor : floor + chunk]]
            if hits.any():
                return floor + int(hits.argmax())
            floor += chunk
            chunk *= 2


def random_subset(alive: BoolArray, kept: int, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw ``count`` of the ``kept`` set positions, all subsets alike; indices of shape (count,)."""
    if 4 * count > kept:
        return rng.choice(np.flatnonzero(alive), count, replace=False, shuffle=False)
    # Small shares are drawn by rejection, which doesn't look at every gene.
    found = np.zeros(0, dtype=np.int64)
    while len(found) < count:
        draws = rng.integers(len(alive), size=16 + (count - len(found)) * len(alive) // kept)
        found = np.concatenate((found, draws[alive[draws]]))
        found.sort()
        # NumPy's own ``unique``, which hashes, takes several times as long.
        found = found[np.diff(found, prepend=-1) > 0]
    return rng.permutation(found)[:count] if len(found) > count else found
