"""Genes of one layer: which of its weights are used, and the mutations that take some away."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float64]


class GeneLayer:
    """One target's magnitudes, shape (weights,), at least 0, and how many of its weights have to stay."""

    def __init__(self, magnitudes: NDArray[np.floating[Any]], cap: float = 1.0) -> None:
        self.magnitudes = magnitudes
        self.span = float(magnitudes.max() - magnitudes.min())
        self.size = len(magnitudes)
        # `cap` is the largest share that may go; one weight stays in any case.
        self.least = max(1, self.size - int(self.size * cap))

    def drop_weakest(self, alive: BoolArray, rate: float) -> None:
        """Remove the weakest remaining weight and those within ``rate`` of the range above it."""
        weakest = self.magnitudes[alive].min()
        bound = self.magnitudes.dtype.type(weakest + rate * self.span)
        weak = np.flatnonzero(alive & (self.magnitudes < bound))
        if not len(weak):
            weak = np.flatnonzero(alive & (self.magnitudes == weakest))[:1]
        allowed = np.count_nonzero(alive) - self.least
        if len(weak) > allowed:
            weak = weak[self.magnitudes[weak].argsort(kind="stable")[:allowed]]
        alive[weak] = False

    def drop_random(self, alive: BoolArray, rate: float, rng: np.random.Generator) -> None:
        """Remove a share of the remaining weights at random."""
        kept = int(np.count_nonzero(alive))
        count = min(max(1, int(rate * kept)), kept - self.least)
        alive[random_subset(alive, kept, count, rng)] = False

    def revive(self, alive: BoolArray) -> None:
        """Bring the strongest removed weights back until as many stay as have to."""
        missing = self.least - np.count_nonzero(alive)
        if missing > 0:
            removed = np.flatnonzero(~alive)
            alive[removed[self.magnitudes[removed].argsort(kind="stable")[-missing:]]] = True


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
