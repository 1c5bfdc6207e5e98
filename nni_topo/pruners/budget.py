"""Allocation under a budget: how many blocks each unit keeps so that the whole network meets a cost."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, cast, get_args

import numpy as np
from torch import nn

from nni_topo.errors import ConfigError, DataError
from nni_topo.network.attention.config import accepted_heads, common_widths
from nni_topo.network.cost.cost import Kept, NetworkCost
from nni_topo.network.cost.latency import LatencyTable, measure_latency
from nni_topo.network.cost.measure import time_shares
from nni_topo.network.io.exporting import as_run_by
from nni_topo.network.layers.kinds import has_channels
from nni_topo.network.runtime.copies import unwrapped_copy
from nni_topo.network.speedup.analysis import Analysis, Facts
from nni_topo.network.speedup.dense import dense_of
from nni_topo.pruners.agreement import Agreement
from nni_topo.pruners.planner import Losses, Planner
from nni_topo.pruners.solving import solve_error, solve_timed, solve_tolerance, solve_uniform
from nni_topo.pruners.units import PruningUnit
from nni_topo.rules import FLAG, NONE, PATH, as_settings, check_knobs, instance, number, one_of

_logger = logging.getLogger(__name__)

Allocation = Literal["uniform", "topological", "error", "auto"]
Runtime = Literal["pytorch", "onnxruntime"]
AUTO = "auto"
"""Let :func:`nni_topo.shrink` try all allocations that the pruner supports."""
ALLOCATIONS: tuple[str, ...] = tuple(name for name in get_args(Allocation) if name != AUTO)
BUDGETS = ("flops", "params", "latency", "memory")
MACS = "macs"
"""A synonym of the cost ``flops``, which counts multiply-accumulates, as in NNI."""
_RULES = {
    "allocation": one_of(get_args(Allocation)),
    "latency_table": instance(LatencyTable) | PATH | NONE,
    "equal_blocks": FLAG | NONE,
    "runtime": one_of(get_args(Runtime)),
}
_MISSED = 0.01  # tolerance, of the unpruned network's cost
_MISSED_SMALL = 0.1  # tolerance, of the budget, if that is less
_MISSED_TIME = 0.05  # least tolerance for latency, of the budget
_ROUNDING = 1e-12  # 0.51 - 0.5 is more than 0.01 in double precision
NO_NEARER = "the numbers of channels that were tried come no nearer"
"""The reason for a missed budget if no bound prevents meeting it: a search tries few of all possible numbers."""
_SECONDS = 10.0  # to time one network and the unpruned one
_FEWEST = 1.0 / 8.0  # least share of a layer's channels that a budget keeps
_NEVER_ONE = 16  # layers of at least this many channels keep at least two
_HALVINGS = 20
_FASTEST = 16  # the largest preferred multiple of channels
_LEAST_STEPS = 8  # a layer has at least this many times its preferred multiple
_LEAST_STEPS_IN_TIME = 2  # the same for latency: other widths lose MACs without saving time
_FINER = 32  # how often the multiples of a layer may be halved


@dataclass(frozen=True)
class Budget:
    """The share of a network's cost to keep; a pruner distributes it over all layers, instead of config_list ratios.

    Parameters
    ----------
    flops, params, latency, memory : float or None, default=None
        The share to keep, in (0, 1], of exactly one cost: multiply-accumulates, parameters, seconds, or bytes of the
        parameters plus the largest sum of a layer's input and output, for one sample.
    allocation : {"uniform", "topological", "error", "auto"}, default="uniform"
        How the budget is distributed. ``"uniform"``: the same share of every layer. ``"topological"``: one tolerance
        on death times for the whole network. ``"error"``: prune the channels with the least reconstruction error, in
        all layers that read them, per cost saved. ``"auto"``: the allocation whose network is closest to the unpruned
        one on held-out images (:func:`nni_topo.shrink` only).
    equal_blocks : bool, optional
        Layers of equal width keep equally many channels, and attention layers with equally many heads keep equally
        many heads, so that a Transformers config can describe the network. The budget is met less exactly. Only
        with ``"uniform"``. None: False; but :func:`nni_topo.shrink` uses True for a Transformers model, and doesn't
        prune layers whose width a config can't express, unless it can express none.
    latency_table : LatencyTable, str, Path or None, default=None
        Seconds per layer and width, or a JSON file of them, for ``latency``; then only the table counts. None: measured
        once, on one thread with the batch of the pruner's ``example_inputs``
        (``pruner.planner.latency_table`` holds it), then corrected by timing dense networks of the widths found.
    runtime : {"pytorch", "onnxruntime"}, default="pytorch"
        Runs the dense networks whose times correct the table; for ``"onnxruntime"`` each is exported to ONNX
        (:func:`nni_topo.export`) and runs on one CPU thread. Only for ``latency`` without a table.

    Notes
    -----
    ``min_sparse_ratio`` and ``max_sparse_ratio`` of the config_list hold. A layer without a ``max_sparse_ratio`` keeps
    at least an eighth of its channels, and at least two of sixteen or more. For small budgets the eighth becomes less:
    half of the share at which the pruned layers, all pruned by one ratio, keep the budget's share of their own cost. If
    these minimums prevent meeting the budget, the outcome says which budget can be met; if they don't,
    ``"topological"`` and ``"error"`` may keep fewer channels. Widths are integers, so the nearest possible cost is
    taken. The tolerance is 0.01 of the unpruned cost, or a tenth of the budget if that is less; for ``latency`` at
    least 5 % of the budget. A network meets the budget if it costs at most the tolerance more. If no network is fast
    enough, the widest that is about as fast as any is kept, possibly the unpruned one. A warning gives the reason if
    the network costs more or less than the budget by more than the tolerance. NNI's schedulers don't schedule a budget.

    In a mapping ``macs`` is a synonym of ``flops``: multiply-accumulates are counted, as in NNI.

    Examples
    --------
    >>> Budget(flops=0.25).share
    0.25
    """

    flops: float | None = None
    params: float | None = None
    latency: float | None = None
    memory: float | None = None
    allocation: Allocation = "uniform"
    latency_table: LatencyTable | str | Path | None = None
    equal_blocks: bool | None = None
    runtime: Runtime = "pytorch"

    def __post_init__(self) -> None:
        costs = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(costs) != 1:
            raise ConfigError(
                f"a budget must be a share of one of {', '.join(BUDGETS)}, got {costs or 'none'} (budget)"
            )
        check_knobs("budget", vars(self), {costs[0]: number(0, 1, "right"), **_RULES})
        if self.equal_blocks and self.allocation != "uniform":
            raise ConfigError(
                f"equal blocks need the allocation 'uniform', got {self.allocation!r} (equal_blocks, budget)"
            )
        if self.latency_table is not None and self.latency is None:
            raise ConfigError(f"a latency table needs a budget of 'latency', got {costs[0]!r} (latency_table)")
        if self.runtime != "pytorch" and (self.latency is None or self.latency_table is not None):
            got = costs[0] if self.latency is None else "latency_table"
            raise ConfigError(
                f"a runtime needs a budget of 'latency' without a latency_table, got {got!r} (runtime, budget)"
            )
        if isinstance(self.latency_table, (str, Path)):
            object.__setattr__(self, "latency_table", LatencyTable.load(self.latency_table))

    @property
    def kind(self) -> str:
        """The kind of cost: ``"flops"``, ``"params"``, ``"latency"`` or ``"memory"``."""
        return next(name for name in BUDGETS if getattr(self, name) is not None)

    @property
    def share(self) -> float:
        """The share to keep."""
        return float(getattr(self, self.kind))


def as_budget(value: Any) -> Budget:
    """Return a budget, also from a mapping of its fields, ``macs`` for ``flops``; ConfigError for anything else."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        raise ConfigError(f"a budget must name its cost, e.g. {{'flops': {value}}}, got {value} (budget)")
    budget: Budget = as_settings(Budget, with_flops(value), "budget")
    return budget


def with_flops(budget: Any) -> Any:
    """Return a budget, or the name of a cost, with ``flops`` for its synonym ``macs``."""
    if isinstance(budget, Mapping) and MACS in budget and "flops" not in budget:
        renamed = {}
        for name, value in budget.items():
            renamed["flops" if name == MACS else name] = value
        return renamed
    if budget == MACS:
        return "flops"
    return budget


@dataclass(frozen=True)
class BudgetOutcome:
    """The cost that was reached under a budget; ``str`` gives a sentence."""

    kind: str  # of cost: flops, params, latency or memory
    asked: float  # share of the unpruned network's cost to keep, in (0, 1]
    left: float  # share that is kept
    is_met: bool  # whether `left` is at most `asked` plus `tolerance`
    why: str = ""  # why `left` isn't within `tolerance` of `asked`; empty if it is

    @property
    def tolerance(self) -> float:
        """How far ``left`` may be from ``asked``: 0.01, or 10 % of ``asked`` if that is less.

        For latency at least 5 % of ``asked``.
        """
        tolerance = min(_MISSED, _MISSED_SMALL * self.asked)
        if self.kind == "latency":
            tolerance = max(tolerance, _MISSED_TIME * self.asked)
        return tolerance

    @property
    def is_near(self) -> bool:
        """Whether ``left`` is within ``tolerance`` of ``asked``; a network that costs less also meets the budget."""
        return abs(self.left - self.asked) <= self.tolerance + _ROUNDING

    def __str__(self) -> str:
        verdict = "met" if self.is_met else "missed"
        sentence = f"the {self.kind} budget of {self.asked:.4g} is {verdict}: "
        sentence += f"{self.left:.4g} of the unpruned network's cost is kept"
        if self.is_near:
            return f"{sentence}, within {self.tolerance:.4g} of it"
        direction = "more" if self.left > self.asked else "less"
        difference = f"{abs(self.left - self.asked):.4g} {direction} than asked"
        return f"{sentence}, {difference}, because {self.why}"


class BudgetPlanner(Planner):
    """Keep as many blocks as a budget allows.

    With ``prefers_multiples`` layers keep multiples of 16, 8, 4, 2 or 1 channels: the largest multiple that is at most
    an eighth of the layer's channels (half of them if time is measured) and meets the budget. Attention keeps any
    number of heads.
    """

    def __init__(
        self,
        budget: Budget,
        example_inputs: Any,
        *,
        round_to: int | None = None,
        prefers_multiples: bool = False,
        warns: bool = True,
    ) -> None:
        super().__init__(round_to=round_to)
        self.prefers_multiples = prefers_multiples
        self.budget = budget
        self.example_inputs = example_inputs
        self.facts: Facts | None = None  # what is already known about the model
        # Measured at the first use if not given; a given table makes the allocation deterministic.
        self.latency_table = cast("LatencyTable | None", budget.latency_table)
        self.outcome: BudgetOutcome | None = None  # None until the widths are found
        self._cost: Callable[[Kept], float] | None = None
        self._warns = warns  # whether to warn of a missed budget
        self._multiples: dict[str, int] | None = None  # step of rows by unit, while multiples are tried
        self._accepted: dict[str, list[int]] = {}  # numbers of heads that a config accepts, by layer
        # Units of several widths that one ratio of a config sets lose rows in proportion: by unit, the ratio's name and
        # the least number of rows.
        self._in_proportion: dict[str, tuple[str, int]] = {}
        self._aim: float | None = None  # share by the table at which the dense network takes the share

    def change(self, budget: Budget) -> None:
        """Plan for another share of the same cost from now on; keep the measurements and log no warnings."""
        present = self.budget
        if (budget.kind, budget.allocation) != (present.kind, present.allocation):
            raise ConfigError(
                f"a budget must be of {present.kind} with allocation {present.allocation!r}, as the pruner's own, got "
                f"{budget.kind} with {budget.allocation!r} (budget)"
            )
        self.budget, self.outcome, self._aim, self._warns = budget, None, None, False

    def counts(self, units: Sequence[PruningUnit], losses: Losses, model: nn.Module) -> dict[str, int]:
        """Return how many rows each unit keeps under the budget."""
        budget, share = self.budget, self.budget.share
        is_timed = budget.kind == "latency" and budget.latency_table is None
        if budget.equal_blocks:
            self._accepted = accepted_heads(model)
            self._in_proportion = _units_in_proportion(units, common_widths(model))
        if budget.kind == "latency" and self.latency_table is None:
            self.latency_table = measure_latency(model, self.example_inputs)
        # Norms lose the channels of layers.
        named = {name for unit in units for name in unit.layers}
        layers = {name for name in named if has_channels(model.get_submodule(name))}
        if self.latency_table is not None and (missing := layers - self.latency_table.layers.keys()):
            raise DataError(f"a latency table must hold every pruned layer, got none of that name ({min(missing)})")
        analysis = Analysis.on(model, self.example_inputs, self.facts)
        if self._cost is None:
            self._cost = network_cost(budget.kind, analysis, self.latency_table)
        cost = share_left(units, self._cost, self.round_rows)

        def solve(share: float, fixed_rows: Mapping[int, int] = MappingProxyType({})) -> list[int]:
            """Return the rows to remove; ``fixed_rows``: by the index of a unit, the rows that it has to lose."""
            bounds = self._bounds(share, units, cost)
            for place, rows_to_lose in fixed_rows.items():
                bounds[place] = rows_to_lose, rows_to_lose
            if budget.allocation == "uniform":
                rows, steps = [unit.rows for unit in units], [self.step(unit) for unit in units]
                return solve_uniform(rows, cost, share, bounds, alike=bool(budget.equal_blocks), steps=steps)
            worth = [losses(unit) for unit in units]
            if budget.allocation == "topological":
                return solve_tolerance(worth, bounds, cost, share)
            return solve_error(worth, bounds, cost, share, Agreement(units).together)

        if is_timed:
            kept_channels = kept_if(units, self.round_rows)
            time = network_time(analysis, self.example_inputs, share, budget.runtime)

            def measure_shares(solutions: Sequence[Sequence[int]]) -> list[float]:
                return time([kept_channels(removed) for removed in solutions])

            if self._aim is None:
                self._multiples = None
                if self.prefers_multiples:
                    self._multiples = self._steps_in_proportion(units, _LEAST_STEPS_IN_TIME)
                removed, kept_share, self._aim = solve_timed(solve, cost, measure_shares, share)
                # If networks with these multiples aren't fast enough, smaller multiples are tried.
                while self._multiples and max(self._multiples.values()) > 1:
                    if budget_outcome(budget.kind, share, kept_share, "").is_met:
                        break
                    self._multiples = {name: max(1, step // 2) for name, step in self._multiples.items()}
                    removed, kept_share, self._aim = solve_timed(solve, cost, measure_shares, share)
            else:
                removed = solve(self._aim)
                (kept_share,) = measure_shares([removed])
        else:
            self._multiples = None
            removed = self._nearest(units, solve(share), lambda fixed_rows: solve(share, fixed_rows), cost)
            if self.prefers_multiples:
                removed = self._in_multiples(units, removed, lambda: solve(share), cost)
            kept_share = cost(removed)

        is_over, bounds = kept_share > share, self._bounds(share, units, cost)
        if all(count == bound[is_over] for count, bound in zip(removed, bounds, strict=True)):
            why = "all layers to prune are at their min_sparse_ratio"
            if is_over:
                why = (
                    "all layers to prune are at their max_sparse_ratio, or keep the fewest channels that a budget "
                    f"leaves them; a budget of {kept_share:.4g} can be met"
                )
        elif is_timed:
            why = "no widths that were timed come nearer; larger batches, or shrink(..., depth=True), may"
        elif self.round_to:
            why = f"layers keep multiples of {self.round_to}"
        else:
            why = NO_NEARER
        self.outcome = budget_outcome(budget.kind, share, kept_share, why)
        if self._warns:
            warn_if_missed(self.outcome)
        return {unit.name: unit.kept_rows(count) for unit, count in zip(units, removed, strict=True)}

    def _joint(self, units: Sequence[PruningUnit]) -> list[list[int]]:
        """List the indices of units that may lose a step together.

        With equal blocks they are all units of one width, or of one ratio of a config; else one unit, or all tied ones.
        """
        if self.budget.equal_blocks:
            alike = defaultdict[Any, list[int]](list)
            for place, unit in enumerate(units):
                alike[self._in_proportion.get(unit.name, (unit.rows,))[0]].append(place)
            return list(alike.values())
        return [*([place] for place in range(len(units))), *Agreement(units).together]

    def _nearest(
        self,
        units: Sequence[PruningUnit],
        removed: list[int],
        solve: Callable[[Mapping[int, int]], list[int]],
        cost: Callable[[Sequence[int]], float],
    ) -> list[int]:
        """Return the rows to remove whose cost is nearest to the budget: ``removed``, if that is near.

        Otherwise each unit whose next step costs more than the tolerance loses one step more, one less, or as many as
        before, and ``solve`` finds the rows of all other units again.
        """
        share = self.budget.share
        tolerance = budget_outcome(self.budget.kind, share, share, "").tolerance
        nearest, gap = removed, abs(cost(removed) - share)
        if gap <= tolerance:
            return removed
        bounds = self._bounds(share, units, cost)
        for places in self._joint(units):
            fewest, choices = min(units[place].rows for place in places), list[dict[int, int]]()
            for sign in (-1, 0, 1):
                fixed_rows = dict[int, int]()
                for place in places:
                    unit = units[place]
                    times = 1 if unit.name in self._in_proportion else unit.rows // fewest
                    step = times * self.step(unit)
                    fixed_rows[place] = min(max(removed[place] + sign * step, bounds[place][0]), bounds[place][1])
                choices.append(fixed_rows)
            changed = [[choice.get(place, count) for place, count in enumerate(removed)] for choice in choices]
            alone = [cost(rows) for rows in changed]
            if max(alone) - min(alone) > tolerance:
                for solution in map(solve, choices):
                    if abs(cost(solution) - share) < gap:
                        nearest, gap = solution, abs(cost(solution) - share)
        return nearest

    def _in_multiples(
        self,
        units: Sequence[PruningUnit],
        removed: list[int],
        solve: Callable[[], list[int]],
        cost: Callable[[Sequence[int]], float],
    ) -> list[int]:
        """Return rows to remove so that layers keep multiples of channels, or ``removed`` if none meet the budget.

        ``removed``: the rows to remove if layers may keep any number of channels.
        """
        share = self.budget.share
        tolerance = budget_outcome(self.budget.kind, share, share, "").tolerance
        if abs(cost(removed) - share) > tolerance:
            return removed
        self._multiples = self._steps_in_proportion(units, _LEAST_STEPS)
        joint = self._joint(units)
        for _ in range(_FINER):
            rounded = solve()
            kept_share = cost(rounded)
            if abs(kept_share - share) <= tolerance:
                return rounded
            # One multiple more or less in one layer may meet the budget.
            bounds = self._bounds(share, units, cost)
            coarsest, most = list[int](), 0.0
            for places in joint:
                for sign in (-1, 1):
                    neighbour = list(rounded)
                    for place in places:
                        low, high = bounds[place]
                        neighbour[place] = min(max(rounded[place] + sign * self.step(units[place]), low), high)
                    then = cost(neighbour)
                    if abs(then - share) <= tolerance:
                        return neighbour
                    if self._multiple(units[places[0]]) > 1 and abs(then - kept_share) > most:
                        coarsest, most = places, abs(then - kept_share)
            if not coarsest:
                break
            for place in coarsest:
                self._multiples[units[place].name] //= 2
        self._multiples = None
        return removed

    def step(self, unit: PruningUnit) -> int:
        """Return the step of rows: each part of a unit keeps a multiple of it."""
        return self._multiple(unit) * self._in_proportion.get(unit.name, ("", 1))[1]

    def _multiple(self, unit: PruningUnit) -> int:
        """Return the step without the proportions."""
        if self._multiples is None:
            return super().step(unit)
        return self._multiples[unit.name]

    def _steps_in_proportion(self, units: Sequence[PruningUnit], least: int) -> dict[str, int]:
        """Return what `preferred_steps` does, with one number for units that lose rows in proportion."""
        steps = preferred_steps(units, least)
        for name, (setting, _) in self._in_proportion.items():
            sharing = [member for member, (shared, _) in self._in_proportion.items() if shared == setting]
            steps[name] = min(steps[member] for member in sharing)
        return steps

    def _bounds(
        self, share: float, units: Sequence[PruningUnit], cost: Callable[[Sequence[int]], float]
    ) -> list[tuple[int, int]]:
        """Return what `bounds_under` does, in proportion for units that lose rows in proportion."""
        bounds = bounds_under(self.budget, share, units, cost)
        for setting in {name for name, _ in self._in_proportion.values()}:
            least = {
                place: self._in_proportion[unit.name][1]
                for place, unit in enumerate(units)
                if self._in_proportion.get(unit.name, ("",))[0] == setting
            }
            low = max(-(-bounds[place][0] // rows) for place, rows in least.items())
            high = max(low, min(bounds[place][1] // rows for place, rows in least.items()))
            for place, rows in least.items():
                bounds[place] = low * rows, high * rows
        return bounds

    def round_rows(self, unit: PruningUnit, rows: int) -> int:
        """Return the least number of rows, at least ``rows``, that ``round_to`` and the model's config allow."""
        accepted = [set(self._accepted[layer]) for layer in unit.layers if layer in self._accepted]
        for count in range(rows, unit.rows):
            rounded = super().round_rows(unit, count)
            if all(rounded in counts for counts in accepted):
                return rounded
        return unit.rows


def _units_in_proportion(units: Sequence[PruningUnit], settings: Mapping[str, str]) -> dict[str, tuple[str, int]]:
    """Return the units whose layers share a setting but not a width, each with the setting and its least rows.

    ``settings``: by layer.
    """
    together: dict[str, list[PruningUnit]] = defaultdict(list)
    for unit in units:
        if unit.layers[0] in settings:
            together[settings[unit.layers[0]]].append(unit)
    least: dict[str, tuple[str, int]] = {}
    for setting, members in together.items():
        divisor = math.gcd(*(unit.rows for unit in members))
        least |= {unit.name: (setting, unit.rows // divisor) for unit in members}
    return least


def preferred_steps(units: Sequence[PruningUnit], least: int) -> dict[str, int]:
    """Return, by unit, the step of rows with which the unit keeps a multiple of 1, 2, 4, 8 or 16 channels.

    The multiple is at most the unit's channels divided by ``least``.
    """
    steps = {}
    for unit in units:
        if unit.channels > 1:
            steps[unit.name] = 1
            continue
        multiple = min(_FASTEST, 1 << (max(1, unit.blocks // least).bit_length() - 1))
        steps[unit.name] = multiple // math.gcd(multiple, unit.parts)
    return steps


def budget_outcome(kind: str, share: float, kept_share: float, why: str) -> BudgetOutcome:
    """Return the outcome of a budget; ``why`` is the reason if the cost isn't within its tolerance."""
    outcome = BudgetOutcome(kind, share, kept_share, is_met=True)
    if outcome.is_near:
        return outcome
    return replace(outcome, is_met=kept_share < share, why=why)


def warn_if_missed(outcome: BudgetOutcome) -> None:
    """Warn if the cost isn't within the tolerance of the budget."""
    if not outcome.is_near:
        _logger.warning("%s", outcome)


def share_left(
    units: Sequence[PruningUnit],
    cost: Callable[[Kept], float],
    rounded: Callable[[PruningUnit, int], int] = lambda _, rows: rows,
) -> Callable[[Sequence[int]], float]:
    """Return a function from the numbers of rows that units lose to the remaining share of the cost."""
    unpruned = cost({})
    if not unpruned > 0.0:
        raise DataError(f"the unpruned network must have a positive cost, got {unpruned} (budget)")

    kept_channels = kept_if(units, rounded)
    return lambda removed: float(cost(kept_channels(removed)) / unpruned)


def bounds_under(
    budget: Budget, share: float, units: Sequence[PruningUnit], cost: Callable[[Sequence[int]], float]
) -> list[tuple[int, int]]:
    """Return the fewest and the most rows that each unit may lose under a budget of this ``share``.

    ``cost`` maps lost rows to the remaining share. If the share can't be met, the least possible share is used.
    """

    def bounds(fewest: float) -> list[tuple[int, int]]:
        """Return the bounds that leave each unit at least this share of its rows."""
        row_bounds = []
        for unit in units:
            low, high = unit.removable_rows
            if unit.max_sparse_ratio == 1.0:
                least = 2 if unit.blocks >= _NEVER_ONE and unit.parts == 1 else 1
                high = max(low, unit.rows - max(math.ceil(unit.rows * fewest), least))
            row_bounds.append((low, high))
        return row_bounds

    def left_at(fewest: float) -> float:
        return cost([most for _, most in bounds(fewest)])

    fixed = left_at(0.0)

    def is_enough(fewest: float) -> bool:
        """Say whether the pruned layers, each with twice these rows, keep at least the budget's share of their cost."""
        return left_at(2.0 * fewest) - fixed >= (1.0 - fixed) * max(share, left_at(fewest))

    low, high = 0.0, _FEWEST
    if is_enough(high):
        for _ in range(_HALVINGS):
            middle = (low + high) / 2.0
            if is_enough(middle):
                high = middle
            else:
                low = middle
    if budget.allocation != "uniform" and left_at(high) <= share:
        return [unit.removable_rows for unit in units]  # the losses decide how few channels a layer keeps
    return bounds(high)


def kept_if(
    units: Sequence[PruningUnit], rounded: Callable[[PruningUnit, int], int]
) -> Callable[[Sequence[int]], Kept]:
    """Return a function from the numbers of rows that units lose to kept channels; the first rows are kept."""
    agree = Agreement(units)

    def kept_channels(removed: Sequence[int]) -> Kept:
        # Costs depend only on widths, so scores don't matter.
        first = {
            unit.name: np.tile(np.arange(unit.rows) < rounded(unit, unit.rows - count), unit.parts)
            for unit, count in zip(units, removed, strict=True)
        }
        agreed = agree(first, first)
        return {layer: agreed[unit.name] for unit in units for layer in unit.layers}

    return kept_channels


def network_cost(kind: str, analysis: Analysis, table: LatencyTable | None = None) -> Callable[[Kept], float]:
    """Return a function from kept channels to the cost; with a table, to the time by that table."""
    cost = NetworkCost(analysis)
    if table is not None:
        return lambda channels: table(cost.widths(channels))
    counted = attrgetter({"flops": "macs"}.get(kind, kind))
    return lambda channels: float(counted(cost(channels)))


def network_time(
    analysis: Analysis, example_inputs: Any, target_share: float, runtime: Runtime = "pytorch"
) -> Callable[[Sequence[Kept]], list[float]]:
    """Return a function that times dense networks, as shares of the unpruned time, roughly far from the target."""
    unpruned, cost = unwrapped_copy(analysis.model), NetworkCost(analysis)
    (unpruned_net,) = as_run_by(runtime, [unpruned], example_inputs)

    def shares(choices: Sequence[Kept]) -> list[float]:
        nets = []
        for channels in choices:
            masks = cost.masks(channels)
            nets.append(dense_of(unpruned, example_inputs, masks, check=False, facts=analysis.facts))
        ready = as_run_by(runtime, nets, example_inputs)
        timings = time_shares(ready, unpruned_net, example_inputs, target_share, seconds=_SECONDS * len(nets))
        for share, deviation in timings:
            is_rough = deviation > max(_MISSED_TIME, abs(share - target_share) / share)
            _logger.log(
                logging.WARNING if is_rough else logging.INFO,
                "the timed widths take %.4g of the unpruned time, to within %.1f %%",
                share,
                100.0 * deviation,
            )
        return [share for share, _ in timings]

    return shares
