"""The sizes at which a model's layers run, and the graphs that convolutions have there."""

from __future__ import annotations

from typing import Any

import torch

from nni_topo.errors import ConfigError
from nni_topo.maths.topology.layer_graphs import LayerGraph, convolution_graph
from nni_topo.network.layers.derived import InnerCall, call_of
from nni_topo.network.runtime import evaluation_mode

Size = tuple[int, ...]
LayerSizes = dict[str, list[tuple[Size, Size]]]
"""``{layer: shapes that enter and leave it, call by call}``, of all layers that are called."""


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
