"""Responses of single layers to a plane: the sizes of their inputs, and the energy of each filter's answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nni_topo.errors import ConfigError
from nni_topo.network.layers import TRANSPOSED
from nni_topo.network.network import Network
from nni_topo.network.sizes import padding_of

# Values of one turn of filters: 128 MiB of float64.
_MOST_VALUES = 2**24
_CONVOLVE: dict[int, Callable[..., Tensor]] = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_TRANSPOSE: dict[int, Callable[..., Tensor]] = {
    1: functional.conv_transpose1d,
    2: functional.conv_transpose2d,
    3: functional.conv_transpose3d,
}


def input_sizes(model: nn.Module, names: Sequence[str], example_inputs: Any) -> dict[str, tuple[int, ...]]:
    """Return by name the spatial sizes that enter convolutions; ConfigError if unknown or, padded, below the kernel."""
    if example_inputs is None:
        raise ConfigError(f"the input size of a layer must be known, got no example_inputs ({names[0]})")
    planes = Network.on(model, example_inputs).planes
    for name in names:
        if name not in planes:
            raise ConfigError(f"the input size of a layer must be known, got example_inputs that miss it ({name})")
    return {name: planes[name][0] for name in names}


def chirp_response_energy(module: nn.Module, weight: Tensor, bias: Tensor | None, plane: Tensor) -> tuple[Tensor, int]:
    """Return each filter's mean squared response, float64 ``(out,)``, to a plane in all channels, and the positions."""
    # With x in every input channel, sum_c(w_c * x) is sum_c(w_c) * x: one channel's cost, whatever the layer's width.
    kernels = _summed_kernels(module, weight)
    offset = kernels.new_zeros(len(kernels)) if bias is None else bias.double()
    planes = plane.to(kernels.device)[None, None]
    positions = _respond(module, kernels[:1], planes)[0, 0].numel()
    turn = max(1, _MOST_VALUES // max(positions, plane.numel()))
    energies = [
        (_respond(module, part, planes)[0].flatten(1) + shift[:, None]).pow(2).mean(1)
        for part, shift in zip(kernels.split(turn), offset.split(turn), strict=True)
    ]
    return torch.cat(energies), positions


def _summed_kernels(module: nn.Module, weight: Tensor) -> Tensor:
    """Sum each filter's kernels over its input channels: shape ``(out_channels, 1, *kernel)``, float64."""
    # Groups need no care here: each filter holds the kernels of those channels alone that it reads.
    if not isinstance(module, TRANSPOSED):
        return weight.sum(1, keepdim=True, dtype=torch.float64)
    # ``(in, out / groups, ...)``: the input channels are summed within each group, outputs follow group by group.
    kernels: Tensor = weight.unflatten(0, (int(module.groups), -1)).sum(1, dtype=torch.float64)
    return kernels.flatten(0, 1)[:, None]


def _respond(module: Any, kernels: Tensor, planes: Tensor) -> Tensor:
    """Convolve one plane, shape ``(1, 1, ...)``, with kernels ``(n, 1, ...)`` as a layer does."""
    dimensions = _dimensions(module)
    if isinstance(module, TRANSPOSED):
        settings = {"padding": module.padding, "output_padding": module.output_padding}
        # PyTorch wants (in, out, ...) of a transposed kernel, and there is one input channel.
        convolve, kernels = _TRANSPOSE[dimensions], kernels.transpose(0, 1)
    else:
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        # Padded by hand, as the layer itself does for modes other than zeros; pad() counts axes from the last.
        planes = functional.pad(planes, [side for pair in reversed(padding_of(module)) for side in pair], mode=mode)
        settings, convolve = {}, _CONVOLVE[dimensions]
    response: Tensor = convolve(planes, kernels, stride=module.stride, dilation=module.dilation, **settings)
    return response


def _dimensions(module: Any) -> int:
    return len(module.kernel_size)
