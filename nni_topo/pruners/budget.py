"""Allocation under a budget: how many blocks each unit keeps so that the whole network meets a cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from torch import nn

from nni_topo.errors import ConfigError, DataError, unknown_name
from nni_topo.maths.ties import first_smallest, leveled
from nni_topo.network.cost import Kept, NetworkCost
from nni_topo.network.latency import LatencyTable
from nni_topo.network.timing import measure_latency
from nni_topo.pruners.planner import FloatArray, Losses, Planner
from nni_topo.pruners.units import PruningUnit

Allocation = Literal["topological", "uniform"]
Position = TypeVar("Position", int, float)
BUDGETS = ("flops", "params", "latency")
_STEPS = 40
_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


class BudgetPlanner(Planner):
    """Keep as many blocks as ``{"flops"|"params"|"latency": share left}``, in (0, 1] of the whole, allows."""

    def __init__(
        self,
        target: Mapping[str, float],
        example_inputs: Any,
        *,
        allocation: Allocation = "topological",
        latency_table: LatencyTable | str | Path | None = None,
    ) -> None:
        super().__init__(on_empty="keep")
        self.kind, self.share = checked_target(target)
        if allocation not in ("topological", "uniform"):
            raise unknown_name("allocation", str(allocation), ("topological", "uniform"))
        if latency_table is not None and self.kind != "latency":
            raise ConfigError(f"a latency table needs a target of 'latency', got {self.kind!r} (latency_table)")
        self.example_inputs = example_inputs
        self.allocation = allocation
        # Where none is given it is measured at the first use; with a table, an allocation is deterministic.
        self.latency_table = (
            LatencyTable.load(latency_table) if isinstance(latency_table, (str, Path)) else latency_table
        )
        self._cost: NetworkCost | None = None

    def counts(self, units: Sequence[PruningUnit], losses: Losses, model: nn.Module) -> dict[str, int]:
        """Return how many rows each unit keeps under the budget."""
        cost = self._share_left(units, self._network_cost(units, model))
        if self.allocation == "uniform":
            removed = solve_uniform([unit.rows for unit in units], cost, self.share)
        else:
            bounds = [unit.removable_rows for unit in units]
            removed = _solve_tolerance([losses(unit) for unit in units], bounds, cost, self.share)
        # The config_list's minimum and maximum hold, also where the budget is missed for it.
        return {unit.name: unit.kept_rows(count) for unit, count in zip(units, removed, strict=True)}

    def _network_cost(self, units: Sequence[PruningUnit], model: nn.Module) -> Callable[[Kept], float]:
        """Return what a network costs, in the target's unit, with some channels gone."""
        if self._cost is None:
            self._cost = NetworkCost(model, self.example_inputs)
        cost = self._cost
        if self.kind == "flops":
            return lambda kept: cost(kept).macs
        if self.kind == "params":
            return lambda kept: cost(kept).params
        if self.latency_table is None:
            self.latency_table = measure_latency(model, self.example_inputs)
        table = self.latency_table
        for unit in units:
            for module_name, _ in unit.members:
                if module_name not in table.layers:
                    raise DataError(
                        f"a latency table must hold every pruned layer, got none of that name ({module_name})"
                    )
        return lambda kept: table(cost.widths(kept))

    def _share_left(
        self, units: Sequence[PruningUnit], cost: Callable[[Kept], float]
    ) -> Callable[[Sequence[int]], float]:
        whole = cost({})
        if not whole > 0.0:
            raise DataError(f"the unpruned network must cost something, got {whole} (target {self.kind!r})")

        def share(removed: Sequence[int]) -> float:
            # Costs follow from widths, and the scores aren't needed: the first rows stand for whichever will stay.
            kept = {
                module: np.tile(np.arange(unit.rows) < self.rounded(unit, unit.rows - count), unit.parts)
                for unit, count in zip(units, removed, strict=True)
                for module, _ in unit.members
            }
            return float(cost(kept) / whole)

        return share


def make_planner(
    config_list: list[dict[str, Any]],
    target: Mapping[str, float] | None,
    allocation: Allocation,
    latency_table: LatencyTable | str | Path | None,
    example_inputs: Any,
    calibration: Iterable[Any] | None,
) -> Planner:
    """Return the planner of a pruner that chooses a set: by a target, else by the config_list."""
    if target is None:
        if latency_table is not None:
            raise ConfigError("a latency table needs a target of 'latency', got no target (latency_table)")
        return Planner(on_empty="keep")
    for index, config in enumerate(config_list):
        settings = [config, *config.get("target_settings", {}).values()]
        for key in ("sparse_ratio", "sparse_threshold", "global_group_id"):
            if any(setting.get(key) is not None for setting in settings):
                raise ConfigError(f"a target replaces {key}, got both (config_list[{index}])")
    if example_inputs is None and calibration is not None:
        example_inputs = next((b[0] if isinstance(b, (tuple, list)) else b for b in calibration), None)
    if example_inputs is None:
        raise ConfigError("a target needs example_inputs or calibration data, got neither (target)")
    return BudgetPlanner(target, example_inputs, allocation=allocation, latency_table=latency_table)


def checked_target(target: Mapping[str, float]) -> tuple[str, float]:
    """Return a budget's kind and share, or raise :class:`~nni_topo.errors.ConfigError`."""
    if not isinstance(target, Mapping) or len(target) != 1:
        raise ConfigError(f"target must be a mapping with one entry such as {{'flops': 0.5}}, got {target!r} (target)")
    ((kind, share),) = target.items()
    if kind not in BUDGETS:
        raise unknown_name("target", str(kind), BUDGETS)
    if not 0.0 < share <= 1.0:
        raise ConfigError(f"the share to be left must be in (0, 1], got {share!r} (target {kind!r})")
    return kind, float(share)


def solve_uniform(rows: Sequence[int], left: Callable[[Sequence[int]], float], share: float) -> list[int]:
    """Return the rows, at most all but one, that units lose by one ratio to be ``left`` a ``share`` of the cost."""
    # Layers of equal width would round at the same ratio, all at once: a phase for each, spread evenly by the golden
    # ratio, lets them round one after the other, so that the budget is met more nearly than by one ratio.
    phases = [(index * _GOLDEN) % 1.0 for index in range(len(rows))]

    def removed(ratio: float) -> list[int]:
        return [min(int(count * ratio + phase), count - 1) for count, phase in zip(rows, phases, strict=True)]

    low, high = 0.0, 1.0
    # Widths are integers: bisection ends beside a step of the cost, so the nearest of all that it saw counts.
    tried = [(abs(left(removed(ratio)) - share), ratio) for ratio in (low, high)]
    for _ in range(_STEPS):
        middle = (low + high) / 2.0
        found = left(removed(middle))
        tried.append((abs(found - share), middle))
        low, high = (middle, high) if found > share else (low, middle)
    return removed(_nearest(tried))


def _nearest(tried: list[tuple[float, Position]]) -> Position:
    """Return the position with the least gap to the budget, the lowest of those that count as equal."""
    # Shares of a whole of 1 err by rounding of 1, however small the gap; the lowest position removes least.
    ordered = sorted(tried, key=lambda each: each[1])
    return ordered[first_smallest([gap for gap, _ in ordered], 1.0)][1]


def _solve_tolerance(
    losses: list[FloatArray], bounds: list[tuple[int, int]], left: Callable[[Sequence[int]], float], share: float
) -> list[int]:
    """Remove, over all units, the rows whose score lies below one tolerance, such that a budget is met."""
    settled = leveled(np.concatenate(losses))
    profiles = np.split(settled, np.cumsum([len(each) for each in losses])[:-1])
    # Between two scores nothing changes, so these are all the tolerances there are; the ends remove as little, and as
    # much, as the bounds allow. Scores that are equal but for rounding are one step, whichever layer has them.
    tolerances = np.unique([-np.inf, *settled, np.inf])

    def removed(index: int) -> list[int]:
        tolerance = tolerances[index]
        return [
            min(max(int((profile < tolerance).sum()), low), high)
            for profile, (low, high) in zip(profiles, bounds, strict=True)
        ]

    low, high = 0, len(tolerances) - 1
    tried = [(abs(left(removed(index)) - share), index) for index in (low, high)]
    while high - low > 1:
        middle = (low + high) // 2
        found = left(removed(middle))
        tried.append((abs(found - share), middle))
        low, high = (middle, high) if found > share else (low, middle)
    return removed(_nearest(tried))
