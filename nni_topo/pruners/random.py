"""Random structured pruning: the baseline every selection has to beat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from nni.compression.base.wrapper import ModuleWrapper
from nni.compression.utils import Evaluator
from torch import nn

from nni_topo.pruners.base import StructuredPruner
from nni_topo.pruners.budget import Budget
from nni_topo.pruners.checks import pruner_arguments
from nni_topo.pruners.hooks import Data, DataCollector, MetricCalculator, Metrics, PruningContext


class NoData(DataCollector):
    """Collects nothing."""

    def collect(self, context: PruningContext) -> Data:
        """Return no rows for any target."""
        return {}


@dataclass
class RandomMetric(MetricCalculator):
    """Uniform random scores, one draw per unit in network order: the baseline that a selection has to beat."""

    seed: int

    def calculate(self, data: Data, context: PruningContext) -> Metrics:
        """Return scores in [0, 1), equal for all members of a dependency group."""
        generator = torch.Generator().manual_seed(self.seed)
        return context.spread(
            {unit.name: torch.rand(unit.blocks, generator=generator, dtype=torch.float64) for unit in context.units}
        )


class RandomPruner(StructuredPruner):
    """Prune filters and neurons at random.

    Parameters
    ----------
    model, config_list, evaluator, existed_wrappers, seed, budget, example_inputs, round_to
        As for :class:`~nni_topo.StructuredPruner`.

    Examples
    --------
    >>> from torch import nn
    >>> pruner = RandomPruner(nn.Sequential(nn.Linear(4, 8)), [{"op_types": ["Linear"], "sparse_ratio": 0.5}], seed=1)
    >>> _, masks = pruner.compress()
    >>> int(masks["0"]["bias"].sum())
    4
    """

    @pruner_arguments()
    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict[str, Any]],
        evaluator: Evaluator | None = None,
        existed_wrappers: dict[str, ModuleWrapper] | None = None,
        *,
        seed: int = 0,
        budget: Budget | Mapping[str, Any] | None = None,
        example_inputs: Any = None,
        round_to: int | None = None,
    ) -> None:
        super().__init__(
            model, config_list, evaluator, existed_wrappers, collector=NoData(), calculator=RandomMetric(seed)
        )
