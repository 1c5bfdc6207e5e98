"""A masked network made by hand, from nothing but the numbers that the dense one still has.

Which channels a dense network keeps is read off its weights: each row and column is found again in the network that was
pruned. In a copy of that network the others are set to zero, weights, biases and what norms have of them, and norms
over channels run over those that are left: the package promises that a channel goes as a whole. Nothing of the package
takes part.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

ROWS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BY_CHANNEL = nn.modules.batchnorm._NormBase  # norms of each channel by itself


class WrongError(AssertionError):
    """A network doesn't compute what it should."""


@dataclass
class Kept:
    """By parameter, for each dimension that became smaller which indices stay: bool."""

    places: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    layers: dict[str, Tensor] = field(default_factory=dict)  # output channels by layer
    columns: dict[str, Tensor] = field(
        default_factory=dict
    )  # by layer the weights with which it reads, like its weight
    untied: bool = False  # layers that shared a weight don't any more
    silent: bool = False  # a layer keeps rows without weights, to which a step gives some

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
                kept.columns[owner] = columns_of(module, dense.get_submodule(owner), kept.layers[owner])
                kept.silent = kept.silent or len(rows) > int(kept.layers[owner].sum())
            continue
        smaller = [d for d in range(whole.dim()) if whole.shape[d] != found.shape[d]]
        kept.places[name] = {d: found_again(along(whole, d), along(found, d)) for d in smaller}
    kept.untied = len(set(small.values())) > len(set(large.values()))
    return kept


def columns_of(module: nn.Module, small: nn.Module, rows: Tensor) -> Tensor:
    """Tell with which weights a layer reads channels that are left: 1 or 0, in the shape of its weight."""
    whole, found = module.weight.detach(), small.weight.detach()
    left = torch.ones_like(whole)
    if isinstance(module, TRANSPOSED):
        stays = found_again(along(whole, 0), along(found, 0)) if len(found) < len(whole) else torch.ones(len(whole))
        return left * stays.view(-1, *[1] * (whole.dim() - 1))
    size, each = len(whole) // getattr(module, "groups", 1), len(found) // getattr(small, "groups", 1)
    places = rows.nonzero().flatten()
    for start in range(0, len(places), each):
        group = int(places[start]) // size
        mine = slice(group * size, (group + 1) * size)
        if found.shape[1] < whole.shape[1]:
            stays = found_again(along(whole[mine], 1), along(found[start : start + each], 1))
            left[mine] = left[mine] * stays.view(1, -1, *[1] * (whole.dim() - 2))
    return left


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


def masked_by_hand(model: nn.Module, kept: Kept, asked: Any) -> Oracle:
    """Make the masked network, of what a dense one keeps of the masks that were asked for."""
    masked = copy.deepcopy(model).double().eval()
    zeros: dict[str, Tensor] = {}
    masks: dict[str, dict[str, Tensor]] = {}
    for name, rows in kept.layers.items():
        module = masked.get_submodule(name)
        left = like_rows(module, rows.double())
        zeros[f"{name}.weight"] = left * kept.columns[name]
        if bool(rows.all()):
            continue
        if name in asked or not is_depthwise(module):
            masks[name] = {"weight": left.float()}
        if module.bias is not None:
            zeros[f"{name}.bias"] = rows.double()
    for name, found in kept.places.items():
        owner, _, key = name.rpartition(".")
        module = masked.get_submodule(owner)
        if not found or key not in module._parameters:
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
    for name, module in masked.named_modules():
        if is_over_channels(module):
            known = [kept.places.get(f"{name}.{key}", {}) for key in module._parameters]
            rows = next((stays for found in known for stays in found.values()), None)
            if rows is not None or isinstance(module, nn.Conv1d) or not [*module.parameters()]:
                module.register_forward_hook(partial(over_left, rows))
    return Oracle(masked, masks, not (kept.untied or kept.silent or apart))


def is_over_channels(module: nn.Module) -> bool:
    """Tell by its name whether a module is a norm over channels; a convolution of a single row goes along channels."""
    if isinstance(module, nn.Conv1d):
        return module.in_channels == module.out_channels == 1
    is_norm = "Norm" in type(module).__name__ and not isinstance(module, BY_CHANNEL)
    is_of_weights = type(module).__module__.startswith("torch.nn.utils")
    return is_norm and not is_of_weights and not module._modules and not isinstance(module, (*ROWS, *TRANSPOSED))


def over_left(rows: Tensor | None, module: nn.Module, entered: Any, given: Tensor) -> Tensor:
    """Run a norm over the channels that are left; those that aren't zero, if it has no numbers that tell which."""
    (x,) = entered
    dim = 1
    if isinstance(module, nn.Conv1d):
        dim = 2
    elif type(module) in (nn.LayerNorm, nn.RMSNorm) or (rows is not None and x.shape[1] != len(rows)):
        dim = -1
    rows = x.movedim(dim, 0).flatten(1).any(1) if rows is None else rows
    left, small = rows.nonzero().flatten(), copy.copy(module)
    if isinstance(module, nn.GroupNorm):
        small.num_groups = int(rows.view(module.num_groups, -1).any(1).sum())
        small.num_channels = len(left)
    elif hasattr(module, "normalized_shape"):
        small.normalized_shape = (len(left),)
    if dim != 2:
        small._parameters = {
            name: each if each is None else each.index_select(each.shape.index(len(rows)), left)
            for name, each in module._parameters.items()
        }
    return torch.zeros_like(given).index_copy(dim, left, small.forward(x.index_select(dim, left)))


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
