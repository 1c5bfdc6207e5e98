"""Heads with fewer channels each: where masks leave equally many within all heads of attention, the others are cut."""

from __future__ import annotations

import copy
import logging
from typing import Any

import numpy as np
import torch
from torch import nn

from nni_topo.network.attention import (
    Attention,
    by_table,
    find_attention,
    find_frequencies,
    keep_frequencies,
    pairs_of,
    set_size,
)
from nni_topo.network.channels import ChannelFlow
from nni_topo.network.layers import cut, kept_channels, row_names, weight_of
from nni_topo.network.runtime import Call, device_of, evaluation_mode, left_alone, out_of_memory, tensors_of
from nni_topo.network.speedup.masks import FullMasks

_TOLERANCE = 1e-3  # of the largest output, in single precision

_logger = logging.getLogger(__name__)

Dimensions = list[np.ndarray]
"""What stays within each head of queries and keys, and of values: bool, (heads, channels)."""


def narrowed(dense: nn.Module, flow: ChannelFlow, masks: FullMasks, left: np.ndarray, call: Call) -> nn.Module:
    """Cut what masks take away within heads; ``left``: which representatives stay, and so which heads.

    Returns the model itself where there is nothing to cut, or what it computes without that isn't the same.
    """
    if not (found := find_narrow(dense, flow, masks, left)):
        return dense
    # Most attention divides by the root of a head's size, some by a number of its own.
    for divides in (True, False):
        small = _narrowed(dense, flow, found, divides=divides)
        try:
            with left_alone(dense, small), torch.no_grad(), evaluation_mode(dense, small):
                pairs = [tensors_of(net(*call[0], **call[1])) for net in (dense, small)]
            if all(bool((a - b).abs().max() <= _TOLERANCE * a.abs().max()) for a, b in zip(*pairs, strict=True)):
                return small
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            if out_of_memory(error):
                raise
            _logger.debug("heads of another size don't run", exc_info=True)
    _logger.warning("heads keep their size: attention does more with it than multiply (%s)", ", ".join(found))
    return dense


def _narrowed(dense: nn.Module, flow: ChannelFlow, found: dict[str, Dimensions], *, divides: bool) -> nn.Module:
    """Copy a model and cut within its heads; ``divides``: attention divides by the root of a head's size."""
    small, mixers = copy.deepcopy(dense), flow.mixers()
    before = find_attention(small)
    with torch.no_grad():
        for name, kept in found.items():
            readers = [layer for layer, read in mixers.items() if read.name == name]
            _cut(small, before[name], kept, readers, divides=divides)
        for table, names in by_table(find_frequencies(dense, flow.attention)).items():
            stays = pairs_of(found[names[0]][0]) if names[0] in found else None
            if stays is not None:
                keep_frequencies(small, table, stays)
    return small


def find_narrow(model: nn.Module, flow: ChannelFlow, masks: FullMasks, left: np.ndarray) -> dict[str, Dimensions]:
    """Find the attention modules within whose heads masks leave equally many channels, and which these are."""
    found: dict[str, Dimensions] = {}
    for name in dict.fromkeys(each.name for each in flow.heads.values() if not each.recurrent):
        attention = flow.attention[name]
        layer = next(iter(attention.channels))
        heads = np.flatnonzero(left[flow.roots(flow.bundle_numbers(layer))])
        queries, keys, values = (_kept(flow, masks, each)[rows[heads]] for each, rows in attention.parts)
        counts = {*keys.sum(1).tolist(), *values.sum(1).tolist()}
        if np.array_equal(queries, _shared(keys, queries)) and len(counts) == 1 and 0 < max(counts) < keys.shape[1]:
            found[name] = [keys, values]
    for names in by_table(find_frequencies(model, flow.attention)).values():
        # A pair of channels goes with its frequency, from all heads that turn by it.
        kept = [found[name][0] for name in names if name in found]
        if len(kept) < len(names) or pairs_of(np.concatenate(kept)) is None:
            found = {name: each for name, each in found.items() if name not in names}
    return found


def _shared(keys: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Repeat what is of keys for each of the heads that share them: (heads, channels of queries)."""
    return np.tile(keys, (1, queries.shape[1] // keys.shape[1]))


def _kept(flow: ChannelFlow, masks: FullMasks, layer: str) -> np.ndarray:
    kept = kept_channels(flow.fetch_attr(layer), masks.get(layer, {}))
    channels = flow.layers[layer].channels
    return np.ones(channels, dtype=bool) if kept is None else np.asarray(kept.cpu())


def _cut(model: nn.Module, attention: Attention, kept: Dimensions, readers: list[str], *, divides: bool) -> None:
    """Keep some channels of each head, in place."""
    (keys, values), size = kept, int(kept[0][0].sum())
    module: Any = model.get_submodule(attention.name)
    stays: dict[str, list[np.ndarray]] = {}
    asked = _shared(keys, attention.parts[0][1])
    for (layer, rows), dims in zip(attention.parts, (asked, keys, values), strict=True):
        stays.setdefault(layer, []).append(rows[dims])
    layer, rows = attention.parts[0]
    asking = model.get_submodule(layer)
    # What divides by the root of a head's size divides by less now.
    for parameter in (weight_of(asking), getattr(asking, row_names(asking)[-1], None)):
        if parameter is not None and divides:
            parameter.data[torch.from_numpy(rows.ravel()).to(parameter.device)] *= (size / keys.shape[1]) ** 0.5
    for layer, parts in stays.items():
        made: Any = model.get_submodule(layer)
        ins = torch.arange(weight_of(made).shape[1])
        outs = torch.from_numpy(np.sort(np.concatenate(parts)))
        cut(layer, made, ins.to(device_of(made)), outs.to(device_of(made)))
    for name in readers:
        reader: Any = model.get_submodule(name)
        ins, outs = torch.from_numpy(np.flatnonzero(_of_context(attention, values))), torch.arange(reader.out_features)
        cut(name, reader, ins.to(device_of(reader)), outs.to(device_of(reader)))
    set_size(module, keys.shape[1], size, asked.size // keys.shape[1])


def _of_context(attention: Attention, values: np.ndarray) -> np.ndarray:
    """Tell which channels that the heads put out stay: bool, (channels,)."""
    _, rows = attention.parts[2]
    by_row = np.zeros(int(rows.max()) + 1, dtype=bool)
    by_row[rows] = values
    found: np.ndarray = by_row[attention.context[1]]
    return found
