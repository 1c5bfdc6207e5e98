"""What a network costs at given widths, without building it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nni_topo.network.layers import (
    NORMS,
    RECURRENT,
    TRANSPOSED,
    Size,
    has_bias,
    is_recurrent,
    recurrent_products,
    row_names,
    spread,
    weight_name,
    weight_of,
)
from nni_topo.network.runtime import (
    batch_size,
)
from nni_topo.network.speedup import Network
from nni_topo.sharing import first_names

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
Kept = Mapping[str, BoolArray]
"""``{layer name: which of its output channels are kept}``, or of its heads; output projections are passed over."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one sample takes: multiply-accumulates, number of parameters, bytes."""

    macs: int
    params: int
    memory: int  # of the parameters, and of the layer whose input and output are largest together


@dataclasses.dataclass(frozen=True)
class _LayerCost:
    entering: IntArray
    leaving: IntArray
    groups: int
    kernel: int
    positions: int
    entering_positions: int
    leaving_positions: int
    together: int  # of these, those of one window, where the layer makes queries, keys or values
    bias: int  # how many of them
    has_weight: bool = True  # False where another layer has the same one, which counts it
    has_bias: bool = True

    def products(self, pruned: BoolArray) -> int:
        """Products per output position, summed over the kept output channels."""
        # A depth-wise convolution loses groups with its channels: each channel keeps one input.
        depthwise = self.groups == len(self.entering) > 1
        entering = 1 if depthwise else _count_kept(self.entering, pruned) // self.groups
        return _count_kept(self.leaving, pruned) * entering * self.kernel

    def weights(self, pruned: BoolArray) -> int:
        """Number of kept parameters, without those that another layer counts."""
        biases = self.bias * _count_kept(self.leaving, pruned) if self.has_bias else 0
        return (self.products(pruned) if self.has_weight else 0) + biases

    def activations(self, pruned: BoolArray) -> int:
        """Number of values that enter and leave one call."""
        entering = _count_kept(self.entering, pruned) * self.entering_positions
        return entering + _count_kept(self.leaving, pruned) * self.leaving_positions


class NetworkCost:
    """Count a network's cost from the channels that are kept."""

    # Not by PyTorch's counter, which `count_macs` uses: that runs a network, and a search for a budget asks for the
    # cost of thousands of widths without building any. The tests hold both to the same numbers.
    # Convolutions, linear layers and attention count as in the dense model, batch norms as parameters, everything else
    # (other norms) as in the unpruned network. A channel that several layers share is pruned when all of them lose it;
    # one of a layer without an entry stays.
    def __init__(self, model: torch.nn.Module, example_inputs: Any) -> None:
        network = Network.on(model, example_inputs)
        samples = batch_size(network.call)
        self._flow, sizes = network.flow, network.sizes
        self._modules = modules = dict(model.named_modules())
        self._layers = dict[str, _LayerCost]()
        shared, counted = first_names(model), set[str]()

        def is_new(name: str) -> bool:
            """Tell whether a parameter wasn't counted yet, under another name of it."""
            first = shared.get(name, name)
            found = first not in counted
            counted.add(first)
            return found

        for name in self._flow.layers:
            if name in sizes:  # embeddings compute nothing
                calls = _by_sample(modules[name], sizes[name], samples)
                self._layers[name] = dataclasses.replace(
                    self._layer_cost(name, calls),
                    has_weight=is_new(f"{name}.{weight_name(modules[name])}"),
                    has_bias=is_new(f"{name}.{row_names(modules[name])[-1]}"),
                )
        # Of recurrent layers that keep all units: those with a projection, and cells.
        self._unpruned_macs = 0
        for name, calls in sizes.items():
            if name not in self._layers and isinstance(modules[name], RECURRENT):
                steps = sum(_positions(modules[name], leaving) for _, leaving in calls)
                self._unpruned_macs += steps * recurrent_products(modules[name])
        self._norms = dict[str, tuple[IntArray, int]]()  # the channels that enter, and the parameters of each
        for name, module in modules.items():
            entering = self._flow.entering_group_ids(name)
            if isinstance(module, NORMS) and module.affine and len(entering):
                self._norms[name] = entering, is_new(f"{name}.weight") + is_new(f"{name}.bias")
        # By channel of the heads' values: each query is multiplied with each key, and each weight with each value.
        self._attention: list[tuple[IntArray, int]] = []
        for attention in network.attention.values():
            layer, channels = attention.outputs
            if self._layers.keys() >= {*attention.layers, layer}:
                made = [self._layers[name] for name in attention.layers]
                queries, keys = made[0].leaving_positions, made[-1].together  # of one sample
                self._attention.append((self._flow.group_ids_of(layer)[channels.ravel()], 2 * queries * keys))
        nothing = np.zeros(self._flow.size, dtype=np.bool_)
        # Parameters of everything else, which isn't pruned.
        self._rest = sum(parameter.numel() for parameter in model.parameters())
        for cost in self._layers.values():
            self._rest -= cost.weights(nothing)
        for group_ids, parameters in self._norms.values():
            self._rest -= parameters * len(group_ids)
        self._bytes = max((parameter.element_size() for parameter in model.parameters()), default=4)

    def _layer_cost(self, name: str, calls: list[tuple[Size, Size]]) -> _LayerCost:
        flow, module = self._flow, self._modules[name]
        entering = [flow.entering_group_ids(name)]
        biases = int(has_bias(module))
        if is_recurrent(module):
            # In each direction, units read what enters and one another; those of further levels all of the level below.
            units = flow.group_ids(flow.unit_channel_ids(name))
            directions = 2 if module.bidirectional else 1
            further = (module.num_layers - 1) * directions
            entering = directions * [*entering, units] + further * (directions + 1) * [units]
            biases *= 2 * directions * module.num_layers
        return _LayerCost(
            entering=np.concatenate(entering),
            leaving=flow.group_ids_of(name),
            groups=getattr(module, "groups", 1),
            kernel=int(np.prod(weight_of(module).shape[2:])),
            # A transposed convolution computes at its input positions, all others at those of their output.
            positions=sum(_positions(module, call[not isinstance(module, TRANSPOSED)]) for call in calls),
            entering_positions=max(_positions(module, entering) for entering, _ in calls),
            leaving_positions=max(_positions(module, leaving) for _, leaving in calls),
            together=max(leaving[-2] if len(leaving) > 3 else _positions(module, leaving) for _, leaving in calls),
            bias=biases,
        )

    def __call__(self, kept: Kept) -> Cost:
        """Count the cost with the ``kept`` channels of layers; a layer without an entry keeps all."""
        pruned = ~self._flow.kept(kept)
        macs, params, activations = self._unpruned_macs, self._rest, 0
        for cost in self._layers.values():
            macs += cost.products(pruned) * cost.positions
            params += cost.weights(pruned)
            activations = max(activations, cost.activations(pruned))
        for group_ids, products in self._attention:
            macs += _count_kept(group_ids, pruned) * products
        for group_ids, parameters in self._norms.values():
            params += parameters * _count_kept(group_ids, pruned)
        return Cost(macs, params, self._bytes * (params + activations))

    def widths(self, kept: Kept) -> dict[str, tuple[int, int]]:
        """Count the kept (input, output) channels of each layer, of a linear layer the features."""
        pruned = ~self._flow.kept(kept)
        widths = dict[str, tuple[int, int]]()
        for name, cost in self._layers.items():
            widths[name] = _count_kept(cost.entering, pruned), _count_kept(cost.leaving, pruned)
        return widths

    def masks(self, kept: Kept) -> dict[str, dict[str, torch.Tensor]]:
        """Return masks of the layers that lose channels."""
        pruned, found = ~self._flow.kept(kept), {}
        for name, cost in self._layers.items():
            stays, module = torch.from_numpy(~pruned[cost.leaving]), self._modules[name]
            if not stays.all():
                found[name] = {weight_name(module): spread(module, stays)}
                for own in row_names(module):
                    if isinstance(rows := getattr(module, own, None), torch.Tensor):
                        found[name][own] = stays.to(rows).view(-1, *[1] * (rows.dim() - 1)).expand_as(rows)
        return found


def _by_sample(module: Any, calls: list[tuple[Size, Size]], samples: int) -> list[tuple[Size, Size]]:
    """Split windows, which a linear layer may get as samples, by the sample that they come from."""
    if not isinstance(module, torch.nn.Linear):
        return calls
    return [(_parted(entering, samples), _parted(leaving, samples)) for entering, leaving in calls]


def _parted(size: Size, samples: int) -> Size:
    parts, rest = divmod(size[0], samples)
    return size if rest or parts < 2 else (samples, parts, *size[1:])


def _positions(module: Any, size: Size) -> int:
    """Count the positions of one sample in a layer's input or output."""
    last = isinstance(module, (torch.nn.Linear, torch.nn.MultiheadAttention, *RECURRENT))
    return math.prod(size[1:]) // size[-1 if last else 1]


def _count_kept(group_ids: IntArray, pruned: BoolArray) -> int:
    """Count the kept channels among some, given by group id which are pruned."""
    return len(group_ids) - int(np.count_nonzero(pruned[group_ids]))
