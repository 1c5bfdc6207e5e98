"""The three hooks of a structured pruner: collect data, score blocks, make masks.

NNI 2 had them as classes; NNI 3 made them three methods of each pruner. They are classes again here, so that
a cloud and a criterion can be combined freely. A planner says how many blocks are kept, before any is chosen.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from nni.compression.utils import Evaluator
from numpy.typing import NDArray
from torch import Tensor, nn

from nni_topo.errors import ConfigError, DataError
from nni_topo.network.channels.constraints import Share
from nni_topo.network.runtime.memory import check_memory
from nni_topo.network.speedup.analysis import Facts
from nni_topo.pruners.planner import Losses, Planner
from nni_topo.pruners.units import ChannelCoupling, PruningUnit, TargetSpaces, block_shape, pruning_units

Data = dict[str, dict[str, Tensor]]
"""``{module name: {target name: tensor}}``, one row per block: ``(blocks, features)``."""
Metrics = dict[str, dict[str, Tensor]]
"""``{module name: {target name: tensor}}`` in the blocked shape of the mask, e.g. ``(out, 1, 1, 1)``; larger = keep."""
Masks = dict[str, dict[str, Tensor]]
"""NNI's masks, ``{module name: {target name: tensor of 0 and 1}}``."""


class KeptSet(Metrics):
    """Metrics of blocks that are already chosen: 1 if kept, 0 if pruned; made by :meth:`PruningContext.keep`.

    The package's allocator uses it as it is. NNI's allocator makes the same masks if as many blocks are kept as the
    ratio says.
    """


@dataclass(frozen=True)
class PruningContext:
    """The input of the hooks while masks are made."""

    model: nn.Module  # the wrapped one
    target_spaces: TargetSpaces  # NNI's, with the current ratios: a scheduled pruner changes them at each step
    evaluator: Evaluator | None = None  # the pruner's
    parameter_names: Mapping[str, str] = field(default_factory=dict)  # by name before wrapping, for the evaluator
    planner: Planner = field(default_factory=Planner)  # says how many blocks are kept
    # For layers that share some channels with others, the group id of each channel: equal ids are pruned together.
    ties: ChannelCoupling = field(default_factory=dict)
    # For layers whose channels are shuffled, how many channels of each segment are kept at a plain ratio.
    shares: Mapping[str, Share] = field(default_factory=dict)
    facts: Facts | None = None  # what is already known about the model

    @cached_property
    def units(self) -> list[PruningUnit]:
        """The active targets, grouped by ``dependency_group_id``."""
        return pruning_units(self.target_spaces, self.ties, {} if self.planner.round_to else self.shares)

    def rows(self, losses: Losses) -> dict[str, int]:
        """Return, by unit name, how many blocks in [1, rows] each part of each unit keeps.

        ``losses`` maps a unit to the worth of its blocks, float64 ``(blocks,)`` in any order; it is called only where
        layers are compared or have a threshold.
        """
        return self.planner.rows(self.units, losses, self.model)

    def keep(self, kept: Mapping[str, NDArray[np.bool_]]) -> KeptSet:
        """Return the kept set of each unit's kept blocks, boolean ``(blocks,)``; all parts must keep equally many."""
        for unit in self.units:
            counts = kept[unit.name].reshape(unit.parts, unit.rows).sum(1)
            if not 0 < counts.min() == counts.max():
                numbers = ", ".join(map(str, counts))
                raise DataError(f"all parts must keep equally many blocks, at least 1, got {numbers} ({unit.name})")
        scores = {name: torch.from_numpy(is_kept).double() for name, is_kept in kept.items()}
        return KeptSet(self.spread(scores))

    def spread(self, values: Mapping[str, Tensor]) -> Metrics:
        """Return for each member of a unit a copy of the unit's values ``(blocks,)``, in the blocked shape."""
        metrics: Metrics = {}
        for unit in self.units:
            for module, target in unit.members:
                metric = values[unit.name].reshape(self.metric_shape(module, target)).clone()
                metrics.setdefault(module, {})[target] = metric
        return metrics

    def collected(self, points: Callable[[PruningUnit, str, str], Tensor]) -> Data:
        """Return the points ``(blocks, features)`` of every member, by unit, module and target name."""
        data: Data = {}
        for unit in self.units:
            for module, target in unit.members:
                data.setdefault(module, {})[target] = points(unit, module, target)
        return data

    def evaluate(self) -> Any:
        """Return the evaluator's result on the wrapped model; bind the evaluator for this call if it isn't bound."""
        if self.evaluator is None:
            raise ConfigError("a pruner without calibration data needs an evaluator, got neither (calibration)")
        bind = getattr(self.evaluator, "model", None) is None
        if bind:
            self.evaluator.bind_model(self.model, dict(self.parameter_names))
        try:
            return self.evaluator.evaluate()
        finally:
            if bind:
                self.evaluator.unbind_model()

    def check_memory(self, matrices: float, cure: str, width: float = 0.0) -> None:
        """Raise DataError unless `matrices` float64 values per pair of blocks and `width` per block fit in memory."""
        for unit in self.units:
            purpose = f"what compares {unit.rows} blocks with each other"
            check_memory(8 * unit.rows * (matrices * unit.rows + width), purpose, cure, unit.name)

    def metric_shape(self, module_name: str, target_name: str) -> tuple[int, ...]:
        """Return the blocked shape of a target's metric, e.g. ``(out_channels, 1, 1, 1)``."""
        return block_shape(self.target_spaces[module_name][target_name])


class DataCollector(ABC):
    """Collects, per target, one row of numbers per block."""

    def check(self, model: nn.Module, modules: dict[str, nn.Module]) -> None:  # noqa: B027 - most take any layer
        """Raise for layers that can't be collected from, before the model is wrapped and before anything takes long."""

    @abstractmethod
    def collect(self, context: PruningContext) -> Data:
        """Return ``(blocks, features)`` for every member of every unit of ``context``."""


class MetricCalculator(ABC):
    """Turns collected data into one score per block, larger = keep, or into the set of kept blocks."""

    @abstractmethod
    def calculate(self, data: Data, context: PruningContext) -> Metrics:
        """Return a score per block, in the blocked shape, for every target in ``data``.

        To choose a set instead: ``context.rows(losses)`` says how many blocks each unit keeps, ``context.keep(...)``
        makes the :class:`KeptSet`.
        """


class SparsityAllocator(ABC):
    """Turns metrics into masks."""

    @abstractmethod
    def allocate(self, metrics: Metrics, context: PruningContext) -> Masks:
        """Return the masks of all pruned targets and of the targets aligned to them."""


def unit_scores(unit: PruningUnit, metrics: Metrics) -> Tensor:
    """Average the members' metrics, as NNI does for a dependency group: ``(blocks,)``, float64, on the CPU."""
    rows = []
    for module_name, target_name in unit.members:
        metric = metrics[module_name][target_name].detach()
        finite = torch.isfinite(metric)
        if not bool(finite.all()):
            raise DataError(
                f"metrics must be finite, got {int((~finite).sum())} of {metric.numel()} NaN or infinite "
                f"({module_name}.{target_name})"
            )
        rows.append(metric.reshape(-1).to("cpu", torch.float64))
    return torch.stack(rows).mean(0)
