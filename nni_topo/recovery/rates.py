"""The search for the learning rate of `distill`: a few steps at each of several, judged on held-out images."""

from __future__ import annotations

import itertools
import logging
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from nni_topo.network.runtime.progress import LONG, bar, duration
from nni_topo.recovery.clock import seconds_knob
from nni_topo.recovery.course import LOOKS, MOST_LOST, Course, Training, learning
from nni_topo.recovery.held_out import HeldOutJudge

RATES = (6e-3, 2e-3, 6e-4, 2e-4, 6e-5)
"""Learning rates of AdamW that are tried, the highest first."""
_MOST_LOSS, _MOST_GROWTH = 2.0, 0.25
"""A rate is accepted if after a few steps the held-out loss is at most this multiple of the first loss, and has grown
by at most this share of the difference between the first loss and the loss of a network with constant outputs.

After few steps the loss is smallest at low rates, after a whole course at high ones. So the test doesn't look for the
smallest loss: it takes the highest rate that doesn't break the network.
"""
_TRIED_RISE = 0.3  # share of the steps at each rate in which the rate rises; it falls in the others
# Steps at each rate: a share of all steps, and their minimum; fewer, but at least three, where else not three rates can
# be tried.
_TRIED_SHARE, _LEAST_TRIED, _FEWEST_TRIED = 0.03, 10, 3
_SEARCHED = 0.25  # largest share of the steps that the range test takes
ONE_RATE, ONE_RATE_NORMED = 2e-4, 2e-3
"""The rate if the steps are too few to try two: after few steps the loss is smallest at low rates.

Where batch norms take their statistics from the batches, it is the second one: these statistics move the outputs away
at once, and at a low rate few steps don't bring them back.
"""
_TIMED, _TIMED_SECONDS = 5, 1.0  # most runs that are timed, and most seconds of these but for the first one
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RateTrial:
    """The result of a few steps at one learning rate."""

    lr: float
    steps: int
    loss: float  # on held-out images
    is_taken: bool


@dataclass(frozen=True)
class RateSearch:
    """What the range test found."""

    training: Training  # the steps that are left, with the batch norms' statistics that the network bears
    rate: float = math.nan  # NaN: none, or nothing is left to learn
    rates: tuple[RateTrial, ...] = ()


def find_rate(training: Training, judge: HeldOutJudge, lr: float | None, progress: bool | None) -> RateSearch:
    """Say how long the steps take, and find the learning rate unless it is given.

    The steps of the range test are some of all steps. If they don't allow to try further rates, the next lower one is
    taken.
    """
    clock = training.clock
    if clock.remaining_seconds <= 0.0:
        return RateSearch(training, math.nan if lr is None else lr)

    def after_few_steps(net: nn.Module) -> float:
        return judge.after_few_steps(net, training.is_normed)

    if training.is_normed:
        # Networks trained with fixed statistics, or on other images, break by the statistics of the batches.
        is_normed = after_few_steps(training.student()) <= MOST_LOST * training.first
        training = replace(training, is_normed=is_normed)
    a_step = seconds_of_a_step(training)
    looks = LOOKS * clock.seconds_to_judge(judge.samples_looked_at)
    _tell_time(training, a_step, looks, is_searched=lr is None)
    steps = training.total
    if clock.seconds is not None:
        steps = max(0, min(steps, int((clock.remaining_seconds - looks) / a_step)))
    rates: tuple[RateTrial, ...] = ()
    if lr is None or training.is_normed:
        candidates: tuple[float, ...] = RATES if lr is None else (lr,)
        most, steps_of_each = range_test(steps, rates=min(2, len(candidates)))
        rates = try_rates(training, after_few_steps, candidates[:most], steps_of_each, progress)
        if training.is_normed and rates and not rates[-1].is_taken:
            training = replace(training, is_normed=False)
            if lr is None:
                candidates = RATES[: max(most - len(rates), 0)]
                rates += try_rates(training, after_few_steps, candidates, steps_of_each, progress)
    training = replace(training, total=training.total - sum(trial.steps for trial in rates))
    if lr is not None:
        return RateSearch(training, lr)
    if not rates:
        return RateSearch(training, ONE_RATE_NORMED if training.is_normed else ONE_RATE)
    last = rates[-1]
    if last.is_taken:
        return RateSearch(training, last.lr, rates)
    lower = [rate for rate in RATES if rate < last.lr]
    return RateSearch(training, lower[0] if lower else math.nan, rates)


def _tell_time(training: Training, a_step: float, looks: float, *, is_searched: bool) -> None:
    """Log how long distillation takes at most: as a warning if that is more than ten minutes without a limit."""
    total, limit = training.total, training.clock.seconds
    courses = 2 if is_searched else 1  # the second one if the result of the first one is discarded
    needed = courses * (total * a_step + looks)
    text = f"distillation takes at most about {duration(needed)}: {total} steps of {duration(a_step)} each"
    if is_searched:
        tried = most_tried_steps(total)
        text += f", at most {tried} of them to find the learning rate" if tried else ""
        text += ", as many again at a sixth of the rate if the result is discarded"
    text += ", and comparisons with the unpruned network"
    text += f"; {seconds_knob()} limits it" if limit is None else f"; {seconds_knob()} ends it after {duration(limit)}"
    _logger.log(logging.WARNING if limit is None and needed > LONG else logging.INFO, "%s", text)


def range_test(steps: int, *, rates: int = 2) -> tuple[int, int]:
    """Return how many learning rates may be tried, and the steps at each, if there are ``steps`` for everything.

    If these don't allow to try as many as ``rates``, none is tried.
    """
    most = int(_SEARCHED * steps)
    steps_of_each = max(_FEWEST_TRIED, round(_TRIED_SHARE * steps), min(_LEAST_TRIED, most // 3))
    count = most // steps_of_each
    return (count if count >= rates else 0), steps_of_each


def most_tried_steps(steps: int) -> int:
    """Return the steps of the range test at most."""
    count, steps_of_each = range_test(steps)
    return min(count, len(RATES)) * steps_of_each


def seconds_of_a_step(training: Training) -> float:
    """Return the seconds of a step on the first batch, measured on a copy that is then discarded."""
    course, batch = Course(training, min(RATES)), next(training.batches())
    with learning(course.student, is_normed=training.is_normed):
        return median_seconds(lambda: course.step(batch, course.rate), course.student)


def median_seconds(work: Callable[[], object], student: nn.Module) -> float:
    """Return the median seconds of up to five runs, fewer if they are slow.

    The run before these isn't counted, because it also loads libraries and selects kernels.
    """
    seconds: list[float] = []
    work()
    while not seconds or (len(seconds) < _TIMED and sum(seconds) < _TIMED_SECONDS):
        began = time.perf_counter()
        work()
        next(student.parameters()).flatten()[:1].cpu()  # waits until the device has finished
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def try_rates(
    training: Training,
    judge: Callable[[nn.Module], float],
    rates: Sequence[float],
    steps: int,
    progress: bool | None = None,
) -> tuple[RateTrial, ...]:
    """Try learning rates in their order, with so many steps at each, until one is accepted; return the results.

    ``judge`` returns the held-out loss of a network that has learned. No rate is accepted if all break the network, or
    time doesn't allow to try more of them.
    """
    clock, first = training.clock, training.first
    most = min(_MOST_LOSS * first, first + _MOST_GROWTH * abs(training.constant - first))
    trials: list[RateTrial] = []
    for rate in bar("learning rate", progress, rates):
        if clock.remaining_seconds <= 0.0:
            break
        course = Course(training, rate)
        with learning(course.student, is_normed=training.is_normed):
            for step, batch in enumerate(itertools.islice(training.batches(), steps)):
                share = step / steps
                rising, falling = max(share, 1.0 / steps) / _TRIED_RISE, (1.0 - share) / (1.0 - _TRIED_RISE)
                course.step(batch, rate * min(rising, falling, 1.0))
        loss = judge(course.student)
        trials.append(RateTrial(rate, steps, loss, loss <= most))
        if trials[-1].is_taken:
            break
    return tuple(trials)
