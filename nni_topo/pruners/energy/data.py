"""Filter energies on calibration data: how much of real inputs each filter lets through."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from nni_topo.network.layers.derived import call_of, is_followed
from nni_topo.network.layers.kinds import by_channel
from nni_topo.network.runtime.calibration import calibration_of
from nni_topo.network.runtime.hooks import watched
from nni_topo.pruners.clouds.moments import check_reached
from nni_topo.pruners.energy.chirp import EnergyCollector, masked_parameters
from nni_topo.pruners.hooks import PruningContext


@dataclass(eq=False)
class DataEnergyCollector(EnergyCollector):
    """Energy of each filter's responses to calibration data, or to an evaluator's: what the chirp stands in for."""

    calibration: Iterable[Any] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.calibration = calibration_of(self.calibration)

    def energies(self, context: PruningContext) -> dict[str, tuple[Tensor, int]]:
        """Return the mean energy of each channel's output, and the number of positions per image."""
        names = [name for unit in context.units for name, _ in unit.members]
        biases = [None if self.bias else masked_parameters(context, name)[1] for name in names]
        layers = [context.model.get_submodule(name) for name in names]
        sums = dict(zip(names, map(_Energy, layers, biases), strict=True))
        with watched(leaving=[(total.module, total.add) for total in sums.values()]):
            context.run(self.calibration)
        for name, total in sums.items():
            check_reached(total.samples, name, "response")
        return {name: ((total.energy / total.samples).cpu(), total.positions) for name, total in sums.items()}


class _Energy:
    """Energy of each channel of a layer, less its bias if one is given, summed over samples and positions."""

    def __init__(self, module: nn.Module, bias: Tensor | None) -> None:
        self.module, self.bias = module, bias
        self._goes_on = is_followed(module)
        self.energy: Any = 0.0
        self.samples = 0
        self.positions = 0

    def add(self, entering: Tensor, outputs: Tensor) -> None:
        if self._goes_on:  # the filters' answers are what it goes on with
            outputs = call_of(self.module, entering).run()
        rows = by_channel(self.module, outputs).double()
        if self.bias is not None:
            rows = rows - self.bias.to(rows.device)[:, None]
        self.energy = self.energy + rows.pow(2).sum(1)
        self.samples += rows.shape[1]
        self.positions = 1 if isinstance(self.module, nn.Linear) else math.prod(outputs.shape[2:])
