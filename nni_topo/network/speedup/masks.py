"""Masks: checked, completed, and reconciled where layers share channels."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from nni_topo.errors import ConfigError, SpeedupError, unknown_name
from nni_topo.network.layers import kept_channels, row_names, weight_name
from nni_topo.network.runtime import MASKS

Masks = Mapping[str, Mapping[str, torch.Tensor | None]]
FullMasks = dict[str, dict[str, torch.Tensor]]


def check_masks(model: torch.nn.Module, masks: Masks) -> FullMasks:
    """Check masks and expand them to their parameters' shapes, types and devices; a channel's bias goes along."""
    MASKS.check("masks", masks, "masks")
    modules = dict(model.named_modules(remove_duplicate=False))
    # Masks are kept under the first of the names of a module.
    first_names = {id(module): name for name, module in model.named_modules()}
    full: FullMasks = {}
    for name, targets in masks.items():
        if name not in modules:
            raise unknown_name("the module of a mask", name, modules)
        checked = {
            target: _check_mask(modules[name], target, mask, f"{name}.{target}")
            for target, mask in targets.items()
            if mask is not None
        }
        _complete(modules[name], checked)
        own = full.setdefault(first_names[id(modules[name])], checked)
        if any(not torch.equal(own.get(target, mask), mask) for target, mask in checked.items()):
            raise ConfigError(f"a module with two names must have one mask, got two that differ ({name})")
    return {name: targets for name, targets in full.items() if targets}


def _check_mask(module: torch.nn.Module, target: str, mask: torch.Tensor, place: str) -> torch.Tensor:
    """Check one mask and expand it."""
    parameter = dict(module.named_parameters(recurse=False)).get(target)
    if parameter is None:
        names = ", ".join(name for name, _ in module.named_parameters(recurse=False)) or "none"
        raise ConfigError(f"a mask's target must be a parameter of its module ({names}), got {target!r} ({place})")
    if not isinstance(mask, torch.Tensor):
        raise ConfigError(f"a mask must be a tensor, got {type(mask).__name__} ({place})")
    # What isn't its own square is neither zero nor one.
    values = mask.detach() if mask.is_floating_point() else mask.to(torch.float32)
    if values.numel() and bool((values * values).sub_(values).abs_().amax()):
        raise ConfigError(f"a mask must hold zeros and ones, got other values or NaN ({place})")
    try:
        full = mask.detach().to(dtype=parameter.dtype, device=parameter.device).expand(parameter.shape)
    except RuntimeError as error:
        raise ConfigError(
            f"a mask must have its parameter's shape {tuple(parameter.shape)} or broadcast to it, "
            f"got {tuple(mask.shape)} ({place})"
        ) from error
    if target == weight_name(module) and not (full.numel() and bool(full.amax())):
        raise SpeedupError(f"a mask must leave at least one channel of a layer, got only zeros ({place})")
    return full


def _complete(module: torch.nn.Module, targets: dict[str, torch.Tensor]) -> None:
    """Mask the bias, and what else is its own, of every output channel of which all weights are masked."""
    kept = kept_channels(module, targets)
    for name in row_names(module):
        if kept is not None and isinstance(rows := getattr(module, name, None), torch.Tensor):
            mask = targets.get(name, torch.ones_like(rows).detach())
            targets[name] = mask * kept.to(mask).view(-1, *[1] * (rows.dim() - 1))
