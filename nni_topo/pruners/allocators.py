"""Sparsity allocators: make masks from a kept set or from scores."""

from __future__ import annotations

import logging
from collections import defaultdict

import numpy as np
import torch
from nni.compression.base.compressor import Pruner
from nni.compression.base.target_space import TargetType
from nni.compression.pruning.tools.sparse_gen import (
    _expand_masks,
    _generate_align_sparsity,
    target_spaces_filter,
)
from numpy.typing import NDArray

from nni_topo.maths.ties import descending
from nni_topo.network.speedup.dependency import DependencyGroups
from nni_topo.pruners.agreement import Agreement
from nni_topo.pruners.hooks import KeptSet, Masks, Metrics, PruningContext, SparsityAllocator, unit_scores
from nni_topo.pruners.planner import FloatArray
from nni_topo.pruners.units import KeptBlocks, PruningUnit

_logger = logging.getLogger(__name__)


class ConfigAllocator(SparsityAllocator):
    """Makes masks of a kept set as it is, or of scores by rank: the context's planner says how many blocks are kept.

    Of equal scores the lower index is kept; scores of blocks with several elements are equal within a relative 1e-6.
    Units that share some of their blocks are decided together, see :mod:`nni_topo.pruners.agreement`.
    """

    def allocate(self, metrics: Metrics, context: PruningContext) -> Masks:
        """Return masks of the units' members and of the targets aligned to them (biases)."""
        scores = {unit.name: unit_scores(unit, metrics).numpy() for unit in context.units}
        if isinstance(metrics, KeptSet):
            proposal = {name: score > 0 for name, score in scores.items()}
            scores = {name: chosen.astype(np.float64) for name, chosen in proposal.items()}
        else:
            rows = context.rows(lambda unit: scores[unit.name])
            proposal = {unit.name: keep_highest(unit, scores[unit.name], rows[unit.name]) for unit in context.units}
        agreed = Agreement(context.units)(proposal, scores)
        # One row more is rounding. Under a budget all ratios are 0, and the planner warns.
        more = [
            f"{unit.name} {agreed[unit.name].sum()} of {unit.blocks} instead of {proposal[unit.name].sum()}"
            for unit in context.units
            if agreed[unit.name].sum() > proposal[unit.name].sum() + unit.parts
            and (unit.sparse_ratio or unit.sparse_threshold is not None)
        ]
        if more:
            _logger.warning(
                "layers that share channels can't have just any widths, and some channels can't be removed: "
                "more channels are kept in %s",
                "; ".join(more),
            )
        return masks_of(agreed, metrics, context)


def masks_of(kept_blocks: KeptBlocks, metrics: Metrics, context: PruningContext) -> Masks:
    """Return the masks of units' members, and of the targets aligned to them; ``kept_blocks``: of some units."""
    masks: Masks = defaultdict(dict)
    for unit in context.units:
        if unit.name not in kept_blocks:
            continue
        for module, target in unit.members:
            blocks = torch.from_numpy(kept_blocks[unit.name]).float().reshape(context.metric_shape(module, target))
            masks[module][target] = blocks.to(metrics[module][target].device)
    masks = _expand_masks(masks, context.target_spaces)
    _add_aligned(masks, context)
    return dict(masks)


def with_ties(pruner: Pruner, metrics: Metrics, masks: Masks) -> Masks:
    """Return the masks of a pruner of NNI, with masks of layers that share some channels as dependency groups say.

    Each layer keeps as many blocks as in ``masks``, or more if the coupling requires it. The package's own pruners
    select for such layers together anyway.
    """
    groups = pruner.config_list
    if not isinstance(groups, DependencyGroups):
        return masks
    context = PruningContext(pruner.bound_model, pruner._target_spaces, ties=groups.ties, shares=groups.shares)
    units, proposal, scores = list[PruningUnit](), KeptBlocks(), dict[str, FloatArray]()
    for unit in context.units:
        if not (unit.ties or unit.shares):
            continue
        # A pruner of a user's own may have metrics of other shapes, or none.
        sizes = {metrics.get(module, {}).get(target, torch.empty(0)).numel() for module, target in unit.members}
        if sizes == {unit.blocks}:
            module, target = unit.members[0]
            blocks = context.target_spaces[module][target]._scaler.shrink(masks[module][target], keepdim=True)
            units.append(unit)
            proposal[unit.name] = blocks.reshape(-1).cpu().numpy() > 0.0
            scores[unit.name] = unit_scores(unit, metrics).numpy()
    for module, targets in masks_of(Agreement(units)(proposal, scores), metrics, context).items():
        masks[module].update(targets)
    return masks


def keep_highest(unit: PruningUnit, scores: FloatArray, rows: int) -> NDArray[np.bool_]:
    """Return the kept blocks, boolean ``(blocks,)``: in each part the ``rows`` highest of ``scores`` ``(blocks,)``."""
    parts = scores.reshape(unit.parts, unit.rows)
    order = descending(parts) if unit.is_summed else np.argsort(-parts, axis=1, kind="stable")
    is_kept = np.zeros(parts.shape, dtype=np.bool_)
    np.put_along_axis(is_kept, order[:, :rows], True, axis=1)
    return is_kept.reshape(-1)


def _add_aligned(masks: Masks, context: PruningContext) -> None:
    """Add the masks of targets that are aligned to another one, as a bias is to its weight.

    As in NNI, an aligned target with its own ratio or group keeps its own mask; one with its own threshold loses what
    the threshold removes and what the other target loses.
    """
    aligned, _ = target_spaces_filter(context.target_spaces, lambda space: space.align is not None)
    followers: dict[str, dict[str, object]] = defaultdict(dict)
    for module_name, spaces in aligned.items():
        for target_name, space in spaces.items():
            source = space.align["module_name"] or module_name
            has_value = space.type is not TargetType.PARAMETER or space.target is not None
            if not has_value or space.align["target_name"] not in masks.get(source, {}):
                continue
            has_own_rule = space.sparse_ratio is not None or space.dependency_group_id is not None
            if has_own_rule and target_name in masks.get(module_name, {}):
                continue
            followers[module_name][target_name] = space
    for module_name, target_masks in _expand_masks(_generate_align_sparsity(masks, followers), followers).items():
        for target_name, mask in target_masks.items():
            previous = masks[module_name].get(target_name)
            if previous is not None:
                mask = (previous * mask).bool().float()
            masks[module_name][target_name] = mask
