"""Couple the channels of modules that share a weight, so that one smaller weight serves all of them.

Two layers of one weight lose the same output channels and read the same input channels, as one layer that is called
twice does. What goes together follows from the weight's dimensions: the columns of an embedding with the channels that
the head of the same weight reads, the filters of a convolution with the input of the transposed convolution that
mirrors it. Where one of the modules can't be cut along a dimension, the others keep their channels too.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise, zip_longest
from typing import Any

import numpy as np
from torch import nn
from torch.fx import GraphModule

from nni_topo.network.channels import reasons
from nni_topo.network.channels.ids import FIXED, ChannelIds
from nni_topo.network.layers.kinds import PER_CHANNEL, TRANSPOSED, is_depthwise, is_recurrent, row_names
from nni_topo.sharing import find_ties

_Dimensions = list[np.ndarray | None]
"""The ids of the channels along the first dimensions of a tensor; None, and nothing, where it can't be cut."""


def couple_shared_weights(
    traced: GraphModule, ids: ChannelIds, entering: Mapping[str, np.ndarray], leaving_model: np.ndarray
) -> None:
    """Tie the channels of modules that share a tensor, or pin them where one of the modules can't be cut.

    ``entering``: by layer or norm, the ids of the channels that enter it. ``leaving_model``: ids at the model's output,
    which stay for that reason.
    """
    ties = find_ties(traced)
    if not ties:
        return
    before = ids.settled()[0]  # the groups of channels, as if no weight were shared
    nodes = {str(node.target): node for node in traced.graph.nodes if node.op in ("call_module", "get_attr")}
    staying = np.unique([FIXED, *before[leaving_model]])
    for names in ties:
        used = []
        for name in names:
            owner = name.rpartition(".")[0]
            if name in nodes or owner in ids.layers or owner in entering:
                used.append(name)
        for one, other in pairwise(used):
            reader = other  # a module may be called as a part of another one
            while reader and reader not in nodes:
                reader = reader.rpartition(".")[0]
            ids.node = nodes[reader] if reader else next(iter(traced.graph.nodes))
            for first, second in zip_longest(*_ids_of_places(traced, one, other, ids, entering)):
                if first is not None and second is not None and len(first) == len(second):
                    first_stays, second_stays = np.isin(before[first], staying), np.isin(before[second], staying)
                    is_free = ~first_stays & ~second_stays
                    ids.tie(first[is_free], second[is_free])
                    ids.pin(np.unique(first[second_stays & ~first_stays]), reasons.shared_weight(one, other))
                    ids.pin(np.unique(second[first_stays & ~second_stays]), reasons.shared_weight(other, one))
                    continue
                # Against a dimension that can't be cut all channels have to stay.
                if first is not None:
                    ids.pin(first[~np.isin(before[first], staying)], reasons.shared_weight(one, other))
                if second is not None:
                    ids.pin(second[~np.isin(before[second], staying)], reasons.shared_weight(other, one))


def _ids_of_places(
    traced: GraphModule, one: str, other: str, ids: ChannelIds, entering: Mapping[str, np.ndarray]
) -> list[_Dimensions]:
    """Return the ids along the dimensions of a tensor at two of its places, so that they can be compared one by one."""
    (owner_of_one, _, own), (owner_of_other, _, own_of_other) = one.rpartition("."), other.rpartition(".")
    modules = traced.get_submodule(owner_of_one), traced.get_submodule(owner_of_other)
    is_free = one in ids.free_parameters or other in ids.free_parameters
    if (
        type(modules[0]) is type(modules[1])
        and own == own_of_other
        and own not in ("bias", "in_proj_bias")
        and not is_free
        and getattr(modules[0], "groups", 1) == getattr(modules[1], "groups", 1)
    ):
        # Modules of one kind are cut alike, whatever their groups, gates and heads are: by what leaves them, and by
        # what enters them; norms by what enters.
        found = list[_Dimensions]()
        for owner in (owner_of_one, owner_of_other):
            whole: _Dimensions = [ids.layers[owner].ids] if owner in ids.layers else []
            found.append([*whole, entering[owner]] if len(entering.get(owner, ())) else whole)
        return found
    return [_dimensions(name, module, ids, entering) for name, module in zip((one, other), modules, strict=True)]


def _dimensions(name: str, module: Any, ids: ChannelIds, entering: Mapping[str, np.ndarray]) -> _Dimensions:
    """Return the ids along the dimensions of a module's tensor, as far as the module can be cut along them."""
    owner, _, own = name.rpartition(".")
    if name in ids.free_parameters:
        free = ids.free_parameters[name]
        return [None] * free.dim + [free.ids]
    if owner not in ids.layers:
        return [entering[owner]] if isinstance(module, PER_CHANNEL) and owner in entering else []
    leaving, reads = ids.layers[owner].ids, entering.get(owner)
    if is_recurrent(module):
        return []
    if own in row_names(module):
        return [leaving]
    if isinstance(module, nn.Embedding):
        return [None, leaving]
    if getattr(module, "groups", 1) > 1:
        return [leaving] if is_depthwise(module) and not isinstance(module, TRANSPOSED) else []
    return [reads, leaving] if isinstance(module, TRANSPOSED) else [leaving, reads]
