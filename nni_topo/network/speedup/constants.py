"""What removed channels bring to the layers that read them, where it is the same whatever comes in.

A channel of zeros is a constant behind a sigmoid (0.5) or softplus, and in NNI's masked model behind a batch norm (its
shift). What a layer makes of constants is one number for each of its channels, which its bias can add instead.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nni_topo.network.channels import ChannelFlow, only_norm_behind
from nni_topo.network.layers import (
    CONVOLUTIONS,
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
        absorbs = can_absorb(reader.module, only_norm_behind(model, flow, name), exactly=False)
        if bool(is_lost.any()) or not absorbs:
            names.append(name)
    return names


def is_bordered(model: nn.Module, flow: ChannelFlow, name: str) -> bool:
    """Tell whether a layer can add what it makes of constants but for what lies next to its border."""
    module, norm = model.get_submodule(name), only_norm_behind(model, flow, name)
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
        gone = torch.from_numpy(~left[flow.entering_roots(name)])
        if is_plain_norm(module) and bool(gone.any()):
            leaving.append((module, partial(look, name, gone)))
        if name in flow.all_layers and isinstance(module, WEIGHTED):
            kept = torch.from_numpy(np.asarray(left[flow.layer_roots(name)]))
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
        norm = only_norm_behind(model, flow, name)
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
    return ~left[flow.entering_roots(name)], left[flow.layer_roots(name)]


def _zeroed(module: nn.Module, kept: Tensor, entered: Tensor, output: Tensor) -> Tensor:
    view = [-1] if isinstance(module, nn.Linear) else [-1, *[1] * (output.dim() - 2)]
    return output * kept.to(output).view(view)
