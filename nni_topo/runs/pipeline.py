"""The steps from a trained network to a smaller one: select, reconstruct, remove, distil.

Everything that prunes takes these steps: :func:`nni_topo.shrink` and its searches, :func:`nni_topo.frontier`,
comparisons, ``nni-topo prune``, and trials of NNI's experiments.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from nni_topo.context import in_context
from nni_topo.network.runtime.memory import give_back_memory
from nni_topo.network.speedup.analysis import Analysis
from nni_topo.network.speedup.dense import dense_of
from nni_topo.network.speedup.dense_report import dense_report_of
from nni_topo.pruners.base import StructuredPruner
from nni_topo.pruners.budget import Budget, BudgetOutcome, BudgetPlanner
from nni_topo.pruners.hooks import Masks
from nni_topo.recovery import RecoveryMethod, compensation, distillation
from nni_topo.recovery.report import CompensationReport
from nni_topo.recovery.verdict import Verdict

if TYPE_CHECKING:
    from nni_topo.runs.depth import DepthOutcome


@dataclass(frozen=True)
class Tried:
    """One way to distribute a budget, and how close the network's outputs are to the unpruned network's."""

    allocation: str  # of nni_topo.Budget
    loss: float  # on the held-out images, as in nni_topo.distill; less is better
    agreement: float  # share of equal classes or decisions on them; NaN if outputs have none
    is_chosen: bool

    def __repr__(self) -> str:
        agreed = "" if math.isnan(self.agreement) else f", agreement {self.agreement:.4g}"
        return f"widths {self.allocation}: held out loss {self.loss:.4g}{agreed}" + " (chosen)" * self.is_chosen


@dataclass(frozen=True)
class Pipeline:
    """A network and the results of the steps that make it smaller; each step returns a new pipeline.

    All steps except ``remove`` are optional.
    """

    analysis: Analysis  # of the unpruned network
    round_to: int | None = None  # pruned layers keep a multiple of this number of channels
    masks: Masks = field(default_factory=dict)
    planned: BudgetOutcome | None = None  # the budget's outcome as the pruner counts it; None without a budget
    seconds: float = 0.0  # for selecting channels
    seconds_of_recovery: float = 0.0  # for reconstructing weights
    seconds_of_distillation: float = 0.0
    solved: nn.Module | None = None  # the network of full size with reconstructed weights
    compensation: CompensationReport | None = None
    dense: Any = None  # torch.nn.Module without the removed channels
    layers: Any = None  # DenseReport: channels of every layer before and after
    verdict: Verdict | None = None  # whether distilled weights were kept; None without distillation
    left: float = 1.0  # share of the cost that the dense network keeps, with a budget
    tried: tuple[Tried, ...] = ()  # ways to distribute the budget that were compared
    depth: DepthOutcome | None = None  # with depth=True, the removed blocks

    @property
    def model(self) -> nn.Module:
        """The unpruned network."""
        return self.analysis.model

    def select(self, pruner: Any, budget: Budget | None = None) -> Pipeline:
        """Let a pruner, which holds a copy of the network, select channels, by ``budget`` or else by its own budget."""
        if isinstance(pruner, StructuredPruner):
            pruner.facts = self.analysis.facts
        masks = pruner.compress()[1] if budget is None else pruner.masks_for(budget)
        planner = getattr(pruner, "planner", None)  # NNI's pruners have none
        return replace(self, masks=masks, planned=planner.outcome if isinstance(planner, BudgetPlanner) else None)

    def reconstruct(self, method: str | RecoveryMethod, images: Any, **knobs: Any) -> Pipeline:
        """Reconstruct the weights of the network of full size; arguments as for `nni_topo.compensate`."""
        with in_context(facts=self.analysis.facts):  # facts of the same structure
            done = compensation(self.model, self.masks, images, method=method, **knobs)
        give_back_memory(self.model)  # traced networks refer to themselves
        return replace(self, solved=done.model, compensation=done.report)

    def remove(self) -> Pipeline:
        """Make the dense network."""
        full, (args, kwargs) = self.model if self.solved is None else self.solved, self.analysis.call
        dense = dense_of(full, kwargs or args, self.masks, self.round_to, facts=self.analysis.facts)
        return replace(self, dense=dense, layers=dense_report_of(dense))

    def without_recovery(self) -> Pipeline:
        """Return the dense network without weight reconstruction."""
        return self if self.solved is None else replace(self, solved=None, compensation=None).remove()

    def distill(self, images: Any, **knobs: Any) -> Pipeline:
        """Let the dense network learn from the unpruned one; arguments as for `nni_topo.distill`."""
        done = distillation(self.dense, self.model, images, **knobs)
        return replace(self, dense=done.model, verdict=done.verdict)
