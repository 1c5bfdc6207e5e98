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
    """A layer that computes some of its outputs from some of its inputs; the others are zero."""

    computes_as_base = True

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        layer: Any = self
        is_linear = isinstance(self, nn.Linear)
        dim = -1 if is_linear else input.dim() - len(layer.kernel_size) - 1
        weight = layer.weight.index_select(0, layer.outs).index_select(1, layer.ins)
        bias = None if layer.bias is None else layer.bias.index_select(0, layer.outs)
        apply = functional.linear if is_linear else layer._conv_forward
        computed: Tensor = apply(input.index_select(dim, layer.ins), weight, bias)
        shape = list(computed.shape)
        shape[dim] = len(layer.weight)
        return computed.new_zeros(shape).index_copy_(dim, layer.outs, computed)


_KINDS = {kind: type(f"_Thin{kind.__name__}", (_Thin, kind), {}) for kind in (nn.Linear, *CONVOLUTIONS)}


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
