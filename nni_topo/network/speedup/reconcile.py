"""Check and complete masks, and make masks of coupled layers agree by keeping more channels, never fewer."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable, Mapping
from functools import cache, partial

import numpy as np
import torch

from nni_topo.context import leaving_out
from nni_topo.errors import ConfigError, SpeedupError, unknown_name
from nni_topo.maths.ties import descending
from nni_topo.network.channels import reasons
from nni_topo.network.channels.constraints import stays_in_place
from nni_topo.network.channels.flow import ChannelFlow, why_read_beside
from nni_topo.network.channels.ids import FIXED, Blocks
from nni_topo.network.channels.reasons import Reason, Reasons
from nni_topo.network.layers.kinds import channel_dimension, kept_channels, row_names, spread, weight_name, weight_of
from nni_topo.network.runtime.arguments import MASKS

_logger = logging.getLogger(__name__)

MasksLike = Mapping[str, Mapping[str, torch.Tensor | None]]
"""Masks as users pass them; `check_masks` makes `FullMasks` of these."""

FullMasks = dict[str, dict[str, torch.Tensor]]

KeptIndices = dict[str, list[torch.Tensor]]
"""By module that returns one tensor, the kept indices of each dimension."""


def check_masks(model: torch.nn.Module, masks: MasksLike) -> FullMasks:
    """Check masks, expand them to their parameters' shapes, types and devices, and add masks of biases."""
    MASKS.check("masks", masks, "masks")
    modules = dict(model.named_modules(remove_duplicate=False))
    # Masks are stored under a module's first name.
    first_names = {id(module): name for name, module in model.named_modules()}
    full: FullMasks = {}
    for name, targets in masks.items():
        if name not in modules:
            raise unknown_name("the module of a mask", name, modules, "masks")
        checked = dict[str, torch.Tensor]()
        for target, mask in targets.items():
            if mask is not None:
                checked[target] = _check_mask(modules[name], target, mask, f"{name}.{target}")
        # If all weights of an output channel are masked, mask its bias and other parameters by row, too.
        is_kept = kept_channels(modules[name], checked)
        for row in row_names(modules[name]):
            if is_kept is not None and isinstance(rows := getattr(modules[name], row, None), torch.Tensor):
                mask = checked.get(row, torch.ones_like(rows).detach())
                checked[row] = mask * is_kept.to(mask).view(-1, *[1] * (rows.dim() - 1))
        first_masks = full.setdefault(first_names[id(modules[name])], checked)
        if any(not torch.equal(first_masks.get(target, mask), mask) for target, mask in checked.items()):
            raise ConfigError(f"a module with two names must have one mask, got two that differ ({name})")
    return {name: targets for name, targets in full.items() if targets}


def _check_mask(module: torch.nn.Module, target: str, mask: torch.Tensor, place: str) -> torch.Tensor:
    """Check one mask and expand it."""
    parameter = dict(module.named_parameters(recurse=False)).get(target)
    if parameter is None:
        names = ", ".join(name for name, _ in module.named_parameters(recurse=False)) or "none"
        raise ConfigError(f"a mask's target must be a parameter of its module ({names}), got {target!r} ({place})")
    if not isinstance(mask, torch.Tensor):
        raise ConfigError(f"a mask must be a tensor, got {type(mask).__name__} ({place})")
    # Only zero and one are their own squares.
    values = mask.detach() if mask.is_floating_point() else mask.to(torch.float32)
    if values.numel() and bool((values * values).sub_(values).abs_().amax()):
        raise ConfigError(f"a mask must hold zeros and ones, got other values or NaN ({place})")
    # Fewer dimensions would broadcast to the last ones: a number for each channel would mask kernel elements or inputs.
    fits = mask.dim() == parameter.dim() and all(
        mask_size in (1, full_size) for mask_size, full_size in zip(mask.shape, parameter.shape, strict=True)
    )
    if not (fits or mask.dim() == 0):
        raise ConfigError(
            f"a mask must have its parameter's shape {tuple(parameter.shape)}, or 1 in place of some of its sizes, "
            f"got {tuple(mask.shape)} ({place})"
        )
    full = mask.detach().to(dtype=parameter.dtype, device=parameter.device).expand(parameter.shape)
    if target == weight_name(module) and not (full.numel() and bool(full.amax())):
        raise SpeedupError(f"a mask must leave at least one channel of a layer, got only zeros ({place})")
    return full


Scores = Callable[[], np.ndarray]
"""Returns the importance of channels, by group id; only called if any are restored."""


@dataclasses.dataclass(frozen=True)
class Resolved:
    """Masks that agree, and the channels that were restored for that."""

    masks: FullMasks
    is_kept: np.ndarray  # which channels are kept, by group id: bool
    reasons: dict[str, Reasons]  # by layer, why it keeps masked channels
    kept: dict[str, str]  # by layer, how many masked channels it keeps and why, except for ``round_to``


_NAMED = 3  # layers in a warning


def resolve_masks(model: torch.nn.Module, flow: ChannelFlow, masks: FullMasks, round_to: int | None = None) -> Resolved:
    """Make masks of coupled channels agree, as `resolve` does, and warn of layers that keep masked channels."""
    resolved = resolve(model, flow, masks, round_to)
    warn_of_kept(resolved.kept)
    return resolved


def warn_of_kept(texts: Mapping[str, str]) -> None:
    """Log one warning that names the first few layers that keep masked channels; ``texts``: what it says, by layer."""
    if texts:
        summary = "; ".join(f"{name} {text}" for name, text in itertools.islice(texts.items(), _NAMED))
        more = ""
        if len(texts) > _NAMED:
            more = f"; and {len(texts) - _NAMED} more layers, which the report of to_dense lists"
        _logger.warning(
            "masks must agree where layers share channels; channels kept although masked: %s%s", summary, more
        )


def resolve(
    model: torch.nn.Module,
    flow: ChannelFlow,
    masks: FullMasks,
    round_to: int | None = None,
) -> Resolved:
    """Make masks of coupled channels agree; ``round_to``: every pruned layer keeps a multiple of it, or all."""
    selection = _selection_of(model, flow, masks)
    is_kept = flow.kept_groups(selection)
    # Check before rounding restores channels: a mask on the output is a mistake even if rounding would undo it.
    pruned_output = flow.at_output[~is_kept[flow.at_output]]
    for name in selection:
        if np.isin(flow.masked_group_ids(name), pruned_output).any():
            raise SpeedupError(
                f"the shape of the model's output must not change: {leaving_out('the layer that gives it')}, "
                f"got a mask that prunes channels of it ({name})"
            )
    # Channels with the largest weights, by L1 norm over coupled channels, are restored first.
    shared, scores = is_kept.copy(), cache(partial(_scores, model, flow))
    read = keep_read(flow, is_kept, scores)
    # Layers may lose channels by the masks of norms after them.
    masked = {name for name in flow.layers if name in selection or not is_kept[flow.group_ids_of(name)].all()}
    # In two steps, to tell channels restored for equal blocks from those restored for rounding.
    grow(flow, is_kept, scores, 1, masked)
    evened = is_kept.copy()
    grow(flow, is_kept, scores, round_to or 1, masked)
    why = dict[str, Reasons]()
    for name in selection:
        if layer_reasons := _why_kept(flow, selection, name, (shared, evened, is_kept), round_to, read):
            why[name] = layer_reasons
    texts = dict[str, str]()
    for name in selection:
        count = int((evened[flow.masked_group_ids(name)] & ~selection[name]).sum())
        if count:
            texts[name] = f"{count} of {len(selection[name])} ({reasons.join_texts(why.get(name, ()))})"
    return Resolved(_new_masks(model, flow, masks, selection, (shared, is_kept)), is_kept, why, texts)


def union(model: torch.nn.Module, flow: ChannelFlow, masks: FullMasks) -> np.ndarray:
    """Return which channels are kept, by group id: those with a coupled channel that is kept or has no mask."""
    return flow.kept_groups(_selection_of(model, flow, masks))


def _selection_of(model: torch.nn.Module, flow: ChannelFlow, masks: FullMasks) -> dict[str, np.ndarray]:
    """Return the channels that the mask of a layer or norm keeps, by layers and norms that have one."""
    selection = {}
    for name in [*flow.layers, *(name for name in flow.readers if name not in flow.layers)]:
        is_selected = kept_channels(model.get_submodule(name), masks.get(name, {}))
        if is_selected is not None and len(is_selected) == len(flow.masked_group_ids(name)):
            selection[name] = is_selected.cpu().numpy()
    return selection


def keep_read(flow: ChannelFlow, is_kept: np.ndarray, scores: Scores) -> dict[int, Reason]:
    """Restore one channel for each reader that would get none; return which, and why."""
    restored = dict[int, Reason]()
    for group_ids, reader in flow.read():
        if not is_kept[group_ids].any():
            _bring_back(group_ids, is_kept, scores, 1)
            restored[int(group_ids[is_kept[group_ids]][0])] = reasons.last_read(reader)
    return restored


def grow(flow: ChannelFlow, is_kept: np.ndarray, scores: Scores, round_to: int, masked: set[str]) -> None:
    """Restore channels until blocks are equal and widths are rounded."""
    layers = [flow.group_ids_of(name) for name in flow.layers if name in masked]
    # Evening out some blocks may unbalance others that share channels. Channels are only restored, so this ends.
    before, in_place = -1, flow.shuffles and stays_in_place(flow, is_kept)
    while before != int(is_kept.sum()):
        before = int(is_kept.sum())
        for blocks in flow.blocks:
            if not (in_place and blocks.moves):
                _even_out(flow, blocks, is_kept, scores)
        for group_ids in layers:
            width = -(-int(is_kept[group_ids].sum()) // round_to) * round_to
            _bring_back(group_ids, is_kept, scores, width)
        in_place = in_place and (before == int(is_kept.sum()) or stays_in_place(flow, is_kept))
        uneven = [flow.group_ids(blocks.ids) for blocks in flow.blocks if blocks.is_uneven]
        if uneven and not in_place and before == int(is_kept.sum()) and not stays_in_place(flow, is_kept):
            # No smaller equal number per block fits.
            is_kept[np.concatenate(uneven)] = True


def even_out(flow: ChannelFlow, is_kept: np.ndarray) -> None:
    """Restore the first removed channels until blocks are equal, as many as `resolve` restores by their weights."""
    if not flow.reorders:  # otherwise the numbers depend on which channels are kept
        grow(flow, is_kept, lambda: np.zeros(flow.size), 1, set())


def _even_out(flow: ChannelFlow, blocks: Blocks, is_kept: np.ndarray, scores: Scores) -> None:
    """Restore channels until all blocks that aren't removed as a whole keep equally many."""
    # Usually they do: one sum over all blocks of a side shows it.
    starts = [np.cumsum([0, *map(len, side[:-1])]) for side in blocks.sides]
    are_kept = [is_kept[flow.group_ids(np.concatenate(side))].astype(np.int64) for side in blocks.sides]
    if not any(np.ptp(np.add.reduceat(*of_side)) for of_side in zip(are_kept, starts, strict=True)):
        return
    # A block is removed only if all sides remove it; if one side keeps a channel of it, all sides are filled up.
    sides, remains = [list(map(flow.group_ids, side)) for side in blocks.sides], []
    for block_on_sides in zip(*sides, strict=True):
        has_channels = any(is_kept[block].any() for block in block_on_sides)
        remains.append(has_channels or not blocks.may_vanish)
    for side in sides:
        most = max(int(is_kept[block].sum()) for block in side)
        for block, block_remains in zip(side, remains, strict=True):
            _bring_back(block, is_kept, scores, most if block_remains else 0)


def _bring_back(group_ids: np.ndarray, is_kept: np.ndarray, scores: Scores, count: int) -> None:
    """Restore the pruned channels with the largest scores until ``count`` are kept, or all."""
    if int(is_kept[group_ids].sum()) >= count:
        return
    pruned = np.unique(group_ids[~is_kept[group_ids]])
    best = pruned[descending(scores()[pruned])]
    for group_id in best:
        # Count again: several channels of the layer may have the same group id.
        if int(is_kept[group_ids].sum()) >= count:
            return
        is_kept[group_id] = True


def _scores(model: torch.nn.Module, flow: ChannelFlow) -> np.ndarray:
    """Sum the L1 norms of the weights of coupled channels."""
    scores = np.zeros(flow.size)
    for name in flow.layers:
        module = model.get_submodule(name)
        weight = weight_of(module).detach()
        sums = weight.abs().double().transpose(0, channel_dimension(module)).flatten(1).sum(1).cpu().numpy()
        group_ids = flow.group_ids_of(name)
        # In a grouped transposed convolution, output i of every group has the same column of the weight, and so the
        # same sum. Group ids may repeat: each must add.
        np.add.at(scores, group_ids, np.resize(sums, len(group_ids)))
    return scores


def _why_kept(
    flow: ChannelFlow,
    selection: dict[str, np.ndarray],
    name: str,
    stages: tuple[np.ndarray, ...],
    round_to: int | None,
    single: Mapping[int, Reason],
) -> Reasons:
    """Return why a masked channel of a layer or norm was restored, by the stage that restored it.

    ``single``: channels restored as the only one that a reader gets, by group id, with the reason.
    """
    group_ids = flow.masked_group_ids(name)
    shared, evened, rounded = (is_kept[group_ids] & ~selection[name] for is_kept in stages)
    if shared.any():
        # They are coupled with kept channels of other layers, or with pinned ones.
        restored_ids = group_ids[shared]
        if (restored_ids == FIXED).any():
            return flow.why_pinned(name) or (reasons.no_layer_before(),)
        if name in flow.layers:
            names = [layer for layer in flow.layers if np.isin(flow.group_ids_of(layer), restored_ids).any()]
        else:
            norms = [norm for norm in selection if norm not in flow.layers]
            if beside := why_read_beside(flow, norms, restored_ids):
                return beside
            names = [
                norm for norm in norms if np.isin(flow.entering_group_ids(norm)[selection[norm]], restored_ids).any()
            ]
        if names == [name]:
            return (reasons.kept_by_itself(),)
        free = [layer for layer in names if layer not in selection and not flow.layers[layer].depthwise]
        return (reasons.shared(names, free),)
    alone = [group_id for group_id in group_ids.tolist() if group_id in single]
    if (evened & ~np.isin(group_ids, alone)).any():
        return (reasons.blocks_equal(flow.block_places(name)),)
    if alone:
        return (single[alone[0]],)
    if round_to is not None and rounded.any():
        return (reasons.rounding(of=str(round_to)),)
    return ()


def _new_masks(
    model: torch.nn.Module,
    flow: ChannelFlow,
    masks: FullMasks,
    selection: dict[str, np.ndarray],
    stages: tuple[np.ndarray, np.ndarray],
) -> FullMasks:
    shared, is_kept = stages
    new = {name: dict(targets) for name, targets in masks.items()}
    for name, layer in flow.layers.items():
        module, keep = model.get_submodule(name), is_kept[flow.group_ids_of(name)]
        old = selection.get(name, np.ones_like(keep))
        if np.array_equal(keep, old):
            continue
        # Masked channels of a kept head, and of keys and values that all heads share, stay masked.
        has_heads = name in flow.heads or name in flow.shared
        unrestored = shared[flow.group_ids_of(name)] if has_heads else old
        back = keep & ~unrestored
        changed, keep_all = torch.from_numpy(back), torch.from_numpy(keep)
        targets = new.setdefault(name, {})
        weight = targets.get(weight_name(module), spread(module, torch.ones(layer.channels)))
        # Restored channels get all of their weights; in other channels, single masked weights stay masked.
        targets[weight_name(module)] = torch.maximum(weight, spread(module, changed)) * spread(module, keep_all)
        for row_name in row_names(module):
            if isinstance(rows := getattr(module, row_name, None), torch.Tensor):
                mask = targets.get(row_name, torch.ones_like(rows).detach())
                changed_mask, kept_mask = (
                    channel_mask.to(mask).view(-1, *[1] * (rows.dim() - 1)) for channel_mask in (changed, keep_all)
                )
                targets[row_name] = torch.maximum(mask, changed_mask) * kept_mask
    for name in selection.keys() - flow.layers:
        # A norm's zeros stay in a channel that others keep; a channel restored for its width gets its numbers back.
        restored = torch.from_numpy((is_kept & ~shared)[flow.entering_group_ids(name)])
        for target, mask in new[name].items():
            new[name][target] = torch.maximum(mask, restored.to(mask))
    return mask_what_follows(model, flow, new, is_kept)


def mask_what_follows(model: torch.nn.Module, flow: ChannelFlow, masks: FullMasks, is_kept: np.ndarray) -> FullMasks:
    """Mask what pruned channels contribute although their rows are masked; ``is_kept``: bool, by group id.

    This masks free parameters and buffers tied to the channels, and the columns with which output projections read
    heads whose output isn't zero although their rows are masked.
    """
    for name, attention in flow.output_projections().items():
        stays = torch.from_numpy(is_kept[flow.entering_group_ids(name)])
        # A masked head's output isn't zero after a norm, or with shared values: without queries it is their mean.
        if (attention.shifted or attention.shared) and not bool(stays.all()):
            weight = weight_of(model.get_submodule(name)).detach()
            targets = masks.setdefault(name, {})
            targets["weight"] = targets.get("weight", torch.ones_like(weight)) * stays.to(weight)
    for name, free in flow.free_parameters.items():
        stays = torch.from_numpy(is_kept[flow.group_ids(free.ids)])
        if not bool(stays.all()):
            module, _, target = name.rpartition(".")
            parameter: torch.Tensor = getattr(model.get_submodule(module), target)
            view = [1] * parameter.dim()
            view[free.dim] = -1
            masks.setdefault(module, {})[target] = stays.to(parameter).view(view).expand_as(parameter).clone()
    return masks
