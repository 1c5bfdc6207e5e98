"""Samples of a layer: the input patches and outputs of its positions, as rows of matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nni_topo.speedup.layers import CONVOLUTIONS


def is_pointwise(module: nn.Module) -> bool:
    """Say whether a layer works on the last dimension, as a linear layer does."""
    return isinstance(module, nn.Linear)


def position_count(module: nn.Module, outputs: Tensor) -> int:
    """Return how many positions each entry of a layer's output has."""
    shape = outputs.shape[1:-1] if is_pointwise(module) else outputs.shape[2:]
    return int(torch.Size(shape).numel())


def input_rows(module: Any, inputs: Tensor, columns: Tensor, positions: Tensor) -> Tensor:
    """Return what enters a layer at some positions of its output.

    Parameters
    ----------
    module : torch.nn.Conv1d, Conv2d, Conv3d or Linear
        The layer.
    inputs : Tensor, shape (n, channels, ...) or (n, ..., features)
        Its input.
    columns : Tensor of int, shape (groups, d)
        Input channels of each group.
    positions : Tensor of int, shape (n, p)
        Flat indices of output positions, for each entry.

    Returns
    -------
    Tensor, shape (groups, n * p, d * kernel elements)
        In the order of the layer's weight: channels, then kernel.
    """
    groups = columns.shape[0]
    entries = torch.arange(len(inputs), device=inputs.device)[:, None]
    if is_pointwise(module):
        flat = inputs.reshape(len(inputs), -1, inputs.shape[-1])[entries, positions]
        return flat.flatten(0, 1)[:, columns].transpose(0, 1)
    windows = _windows(module, inputs[:, columns.flatten()])
    dims = len(module.kernel_size)
    places = torch.unravel_index(positions, windows.shape[2 : 2 + dims])
    at: tuple[Any, ...] = (entries, slice(None), *places)
    rows = windows[at].flatten(0, 1)
    return rows.reshape(len(rows), groups, -1).transpose(0, 1)


def output_rows(module: nn.Module, outputs: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    """Return a layer's outputs at some positions.

    Parameters
    ----------
    module : torch.nn.Module
        The layer.
    outputs : Tensor, shape (n, channels, ...) or (n, ..., features)
        Its output, or anything of this shape.
    rows : Tensor of int, shape (groups, o)
        Output channels of each group.
    positions : Tensor of int, shape (n, p)
        Flat indices of positions, for each entry.

    Returns
    -------
    Tensor, shape (groups, n * p, o)
        The values.
    """
    last = outputs if is_pointwise(module) else outputs.movedim(1, -1)
    flat = last.reshape(len(last), -1, last.shape[-1])
    entries = torch.arange(len(flat), device=flat.device)[:, None]
    return flat[entries, positions].flatten(0, 1)[:, rows].transpose(0, 1)


def draw_positions(count: int, entries: int, wanted: int, generator: torch.Generator) -> Tensor:
    """Draw positions evenly spread over each entry, one from each of ``wanted`` equal stretches.

    Returns
    -------
    Tensor of int, shape (entries, min(wanted, count))
        Ascending in each row, no position twice.
    """
    if wanted >= count:
        return torch.arange(count).expand(entries, count)
    jitter = torch.rand(entries, wanted, generator=generator, dtype=torch.float64)
    edges = torch.arange(wanted + 1, dtype=torch.float64) * count / wanted
    low, high = edges[:-1].ceil(), edges[1:].ceil()
    return (low + (jitter * (high - low)).floor()).long()


def _windows(module: Any, inputs: Tensor) -> Tensor:
    """Return a view ``(n, channels, *output size, *kernel size)`` of a convolution's input."""
    if not isinstance(module, CONVOLUTIONS):
        raise TypeError(f"windows need a convolution, got {type(module).__name__}")
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    windows = functional.pad(inputs, module._reversed_padding_repeated_twice, mode=mode)
    for dim, (kernel, stride, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True), start=2
    ):
        windows = windows.unfold(dim, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    return windows
