"""Layers whose forward computes the weight that they convolve with, as weight standardization does, made plain ones.

Such a weight depends on all inputs of the layer. Where some are gone it stays what it was with all of them, so it is
computed once and becomes the layer's own; a plain layer is also what other tools know, and takes less time.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_COMPUTE = (functional.conv1d, functional.conv2d, functional.conv3d, functional.linear)


class PaddedAlike(nn.Conv2d):
    """A convolution that pads as TensorFlow's "SAME" does: as its input's size needs, the odd pixel behind."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``(batch, channels, height, width)``."""
        ends = list[int]()
        for size, kernel, stride, dilation in zip(
            x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], self.dilation[::-1], strict=True
        ):
            missing = max((math.ceil(size / stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
            ends += [missing // 2, missing - missing // 2]
        return super().forward(functional.pad(x, ends))


class _Seen(TorchFunctionMode):
    """Note what layers' functions are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[tuple[Any, Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(zip(("input", "weight", "bias"), args, strict=False)) | (kwargs or {})
        if func in _COMPUTE:
            self.weights.append((given["weight"], given.get("bias")))
        return func(*args, **(kwargs or {}))


def fold(module: Any) -> bool:
    """Make a layer that computes its weight a plain one that has it, in place; False, and nothing done, for others."""
    found = _computed(module)
    if found is not None:
        weight, kind = found
        for table in (module._parameters, module._buffers):
            for name in table.keys() - {"weight", "bias"}:
                del table[name]
        module.weight = nn.Parameter(weight, requires_grad=module.weight.requires_grad)
        module.__class__ = kind
    return found is not None


@torch.no_grad()
def _computed(module: Any) -> tuple[Tensor, type[nn.Module]] | None:
    """Return the weight that a layer computes and the class that does with it what the layer does, by trying it."""
    plain = next((kind for kind in _PLAIN if isinstance(module, kind)), None)
    if plain is None or type(module).__module__.startswith(("torch.", "nni_topo.")) or module._modules:
        return None
    if not isinstance(module._parameters.get("weight"), Tensor):
        return None
    entering = module.in_features if plain is nn.Linear else module.in_channels
    found, kinds = Tensor(), {plain, PaddedAlike} if plain is nn.Conv2d else {plain}
    # Two sizes: of one alone both ways to pad may need no pixel, or as many.
    for more in (0, 1):
        shape = (2, entering, *(max(4, 2 * size) + more for size in getattr(module, "kernel_size", ())))
        x = torch.linspace(-9, 9, math.prod(shape)).sin().view(shape).to(module.weight)
        with _Seen() as seen:
            try:
                wanted = module.forward(x)
            except RuntimeError:
                return None
        if len(seen.weights) != 1 or seen.weights[0][0] is module.weight or seen.weights[0][1] is not module.bias:
            return None
        found = seen.weights[0][0]
        if found.shape != module.weight.shape:
            return None
        kinds = {kind for kind in kinds if _gives(kind, module, found, x, wanted)}
    kind = next((kind for kind in (plain, PaddedAlike) if kind in kinds), None)
    return None if kind is None else (found.detach().clone(), kind)


def _gives(kind: type[Any], module: Any, weight: Tensor, x: Tensor, wanted: Any) -> bool:
    """Tell whether a class gives with a weight what a layer gave."""
    made: Any = nn.Module.__new__(kind)
    made.__dict__ = {**vars(module), "_parameters": {"weight": weight, "bias": module.bias}, "_buffers": {}}
    given = made.forward(x)
    near = 64 * torch.finfo(weight.dtype).eps
    return (
        isinstance(wanted, Tensor)
        and wanted.shape == given.shape
        and bool((wanted - given).abs().max() <= near * wanted.abs().max())
    )
