"""Sparsity allocators: from scores to masks.

:class:`ConfigAllocator` gives every key of NNI's config_list the meaning its documentation states, also where NNI's own
``generate_sparsity`` refuses or ignores it: thresholds inside dependency groups, global ranking of dependency groups,
minimum and maximum ratios per layer in both.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Literal

import torch
from nni.compression.base.target_space import TargetType
from nni.compression.pruning.tools.sparse_gen import (
    _expand_masks,
    _generate_align_sparsity,
    generate_sparsity,
    target_spaces_filter,
)
from torch import Tensor

from nni_topo.errors import ConfigError
from nni_topo.maths.ties import leveled, within
from nni_topo.pruners.hooks import Masks, Metrics, PruningContext, SparsityAllocator, unit_scores
from nni_topo.pruners.transposed import loses_outputs, output_mask
from nni_topo.pruners.units import PruningUnit


class NNIAllocator(SparsityAllocator):
    """NNI's own ``generate_sparsity``, unchanged: the reference to compare with."""

    def allocate(self, metrics: Metrics, context: PruningContext) -> Masks:
        """Return what NNI's function returns for these metrics."""
        return dict(generate_sparsity(metrics, context.target_spaces))


class ConfigAllocator(SparsityAllocator):
    """Allocate by the keys of the config_list, per layer, per dependency group or over global groups.

    Parameters
    ----------
    normalization : {"none", "mean"}, default="none"
        Scale of the scores when layers are ranked together under a ``global_group_id``: as they are, or divided by
        the layer's mean absolute score, for metrics whose scale differs between layers.
    strict : bool, default=False
        Keep scores ``> sparse_threshold`` instead of NNI's ``>=``.
    on_empty : {"raise", "keep"}, default="raise"
        What happens when a threshold would leave a layer without any block: an error that names it, or the
        highest-scoring block stays.
    tolerance : float, default=0.0
        Added to ``sparse_threshold``: with ``strict``, scores within it of the threshold count as equal and go.
    round_to : int or None, default=None
        Layers keep a multiple of so many channels, at least 1, or all of them: more stay than the config_list asks for.
    exact : bool, default=False
        Within a layer the highest scores stay as they are, also of those that count as equal: for metrics whose scores
        hold a ranking in which near ties are settled.

    Notes
    -----
    Of ``n`` blocks ``n - int(n * sparse_ratio)`` stay: ratios truncate as in NNI, so two rows at 0.4 lose none. Of
    equal scores the lower index stays. Blocks of several elements have scores that were summed: those that differ by no
    more than 1e-6 of their size are equal; to a threshold they are equal within 1e-10 of it. A layer is never emptied.
    Under a ``global_group_id`` blocks go in ascending order of score, each weighted by its number of elements, as long
    as the group's removed elements don't exceed ``int(elements * sparse_ratio)``; each layer's own minimum and maximum
    ratio hold.
    """

    def __init__(
        self,
        *,
        normalization: Literal["none", "mean"] = "none",
        strict: bool = False,
        on_empty: Literal["raise", "keep"] = "raise",
        tolerance: float = 0.0,
        round_to: int | None = None,
        exact: bool = False,
    ) -> None:
        if normalization not in ("none", "mean"):
            raise ConfigError(f"normalization must be 'none' or 'mean', got {normalization!r} (ConfigAllocator)")
        if on_empty not in ("raise", "keep"):
            raise ConfigError(f"on_empty must be 'raise' or 'keep', got {on_empty!r} (ConfigAllocator)")
        self.normalization = normalization
        self.strict = strict
        self.on_empty = on_empty
        self.tolerance = tolerance
        self.round_to = checked_round_to(round_to)
        self.exact = exact

    def allocate(self, metrics: Metrics, context: PruningContext) -> Masks:
        """Return masks of the units' members and of the targets aligned to them (biases)."""
        scores = {unit.name: unit_scores(unit, metrics) for unit in context.units}
        rows = self.rounded_rows(context, {unit.name: profile(unit, scores[unit.name]) for unit in context.units})
        masks: Masks = defaultdict(dict)
        for unit in context.units:
            kept = keep_highest(unit, scores[unit.name], rows[unit.name], exact=self.exact)
            for module_name, target_name in unit.members:
                metric = metrics[module_name][target_name]
                masks[module_name][target_name] = kept.reshape(metric.shape).to(metric.device, torch.float32)
        masks = _expand_masks(masks, context.target_spaces)
        _add_aligned(masks, context)
        return dict(masks)

    def rounded_rows(self, context: PruningContext, profiles: dict[str, Tensor]) -> dict[str, int]:
        """Return what :meth:`kept_rows` says, rounded up as ``round_to`` asks for."""
        rows = self.kept_rows(context, profiles)
        return {unit.name: self.rounded(unit, rows[unit.name]) for unit in context.units}

    def rounded(self, unit: PruningUnit, rows: int) -> int:
        """Return the least number of rows, from ``rows`` on, that makes a multiple of ``round_to`` channels."""
        # ``rows`` of each part stay: ``rows * parts`` is a multiple of ``round_to`` if ``rows`` is one of ``step``.
        step = 1 if self.round_to is None else self.round_to // math.gcd(self.round_to, unit.parts)
        return min(-(-rows // step) * step, unit.rows)

    def kept_rows(self, context: PruningContext, profiles: dict[str, Tensor]) -> dict[str, int]:
        """Return how many blocks each part of each unit keeps.

        Parameters
        ----------
        context : PruningContext
            Holds the units.
        profiles : dict of str to torch.Tensor
            Per unit name the scores of its rows, shape ``(rows,)``, descending; see :func:`profile`.

        Returns
        -------
        dict of str to int
            Unit name to a count in [1, rows].

        Raises
        ------
        ConfigError
            If a threshold would empty a unit (unless ``on_empty="keep"``), or if the units of a global group
            disagree in ``sparse_ratio``.
        """
        kept = {}
        ranked: dict[int | str, list[PruningUnit]] = defaultdict(list)
        for unit in context.units:
            if unit.sparse_threshold is not None:
                kept[unit.name] = self._rows_by_threshold(unit, profiles[unit.name])
            elif unit.global_group_id is not None:
                ranked[unit.global_group_id].append(unit)
            else:
                kept[unit.name] = _rows_by_ratio(unit)
        for group_id, group in ranked.items():
            kept.update(self._rows_by_rank(group_id, group, profiles))
        return kept

    def _rows_by_threshold(self, unit: PruningUnit, scores: Tensor) -> int:
        threshold = float(unit.sparse_threshold or 0.0) + self.tolerance
        count = int(self._passing(unit, scores, threshold).sum())
        fewest, most = removable_rows(unit)
        # Where a maximum ratio keeps more than the one block that always stays, nothing would be emptied: no error.
        if count == 0 and most == unit.rows - 1 and self.on_empty == "raise":
            rule = "lie below" if self.strict else "not exceed"
            highest = f"{float(scores.max()):.6g}"
            raise ConfigError(
                f"sparse_threshold must {rule} a layer's highest score, got {threshold} over {highest}: "
                f"all {unit.blocks} blocks would go ({unit.name})"
            )
        return unit.rows - min(max(unit.rows - count, fewest), most)

    def _passing(self, unit: PruningUnit, scores: Tensor, threshold: float) -> Tensor:
        passing = scores > threshold if self.strict else scores >= threshold
        if not _is_summed(unit):
            return passing
        # A threshold may be set just beside a score, with care: 1e-10 of it, not the 1e-6 of ties between scores.
        equal = torch.from_numpy(within(scores.cpu().numpy(), threshold)).to(scores.device)
        return passing & ~equal if self.strict else passing | equal

    def _rows_by_rank(
        self, group_id: int | str, group: list[PruningUnit], profiles: dict[str, Tensor]
    ) -> dict[str, int]:
        ratios = {unit.sparse_ratio for unit in group}
        if len(ratios) > 1:
            found = ", ".join(sorted(map(str, ratios)))
            raise ConfigError(f"a global group must have one sparse_ratio, got {found} (global_group_id {group_id!r})")
        ratio = group[0].sparse_ratio or 0.0
        bounds = {unit.name: removable_rows(unit) for unit in group}
        cost = {unit.name: unit.elements * unit.parts for unit in group}
        budget = int(sum(unit.elements * unit.blocks for unit in group) * ratio)
        # What the minimum ratios ask for goes in any case; only what is left of the budget is spent by rank.
        budget -= sum(bounds[unit.name][0] * cost[unit.name] for unit in group)
        scores, costs, owners = [], [], []
        for index, unit in enumerate(group):
            fewest, most = bounds[unit.name]
            ascending = self._comparable(profiles[unit.name]).flip(0)[fewest:most]
            scores.append(ascending)
            costs.append(torch.full((len(ascending),), cost[unit.name]))
            owners.append(torch.full((len(ascending),), index))
        joined = torch.cat(scores)
        # Between layers, too, rounding mustn't decide; of equal scores those of the earlier layer go first.
        if any(_is_summed(unit) for unit in group):
            joined = _leveled(joined)
        order = joined.argsort(stable=True)
        spent = torch.cat(costs)[order].cumsum(0)
        # Sums rise, so a first stretch of the order goes: within each unit its lowest, of which a count says enough.
        removed = torch.cat(owners)[order][spent <= budget].bincount(minlength=len(group))
        return {unit.name: unit.rows - bounds[unit.name][0] - int(removed[index]) for index, unit in enumerate(group)}

    def _comparable(self, scores: Tensor) -> Tensor:
        if self.normalization == "none":
            return scores
        mean = scores.abs().mean()
        return scores / mean if mean > 0 else scores


def checked_round_to(round_to: int | None) -> int | None:
    """Return ``round_to``, or raise :class:`~nni_topo.errors.ConfigError`."""
    if round_to is not None and (isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1):
        raise ConfigError(f"round_to must be a positive integer or None, got {round_to!r} (round_to)")
    return round_to


def profile(unit: PruningUnit, scores: Tensor) -> Tensor:
    """Return the scores of a unit's rows: each part sorted, the highest of the parts counts.

    Parameters
    ----------
    unit : PruningUnit
        The unit.
    scores : torch.Tensor
        Shape ``(blocks,)``.

    Returns
    -------
    torch.Tensor
        Shape ``(rows,)``, descending.
    """
    # A row takes one block of every part with it, so it is worth as much as the best of them.
    return scores.reshape(unit.parts, unit.rows).sort(dim=1, descending=True).values.amax(0)


def keep_highest(unit: PruningUnit, scores: Tensor, rows: int, *, exact: bool = False) -> Tensor:
    """Return which blocks stay when each part keeps its ``rows`` highest scores.

    Parameters
    ----------
    unit : PruningUnit
        The unit.
    scores : torch.Tensor
        Shape ``(blocks,)``. Of scores that count as equal the lower index stays.
    rows : int
        Blocks to keep per part, in [1, unit.rows].
    exact : bool, default=False
        Whether scores that differ at all are different.

    Returns
    -------
    torch.Tensor
        Shape ``(blocks,)``, boolean.
    """
    parts = scores.detach().cpu().reshape(unit.parts, unit.rows)
    settled = _leveled(parts) if _is_summed(unit) and not exact else parts
    ranking = settled.argsort(dim=1, descending=True, stable=True)
    kept = torch.zeros(unit.parts, unit.rows, dtype=torch.bool)
    kept.scatter_(1, ranking[:, :rows], True)
    return kept.reshape(-1)


def _is_summed(unit: PruningUnit) -> bool:
    """Say whether a block's score was computed from several elements; a single weight's needs no tolerance."""
    return unit.elements > 1


def _leveled(scores: Tensor) -> Tensor:
    return torch.from_numpy(leveled(scores.cpu().numpy())).to(scores.device)


def removable_rows(unit: PruningUnit) -> tuple[int, int]:
    """Return the fewest and the most rows that may go under a unit's minimum and maximum ratio."""
    most = min(int(unit.rows * unit.max_sparse_ratio), unit.rows - 1)
    return min(int(unit.rows * unit.min_sparse_ratio), most), most


def _rows_by_ratio(unit: PruningUnit) -> int:
    ratio = min(max(unit.sparse_ratio or 0.0, unit.min_sparse_ratio), unit.max_sparse_ratio)
    return unit.rows - min(int(unit.rows * ratio), unit.rows - 1)


def _add_aligned(masks: Masks, context: PruningContext) -> None:
    """Add the masks of targets that follow another one, such as a bias its weight."""
    aligned, _ = target_spaces_filter(context.target_spaces, lambda space: space.align is not None)
    followers: dict[str, dict[str, object]] = defaultdict(dict)
    for module_name, spaces in aligned.items():
        for target_name, space in spaces.items():
            source = space.align["module_name"] or module_name
            has_value = space.type is not TargetType.PARAMETER or space.target is not None
            if not has_value or space.align["target_name"] not in masks.get(source, {}):
                continue
            weight = context.target_spaces[source][space.align["target_name"]]
            # NNI's alignment keeps one dimension of the source, but with groups the output channels lie in two.
            if loses_outputs(weight):
                kept = masks[source][space.align["target_name"]]
                masks[module_name][target_name] = output_mask(kept, weight._wrapper.module)
            else:
                followers[module_name][target_name] = space
    for module_name, found in _expand_masks(_generate_align_sparsity(masks, followers), followers).items():
        masks[module_name].update(found)
