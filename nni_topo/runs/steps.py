"""The steps of a network that is made smaller from calibration data: choose channels, reconstruct, distil, measure.

:func:`nni_topo.shrink` runs each of them once, a search within a tolerance and :func:`nni_topo.frontier` for several
sizes: the same functions, on what was prepared and measured once.
"""

from __future__ import annotations

import copy
import inspect
import logging
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn

from nni_topo.errors import ConfigError, DataError, GradientError, listed, raised, shown, unknown_name
from nni_topo.network.attention.config import described_layers, is_pretrained
from nni_topo.network.channels import reasons
from nni_topo.network.cost.cost import cost_of
from nni_topo.network.cost.latency import LatencyTable
from nni_topo.network.cost.measure import count_macs, count_params, time_shares
from nni_topo.network.io.checkpoint import why_undescribed
from nni_topo.network.layers.kinds import (
    has_channels,
    is_transposed_linear,
    with_linear_layers,
    with_plain_weights,
    without_plain_weights,
)
from nni_topo.network.runtime.arguments import BY_HEAD, check_entry
from nni_topo.network.runtime.calibration import HELD_OUT, Calibration
from nni_topo.network.runtime.copying import detached_copy, device_of
from nni_topo.network.runtime.fits import check_samples_first, failure_on, first_call, samples_second, structure_call
from nni_topo.network.runtime.inputs import Call, bind_arguments, calls, on_device, returned_by_name, tensors_of
from nni_topo.network.runtime.memory import give_back_memory
from nni_topo.network.runtime.training_mode import evaluation_mode
from nni_topo.network.runtime.untouched import leaves_models_alone, lent
from nni_topo.network.speedup.analysis import Analysis
from nni_topo.network.speedup.dense import DenseReport, dense_of, dense_report_of
from nni_topo.network.speedup.dependency import (
    OUTPUT,
    DependencyGroups,
    by_reason,
    groups_of,
    held_by_unselected,
    unprunable_layers,
)
from nni_topo.network.speedup.reconcile import MasksLike, check_masks, widths_multiple
from nni_topo.pruners.base import StructuredPruner
from nni_topo.pruners.budget import (
    AUTO,
    Budget,
    BudgetOutcome,
    BudgetPlanner,
    budget_outcome,
    check_shared_budget,
    network_cost,
    no_nearer,
    tell_if_missed,
)
from nni_topo.pruners.checks import check_no_ratios, matched_modules
from nni_topo.pruners.registry import check_knob_names, create_pruner, pruner_info
from nni_topo.recovery import RecoveryMethod, compensation, distillation
from nni_topo.recovery.distilling import KNOBS as DISTILLATION_KNOBS
from nni_topo.recovery.distilling import Verdict, check_can_learn, check_knobs_together, check_state
from nni_topo.recovery.lesson import MOST_DISTANCE, Outputs, check_augment, check_one_shape
from nni_topo.recovery.likeness import NO_SCALE, Answers
from nni_topo.recovery.narrowing import narrow_instead
from nni_topo.recovery.registry import RECOVERIES
from nni_topo.recovery.report import SMALL, CompensationReport
from nni_topo.rules import NONE, check_knobs, instance, is_class, taking
from nni_topo.runs.allocating import Tried, allocations_to_try, check_held_out, compared
from nni_topo.runs.choices import Target
from nni_topo.runs.widths import as_entries, planned_ratios, sorted_layers

if TYPE_CHECKING:
    from nni_topo.runs.depth import DepthOutcome

LEAVE_OUT = "leave {} out of the layers to prune (layers)"
"""How a layer is left out of what :func:`nni_topo.shrink` prunes."""

FREE_WIDTHS = (
    "with {'equal_blocks': False} in the budget layers and heads may keep any width, and nni_topo.save and "
    "nni_topo.load take the network"
)
"""What helps where a config of Transformers can't describe a network."""
_NO_CONFIG = "the config of Transformers can't say that it has fewer channels ({'equal_blocks': False} in the budget)"

Compensate = Callable[[nn.Module, MasksLike, Iterable[Any]], nn.Module]
Distill = Callable[[nn.Module, nn.Module, Iterable[Any]], nn.Module]

# A network is said to be worse on held-out images than on calibration images if its distance is so many times as large,
# or its agreement so much smaller, and the interval of the held-out figure excludes the other one.
_GAP = 2.0
_GAP_OF_AGREEMENT = 0.05
_logger = logging.getLogger(__name__)

UNPRUNED = "unpruned"
"""The name of the network that was given, among those that are measured."""


@dataclass(frozen=True)
class Stage:
    """The network after one step. Intervals are of 95 %, over the held-out images."""

    network: str  # unpruned, pruned, reconstructed or distilled
    macs: int  # multiply-accumulates of one sample
    params: int
    distance: float  # mean squared distance of the outputs from the unpruned network's over their variance, held out
    distance_low: float
    distance_high: float
    agreement: float  # share of held-out images with the largest output of the unpruned network; NaN without classes
    agreement_low: float
    agreement_high: float
    calibration_distance: float  # the same on the calibration images, where networks look better than they are
    calibration_agreement: float
    accuracy: float  # what `evaluate` returns; NaN without it
    # Wall time of the step; of "pruned" that of all tries and their recovery with allocation="auto" or a tolerance.
    seconds: float


@dataclass(frozen=True)
class ImageParts:
    """The images, split into calibration data and held-out images.

    No step uses the held-out ones: a network looks better than it is on the images that its weights were solved on.
    """

    all: Calibration
    learned: Calibration
    judges: Calibration | None  # decide between networks; None where images are too few
    held_out: Calibration | None  # the report's figures are of these; None where images are too few
    example: Any  # example inputs, of which only the shapes are read

    @classmethod
    def of(
        cls, calibration: Calibration, model: nn.Module, parts: tuple[Calibration | None, ...] | None = None
    ) -> ImageParts:
        """Hold out every eighth image, or name three parts in the order of the fields; make example inputs.

        ConfigError for a model that runs on whole batches alone, of which no image can be held out.
        """
        args, kwargs = of_first(structure_call(model, calibration), model, calibration)
        check_samples_first(model, calibration)
        if parts is None:
            learned, held_out = calibration.split()
            error = None if held_out is None else failure_on(model, next(calls(model, learned)))
            if error is not None:
                whole_call, count = next(calls(model, calibration)), calibration.sizes[0]
                for each in tensors_of(whole_call)[1:]:
                    are_edges = each.dim() == 2 and len(each) == 2 != count and not each.is_floating_point()
                    if are_edges or each.shape == (count, count):
                        raise ConfigError(
                            f"inputs must hold samples, of which every eighth is held out, got {count} nodes of a "
                            f"graph with edges {tuple(each.shape)}: create_pruner, compensate and to_dense take whole "
                            f"graphs ({calibration.name})"
                        ) from error
                raise ConfigError(
                    "a model must run on any number of samples, because every eighth one is held out: let its forward "
                    "take the number from its input, as x.flatten(1) and x.view(len(x), -1) do; of "
                    f"{count} samples it got {learned.sizes[0]} and raised {raised(error)}"
                    f"{samples_second(model, whole_call)} (model)"
                ) from error
            return cls(calibration, learned, held_out, held_out, kwargs or args)
        first, judges, held_out = parts
        return cls(calibration, calibration if first is None else first, judges, held_out, kwargs or args)


@dataclass(frozen=True)
class Prunable:
    """The layers to prune, as entries of a config_list without ratios."""

    entries: list[dict[str, Any]]
    # By layer that can't lose channels, why; where the caller names the layers, of those alone.
    unpruned: dict[str, str]
    is_default: bool  # the caller named no layer
    groups: DependencyGroups | None = None  # of the entries, where they are known already


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

    @property
    def is_made(self) -> bool:
        """Whether the dense network was asked for."""
        return "dense" in vars(self)


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
class ShrinkSteps:
    """How a network is made smaller, apart from the budget."""

    analysis: Analysis  # of the network that is made smaller
    images: ImageParts
    prunable: Prunable
    pruner: str | Callable[..., MasksLike]
    knobs: dict[str, Any]
    compensate: str | RecoveryMethod | Compensate | None
    distill: Mapping[str, Any] | Distill | bool
    narrows: bool
    outputs: Outputs | None
    round_to: int | None
    seed: int
    progress: bool | None
    is_search: bool  # whether networks of several sizes are made: a missed budget of one isn't told
    is_described: bool  # whether a config of Transformers has to describe the network
    # By kind of cost and allocation, the pruner that is asked again for every size: with what it has measured.
    _asked: dict[tuple[str, str], StructuredPruner] = field(default_factory=dict)
    _left_out: list[str] = field(default_factory=list)

    @property
    def model(self) -> nn.Module:
        """The network that is made smaller."""
        return self.analysis.model

    @classmethod
    def prepare(
        cls,
        model: nn.Module,
        images: ImageParts,
        kind: str,
        *,
        pruner: str | Callable[..., MasksLike],
        knobs: Mapping[str, Any] | None,
        layers: list[str | Mapping[str, Any]] | None,
        compensate: str | RecoveryMethod | Compensate | None,
        distill: Mapping[str, Any] | Distill | bool,
        narrow_heads: bool | None,
        outputs: Outputs | None,
        round_to: int | Literal["auto"] | None,
        seed: int,
        progress: bool | None,
        is_search: bool = False,
        is_described: bool = False,
    ) -> ShrinkSteps:
        """Find the layers that can lose channels; ``kind`` is the cost that is made small.

        ``is_described``: whether a config of Transformers has to describe the network.
        """
        analysis = Analysis.on(model, images.example)
        prunable = layers_to_prune(analysis, layers)
        prunable = (with_described if is_described else _without_held)(analysis, prunable)
        give_back_memory(model)  # networks that were traced refer to themselves
        device = device_of(model)
        # In half precision a GPU takes five times as long over a linear layer of 511 channels as over one of 512.
        is_free = round_to is None and device.type != "cuda"
        width_unit = None if is_free or round_to == 1 else widths_multiple(round_to or "auto", device)
        return cls(
            analysis=analysis,
            images=images,
            prunable=prunable,
            pruner=pruner,
            knobs=dict(knobs or {}),
            compensate=compensate,
            distill=distill,
            narrows=narrow_heads is not False and kind != "latency" and width_unit is None,
            outputs=outputs,
            round_to=width_unit,
            seed=seed,
            progress=progress,
            is_search=is_search,
            is_described=is_described,
        )

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

    def prune(self, budget: Budget) -> PrunedNetwork:
        """Prune under a budget."""
        masks, planned = self._choose_channels(budget)
        give_back_memory(self.model)  # the pruner's copy refers to itself
        full = self.model
        if self.narrows and not budget.equal_blocks:
            full, masks = narrow_instead(self.model, self.images.learned, masks, self.analysis.facts)
        make_dense = partial(self._made_dense, full, masks)
        return PrunedNetwork(full, masks, make_dense, planned)

    def reconstruct(self, pruned: PrunedNetwork) -> RecoveredNetwork:
        """Reconstruct the weights of a pruned network, if that was asked for."""
        if self.compensate is None:
            return RecoveredNetwork(pruned, pruned.dense, dense_report_of(pruned.dense), None)
        images, report = self.images.learned, None
        if isinstance(self.compensate, (str, RecoveryMethod)):
            done = compensation(
                pruned.full, pruned.masks, images, method=self.compensate, seed=self.seed, progress=self.progress
            )
            full, report = done.model, done.report
            give_back_memory(self.model)  # so do the networks of the compensation
        else:
            full = _checked_network(self.compensate(pruned.full, pruned.masks, images), "compensate")
        dense = self._made_dense(full, pruned.masks)
        return RecoveredNetwork(pruned, dense, dense_report_of(dense), report)

    def _made_dense(self, full: nn.Module, masks: MasksLike) -> nn.Module:
        """Make the model, or one with other weights, dense."""
        return dense_of(full, self.images.example, masks, self.round_to, facts=self.analysis.facts)

    def recover(self, budget: Budget) -> tuple[RecoveredNetwork, tuple[Tried, ...]]:
        """Prune under a budget and reconstruct; for ``"auto"`` in each way that the pruner offers, the best is kept."""
        if budget.allocation != AUTO:
            return self.reconstruct(self.prune(budget)), ()
        judges = check_held_out(self.images.all, self.images.judges)
        candidates: dict[str, RecoveredNetwork] = {}
        for name in allocations_to_try(self.pruner):
            own: Any = replace(budget, allocation=name)  # type: ignore[arg-type]
            candidates[name] = self.reconstruct(self.prune(own))
        networks = {name: each.dense for name, each in candidates.items()}
        tried = compared(self.model, networks, judges, self.outputs)
        return next(candidates[each.allocation] for each in tried if each.is_chosen), tried

    def distil(self, dense: nn.Module, **own: Any) -> tuple[nn.Module, Verdict | None]:
        """Distil a dense network, if asked to, and return it with the figures that decided whether weights are kept.

        The figures are None where :func:`nni_topo.distill` doesn't run, as for a network without gradients. ``own`` are
        knobs of this network alone, which give way to those of the caller.
        """
        if self.distill is False:
            return dense, None
        if callable(self.distill):
            return _checked_network(self.distill(dense, self.model, self.images.learned), "distill"), None
        knobs: dict[str, Any] = {
            "held_out": self.images.judges,
            "outputs": self.outputs,
            "seed": self.seed,
            "progress": self.progress,
            **own,
        }
        given: Mapping[str, Any] = {} if self.distill is True else self.distill
        chosen = {name: value for name, value in given.items() if value is not None or name not in own}
        try:
            done = distillation(dense, self.model, self.images.learned, **knobs | chosen)
        except GradientError as error:
            if self.distill is not True:  # whoever gives knobs wants it
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
        if chooses_how_many(self.pruner) or self._is_mispredicted(budget, recovered, share):
            return tell_if_missed(budget, share, why)
        return budget_outcome(budget.kind, budget.share, share, why)  # the pruner has given the warning

    def why_missed(self, budget: Budget, recovered: RecoveredNetwork, left: float) -> str:
        """Return the reason if the cost of a network isn't near to its budget; ``left``: the share that it keeps."""
        if chooses_how_many(self.pruner):
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
        allocations = () if callable(self.pruner) else pruner_info(self.pruner).allocations()
        return no_nearer(budget, allocations)

    def _is_mispredicted(self, budget: Budget, recovered: RecoveredNetwork, left: float) -> bool:
        """Tell whether the network that was planned has another cost than was predicted."""
        planned = recovered.pruned.planned
        if planned is None or budget.kind != "flops":
            return False
        # Narrower heads, kept channels and a function of the caller's change the cost after it was predicted.
        is_as_planned = recovered.pruned.full is self.model and not callable(self.compensate)
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

    @cached_property
    def _costs(self) -> dict[str, int]:
        """The costs of the unpruned network that are known."""
        return {}

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
        victim, entries, pruner = detached_copy(self.model), self.prunable.entries, self.pruner
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
            "seed": self.seed,
            "calibration": self.images.learned,
            "example_inputs": example,
            "budget": budget,
            "round_to": self.round_to,
        }
        taken = {name: offered[name] for name in pruner_knobs if name in offered}
        wrapped = create_pruner(pruner, victim, config_list, **taken | self.knobs)
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


def of_first(call: Call, model: nn.Module, images: Calibration) -> Call:
    """Return the call of the first of the processes that share the images: costs are counted by the same inputs."""
    if images.processes is None:
        return call
    found = images.processes.first(on_device(call, torch.device("cpu")), "example inputs")
    moved: Call = on_device(found, device_of(model))
    return moved


def check_can_be_shared(
    images: Calibration,
    budget: Budget,
    pruner: Any,
    compensate: Any,
    distill: Any,
    tolerance: float | None,
    depth: bool,
) -> None:
    """Raise ConfigError for what can't be done with images that several processes share."""
    if images.processes is None:
        return
    check_shared_budget(budget)
    alone = {
        "distill": callable(distill),
        "tolerance": tolerance is not None,
        "depth": depth,
        "allocation": budget.allocation == AUTO,
        "pruner": callable(pruner),
        "compensate": callable(compensate) and not isinstance(compensate, RecoveryMethod),
    }
    found = [name for name, is_given in alone.items() if is_given]
    if found:
        raise ConfigError(
            "images that processes share can be used to select channels, to reconstruct weights and to distil, with "
            f"methods by name, got {listed(found)} (process_group of {images.name})"
        )
    if isinstance(distill, Mapping):
        check_knobs_together(distill)


def layers_to_prune(analysis: Analysis, layers: list[str | Mapping[str, Any]] | None) -> Prunable:
    """Return config_list entries for the named layers; by default for all layers that can lose channels."""
    if layers is not None:
        _check_have_channels(analysis, layers)
        entries = [dict(each) for each in layers if isinstance(each, Mapping)]
        names = [each for each in layers if isinstance(each, str)]
        return Prunable([{"op_names": names}, *entries] if names else entries, {}, is_default=False)
    names, unpruned = sorted_layers(analysis)
    if not names:
        # What can be changed comes first: a layer that gives the output keeps its channels in any case.
        layers_of = sorted(by_reason(unpruned).items(), key=lambda each: each[0] == OUTPUT)
        told = [f"{', '.join(same)}: {why}" for why, same in layers_of]
        found = "; ".join(told) or "no convolution, linear or recurrent layer"
        raise ConfigError(f"a model must have a layer whose channels can be removed, got none: {found} (shrink)")
    return Prunable([{"op_names": names}], unpruned, is_default=True)


def _without_held(analysis: Analysis, prunable: Prunable) -> Prunable:
    """Note which of the layers to prune keep all channels because layers that share these aren't among them.

    Raises ConfigError where that holds for all of them.
    """
    groups = groups_of(analysis, prunable.entries, warns=not prunable.is_default)
    held = held_by_unselected(analysis.flow, groups.layers())
    why = {name: str(reasons.unselected(partners)) for name, partners in held.items()}
    if held and len(held) == len({name for group in groups.layers() for name in group}):
        told = "; ".join(f"{listed(names)}: {each}" for each, names in by_reason(why).items())
        raise ConfigError(
            f"layers must include those that share channels with the layers it names, got {told}: name these, too "
            "(layers)"
        )
    entries = prunable.entries
    if prunable.is_default:
        # Masks of theirs would only be taken back, and until then keep the layers from being reconstructed.
        entries = [{"op_names": [name for name in entries[0]["op_names"] if name not in held]}]
        groups = groups_of(analysis, entries)
    return replace(prunable, entries=entries, unpruned=prunable.unpruned | why, groups=groups)


def with_described(analysis: Analysis, prunable: Prunable) -> Prunable:
    """Leave out the layers of which a config of Transformers can't say that they have fewer channels.

    Raises ConfigError where the caller names such layers, or some of those to which a config gives one width, or none
    is left.
    """
    model = analysis.model
    settings = described_layers(model)
    wholes: dict[str, list[str]] = {}
    for name, setting in settings.items():
        wholes.setdefault(setting, []).append(name)

    def is_whole(name: str, names: Collection[str]) -> bool:
        return name in settings and all(each in names for each in wholes[settings[name]])

    named: list[str] = []
    while prunable.is_default and named != prunable.entries[0]["op_names"]:
        named = prunable.entries[0]["op_names"]
        kept = [name for name in named if is_whole(name, named)]
        if not kept:
            raise ConfigError(
                f"a model of Transformers must have layers of which its config can say that they have fewer channels, "
                f"got none in {type(model).__name__}; {FREE_WIDTHS} (shrink)"
            )
        unpruned = prunable.unpruned | dict.fromkeys((name for name in named if name not in kept), _NO_CONFIG)
        # What is left out may hold channels of others.
        prunable = _without_held(analysis, replace(prunable, entries=[{"op_names": kept}], unpruned=unpruned))
    if prunable.is_default:
        return prunable
    prunable = _without_held(analysis, prunable)
    bounds: dict[str, tuple[float, float]] = {}
    for entry in prunable.groups or ():
        sizes = entry.get("granularity")
        if isinstance(sizes, list) and sizes[0] == -1:
            continue  # it loses the columns that read heads
        for name in entry["op_names"]:
            if name not in prunable.unpruned:
                bounds[name] = entry.get("min_sparse_ratio", 0.0), entry.get("max_sparse_ratio", 1.0)
    told = [
        name
        for name in bounds
        if not is_whole(name, bounds) or len({bounds[each] for each in wholes[settings[name]]}) > 1
    ]
    if told:
        described = [name for name in settings if is_whole(name, settings)]
        raise ConfigError(
            "layers must be those of which a config can say that they have fewer channels, all to which it gives the "
            f"same width, with the same bounds, got {listed(told, 4)} where it can of "
            f"{listed(described, 4) or 'none'}; {FREE_WIDTHS} (layers)"
        )
    return prunable


def _check_have_channels(analysis: Analysis, layers: list[str | Mapping[str, Any]]) -> None:
    """Raise ConfigError for layers without channels of their own, and for named ones that have to keep all channels.

    Layers that a type selects may keep them, unless none is left.
    """
    model = analysis.model
    selected: dict[str, nn.Module] = {}
    named: set[str] = set()
    by_head = False
    for index, each in enumerate(layers):
        entry: dict[str, Any] = {"op_names": [each]} if isinstance(each, str) else dict(each)
        check_entry(entry, f"layers[{index}]", BY_HEAD)
        if entry.get("granularity") == "head":  # of modules that hold layers, too; dependency_groups looks at them
            by_head = True
            continue
        selected |= matched_modules(model, [entry])
        named.update(entry.get("op_names") or ())
    without = [
        f"{name or 'the model'} ({type(module).__name__})"
        for name, module in selected.items()
        if not has_channels(module)
    ]
    prunable, unpruned = sorted_layers(analysis)
    with_channels = [name for name, module in selected.items() if has_channels(module)]
    others = [name for name in with_channels if name not in unpruned and name not in prunable]
    unpruned |= reasons.as_text(unprunable_layers(analysis, others))
    keeping = [name for name in with_channels if name in unpruned]
    if len(keeping) < len(with_channels) or by_head:
        keeping = [name for name in keeping if name in named]
    refused = [f"{listed(without)} without channels of its own"] if without else []
    for why, names in by_reason({name: unpruned[name] for name in keeping}).items():
        if why == OUTPUT:
            gives = "gives" if len(names) == 1 else "give"
            refused.append(f"{listed(names)}, which {gives} the model's output")
        else:
            keeps = "keeps all channels" if len(names) == 1 else "keep all channels"
            refused.append(f"{listed(names)}, which {keeps}: {why}")
    if refused:
        raise ConfigError(
            f"layers must be layers whose channels can be removed, got {' and '.join(refused)}; layers of this model "
            f"that can be named: {listed(prunable, 8) or 'none'} (layers)"
        )


def check_can_be_distilled(model: nn.Module, images: Calibration, distill: Any, outputs: Outputs | None) -> None:
    """Raise, before anything is pruned, the errors of :func:`nni_topo.distill` that images and outputs show."""
    if not (distill is True or isinstance(distill, Mapping)):
        return
    if images.samples < 2:
        raise DataError(
            f"distillation must have at least two samples, one to judge by, got {images.samples}: pass more, or leave "
            "distillation out: shrink(..., distill=False) (images)"
        )
    if not any(parameter.is_floating_point() for parameter in model.parameters()):
        return  # it has no layer to prune, which `layers_to_prune` says
    check_one_shape(calls(model, images))
    knobs: Mapping[str, Any] = {} if distill is True else distill
    check_state(knobs.get("state"), model)
    first = next(calls(model, images))
    if knobs.get("augment") is not None:
        check_augment(model, first, knobs["augment"], 0)
    names = ("objective", "temperature", "outputs", "blocks", "blend", "precision")
    chosen = {"outputs": outputs} | {name: knobs[name] for name in names if name in knobs}
    try:
        check_can_learn(model, first, is_shared=images.processes is not None, **chosen)
    except GradientError as error:
        if distill is not True:  # whoever gives knobs wants it; without them a warning says so at the end
            raise GradientError(f"{error}; distill=False leaves distillation out") from error


def check_one_distilled(distill: Any, several: str, place: str) -> None:
    """Raise ConfigError for a state's file where a call may distil several networks; ``several`` says which."""
    if isinstance(distill, Mapping) and distill.get("state") is not None:
        raise ConfigError(
            f"state must be left out of the knobs of distill where several networks may be distilled, {several}, for a "
            f"file holds the state of one, got {distill['state']!r} ({place})"
        )


class Measurements:
    """Measures the network after each step, and the step's time."""

    @leaves_models_alone
    def __init__(
        self,
        model: nn.Module,
        data: ImageParts,
        evaluate: Callable[[nn.Module], float] | None,
        outputs: Outputs | None = None,
    ) -> None:
        # The calibration images first, the held-out ones last; between them those that decide, if they are others.
        parts = [data.learned]
        for part in (data.judges, data.held_out):
            if part is not None and part is not parts[-1]:
                parts.append(part)
        self.answers = Answers(model, *parts, outputs=outputs)
        if self.answers.named.left_out:
            _logger.warning("%s", self.answers.named)
        self._data, self._evaluate = data, evaluate
        # What a model returns, beside its answer, can be what it takes at its next call.
        args, kwargs = first_call(model, data.learned)
        with evaluation_mode(model), torch.no_grad():
            found = model(*args, **kwargs)
        returned = {each.shape for _, each in returned_by_name(found)[1:] if each.is_floating_point()}
        states = []
        for name, value in list(bind_arguments(model, (args, kwargs)).items())[1:]:
            shapes = {each.shape for each in tensors_of(value) if each.is_floating_point()}
            if shapes and shapes <= returned:
                states.append(name)
        self._warnings: list[str] = []
        if states:
            text = (
                f"the network is judged one step at a time, each from the calibration data's {listed(states)}: it "
                "returns tensors of the same shapes, and where these are its next inputs, errors add up; evaluate= can "
                "run it over streams, as docs/faq.md shows"
            )
            _logger.warning("%s", text)
            self._warnings.append(text)
        self.stages: list[Stage] = []
        self._began = time.perf_counter()

    @leaves_models_alone
    def add(self, name: str, net: nn.Module) -> None:
        """Measure a network."""
        seconds = time.perf_counter() - self._began if self.stages else 0.0
        found = self.answers.likenesses(net)
        solved, held_out = found[0], found[-1]  # one and the same where none is held out
        accuracy = math.nan if self._evaluate is None else evaluated(self._evaluate, net, name)
        if (processes := self._data.all.processes) is not None:
            accuracy = processes.first(accuracy, "what evaluate returned")
        if self._evaluate is not None and not self.stages and not math.isfinite(accuracy):
            raise ConfigError(f"evaluate must return a number for the model as it was given, got {accuracy} (shrink)")
        stage = Stage(
            network=name,
            macs=count_macs(net, self._data.example),
            params=count_params(net),
            distance=held_out.distance.value,
            distance_low=held_out.distance.low,
            distance_high=held_out.distance.high,
            agreement=held_out.agreement.value,
            agreement_low=held_out.agreement.low,
            agreement_high=held_out.agreement.high,
            calibration_distance=solved.distance.value,
            calibration_agreement=solved.agreement.value,
            accuracy=accuracy,
            seconds=seconds,
        )
        self.stages.append(stage)
        self._began = time.perf_counter()

    def warnings(self) -> tuple[str, ...]:
        """Return what makes the figures of the last network doubtful, and what to do about it."""
        if math.isinf(self.stages[-1].distance):
            _logger.warning("%s", NO_SCALE)
            return (NO_SCALE,)
        found = [*self._warnings]
        if self.stages[-1].network == "distilled":
            # Distillation can take a network away from the unpruned one where a function of the caller's distils, or
            # where other images than the held-out ones judged.
            before, after = self.stages[-2].distance, self.stages[-1].distance
            if after > MOST_DISTANCE * before:
                text = (
                    f"the distilled network is kept, but its distance from the unpruned network is {after:.3g}, "
                    f"{before:.3g} before distillation; these samples didn't decide whether to keep it. "
                    "shrink(..., distill=False) returns the network before distillation"
                )
                _logger.warning("%s", text)
                found.append(text)
        return (*found, *self._few_images())

    def _few_images(self) -> tuple[str, ...]:
        """Return a warning where images were too few, to hold any out or for the network."""
        if self._data.held_out is None:
            text = (
                f"none of {self._data.learned.samples_of_all} samples could be held out, so distance and agreement are "
                "those of the calibration data, on which a network looks better than it is: pass at least "
                f"{HELD_OUT}, better some hundred"
            )
            _logger.warning("%s", text)
            return (text,)
        last = self.stages[-1]
        is_far = last.distance_low > last.calibration_distance and last.distance > _GAP * last.calibration_distance
        agrees_less = (
            last.agreement_high < last.calibration_agreement
            and last.agreement < last.calibration_agreement - _GAP_OF_AGREEMENT
        )
        # Where the outputs hardly differ, so do the answers but for ties.
        if last.distance < SMALL or not (is_far or agrees_less):
            return ()
        found = (
            f"distance {last.distance:.3g} on held-out samples, {last.calibration_distance:.3g} on the calibration data"
        )
        if not math.isnan(last.agreement):
            found += f"; agreement {last.agreement:.3g} and {last.calibration_agreement:.3g}"
        text = (
            f"{self._data.learned.samples_of_all} samples are too few for this network ({found}): pass more, as "
            "different from each other as the inputs it will be used on, or keep a larger share of the cost"
        )
        _logger.warning("%s", text)
        return (text,)


def chooses_how_many(pruner: str | Callable[..., MasksLike]) -> bool:
    """Say whether a pruner neither accepts budgets nor, as NNI's pruners do, exactly the ratios that it is given."""
    return callable(pruner) or not (pruner_info(pruner).origin == "nni" or "budget" in pruner_info(pruner).knobs())


def check_has_size(pruner: str | Callable[..., MasksLike], what: str) -> None:
    """Refuse a pruner that can't be asked for a size; ``what`` begins the sentence."""
    if chooses_how_many(pruner):
        named = "a function" if callable(pruner) else repr(pruner)
        raise ConfigError(
            f"{what} a pruner that can be asked for a size, got {named}, which chooses how many channels it keeps "
            "(pruner)"
        )


def evaluated(evaluate: Callable[[nn.Module], float], net: nn.Module, name: str) -> float:
    """Return the number that `evaluate` returns for a network, whose ``name`` tells it from others.

    What `evaluate` raises is told with the name, and raised on.
    """
    with evaluation_mode(net), lent(net):
        try:
            given: Any = evaluate(net)
        except Exception as error:
            _logger.warning("evaluate failed for the %s network: %s", name, raised(error))
            raise
    try:
        if isinstance(given, (str, bytes)):
            raise TypeError
        found = float(given)
    except (TypeError, ValueError, RuntimeError):
        raise ConfigError(f"evaluate must return a number, got {shown(given)} (shrink)") from None
    if not math.isfinite(found) and name != UNPRUNED:
        _logger.warning("evaluate returned %s for the %s network", found, name)
    return found


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


def as_described(
    model: nn.Module, budget: Budget, narrow_heads: bool | None, pruner: str | Callable[..., MasksLike]
) -> tuple[Budget, bool]:
    """Return the budget, and whether the smaller network has to be one that the config of Transformers describes.

    That is the default for a model of Transformers, and with equal blocks. ConfigError for what can't be described.
    """
    is_asked = budget.equal_blocks or (budget.equal_blocks is None and not narrow_heads)
    if not is_pretrained(model) or not is_asked:
        return budget, False
    why = why_undescribed(model)
    if names := without_plain_weights(model):
        why = f"which has other layers than the plain ones that are pruned ({listed(names)})"
    if why:
        why = f"a model that its config doesn't describe, {why}"
    elif not callable(pruner) and chooses_how_many(pruner):
        why = "a pruner that chooses how many channels it keeps"
    elif budget.allocation != "uniform":
        why = f"the allocation {budget.allocation!r}, by which blocks keep different widths"
    if why:
        raise ConfigError(
            f"the smaller network must be one that the config of {type(model).__name__} can describe, so that "
            f"from_pretrained loads it, got {why}; {FREE_WIDTHS} (shrink)"
        )
    return replace(budget, equal_blocks=True), True


def check_layers(model: nn.Module, layers: Iterable[str | Mapping[str, Any]] | None, place: str) -> None:
    """Raise ConfigError for layers that a model doesn't have, with the nearest names that it has."""
    if layers is None:
        return
    known = [name for name, module in model.named_modules() if name and has_channels(module)]
    modules = {name for name, _ in model.named_modules()}
    named: list[Any] = []
    for each in layers:
        own = each.get("op_names", ()) if isinstance(each, Mapping) else [each]
        named += own if isinstance(own, (list, tuple)) else [own]
    if not named and not any(isinstance(each, Mapping) for each in layers):
        raise ConfigError(
            f"layers must name at least one layer, got none; None stands for all that can lose channels ({place})"
        )
    for name in named:
        if name not in modules:
            raise unknown_name("layer of the model", name, known, place)


def check_choices(
    budget: Budget,
    pruner: Any,
    knobs: Mapping[str, Any] | None,
    layers: list[str | Mapping[str, Any]] | None,
    compensate: Any,
    distill: Any,
    outputs: Any,
    evaluate: Any,
    place: str,
) -> None:
    """Check what can be checked before there is a trained network."""
    (instance(Mapping) | NONE).check("knobs", knobs, place)
    (taking("network") | NONE).check("evaluate", evaluate, place)
    (taking("output", "inputs") | NONE).check("outputs", outputs, place)
    if isinstance(pruner, type):
        raise ConfigError(f"pruner must be a pruner's name, or a function, got the class {pruner.__name__} ({place})")
    if callable(pruner):
        taking("model", "config_list", "images").check("pruner", pruner, place)
    else:
        check_knob_names(pruner, knobs or {}, place)
        if not pruner_info(pruner).structured:
            raise ConfigError(f"pruner must be one that removes whole channels, got {pruner!r} ({place})")
        check_no_ratios([each if isinstance(each, Mapping) else {} for each in layers or ()], "layers")
    if budget.allocation == AUTO:
        allocations_to_try(pruner)
    if is_class(compensate) and issubclass(compensate, RecoveryMethod):
        raise ConfigError(
            f"compensate must be a method's name, an object of it or a function, got the class {compensate.__name__} "
            f"({place})"
        )
    is_given = compensate is None or isinstance(compensate, RecoveryMethod) or callable(compensate)
    if not is_given:
        RECOVERIES.info(compensate, place, "compensate")
    if callable(compensate) and not isinstance(compensate, RecoveryMethod):
        taking("model", "masks", "images").check("compensate", compensate, place)
    if not (isinstance(distill, (bool, Mapping)) or callable(distill)):
        raise ConfigError(f"distill must be True, False, knobs or a function, got {distill!r} ({place})")
    if callable(distill):
        taking("dense", "model", "images").check("distill", distill, place)
    if isinstance(distill, Mapping):
        allowed = tuple(inspect.signature(distillation).parameters)[3:]
        for knob in distill:
            if knob not in allowed:
                raise unknown_name("knob of distill", str(knob), allowed, place)
        check_knobs("distill", distill, DISTILLATION_KNOBS)
