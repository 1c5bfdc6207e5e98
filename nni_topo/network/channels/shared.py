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
from torch.fx import GraphModule, Node

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
            ids.node = _node_of(other, nodes, traced)
            for first, second in _pairs(*_ids_of_places(traced, one, other, ids, entering)):
                first_stays, second_stays = np.isin(before[first], staying), np.isin(before[second], staying)
                ids.tie(first[~first_stays & ~second_stays], second[~first_stays & ~second_stays])
                ids.pin(np.unique(first[second_stays & ~first_stays]), reasons.shared_weight(one, other))
                ids.pin(np.unique(second[first_stays & ~second_stays]), reasons.shared_weight(other, one))


def _pairs(one: _Dimensions, other: _Dimensions) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the ids that meet in each dimension; against a dimension that can't be cut, all channels have to stay."""
    found = []
    for first, second in zip_longest(one, other):
        if first is not None and second is not None and len(first) == len(second):
            found.append((first, second))
            continue
        if first is not None:
            found.append((first, np.full_like(first, FIXED)))
        if second is not None:
            found.append((np.full_like(second, FIXED), second))
    return found


def _node_of(name: str, nodes: Mapping[str, Node], traced: GraphModule) -> Node:
    """Return the node that reads a tensor, or calls the module that holds it, if only as a part of another module."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        if ".".join(parts[:length]) in nodes:
            return nodes[".".join(parts[:length])]
    first: Node = next(iter(traced.graph.nodes))
    return first


def _ids_of_places(
    traced: GraphModule, one: str, other: str, ids: ChannelIds, entering: Mapping[str, np.ndarray]
) -> list[_Dimensions]:
    """Return the ids along the dimensions of a tensor at two of its places, so that they can be compared one by one."""
    modules = [traced.get_submodule(name.rpartition(".")[0]) for name in (one, other)]
    owns = [name.rpartition(".")[2] for name in (one, other)]
    alike = type(modules[0]) is type(modules[1]) and owns[0] == owns[1]
    alike = alike and getattr(modules[0], "groups", 1) == getattr(modules[1], "groups", 1)
    is_free = one in ids.free_parameters or other in ids.free_parameters
    if alike and not is_free and owns[0] not in ("bias", "in_proj_bias"):
        # Modules of one kind are cut alike, whatever their groups, gates and heads are.
        return [_whole(name.rpartition(".")[0], ids, entering) for name in (one, other)]
    return [_dimensions(name, module, ids, entering) for name, module in zip((one, other), modules, strict=True)]


def _whole(owner: str, ids: ChannelIds, entering: Mapping[str, np.ndarray]) -> _Dimensions:
    """Return the ids of what leaves a layer and of what enters it; of a norm, of what enters it."""
    found: _Dimensions = []
    if owner in ids.layers:
        found.append(ids.layers[owner].ids)
    if len(entering.get(owner, ())):
        found.append(entering[owner])
    return found


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
