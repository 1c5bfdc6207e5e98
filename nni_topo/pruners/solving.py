"""How many rows each unit loses so that a given share of the network's cost remains."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from nni_topo.maths.ties import FLOOR, RELATIVE, first_smallest, leveled
from nni_topo.network.runtime.progress import bar
from nni_topo.pruners.planner import FloatArray

Position = TypeVar("Position", int, float)
_NEAR_TIME = 0.02  # of the share: a search for a time ends if it is this near
_TIMINGS = 10  # solutions that are timed, at most
_TOGETHER = 3  # nearest solutions that are timed again
_LEAST_GAIN = -0.05  # logarithm of a share of the time: smaller gains count as this one
_STEPS = 40  # of the bisection
_FIRST_STEPS = 16  # in which a group would lose all rows; near the budget it loses single rows
_LEAST_SAVING = 1e-12  # a share: rows that save nothing are removed last
_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


def solve_uniform(
    rows: Sequence[int],
    remaining: Callable[[Sequence[int]], float],
    share: float,
    bounds: Sequence[tuple[int, int]],
    *,
    alike: bool = False,
    steps: Sequence[int] | None = None,
    proportions: Sequence[float] | None = None,
) -> list[int]:
    """Return the rows that units lose at one ratio, within their bounds, so that a ``share`` of the cost remains.

    ``bounds``: the fewest and the most rows that each may lose. ``alike``: units with equally many rows lose equally
    many. ``steps``: each unit loses a multiple of its step, or reaches a bound. ``proportions``, at least 1: a unit
    of proportion p keeps p times the share of its rows that a unit of proportion 1 keeps.
    """
    if steps is None:
        steps = [1] * len(rows)
    if proportions is None:
        proportions = [1.0] * len(rows)
    # Layers of equal width would all round at the same ratio. A phase for each, spread evenly by the golden ratio,
    # makes them round one after the other, so that the cost gets nearer to the budget.
    phases = [0.5] * len(rows) if alike else [index * _GOLDEN % 1.0 for index in range(len(rows))]

    def lost_at(ratio: float) -> list[int]:
        lost_rows = []
        for count, step, times, phase, (low, high) in zip(rows, steps, proportions, phases, bounds, strict=True):
            lost = count * (ratio - (times - 1.0) * (1.0 - ratio))
            lost_rows.append(min(max(int(lost / step + phase) * step, low), high))
        return lost_rows

    low, high = 0.0, 1.0
    # Widths are integers, so bisection ends at a step of the cost: take the nearest of all tried ratios.
    tried = [(abs(remaining(lost_at(ratio)) - share), ratio) for ratio in (low, high)]
    for _ in range(_STEPS):
        middle = (low + high) / 2.0
        kept_share = remaining(lost_at(middle))
        tried.append((abs(kept_share - share), middle))
        if kept_share > share:
            low = middle
        else:
            high = middle
    return lost_at(_nearest(tried))


def solve_error(
    losses: list[FloatArray],
    bounds: list[tuple[int, int]],
    remaining: Callable[[Sequence[int]], float],
    share: float,
    together: Sequence[Sequence[int]] = (),
) -> list[int]:
    """Return the rows that units lose: the rows with the least loss per cost saved, until a budget is met.

    ``losses``: per unit ``(rows,)``, descending. The cost that rows save depends on other layers and only shrinks as
    other rows are removed. So an earlier price is a lower bound, and few prices are computed anew. Units ``together``,
    by their indices, share rows: removing rows of one unit alone may save nothing, so they also lose rows together, in
    proportion.
    """
    removed = [low for low, _ in bounds]
    lost_by_count = [np.append(0.0, worth[::-1].cumsum()) for worth in losses]  # sum of the n least rows, by n
    now, scale = remaining(removed), max(sums[-1] for sums in lost_by_count)
    groups = [[unit] for unit in range(len(losses))] + [list(units) for units in together]

    def strides(most_steps: int) -> list[dict[int, int]]:
        """Return, by group, the rows that each unit loses per step, in ``most_steps`` steps; 0: as few as possible."""
        sizes = [{unit: len(losses[unit]) for unit in units} for units in groups]
        times = [min(size.values()) for size in sizes]
        if most_steps:
            times = [min(most_steps, count) for count in times]
        steps_by_group = []
        for size, most in zip(sizes, times, strict=True):
            steps_by_group.append({unit: max(1, count // most) for unit, count in size.items()})
        return steps_by_group

    def removed_after(step: dict[int, int]) -> list[int]:
        return [min(count + step.get(unit, 0), bounds[unit][1]) for unit, count in enumerate(removed)]

    def price(step: dict[int, int]) -> float:
        there = removed_after(step)
        if there == removed:
            return math.inf
        lost = sum(float(lost_by_count[unit][there[unit]] - lost_by_count[unit][removed[unit]]) for unit in step)
        return lost / max(now - remaining(there), _LEAST_SAVING)

    steps, is_near = strides(_FIRST_STEPS), False
    prices = [price(step) for step in steps]
    while now > share and min(prices) < math.inf:
        group = first_smallest(prices, scale)
        old_price, prices[group] = prices[group], price(steps[group])
        if prices[group] > old_price * (1.0 + RELATIVE) + FLOOR * scale:
            continue
        then = remaining(removed_after(steps[group]))
        if then < share and not is_near:
            # Near the budget row by row.
            steps, is_near = strides(0), True
            prices = [price(step) for step in steps]
            continue
        if abs(then - share) > abs(now - share):
            break
        removed, now = removed_after(steps[group]), then
        prices[group] = price(steps[group])
    return removed


def _nearest(tried: list[tuple[float, Position]]) -> Position:
    """Return the position with the least gap to the budget, the lowest of those that count as equal."""
    # Shares have rounding errors relative to 1, however small the gap; the lowest position removes the least.
    ordered = sorted(tried, key=lambda attempt: attempt[1])
    return ordered[first_smallest([gap for gap, _ in ordered], 1.0)][1]


def solve_tolerance(
    losses: list[FloatArray], bounds: list[tuple[int, int]], remaining: Callable[[Sequence[int]], float], share: float
) -> list[int]:
    """Return the rows that units lose: those with a loss below one tolerance, chosen so that a budget is met."""
    settled = leveled(np.concatenate(losses))
    profiles = np.split(settled, np.cumsum([len(worth) for worth in losses])[:-1])
    # Between two losses nothing changes, so these tolerances are enough; the ends remove as little and as much as the
    # bounds allow. Losses that are equal up to rounding are one step, in whichever layer.
    tolerances = np.unique([-np.inf, *settled, np.inf])

    def lost_at(index: int) -> list[int]:
        tolerance = tolerances[index]
        lost_rows = []
        for profile, (low, high) in zip(profiles, bounds, strict=True):
            below = int((profile < tolerance).sum())
            lost_rows.append(min(max(below, low), high))
        return lost_rows

    low, high = 0, len(tolerances) - 1
    tried = [(abs(remaining(lost_at(index)) - share), index) for index in (low, high)]
    while high - low > 1:
        middle = (low + high) // 2
        kept_share = remaining(lost_at(middle))
        tried.append((abs(kept_share - share), middle))
        if kept_share > share:
            low = middle
        else:
            high = middle
    return lost_at(_nearest(tried))


# Shares of the time by the table that are tried if no network is fast enough; the first is the unpruned network.
_WIDER = (1.0, 0.8, 0.65, 0.5, 0.35, 0.2, 0.1)
_AS_FAST = 1.05  # networks of up to this multiple of the least time count as equally fast


def solve_timed(
    solve: Callable[[float], list[int]],
    table_share: Callable[[Sequence[int]], float],
    measure_shares: Callable[[Sequence[Sequence[int]]], list[float]],
    share: float,
) -> tuple[list[int], float, float]:
    """Return rows to remove such that the dense network takes a ``share`` of the time, its measured share, and the aim.

    ``table_share`` returns a solution's share of the time by the table of layers, ``measure_shares`` the measured
    shares of several.
    The aim is the share by the table that was passed to ``solve``.

    A table of layers misses the time that a network spends between them. So each solution is timed, and the next aim is
    the table's share at which, by the times so far, the share would be met. Before a result is returned, the nearest
    few are timed again, in turns: one timing may be near by chance, and a machine's speed drifts differently for large
    and small networks.

    The time may jump past the share, for example where channels fill vector registers. Then the slowest network that is
    fast enough is returned, because the nearest one would miss the budget.

    If no network is fast enough, the widest that is about as fast as any is returned: narrower ones would lose accuracy
    for nothing.
    """
    points, aim, near = [(1.0, 1.0)], share, _NEAR_TIME * share
    timings: dict[tuple[int, ...], tuple[float, float]] = {}  # by solution: the measured share and the aim

    def gap(removed: tuple[int, ...]) -> float:
        return abs(timings[removed][0] - share)

    def look_again() -> tuple[int, ...]:
        nearest = sorted(timings, key=gap)[:_TOGETHER]
        for solution, remaining in zip(nearest, measure_shares(nearest), strict=True):
            timings[solution] = remaining, timings[solution][1]
        return min(nearest, key=gap)

    for _ in bar("timing widths", None, range(_TIMINGS)):
        removed = tuple(solve(aim))
        if removed in timings:
            # These widths were timed before: aim between the nearest aims whose networks take less and more.
            below = max((aim for remaining, aim in timings.values() if remaining < share), default=0.0)
            aim = (below + min((aim for remaining, aim in timings.values() if remaining >= share), default=1.0)) / 2.0
            if (removed := tuple(solve(aim))) in timings:
                break
        timings[removed] = measure_shares([removed])[0], aim
        if gap(removed) <= near and gap(best := look_again()) <= near:
            return list(best), *timings[best]
        points = sorted([*points, (table_share(removed), timings[removed][0])])
        by_table, measured = np.log(np.array(points)).T
        measured, target = np.maximum.accumulate(measured), math.log(share)
        # Below all measured shares, take the table's share as a power of the measured one.
        if target < measured[0]:
            power = by_table[0] / min(measured[0], _LEAST_GAIN)
            aim = math.exp(target * power)
        else:
            aim = math.exp(np.interp(target, measured, by_table))
    best = look_again()
    fast_enough = [removed for removed, (remaining, _) in timings.items() if remaining <= share + near]
    if fast_enough:
        if best not in fast_enough:
            best = max(fast_enough, key=lambda removed: timings[removed][0])
        return list(best), *timings[best]
    # Widths don't change the time to call operations, so take the widest network that is about as fast as any.
    wider = {tuple(solve(aim)): aim for aim in _WIDER} | {best: timings[best][1]}
    times = dict(zip(wider, measure_shares(list(wider)), strict=True))
    least = min(times.values())
    chosen = next(removed for removed in wider if times[removed] <= max(share + near, _AS_FAST * least))
    return list(chosen), times[chosen], wider[chosen]
