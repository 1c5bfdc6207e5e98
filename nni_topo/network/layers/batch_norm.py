"""A batch norm in evaluation mode: a scale and an offset of each channel, in float64."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def norm_scale(norm: nn.Module) -> Tensor | None:
    """Return by how much a norm multiplies each channel, ``(channels,)``; None if that depends on the batch."""
    module: Any = norm
    if module.running_var is None:
        return None
    # Not fuse_conv_bn_weights, which computes in the network's own precision: the root of a small variance needs more.
    scale: Tensor = (module.running_var.detach().double() + module.eps).rsqrt()
    return scale if module.weight is None else scale * module.weight.detach().double()


def through_norms(norms: Iterable[nn.Module], constants: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scale of norms one after the other, and what they make of constants; both ``(channels,)``."""
    constants = constants.detach().double()
    scale = torch.ones_like(constants)
    for norm in norms:
        own = norm_scale(norm)
        if own is None:
            continue
        module: Any = norm
        scale, constants = scale.to(own.device) * own, constants.to(own.device)
        # The mean first: where it is large it would cancel against an offset that was made of it.
        constants = (constants - module.running_mean.detach().double()) * own
        constants = constants if module.bias is None else constants + module.bias.detach().double()
    return scale, constants
