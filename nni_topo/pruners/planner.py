"""How many blocks each unit keeps: decided before any is chosen, by the config_list's keys and the blocks' losses.

:class:`Planner` gives every key of NNI's config_list the meaning its documentation states, also where NNI's own
``generate_sparsity`` refuses or ignores it: thresholds inside dependency groups, global ranking of dependency groups,
minimum and maximum ratios per layer in both.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from nni_topo.errors import ConfigError
from nni_topo.maths.ties import leveled, within
from nni_topo.pruners.units import PruningUnit
from nni_topo.rules import NONE, check_fields, number, whole

_logger = logging.getLogger(__name__)

FloatArray = NDArray[np.float64]
Losses = Callable[[PruningUnit], FloatArray]
"""From a unit to its blocks' losses, ``(blocks,)``, in any order; called only to compare layers or for thresholds."""


@dataclass(kw_only=True)
class Planner:
    """Plan by the keys of the config_list: per layer, per dependency group or over global groups.

    Parameters
    ----------
    strict : bool, default=False
        Keep losses ``> sparse_threshold`` instead of NNI's ``>=``.
    tolerance : float, default=0.0
        Added to ``sparse_threshold``: with ``strict``, losses within it of the threshold count as equal and are pruned.
    round_to : int or None, default=None
        Layers keep a multiple of this number of channels, at least 1, or all of them: more than the config_list asks
        for.

    Notes
    -----
    Of ``n`` blocks ``n - int(n * sparse_ratio)`` are kept: ratios truncate as in NNI, so two rows at 0.4 lose none. A
    layer is never emptied: if a threshold exceeds all losses, one block is kept, with a warning. Losses of blocks with
    several elements are sums and have rounding errors: they are equal to each other within a relative 1e-6, and to a
    threshold within a relative 1e-10.
    Under a ``global_group_id`` blocks are pruned in ascending order of loss, each weighted by its number of elements,
    as long as the group's removed elements don't exceed ``int(elements * sparse_ratio)``; each layer's own minimum and
    maximum ratio hold.
    """

    strict: bool = False
    tolerance: float = 0.0
    round_to: int | None = None

    def __post_init__(self) -> None:
        check_fields(
            self,
            "planner",
            tolerance=number(0),
            round_to=whole(1) | NONE,
        )

    def rows(self, units: Sequence[PruningUnit], losses: Losses, model: nn.Module) -> dict[str, int]:
        """Return how many blocks, at least 1, each part of each unit keeps."""

        def row_losses(unit: PruningUnit) -> FloatArray:
            # Descending. A row is one block of every part; its loss is the largest of theirs.
            by_part = np.sort(losses(unit).reshape(unit.parts, unit.rows), axis=1)
            worth: FloatArray = by_part.max(0)[::-1]
            return worth

        counts = self.counts(units, row_losses, model)
        return {unit.name: self.round_rows(unit, counts[unit.name]) for unit in units}

    def round_rows(self, unit: PruningUnit, rows: int) -> int:
        """Return the least number of rows, at least ``rows``, that makes a multiple of ``round_to`` channels."""
        step = self.step(unit)
        return min(-(-rows // step) * step, unit.rows)

    def step(self, unit: PruningUnit) -> int:
        """Return the step of rows per part with which the unit keeps a multiple of ``round_to`` channels."""
        if self.round_to is None:
            return 1
        return self.round_to // math.gcd(self.round_to, unit.parts * unit.channels)

    def counts(self, units: Sequence[PruningUnit], losses: Losses, model: nn.Module) -> dict[str, int]:
        """Return what :meth:`rows` does, before ``round_to``; ``losses`` are of rows, ``(rows,)``, descending."""
        counts = {}
        ranked: dict[int | str, list[PruningUnit]] = defaultdict(list)
        for unit in units:
            if unit.sparse_threshold is not None:
                counts[unit.name] = self._by_threshold(unit, unit.sparse_threshold + self.tolerance, losses(unit))
            elif unit.global_group_id is not None:
                ranked[unit.global_group_id].append(unit)
            else:
                counts[unit.name] = unit.kept_rows(int(unit.rows * (unit.sparse_ratio or 0.0)))
        for group_id, group in ranked.items():
            counts.update(self._by_rank(group_id, group, losses))
        return counts

    def _by_threshold(self, unit: PruningUnit, threshold: float, losses: FloatArray) -> int:
        passing = losses > threshold if self.strict else losses >= threshold
        if unit.is_summed:
            # Within 1e-10, not the 1e-6 of ties: a user may set a threshold just above or below one loss.
            equal = within(losses, threshold)
            if self.strict:
                passing &= ~equal
            else:
                passing |= equal
        # If a maximum ratio keeps more than one block, the threshold can't empty the layer.
        if not passing.any() and unit.removable_rows[1] == unit.rows - 1:
            _logger.warning(
                "sparse_threshold %g exceeds all %d scores, the highest %g: one block is kept (%s)",
                threshold,
                unit.blocks,
                losses.max(),
                unit.name,
            )
        return unit.kept_rows(unit.rows - int(passing.sum()))

    def _by_rank(self, group_id: int | str, group: list[PruningUnit], losses: Losses) -> dict[str, int]:
        ratios = {unit.sparse_ratio for unit in group}
        if len(ratios) > 1:
            listing = ", ".join(sorted(map(str, ratios)))
            raise ConfigError(
                f"a global group must have one sparse_ratio, got {listing} (global_group_id {group_id!r})"
            )
        fewest, most = zip(*(unit.removable_rows for unit in group), strict=True)
        cost = [unit.elements * unit.parts for unit in group]
        budget = int(sum(unit.elements * unit.blocks for unit in group) * (group[0].sparse_ratio or 0.0))
        # The minimum ratios are pruned in any case; only the rest of the budget is spent by rank.
        budget -= sum(low * unit_cost for low, unit_cost in zip(fewest, cost, strict=True))
        ascending = []
        for unit, low, high in zip(group, fewest, most, strict=True):
            ascending.append(losses(unit)[::-1][low:high])
        owners = np.repeat(np.arange(len(group)), [len(unit_losses) for unit_losses in ascending])
        joined = np.concatenate(ascending)
        # Rounding mustn't decide between layers either; of equal losses the rows of the earlier layer go first.
        if any(unit.is_summed for unit in group):
            joined = leveled(joined)
        order = np.argsort(joined, kind="stable")
        # Losses are sorted, so each unit loses its lowest rows; its count is enough.
        spent = np.asarray(cost)[owners][order].cumsum()
        removed = np.bincount(owners[order][spent <= budget], minlength=len(group)).tolist()
        return {unit.name: unit.rows - low - more for unit, low, more in zip(group, fewest, removed, strict=True)}
