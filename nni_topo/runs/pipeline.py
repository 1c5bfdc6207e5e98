"""How a network is made smaller from calibration data: choose channels, reconstruct, make dense, distil.

:func:`nni_topo.shrink` runs the steps once, a search within a tolerance and :func:`nni_topo.frontier` for several
sizes, on what was prepared and measured once.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from nni_topo.errors import ConfigError, GradientError, listed
from nni_topo.network.cost.cost import cost_of
from nni_topo.network.cost.latency import LatencyTable
from nni_topo.network.cost.measure import time_shares
from nni_topo.network.layers.kinds import (
    is_transposed_linear,
    with_linear_layers,
    with_plain_weights,
    without_plain_weights,
)
from nni_topo.network.runtime.copies import detached_copy, leaves_models_alone
from nni_topo.network.runtime.fits import first_call
from nni_topo.network.runtime.memory import give_back_memory
from nni_topo.network.runtime.modules import device_of
from nni_topo.network.speedup.analysis import Analysis
from nni_topo.network.speedup.dense import DenseReport, dense_of, dense_report_of
from nni_topo.network.speedup.dependency import groups_of
from nni_topo.network.speedup.reconcile import MasksLike, check_masks, widths_multiple
from nni_topo.pruners.base import StructuredPruner
from nni_topo.pruners.budget import (
    AUTO,
    Budget,
    BudgetOutcome,
    BudgetPlanner,
    budget_outcome,
    network_cost,
    no_nearer,
    tell_if_missed,
)
from nni_topo.pruners.registry import create_pruner, pruner_info
from nni_topo.recovery import RecoveryMethod, compensation, distillation
from nni_topo.recovery.distilling import Verdict
from nni_topo.recovery.narrowing import narrow_instead
from nni_topo.recovery.report import CompensationReport
from nni_topo.rules import instance
from nni_topo.runs.allocating import Tried, allocations_to_try, check_held_out, compared
from nni_topo.runs.choices import Target
from nni_topo.runs.images import ImageParts, of_first
from nni_topo.runs.prunable import Prunable, layers_to_prune
from nni_topo.runs.settings import FREE_WIDTHS, Settings
from nni_topo.runs.widths import as_entries, planned_ratios

if TYPE_CHECKING:
    from nni_topo.runs.depth import DepthOutcome

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PrunedNetwork:
    """The pruned network without recovery."""

    full: nn.Module  # of full size, heads made narrower
    masks: MasksLike
    make_dense: Callable[[], nn.Module]
    planned: BudgetOutcome | None  # the outcome as it was planned; None where a function of the caller's prunes

    # A search, and pruning block by block, look at most networks after recovery alone.
    @cached_property
    def dense(self) -> nn.Module:
        """The dense network, made when it is first asked for."""
        return self.make_dense()


@dataclass(frozen=True)
class RecoveredNetwork:
    """The pruned network after weight reconstruction, if that was asked for."""

    pruned: PrunedNetwork
    dense: nn.Module
    layers: DenseReport
    report: CompensationReport | None
    blocks_removed: int = 0  # where blocks compete with channels
    depth: DepthOutcome | None = None


@dataclass(frozen=True)
class Pipeline:
    """The steps that make a network smaller, for any budget of one kind."""

    analysis: Analysis  # of the network that is made smaller
    images: ImageParts
    settings: Settings
    prunable: Prunable
    narrows: bool  # whether all heads of attention are made narrower where heads would be removed
    round_to: int | None
    is_search: bool  # whether networks of several sizes are made: a missed budget of one isn't told
    is_described: bool  # whether a config of Transformers has to describe the network
    # By kind of cost and allocation, the pruner that is asked again for every size: with what it has measured.
    _asked: dict[tuple[str, str], StructuredPruner] = field(default_factory=dict)
    _left_out: list[str] = field(default_factory=list)
    _costs: dict[str, int] = field(default_factory=dict)  # those of the unpruned network that are known

    @property
    def model(self) -> nn.Module:
        """The network that is made smaller."""
        return self.analysis.model

    @classmethod
    def of(
        cls,
        model: nn.Module,
        images: ImageParts,
        settings: Settings,
        kind: str,
        *,
        is_search: bool = False,
        is_described: bool = False,
    ) -> Pipeline:
        """Find the layers that can lose channels; ``kind`` is the cost that is made small."""
        analysis = Analysis.on(model, images.example)
        prunable = layers_to_prune(analysis, settings.layers, is_described=is_described)
        give_back_memory(model)  # networks that were traced refer to themselves
        device, round_to = device_of(model), settings.round_to
        # In half precision a GPU takes five times as long over a linear layer of 511 channels as over one of 512.
        is_free = round_to is None and device.type != "cuda"
        width_unit = None if is_free or round_to == 1 else widths_multiple(round_to or "auto", device)
        narrows = settings.narrow_heads is not False and kind != "latency" and width_unit is None
        return cls(analysis, images, settings, prunable, narrows, width_unit, is_search, is_described)

    def tell_reachable(self, budget: Budget) -> None:
        """Warn, before the work, where a network that a config of Transformers describes can't meet the budget."""
        if not self.is_described or budget.kind == "latency":
            return
        kind: Any = budget.kind
        target, entries = Target(kind, budget.share), self.prunable.entries
        told: dict[str, bool] = {"equal_blocks": True, "warns": False}
        _, outcome = planned_ratios(self.analysis, target, entries, None, self.round_to, **told)
        if not outcome.is_met:
            self.leave_out(
                f"the config of {type(self.model).__name__} describes no network that keeps {budget.share:g} of the "
                f"{budget.kind}: {outcome.left:.4g} can be reached; {FREE_WIDTHS}"
            )

    def select(self, budget: Budget) -> PrunedNetwork:
        """Select the channels to keep under a budget."""
        masks, planned = self._choose_channels(budget)
        give_back_memory(self.model)  # the pruner's copy refers to itself
        full = self.model
        if self.narrows and not budget.equal_blocks:
            full, masks = narrow_instead(self.model, self.images.learned, masks, self.analysis.facts)
        make_dense = partial(self._made_dense, full, masks)
        return PrunedNetwork(full, masks, make_dense, planned)

    def reconstruct(self, pruned: PrunedNetwork) -> RecoveredNetwork:
        """Reconstruct the weights of a pruned network, if that was asked for."""
        method, images, report = self.settings.compensate, self.images.learned, None
        if method is None:
            return RecoveredNetwork(pruned, pruned.dense, dense_report_of(pruned.dense), None)
        if isinstance(method, (str, RecoveryMethod)):
            told: dict[str, Any] = {"seed": self.settings.seed, "progress": self.settings.progress}
            done = compensation(pruned.full, pruned.masks, images, method=method, **told)
            full, report = done.model, done.report
            give_back_memory(self.model)  # so do the networks of the compensation
        else:
            full = _checked_network(method(pruned.full, pruned.masks, images), "compensate")
        dense = self._made_dense(full, pruned.masks)
        return RecoveredNetwork(pruned, dense, dense_report_of(dense), report)

    def _made_dense(self, full: nn.Module, masks: MasksLike) -> nn.Module:
        """Make the model, or one with other weights, dense."""
        return dense_of(full, self.images.example, masks, self.round_to, facts=self.analysis.facts)

    def recover(self, budget: Budget) -> tuple[RecoveredNetwork, tuple[Tried, ...]]:
        """Prune under a budget and reconstruct; for ``"auto"`` in each way that the pruner offers, the best is kept."""
        if budget.allocation != AUTO:
            return self.reconstruct(self.select(budget)), ()
        judges = check_held_out(self.images.all, self.images.judges)
        candidates: dict[str, RecoveredNetwork] = {}
        for name in allocations_to_try(self.settings.pruner):
            own: Any = replace(budget, allocation=name)  # type: ignore[arg-type]
            candidates[name] = self.reconstruct(self.select(own))
        networks = {name: each.dense for name, each in candidates.items()}
        tried = compared(self.model, networks, judges, self.settings.outputs)
        return next(candidates[each.allocation] for each in tried if each.is_chosen), tried

    def distil(self, dense: nn.Module, **own: Any) -> tuple[nn.Module, Verdict | None]:
        """Distil a dense network, if asked to, and return it with the figures that decided whether weights are kept.

        The figures are None where :func:`nni_topo.distill` doesn't run, as for a network without gradients. ``own`` are
        knobs of this network alone, which give way to those of the caller.
        """
        distill, images = self.settings.distill, self.images.learned
        if distill is False:
            return dense, None
        if callable(distill):
            return _checked_network(distill(dense, self.model, images), "distill"), None
        knobs: dict[str, Any] = {
            "held_out": self.images.judges,
            "outputs": self.settings.outputs,
            "seed": self.settings.seed,
            "progress": self.settings.progress,
            **own,
        }
        given = self.settings.distillation_knobs.items()
        chosen = {name: value for name, value in given if value is not None or name not in own}
        try:
            done = distillation(dense, self.model, images, **knobs | chosen)
        except GradientError as error:
            if distill is not True:  # whoever gives knobs wants it
                raise GradientError(f"{error}; distill=False leaves distillation out") from error
            self.leave_out(f"the network isn't distilled: {error}")
            return dense, None
        return done.model, done.verdict

    def leave_out(self, text: str) -> None:
        """Warn of a step that is left out."""
        self._left_out.append(text)
        _logger.warning("%s", text)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Steps that were left out, and why."""
        return tuple(dict.fromkeys(self._left_out))

    @leaves_models_alone
    def outcome(self, budget: Budget, recovered: RecoveredNetwork) -> BudgetOutcome:
        """Return the share of the cost that a dense network keeps, and warn where that misses the budget."""
        share = self.share_left(budget, recovered)
        why = self.why_missed(budget, recovered, share)
        planned = recovered.pruned.planned
        if planned is None or planned.is_met or self._is_mispredicted(budget, recovered, share):
            return tell_if_missed(budget, share, why)
        return budget_outcome(budget.kind, budget.share, share, why)  # the pruner has given the warning

    def why_missed(self, budget: Budget, recovered: RecoveredNetwork, left: float) -> str:
        """Return the reason if the cost of a network isn't near to its budget; ``left``: the share that it keeps."""
        if self.settings.chooses_how_many:
            return "the pruner chooses how many channels it keeps"
        planned = recovered.pruned.planned
        if planned is not None and self._is_mispredicted(budget, recovered, left):
            return (
                f"channels were chosen by a predicted share of {planned.left:.4g}: part of what the forward computes "
                "takes another share in smaller networks than could be predicted"
            )
        if planned is not None and planned.why:
            return planned.why
        if recovered.layers.kept:
            return "layers keep channels that were to be removed"
        if recovered.pruned.full is not self.model:
            return "heads of attention are made narrower, each by as many channels; narrow_heads=False removes heads"
        allocations = () if callable(self.settings.pruner) else pruner_info(self.settings.pruner).allocations()
        return no_nearer(budget, allocations)

    def _is_mispredicted(self, budget: Budget, recovered: RecoveredNetwork, left: float) -> bool:
        """Tell whether the network that was planned has another cost than was predicted."""
        planned = recovered.pruned.planned
        if planned is None or budget.kind != "flops":
            return False
        # Narrower heads, kept channels and a function of the caller's change the cost after it was predicted.
        is_as_planned = recovered.pruned.full is self.model and not callable(self.settings.compensate)
        return is_as_planned and not recovered.layers.kept and abs(planned.left - left) > planned.tolerance

    def share_left(self, budget: Budget, recovered: RecoveredNetwork) -> float:
        """Return the share of the cost that a dense network of :meth:`reconstruct` keeps."""
        dense = recovered.dense
        if budget.kind != "latency":
            example: Any = self.images.example
            cost_left = cost_of(budget.kind, dense, example)
            if budget.kind not in self._costs:
                self._costs[budget.kind] = cost_of(budget.kind, self.model, example)
            return float(cost_left / self._costs[budget.kind])
        args, kwargs = of_first(first_call(self.model, self.images.all), self.model, self.images.all)
        example = kwargs or args
        if budget.latency_table is not None:
            table: Any = budget.latency_table  # a file was read when the budget was made
            cost = network_cost(budget.kind, Analysis.on(self.model, example, self.analysis.facts), table)
            known = {row.name: row for row in recovered.layers.rows if row.name in table.layers}
            widths = {name: np.arange(row.before) < row.after for name, row in known.items()}
            return float(cost(widths) / cost({}))
        ((share, _),) = time_shares([dense], self.model, example, budget.share)
        return share

    def example_for(self, kind: str) -> Any:
        """Return the inputs by which a cost is counted: for time a whole batch."""
        if kind != "latency":
            return self.images.example
        args, kwargs = of_first(first_call(self.model, self.images.learned), self.model, self.images.learned)
        return kwargs or args

    def analysis_for(self, kind: str) -> Analysis:
        """Return the analysis of the network on the inputs by which a cost is counted."""
        return self._timed if kind == "latency" else self.analysis

    @cached_property
    def _timed(self) -> Analysis:
        return Analysis.on(self.model, self.example_for("latency"), self.analysis.facts)

    def _choose_channels(self, budget: Budget) -> tuple[MasksLike, BudgetOutcome | None]:
        """Run the pruner on a copy of the model, and return its masks and the outcome of the budget as it counts it.

        The outcome is None where a function of the caller's prunes.
        """
        known = self._asked.get((budget.kind, budget.allocation))
        if known is not None:
            return self._ask(known, budget)
        victim, entries, pruner = detached_copy(self.model), self.prunable.entries, self.settings.pruner
        # A copy: a function of the caller's may change what it is given.
        groups = copy.deepcopy(self.prunable.groups) or groups_of(self.analysis, entries)
        config_list: list[dict[str, Any]] = groups.unnamed() if self.prunable.is_default else groups
        if callable(pruner):
            chosen = pruner(victim, config_list, self.images.learned)
            instance(Mapping).check("masks", chosen, "pruner")
            check_masks(self.model, chosen)
            return chosen, None
        example = self.example_for(budget.kind)
        pruner_knobs, outcome = pruner_info(pruner).knobs(), None
        if "budget" not in pruner_knobs:
            table: LatencyTable | Any = budget.latency_table  # a file is read when the budget is made
            kind: Any = budget.kind
            target = Target(kind, budget.share)
            told = {"equal_blocks": bool(budget.equal_blocks), "warns": not self.is_search}
            analysis = self.analysis_for(budget.kind)
            ratios, outcome = planned_ratios(analysis, target, entries, table, self.round_to, **told)
            config_list = groups_of(analysis, as_entries(ratios))
        offered = {
            "seed": self.settings.seed,
            "calibration": self.images.learned,
            "example_inputs": example,
            "budget": budget,
            "round_to": self.round_to,
        }
        taken = {name: offered[name] for name in pruner_knobs if name in offered}
        wrapped = create_pruner(pruner, victim, config_list, **taken | dict(self.settings.knobs))
        if isinstance(wrapped, StructuredPruner):
            wrapped.facts = self.analysis.facts
        is_asked = isinstance(wrapped, StructuredPruner) and isinstance(wrapped.planner, BudgetPlanner)
        if self.is_search and is_asked:
            self._asked[budget.kind, budget.allocation] = wrapped
            return self._ask(wrapped, budget)
        masks: MasksLike = wrapped.compress()[1]
        wrapped.unwrap_model()
        planner = getattr(wrapped, "planner", None)  # NNI's pruners have none
        return masks, planner.outcome if isinstance(planner, BudgetPlanner) else outcome

    def _ask(self, pruner: StructuredPruner, budget: Budget) -> tuple[MasksLike, BudgetOutcome | None]:
        """Return the masks of a pruner for a budget, and the outcome."""
        masks = pruner.masks_for(budget)
        planner: Any = pruner.planner
        return masks, planner.outcome


def _checked_network(made: Any, name: str) -> nn.Module:
    """Return what a function of the caller's returned, if it is a network."""
    if not isinstance(made, nn.Module):
        raise ConfigError(f"{name} must return a torch.nn.Module, got {type(made).__name__} (shrink)")
    return made


def plain_weights(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """Return a model whose weights are parameters, with a warning where it is another one than was given.

    Linear layers take the place of Transformers' ``Conv1D``.
    """
    names = without_plain_weights(model)
    if not names and not any(map(is_transposed_linear, model.modules())):
        return model, ()
    plain = with_linear_layers(with_plain_weights(model))
    if not names:
        return plain, ()
    text = (
        "these layers compute their weights, by weight norm, another parametrization or a pruning mask, or are of a "
        f"class of the model's own: {listed(names)}. In the network that is returned they are PyTorch's layers with "
        "plain weights; a file of it is read by nni_topo.load(path, nni_topo.as_torch_layers(model))"
    )
    _logger.warning("%s", text)
    return plain, (text,)
