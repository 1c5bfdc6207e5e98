"""A smaller network in one call: groups, choice, compensation, distillation, dense, checks, report."""

from __future__ import annotations

import copy
import inspect
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

import torch
from nni.compression.utils import Evaluator
from torch import Tensor, nn

from nni_topo.errors import ConfigError, as_settings, unknown_name
from nni_topo.network.capture import batches_of
from nni_topo.network.cost import NetworkCost
from nni_topo.network.dense import to_dense
from nni_topo.network.dependency import dependency_groups
from nni_topo.network.inputs import calls, first_call, structure_call, tensors_of
from nni_topo.network.masks import Masks, check_model
from nni_topo.network.modes import device_of, evaluation_mode
from nni_topo.network.report import DenseReport
from nni_topo.network.resolve import widths_multiple
from nni_topo.network.untouched import leaves_models_alone
from nni_topo.pruners.budget import AUTO, Budget, network_cost, tell_if_missed
from nni_topo.pruners.registry import check_knob_names, create_pruner, pruner_info
from nni_topo.recovery import compensation, distillation
from nni_topo.recovery.compensating import METHODS
from nni_topo.recovery.lesson import split
from nni_topo.recovery.narrowing import narrow_instead
from nni_topo.recovery.report import CompensationReport
from nni_topo.runs.allocating import Tried, allocations_to_try, check_held_out, compared
from nni_topo.runs.plan import Target
from nni_topo.runs.widths import inner_layers, layer_ratios, pruning_config

if TYPE_CHECKING:
    import pandas

Compensate = Callable[[nn.Module, Masks, Iterable[Any]], nn.Module]
Distill = Callable[[nn.Module, nn.Module, Iterable[Any]], nn.Module]


@dataclass(frozen=True)
class Stage:
    """The network after one step."""

    network: str  # original, pruned, compensated or distilled
    macs: int  # multiply-accumulates of one sample
    params: int
    distance: float  # mean squared distance of the outputs from the original's over their variance, on the images
    agreement: float  # share of images whose largest output is the original's; NaN unless outputs are (images, classes)
    accuracy: float  # what `evaluate` says; NaN without
    seconds: float  # wall time of the step; with allocation="auto" the pruned one's is that of all tries, compensated


@dataclass(frozen=True, repr=False)
class ShrinkReport:
    """How a network was made smaller; its ``repr`` is a table."""

    stages: tuple[Stage, ...]  # the original, and the network after each step
    layers: DenseReport  # channels of every layer before and after, and why some stay
    compensation: CompensationReport | None = None  # how each layer came back; None without the package's compensation
    tried: tuple[Tried, ...] = ()  # each way to deal out a budget with allocation="auto"

    def to_frame(self) -> pandas.DataFrame:
        """Return the stages as a table, one row each."""
        import pandas

        return pandas.DataFrame([asdict(stage) for stage in self.stages])

    def __repr__(self) -> str:
        frame = self.to_frame().dropna(axis="columns", how="all")
        lines = [frame.to_string(index=False, float_format=lambda value: f"{value:.4g}")]
        lines += map(repr, self.tried)
        left_alone = self.compensation.left_alone if self.compensation else {}
        lines += [f"not compensated: {name} ({reason})" for name, reason in left_alone.items()]
        return "\n".join([*lines, *(f"{row.name} keeps {row.kept} more: {row.reason}" for row in self.layers.kept)])


@leaves_models_alone
def shrink(
    model: nn.Module,
    images: Iterable[Any] | Evaluator,
    budget: Budget | Mapping[str, Any],
    *,
    pruner: str | Callable[..., Masks] = "reconstruction",
    knobs: Mapping[str, Any] | None = None,
    layers: Iterable[str | Mapping[str, Any]] | None = None,
    compensate: str | Compensate | None = "reconstruct",
    distill: Mapping[str, Any] | Distill | bool = True,
    narrow_heads: bool = True,
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
        Batches of inputs, or of ``(inputs, ...)``; labels aren't looked at. Of an evaluator, what it
        evaluates on. Some 1,000 are enough for small nets.
    budget : Budget or mapping
        What is left of the cost, e.g. ``{"flops": 0.25}``, see :class:`nni_topo.Budget`. With ``"allocation": "auto"``
        the pruner deals it out in every way that it can, each network is compensated, and the one stays whose answers
        have the least loss, as :func:`nni_topo.distill` counts it, on every eighth of the images, held out from all
        steps. That takes two or three times as long; the report says which, with all figures.
    pruner : str or callable, default="reconstruction"
        Name of a structured pruner, NNI's own too. Or a function of (a copy of the model, a
        config_list with dependency groups and no ratios, the images) that returns masks.
    knobs : mapping, optional
        The named pruner's own arguments.
    layers : iterable of str or mapping, optional
        Names of the layers to prune, or entries of a config_list without ratios, whose ``max_sparse_ratio`` caps what a
        layer loses and whose ``min_sparse_ratio`` is its floor. By default all convolutions and linear layers but those
        that give the output.
    compensate : str, callable or None, default="reconstruct"
        Method of :func:`nni_topo.compensate`, or a function of (model, masks, images) that returns a model of full
        size; None: no compensation.
    distill : mapping, callable or bool, default=True
        Whether to distil behind it, with every eighth of the images held out from both to judge; or knobs of
        :func:`nni_topo.distill`, e.g. ``{"seconds": 60, "augment": ...}``; or a function of (dense, model, images) that
        returns a dense model.
    narrow_heads : bool, default=True
        Keep the heads of attention that the pruner takes, and make all of a module narrower for the same cost, where
        :func:`nni_topo.narrow_heads` can. Not for a budget of time, nor with ``round_to``.
    evaluate : callable, optional
        Gets a network in evaluation mode and returns a number for the report, e.g. its accuracy.
    round_to : int or "auto", optional
        Pruned layers keep a multiple of so many channels.
    seed : int, default=0
        Of all steps.
    progress : bool or None, default=None
        Show bars on standard error; None: in a terminal, for what takes longer than five seconds.

    Returns
    -------
    torch.nn.Module
        The dense network, in the mode of ``model``. Its ``report`` is a :class:`ShrinkReport`.

    Raises
    ------
    ConfigError
        If the budget, a name or a knob can't be used, or ``"auto"`` with a pruner that deals budgets out in one way.
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
    ['original', 'pruned', 'compensated', 'distilled']
    >>> small(torch.randn(2, 16)).shape
    torch.Size([2, 4])
    """
    images = batches_of(images, model, "images")
    budget = as_settings(Budget, budget, "budget")
    _check(model, budget, pruner, knobs, compensate, distill)
    args, kwargs = structure_call(model, images)
    example: Any = kwargs or args
    stages = _Stages(model, images, example, evaluate)
    stages.add("original", model)
    entries = _entries(inner_layers(model, example) if layers is None else layers)
    round_to = widths_multiple(round_to, device_of(model))
    narrows = narrow_heads and budget.kind != "latency" and round_to is None
    own = dict(knobs or {})
    steps = _Steps(model, example, entries, layers is None, pruner, own, compensate, narrows, round_to, seed, progress)
    # What judges distillation is kept from compensation too, which would look better on its own images than it is.
    is_tried = budget.allocation == AUTO
    is_judged = is_tried or distill is True or (isinstance(distill, Mapping) and "held_out" not in distill)
    learned: Iterable[Any] = images
    held_out: list[Any] | None = None
    tried: tuple[Tried, ...] = ()
    if is_tried:
        learned, held_out = split(model, images)
        made, tried = steps.best(budget, learned, check_held_out(model, learned, held_out))
        stages.add("pruned", made.dense)
    else:
        made = steps.pruned(budget, images)
        stages.add("pruned", made.dense)
        if budget.kind != "latency" and _chooses_how_many(pruner):
            whole, left = (network_cost(budget.kind, net, example)({}) for net in (model, made.dense))
            tell_if_missed(budget, left / whole, "the pruner chooses how many channels stay")
        if is_judged:
            learned, held_out = split(model, images)
        made = steps.compensated(made, images if callable(compensate) else learned)
    if compensate is not None:
        stages.add("compensated", made.recovered)
    dense = made.recovered
    layer_report: Any = dense.report
    if distill is not False:
        given = {} if distill is True else distill
        if callable(given):
            dense = given(dense, model, images)
        else:
            own = {"held_out": held_out, "seed": seed, "progress": progress}
            dense = distillation(dense, model, learned, **{**own, **given}).model
        stages.add("distilled", dense)
    report: Any = ShrinkReport(tuple(stages.found), layer_report, made.report, tried)
    dense.report = report
    return dense


@dataclass(frozen=True)
class _Made:
    """A network at the steps before distillation."""

    full: nn.Module  # of full size, heads made narrower
    masks: Masks
    dense: nn.Module
    recovered: nn.Module  # dense and compensated
    report: CompensationReport | None = None


@dataclass(frozen=True)
class _Steps:
    """The steps before distillation, on whichever images."""

    model: nn.Module
    example: Any
    entries: list[dict[str, Any]]
    is_default: bool  # nobody named a layer
    pruner: str | Callable[..., Masks]
    knobs: dict[str, Any]
    compensate: str | Compensate | None
    narrows: bool
    round_to: int | None
    seed: int
    progress: bool | None

    def pruned(self, budget: Budget, images: Iterable[Any]) -> _Made:
        """Prune under a budget."""
        own = {"seed": self.seed, "calibration": images, "example_inputs": self.example, "budget": budget}
        own |= {"round_to": self.round_to}
        masks = _chosen(self.model, self.entries, self.pruner, own, self.knobs, is_default=self.is_default)
        full = self.model
        if self.narrows:
            full, masks = narrow_instead(self.model, images, masks)
        dense = to_dense(full, self.example, masks, round_to=self.round_to)
        return _Made(full, masks, dense, dense)

    def compensated(self, made: _Made, images: Iterable[Any]) -> _Made:
        """Compensate what was pruned, if that is asked for."""
        recovered: CompensationReport | None = None
        if self.compensate is None:
            return made
        if callable(self.compensate):
            full = self.compensate(made.full, made.masks, images)
        else:
            method: Any = self.compensate
            knobs: Any = {"method": method, "seed": self.seed, "progress": self.progress}
            done = compensation(made.full, made.masks, images, **knobs)
            full, recovered = done.model, done.report
        dense = to_dense(full, self.example, made.masks, round_to=self.round_to)
        return replace(made, recovered=dense, report=recovered)

    def best(self, budget: Budget, images: Iterable[Any], held_out: Iterable[Any]) -> tuple[_Made, tuple[Tried, ...]]:
        """Deal a budget out in each way that the pruner can, and keep what answers most like the whole network."""
        made: dict[str, _Made] = {}
        for name in allocations_to_try(self.pruner):
            own: Any = replace(budget, allocation=name)  # type: ignore[arg-type]
            made[name] = self.compensated(self.pruned(own, images), images)
        tried = compared(self.model, {name: each.recovered for name, each in made.items()}, held_out)
        return next(made[each.allocation] for each in tried if each.is_chosen), tried


class _Stages:
    """Measures the network after each step, and how long the step took."""

    def __init__(
        self, model: nn.Module, images: Iterable[Any], example: Any, evaluate: Callable[[nn.Module], float] | None
    ) -> None:
        self._images, self._example, self._evaluate = images, example, evaluate
        self._wanted = self._answers(model)
        self.found: list[Stage] = []
        self._began = time.perf_counter()

    @leaves_models_alone
    def add(self, name: str, net: nn.Module) -> None:
        """Measure a network."""
        seconds = time.perf_counter() - self._began if self.found else 0.0
        found = self._answers(net)
        errors = [
            float((mine - theirs).square().sum() / (theirs - theirs.mean(0)).square().sum())
            for mine, theirs in zip(found, self._wanted, strict=True)
        ]
        agreement = math.nan
        if len(found) == 1 and found[0].dim() == 2:
            agreement = float((found[0].argmax(1) == self._wanted[0].argmax(1)).double().mean())
        cost = NetworkCost(net, self._example)({})
        with evaluation_mode(net):
            accuracy = math.nan if self._evaluate is None else float(self._evaluate(net))
        self.found.append(Stage(name, cost.macs, cost.params, fmean(errors), agreement, accuracy, seconds))
        self._began = time.perf_counter()

    @leaves_models_alone
    def _answers(self, net: nn.Module) -> list[Tensor]:
        """Return all floating outputs."""
        with evaluation_mode(net), torch.no_grad():
            found = [tensors_of(net(*args, **kwargs)) for args, kwargs in calls(net, self._images)]
        return [torch.cat(each).double() for each in zip(*found, strict=True) if each[0].is_floating_point()]


def _entries(layers: Iterable[str | Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return entries of a config_list: those given, and one for all layers that are given by name."""
    found = list(layers)
    entries = [dict(each) for each in found if isinstance(each, Mapping)]
    names = [each for each in found if isinstance(each, str)]
    return [{"op_names": names}, *entries] if names else entries


def _chosen(
    model: nn.Module,
    entries: list[dict[str, Any]],
    pruner: str | Callable[..., Masks],
    own: dict[str, Any],
    knobs: dict[str, Any],
    *,
    is_default: bool,
) -> Masks:
    """Return the masks of a pruner that is told where and how much, on a copy of the model."""
    victim, images, budget = copy.deepcopy(model), own["calibration"], own["budget"]
    groups = dependency_groups(victim, own["example_inputs"], entries)
    config_list: list[dict[str, Any]] = groups.unnamed() if is_default else groups
    if callable(pruner):
        return pruner(victim, config_list, images)
    if budget.kind == "latency":  # of the batch that counts
        args, kwargs = first_call(model, images)
        own["example_inputs"] = kwargs or args
    taken = pruner_info(pruner).knobs()
    if "budget" not in taken:
        example, table = own["example_inputs"], budget.latency_table  # a file is read when the budget is made
        target = Target(budget.kind, budget.share)
        ratios = layer_ratios(model, example, target, entries, table, own["round_to"])
        config_list = pruning_config(model, example, ratios)
    wrapped = create_pruner(pruner, victim, config_list, **{name: own[name] for name in taken if name in own} | knobs)
    masks: Masks = wrapped.compress()[1]
    wrapped.unwrap_model()
    return masks


def _chooses_how_many(pruner: str | Callable[..., Masks]) -> bool:
    """Say whether a pruner neither knows budgets nor, as NNI's do, takes exactly the ratios that it is given."""
    return callable(pruner) or not (pruner_info(pruner).origin == "nni" or "budget" in pruner_info(pruner).knobs())


def _check(
    model: nn.Module, budget: Budget, pruner: Any, knobs: Mapping[str, Any] | None, compensate: Any, distill: Any
) -> None:
    """Raise what can be known before anything runs."""
    check_model(model)
    if not callable(pruner):
        check_knob_names(pruner, knobs or {})
    if budget.allocation == AUTO:
        allocations_to_try(pruner)
    if not (compensate is None or callable(compensate) or compensate in METHODS):
        raise unknown_name("compensate", str(compensate), METHODS)
    if not (isinstance(distill, (bool, Mapping)) or callable(distill)):
        raise ConfigError(f"distill must be True, False, knobs or a function, got {distill!r} (shrink)")
    if isinstance(distill, Mapping):
        allowed = tuple(inspect.signature(distillation).parameters)[3:]
        for knob in distill:
            if knob not in allowed:
                raise unknown_name("knob of distill", str(knob), allowed)
