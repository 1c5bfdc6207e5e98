"""Which learning rate a distillation can take: a range test of a few steps for each, on held-out images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import nn

from nni_topo.network.runtime.processes import Processes
from nni_topo.network.runtime.progress import bar
from nni_topo.recovery.course import Batches, Clock, Course, RateSchedule, RateTrial, Teacher

RATES = (6e-3, 2e-3, 6e-4, 2e-4, 6e-5)
"""Learning rates of AdamW that are tried, the highest first."""

_MOST_LOSS, _MOST_GROWTH = 2.0, 0.25
"""A rate can be taken if after its few steps the held-out loss is at most so many times what it was before, and has
grown by at most this share of its difference from the loss of a network that always gives the same answer.

So where the network is hardly better than such a one, a rate that leads there can't be taken. Of few steps the loss is
least at low rates, and over a whole course at high ones. So the test doesn't ask which rate is best so far; it asks
which one doesn't break the network.
"""

_RISE = 0.3  # share of these steps in which the rate rises; it falls in the others
_SHARE = 0.03  # of a course's steps, for each rate
_LEAST_STEPS = 10
_LEAST_KNOWN, _LEAST_LEFT = 3, 20  # steps for each rate, and steps after that, where time allows no more
_SHARE_OF_TIME = 0.03  # of what is left, for each rate


def try_rates(
    lesson: Teacher,
    student: Callable[[], nn.Module],
    batches: Callable[[], Batches],
    judge: Callable[[nn.Module], float],
    first: float,
    constant: float,
    total: int,
    *,
    is_normed: bool,
    rates: Sequence[float] = RATES,
    clock: Clock | None = None,
    progress: bool | None = None,
    processes: Processes | None = None,
) -> tuple[RateTrial, ...]:
    """Try learning rates from the highest on until one can be taken.

    Parameters
    ----------
    lesson : Teacher
        What is learned.
    student : callable
        Returns a copy of the network that learns.
    batches : callable
        Returns the batches of a course from its first one on.
    judge : callable
        Returns the held-out loss of a network, which may be changed.
    first : float
        The held-out loss of the network as it is.
    constant : float
        That of a network that always gives the same answer.
    total : int
        Steps of a whole course.
    is_normed : bool
        Whether batch norms take their statistics from the batches.
    rates : sequence of float
        What is tried, the highest first.
    clock : Clock, optional
        A limit of time: each rate takes 3 % of what is left, or three steps where these take longer.
    progress : bool, optional
        As for :func:`nni_topo.distill`.
    processes : Processes, optional
        Those that share the images.

    Returns
    -------
    tuple of RateTrial
        One for each rate that was tried. None is taken if all break the network. No other is tried where time allows
        fewer than twenty more steps, and none at all where it is over.
    """
    clock = clock or Clock()
    if clock.left <= 0.0:
        return ()
    steps = max(_LEAST_STEPS, round(_SHARE * total))

    def tried(rate: float, steps: int) -> nn.Module:
        schedule = RateSchedule(_RISE, falls_from=_RISE)
        course = Course(student(), is_normed=is_normed, rate=rate, schedule=schedule, processes=processes)
        course.run(lesson, batches(), steps, progress=False)
        next(course.student.parameters()).flatten()[:1].cpu()  # a device computes on while Python does: this waits
        return course.student

    least_left = -math.inf  # seconds that are left for the course
    if clock.seconds is not None:
        tried(min(rates), 1)  # the first step takes longer: libraries are loaded and programs chosen
        began = clock.spent
        tried(min(rates), _LEAST_KNOWN)
        seconds_of_a_step = (clock.spent - began) / _LEAST_KNOWN
        least_left = _LEAST_LEFT * seconds_of_a_step
        steps = min(steps, max(_LEAST_KNOWN, int(_SHARE_OF_TIME * clock.left / seconds_of_a_step)))
    most = min(_MOST_LOSS * first, first + _MOST_GROWTH * abs(constant - first))
    found: list[RateTrial] = []
    for rate in bar("learning rate", progress, rates):
        if clock.left < least_left:
            break
        loss = judge(tried(rate, steps))
        found.append(RateTrial(rate, steps, loss, loss <= most))
        if found[-1].is_taken:
            break
    return tuple(found)
