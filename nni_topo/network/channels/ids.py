"""What channels belong to, and numbers given out to them: tied where channels go together, pinned where they stay."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from nni_topo.network.channels.reasons import Reason
from nni_topo.network.channels.rules import FIXED


@dataclasses.dataclass
class Layer:
    """A layer that makes channels."""

    name: str
    first: int  # number of its first output channel; the others follow
    channels: int
    depthwise: bool  # each output channel depends on one input channel alone, with which it stays or goes


@dataclasses.dataclass
class Own:
    """A parameter that the model uses by itself (a layer scale, a position embedding), with a number for each place."""

    first: int
    channels: int
    dim: int  # the dimension of its channels


@dataclasses.dataclass
class Blocks:
    """Channels in blocks of which each keeps equally many: by side, one array of channel numbers a block."""

    sides: list[list[np.ndarray]]  # a grouped convolution's inputs and its outputs, a norm's channels, a chunk's pieces
    may_vanish: bool  # a block may lose all of its channels, on all sides at once
    moves: bool = False  # only where channels go depends on it, as behind a chunk: see `shuffles`
    is_uneven: bool = False  # of shuffled layers, whose pieces can't be of one size each


class Numbers:
    """The numbers of a network's channels, and which of them are tied; ``FIXED`` stands for all that stay."""

    def __init__(self) -> None:
        self.count = FIXED + 1
        self.reason: Reason  # why numbers would stay that are tied to FIXED now; set before any are
        self._pairs = [np.zeros((0, 2), dtype=np.int64)]
        self._pins: list[tuple[np.ndarray, Reason]] = []
        self._columns: list[tuple[np.ndarray, Reason]] = []

    def new(self, count: int) -> int:
        """Give out so many numbers, and return the first of them."""
        self.count += count
        return self.count - count

    def pin(self, numbers: np.ndarray, reason: Reason) -> None:
        """Let numbers stay, and all that are tied to them."""
        self._pins.append((numbers, reason))

    def pin_unless_tied(self, columns: np.ndarray, reason: Reason) -> None:
        """Let the numbers of each column, (numbers, columns), stay unless all of them turn out to be tied."""
        self._columns.append((columns, reason))

    def tie(self, ones: np.ndarray | int, others: np.ndarray | int) -> None:
        """Tie numbers to others, one by one; those that are tied to ``FIXED`` stay."""
        pairs = np.stack(np.broadcast_arrays(ones, others), -1).reshape(-1, 2)
        stay = (pairs == FIXED).any(1)
        if (pairs[stay] != FIXED).any():
            self.pin(pairs[stay].max(1), self.reason)
        self._pairs.append(pairs[~stay])

    def settled(self) -> tuple[np.ndarray, np.ndarray, dict[int, Reason]]:
        """Look up representatives, int, (count,), before and after pinning; and, by those before, why they are pinned.

        The smallest number leads: that of the layer that came first.
        """
        pairs = np.concatenate(self._pairs)
        graph = coo_matrix((np.ones(len(pairs), dtype=bool), pairs.T), shape=(self.count, self.count))
        _, firsts, parts = np.unique(
            connected_components(graph, directed=False)[1], return_index=True, return_inverse=True
        )
        before, reasons = firsts[parts], dict[int, Reason]()
        apart = [(rows[:, (before[rows] != before[rows[:1]]).any(0)], reason) for rows, reason in self._columns]
        for numbers, reason in self._pins + apart:
            for root in np.unique(before[numbers]).tolist():
                reasons.setdefault(root, reason)
        return before, np.where(np.isin(before, list(reasons)), FIXED, before), reasons


def by_layer(pieces: list[np.ndarray], made: Sequence[Layer | Own], is_shuffled: bool) -> list[list[np.ndarray]]:
    """Take what each layer gives to pieces for itself where layers were shuffled."""
    if not is_shuffled:
        return [pieces]
    # Behind a shuffle every layer's first channels come first, so that each has to lose equally many of each piece.
    firsts = np.array(sorted([FIXED, *(each.first for each in made)]))
    owners = [np.searchsorted(firsts, piece, side="right") for piece in pieces]
    return [
        [piece[owner == each] for piece, owner in zip(pieces, owners, strict=True)]
        for each in np.unique(np.concatenate(owners))
    ]
