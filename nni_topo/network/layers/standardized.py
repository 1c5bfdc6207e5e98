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

from nni_topo.network.layers.derived import Inner, forward_of, has_own_forward, inner_of, kind_of, trial_inputs
from nni_topo.network.runtime import SAME_LAYER, agree, detached_copy


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


def fold(module: Any) -> bool:
    """Make a layer that computes its weight a plain one that has it, in place; False, and nothing done, for others."""
    found = _computed(module)
    if found is not None:
        inner, kind, settings = found
        for table in (module._parameters, module._buffers):
            for name in table.keys() - {"weight", "bias"}:
                del table[name]
        module._modules.clear()
        module.weight = nn.Parameter(inner.weight.clone(), requires_grad=module.weight.requires_grad)
        if inner.bias is not None:
            module.bias = nn.Parameter(inner.bias.clone(), requires_grad=module.bias.requires_grad)
        vars(module).update(settings)
        module.__class__ = kind
    return found is not None


@torch.no_grad()
def _computed(module: Any) -> tuple[Inner, type[nn.Module], dict[str, Any]] | None:
    """Return what a layer computes, and the class, with its settings, that does the same with that weight."""
    if isinstance(module, PaddedAlike) or not has_own_forward(module):
        return None
    # Of a wrapped layer NNI holds the parameters, and of a parametrized one they are computed before.
    if not isinstance(module._parameters.get("weight"), Tensor) or "_nni_wrapper" in module._modules:
        return None
    inner = inner_of(module)
    if inner is None or inner.is_own or not inner.is_bare or (inner.bias is None) != (module.bias is None):
        return None
    plain: Any = kind_of(module)
    tried: Any = detached_copy(module, light=True).eval()
    pairs = [(x, forward_of(tried, x)) for x in trial_inputs(module)]
    for kind in (plain, PaddedAlike) if plain is nn.Conv2d else (plain,):
        settings = inner.settings | ({} if plain is nn.Linear else {"padding_mode": "zeros"})
        if all(_gives(kind, {**vars(module), **settings}, inner, x, wanted) for x, wanted in pairs):
            return inner, kind, settings
    return None


def _gives(kind: type[Any], own: dict[str, Any], inner: Inner, x: Tensor, wanted: Tensor) -> bool:
    """Tell whether a class gives, with attributes and a weight that was computed, what a layer gave."""
    made: Any = nn.Module.__new__(kind)
    made.__dict__ = {**own, "_parameters": {"weight": inner.weight, "bias": inner.bias}, "_buffers": {}}
    given = made.forward(x)
    return agree([wanted], [given], SAME_LAYER[inner.weight.dtype])
