"""The training loop of `distill`: gradient steps with a schedule of the rate, which the held-out loss may end early."""

from __future__ import annotations

import copy
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nni_topo.network.layers.kinds import by_output, zeros_held
from nni_topo.network.layers.memory_format import inputs_laid_out
from nni_topo.network.runtime.progress import bar
from nni_topo.recovery.batchnorm import batch_norms
from nni_topo.recovery.clock import Clock
from nni_topo.recovery.held_out import HeldOutJudge
from nni_topo.recovery.lesson import Batches, Judgement, is_better

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
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Look:
    """A measurement of the held-out loss during a course."""

    step: int  # steps done
    lr: float  # learning rate of the last step
    loss: float


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


class Schedule:
    """The learning rate along a course, as a share of the highest one.

    It rises in the first tenth of the course, stays constant, and falls linearly to zero in the last two fifths.
    """

    def __init__(self) -> None:
        self.falls_from, self.ends_at = 1.0 - _FALL, 1.0  # shares of the course

    def fall_from(self, share: float) -> None:
        """Let the fall begin at a share of the course, and take two thirds of the steps before it."""
        if share < self.falls_from:
            self.falls_from, self.ends_at = share, share / (1.0 - _FALL)

    def factor(self, share: float, total: int) -> float:
        """Return the factor after a share of the course, which has so many steps at most."""
        # The first step has the rate of the second one, because its own would be zero.
        rising = max(share, 1.0 / total) / _RISE if share < _RISE else 1.0
        falling = (self.ends_at - share) / (self.ends_at - self.falls_from) if share > self.falls_from else 1.0
        return max(0.0, min(rising, falling, 1.0))


class Course:
    """Gradient steps of a copy of the network.

    If the held-out loss makes no more progress, the rate falls at once. The course ends after a fifth if the loss
    hasn't fallen.
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
        self._schedule = Schedule()
        self._looked, self._least = 0.0, training.first  # share of the course at the last look; the loss of `best`

    def run(self, progress: bool | None = None) -> None:
        """Take all steps, or as many as the time limit and the held-out loss allow."""
        training, schedule = self.training, self._schedule
        total, batches = training.total, training.batches()
        timing = _Timing(training.clock)
        with learning(self.student, is_normed=training.is_normed):
            shown = bar("distill", progress, range(total), total=total)
            for step in shown:
                if timing.is_over(step):
                    self.is_out_of_time = True
                    break
                if step and training.clock.seconds is not None:
                    # The bar shows no more remaining time than the limit leaves.
                    shown.total = min(total, step + 1 + timing.steps_left(step))
                share = timing.share(step / total)
                if step and int(share * LOOKS) > int(self._looked * LOOKS):
                    self._look_and_decide(step, share)
                if self.is_given_up or share >= schedule.ends_at:
                    break
                self.step(next(batches), self.rate * schedule.factor(share, total))
                self.done += 1
        if self.done and not (self.curve and self.curve[-1].step == self.done):
            self._look()

    def step(self, batch: tuple[Any, list[Tensor]], rate: float) -> None:
        """Take one step, within `learning`."""
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.zero_grad()
        self.training.objective(self.student, *batch).backward()
        self.optimizer.step()

    def _look_and_decide(self, step: int, share: float) -> None:
        """Measure the held-out loss, which may end the course or let the rate fall."""
        first = self.training.first
        is_fifth = self._looked < _NO_GAIN_AT <= share and step >= _LEAST_STEPS
        self._looked = share
        self._look()
        losses = [look.loss for look in self.curve]
        is_known = share >= _LEAST_SHARE and step >= _LEAST_STEPS
        is_lost = is_known and not min(losses[-2:]) <= MOST_LOST * first
        if is_lost or not math.isfinite(losses[-1]):
            self.is_given_up = True
            return
        if len(losses) > 1 and max(losses[-2:]) < self._least:
            self._least, self.best_step = max(losses[-2:]), step
            self.best = copy.deepcopy(self.student.state_dict())
        if is_fifth and min(losses) >= first:
            self._try_to_end()
            if self.is_given_up:
                return
        # Compare the last looks at the full rate with earlier ones. Looks while the rate rises don't count: the loss is
        # often smaller then than soon after.
        full = [look.loss for look in self.curve if look.lr == self.rate]
        lately, earlier = sum(full[-_WINDOW:]), sum(full[-2 * _WINDOW : -_WINDOW])
        if len(full) >= 2 * _WINDOW and lately > (1.0 - _PROGRESS) * earlier:
            self._schedule.fall_from(share)

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


class _Timing:
    """The time of a course's steps, looks included, beside the time limit."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._began, self._spent_before = clock, time.perf_counter(), clock.spent

    def _of_a_step(self, step: int) -> float:
        return (time.perf_counter() - self._began) / max(step, 1)

    def is_over(self, step: int) -> bool:
        """Tell whether no further step fits into the limit.

        The first one is taken if there is any time, because it may take longer than the others.
        """
        return self._clock.seconds is not None and (
            self._clock.remaining_seconds <= 0.0 or self._clock.remaining_seconds < self._of_a_step(step)
        )

    def steps_left(self, step: int) -> int:
        """Return the number of steps that fit into the limit."""
        return int(self._clock.remaining_seconds / self._of_a_step(step))

    def share(self, of_steps: float) -> float:
        """Return the used share of the steps, or of the time if that is larger."""
        if self._clock.seconds is None:
            return of_steps
        spent = self._clock.spent - self._spent_before
        return max(of_steps, spent / max(spent + self._clock.remaining_seconds, 1e-9))


@dataclass(frozen=True)
class Learned:
    """What a course learned."""

    course: Course | None = None
    student: nn.Module | None = None
    after: Judgement | None = None
    steps: int = 0
    weights_of: int = 0  # the step that they are from
    is_discarded: bool = True
    is_out_of_time: bool = False
    discarded_lr: float = math.nan  # of the course before, whose weights were discarded


def learn(training: Training, judge: HeldOutJudge, rate: float, before: Judgement, progress: bool | None) -> Learned:
    """Take the steps at a rate, and judge the weights at the end, or else the best ones on the way."""
    clock, course = training.clock, Course(training, rate)
    course.run(progress)
    is_out_of_time = course.is_out_of_time or clock.remaining_seconds <= 0.0
    if course.is_given_up and not course.gains_nothing:
        message = "learning rate %g is given up after %d of %d steps: the loss on held-out samples has grown"
        _logger.info(message, rate, course.done, training.total)
    if not course.done:
        return Learned(course, is_out_of_time=is_out_of_time)
    student, after = judge.at_end(course.student, training.is_normed)
    weights_of = course.done
    if not is_better(after, before) and course.best and (clock.seconds is None or clock.remaining_seconds > 0.0):
        course.student.load_state_dict(course.best)
        earlier, then = judge.at_end(course.student, training.is_normed)
        if is_better(then, before):
            student, after, weights_of = earlier, then, course.best_step
    return Learned(course, student, after, course.done, weights_of, not is_better(after, before), is_out_of_time)


@contextmanager
def learning(student: nn.Module, *, is_normed: bool = False) -> Iterator[None]:
    """Enable gradients, and batch statistics in batch norms if ``is_normed``; masked weights stay zero."""
    handles = []
    for module in student.modules():
        parameters = dict(module.named_parameters(recurse=False))  # scripted modules have no `_parameters`
        weight, bias = parameters.get("weight"), parameters.get("bias")
        if weight is None or bias is None:
            continue
        # A removed channel would come back by its bias or by the factor of its norm.
        rows = by_output(weight.detach(), module)
        lives = rows.reshape(len(rows), -1).any(1)
        if lives.shape == bias.shape:
            lives |= bias.detach() != 0
            if bool(lives.all()):
                continue
            vectors = (vector for vector in (weight, bias) if vector.dim() == 1 and vector.requires_grad)
            handles += [vector.register_hook(lambda gradient, lives=lives: gradient * lives) for vector in vectors]
    for norm in batch_norms(student)[0].values() if is_normed else ():
        norm.train()
        norm.momentum = norm.momentum or _MOMENTUM
    try:
        with zeros_held(student), inputs_laid_out(student), torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
