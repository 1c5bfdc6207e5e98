"""Recurrent layers as ONNX's operators for any number of steps: PyTorch's exporter takes one number alone."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_GATES = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}
"""PyTorch's gates in ONNX's order: input, output, forget, cell; update, reset, new."""


@contextmanager
def recurrent_operators(net: nn.Module) -> Iterator[None]:
    """Let recurrent layers return the results of ONNX's operators while a network is exported.

    The results are zeros of the right shapes: PyTorch's exporter writes the operator, and onnxruntime computes it.
    """
    layers = [each for each in net.modules() if type(each) in (nn.LSTM, nn.GRU, nn.RNN) and not each.proj_size]
    for layer in layers:
        layer.forward = functools.partial(_run, layer, layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _run(layer: Any, forward: Any, sequence: Any, hx: Any = None) -> Any:
    """Add a layer's levels to the graph; sequences of samples of other lengths are left to PyTorch."""
    if not isinstance(sequence, Tensor) or sequence.dim() != 3:
        return forward(sequence, hx)
    x = sequence.transpose(0, 1) if layer.batch_first else sequence
    directions = 1 + layer.bidirectional
    initial = () if hx is None else hx if isinstance(hx, (tuple, list)) else (hx,)
    last = list[tuple[Tensor, ...]]()
    for level in range(layer.num_layers):
        places = slice(level * directions, (level + 1) * directions)
        x, *states = _level(layer, level, x, [state[places] for state in initial])
        last.append(tuple(states))
    joined = tuple(torch.cat(states) for states in zip(*last, strict=True))
    outputs = x.transpose(0, 1) if layer.batch_first else x
    return outputs, joined if layer.mode == "LSTM" else joined[0]


def _level(layer: Any, level: int, x: Tensor, initial: list[Tensor]) -> tuple[Tensor, ...]:
    """Add one level, (steps, samples, features), in all of its directions; return its outputs and last states."""
    kind, ends = type(layer).__name__, ("", "_reverse")[: 1 + layer.bidirectional]

    def stacked(name: str) -> Tensor:
        of_directions = [getattr(layer, f"{name}_l{level}{end}").chunk(len(_GATES[kind])) for end in ends]
        return torch.stack([torch.cat([gates[gate] for gate in _GATES[kind]]) for gates in of_directions])

    bias = torch.cat([stacked("bias_ih"), stacked("bias_hh")], 1) if layer.bias else None
    attributes: dict[str, Any] = {
        "hidden_size": layer.hidden_size,
        "direction": "bidirectional" if layer.bidirectional else "forward",
    }
    if kind == "GRU":
        attributes["linear_before_reset"] = 1
    if kind == "RNN":
        attributes["activations"] = [layer.nonlinearity.capitalize()] * len(ends)
    steps, samples, units, directions = x.shape[0], x.shape[1], layer.hidden_size, len(ends)
    states = 2 if kind == "LSTM" else 1
    outputs, *last = torch.onnx.ops.symbolic_multi_out(
        kind,
        (x, stacked("weight_ih"), stacked("weight_hh"), bias, None, *initial),
        attributes,
        dtypes=[x.dtype] * (1 + states),
        shapes=[(steps, directions, samples, units), *[(directions, samples, units)] * states],
    )
    return outputs.transpose(1, 2).flatten(2), *last
