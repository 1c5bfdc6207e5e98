"""Layers of a masked network that compute only channels that aren't zero; their weights keep their sizes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from nni_topo.network.layers.kinds import CONVOLUTIONS
from nni_topo.recovery.samples import Task

_WORTH = 0.9  # of the weights to compute at most: taking channels out and putting them back takes time, too


class _Thin:
    """What a layer reads and puts out of its channels, of which the others are zero."""

    computes_as_base = True
    ins: Tensor
    outs: Tensor
    weight: Tensor
    bias: Any

    def kept(self, values: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Take out the channels that are read, with their weights and biases."""
        weight = self.weight.index_select(0, self.outs).index_select(1, self.ins)
        bias = None if self.bias is None else self.bias.index_select(0, self.outs)
        return values.index_select(dim, self.ins), weight, bias

    def spread(self, values: Tensor, dim: int) -> Tensor:
        """Put the channels that were computed among zeros."""
        shape = list(values.shape)
        shape[dim] = len(self.weight)
        return values.new_zeros(shape).index_copy_(dim, self.outs, values)


class _ThinLinear(_Thin, nn.Linear):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return self.spread(functional.linear(*self.kept(input, -1)), -1)


def _thin(kind: type[nn.Module]) -> type[nn.Module]:
    def forward(self: Any, input: Tensor) -> Tensor:  # noqa: A002
        dim = input.dim() - len(self.kernel_size) - 1
        spread: Tensor = self.spread(self._conv_forward(*self.kept(input, dim)), dim)
        return spread

    return type(f"_Thin{kind.__name__}", (_Thin, kind), {"forward": forward})


_KINDS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: _ThinLinear} | {kind: _thin(kind) for kind in CONVOLUTIONS}


def thin_out(model: nn.Module, tasks: Iterable[Task]) -> None:
    """Make layers skip, in place, the channels of which all weights are zero and that no task is going to change."""
    changed: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for task in tasks:
        changed.setdefault(task.layer.name, []).append((task.layer.columns.flatten(), task.layer.rows.flatten()))
    for name, module in model.named_modules():
        kind: Any = _KINDS.get(type(module))
        if kind is None or getattr(module, "groups", 1) > 1:
            continue
        layer: Any = module
        used = layer.weight.detach().ne(0)
        outs, ins = used.flatten(1).any(1), used.transpose(0, 1).flatten(1).any(1)
        if layer.bias is not None:
            outs |= layer.bias.detach().ne(0)
        for columns, rows in changed.get(name, []):
            ins[columns.to(ins.device)] = True
            outs[rows.to(outs.device)] = True
        if 0 < int(ins.sum()) * int(outs.sum()) <= _WORTH * ins.numel() * outs.numel():
            layer.ins, layer.outs = ins.nonzero().flatten(), outs.nonzero().flatten()
            layer.__class__ = kind
