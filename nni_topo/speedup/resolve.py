"""Reconcile the masks of layers that share channels, by keeping more channels, never fewer."""

from __future__ import annotations

import logging

import numpy as np
import torch

from nni_topo.errors import ConfigError, SpeedupError
from nni_topo.speedup.channels import Blocks, ChannelFlow
from nni_topo.speedup.dependency import layer_groups
from nni_topo.speedup.labels import FIXED
from nni_topo.speedup.layers import channel_dimension, kept_channels, spread
from nni_topo.speedup.masks import FullMasks
from nni_topo.ties import descending

_logger = logging.getLogger(__name__)


def resolve_masks(
    model: torch.nn.Module, flow: ChannelFlow, masks: FullMasks, round_to: int | None = None
) -> FullMasks:
    """Make the masks of tied channels agree.

    Parameters
    ----------
    model : torch.nn.Module
        The model.
    flow : ChannelFlow
        The ties between its channels.
    masks : dict of str to dict of str to Tensor
        Checked masks of the parameters' shapes.
    round_to : int, optional
        If given, every pruned layer keeps a multiple of it (or all of its channels).

    Returns
    -------
    dict of str to dict of str to Tensor
        New masks. A channel is kept as soon as one of the channels tied to it is kept or belongs to a layer
        without a mask; blocks of grouped convolutions keep equally many. Depth-wise convolutions
        without a mask get one that follows the layer before them.

    Raises
    ------
    ConfigError
        If ``round_to`` isn't a positive integer.
    SpeedupError
        If a channel of the model's output is masked.

    Notes
    -----
    Which channels come back for ``round_to`` and for equal blocks is decided by the weights' L1 norm, summed
    over the tied channels: the largest first.
    """
    if round_to is not None and (isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1):
        raise ConfigError(f"round_to must be a positive integer or None, got {round_to!r}")
    given = _given(model, flow, masks)
    kept = _union(flow, given)
    _check_output(flow, given, kept)
    scores = _scores(model, flow)
    _grow(flow, kept, scores, 1, set(given))
    _warn(flow, given, kept)
    _grow(flow, kept, scores, round_to or 1, set(given))
    return _new_masks(model, flow, masks, given, kept)


def _given(model: torch.nn.Module, flow: ChannelFlow, masks: FullMasks) -> dict[str, np.ndarray]:
    """Collect the channels that the masks keep, for the layers that have a mask."""
    given = {}
    for name in flow.layers:
        kept = kept_channels(model.get_submodule(name), masks.get(name, {}))
        if kept is not None:
            given[name] = kept.cpu().numpy()
    return given


def _union(flow: ChannelFlow, given: dict[str, np.ndarray]) -> np.ndarray:
    """Tell for every representative whether it is kept."""
    size = 1 + sum(layer.channels for layer in flow.layers.values())
    kept, stated = np.zeros(size, dtype=bool), np.zeros(size, dtype=bool)
    for name, layer in flow.layers.items():
        if layer.depthwise and name not in given:
            continue
        roots = flow.layer_roots(name)
        kept[roots[given.get(name, np.ones(len(roots), dtype=bool))]] = True
        stated[roots] = True
    kept[FIXED] = True
    return kept | ~stated


def _check_output(flow: ChannelFlow, given: dict[str, np.ndarray], kept: np.ndarray) -> None:
    gone = flow.at_output[~kept[flow.at_output]]
    for name in given:
        if np.isin(flow.layer_roots(name), gone).any():
            raise SpeedupError(
                "the shape of the model's output must not change: exclude the layer that gives it from the "
                f"config_list (exclude_op_names), got a mask that prunes channels of it ({name})"
            )


def _grow(flow: ChannelFlow, kept: np.ndarray, scores: np.ndarray, round_to: int, masked: set[str]) -> None:
    """Bring channels back until blocks are equal and counts are rounded; both only ever add."""
    layers = [flow.layer_roots(name) for name in flow.layers if name in masked]
    before = -1
    while before != int(kept.sum()):
        before = int(kept.sum())
        for blocks in flow.blocks:
            _level(blocks, [[flow.roots(block) for block in side] for side in blocks.sides], kept, scores)
        for roots in layers:
            wanted = -(-int(kept[roots].sum()) // round_to) * round_to
            _bring_back(roots, kept, scores, min(wanted, len(roots)))


def _level(blocks: Blocks, sides: list[list[np.ndarray]], kept: np.ndarray, scores: np.ndarray) -> None:
    """Bring channels back until all blocks that are left keep equally many."""
    if any((block < FIXED).any() for side in sides for block in side):
        return
    left = [not blocks.may_vanish or any(kept[block].any() for block in parts) for parts in zip(*sides, strict=True)]
    for side in sides:
        most = max(int(kept[block].sum()) for block in side)
        for block, is_left in zip(side, left, strict=True):
            _bring_back(block, kept, scores, most if is_left else 0)


def _bring_back(roots: np.ndarray, kept: np.ndarray, scores: np.ndarray, wanted: int) -> None:
    """Keep the best of the pruned channels until so many are kept."""
    pruned = np.unique(roots[~kept[roots]])
    best = pruned[descending(scores[pruned])]
    for root in best:
        if int(kept[roots].sum()) >= wanted:
            return
        kept[root] = True


def _scores(model: torch.nn.Module, flow: ChannelFlow) -> np.ndarray:
    """Sum the L1 norms of the weights of tied channels."""
    scores = np.zeros(1 + sum(layer.channels for layer in flow.layers.values()))
    for name in flow.layers:
        module = model.get_submodule(name)
        weight: torch.Tensor = module.weight.detach()  # type: ignore[operator]
        sums = weight.abs().double().transpose(0, channel_dimension(module)).flatten(1).sum(1).cpu().numpy()
        roots = flow.layer_roots(name)
        np.add.at(scores, roots, np.resize(sums, len(roots)))
    return scores


def _warn(flow: ChannelFlow, given: dict[str, np.ndarray], kept: np.ndarray) -> None:
    """Say which layers keep more channels than their masks say, and with which layers they share them."""
    for names in layer_groups(flow):
        roots = {name: flow.layer_roots(name) for name in names if name in given}
        more = {name: int(kept[roots[name]].sum()) - int(given[name].sum()) for name in roots}
        if any(more.values()):
            told = ", ".join(f"{name} {count} of {len(roots[name])}" for name, count in more.items() if count)
            free = [name for name in names if name not in given and not flow.layers[name].depthwise]
            _logger.warning(
                "masks must agree where layers share channels; channels kept although masked: %s "
                "(they share them with: %s; of these without a mask: %s)",
                told, ", ".join(names), ", ".join(free) or "none",
            )  # fmt: skip


def _new_masks(
    model: torch.nn.Module, flow: ChannelFlow, masks: FullMasks, given: dict[str, np.ndarray], kept: np.ndarray
) -> FullMasks:
    new = {name: {target: mask.clone() for target, mask in targets.items()} for name, targets in masks.items()}
    for name, layer in flow.layers.items():
        module, keep = model.get_submodule(name), kept[flow.layer_roots(name)]
        old = given.get(name, np.ones_like(keep))
        if not (name in given or layer.depthwise) or np.array_equal(keep, old):
            continue
        changed, keep_all = torch.from_numpy(keep & ~old), torch.from_numpy(keep)
        targets = new.setdefault(name, {})
        weight = targets.get("weight", spread(module, torch.ones(layer.channels)))
        targets["weight"] = torch.maximum(weight, spread(module, changed)) * spread(module, keep_all)
        bias = getattr(module, "bias", None)
        if isinstance(bias, torch.Tensor):
            mask = targets.get("bias", torch.ones_like(bias).detach())
            rows = changed.to(mask), keep_all.to(mask)
            targets["bias"] = torch.maximum(mask, rows[0]) * rows[1]
    return new
