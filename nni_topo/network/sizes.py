"""The sizes at which a model's layers run, and the graphs that convolutions have there."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nni_topo.errors import ConfigError
from nni_topo.maths.topology.layer_graphs import LayerGraph, convolution_graph
from nni_topo.network.capture import watched
from nni_topo.network.inner import InnerCall, call_of, has_own_forward, inner_of
from nni_topo.network.inputs import Call, tensors_of
from nni_topo.network.layers import CONVOLUTIONS, WEIGHTED
from nni_topo.network.modes import evaluation_mode
from nni_topo.network.transformers import mixing_called
from nni_topo.network.untouched import left_alone

Size = tuple[int, ...]
LayerSizes = dict[str, list[tuple[Size, Size]]]
"""``{layer: shapes that enter and leave it, call by call}``, of all layers that are called."""


def layer_sizes(model: nn.Module, call: Call) -> LayerSizes:
    """Note the shapes at which convolutions and linear layers run; ConfigError if the call doesn't fit the model."""
    sizes: LayerSizes = {}

    def note(name: str, entered: Any, left: Any) -> None:
        if not isinstance(entered, Tensor):
            return  # rows of several lengths, packed
        module: Any = model.get_submodule(name)
        attends, recurs = (isinstance(module, kind) for kind in (nn.MultiheadAttention, nn.RNNBase))
        leaving = (*entered.shape[:-1], 3 * entered.shape[-1]) if attends else tensors_of(left)[0].shape
        if inner_of(module) is not None:
            # What it goes on with behind its convolution has sizes of its own.
            call = call_of(module, entered)
            if isinstance(module, nn.Linear):
                leaving = (*entered.shape[:-1], module.out_features)
            else:
                leaving = (len(entered), module.out_channels, *call.output_size)
        pair = tuple(entered.shape), tuple(leaving)
        if recurs and not module.batch_first and entered.dim() == 3:
            pair = (pair[0][1::-1] + pair[0][2:], pair[1][1::-1] + pair[1][2:])
        sizes.setdefault(name, []).append(pair)

    def check(name: str, module: nn.Module, entered: Tensor) -> None:
        check_covers_kernel(name, call_of(module, entered))

    # Of attention: what makes queries, keys and values in one.
    kinds = (*WEIGHTED, nn.MultiheadAttention, nn.RNNBase)
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]
    hooks = watched(
        # What another class does to its input before it convolves is its own affair, and so is what it needs.
        [
            (module, partial(check, name, module))
            for name, module in layers
            if isinstance(module, CONVOLUTIONS) and not has_own_forward(module)
        ],
        [(module, partial(note, name)) for name, module in layers],
    )
    with left_alone(model), hooks, evaluation_mode(model), mixing_called(model), torch.no_grad():
        try:
            model(*call[0], **call[1])
        except (RuntimeError, TypeError, ValueError, LookupError, AssertionError) as error:
            raise ConfigError(f"example_inputs must be ones that the model runs on, got: {error} (forward)") from error
    return sizes


def spatial(module: Any, size: Size) -> Size:
    """Return the pixels of a convolution's input or output."""
    return size[-len(module.kernel_size) :]


def call_at(module: Any, input_size: Size) -> InnerCall:
    """Return how a convolution, of PyTorch's class or one derived from it, convolves an input of so many pixels."""
    with torch.no_grad(), evaluation_mode(module):
        return call_of(module, module.weight.new_zeros(1, module.in_channels, *input_size))


def padded_size(module: Any, input_size: Size) -> Size:
    """Return the size of what a convolution convolves, of an input of a size, with all padding."""
    return call_at(module, input_size).padded_size


def check_covers_kernel(name: str, call: InnerCall) -> None:
    """Raise a ConfigError unless a convolution's input, padding included, is as large as its kernel."""
    reach = tuple(d * (k - 1) + 1 for d, k in zip(call.dilation, call.kernel, strict=True))
    if any(have < need for have, need in zip(call.padded_size, reach, strict=True)):
        kernel, found = ("x".join(map(str, each)) for each in (reach, call.padded_size))
        raise ConfigError(
            f"an input, padding included, must be at least as large as the kernel {kernel}, got {found} ({name})"
        )


def graph_of_convolution(module: Any, input_size: Size) -> LayerGraph:
    """Return the graph of a convolution's Toeplitz matrix; its input's size is without padding."""
    call = call_at(module, input_size)
    return convolution_graph(
        tuple(call.weight.shape), call.padded_size, stride=call.stride, dilation=call.dilation, groups=call.groups
    )
