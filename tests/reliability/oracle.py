"""A masked network made by hand, from nothing but the numbers that the dense one still has.

Which channels a dense network keeps is read off its weights: each row is found again in the network that was pruned. In
a copy of that network the other rows are set to zero, weights and biases, and so is what the norms and depth-wise
convolutions make of channels that are zero then: the package promises that a channel goes as a whole. Nothing of the
package takes part.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from reliability.cases import call, doubled
from torch import Tensor, nn

ROWS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)


class WrongError(AssertionError):
    """A network doesn't compute what it should."""


@dataclass(frozen=True)
class Kept:
    """By parameter, for each dimension that became smaller which indices stay: bool."""

    places: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    layers: dict[str, Tensor] = field(default_factory=dict)  # output channels by layer
    carried: bool = False  # a removed channel stays, without weights, to bring a layer what all of them did
    untied: bool = False  # layers that shared a weight don't any more

    @property
    def removed(self) -> bool:
        """Tell whether anything went."""
        return any(not bool(rows.all()) for rows in self.layers.values()) or any(self.places.values())

    def rows(self, name: str) -> Tensor | None:
        """Return the output channels of a layer."""
        return self.layers.get(name)


def kept_of(model: nn.Module, dense: nn.Module) -> Kept:
    """Find the channels that a dense network keeps."""
    small = {
        **dict(dense.named_parameters(remove_duplicate=False)),
        **dict(dense.named_buffers(remove_duplicate=False)),
    }
    kept = Kept()
    carried = False
    large = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    for name, whole in large.items():
        found = small.get(name)
        if found is None or found.dim() != whole.dim() or not whole.is_floating_point():
            continue
        owner, _, key = name.rpartition(".")
        module = model.get_submodule(owner)
        if isinstance(module, (*ROWS, *TRANSPOSED)) and key in ("weight", "bias"):
            if key == "weight":
                rows = rows_of(dense.get_submodule(owner), found)
                kept.layers[owner] = found_again(rows_of(module, whole), rows)
                carried = carried or len(rows) > int(kept.layers[owner].sum())
            continue
        smaller = [d for d in range(whole.dim()) if whole.shape[d] != found.shape[d]]
        kept.places[name] = {d: found_again(along(whole, d), along(found, d)) for d in smaller}
    return Kept(kept.places, kept.layers, carried, len(set(small.values())) > len(set(large.values())))


def rows_of(module: nn.Module, weight: Tensor) -> Tensor:
    """Return what makes each output channel of a layer, ``(out, ...)``."""
    weight = weight.detach()
    if not isinstance(module, TRANSPOSED):
        return weight.flatten(1)
    # Of groups that lie one behind the other in the first dimension, which counts inputs.
    return weight.unflatten(0, (module.groups, -1)).transpose(1, 2).flatten(0, 1).flatten(1)


def like_rows(module: nn.Module, rows: Tensor) -> Tensor:
    """Spread a number for each output channel over a layer's weight."""
    weight = module.weight
    if not isinstance(module, TRANSPOSED):
        return rows.view(-1, *[1] * (weight.dim() - 1)).expand_as(weight).clone()
    split = weight.unflatten(0, (module.groups, -1))
    return rows.view(module.groups, 1, -1, *[1] * (weight.dim() - 2)).expand_as(split).flatten(0, 1).clone()


def along(values: Tensor, dim: int) -> Tensor:
    """Return the slices of a dimension, ``(size, ...)``."""
    return values.detach().movedim(dim, 0).reshape(values.shape[dim], -1)


def found_again(large: Tensor, small: Tensor) -> Tensor:
    """Tell which rows are left: those that most numbers of a smaller one come from; a row of zeros comes from none."""
    kept = torch.zeros(len(large), dtype=torch.bool)
    for row in small:
        numbers = row[row != 0]
        counts = torch.stack([torch.isin(numbers, other).sum() for other in large])
        best = int(counts.argmax())
        if int(counts[best]):
            kept[best] = True
    return kept


def require_only_asked(model: nn.Module, masks: Any, kept: Kept) -> None:
    """Raise WrongError if a channel went that its layer's mask keeps."""
    for name, rows in kept.layers.items():
        module = model.get_submodule(name)
        mask = masks.get(name, {}).get("weight")
        if mask is None:
            if not (bool(rows.all()) or is_depthwise(module)):
                raise WrongError(f"channels of {name} went, which has no mask")
            continue
        asked = rows_of(module, mask.expand_as(module.weight)).any(1)
        if bool((asked & ~rows).any()):
            raise WrongError(
                f"channels {torch.nonzero(asked & ~rows).flatten().tolist()} of {name} went, which its mask keeps"
            )


@dataclass
class Oracle:
    """The masked network, and masks for the package that say the same."""

    model: nn.Module
    masks: dict[str, dict[str, Tensor]]
    may_train: bool  # a step changes both alike

    def hold(self, trained: nn.Module, dense: nn.Module) -> None:
        """Take back what a step did to numbers that the dense network doesn't have."""
        small = dict(dense.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name, value in self.model.named_parameters(remove_duplicate=False):
                found = small.get(name)
                if found is not None and found.shape != value.shape:
                    gone = ~torch.isin(value, found.double()) | value.eq(0)
                    trained.get_parameter(name)[gone] = value[gone]


def masked_by_hand(model: nn.Module, kept: Kept, asked: Any, drawn: Sequence[Any]) -> Oracle:
    """Make the masked network, of what a dense one keeps of the masks that were asked for."""
    masked = copy.deepcopy(model).double().eval()
    zeros: dict[str, Tensor] = {}
    masks: dict[str, dict[str, Tensor]] = {}
    for name, rows in kept.layers.items():
        module = masked.get_submodule(name)
        if bool(rows.all()) or (is_depthwise(module) and name not in asked):
            continue
        left = like_rows(module, rows.double())
        zeros[f"{name}.weight"] = left
        masks[name] = {"weight": left.float()}
        if module.bias is not None:
            zeros[f"{name}.bias"] = rows.double()
    for name, found in kept.places.items():
        owner, _, key = name.rpartition(".")
        module = masked.get_submodule(owner)
        # What norms make of a removed channel is zero only where zeros arrive; see below.
        if not found or key not in module._parameters or isinstance(module, NORMS):
            continue
        left = torch.ones_like(getattr(module, key)).detach()
        for dim, stays in found.items():
            view = [1] * left.dim()
            view[dim] = -1
            left = left * stays.double().view(view)
        zeros[name] = left
        if isinstance(module, nn.RNNBase):
            masks.setdefault(owner, {})[key] = left.float()
    apart = untied(masked, zeros)
    with torch.no_grad():
        for name, left in zeros.items():
            masked.get_parameter(name).copy_(masked.get_parameter(name) * left)
    while silenced(masked, kept, drawn):
        pass  # what follows a norm that is silent now may be next
    return Oracle(masked, masks, not (kept.carried or kept.untied or apart))


def untied(model: nn.Module, zeros: dict[str, Tensor]) -> bool:
    """Give parameters that modules share, and of which each loses another part, one of their own for each name."""
    names: dict[Tensor, list[str]] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        names.setdefault(value, []).append(name)
    apart = False
    for value, shared in names.items():
        parts = [zeros.get(name, torch.ones_like(value)) for name in shared]
        owners = {id(model.get_submodule(name.rpartition(".")[0])) for name in shared}
        if len(owners) == 1 or all(torch.equal(parts[0], part) for part in parts):
            for name in shared[1:]:
                zeros.pop(name, None)
            continue
        apart = True
        for name in shared:
            owner, _, key = name.rpartition(".")
            setattr(model.get_submodule(owner), key, nn.Parameter(value.detach().clone()))
    return apart


def is_depthwise(module: nn.Module) -> bool:
    """Tell whether a layer has a group for each channel that enters."""
    return isinstance(module, (*ROWS[1:], *TRANSPOSED)) and module.groups == module.in_channels > 1


def silenced(masked: nn.Module, kept: Kept, drawn: Sequence[Any]) -> bool:
    """Set norms and depth-wise convolutions to zero for removed channels that arrive as zeros; True if any wasn't."""
    changed = False
    for name, dead in dead_inputs(masked, drawn).items():
        module = masked.get_submodule(name)
        if is_depthwise(module):
            gone, keys = ~kept.layers.get(name, torch.ones(module.out_channels, dtype=torch.bool)), ["bias"]
            dead = dead.repeat_interleave(len(gone) // len(dead))
        else:
            left = kept.places.get(f"{name}.weight", {}).get(0)
            gone, keys = torch.zeros_like(dead) if left is None else ~left, ["weight", "bias"]
        for key in keys:
            values = getattr(module, key, None)
            if isinstance(values, Tensor) and len(values) == len(dead) and bool(values.detach()[gone & dead].any()):
                changed = True
                with torch.no_grad():
                    values[gone & dead] = 0
    return changed


def dead_inputs(model: nn.Module, drawn: Sequence[Any]) -> dict[str, Tensor]:
    """Tell which channels enter norms and depth-wise convolutions as zeros."""
    dead: dict[str, Tensor] = {}

    def look(name: str, dim: int) -> Any:
        def hook(module: nn.Module, entered: Any) -> None:
            rows = entered[0].movedim(dim, 0).flatten(1).eq(0).all(1)
            dead[name] = dead.get(name, torch.ones_like(rows)) & rows

        return hook

    handles = []
    for name, module in model.named_modules():
        if is_depthwise(module) or isinstance(module, NORMS):
            # One of a class of its own may take images.
            dim = -1 if type(module) in (nn.LayerNorm, nn.RMSNorm) else 1
            handles.append(module.register_forward_pre_hook(look(name, dim)))
    with torch.no_grad():
        for inputs in drawn:
            call(model, doubled(inputs))
    for handle in handles:
        handle.remove()
    return dead
