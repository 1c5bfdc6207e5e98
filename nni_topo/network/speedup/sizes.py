"""A second size of a model's inputs, and the channels whose coupling isn't the same at both sizes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from nni_topo.network.channels.flow import ChannelFlow
from nni_topo.network.channels.ids import FIXED
from nni_topo.network.runtime.inputs import Call, first_samples, tensors_of
from nni_topo.network.runtime.switches import random_state_kept

_SMALL = 64  # places, which any input may have
_MULTIPLES = (8, 16, 32)  # by which networks divide the sides of images
Compared = tuple[tuple[int, int], ...]
"""Sizes that a forward compared with numbers, and these numbers."""


def second_call(model: nn.Module, call: Call, compared: Compared) -> Call | None:
    """Return inputs of another size that a model runs on, of two samples if it takes these; None if none is found.

    Dimensions of one size, such as height and width, or the lengths of tokens and their mask, change together. Tried
    are a size on the other side of a number that the forward compares sizes with, then one place more, then the next
    multiple of 8, 16 and 32. ``model`` is a copy in evaluation mode.
    """
    few = first_samples(call)
    for start in (few, call) if few is not call else (call,):
        found = start
        sizes = sorted({size for tensor in tensors_of(start) for size in tensor.shape[1:]}, reverse=True)
        for size in sizes:
            for other in _other_sizes(size, compared):
                tried = _resized(found, size, other)
                if _runs(model, tried):
                    found = tried
                    break
        if found is not start:
            return found
    return None


def _other_sizes(size: int, compared: Compared) -> Iterator[int]:
    """Yield sizes to try in place of one, each once."""
    found = list[int]()
    for known, number in compared:
        # What is compared may be the size of a feature map, which grows as the input does.
        threshold = size * number / known if known > 0 else 0
        for multiple in (32, 16, 8, 1):
            below = int(threshold - 1e-9) // multiple * multiple
            above = (int(threshold) // multiple + 1) * multiple
            if known >= number and below > 0:
                found.append(below)
            # Much larger inputs might not fit into memory.
            if known <= number and above <= max(3 * size, _SMALL):
                found.append(above)
    found += [size + 1, *((size // multiple + 1) * multiple for multiple in _MULTIPLES)]
    for each in dict.fromkeys(found):
        if each != size:
            yield each


def _resized(call: Call, size: int, other: int) -> Call:
    """Change all dimensions of one size but the first; where they grow, the values begin again."""

    def resize(tensor: Tensor) -> Tensor:
        for d in range(1, tensor.dim()):
            if tensor.shape[d] == size:
                tensor = tensor.index_select(d, torch.arange(other, device=tensor.device) % size)
        return tensor

    resized: Call = tree_map_only(Tensor, resize, call)
    return resized


def _runs(model: nn.Module, call: Call) -> bool:
    args, kwargs = tree_map_only(Tensor, Tensor.clone, call)
    try:
        with torch.no_grad(), random_state_kept():
            model(*args, **kwargs)
    except Exception:  # a model that doesn't take a size may raise anything; or memory is short
        return False
    return True


def differing(flow: ChannelFlow, other: ChannelFlow) -> np.ndarray:
    """Return the channels whose coupling isn't the same at a second size: group ids of ``flow``, int, (groups,).

    ``flow``, ``other``: how channels go through the network at both sizes. The coupling of a channel is the same if
    both the channels that can only be removed with it and the layers that read it are the same.
    """
    pairs = [(flow.group_ids_of(name), other.group_ids_of(name)) for name in flow.layers if name in other.layers]
    for name, parameter in flow.free_parameters.items():
        if name in other.free_parameters and other.free_parameters[name].channels == parameter.channels:
            ids = flow.free_parameter_ids(name), other.free_parameter_ids(name)
            pairs.append((flow.group_ids(ids[0]), other.group_ids(ids[1])))
    read_elsewhere = [np.zeros(0, dtype=np.int64)]  # group ids of ``other``
    for name in other.readers:
        entering = flow.entering_group_ids(name), other.entering_group_ids(name)
        if len(entering[0]) == len(entering[1]):
            pairs.append(entering)
        else:  # above all a layer that doesn't run at the first size
            read_elsewhere.append(entering[1])
    met = np.unique(np.concatenate([np.stack(pair, 1) for pair in pairs]), axis=0)
    ones, others = met.T
    times_one, times_other = np.bincount(ones), np.bincount(others)
    differs = (times_one[ones] > 1) | (times_other[others] > 1) | (others == FIXED)
    differs |= np.isin(others, np.concatenate(read_elsewhere))
    return np.setdiff1d(ones[differs], FIXED)
