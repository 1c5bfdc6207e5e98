"""A smaller network in one call: dependency groups, pruning, weight reconstruction, distillation, checks, report."""

from __future__ import annotations

import inspect
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from nni.compression.utils import Evaluator
from torch import nn

from nni_topo.errors import (
    ANYTHING,
    FUNCTION,
    NONE,
    ConfigError,
    as_settings,
    check_knobs,
    checked,
    instance,
    shown,
    unknown_name,
)
from nni_topo.network.cost import NetworkCost, time_shares
from nni_topo.network.runtime import (
    BATCHES,
    HELD_OUT,
    MODEL,
    ROUND_TO,
    Calibration,
    batches_of,
    calls,
    check_model,
    detached_copy,
    device_of,
    evaluation_mode,
    first_call,
    leaves_models_alone,
    structure_call,
)
from nni_topo.network.speedup import (
    OUTPUT,
    DenseReport,
    MasksLike,
    ModelReport,
    by_reason,
    check_masks,
    dense_report_of,
    dependency_groups,
    give_report,
    to_dense,
    widths_multiple,
)
from nni_topo.pruners.budget import (
    AUTO,
    ONE_CHANNEL,
    Budget,
    BudgetOutcome,
    BudgetPlanner,
    budget_outcome,
    network_cost,
    tell_if_missed,
)
from nni_topo.pruners.checks import check_no_ratios
from nni_topo.pruners.registry import check_knob_names, create_pruner, pruner_info
from nni_topo.recovery import RecoveryMethod, compensation, distillation
from nni_topo.recovery.distilling import KNOBS as DISTILLATION_KNOBS
from nni_topo.recovery.distilling import Verdict
from nni_topo.recovery.lesson import MOST_DISTANCE, Outputs, check_one_shape
from nni_topo.recovery.likeness import Answers
from nni_topo.recovery.narrowing import narrow_instead
from nni_topo.recovery.registry import RECOVERIES
from nni_topo.recovery.report import CompensationReport
from nni_topo.runs.allocating import Tried, allocations_to_try, check_held_out, compared
from nni_topo.runs.choices import Target
from nni_topo.runs.widths import layer_ratios, pruning_config, sorted_layers

if TYPE_CHECKING:
    import pandas

Compensate = Callable[[nn.Module, MasksLike, Iterable[Any]], nn.Module]
Distill = Callable[[nn.Module, nn.Module, Iterable[Any]], nn.Module]

# A network is said to be worse on held-out images than on calibration images if its distance is so many times as large,
# or its agreement so much smaller, and the interval of the held-out figure excludes the other one.
_GAP = 2.0
_LEAST_GAP = 0.05  # held-out distances below it, as shares of the outputs' variance, are small enough
_GAP_OF_AGREEMENT = 0.05
_logger = logging.getLogger(__name__)


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
    seconds: float  # wall time of the step; with allocation="auto" that of "pruned" is for all tries and their recovery


@dataclass(frozen=True, repr=False)
class ShrinkReport(ModelReport):
    """How a network was made smaller; its ``repr`` is a table with notes.

    Attributes
    ----------
    stages : tuple of Stage
        The unpruned network, and the network after each step. Distances and agreements are those of held-out images.
    layers : DenseReport
        Channels of every layer before and after, and why some channels are kept although they were to be removed.
    compensation : CompensationReport or None
        Errors of each layer before and after weight reconstruction; None without a method of this package.
    tried : tuple of Tried
        The ways to distribute the budget that were tried, with ``allocation="auto"``.
    budget : BudgetOutcome or None
        Whether the budget was met, and why not.
    images : int
        Number of calibration images: pruning, weight reconstruction and distillation use them.
    held_out : int
        Number of held-out images, which no step uses; 0 if there were fewer than eight images in all. Then the figures
        are those of the calibration images.
    warnings : tuple of str
        What makes the figures doubtful, with what to do about it.
    whole : dict of str to str
        By layer that keeps all channels because they can't be removed, the reason. Empty if ``layers`` was given.
    distillation : Verdict or None
        Whether the distilled weights were kept, and the figures that decided; None where :func:`nni_topo.distill`
        didn't run.
    """

    stages: tuple[Stage, ...]
    layers: DenseReport
    compensation: CompensationReport | None = None
    tried: tuple[Tried, ...] = ()
    budget: BudgetOutcome | None = None
    images: int = 0
    held_out: int = 0
    warnings: tuple[str, ...] = ()
    whole: dict[str, str] = field(default_factory=dict)
    distillation: Verdict | None = None

    def to_frame(self) -> pandas.DataFrame:
        """Return the stages as a table, one row each."""
        import pandas

        return pandas.DataFrame([asdict(stage) for stage in self.stages])

    def __repr__(self) -> str:
        import pandas

        rows = [
            {
                "network": stage.network,
                "macs": stage.macs,
                "params": stage.params,
                "distance": _with_interval(stage.distance, stage.distance_low, stage.distance_high),
                "agreement": _with_interval(stage.agreement, stage.agreement_low, stage.agreement_high),
                "accuracy": stage.accuracy,
                "seconds": stage.seconds,
            }
            for stage in self.stages
        ]
        frame = pandas.DataFrame(rows).dropna(axis="columns", how="all")
        lines = [frame.to_string(index=False, float_format=lambda value: f"{value:.4g}")]
        if self.held_out:
            measured = "distance and agreement are" if "agreement" in frame else "distance is"
            lines.append(
                f"{measured} measured on {self.held_out} held-out images, with 95 % intervals; the {self.images} other "
                "images are the calibration data"
            )
        if self.budget is not None:
            lines.append(str(self.budget))
        if self.distillation is not None:
            lines.append(str(self.distillation))
        lines += [f"warning: {each}" for each in self.warnings]
        lines += map(repr, self.tried)
        left_alone = self.compensation.left_alone if self.compensation else {}
        lines += [f"the weights of {name} are not reconstructed: {reason}" for name, reason in left_alone.items()]
        lines += [
            f"{row.name} keeps {row.kept} channels that were to be removed: {row.reason}" for row in self.layers.kept
        ]
        lines += [f"{name} keeps all channels: {why}" for name, why in self.whole.items() if why != OUTPUT]
        return "\n".join(lines)


def _with_interval(value: float, low: float, high: float) -> str | None:
    """Return a number and its interval as the table shows them; None for NaN."""
    if math.isnan(value):
        return None
    return f"{value:.4g}" if low == high else f"{value:.4g} ({low:.3g}-{high:.3g})"


# Arguments that are names, knobs or functions are checked by `_check`.
@checked(model=MODEL, images=BATCHES, budget=ANYTHING, pruner=ANYTHING, distill=ANYTHING, round_to=ROUND_TO)
@leaves_models_alone
def shrink(
    model: nn.Module,
    images: Iterable[Any] | Evaluator,
    budget: Budget | Mapping[str, Any],
    *,
    pruner: str | Callable[..., MasksLike] = "reconstruction",
    knobs: Mapping[str, Any] | None = None,
    layers: Iterable[str | Mapping[str, Any]] | None = None,
    compensate: str | RecoveryMethod | Compensate | None = "reconstruct",
    distill: Mapping[str, Any] | Distill | bool = True,
    narrow_heads: bool = True,
    outputs: Outputs | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    round_to: int | Literal["auto"] | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> nn.Module:
    """Make a trained network smaller, from unlabelled images alone.

    Parameters
    ----------
    model : torch.nn.Module
        The trained network, not wrapped by a pruner. It isn't changed.
    images : iterable or nni.compression.utils.Evaluator
        Batches of inputs, or of ``(inputs, ...)``; labels aren't used. If it is an evaluator, the batches it evaluates
        on. They are read once, see :class:`nni_topo.Calibration`; a DataLoader may shuffle and augment.
        Every eighth image is held out from all steps, for the report. 1,000 images are enough for small networks.
    budget : Budget or mapping
        The share of the cost to keep, e.g. ``{"flops": 0.25}``, see :class:`nni_topo.Budget`. With
        ``"allocation": "auto"`` the budget is distributed in every way that the pruner offers, the weights of each
        network are reconstructed, and the network with the smallest loss on the held-out images is kept; the loss is
        that of :func:`nni_topo.distill`. That takes two or three times as long; the report has the figures of all.
    pruner : str or callable, default="reconstruction"
        Name of a structured pruner, NNI's own too. Or a function of (a copy of the model, a
        config_list with dependency groups and without ratios, the calibration images) that returns masks.
    knobs : mapping, optional
        The named pruner's own arguments.
    layers : iterable of str or mapping, optional
        Names of the layers to prune, or entries of a config_list without ratios. Their ``max_sparse_ratio`` and
        ``min_sparse_ratio`` are the largest and smallest share of channels that a layer loses. By default all
        convolutions and linear layers except those that give the output.
    compensate : str, RecoveryMethod, callable or None, default="reconstruct"
        Method of :func:`nni_topo.compensate`, by name or as an object with settings of its own such as
        ``nni_topo.recovery.Reconstruct(refine=0)``; or a function of (model, masks, images) that returns a model of
        full size; None: the weights are not reconstructed.
    distill : mapping, callable or bool, default=True
        Whether to distil at the end. The distilled weights are kept only if, on the held-out images, the loss falls and
        the distance at most doubles; ``report.distillation`` has the figures. Or knobs of :func:`nni_topo.distill`,
        e.g. ``{"seconds": 60, "augment": ...}``; or a function of (dense, model, images) that returns a dense model,
        which is kept in any case.
    narrow_heads : bool, default=True
        Instead of removing heads of attention, make all heads of the module narrower for the same cost, where
        :func:`nni_topo.narrow_heads` can. Not done for a latency budget, nor with ``round_to``.
    outputs : callable, optional
        What counts of the model's output, as for :func:`nni_topo.distill`: the report, the allocation and distillation
        look at nothing else.
    evaluate : callable, optional
        A function of a network in evaluation mode that returns a number for the report, e.g. its accuracy.
    round_to : int or "auto", optional
        Pruned layers keep a multiple of this number of channels; ``"auto"`` chooses it for the model's device.
    seed : int, default=0
        Seed of all steps.
    progress : bool or None, default=None
        Show on standard error how far it is: in a terminal a bar, elsewhere a line every half minute. None: after
        five seconds.

    Returns
    -------
    torch.nn.Module
        The dense network, in the mode of ``model``. Its ``report`` is a :class:`ShrinkReport`.

    Raises
    ------
    ConfigError
        If the budget, a name or a knob is invalid, or the allocation is ``"auto"`` and the pruner has only one.
    DataError
        If the images can't be used, or are fewer than eight for ``"auto"``.
    SpeedupError
        If the model can't be traced, or is still wrapped.

    See Also
    --------
    nni_topo.compensate, nni_topo.distill, nni_topo.to_dense : The steps, one by one.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    >>> small = shrink(model, [torch.randn(256, 16)], {"flops": 0.25}, distill={"steps": 100})
    >>> [stage.network for stage in small.report.stages]
    ['unpruned', 'pruned', 'reconstructed', 'distilled']
    >>> small(torch.randn(2, 16)).shape
    torch.Size([2, 4])
    """
    calibration = batches_of(images, model, "images")
    budget = as_settings(Budget, budget, "budget")
    layers = None if layers is None else list(layers)
    _check(model, budget, pruner, knobs, compensate, distill, outputs, evaluate)
    if not callable(pruner):
        check_no_ratios([each if isinstance(each, Mapping) else {} for each in layers or ()], "layers")
    data = _split(calibration, model)
    if distill is True or isinstance(distill, Mapping):
        check_one_shape(calls(model, data.all))
    measured = _Measurements(model, data, evaluate, outputs)
    measured.add("unpruned", model)
    prunable = _layers_to_prune(model, data.example, layers)
    width_unit = widths_multiple(round_to, device_of(model))
    narrows = narrow_heads and budget.kind != "latency" and width_unit is None
    plan = _Plan(
        model, data.example, prunable, pruner, dict(knobs or {}), compensate, narrows, width_unit, seed, progress
    )
    tried: tuple[Tried, ...] = ()
    if budget.allocation == AUTO:
        recovered, tried = _best_allocation(plan, budget, data, outputs)
        measured.add("pruned", recovered.pruned.dense)
    else:
        pruned = _prune(plan, budget, data.learned)
        measured.add("pruned", pruned.dense)
        recovered = _compensate(plan, pruned, data.learned)
    outcome = _outcome(budget, model, recovered.dense, recovered.pruned.planned, data.all, pruner)
    if compensate is not None:
        measured.add("reconstructed", recovered.dense)
    # Read before distillation: a function of the caller's may distil in place.
    layer_report = dense_report_of(recovered.dense)
    final, verdict = _distill(plan, recovered, data, distill, outputs)
    if distill is not False:
        measured.add("distilled", final)
    report = ShrinkReport(
        stages=tuple(measured.stages),
        layers=layer_report,
        compensation=recovered.report,
        tried=tried,
        budget=outcome,
        images=data.learned.samples,
        held_out=0 if data.held_out is None else data.held_out.samples,
        warnings=measured.warnings() + (recovered.report.warnings if recovered.report is not None else ()),
        whole=prunable.unpruned,
        distillation=verdict,
    )
    if not give_report(final, report):
        _logger.warning(
            "the model has an attribute of its own called report, so that this is only told here: %s", report
        )
    return final


@dataclass(frozen=True)
class _Data:
    """The images, split into calibration data and held-out images.

    No step uses the held-out ones: a network looks better than it is on the images that its weights were solved on.
    """

    all: Calibration
    learned: Calibration
    held_out: Calibration | None  # None where there are too few
    example: Any  # example inputs, of which only the shapes are read


@dataclass(frozen=True)
class _Prunable:
    """The layers to prune, as entries of a config_list without ratios."""

    entries: list[dict[str, Any]]
    unpruned: dict[str, str]  # by other layer, why it can't lose channels; empty where the caller names the layers
    is_default: bool  # the caller named no layer


@dataclass(frozen=True)
class _Plan:
    """How the network is made smaller, apart from the budget and the images."""

    model: nn.Module
    example: Any
    prunable: _Prunable
    pruner: str | Callable[..., MasksLike]
    knobs: dict[str, Any]
    compensate: str | RecoveryMethod | Compensate | None
    narrows: bool
    round_to: int | None
    seed: int
    progress: bool | None


@dataclass(frozen=True)
class _Pruned:
    """The pruned network without recovery."""

    full: nn.Module  # of full size, heads made narrower
    masks: MasksLike
    dense: nn.Module
    planned: BudgetOutcome | None  # the outcome as the pruner counts it; None where it accepts no budget


@dataclass(frozen=True)
class _Recovered:
    """The pruned network after weight reconstruction, if that was asked for."""

    pruned: _Pruned
    dense: nn.Module
    report: CompensationReport | None


def _split(calibration: Calibration, model: nn.Module) -> _Data:
    """Hold out every eighth image, and make example inputs."""
    args, kwargs = structure_call(model, calibration)
    learned, held_out = calibration.split()
    return _Data(calibration, learned, held_out, kwargs or args)


def _layers_to_prune(model: nn.Module, example: Any, layers: list[str | Mapping[str, Any]] | None) -> _Prunable:
    """Return config_list entries for the named layers; by default for all layers that can lose channels."""
    if layers is not None:
        entries = [dict(each) for each in layers if isinstance(each, Mapping)]
        names = [each for each in layers if isinstance(each, str)]
        return _Prunable([{"op_names": names}, *entries] if names else entries, {}, is_default=False)
    names, unpruned = sorted_layers(model, example)
    if not names:
        # What can be changed comes first: a layer that gives the output keeps its channels in any case.
        layers_of = sorted(by_reason(unpruned).items(), key=lambda each: each[0] == OUTPUT)
        told = [f"{', '.join(same)}: {why}" for why, same in layers_of]
        reasons = "; ".join(told) or "no convolution or linear layer"
        raise ConfigError(f"a model must have a layer whose channels can be removed, got none: {reasons} (shrink)")
    return _Prunable([{"op_names": names}], unpruned, is_default=True)


def _prune(plan: _Plan, budget: Budget, images: Calibration) -> _Pruned:
    """Prune under a budget."""
    masks, planned = _choose_channels(plan, budget, images)
    full = plan.model
    if plan.narrows:
        full, masks = narrow_instead(plan.model, images, masks)
    return _Pruned(full, masks, to_dense(full, plan.example, masks, round_to=plan.round_to), planned)


def _choose_channels(plan: _Plan, budget: Budget, images: Calibration) -> tuple[MasksLike, BudgetOutcome | None]:
    """Run the pruner on a copy of the model, and return its masks and the outcome of the budget as it counts it.

    The outcome is None where the pruner accepts no budget.
    """
    victim, entries, pruner = detached_copy(plan.model), plan.prunable.entries, plan.pruner
    groups = dependency_groups(victim, plan.example, entries)
    config_list: list[dict[str, Any]] = groups.unnamed() if plan.prunable.is_default else groups
    if callable(pruner):
        chosen = pruner(victim, config_list, images)
        instance(Mapping).check("masks", chosen, "pruner")
        check_masks(plan.model, chosen)
        return chosen, None
    example = plan.example
    if budget.kind == "latency":  # the time of a whole batch counts
        args, kwargs = first_call(plan.model, images)
        example = kwargs or args
    pruner_knobs = pruner_info(pruner).knobs()
    if "budget" not in pruner_knobs:
        table: Any = budget.latency_table  # a file is read when the budget is made
        kind: Any = budget.kind
        target = Target(kind, budget.share)
        ratios = layer_ratios(plan.model, example, target, entries, table, plan.round_to)
        config_list = pruning_config(plan.model, example, ratios)
    offered = {
        "seed": plan.seed,
        "calibration": images,
        "example_inputs": example,
        "budget": budget,
        "round_to": plan.round_to,
    }
    taken = {name: offered[name] for name in pruner_knobs if name in offered}
    wrapped = create_pruner(pruner, victim, config_list, **taken | plan.knobs)
    masks: MasksLike = wrapped.compress()[1]
    wrapped.unwrap_model()
    planner = getattr(wrapped, "planner", None)  # NNI's pruners have none
    return masks, planner.outcome if isinstance(planner, BudgetPlanner) else None


def _compensate(plan: _Plan, pruned: _Pruned, images: Calibration) -> _Recovered:
    """Reconstruct the weights of a pruned network, if the plan says so."""
    if plan.compensate is None:
        return _Recovered(pruned, pruned.dense, None)
    report: CompensationReport | None = None
    if isinstance(plan.compensate, (str, RecoveryMethod)):
        done = compensation(
            pruned.full, pruned.masks, images, method=plan.compensate, seed=plan.seed, progress=plan.progress
        )
        full, report = done.model, done.report
    else:
        full = _checked_network(plan.compensate(pruned.full, pruned.masks, images), "compensate")
    return _Recovered(pruned, to_dense(full, plan.example, pruned.masks, round_to=plan.round_to), report)


def _best_allocation(
    plan: _Plan, budget: Budget, data: _Data, outputs: Outputs | None
) -> tuple[_Recovered, tuple[Tried, ...]]:
    """Distribute the budget in each way that the pruner offers, and keep the network nearest to the unpruned one."""
    judges = check_held_out(data.all, data.held_out)
    candidates: dict[str, _Recovered] = {}
    for name in allocations_to_try(plan.pruner):
        own: Any = replace(budget, allocation=name)  # type: ignore[arg-type]
        candidates[name] = _compensate(plan, _prune(plan, own, data.learned), data.learned)
    tried = compared(plan.model, {name: each.dense for name, each in candidates.items()}, judges, outputs)
    return next(candidates[each.allocation] for each in tried if each.is_chosen), tried


def _distill(
    plan: _Plan,
    recovered: _Recovered,
    data: _Data,
    distill: Mapping[str, Any] | Distill | bool,
    outputs: Outputs | None,
) -> tuple[nn.Module, Verdict | None]:
    """Distil the dense network, if asked to, and return it with the figures that decided whether weights are kept.

    The figures are None where :func:`nni_topo.distill` doesn't run.
    """
    if distill is False:
        return recovered.dense, None
    if callable(distill):
        return _checked_network(distill(recovered.dense, plan.model, data.learned), "distill"), None
    knobs: dict[str, Any] = {
        "held_out": data.held_out,
        "outputs": outputs,
        "seed": plan.seed,
        "progress": plan.progress,
    }
    given: Mapping[str, Any] = {} if distill is True else distill
    done = distillation(recovered.dense, plan.model, data.learned, **knobs | dict(given))
    return done.model, done.verdict


class _Measurements:
    """Measures the network after each step, and the step's time."""

    @leaves_models_alone
    def __init__(
        self,
        model: nn.Module,
        data: _Data,
        evaluate: Callable[[nn.Module], float] | None,
        outputs: Outputs | None = None,
    ) -> None:
        judges = [data.learned] if data.held_out is None else [data.learned, data.held_out]
        self._answers = Answers(model, *judges, outputs=outputs)
        self._data, self._evaluate = data, evaluate
        self.stages: list[Stage] = []
        self._began = time.perf_counter()

    @leaves_models_alone
    def add(self, name: str, net: nn.Module) -> None:
        """Measure a network."""
        seconds = time.perf_counter() - self._began if self.stages else 0.0
        found = self._answers.likenesses(net)
        solved, held_out = found[0], found[-1]  # one and the same where none is held out
        cost = NetworkCost(net, self._data.example)({})
        with evaluation_mode(net):
            accuracy = math.nan if self._evaluate is None else _number(self._evaluate(net))
        stage = Stage(
            network=name,
            macs=cost.macs,
            params=cost.params,
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
        return (*self._worse(), *self._few_images())

    def _worse(self) -> tuple[str, ...]:
        """Return a warning where distillation took the network away from the unpruned one.

        That can be where a function of the caller's distils, or where other images than the held-out ones judged.
        """
        if self.stages[-1].network != "distilled":
            return ()
        before, after = self.stages[-2], self.stages[-1]
        if not after.distance > MOST_DISTANCE * before.distance:
            return ()
        text = (
            f"the distilled network is kept, but its distance from the unpruned network is {after.distance:.3g}, "
            f"{before.distance:.3g} before distillation; these images didn't decide whether to keep it. "
            "shrink(..., distill=False) returns the network before distillation"
        )
        _logger.warning("%s", text)
        return (text,)

    def _few_images(self) -> tuple[str, ...]:
        """Return a warning where images were too few, to hold any out or for the network."""
        if self._data.held_out is None:
            text = (
                f"none of {self._data.learned.samples} images could be held out, so distance and agreement are "
                "those of the calibration images, on which a network looks better than it is: pass at least "
                f"{HELD_OUT} images, better some hundred"
            )
            _logger.warning("%s", text)
            return (text,)
        last = self.stages[-1]
        is_far = (
            last.distance_low > last.calibration_distance
            and last.distance > _GAP * last.calibration_distance
            and last.distance > _LEAST_GAP
        )
        agrees_less = (
            last.agreement_high < last.calibration_agreement
            and last.agreement < last.calibration_agreement - _GAP_OF_AGREEMENT
        )
        if not (is_far or agrees_less):
            return ()
        found = (
            f"distance {last.distance:.3g} on held-out images, {last.calibration_distance:.3g} on calibration images"
        )
        if not math.isnan(last.agreement):
            found += f"; agreement {last.agreement:.3g} and {last.calibration_agreement:.3g}"
        text = (
            f"{self._data.learned.samples} images are too few for this network ({found}): pass more images, as "
            "different from each other as the images it will be used on, or keep a larger share of the cost"
        )
        _logger.warning("%s", text)
        return (text,)


@leaves_models_alone
def _outcome(
    budget: Budget,
    model: nn.Module,
    dense: nn.Module,
    planned: BudgetOutcome | None,
    images: Calibration,
    pruner: str | Callable[..., MasksLike],
) -> BudgetOutcome:
    """Return the share of the cost that the dense network keeps, and warn where that misses the budget."""
    args, kwargs = first_call(model, images)
    example: Any = kwargs or args
    report = dense_report_of(dense)
    if budget.kind != "latency":
        left, whole = (network_cost(budget.kind, net, example)({}) for net in (dense, model))
        share = left / whole
    elif budget.latency_table is not None:
        table: Any = budget.latency_table  # a file was read when the budget was made
        cost = network_cost(budget.kind, model, example, table)
        known = {row.name: row for row in report.rows if row.name in table.layers}
        share = cost({name: np.arange(row.before) < row.after for name, row in known.items()}) / cost({})
    else:
        ((share, _),) = time_shares([dense], model, example, budget.share)
    if planned is not None and not planned.is_met:  # the planner has warned
        return budget_outcome(budget.kind, budget.share, share, planned.why)
    if _chooses_how_many(pruner):
        return tell_if_missed(budget, share, "the pruner chooses how many channels it keeps")
    why = "layers keep channels that were to be removed" if report.kept else ONE_CHANNEL
    return budget_outcome(budget.kind, budget.share, share, why)


def _chooses_how_many(pruner: str | Callable[..., MasksLike]) -> bool:
    """Say whether a pruner neither accepts budgets nor, as NNI's pruners do, exactly the ratios that it is given."""
    return callable(pruner) or not (pruner_info(pruner).origin == "nni" or "budget" in pruner_info(pruner).knobs())


def _number(found: Any) -> float:
    """Return what `evaluate` returned, as a number."""
    try:
        return float(found)
    except (TypeError, ValueError, RuntimeError):
        raise ConfigError(f"evaluate must return a number, got {shown(found)} (shrink)") from None


def _checked_network(made: Any, name: str) -> nn.Module:
    """Return what a function of the caller's returned, if it is a network."""
    if not isinstance(made, nn.Module):
        raise ConfigError(f"{name} must return a torch.nn.Module, got {type(made).__name__} (shrink)")
    return made


def _check(
    model: nn.Module,
    budget: Budget,
    pruner: Any,
    knobs: Mapping[str, Any] | None,
    compensate: Any,
    distill: Any,
    outputs: Any,
    evaluate: Any,
) -> None:
    """Check what can be checked before anything runs."""
    check_model(model)
    (instance(Mapping) | NONE).check("knobs", knobs, "shrink")
    (FUNCTION | NONE).check("evaluate", evaluate, "shrink")
    (FUNCTION | NONE).check("outputs", outputs, "shrink")
    if isinstance(pruner, type):
        raise ConfigError(f"pruner must be a pruner's name, or a function, got the class {pruner.__name__} (shrink)")
    if not callable(pruner):
        check_knob_names(pruner, knobs or {})
        if not pruner_info(pruner).structured:
            raise ConfigError(f"pruner must be one that removes whole channels, got {pruner!r} (shrink)")
    if budget.allocation == AUTO:
        allocations_to_try(pruner)
    if isinstance(compensate, type) and issubclass(compensate, RecoveryMethod):
        raise ConfigError(
            f"compensate must be a method's name, an object of it or a function, got the class {compensate.__name__} "
            "(shrink)"
        )
    is_given = compensate is None or isinstance(compensate, RecoveryMethod) or callable(compensate)
    if not is_given:
        RECOVERIES.info(compensate, "compensate")
    if not (isinstance(distill, (bool, Mapping)) or callable(distill)):
        raise ConfigError(f"distill must be True, False, knobs or a function, got {distill!r} (shrink)")
    if isinstance(distill, Mapping):
        allowed = tuple(inspect.signature(distillation).parameters)[3:]
        for knob in distill:
            if knob not in allowed:
                raise unknown_name("knob of distill", str(knob), allowed)
        check_knobs("distill", distill, DISTILLATION_KNOBS)
