"""Costs of a network at given widths, without building it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import Graph, Node

from nni_topo.network.channels.flow import ChannelFlow
from nni_topo.network.channels.ids import FIXED
from nni_topo.network.channels.rules import letters_of, operation_name
from nni_topo.network.cost.measure import count_macs, count_params, counted_run
from nni_topo.network.graph.nodes import tensor_shape
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
from nni_topo.network.speedup.reconcile import even_out
from nni_topo.sharing import first_names

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
Kept = Mapping[str, BoolArray]
"""Masks of kept output channels, or heads, by layer name; masks of an output projection's columns are ignored."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of one sample: multiply-accumulates, number of parameters, bytes."""

    macs: int
    params: int
    memory: int  # bytes of the parameters, and of the layer with the largest sum of input and output


@dataclasses.dataclass(frozen=True)
class _LayerCost:
    entering: IntArray
    leaving: IntArray
    groups: int
    kernel: int
    positions: int
    entering_positions: int
    leaving_positions: int
    bias: int  # number of bias vectors
    has_weight: bool = True  # False if another layer counts the same weight
    has_bias: bool = True

    def __call__(self, pruned: BoolArray) -> tuple[int, int, int]:
        """Count multiply-accumulates of all calls, parameters, and input and output values of one call.

        ``pruned``: by group id. Parameters that another layer counts are left out.
        """
        entering, leaving = _count_kept(self.entering, pruned), _count_kept(self.leaving, pruned)
        # A depth-wise convolution loses groups with its channels: each channel keeps one input.
        depthwise = self.groups == len(self.entering) > 1
        inputs = 1 if depthwise else entering // self.groups
        products = leaving * inputs * self.kernel
        params = products * self.has_weight + leaving * self.bias * self.has_bias
        values = entering * self.entering_positions + leaving * self.leaving_positions
        return products * self.positions, params, values


class NetworkCost:
    """Count a network's cost from the channels that are kept."""

    @classmethod
    def on(cls, model: torch.nn.Module, example_inputs: Any) -> NetworkCost:
        """Analyse a model with example inputs in any container."""
        return cls(Analysis.on(model, example_inputs))

    # The unpruned network is counted once, as `count_macs` does. The part that depends on the kept channels is computed
    # from them: convolutions, linear and recurrent layers, products of activations, and attention between its layers,
    # head by head. The rest stays as in the unpruned network. So a search for a budget gets the cost of thousands of
    # widths without building networks. Batch norms count as parameters only. A channel that several layers share is
    # pruned if all of them lose it; a layer without an entry keeps all channels.
    def __init__(self, analysis: Analysis) -> None:
        model = analysis.model
        self._flow = flow = analysis.flow
        self._modules = modules = dict(model.named_modules())
        attention = {name: module for name, module in flow.attention.items() if not module.recurrent}
        with left_alone(model):
            call, self._samples, counted = counted_run(model, analysis.call, attention)
        sizes = layer_sizes(model, call)
        self._layers = dict[str, _LayerCost]()
        shared, counted_names = first_names(model), set[str]()

        def is_new(name: str) -> bool:
            """Tell whether a parameter wasn't counted yet under another name."""
            first = shared.get(name, name)
            is_first = first not in counted_names
            counted_names.add(first)
            return is_first

        for name in flow.layers:
            if name in sizes:  # embeddings compute nothing
                self._layers[name] = dataclasses.replace(
                    self._layer_cost(name, sizes[name]),
                    has_weight=is_new(f"{name}.{weight_name(modules[name])}"),
                    has_bias=is_new(f"{name}.{row_names(modules[name])[-1]}"),
                )
        self._norms = dict[str, tuple[IntArray, int]]()  # input channels, and parameters per channel
        for name, module in modules.items():
            entering = flow.entering_group_ids(name)
            if isinstance(module, NORMS) and module.affine and len(entering):
                self._norms[name] = entering, is_new(f"{name}.weight") + is_new(f"{name}.bias")
        nothing = np.zeros(flow.size, dtype=np.bool_)
        # Of attention modules, the channels of the heads' values, and multiply-accumulates between the layers.
        self._attention = list[tuple[IntArray, int]]()
        for name, heads in attention.items():
            layer, channels = heads.outputs
            if layer in self._layers and name in counted.within:
                inner_costs = [cost for at, cost in self._layers.items() if at == name or at.startswith(f"{name}.")]
                between = counted.within[name] - sum(cost(nothing)[0] for cost in inner_costs)
                self._attention.append((flow.group_ids_of(layer)[channels.ravel()], between))
        times = 1 if call is analysis.call else batch_size(analysis.call)
        self._products = products_of(flow.traced.graph, flow, times)
        # Multiply-accumulates of the counted call, and parameters, of everything that isn't pruned.
        self._rest = 0, 0
        macs, params, _ = self._counts(nothing)
        self._rest = counted.all - macs, sum(parameter.numel() for parameter in model.parameters()) - params
        self._bytes = max((parameter.element_size() for parameter in model.parameters()), default=4)

    def _layer_cost(self, name: str, calls: list[tuple[Size, Size]]) -> _LayerCost:
        flow, module = self._flow, self._modules[name]
        entering = [flow.entering_group_ids(name)]
        biases = int(has_bias(module))
        if is_recurrent(module):
            # In each direction, hidden units read the input and each other; further layers read the layer below.
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
            # A transposed convolution computes at its input positions, all other layers at their output positions.
            positions=sum(_positions(module, call[not isinstance(module, TRANSPOSED)]) for call in calls),
            entering_positions=max(_positions(module, entering) for entering, _ in calls),
            leaving_positions=max(_positions(module, leaving) for _, leaving in calls),
            bias=biases,
        )

    def __call__(self, kept: Kept) -> Cost:
        """Count the cost with the ``kept`` channels of layers; a layer without an entry keeps all."""
        macs, params, values = self._counts(self._pruned(kept))
        return Cost(macs // self._samples, params, self._bytes * (params + values // self._samples))

    def _pruned(self, kept: Kept) -> BoolArray:
        """Return the channels that a dense network lacks if layers keep these channels: by group id."""
        is_kept = self._flow.kept_groups(kept)
        even_out(self._flow, is_kept)
        return ~is_kept

    def _counts(self, pruned: BoolArray) -> tuple[int, int, int]:
        """Count multiply-accumulates, parameters and the values of the largest layer; ``pruned``: by group id."""
        (macs, params), largest = self._rest, 0
        for cost in self._layers.values():
            more, layer_params, values = cost(pruned)
            macs, params, largest = macs + more, params + layer_params, max(largest, values)
        for group_ids, between in self._attention:
            macs += between * _count_kept(group_ids, pruned) // len(group_ids)
        macs += sum(product.count(pruned) for product in self._products)
        for group_ids, parameters in self._norms.values():
            params += parameters * _count_kept(group_ids, pruned)
        return macs, params, largest

    def widths(self, kept: Kept) -> dict[str, tuple[int, int]]:
        """Count the kept (input, output) channels, or features, of each layer."""
        pruned = self._pruned(kept)
        widths = dict[str, tuple[int, int]]()
        for name, cost in self._layers.items():
            widths[name] = _count_kept(cost.entering, pruned), _count_kept(cost.leaving, pruned)
        return widths

    def masks(self, kept: Kept) -> dict[str, dict[str, torch.Tensor]]:
        """Return masks of the layers that lose channels."""
        pruned, masks = self._pruned(kept), {}
        for name, cost in self._layers.items():
            stays, module = torch.from_numpy(~pruned[cost.leaving]), self._modules[name]
            if not stays.all():
                masks[name] = {weight_name(module): spread(module, stays)}
                for row_name in row_names(module):
                    if isinstance(rows := getattr(module, row_name, None), torch.Tensor):
                        masks[name][row_name] = stays.to(rows).view(-1, *[1] * (rows.dim() - 1)).expand_as(rows)
        return masks


def cost_of(kind: str, model: torch.nn.Module, example_inputs: Any) -> int:
    """Count the multiply-accumulates (``flops``), ``params`` or bytes (``memory``) of a network, without pruning."""
    if kind == "flops":
        return count_macs(model, example_inputs)
    if kind == "params":
        return count_params(model)
    return NetworkCost.on(model, example_inputs)({}).memory


def _positions(module: Any, size: Size) -> int:
    """Count the positions in a layer's input or output, over all samples."""
    last = isinstance(module, (torch.nn.Linear, torch.nn.MultiheadAttention, *RECURRENT))
    return math.prod(size) // size[-1 if last else 1]


def _count_kept(group_ids: IntArray, pruned: BoolArray) -> int:
    """Count the kept channels of these group ids; ``pruned``: by group id."""
    return len(group_ids) - int(np.count_nonzero(pruned[group_ids]))


@dataclasses.dataclass(frozen=True)
class _Factor:
    """A factor of a product, its dimensions in the order of the matching dimensions of the other factor."""

    ids: Tensor  # channel ids; length 1 in dimensions where they don't differ
    shape: tuple[int, ...]

    def at(self, *dims: int | None) -> _Factor:
        """Return the factor with its dimensions in a new order; None stands for a new one of length 1."""
        order = [d for d in dims if d is not None]
        ids, shape = self.ids.permute(order), iter(self.shape[d] for d in order)
        for place, d in enumerate(dims):
            if d is None:
                ids = ids.unsqueeze(place)
        sizes = [1 if d is None else next(shape) for d in dims]
        return _Factor(ids, tuple(sizes))


class Product:
    """The products of two factors, one for each entry of their broadcast shape.

    A product is computed unless one of its factors is pruned. ``times``: as in `products_of`.
    """

    def __init__(self, first: _Factor, second: _Factor, flow: ChannelFlow, times: int) -> None:
        longest = max(len(first.shape), len(second.shape))
        self._group_ids, shapes = list[IntArray](), list[tuple[int, ...]]()
        for factor in (first, second):
            missing = longest - len(factor.shape)
            shapes.append((1,) * missing + factor.shape)
            self._group_ids.append(flow.group_ids(factor.ids[(None,) * missing].numpy()))
        self._shape, self._times = tuple(map(max, *shapes)), times
        self.depends = any(ids.any() for ids in self._group_ids)  # whether on prunable channels

    def count(self, pruned: BoolArray) -> int:
        """Count the products that aren't pruned; ``pruned``: bool, by group id."""
        first, second = self._group_ids
        both: BoolArray = ~pruned[first] & ~pruned[second]
        # A dimension of length 1 in `both` holds no channels: its one entry stands for all.
        places: int = math.prod(size for size, length in zip(self._shape, both.shape, strict=True) if length == 1)
        return int(np.count_nonzero(both)) * places // self._times


# Positions and names of the arguments of an operation that are the two factors.
_FIRST, _SECOND = (0, "input"), (1, "other", "mat2", "tensor2")
_FACTORS: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    **dict.fromkeys(("matmul", "imatmul", "bmm", "mm"), (_FIRST, _SECOND)),
    "rmatmul": ((1,), (0,)),
    **dict.fromkeys(("baddbmm", "addmm"), ((1, "batch1", "mat1"), (2, "batch2", "mat2"))),
    "linear": (_FIRST, (1, "weight")),  # with a weight, (outputs, inputs), that no layer holds
}


def products_of(graph: Graph, flow: ChannelFlow, times: int) -> list[Product]:
    """List the products of two tensors outside of layers, if they depend on channels that can be pruned.

    ``times``: number of samples of the recorded call, divided by the number of samples to count.
    """
    products = list[Product]()

    def factor(node: Any) -> _Factor | None:
        """Return a tensor of the graph as a factor; None if its ids aren't known."""
        if not isinstance(node, Node):
            return None
        ids, shape = flow.ids.get(node.name), tensor_shape(node)
        if shape is None or not isinstance(ids, Tensor) or ids.dim() != len(shape):
            return None
        return _Factor(ids, shape)

    def argument(node: Node, at: int, *names: str) -> _Factor | None:
        """Look up a factor by one of its names, else by its position."""
        named = [node.kwargs[name] for name in names if name in node.kwargs]
        if named:
            return factor(named[0])
        if len(node.args) > at:
            return factor(node.args[at])
        return None

    def multiply(first: _Factor | None, second: _Factor | None) -> None:
        """Note the product of two matrices, or of batches of them: (..., rows, summed, columns)."""
        if first is not None and second is not None and min(len(first.shape), len(second.shape)) >= 2:
            rows, columns = first.at(*range(len(first.shape)), None), len(second.shape) - 2
            products.append(Product(rows, second.at(*range(columns), None, -2, -1), flow, times))

    for node in graph.nodes:
        name = operation_name(node) if node.op in ("call_function", "call_method") else ""
        if name in _FACTORS:
            first, second = (argument(node, *places) for places in _FACTORS[name])
            if name == "linear" and second is not None:
                second = second.at(1, 0) if len(second.shape) == 2 else None
            multiply(first, second)
        elif name == "scaled_dot_product_attention":
            query, key, value = argument(node, 0, "query"), argument(node, 1, "key"), argument(node, 2, "value")
            if query is not None and key is not None and value is not None:
                multiply(query, key.at(*range(len(key.shape) - 2), -1, -2))
                shape = (*query.shape[:-1], key.shape[-2])
                multiply(_Factor(torch.full((1,) * len(shape), FIXED), shape), value)
        elif name in ("einsum", "tensordot", "inner", "outer"):
            operands = node.args[1:] if name == "einsum" else node.args[:2]
            if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
                operands = operands[0]
            factors = [tensor for tensor in map(factor, operands) if tensor is not None]
            if len(operands) != 2 or len(factors) != 2:
                continue  # products of three or more factors count as not pruned
            read = letters_of(node, [tensor.shape for tensor in factors])
            if read is not None:
                letters = list(dict.fromkeys("".join(read[0])))
                placed = []
                for tensor, tensor_letters in zip(factors, read[0], strict=True):
                    dims = [tensor_letters.index(letter) if letter in tensor_letters else None for letter in letters]
                    placed.append(tensor.at(*dims))
                products.append(Product(placed[0], placed[1], flow, times))
    return [product for product in products if product.depends]
