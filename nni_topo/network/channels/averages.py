"""Means and maxima over channels within a forward, as in CBAM's spatial attention.

A removed channel adds zero to a sum over channels, but it counts in the mean: over k of n channels the mean is n / k
times as large. If layers read the mean as one of their input channels, their weights are multiplied by k / n, and the
dense model computes what the masked one does. The maximum over channels without negative values doesn't depend on
channels of zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn
from torch.fx import Node

from nni_topo.network.graph.nodes import plain_name, tensor_shape
from nni_topo.network.layers.kinds import CONVOLUTIONS

# Elementwise operations and modules whose results are never negative.
_NOT_NEGATIVE = {"relu", "relu6", "sigmoid", "hardsigmoid", "softmax", "abs", "square", "exp", "softplus"}
_NOT_NEGATIVE_MODULES = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Hardsigmoid, nn.Softmax, nn.Softplus)
# Operations whose results aren't negative if none of their tensors has negative values.
_KEEP_SIGN = {
    "mul", "add", "iadd", "imul", "cat", "concat", "stack", "getitem", "view", "reshape", "flatten", "permute",
    "transpose", "contiguous", "unsqueeze", "squeeze", "expand", "expand_as", "clone", "detach", "float", "dropout",
    "mean", "sum", "amax", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d",
}  # fmt: skip
_KEEP_SIGN_MODULES = (nn.Dropout, nn.Dropout2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


@dataclass
class Average:
    """A mean over channels."""

    ids: np.ndarray  # the channels: int, (channels,)
    nodes: set[str] = field(default_factory=set)  # the mean and the nodes that only pass it on
    columns: list[tuple[str, int]] = field(default_factory=list)  # the layers that read it, each with its input channel


def is_not_negative(value: Any, module_of: Callable[[str], Any]) -> bool:
    """Tell whether a value in a graph is a number or tensor without negative entries, whatever the weights."""
    if not isinstance(value, Node):
        return isinstance(value, (int, float)) and value >= 0
    if value.op == "call_module":
        module = module_of(str(value.target))
        keeps_sign = isinstance(module, _KEEP_SIGN_MODULES) and is_not_negative(value.args[0], module_of)
        return isinstance(module, _NOT_NEGATIVE_MODULES) or keeps_sign
    name = plain_name(value)
    if value.op not in ("call_function", "call_method") or "alpha" in value.kwargs:  # a factor of what is added
        return False
    if name in _NOT_NEGATIVE:
        return True
    if name not in _KEEP_SIGN:
        return False
    # Of these operations only sums and products compute with numbers.
    numbers = [
        argument
        for argument in value.args[1:]
        if name in ("mul", "add", "iadd", "imul") and not isinstance(argument, Node)
    ]
    return all(is_not_negative(operand, module_of) for operand in (*_tensors(value), *numbers))


def _tensors(node: Node) -> list[Node]:
    """List the nodes of tensors, not of sizes, that a node reads."""
    return [parent for parent in node.all_input_nodes if "tensor_meta" in parent.meta]


def average_of(mean: Node, dim: int, ids: np.ndarray, module_of: Callable[[str], Any]) -> Average | None:
    """Find the layers that read a mean over channels as one input channel; None if anything else reads it.

    ``dim``: the dimension of the mean's input over which the mean is.
    """
    average, before = Average(ids), mean.all_input_nodes[0]
    has_dim = len(tensor_shape(mean) or ()) == len(tensor_shape(before) or ())
    # Each node with the dimension and the place of the mean in its tensor; no dimension before `unsqueeze` or `stack`.
    waiting: list[tuple[Node, int | None, int]] = [(mean, dim if has_dim else None, 0)]
    for node, at, place in waiting:
        average.nodes.add(node.name)
        for user in node.users:
            name, shape = plain_name(user), tensor_shape(user) or ()
            dim_argument: Any = user.kwargs.get("dim", user.args[1] if len(user.args) > 1 else 0)
            if user.op == "call_module":
                module: Any = module_of(str(user.target))
                calls = sum(call.op == "call_module" and call.target == user.target for call in mean.graph.nodes)
                is_plain = type(module) in CONVOLUTIONS and module.groups == 1 and "weight" in module._parameters
                if calls != 1 or not is_plain or at != 1:
                    return None
                average.columns.append((str(user.target), place))
            elif name == "size":
                continue
            elif name in ("cat", "concat", "stack") and isinstance(dim_argument, int) and shape:
                parts: Any = user.args[0]
                along = dim_argument % len(shape)
                if not isinstance(parts, (tuple, list)) or (at is None) != (name == "stack"):
                    return None
                if name != "stack" and at != along:
                    return None
                sizes = [1] * len(parts)
                if name != "stack":
                    sizes = [(tensor_shape(part) or ())[along] for part in parts]
                for index, part in enumerate(parts):
                    if part is node:
                        waiting.append((user, along, sum(sizes[:index]) + place))
            elif name == "unsqueeze" and isinstance(dim_argument, int) and at is None:
                waiting.append((user, dim_argument % len(shape), 0))
            elif name in ("contiguous", "clone", "float") and len(user.all_input_nodes) == 1:
                waiting.append((user, at, place))
            else:
                return None
    if average.columns:
        return average
    return None
