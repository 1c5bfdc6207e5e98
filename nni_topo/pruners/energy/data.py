"""Filter energies on calibration data: how much of real inputs each filter lets through."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nni_topo.errors import DataError
from nni_topo.network.capture import watched
from nni_topo.pruners.energy.chirp import EnergyCollector, Normalization, masked_parameters
from nni_topo.pruners.hooks import PruningContext


class DataEnergyCollector(EnergyCollector):
    """Energy of each filter's responses to calibration data, or to an evaluator's: what the chirp stands in for."""

    def __init__(
        self,
        calibration: Iterable[Any] | None = None,
        example_inputs: Any = None,
        *,
        normalization: Normalization = "area",
        batch_norm: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__(
            example_inputs, normalization=normalization, batch_norm=batch_norm, bias=bias, linear="unit-energy"
        )
        self.calibration = calibration

    def energies(self, context: PruningContext) -> dict[str, tuple[Tensor, int]]:
        """Return the mean energy of each channel's output, and the number of positions per image."""
        sums = {name: _Sum() for unit in context.units for name, _ in unit.members}
        biases = {name: None if self.bias else masked_parameters(context, name)[1] for name in sums}
        layers = {name: context.model.get_submodule(name) for name in sums}
        with watched(leaving=[(layers[name], _recorder(layers[name], sums[name], biases[name])) for name in sums]):
            context.run(self.calibration)
        for name, total in sums.items():
            if total.samples == 0:
                raise DataError(f"calibration must reach every pruned layer, got no response ({name})")
        return {name: ((total.energy / total.samples).cpu(), total.positions) for name, total in sums.items()}


class _Sum:
    """Energy of each channel, summed over samples and positions."""

    def __init__(self) -> None:
        self.energy = torch.zeros((), dtype=torch.float64)
        self.samples = 0
        self.positions = 0


def _recorder(module: nn.Module, total: _Sum, bias: Tensor | None) -> Callable[..., None]:
    dim = -1 if isinstance(module, nn.Linear) else 1

    def record(_: Tensor, outputs: Tensor) -> None:
        rows = outputs.detach().movedim(dim, 0).flatten(1).double()
        if bias is not None:
            rows = rows - bias.to(rows.device)[:, None]
        total.energy = total.energy.to(rows.device) + rows.pow(2).sum(1)
        total.samples += rows.shape[1]
        total.positions = math.prod(outputs.shape[2:]) if dim == 1 else 1

    return record
