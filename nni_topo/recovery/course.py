"""The training loop of `distill`: gradient steps with a schedule of the rate, which the held-out loss may end early.

A range test takes a few steps at each learning rate and chooses one by the held-out loss.
"""

from __future__ import annotations

import copy
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nni_topo.network.layers.kinds import by_output, zeros_held
from nni_topo.network.layers.memory_format import inputs_laid_out
from nni_topo.network.runtime.progress import bar
from nni_topo.recovery.batchnorm import batch_norms

_MOMENTUM = 0.1  # of batch norms that have none of their own
_FUSED = ("cpu", "cuda")  # devices that have a fused AdamW
_RISE, _FALL = 0.1, 0.4  # first and last share of a course, in which the rate rises and falls
LOOKS = 25
"""Number of times that a course of full length measures the held-out loss."""
_WINDOW = 4  # looks; the mean of the last four is compared with the mean of the four before: single losses are noisy
_PROGRESS = 0.02  # least relative fall of that mean that counts as progress
MOST_LOST = 20.0
"""A network is broken if its held-out loss is this multiple of the first one."""
_LEAST_SHARE, _LEAST_STEPS = 0.1, 50  # before a course may be given up: at a high rate the loss first rises
_NO_GAIN_AT, _NO_GAIN = 0.2, 1.5
"""If no held-out loss is smaller than the first after this share of a course, the rate falls to zero on trial. The
course ends if the loss is then at least this multiple of the first.
"""

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
ONE_RATE = 2e-4
"""The rate if the steps are too few to try two: after few steps the loss is smallest at low rates."""
_TIMED, _TIMED_SECONDS = 5, 1.0  # most runs that are timed, and most seconds of these but for the first one

Batches = Iterator[tuple[Any, list[Tensor]]]
"""Inputs and targets of each step."""


@dataclass(frozen=True)
class Look:
    """A measurement of the held-out loss during a course."""

    step: int  # steps done
    lr: float  # learning rate of the last step
    loss: float


@dataclass(frozen=True)
class RateTrial:
    """The result of a few steps at one learning rate."""

    lr: float
    steps: int
    loss: float  # on held-out images
    is_taken: bool


class Clock:
    """Wall time of a distillation and its limit."""

    def __init__(self, seconds: float | None = None) -> None:
        self.seconds = seconds  # the limit; None: no limit
        # Number of samples that will be judged after the last step, with repetitions; steps end earlier by that time.
        self.judged_at_end = 0
        self._began = time.perf_counter()
        self._seconds_a_sample = math.inf

    @contextmanager
    def judging(self, samples: int) -> Iterator[None]:
        """Measure the time of a judgement of ``samples`` samples.

        The fastest one counts, because the first call also loads libraries and selects kernels.
        """
        began = time.perf_counter()
        yield
        self._seconds_a_sample = min(self._seconds_a_sample, (time.perf_counter() - began) / samples)

    def seconds_to_judge(self, samples: int) -> float:
        """Return the seconds that a judgement of ``samples`` samples takes, by those so far."""
        return self._seconds_a_sample * samples if samples else 0.0

    @property
    def spent(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self._began

    @property
    def left(self) -> float:
        """Remaining seconds for steps; infinite without a limit."""
        if self.seconds is None:
            return math.inf
        return self.seconds - self.seconds_to_judge(self.judged_at_end) - self.spent


@dataclass(frozen=True, kw_only=True)
class Training:
    """A network's training data and loss, and its judgement during the training."""

    student: Callable[[], nn.Module]  # makes a copy of the network to train
    batches: Callable[[], Batches]  # the batches of a course, from the first one
    objective: Callable[[nn.Module, Any, list[Tensor]], Tensor]  # the mean loss on a batch with these targets
    total: int  # steps of a course of full length
    look: Callable[[nn.Module], float]  # the held-out loss of a network
    first: float = math.inf  # the held-out loss before any step
    constant: float = math.inf  # the held-out loss of a network with constant outputs
    is_normed: bool = False  # whether batch norms take their statistics from the batches
    clock: Clock = field(default_factory=Clock)


class Course:
    """Gradient steps of a copy of the network.

    The rate rises in the first tenth of the course, stays constant, and falls linearly to zero in the last two fifths.
    If the held-out loss makes no more progress, the fall begins at once and takes two thirds of the steps before it.
    The course ends after a fifth if the loss hasn't fallen.
    """

    def __init__(self, training: Training, rate: float) -> None:
        self.training, self.rate, self.student = training, rate, training.student()
        learned = [p for p in self.student.parameters() if p.requires_grad]
        # With many small parameters the fused optimizer takes a third of the time.
        is_fused = all(p.device.type in _FUSED and p.is_floating_point() for p in learned)
        self.optimizer = torch.optim.AdamW(learned, weight_decay=0.0, fused=is_fused or None)
        self.done = 0  # steps
        self.curve: list[Look] = []  # the held-out loss along the course
        # The state at the two successive looks whose larger loss is smallest; empty if it never falls below the first.
        self.best: dict[str, Tensor] = {}
        self.best_step = 0
        self.is_given_up = False  # whether it ended because the held-out loss grew or didn't fall
        self.gains_nothing = False  # whether it ended because the held-out loss didn't fall
        self.is_out_of_time = False  # whether it ended because of the time limit

    def run(self, progress: bool | None = None) -> None:
        """Take all steps, or as many as the time limit and the held-out loss allow."""
        training = self.training
        total, clock, batches = training.total, training.clock, training.batches()
        began, spent_before = time.perf_counter(), clock.spent
        looked, least = 0.0, training.first  # share of the course at the last look; the loss of `best`
        falls_from, ends_at = 1.0 - _FALL, 1.0  # shares of the course
        with learning(self.student, is_normed=training.is_normed):
            shown = bar("distill", progress, range(total), total=total)
            for step in shown:
                share = step / total  # used share of the steps, or of the time if that is larger
                if clock.seconds is not None:
                    # Looks included. The first step is taken if there is any time, because it may take longer.
                    a_step = (time.perf_counter() - began) / max(step, 1)
                    if clock.left <= 0.0 or clock.left < a_step:
                        self.is_out_of_time = True
                        break
                    if step:  # the bar shows no more remaining time than the limit leaves
                        shown.total = min(total, step + 1 + int(clock.left / a_step))
                    taken = clock.spent - spent_before
                    share = max(share, taken / max(taken + clock.left, 1e-9))
                if step and int(share * LOOKS) > int(looked * LOOKS):
                    is_fifth = looked < _NO_GAIN_AT <= share and step >= _LEAST_STEPS
                    looked = share
                    self._look()
                    losses = [each.loss for each in self.curve]
                    is_known = share >= _LEAST_SHARE and step >= _LEAST_STEPS
                    is_lost = is_known and not min(losses[-2:]) <= MOST_LOST * training.first
                    if is_lost or not math.isfinite(losses[-1]):
                        self.is_given_up = True
                        break
                    if len(losses) > 1 and max(losses[-2:]) < least:
                        least, self.best_step = max(losses[-2:]), step
                        self.best = copy.deepcopy(self.student.state_dict())
                    if is_fifth and min(losses) >= training.first:
                        self._try_to_end()
                        if self.is_given_up:
                            break
                    # Compare the last looks at the full rate with earlier ones. Looks while the rate rises don't count:
                    # the loss is often smaller then than soon after.
                    full = [each.loss for each in self.curve if each.lr == self.rate]
                    lately, earlier = sum(full[-_WINDOW:]), sum(full[-2 * _WINDOW : -_WINDOW])
                    stands_still = len(full) >= 2 * _WINDOW and lately > (1.0 - _PROGRESS) * earlier
                    if stands_still and share < falls_from:
                        falls_from, ends_at = share, share / (1.0 - _FALL)
                if share >= ends_at:
                    break
                # The first step has the rate of the second one, because its own would be zero.
                rising = max(share, 1.0 / total) / _RISE if share < _RISE else 1.0
                falling = (ends_at - share) / (ends_at - falls_from) if share > falls_from else 1.0
                self.step(next(batches), self.rate * max(0.0, min(rising, falling, 1.0)))
                self.done += 1
        if self.done and not (self.curve and self.curve[-1].step == self.done):
            self._look()

    def step(self, batch: tuple[Any, list[Tensor]], rate: float) -> None:
        """Take one step, within `learning`."""
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.zero_grad()
        self.training.objective(self.student, *batch).backward()
        self.optimizer.step()

    def _try_to_end(self) -> None:
        """Let the rate fall to zero in half as many steps as were taken; if that doesn't help, the course ends there.

        Otherwise it continues from the state before.
        """
        steps, rate = self.done // 2, self.optimizer.param_groups[0]["lr"]
        before = copy.deepcopy((self.student.state_dict(), self.optimizer.state_dict()))
        for step, batch in enumerate(itertools.islice(self.training.batches(), steps)):
            self.step(batch, rate * (1.0 - step / steps))
        self.done += steps
        self._look()
        if self.curve[-1].loss < _NO_GAIN * self.training.first:
            self.done -= steps
            self.curve.pop()
            self.student.load_state_dict(before[0])
            self.optimizer.load_state_dict(before[1])
        else:
            self.is_given_up = self.gains_nothing = True

    def _look(self) -> None:
        loss = self.training.look(self.student)
        self.curve.append(Look(self.done, self.optimizer.param_groups[0]["lr"], loss))


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
        return timed(lambda: course.step(batch, course.rate), course.student)


def timed(work: Callable[[], object], student: nn.Module) -> float:
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
        if clock.left <= 0.0:
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


@contextmanager
def learning(student: nn.Module, *, is_normed: bool = False) -> Iterator[None]:
    """Enable gradients, and batch statistics in batch norms if ``is_normed``; masked weights stay zero."""
    handles = []
    for module in student.modules():
        own = dict(module.named_parameters(recurse=False))  # scripted modules have no `_parameters`
        weight, bias = own.get("weight"), own.get("bias")
        if weight is None or bias is None:
            continue
        # A removed channel would come back by its bias or by the factor of its norm.
        rows = by_output(weight.detach(), module)
        lives = rows.reshape(len(rows), -1).any(1)
        if lives.shape == bias.shape:
            lives |= bias.detach() != 0
            if bool(lives.all()):
                continue
            vectors = (each for each in (weight, bias) if each.dim() == 1 and each.requires_grad)
            handles += [each.register_hook(lambda gradient, lives=lives: gradient * lives) for each in vectors]
    for norm in batch_norms(student)[0].values() if is_normed else ():
        norm.train()
        norm.momentum = norm.momentum or _MOMENTUM
    try:
        with zeros_held(student), inputs_laid_out(student), torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
