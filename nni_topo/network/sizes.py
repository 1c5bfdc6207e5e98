"""The sizes at which a model's convolutions run, and the graphs they have there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nni_topo.errors import ConfigError
from nni_topo.maths.topology.layer_graphs import LayerGraph, convolution_graph
from nni_topo.network.inputs import call_arguments
from nni_topo.network.layers import CONVOLUTIONS
from nni_topo.network.modes import evaluation_mode

Size = tuple[int, ...]


def convolution_sizes(model: nn.Module, example_inputs: Any) -> dict[str, tuple[Size, Size]]:
    """Note the input and output size, in pixels, of every convolution that a model reaches, at its first call."""
    args, kwargs = call_arguments(example_inputs, model)
    sizes: dict[str, tuple[Size, Size]] = {}

    def noting(name: str) -> Any:
        def note(module: Any, inputs: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> None:
            count = len(module.kernel_size)
            entering = next(iter((*inputs, *named.values())))
            sizes.setdefault(name, (tuple(entering.shape[-count:]), tuple(output.shape[-count:])))

        return note

    handles = [
        module.register_forward_hook(noting(name), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, CONVOLUTIONS)
    ]
    try:
        with evaluation_mode(model), torch.no_grad():
            model(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError, LookupError, AssertionError) as error:
        raise ConfigError(f"example_inputs must be ones that the model runs on, got: {error} (forward)") from error
    finally:
        for handle in handles:
            handle.remove()
    return sizes


def padded_size(module: Any, input_size: Size) -> Size:
    """Return the size of a convolution's input with its padding, ``"same"`` padding included."""
    if isinstance(module.padding, str):
        # torch keeps the padding of "same" from the last dimension to the first, both sides of each.
        sides = list(module._reversed_padding_repeated_twice)
        added = [sides[i] + sides[i + 1] for i in range(len(sides) - 2, -1, -2)]
    else:
        added = [2 * pad for pad in module.padding]
    return tuple(length + more for length, more in zip(input_size, added, strict=True))


def graph_of_convolution(module: Any, input_size: Size) -> LayerGraph:
    """Return the graph of a convolution's Toeplitz matrix; its input's size is without padding."""
    return convolution_graph(
        (module.out_channels, module.in_channels // module.groups, *module.kernel_size),
        padded_size(module, input_size),
        stride=module.stride,
        dilation=module.dilation,
        groups=module.groups,
    )
