"""A network that `shrink` or `frontier` prepares once, to make smaller networks of any size, each with a report."""

from __future__ import annotations

import copy
import logging
import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from nni_topo.context import advice, in_context
from nni_topo.errors import GradientError, listed
from nni_topo.maths.ties import first_smallest
from nni_topo.network.attention.config import is_pretrained
from nni_topo.network.cost.cost import Kept, cost_of
from nni_topo.network.cost.latency import measure_latency
from nni_topo.network.cost.measure import counted_run, time_shares, timed_pair
from nni_topo.network.io.checkpoint import why_undescribed
from nni_topo.network.io.exporting import as_run_by
from nni_topo.network.layers.kinds import (
    is_transposed_linear,
    with_linear_layers,
    with_plain_weights,
    with_transposed_weights,
    without_plain_weights,
)
from nni_topo.network.runtime.calibration import Calibration
from nni_topo.network.runtime.copies import detached_copy, leaves_models_alone
from nni_topo.network.runtime.fits import first_call
from nni_topo.network.runtime.inputs import Call
from nni_topo.network.runtime.memory import give_back_memory
from nni_topo.network.runtime.modules import device_of
from nni_topo.network.runtime.progress import LONG, duration
from nni_topo.network.runtime.reports import give_report
from nni_topo.network.speedup.analysis import Analysis
from nni_topo.network.speedup.dense_report import dense_report_of
from nni_topo.network.speedup.dependency import groups_of
from nni_topo.pruners.base import StructuredPruner
from nni_topo.pruners.budget import (
    AUTO,
    NO_NEARER,
    Budget,
    BudgetOutcome,
    BudgetPlanner,
    budget_outcome,
    network_cost,
    warn_if_missed,
)
from nni_topo.pruners.registry import create_pruner, pruner_info
from nni_topo.recovery.clock import Clock
from nni_topo.recovery.distilling import course_on
from nni_topo.recovery.frozen import frozen_layers
from nni_topo.recovery.lesson import judged
from nni_topo.recovery.outputs import OutputKind
from nni_topo.recovery.pool import without_distillation
from nni_topo.recovery.rates import most_tried_steps
from nni_topo.runs.depth import Depth, with_depth
from nni_topo.runs.expected import Expectation, expected
from nni_topo.runs.images import ImageParts
from nni_topo.runs.measurements import UNPRUNED, Measurements
from nni_topo.runs.pipeline import Pipeline, Tried
from nni_topo.runs.prunable import NoneDescribedError, Prunable, layers_to_prune
from nni_topo.runs.report import ShrinkReport
from nni_topo.runs.settings import PREFERRED, Settings, allocations_to_try, free_widths
from nni_topo.runs.widths import as_entries, planned_ratios

# The time of selecting channels by reconstruction, and of reconstructing weights: passes forward and back over the
# calibration data, and seconds for each product of `_products`. Measured on one core.
_PASSES, _SECONDS_OF_A_PRODUCT = 2.0, 3e-11
_POSITIONS = 16  # approximate number of positions of large feature maps drawn for each column
_PLANS = 3  # networks made for one budget at most, where they cost more or less than planned
_LEAST_AIM = 0.1  # of a budget: less isn't planned for it
_logger = logging.getLogger(__name__)


class TimeOfDistillation(NamedTuple):
    """What distilling a network takes at most."""

    steps: int
    again: int  # steps at a lower rate, if needed
    a_step: float  # seconds
    seconds: float  # of all of these, within the limit of distillation
    is_short: bool  # whether these are fewer steps than by default, or the limit allows fewer


@dataclass(frozen=True)
class Prepared:
    """A network and its layers to prune, from which networks of any share of its cost are made."""

    start: Pipeline  # before the first step
    images: ImageParts
    settings: Settings
    budget: Budget  # its kind of cost is counted for all networks; its share is the requested one, if any
    prunable: Prunable
    is_described: bool  # whether a config of Transformers has to describe the smaller network
    is_search: bool = False  # whether networks of several sizes are made, by one pruner
    is_timed: bool = False  # whether reports have times
    depth: Depth | None = None  # where blocks compete with channels
    measured: Any = None  # Measurements, where the networks get reports
    prefers_multiples: bool = False  # whether layers keep multiples of channels as far as the budget allows
    seconds_of_a_step: float = math.nan  # per sample, of the unpruned network; NaN without distillation
    left_out: list[str] = field(default_factory=list)  # warnings of steps that were left out
    clock: Clock = field(default_factory=Clock)  # of the whole call, by default without a limit
    # By allocation, the pruner that selects channels for all sizes, with its measurements.
    _pruners: dict[str, StructuredPruner] = field(default_factory=dict, init=False)

    @classmethod
    def of(cls, model: nn.Module, images: ImageParts, settings: Settings, budget: Budget) -> Prepared:
        """Find the layers that can lose channels."""
        analysis = Analysis.on(model, images.example)
        is_described = budget.equal_blocks is not False and is_pretrained(model)
        try:
            prunable = layers_to_prune(analysis, settings.layers, is_described=is_described)
        except NoneDescribedError:
            if budget.equal_blocks:
                raise
            prunable, is_described = layers_to_prune(analysis, settings.layers), False
            _logger.warning(
                "the config of %s can't describe fewer channels of any layer, so layers keep free widths, and "
                "nni_topo.save and nni_topo.load take the network",
                type(model).__name__,
            )
        if is_pretrained(model):
            budget = replace(budget, equal_blocks=is_described)
        give_back_memory(model)  # networks that were traced refer to themselves
        round_to = settings.round_to
        if round_to is None:
            # In half precision a GPU takes five times as long over a linear layer of 511 channels as over one of 512.
            round_to = 8 if device_of(model).type == "cuda" else PREFERRED
        start = Pipeline(analysis, round_to if isinstance(round_to, int) and round_to > 1 else None)
        prefers = round_to == PREFERRED
        return cls(start, images, settings, budget, prunable, is_described, prefers_multiples=prefers)

    @property
    def model(self) -> nn.Module:
        """The network that is made smaller."""
        return self.start.model

    @property
    def analysis(self) -> Analysis:
        """The analysis of that network's channels."""
        return self.start.analysis

    @cached_property
    def batch(self) -> Any:
        """The first batch that was passed."""
        args, kwargs = first_call(self.model, self.images.all)
        return kwargs or args

    @cached_property
    def example(self) -> Any:
        """The inputs for counting the cost: for time a batch as large as the first one that was passed."""
        return self.batch if self.budget.kind == "latency" else self.images.example

    @cached_property
    def counted(self) -> Analysis:
        """The analysis of the network on `example`."""
        if self.budget.kind != "latency":
            return self.analysis
        return Analysis.on(self.model, self.example, self.analysis.facts)

    @property
    def kinds(self) -> tuple[OutputKind, ...]:
        """What the model's compared outputs hold."""
        kinds: tuple[OutputKind, ...] = () if self.measured is None else self.measured.answers.kinds
        return kinds

    @cached_property
    def _cost(self) -> int:
        """The cost of the network that is made smaller."""
        return cost_of(self.budget.kind, self.model, self.example)

    def leave_out(self, text: str) -> None:
        """Warn of a step that is left out."""
        self.left_out.append(text)
        _logger.warning("%s", text)

    def tell_cost(self, made: int = 1, distilled: int = 1) -> None:
        """Log an estimate of the time of each stage: as a warning if the total is more than ten minutes.

        ``made`` networks are made, and ``distilled`` of them distilled. Estimates are based on the unpruned network.
        """
        settings, samples = self.settings, self.images.learned.samples
        # A run back takes twice as long as a run forward.
        a_pass = 3.0 * self.measured.seconds_of_a_sample * samples
        solving = _PASSES * a_pass + _SECONDS_OF_A_PRODUCT * _products(self.model, self.analysis.call, samples)
        known: dict[str, float] = {}  # seconds of each stage
        unknown: list[str] = []
        if self.depth is not None:
            made *= 3  # each with several numbers of blocks
            unknown.append("ordering blocks")
        if settings.pruner == "reconstruction":
            known["selecting channels"] = solving if self.is_search else made * solving  # a search sums once
        else:
            unknown.append("selecting channels")
        if settings.recovery_name == "reconstruct":
            known["reconstructing weights"] = made * solving
        elif settings.compensate is not None:
            unknown.append("reconstructing weights")
        told = [f"{name} about {duration(seconds)}" for name, seconds in known.items()]
        total, hint = sum(known.values()), ""
        if not math.isnan(self.seconds_of_a_step):
            time = self.time_of_distillation
            seconds = min(distilled * time.seconds, max(self.clock.remaining_seconds - total, 0.0))
            tried = 0 if time.again == 0 else most_tried_steps(time.steps)
            finding = f", {tried} of them to find the learning rate" if tried else ""
            finding += f", {time.again} more at a lower one if needed" if time.again else ""
            told.append(
                f"distilling at most {duration(seconds)} ({time.steps} steps of at most {duration(time.a_step)} each"
                f"{finding})"
            )
            total += seconds
            if settings.distillation_knobs.get("seconds") is None and self.clock.seconds is None:
                limit = advice("distill={'seconds': ...}", "--distill-seconds")
                hint = f"; {limit} limits distillation"
        if told:
            text = f"{settings.place} takes about {duration(total)}: {', '.join(told)}"
            text += f"; not counted: {', '.join(unknown)}" if unknown else ""
            _logger.log(logging.WARNING if total > LONG else logging.INFO, "%s", text + hint)

    @cached_property
    def time_of_distillation(self) -> TimeOfDistillation:
        """What distilling a network takes at most, based on the unpruned one."""
        knobs = {name: value for name, value in self.settings.distillation_knobs.items() if value is not None}
        steps, samples_of_a_step = course_on(self.model, self.images.learned, knobs.get("batch_size", 64))
        wanted = knobs.get("steps") or steps
        a_step = samples_of_a_step * self.seconds_of_a_step
        again = 0 if "lr" in knobs else wanted  # if what was learned is discarded
        seconds = min((wanted + again) * a_step, knobs.get("seconds", math.inf))
        return TimeOfDistillation(wanted, again, a_step, seconds, is_short=wanted < steps or seconds < wanted * a_step)

    def expect(self) -> Expectation | None:
        """Log what distillation is expected to reach, by the last stage; None if no networks like this are recorded.

        Recorded are classifiers, weight reconstruction by least squares, and all steps of distillation.
        """
        first, last = self.measured.stages[0], self.measured.stages[-1]
        figure = f"distance {last.distance:.3g}"
        if not math.isnan(last.agreement):
            figure = f"{last.agreement:.3g} of the answers"
        text, range_of_agreement = f"reconstructed: {figure}", None
        is_distilled = not math.isnan(self.seconds_of_a_step)
        is_recorded = self.settings.recovery_name.lower() == "reconstruct" and self.depth is None
        if is_distilled and (self.time_of_distillation.is_short or self.clock.seconds is not None):
            is_recorded = False
        if is_recorded and self.measured.answers.is_classifier and self.images.held_out is not None:
            samples = self.images.held_out.samples
            range_of_agreement = expected(last.agreement, last.macs / first.macs, samples)
            text = text if range_of_agreement is None else repr(range_of_agreement)
        if is_distilled:
            most = min(self.time_of_distillation.seconds, max(self.clock.remaining_seconds, 0.0))
            text += f"; takes at most {duration(most)}"
        _logger.info("%s", text)
        return range_of_agreement

    def for_search(self) -> Prepared:
        """Return a copy for networks of several sizes, with one pruner and, for a latency budget, one table."""
        budget = self.budget
        if budget.kind == "latency" and budget.latency_table is None:
            budget = replace(budget, latency_table=measure_latency(self.model, self.example))
        return replace(self, budget=budget, is_search=True)

    def of_share(self, share: float, **changes: Any) -> Budget:
        """Return the budget with another share."""
        changes[self.budget.kind] = share
        return replace(self.budget, **changes)

    def make(self, share: float) -> Pipeline:
        """Make a network that keeps a share of the cost, without distillation."""
        if self.depth is not None:
            return self.depth.make(share)
        made = self.recover(share)
        return replace(made, left=self.share_left(made.dense))

    def recover(self, share: float) -> Pipeline:
        """Select channels to keep, reconstruct weights and remove the other channels.

        If the network misses the budget because it costs more or less than planned, as where layers kept channels that
        were to be removed, the difference is planned away; of the networks made, the one nearest to the budget is kept.
        """
        aim, nearest, least_gap = share, None, math.inf
        costs = [(1.0, 1.0)]  # shares that networks keep, and that were planned for them
        for _ in range(_PLANS):
            made = self._recover(aim)
            if self.budget.kind == "latency" or made.planned is None:
                return made
            left, planned = self.share_left(made.dense), made.planned.left
            if abs(left - share) < least_gap:
                nearest, least_gap = made, abs(left - share)
            if budget_outcome(self.budget.kind, share, left, "").is_near or math.isclose(left, planned):
                break
            # Near the budget, planned costs and costs grow together.
            costs = sorted({*costs, (left, planned)}, key=lambda cost: abs(cost[0] - share))
            (left, planned), (other_left, other_planned) = costs[:2]
            if other_left == left:
                break
            aim = planned + (share - left) * (other_planned - planned) / (other_left - left)
            aim = min(max(aim, _LEAST_AIM * share), 1.0)
        assert nearest is not None  # at least one network is made
        return nearest

    def _recover(self, share: float) -> Pipeline:
        """Select channels, reconstruct weights and remove channels, with the budget as the pruner counts it.

        With the allocation ``"auto"`` the budget is distributed in each way that the pruner offers, and the network
        with the smallest loss on the judging images is kept.
        """
        if self.budget.allocation != AUTO:
            return self.reconstruct(self.select(self.of_share(share)))
        judges, names = self.images.judging(f"allocation={AUTO!r}"), allocations_to_try(self.settings.pruner)
        made = [self.reconstruct(self.select(self.of_share(share, allocation=name))) for name in names]
        found = judged(self.model, [each.dense for each in made], judges, self.settings.outputs, self.kinds)
        # Of equal losses the first is kept.
        best = first_smallest([each.loss if math.isfinite(each.loss) else math.inf for each in found])
        tried = [
            Tried(name, each.loss, each.agreement, is_chosen=place == best)
            for place, (name, each) in enumerate(zip(names, found, strict=True))
        ]
        return replace(made[best], tried=tuple(tried))

    def select(self, budget: Budget) -> Pipeline:
        """Select the channels to keep under a budget, by the pruner on a copy of the model."""
        began = perf_counter()
        pruner, outcome = self._pruners.get(budget.allocation), None
        if pruner is None:
            name, groups = self.settings.pruner, copy.deepcopy(self.prunable.groups)
            config_list: list[dict[str, Any]] = groups.unnamed() if self.prunable.is_default else groups
            pruner_knobs = pruner_info(name).knobs()
            if "budget" not in pruner_knobs:
                ratios, outcome = self.planned_ratios(budget)
                # These layers lose inputs with the heads before them; with a ratio, they'd lose output channels.
                for entry in groups:
                    (layer,) = entry["op_names"]
                    by_column = isinstance(entry.get("granularity"), list) and entry["granularity"][0] == -1
                    if by_column and not isinstance(self.model.get_submodule(layer), nn.Embedding):
                        ratios.pop(layer, None)
                config_list = groups_of(self.counted, as_entries(ratios))
            offered = {
                "seed": self.settings.seed,
                "calibration": self.images.learned,
                "example_inputs": self.example,
                "budget": budget,
                "round_to": self.start.round_to,
            }
            taken = {knob: offered[knob] for knob in pruner_knobs if knob in offered}
            with in_context(facts=self.analysis.facts):
                pruner = create_pruner(
                    name, detached_copy(self.model), config_list, **taken | dict(self.settings.knobs)
                )
        planner = pruner.planner if isinstance(pruner, StructuredPruner) else None
        if isinstance(planner, BudgetPlanner):
            if planner.round_to is None:
                planner.prefers_multiples = self.prefers_multiples
            if self.is_search:
                self._pruners[budget.allocation] = pruner
            selected = self.start.select(pruner, budget)
        else:
            selected = replace(self.start.select(pruner), planned=outcome)
        del pruner  # with its copy of the model, which refers to itself
        give_back_memory(self.model)
        return replace(selected, seconds=perf_counter() - began)

    def planned_ratios(self, budget: Budget) -> tuple[dict[str, float], BudgetOutcome]:
        """Return the ratio of each layer to prune under a budget, and the outcome."""
        return planned_ratios(
            self.counted, budget, self.prunable.entries, self.start.round_to, prefers_multiples=self.prefers_multiples
        )

    def reconstruct(self, selected: Pipeline) -> Pipeline:
        """Reconstruct the weights, if requested, and remove the channels."""
        began, method = perf_counter(), self.settings.compensate
        if method is not None:
            knobs = {"seed": self.settings.seed, "progress": self.settings.progress}
            with in_context(read_as="" if self.measured is None else self.measured.answers.hold):
                selected = selected.reconstruct(method, self.images.learned, **knobs)
        return replace(selected.remove(), seconds_of_recovery=perf_counter() - began)

    def distil(self, made: Pipeline, **own: Any) -> Pipeline:
        """Distil a dense network, if requested.

        The verdict is None if :func:`nni_topo.distill` doesn't run, as for a network without gradients. ``own`` are
        knobs for this network only; the caller's knobs replace them.
        """
        began, distill, images = perf_counter(), self.settings.distill, self.images.learned
        if distill is False:
            return made
        knobs: dict[str, Any] = {
            "held_out": self.images.judges,
            "outputs": self.settings.outputs,
            "seed": self.settings.seed,
            "progress": self.settings.progress,
            **own,
        }
        given = self.settings.distillation_knobs.items()
        chosen = {name: value for name, value in given if value is not None or name not in own}
        if self.clock.seconds is not None:
            # The distilled network is also measured.
            left = self.clock.remaining_seconds - self.measured.seconds_of_a_network
            if left <= 0.0:
                self.leave_out(
                    f"the network isn't distilled: seconds={self.clock.seconds:g} leaves no time for it, because the "
                    f"steps before it took {duration(self.clock.spent)}"
                )
                return made
            chosen["seconds"] = min(left, chosen.get("seconds") or math.inf)
        try:
            # The teacher is the unpruned network, also for a network that lacks some blocks.
            with in_context(kinds=() if "outputs" in chosen else self.kinds):
                found = replace(made, analysis=self.analysis).distill(images, **knobs | chosen)
        except GradientError as error:
            if distill is not True:  # knobs were given, so distillation is wanted
                raise GradientError(f"{error}; {without_distillation()} leaves distillation out") from error
            self.leave_out(f"the network isn't distilled: {error}")
            return made
        return replace(found, seconds_of_distillation=perf_counter() - began)

    def outcome(self, share: float, made: Pipeline) -> BudgetOutcome:
        """Return whether a network meets a budget, and warn if it isn't close to it."""
        planned = made.planned
        if made.depth is not None and made.left < share:
            why = "of the networks that were tried and meet the budget this one loses least"
        elif made.depth is not None:
            why = planned.why if planned is not None and planned.why else "no network that was tried meets it"
        elif self.settings.chooses_how_many:
            why = "the pruner chooses how many channels it keeps"
        elif planned is not None and planned.why:
            why = planned.why
        elif made.layers.kept:
            why = "layers keep channels that were to be removed"
        elif planned is not None and planned.is_met:
            why = f"the forward computes more than the planned share of {planned.left:.4g} in a smaller network"
        else:
            why = NO_NEARER
        outcome = budget_outcome(self.budget.kind, share, made.left, why)
        warn_if_missed(outcome)
        return outcome

    def share_left(self, dense: nn.Module) -> float:
        """Return the share of the cost that a dense network keeps, before it gets its report."""
        if self.budget.kind != "latency":
            return float(cost_of(self.budget.kind, dense, self.example) / self._cost)
        table: Any = self.budget.latency_table
        if table is None:
            whole, own = as_run_by(self.budget.runtime, [self.model, dense], self.example)
            ((share, _),) = time_shares([own], whole, self.example, self.budget.share)
            return share
        rows = [row for row in dense_report_of(dense).rows if row.name in table.layers]
        return self.planned_left({row.name: np.arange(row.before) < row.after for row in rows})

    def planned_left(self, kept: Kept) -> float:
        """Return the share of the cost that the kept channels take; for time by the table."""
        table: Any = self.budget.latency_table
        cost = network_cost(self.budget.kind, self.counted, table)
        return float(cost(kept) / cost({}))

    def measure(self, made: Pipeline) -> None:
        """Measure a network without and with weight reconstruction, for its report."""
        self.measured.add("pruned", made.without_recovery().dense, made.seconds)
        if self.settings.compensate is not None:
            self.measured.add("reconstructed", made.dense, made.seconds_of_recovery)

    def report(
        self,
        network: nn.Module,
        made: Pipeline,
        warnings: tuple[str, ...] = (),
        **found: Any,
    ) -> None:
        """Give a network its report; ``found`` are other fields of it."""
        images, measured, compensation = self.images, self.measured, made.compensation
        is_grouped = images.all.has_sources
        timed = None
        if self.is_timed:
            runtime = self.budget.runtime
            before, after = as_run_by(runtime, [self.model, network], self.batch)
            timed = replace(timed_pair(before, after, self.batch), runtime=runtime)
        if self.is_described:  # so that its layers are as its config describes them
            with_transposed_weights(network)
        report = ShrinkReport(
            **{"stages": tuple(measured.stages), "layers": made.layers, **found},
            distillation=made.verdict,
            compensation=compensation,
            depth=made.depth,
            tried=made.tried,
            images=images.learned.samples,
            held_out=0 if images.held_out is None else images.held_out.samples,
            judges=0 if images.judges is None or images.judges is images.held_out else images.judges.samples,
            warnings=(*warnings, *(compensation.warnings if compensation else ()), *dict.fromkeys(self.left_out)),
            whole=self.prunable.unpruned,
            outputs=measured.answers.named,
            read_as=measured.answers.read_as,
            frozen=frozen_layers(self.model),
            undescribed=why_undescribed(network) if is_pretrained(network) else "",
            known=0 if images.known is None else images.known.samples,
            sources=len(images.held_out.units.unique()) if images.held_out is not None and is_grouped else 0,
            grouped=is_grouped,
            time=timed,
        )
        if not give_report(network, report):
            _logger.warning(
                "the model has an attribute of its own called report, so that this is only told here: %s", report
            )


def prepare(
    model: nn.Module,
    images: Calibration,
    settings: Settings,
    budget: Budget,
    *,
    parts: tuple[Calibration | None, ...] | None = None,
    is_timed: bool = False,
    clock: Clock | None = None,
) -> Prepared:
    """Find the layers to prune, and the blocks, and measure the unpruned network, for a checked request.

    ``is_timed``: whether reports have the times of the unpruned network and of the smaller one. ``clock``: the
    clock of the whole call, if its time is limited.
    """
    model, warnings = plain_weights(model)
    data = ImageParts.of(images, model, parts)
    if parts is None:
        data = data.with_known_sources()
    seconds_of_a_step = settings.check_distillation(model, data.all, is_held_out=data.judges is not None)
    prepared = Prepared.of(model, data, settings, budget)
    prepared.left_out.extend(warnings)
    if prepared.is_described and not settings.depth and budget.kind != "latency":
        _, outcome = prepared.planned_ratios(budget)
        if not outcome.is_met:
            prepared.leave_out(
                f"the config of {type(model).__name__} describes no network that keeps {budget.share:g} of the "
                f"{budget.kind}: {outcome.left:.4g} can be reached; {free_widths()}"
            )
    measured = Measurements(model, data, settings.evaluate, settings.outputs, settings.objective)
    measured.add(UNPRUNED, model)
    prepared = replace(
        prepared,
        measured=measured,
        is_timed=is_timed,
        seconds_of_a_step=seconds_of_a_step,
        clock=clock or Clock(),
    )
    return with_depth(prepared) if settings.depth else prepared


@leaves_models_alone
def _products(model: nn.Module, call: Call, samples: int) -> float:
    """Return the approximate number of products to form and solve the normal equations of all layers once."""
    weights = {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), Tensor) and module.weight.dim() > 1
    }
    _, counted, macs = counted_run(model, call, weights)
    found = 0.0
    for name, weight in weights.items():
        columns = weight[0].numel()
        positions = samples * macs.within.get(name, 0) / counted / weight.numel()
        found += columns**2 * (columns + min(positions, _POSITIONS * columns))
    return found


def plain_weights(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """Return a model whose weights are parameters, and a warning if that replaced layers.

    Linear layers replace Transformers' ``Conv1D`` without a warning.
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
