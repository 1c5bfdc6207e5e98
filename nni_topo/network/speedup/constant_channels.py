"""What removed channels bring to the layers that read them, where it is the same whatever comes in.

A channel of zeros is a constant behind a sigmoid (0.5) or softplus, and in NNI's masked model behind a batch norm (its
shift). What a layer makes of constants is one number for each of its channels, which its bias can add instead.

Where no bias can add it, one removed channel is kept, without weights: a constant channel. A constant is no one number
for a layer that pads with zeros: next to the border it brings less. But what all removed channels bring is the same
whatever comes in, and of each the same but for a factor. So what a layer has for the one that is kept is what it had
for all.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nni_topo.maths.ties import first_largest
from nni_topo.network.channels import ChannelFlow, Reason, only_norm_after, reasons
from nni_topo.network.layers import (
    CONVOLUTIONS,
    TRANSPOSED,
    WEIGHTED,
    by_channel,
    call_of,
    has_own_forward,
    inner_of,
    is_depthwise,
    is_followed,
    is_plain_norm,
    keep,
    kind_of,
)
from nni_topo.network.runtime import Call, fitting, random_like, run_small, watched

TOLERANCE = 1e-5  # of a channel's largest value; rounding is below


_MOST = 4  # channels that stay for one layer: what its others bring are multiples of what these do


@dataclasses.dataclass(frozen=True)
class Reader:
    """A layer that removed channels enter, and what they brought in each of its calls."""

    module: nn.Module
    gone: Tensor  # which of the channels that enter are removed: bool, (input channels,)
    rows: list[Tensor] | None = None  # (removed, samples and places), unless all are zero; None if not asked for
    ends: list[Tensor] = dataclasses.field(default_factory=list)  # least and largest value of each: (2, removed)

    def look(self, entered: Tensor) -> None:
        """Note what enters in a call."""
        if self.rows is not None and has_own_forward(self.module) and inner_of(self.module) is not None:
            # As far as its convolution: what it pads with is no constant of the channels.
            entered = call_of(self.module, entered).entering
        rows, gone = by_channel(self.module, entered), self.gone
        found = rows[gone.to(rows.device)] if len(rows) == len(gone) else rows.new_full((int(gone.sum()), 1), torch.nan)
        self.ends.append(torch.stack([found.amin(1), found.amax(1)]).cpu().double())
        if self.rows is not None and bool(self.ends[-1].any()):
            self.rows.append(found.cpu().double())

    def constants(self) -> Tensor:
        """Return what each channel brings in all calls, zero for one that stays or brings more than one number."""
        ends = torch.stack(self.ends)
        lowest, highest = ends[:, 0].amin(0), ends[:, 1].amax(0)
        largest = torch.maximum(lowest.abs(), highest.abs())
        values = torch.where(highest - lowest <= TOLERANCE * largest, highest, 0.0)
        return torch.zeros(len(self.gone), dtype=torch.float64).masked_scatter(self.gone, values)


def readers(
    model: nn.Module, flow: ChannelFlow, left: np.ndarray, call: Call, *, rows: bool = False
) -> dict[str, Reader]:
    """Run a model on two random inputs, and return the layers to which removed channels bring anything but zeros."""
    entering, leaving = list[Any](), list[Any]()
    found = dict[str, Reader]()
    for name in flow.all_layers:
        module = model.get_submodule(name)
        gone, kept = (torch.from_numpy(np.asarray(each)) for each in _stay(flow, left, name))
        if isinstance(module, WEIGHTED) and bool(gone.any()):
            found[name] = Reader(module, gone, [] if rows else None)
            entering.append((module, found[name].look))
        # A layer that goes on behind its convolution may well give something of a channel that is gone.
        if isinstance(module, WEIGHTED) and not bool(kept.all()) and not is_followed(module):
            leaving.append((module, partial(_zeroed, module, kept)))
    # What differs between two inputs is no constant, even where either has but one place for each channel.
    for seed in range(2):
        with fitting(0, "example_inputs"), torch.no_grad(), watched(entering, leaving):
            run_small(model, random_like(call, torch.Generator().manual_seed(seed)))
        if not any(bool(each.any()) for reader in found.values() for each in reader.ends):
            return {}
    return {name: reader for name, reader in found.items() if any(bool(each.any()) for each in reader.ends)}


def constants_read(model: nn.Module, flow: ChannelFlow, left: np.ndarray, call: Call) -> dict[str, Tensor]:
    """Measure, by layer, what removed channels bring to it if that is constant: (input channels,), zero elsewhere."""
    found = {name: reader.constants() for name, reader in readers(model, flow, left, call).items()}
    return {name: values for name, values in found.items() if bool(values.any())}


def dropped(model: nn.Module, flow: ChannelFlow, left: np.ndarray, call: Call) -> list[str]:
    """Name the layers that lack a part of what removed channels bring them, where constants are kept."""
    names = list[str]()
    for name, reader in readers(model, flow, left, call).items():
        is_lost = torch.stack(reader.ends).ne(0).flatten(0, 1).any(0) & (reader.constants()[reader.gone] == 0)
        absorbs = can_absorb(reader.module, only_norm_after(model, flow, name), exactly=False)
        if bool(is_lost.any()) or not absorbs:
            names.append(name)
    return names


def is_bordered(model: nn.Module, flow: ChannelFlow, name: str) -> bool:
    """Tell whether a layer can add what it makes of constants but for what lies next to its border."""
    module, norm = model.get_submodule(name), only_norm_after(model, flow, name)
    return can_absorb(module, norm, exactly=False) and not can_absorb(module, norm, exactly=True)


def norms_of_constants(model: nn.Module, flow: ChannelFlow, left: np.ndarray, call: Call) -> list[str]:
    """Name the batch norms that make something else than zeros of removed channels.

    In training they take statistics of their own of these, so that something else comes out.
    """
    found, leaving = set[str](), list[Any]()

    def look(name: str, gone: Tensor, _: Any, output: Tensor) -> None:
        if bool(output.transpose(0, 1)[gone.to(output.device)].any()):
            found.add(name)

    for name, module in model.named_modules():
        gone = torch.from_numpy(~left[flow.entering_group_ids(name)])
        if is_plain_norm(module) and bool(gone.any()):
            leaving.append((module, partial(look, name, gone)))
        if name in flow.all_layers and isinstance(module, WEIGHTED):
            kept = torch.from_numpy(np.asarray(left[flow.group_ids_of(name)]))
            leaving.append((module, partial(_zeroed, module, kept)))
    with torch.no_grad(), watched(leaving=leaving):
        run_small(model, random_like(call, torch.Generator().manual_seed(0)))
    return [name for name, _ in model.named_modules() if name in found]


@torch.no_grad()
def absorb(
    model: nn.Module, flow: ChannelFlow, left: np.ndarray, constants: dict[str, Tensor], *, exactly: bool
) -> None:
    """Let layers add what they make of constants, and read these no more; ``exactly``: only where no border differs.

    Parameters are replaced; buffers of the model mustn't be shared. A layer without a bias hands it on to the batch
    norm behind it.
    """
    for name, values in constants.items():
        module: Any = model.get_submodule(name)
        norm = only_norm_after(model, flow, name)
        if not can_absorb(module, norm, exactly=exactly):
            continue
        weight, (gone, kept) = module.weight, map(torch.from_numpy, map(np.asarray, _stay(flow, left, name)))
        values = values * gone  # some may have come back since
        rows = values.to(weight.device).view(module.groups if hasattr(module, "groups") else 1, -1)
        rows = rows.repeat_interleave(len(weight) // len(rows), 0)
        made = (weight.double().flatten(2).sum(2) if weight.dim() > 2 else weight.double()).mul(rows).sum(1)
        made = (made * kept.to(made)).to(weight)
        keep(module, "weight", weight * (rows == 0).view(*rows.shape, *[1] * (weight.dim() - 2)))
        if module.bias is not None:
            keep(module, "bias", module.bias + made)
        else:
            norm.running_mean.sub_(made)  # type: ignore[union-attr,operator]


def can_absorb(module: nn.Module, norm: nn.Module | None, *, exactly: bool) -> bool:
    """Tell whether a layer, or the batch norm behind it, can add what it makes of constants."""
    if not isinstance(module, (*CONVOLUTIONS, nn.Linear)) or not reads_plainly(module) or is_depthwise(module):
        return False
    # Beyond the border there is no constant but zeros.
    around: Any = getattr(module, "_reversed_padding_repeated_twice", ())
    is_padded = any(around) and module.padding_mode == "zeros"
    if has_own_forward(module):
        inner = inner_of(module)
        is_padded = inner is not None and any(inner.settings.get("_reversed_padding_repeated_twice", ()))
    return not (is_padded and exactly) and (isinstance(module.bias, Tensor) or norm is not None)


def reads_plainly(module: nn.Module) -> bool:
    """Tell whether a layer reads what enters with its own weight, and adds its own bias."""
    if not has_own_forward(module):
        return type(module) is kind_of(module)
    inner = inner_of(module)
    return inner is not None and inner.is_own


def _stay(flow: ChannelFlow, left: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Tell which channels that enter a layer are gone, and which that leave it stay."""
    return ~left[flow.entering_group_ids(name)], left[flow.group_ids_of(name)]


def _zeroed(module: nn.Module, kept: Tensor, entered: Tensor, output: Tensor) -> Tensor:
    view = [-1] if isinstance(module, nn.Linear) else [-1, *[1] * (output.dim() - 2)]
    return output * kept.to(output).view(view)


@dataclasses.dataclass(frozen=True)
class Carried:
    """What some of the removed channels that enter a layer bring it in the place of all."""

    constant_channels: list[int]  # their places among the channels that enter
    times: Tensor  # how many times what each of them brings a channel does: float64, (input channels, carriers)


@dataclasses.dataclass(frozen=True)
class ConstantContribution:
    """What removed channels bring to layers whatever comes in, by layer."""

    constants: dict[str, Tensor]  # what their biases can add: (input channels,), zero elsewhere
    carried: dict[str, Carried]  # all else

    def channels(self, name: str) -> Tensor | None:
        """Tell which of the channels that enter a layer needn't, for something else brings what they do."""
        constants, carried = self.constants.get(name), self.carried.get(name)
        parts = [] if constants is None else [constants != 0]
        parts += [] if carried is None else [(carried.times != 0).any(1)]
        return torch.stack(parts).any(0) if parts else None

    def constant_channels(self, flow: ChannelFlow) -> dict[int, Reason]:
        """Return the channels that stay for others, by representative, and why."""
        found = dict[int, Reason]()
        for name, carried in self.carried.items():
            for root in flow.entering_group_ids(name)[carried.constant_channels].tolist():
                found.setdefault(root, reasons.carries_constant(name))
        return found


def constant_contribution(model: nn.Module, flow: ChannelFlow, left: np.ndarray, call: Call) -> ConstantContribution:
    """Measure what removed channels bring to layers, and choose which of them stay to bring what no bias can add."""
    constants, carried, chosen = dict[str, Tensor](), dict[str, Carried](), set[int]()
    for name, reader in readers(model, flow, left, call, rows=True).items():
        values = reader.constants()
        if not can_absorb(reader.module, only_norm_after(model, flow, name), exactly=True):
            values = torch.zeros_like(values)
        if bool(values.any()):
            constants[name] = values
        group_ids = flow.entering_group_ids(name)
        if not _can_carry(reader.module):
            continue
        settled = (values != 0) | ~_by_input(reader.module).ne(0).flatten(1).any(1).cpu()
        if found := _carried(reader, settled, np.isin(group_ids, [*chosen])):
            carried[name] = found
            chosen.update(group_ids[found.constant_channels].tolist())
    return ConstantContribution(constants, carried)


@torch.no_grad()
def carry(model: nn.Module, flow: ChannelFlow, left: np.ndarray, carried: dict[str, Carried]) -> None:
    """Add a layer's weights for channels that are gone to those for the ones that bring it what they did.

    Parameters are replaced.
    """
    for name, found in carried.items():
        module: Any = model.get_submodule(name)
        # Some may have come back since, with their weights.
        gone = torch.from_numpy(~left[flow.entering_group_ids(name)])
        rows = _by_input(module)
        times = (found.times * gone[:, None]).to(rows.device)
        times[found.constant_channels] = torch.eye(len(found.constant_channels), dtype=times.dtype, device=times.device)
        weight = rows.clone()
        weight[found.constant_channels] = torch.tensordot(times, rows.double(), ([0], [0])).to(rows)
        keep(module, "weight", weight if isinstance(module, TRANSPOSED) else weight.transpose(0, 1).contiguous())


def _can_carry(module: Any) -> bool:
    return reads_plainly(module) and getattr(module, "groups", 1) == 1


def _by_input(module: Any) -> Tensor:
    """Put the weights for each channel that enters a layer of one group into the first dimension."""
    weight: Tensor = module.weight
    return weight if isinstance(module, TRANSPOSED) else weight.transpose(0, 1)


def _carried(reader: Reader, settled: Tensor, preferred: np.ndarray) -> Carried | None:
    """Choose channels whose multiples all others are that bring the same whatever comes in, if there are few."""
    rows = reader.rows or []
    if len(rows) < len(reader.ends) or any(each.shape != rows[0].shape for each in rows):
        return None
    first, *others = rows
    size = first.abs().amax(1)
    same = [((each - first).abs().amax(1) <= TOLERANCE * size).numpy() for each in others]
    waiting = np.all([(size > 0).numpy(), ~settled[reader.gone].numpy(), *same], 0)
    places, preferred = reader.gone.nonzero().flatten(), preferred[reader.gone.numpy()]
    constant_channels, columns = list[int](), list[Tensor]()
    while waiting.any() and len(constant_channels) < _MOST:
        open_ = waiting & preferred if (waiting & preferred).any() else waiting
        chosen = first_largest(np.where(open_, size.numpy(), 0.0))
        factors = first @ first[chosen] / first[chosen].square().sum()
        alike = (first - factors[:, None] * first[chosen]).abs().amax(1) <= TOLERANCE * size
        taken = waiting & alike.numpy()
        constant_channels.append(int(places[chosen]))
        columns.append(factors * torch.from_numpy(taken))
        waiting = waiting & ~taken
    if not constant_channels:
        return None
    times = torch.zeros(len(reader.gone), len(constant_channels), dtype=torch.float64)
    times[reader.gone] = torch.stack(columns, 1)
    return Carried(constant_channels, times)
