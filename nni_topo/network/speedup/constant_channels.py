"""Removed channels that stay to bring layers what others did, where no bias can add that.

A channel of zeros that an activation or an addition makes something of is no one number for a layer that pads with
zeros: next to the border it brings less. But what it brings is the same whatever comes in, and of all of them the same
but for a factor. So one of them stays, without weights, and what a layer has for it is what it had for all.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nni_topo.maths.ties import first_largest
from nni_topo.network.channels import ChannelFlow, only_norm_behind
from nni_topo.network.layers import TRANSPOSED, keep
from nni_topo.network.runtime import Call
from nni_topo.network.speedup.constants import TOLERANCE, Reader, can_absorb, readers, reads_plainly

_MOST = 4  # channels that stay for one layer: what its others bring are multiples of what these do


@dataclasses.dataclass(frozen=True)
class Carried:
    """What some of the removed channels that enter a layer bring it in the place of all."""

    carriers: list[int]  # their places among the channels that enter
    times: Tensor  # how many times what each of them brings a channel does: float64, (input channels, carriers)


@dataclasses.dataclass(frozen=True)
class Brought:
    """What removed channels bring to layers whatever comes in, by layer."""

    constants: dict[str, Tensor]  # what their biases can add: (input channels,), zero elsewhere
    carried: dict[str, Carried]  # all else

    def channels(self, name: str) -> Tensor | None:
        """Tell which of the channels that enter a layer needn't, for something else brings what they do."""
        constants, carried = self.constants.get(name), self.carried.get(name)
        parts = [] if constants is None else [constants != 0]
        parts += [] if carried is None else [(carried.times != 0).any(1)]
        return torch.stack(parts).any(0) if parts else None

    def carriers(self, flow: ChannelFlow) -> dict[int, str]:
        """Return the channels that stay for others, by representative, and why."""
        reasons = dict[int, str]()
        for name, carried in self.carried.items():
            for root in flow.entering_roots(name)[carried.carriers].tolist():
                reasons.setdefault(root, f"it brings what all removed channels do, which isn't zero ({name})")
        return reasons


def brought(model: nn.Module, flow: ChannelFlow, left: np.ndarray, call: Call) -> Brought:
    """Measure what removed channels bring to layers, and choose which of them stay to bring what no bias can add."""
    constants, carried, chosen = dict[str, Tensor](), dict[str, Carried](), set[int]()
    for name, reader in readers(model, flow, left, call, rows=True).items():
        values = reader.constants()
        if not can_absorb(reader.module, only_norm_behind(model, flow, name), exactly=True):
            values = torch.zeros_like(values)
        if bool(values.any()):
            constants[name] = values
        roots = flow.entering_roots(name)
        if not _can_carry(reader.module):
            continue
        settled = (values != 0) | ~_by_input(reader.module).ne(0).flatten(1).any(1).cpu()
        if found := _carried(reader, settled, np.isin(roots, [*chosen])):
            carried[name] = found
            chosen.update(roots[found.carriers].tolist())
    return Brought(constants, carried)


@torch.no_grad()
def carry(model: nn.Module, flow: ChannelFlow, left: np.ndarray, carried: dict[str, Carried]) -> None:
    """Add a layer's weights for channels that are gone to those for the ones that bring it what they did.

    Parameters are replaced.
    """
    for name, found in carried.items():
        module: Any = model.get_submodule(name)
        # Some may have come back since, with their weights.
        gone = torch.from_numpy(~left[flow.entering_roots(name)])
        rows = _by_input(module)
        times = (found.times * gone[:, None]).to(rows.device)
        times[found.carriers] = torch.eye(len(found.carriers), dtype=times.dtype, device=times.device)
        weight = rows.clone()
        weight[found.carriers] = torch.tensordot(times, rows.double(), ([0], [0])).to(rows)
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
    carriers, columns = list[int](), list[Tensor]()
    while waiting.any() and len(carriers) < _MOST:
        open_ = waiting & preferred if (waiting & preferred).any() else waiting
        chosen = first_largest(np.where(open_, size.numpy(), 0.0))
        factors = first @ first[chosen] / first[chosen].square().sum()
        alike = (first - factors[:, None] * first[chosen]).abs().amax(1) <= TOLERANCE * size
        taken = waiting & alike.numpy()
        carriers.append(int(places[chosen]))
        columns.append(factors * torch.from_numpy(taken))
        waiting = waiting & ~taken
    if not carriers:
        return None
    times = torch.zeros(len(reader.gone), len(carriers), dtype=torch.float64)
    times[reader.gone] = torch.stack(columns, 1)
    return Carried(carriers, times)
