"""Select the kept blocks of units that share only some of their blocks, which dependency groups can't express.

A *class* is a set of blocks that are kept or pruned together, within one unit or across several. Classes that the same
units hold form a *segment*. Classes with a negative number are always kept: they form segments of their own, and a
unit's ratio applies to its other blocks. Each unit asks for a number of kept blocks. From the narrowest unit to the
widest, this number is distributed, in proportion to their lengths, over the unit's segments that no earlier unit holds.
So a wider unit takes over the shared blocks that narrower units keep, and reaches its number with its other blocks.
Where the coupling doesn't allow this, more blocks are kept, never fewer. Within a segment the classes with the highest
mean score over all of their layers are kept. Where a network shuffles and splits channels, `PruningUnit.shares` says
how many blocks of each segment are kept.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from nni_topo.maths.ties import descending
from nni_topo.network.channels.constraints import chosen_of, coupled_names
from nni_topo.pruners.units import KeptBlocks, PruningUnit

IntArray = NDArray[np.int64]


class Agreement:
    """Makes the kept blocks of units agree where the units share blocks."""

    def __init__(self, units: Sequence[PruningUnit]) -> None:
        tied = {unit.name: unit for unit in units if unit.ties}
        groups = coupled_names({name: set(unit.ties) for name, unit in tied.items()})
        self._shared = [_Shared([tied[name] for name in names]) for names in groups]
        places = {unit.name: place for place, unit in enumerate(units)}
        self.together = [[places[name] for name in names] for names in groups]
        """Indices of the units that share blocks, directly or through others."""
        self._shuffled = [unit for unit in units if unit.shares]

    def __call__(self, proposal: KeptBlocks, scores: Mapping[str, NDArray[np.generic]]) -> KeptBlocks:
        """Return the kept blocks, by score: each unit keeps as many as in ``proposal``, or more if coupled units do."""
        agreed = dict(proposal)
        for shared in self._shared:
            agreed |= shared.choose(proposal, scores)
        for unit in self._shuffled:
            agreed[unit.name] = chosen_of(unit.segments, unit.shares, descending(scores[unit.name])[::-1])
        return agreed


class _Shared:
    """Units that share blocks, directly or through others.

    ``_holds[p, s]``: how many blocks of part p, counted over all units, belong to one class of segment s.
    """

    def __init__(self, units: list[PruningUnit]) -> None:
        self._units = units
        classes = _ranks(number for unit in units for number in unit.ties)
        self._classes = np.split(classes, np.cumsum([unit.blocks for unit in units])[:-1])
        pairs = zip(units, self._classes, strict=True)
        rows = [row for unit, unit_classes in pairs for row in unit_classes.reshape(unit.parts, unit.rows)]
        holds = np.array([np.bincount(row, minlength=classes.max() + 1) for row in rows])
        stays = np.zeros(classes.max() + 1, dtype=np.bool_)
        stays[classes] = [number < 0 for unit in units for number in unit.ties]
        self._segment = _ranks(zip((column.tobytes() for column in holds.T.copy()), stays.tolist(), strict=True))
        self._stays = stays[np.unique(self._segment, return_index=True)[1]]
        _, first, self._sizes = np.unique(self._segment, return_index=True, return_counts=True)
        self._holds = holds[:, first]
        # A part has fewer classes than the parts that contain it, so it comes before them.
        self._order = np.argsort((holds > 0).sum(1), kind="stable")
        self._owner = np.repeat(np.arange(len(units)), [unit.parts for unit in units])

    def choose(self, proposal: KeptBlocks, scores: Mapping[str, NDArray[np.generic]]) -> KeptBlocks:
        """Return the kept blocks of each unit."""
        counts_by_unit = [proposal[unit.name].reshape(unit.parts, unit.rows).sum(1) for unit in self._units]
        requests = np.concatenate(counts_by_unit)
        counts = self._raise_counts(self._distribute(requests), requests)
        # A class's score is the mean over all targets that hold it, as in a dependency group.
        classes = np.concatenate(self._classes)
        targets = np.repeat([len(unit.members) for unit in self._units], [unit.blocks for unit in self._units])
        values = np.concatenate([scores[unit.name] for unit in self._units])
        order = descending(np.bincount(classes, targets * values) / np.bincount(classes, targets))
        is_kept = np.zeros(len(self._segment), dtype=np.bool_)
        for segment, count in enumerate(counts):
            is_kept[order[self._segment[order] == segment][:count]] = True
        return {unit.name: is_kept[unit_classes] for unit, unit_classes in zip(self._units, self._classes, strict=True)}

    def _distribute(self, requests: IntArray) -> IntArray:
        """Return how many classes of each segment to keep so that every part keeps its requested count, if possible."""
        counts, is_open = np.where(self._stays, self._sizes, 0), ~self._stays
        for part in self._order:
            blocks_per_class = self._holds[part]
            new = is_open & (blocks_per_class > 0)
            staying = int(blocks_per_class[self._stays] @ self._sizes[self._stays])
            blocks = int(blocks_per_class @ self._sizes)
            # The other blocks keep the same share.
            target_count = staying + math.ceil((blocks - staying) * int(requests[part]) / blocks)
            missing = max(int(target_count - blocks_per_class @ counts), 0)
            # Distribute the missing blocks in proportion to the segments' lengths.
            sizes, blocks_per_new_class = self._sizes[new], blocks_per_class[new]
            room = int(sizes @ blocks_per_new_class)
            additions, remainders = np.divmod(sizes * min(missing, room), max(room, 1))
            for place in np.argsort(-remainders, kind="stable"):
                if remainders[place] and additions @ blocks_per_new_class + blocks_per_new_class[place] <= missing:
                    additions[place] += 1
            counts[new] = additions
            is_open &= ~new
        return counts

    def _raise_counts(self, counts: IntArray, requests: IntArray) -> IntArray:
        """Keep more classes until every part has the requested count, and all parts of a unit have the same count."""
        while True:
            totals = self._holds @ counts
            most = np.zeros(len(self._units), dtype=np.int64)
            np.maximum.at(most, self._owner, np.maximum(totals, requests))
            short = np.flatnonzero(totals < most[self._owner])
            if not len(short):
                return counts
            free = np.flatnonzero((self._holds[short[0]] > 0) & (counts < self._sizes))
            counts[free[np.argmin(counts[free] / self._sizes[free])]] += 1


def _ranks(values: Iterable[Hashable]) -> IntArray:
    """Number the distinct values from 0 in the order of their first occurrence."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values])
