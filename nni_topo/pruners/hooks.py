"""The three hooks of a structured pruner: what it looks at, how it scores, how much it takes.

NNI 2 had them as classes; NNI 3 folded them into three methods of each pruner. They are classes again here, so that
a cloud, a criterion and an allocation can be combined freely.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from nni.compression.utils import Evaluator
from torch import Tensor, nn

from nni_topo.errors import ConfigError, DataError
from nni_topo.pruners.units import PruningUnit, TargetSpaces, block_shape, pruning_units

Data = dict[str, dict[str, Tensor]]
"""``{module name: {target name: tensor}}``, one row per block: ``(blocks, features)``."""
Metrics = dict[str, dict[str, Tensor]]
"""``{module name: {target name: tensor}}`` in the blocked shape of the mask, e.g. ``(out, 1, 1, 1)``; larger = keep."""
Masks = dict[str, dict[str, Tensor]]
"""NNI's masks, ``{module name: {target name: tensor of 0 and 1}}``."""


@dataclass(frozen=True)
class PruningContext:
    """What a hook may look at while masks are made.

    Attributes
    ----------
    model : torch.nn.Module
        The wrapped model.
    target_spaces : dict
        NNI's target spaces with the ratios in force (a scheduled pruner changes them from step to step).
    evaluator : nni.compression.utils.Evaluator or None
        The pruner's evaluator.
    parameter_names : dict of str to str
        Parameter names before and after wrapping, which the evaluator needs to rebuild its optimizers.
    """

    model: nn.Module
    target_spaces: TargetSpaces
    evaluator: Evaluator | None = None
    parameter_names: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def units(self) -> list[PruningUnit]:
        """The active targets, grouped by ``dependency_group_id``."""
        return pruning_units(self.target_spaces)

    def evaluate(self) -> None:
        """Run the evaluator's evaluation on the wrapped model; a model in training is bound to it already.

        Raises
        ------
        ConfigError
            If the pruner has no evaluator.
        """
        if self.evaluator is None:
            raise ConfigError("a pruner without calibration data needs an evaluator, got neither (calibration)")
        if getattr(self.evaluator, "model", None) is not None:
            self.evaluator.evaluate()
            return
        self.evaluator.bind_model(self.model, dict(self.parameter_names))
        try:
            self.evaluator.evaluate()
        finally:
            self.evaluator.unbind_model()

    def metric_shape(self, module_name: str, target_name: str) -> tuple[int, ...]:
        """Return the blocked shape of a target's metric, e.g. ``(out_channels, 1, 1, 1)``."""
        return block_shape(self.target_spaces[module_name][target_name])


class DataCollector(ABC):
    """Collects, per target, one row of numbers per block."""

    def check(self, model: nn.Module, modules: dict[str, nn.Module]) -> None:  # noqa: B027 - most take any layer
        """Refuse, before anything is wrapped or takes long, layers that can't be looked at.

        Parameters
        ----------
        model : torch.nn.Module
            The model to prune.
        modules : dict of str to torch.nn.Module
            The layers of it that the config_list names.
        """

    @abstractmethod
    def collect(self, context: PruningContext) -> Data:
        """Return ``(blocks, features)`` for every member of every unit of ``context``."""


class MetricCalculator(ABC):
    """Turns collected data into one score per block; larger = keep."""

    @abstractmethod
    def calculate(self, data: Data, context: PruningContext) -> Metrics:
        """Return a score per block, in the blocked shape, for every target in ``data``."""


class SparsityAllocator(ABC):
    """Decides how many blocks each unit keeps and turns scores into masks."""

    @abstractmethod
    def allocate(self, metrics: Metrics, context: PruningContext) -> Masks:
        """Return the masks of every target that ``context`` lets the pruner mask."""


def unit_scores(unit: PruningUnit, metrics: Metrics) -> Tensor:
    """Average the members' metrics, as NNI does for a dependency group.

    Parameters
    ----------
    unit : PruningUnit
        The unit.
    metrics : dict
        Metrics of at least the unit's members.

    Returns
    -------
    torch.Tensor
        Shape ``(blocks,)``, float64, on the CPU.

    Raises
    ------
    DataError
        If a metric is NaN or infinite: ranking such scores would keep an arbitrary set.
    """
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
