"""Cut a model: remove its pruned channels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.fx

from nni_topo.network.attention.heads import Attention, resize
from nni_topo.network.channels.constraints import DenseOrder
from nni_topo.network.channels.flow import ChannelFlow
from nni_topo.network.graph.nodes import tensor_shape
from nni_topo.network.layers.derived import HEAD
from nni_topo.network.layers.integer_attributes import put_sizes
from nni_topo.network.layers.kinds import CONVOLUTIONS, is_depthwise, output_channels, weight_name
from nni_topo.network.layers.slicing import cut, keep
from nni_topo.network.runtime.modules import device_of
from nni_topo.network.speedup.reconcile import KeptIndices


class Cutter:
    """Cut a model in place, given its channel flow and which channels are kept, by group id."""

    def __init__(self, model: torch.nn.Module, flow: ChannelFlow, is_kept: np.ndarray) -> None:
        self.model, self.flow, self.is_kept = model, flow, is_kept
        self.order = DenseOrder(flow, is_kept) if flow.reorders else None
        self.at = ""  # the module that is being cut
        called = [str(node.target) for node in flow.traced.graph.nodes if node.op == "call_module"]
        self._names = list(dict.fromkeys([*called, *flow.heads, *flow.shared]))

    @torch.no_grad()
    def cut(self) -> None:
        """Cut the modules that the forward calls, free parameters, and parameters by head."""
        flow, model = self.flow, self.model
        for name in self._names:
            module, (ins, outs) = model.get_submodule(name), self.kept_places(name)
            entering, leaving = self._channel_ids(name)
            self.at = name
            # A channel-wise convolution has the same weight for any number of channels.
            if (len(ins) < len(entering) or len(outs) < len(leaving)) and name not in flow.channel_wise:
                cut(name, module, ins.to(device_of(module)), outs.to(device_of(module)))
        self.at = ""
        for name, column, share in flow.factors(self.is_kept):
            if share < 1:
                reader: Any = model.get_submodule(name)
                place = int((self.kept_places(name)[0] == column).nonzero())  # a mean isn't removed
                weight = reader.weight.detach().clone()
                weight[:, place] *= share
                keep(reader, "weight", weight)
        for name, free in flow.free_parameters.items():
            indices = self._indices(free.ids)
            if len(indices) < free.channels:
                owner, _, target = name.rpartition(".")
                module = model.get_submodule(owner)
                keep(module, target, getattr(module, target).index_select(free.dim, indices.to(device_of(module))))
                if target == weight_name(module):
                    _set_weight_size(module, free.dim, len(indices))
        for attention in dict.fromkeys(module.name for module in flow.heads.values()):
            structure = flow.attention[attention]
            layer = next(iter(structure.channels))
            heads = self._indices(flow.unit_channel_ids(layer))
            _cut_by_head(model.get_submodule(attention), structure, heads)
            resize(model.get_submodule(attention), structure, len(heads), len(self.kept_places(layer)[0]))
        sizes = flow.sizes_kept(self.is_kept)
        cut_modules = {*self._names, *flow.attention}
        put_sizes(model, {place: size for place, size in sizes.items() if place[0] in cut_modules})

    def _indices(self, ids: np.ndarray) -> torch.Tensor:
        """Return the positions of the kept channels, ascending."""
        return torch.from_numpy(np.flatnonzero(self.is_kept[self.flow.group_ids(ids)]))

    def _channel_ids(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of the channels that enter and leave a module."""
        entering = self.flow.entering_channel_ids(name)
        is_layer = output_channels(self.model.get_submodule(name)) is not None and name in self.flow.layers
        if not is_layer:
            return entering, entering
        return entering, self.flow.channel_ids_of(name)

    def cut_unused(self, ties: Iterable[Iterable[str]]) -> None:
        """Cut each unused module like a used one of its class that shares a tensor; ``ties``: names of each tensor."""
        names = {*self._names, *self.flow.layers}
        done = set[str]()
        for places in ties:
            owners = list(dict.fromkeys(place.rpartition(".")[0] for place in places))
            used = [owner for owner in owners if owner in names]
            for owner in owners:
                module = self.model.get_submodule(owner)
                alike = [twin for twin in used if type(self.model.get_submodule(twin)) is type(module)]
                if owner in names or owner in done or not alike:
                    continue
                done.add(owner)
                ins, outs = (indices.to(device_of(module)) for indices in self.kept_places(alike[0]))
                with torch.no_grad():
                    cut(owner, module, ins, outs)

    def kept_places(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the positions of the kept channels that enter and leave a module, in the dense model's order."""
        entering, leaving = self._channel_ids(name)
        ins, outs = self._indices(entering), self._indices(leaving)
        if self.order is None or not len(entering):
            return ins, outs
        module = self.model.get_submodule(name)
        arriving = torch.from_numpy(self.order.places(name))
        groups = getattr(module, "groups", getattr(module, "num_groups", 1))
        of_group = arriving // max(len(entering) // groups, 1)
        if is_depthwise(module):
            step = self.flow.layers[name].channels // len(entering)
            outs = (arriving[:, None] * step + torch.arange(step)).flatten()
        elif bool((of_group[1:] < of_group[:-1]).any()):
            return ins, outs
        if name not in self.flow.layers:
            return arriving, arriving
        return arriving, outs


def _set_weight_size(module: Any, dim: int, size: int) -> None:
    """Set a module's size attribute for one dimension of its weight, which a forward reads without calling the module.

    DeBERTa reads an embedding's weight this way, Mamba a linear layer's and a convolution's, and a recurrent layer its
    own for packed sequences.
    """
    if isinstance(module, torch.nn.Embedding) and dim == 1:
        module.embedding_dim = size
    elif isinstance(module, torch.nn.Linear):
        setattr(module, ("out_features", "in_features")[dim], size)
    elif isinstance(module, torch.nn.RNNBase) and dim == 1:
        module.input_size = size
    elif isinstance(module, CONVOLUTIONS) and dim == 0:
        if is_depthwise(module):
            module.in_channels = module.groups = size
        module.out_channels = size


def _cut_by_head(module: torch.nn.Module, attention: Attention, heads: torch.Tensor) -> None:
    """Keep some heads' entries in parameters with an entry for each head, such as a table of positions."""
    if len(heads) == attention.heads:
        return
    for name, dim in attention.by_head.items():
        place, _, target = name.rpartition(".")
        owner: Any = module.get_submodule(place)
        keep(owner, target, getattr(owner, target).index_select(dim, heads.to(device_of(owner))))
        if isinstance(owner, torch.nn.Linear):
            owner.out_features = len(heads)
        elif isinstance(owner, torch.nn.Embedding):
            owner.embedding_dim = len(heads)


def kept_outputs(flow: ChannelFlow, is_kept: np.ndarray) -> KeptIndices:
    """Return the kept indices of each dimension of a module's first output, by module that returns one tensor."""
    kept_indices: KeptIndices = {}
    for node in flow.traced.graph.nodes:
        shape = tensor_shape(node)
        # Of a layer with operations after its convolution, the node is only the convolution.
        if node.op == "call_module" and shape is not None and not node.meta.get(HEAD):
            kept_indices.setdefault(str(node.target), kept_slices(flow.ids[node.name], shape, flow, is_kept))
    return kept_indices


def kept_slices(
    ids: torch.Tensor, shape: tuple[int, ...], flow: ChannelFlow, is_kept: np.ndarray
) -> list[torch.Tensor]:
    """Return the indices of each dimension of a tensor at which any channel is kept."""
    stays = torch.from_numpy(np.asarray(is_kept[flow.group_ids(ids.numpy())]))
    indices = []
    for d, size in enumerate(shape):
        # Ids have size 1 in a dimension along which they don't differ, or whose size is 1. Without elements there is no
        # channel that could be removed.
        if stays.shape[d] == size and stays.numel() > 0:
            rows = stays.movedim(d, -1).reshape(-1, size).any(0)
            indices.append(rows.nonzero().flatten())
        else:
            indices.append(torch.arange(size))
    return indices
