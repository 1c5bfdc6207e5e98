"""What a network costs at given widths, without building it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nni_topo.network.cost.measure import count_macs, count_params, counted_run
from nni_topo.network.cost.products import products_of
from nni_topo.network.graph.tracing import layer_sizes
from nni_topo.network.layers.derived import Size
from nni_topo.network.layers.kinds import (
    NORMS,
    RECURRENT,
    TRANSPOSED,
    has_bias,
    is_recurrent,
    row_names,
    spread,
    weight_name,
    weight_of,
)
from nni_topo.network.runtime.copies import left_alone
from nni_topo.network.runtime.inputs import batch_size
from nni_topo.network.speedup.analysis import Analysis
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
    bias: int  # how many of them
    has_weight: bool = True  # False where another layer has the same one, which counts it
    has_bias: bool = True

    def __call__(self, pruned: BoolArray) -> tuple[int, int, int]:
        """Count multiply-accumulates, parameters, and the values that enter and leave one call.

        ``pruned``: by group id. Multiply-accumulates are those of all calls. Parameters that another layer counts
        aren't among them.
        """
        entering, leaving = _count_kept(self.entering, pruned), _count_kept(self.leaving, pruned)
        # A depth-wise convolution loses groups with its channels: each channel keeps one input.
        depthwise = self.groups == len(self.entering) > 1
        products = leaving * (1 if depthwise else entering // self.groups) * self.kernel
        params = products * self.has_weight + leaving * self.bias * self.has_bias
        values = entering * self.entering_positions + leaving * self.leaving_positions
        return products * self.positions, params, values


class NetworkCost:
    """Count a network's cost from the channels that are kept."""

    @classmethod
    def on(cls, model: torch.nn.Module, example_inputs: Any) -> NetworkCost:
        """Take a model with example inputs, whatever container they come in."""
        return cls(Analysis.on(model, example_inputs))

    # The unpruned network is counted once, as `count_macs` does. The part of that count that is known to depend on the
    # kept channels is computed from them: convolutions, linear and recurrent layers, products of activations, and what
    # attention computes within, head by head. The rest stays as it is in the unpruned network. So a search for a budget
    # asks for the cost of thousands of widths without building any. Batch norms count as parameters. A channel that
    # several layers share is pruned when all of them lose it; one of a layer without an entry stays.
    def __init__(self, analysis: Analysis) -> None:
        model = analysis.model
        self._flow = flow = analysis.flow
        self._modules = modules = dict(model.named_modules())
        attention = {name: each for name, each in flow.attention.items() if not each.recurrent}
        with left_alone(model):
            call, self._samples, counted = counted_run(model, analysis.call, attention)
        sizes = layer_sizes(model, call)
        self._layers = dict[str, _LayerCost]()
        shared, known = first_names(model), set[str]()

        def is_new(name: str) -> bool:
            """Tell whether a parameter wasn't counted yet, under another name of it."""
            first = shared.get(name, name)
            found = first not in known
            known.add(first)
            return found

        for name in flow.layers:
            if name in sizes:  # embeddings compute nothing
                self._layers[name] = dataclasses.replace(
                    self._layer_cost(name, sizes[name]),
                    has_weight=is_new(f"{name}.{weight_name(modules[name])}"),
                    has_bias=is_new(f"{name}.{row_names(modules[name])[-1]}"),
                )
        self._norms = dict[str, tuple[IntArray, int]]()  # the channels that enter, and the parameters of each
        for name, module in modules.items():
            entering = flow.entering_group_ids(name)
            if isinstance(module, NORMS) and module.affine and len(entering):
                self._norms[name] = entering, is_new(f"{name}.weight") + is_new(f"{name}.bias")
        nothing = np.zeros(flow.size, dtype=np.bool_)
        # What attention modules compute between their layers, and the channels of the heads' values.
        self._attention = list[tuple[IntArray, int]]()
        for name, each in attention.items():
            layer, channels = each.outputs
            if layer in self._layers and name in counted.within:
                own = [cost for at, cost in self._layers.items() if at == name or at.startswith(f"{name}.")]
                between = counted.within[name] - sum(cost(nothing)[0] for cost in own)
                self._attention.append((flow.group_ids_of(layer)[channels.ravel()], between))
        times = 1 if call is analysis.call else batch_size(analysis.call)
        self._products = products_of(flow.traced.graph, flow, times)
        # Of everything else, which isn't pruned: multiply-accumulates of the call that was counted, and parameters.
        self._rest = 0, 0
        macs, params, _ = self._counts(nothing)
        self._rest = counted.all - macs, sum(parameter.numel() for parameter in model.parameters()) - params
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
            bias=biases,
        )

    def __call__(self, kept: Kept) -> Cost:
        """Count the cost with the ``kept`` channels of layers; a layer without an entry keeps all."""
        macs, params, values = self._counts(~self._flow.kept(kept))
        return Cost(macs // self._samples, params, self._bytes * (params + values // self._samples))

    def _counts(self, pruned: BoolArray) -> tuple[int, int, int]:
        """Count multiply-accumulates, parameters and the values of the largest layer; ``pruned``: by group id."""
        (macs, params), largest = self._rest, 0
        for cost in self._layers.values():
            more, own, values = cost(pruned)
            macs, params, largest = macs + more, params + own, max(largest, values)
        for group_ids, between in self._attention:
            macs += between * _count_kept(group_ids, pruned) // len(group_ids)
        macs += sum(each.count(pruned) for each in self._products)
        for group_ids, parameters in self._norms.values():
            params += parameters * _count_kept(group_ids, pruned)
        return macs, params, largest

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


def cost_of(kind: str, model: torch.nn.Module, example_inputs: Any) -> int:
    """Count the multiply-accumulates (``flops``), ``params`` or bytes (``memory``) of a network as it is."""
    if kind == "flops":
        return count_macs(model, example_inputs)
    if kind == "params":
        return count_params(model)
    return NetworkCost.on(model, example_inputs)({}).memory


def _positions(module: Any, size: Size) -> int:
    """Count the positions in a layer's input or output, those of all samples."""
    last = isinstance(module, (torch.nn.Linear, torch.nn.MultiheadAttention, *RECURRENT))
    return math.prod(size) // size[-1 if last else 1]


def _count_kept(group_ids: IntArray, pruned: BoolArray) -> int:
    """Count the kept channels among some, given by group id which are pruned."""
    return len(group_ids) - int(np.count_nonzero(pruned[group_ids]))
