"""Responses of single layers to a plane: the sizes of their inputs, and the energy of each filter's answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nni_topo.errors import ConfigError
from nni_topo.network.layers.derived import call_of, inner_of
from nni_topo.network.layers.kinds import CONVOLUTIONS, TRANSPOSED
from nni_topo.network.speedup.analysis import Analysis


def input_sizes(model: nn.Module, names: Sequence[str], example_inputs: Any) -> dict[str, tuple[int, ...]]:
    """Return by name the spatial sizes that enter convolutions; ConfigError if unknown or, padded, below the kernel."""
    if example_inputs is None:
        raise ConfigError(
            "a layer's input size must be known, from example_inputs or an evaluator that has a dummy_input or "
            f"evaluates, got neither ({names[0]})"
        )
    planes = Analysis.on(model, example_inputs).planes
    for name in names:
        if name not in planes:
            raise ConfigError(f"the input size of a layer must be known, got example_inputs that miss it ({name})")
    return {name: planes[name][0] for name in names}


def chirp_response_energy(
    module: nn.Module, weight: Tensor, bias: Tensor | None, planes: Tensor, *, separate: bool = False, most: int = 2**24
) -> tuple[Tensor, int]:
    """Return each filter's mean squared response, float64 ``(out,)``, to planes ``(n, ...)``, and the positions.

    Each plane enters all input channels at once, or, ``separate``, one after the other: then their energies add up.
    Filters are taken in turns of at most so many values, 128 MiB of float64.
    """
    # Each filter's kernels for the input channels that it reads: ``(out, in / groups, *kernel)``.
    every = weight.double()
    if isinstance(module, TRANSPOSED):
        # ``(in, out / groups, ...)``: outputs follow group by group.
        every = every.unflatten(0, (int(module.groups), -1)).transpose(1, 2).flatten(0, 1)
    # With x in every input channel, sum_c(w_c * x) is sum_c(w_c) * x: one channel's cost, whatever the layer's width.
    kernels = (every.flatten(0, 1) if separate else every.sum(1))[:, None]
    constant = every.new_zeros(len(every)) if bias is None else bias.double()
    offset = kernels.new_zeros(len(kernels)) if separate else constant
    energies = []
    for plane in planes:
        entering = plane.to(kernels.device)[None, None]
        positions = _respond(module, kernels[:1], entering)[0, 0].numel()  # as many for each plane
        turn = max(1, most // max(positions, plane.numel()))
        in_turns = []
        for part, shift in zip(kernels.split(turn), offset.split(turn), strict=True):
            in_turns.append((_respond(module, part, entering)[0].flatten(1) + shift[:, None]).pow(2).mean(1))
        energy = torch.cat(in_turns)
        energies.append(energy.reshape(len(every), -1).sum(1) + constant.pow(2) if separate else energy)
    return torch.stack(energies).mean(0), positions


def _respond(module: nn.Module, kernels: Tensor, planes: Tensor) -> Tensor:
    """Convolve one plane, shape ``(1, 1, ...)``, with kernels ``(n, 1, ...)`` as a layer does."""
    # PyTorch wants (in, out, ...) of a transposed kernel, and there is one input channel.
    weight = kernels.transpose(0, 1) if isinstance(module, TRANSPOSED) else kernels
    if inner_of(module) is not None:
        # What its class does before it convolves is done to all channels alike.
        call = call_of(module, planes.expand(-1, int(module.in_channels), *planes.shape[2:]))  # type: ignore[arg-type]
        entering = call.entering[:, :1]
        return replace(call, given={**call.given, "input": entering, "weight": weight, "bias": None, "groups": 1}).run()
    # A layer of PyTorch's own class and with its own forward: NNI puts another in its place while a layer is wrapped.
    kind: Any = next(kind for kind in (*CONVOLUTIONS, *TRANSPOSED) if isinstance(module, kind))
    layer = kind.__new__(kind)
    vars(layer).update(vars(module), weight=weight, bias=None, groups=1)
    response: Tensor = kind.forward(layer, planes)
    return response
