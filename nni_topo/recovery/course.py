"""Gradient steps: their learning rate and their number, which parameters learn, and the file that they go on from.

A course of steps is the one training loop of `distill` and of the recovery method ``"block"``. A range test, which runs
short courses and looks at held-out images, says which learning rate it can take.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nni_topo.disk import DELETE, read_tensors, reading, write_tensors
from nni_topo.errors import ConfigError, DataError
from nni_topo.network.layers.kinds import by_output, zeros_held
from nni_topo.network.layers.memory_format import inputs_laid_out
from nni_topo.network.runtime.modules import device_of
from nni_topo.network.runtime.precision import Precision, backward_in
from nni_topo.network.runtime.processes import Processes
from nni_topo.network.runtime.progress import bar
from nni_topo.recovery.batchnorm import batch_norms

_FORMAT = "nni-topo distillation 7"
_MOMENTUM = 0.1  # of batch norms that have none of their own
_KEPT = ("done", "rate", "is_normed", "best", "best_step", "_began", "_looked", "_least", "_falls_from", "_end")
"""Attributes of a course that its file has as they are."""

_FALL = 0.4  # share of a course in which the rate falls to zero, at its end
_WINDOW = 4  # looks whose mean is compared with the mean of the four before them: at a high rate single losses jump
_PROGRESS = 0.02  # share of the earlier mean by which a smaller one counts as progress

LOOKS = 25
"""How often a course of full length looks at the held-out loss."""

MOST_LOST = 20.0
"""A network is lost whose held-out loss is so many times the first."""

_LINES = ((0.1, MOST_LOST), (0.2, 10.0), (0.5, 5.0))
"""A course is given up if, at two looks in turn after these shares of it, the held-out loss is so many times the first.

At a high rate the loss rises at first and falls again as the rate does, from three times the first one at half of the
course to less than half of it. Above these lines the network is broken.
"""

_FUSED = ("cpu", "cuda")  # devices on which AdamW takes all parameters together

_LEAST_STEPS, _LEAST_STEPS_IN_TIME = 50, 5  # before a course may be given up

_NO_GAIN_AT, _NO_GAIN = 0.2, 1.5
"""Share of a course after which it is tried without a high rate if no held-out loss was smaller than the first. It ends
there if the loss is then at least so many times the first.

At a high rate the loss may be larger for long and smaller in the end.
"""

RATES = (6e-3, 2e-3, 6e-4, 2e-4, 6e-5)
"""Learning rates of AdamW that are tried, the highest first."""

_MOST_LOSS, _MOST_GROWTH = 2.0, 0.25
"""A rate can be taken if after its few steps the held-out loss is at most so many times what it was before, and has
grown by at most this share of its difference from the loss of a network that always gives the same answer.

So where the network is hardly better than such a one, a rate that leads there can't be taken. Of few steps the loss is
least at low rates, and over a whole course at high ones. So the test doesn't ask which rate is best so far; it asks
which one doesn't break the network.
"""

# Of the short course for each rate:
_RISE = 0.3  # share of its steps in which the rate rises; it falls in the others
_SHARE = 0.03  # of a whole course's steps
_LEAST_TRIED = 10  # steps
_LEAST_KNOWN, _LEAST_LEFT = 3, 20  # steps for each rate, and steps after that, where time allows no more
_SHARE_OF_TIME = 0.03  # of what is left


class Teacher(Protocol):
    """Says how far a network is from what it learns, and in which precision its steps are computed."""

    @property
    def precision(self) -> Precision:
        """What the steps are computed in."""

    def objective(self, student: nn.Module, call: Any, wanted: list[Tensor]) -> Tensor:
        """Return the mean loss on a batch, of which `wanted` is to be met."""


Batches = Iterator[tuple[Any, list[Tensor]]]
"""What a network is called on, and what it is to meet, step by step."""


@dataclass(frozen=True)
class Look:
    """One look at the loss on held-out images during a course."""

    step: int  # steps done
    lr: float  # learning rate of the last step
    loss: float


@dataclass(frozen=True)
class RateTrial:
    """What became of a network after a few steps at a learning rate that falls to zero."""

    lr: float
    steps: int
    loss: float  # on held-out images
    is_taken: bool


class Clock:
    """Wall time of a distillation, with the time of interrupted runs, and its limit."""

    def __init__(self, seconds: float | None = None) -> None:
        self.seconds = seconds  # all of the time; None: as long as it takes
        # On how many samples the result will be judged, each time counted: time for steps ends that much earlier.
        self.judged_at_end = 0
        self._began = time.perf_counter()
        self._seconds_a_sample = math.inf

    @contextmanager
    def judging(self, samples: int) -> Iterator[None]:
        """Measure how long a judgement of so many samples takes.

        The fastest one counts: on the first call libraries are loaded and programs chosen, above all on a GPU.
        """
        began = time.perf_counter()
        yield
        self._seconds_a_sample = min(self._seconds_a_sample, (time.perf_counter() - began) / samples)

    def seconds_of_judging(self, samples: int) -> float:
        """Return how long judging so many samples takes; 0 as long as nothing was judged."""
        return self._seconds_a_sample * samples if math.isfinite(self._seconds_a_sample) else 0.0

    @property
    def spent(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self._began

    @property
    def left(self) -> float:
        """Seconds that are left for steps; infinite without a limit."""
        if self.seconds is None:
            return math.inf
        return self.seconds - self.seconds_of_judging(self.judged_at_end) - self.spent

    def go_on_from(self, spent: float) -> None:
        """Count the seconds that an interrupted run had spent."""
        self._began = time.perf_counter() - spent


class Course:
    """Gradient steps of a student; they go on from a file if it is there.

    The rate rises, stays, and falls in a line to zero in the last two fifths of the course. Where the held-out loss
    makes no more progress, the fall begins at once, and is shorter in proportion to the part before it.
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        is_normed: bool,
        rate: float,
        warmup: float = 0.0,
        falls_from: float = 1.0 - _FALL,
        kind: dict[str, Any] | None = None,
        clock: Clock | None = None,
        path: str | Path | None = None,
        every: float = 30.0,
        rates: Sequence[RateTrial] = (),
        processes: Processes | None = None,
    ) -> None:
        self.student, self.rate = student, rate
        self.rates = tuple(rates)  # the range test by which the rate was found
        self._processes = processes  # those that share the images; None if this one has all
        self.is_normed = is_normed  # whether batch norms take their statistics from the batches
        self.kind, self.path = kind or {}, None if path is None else Path(path)
        self._every = every  # seconds from one state in the file to the next
        learned = [p for p in student.parameters() if p.requires_grad]
        # One pass over the parameters takes a third of the time where each is small; not every device has it.
        is_fused = all(p.device.type in _FUSED and p.is_floating_point() for p in learned)
        self.optimizer = torch.optim.AdamW(learned, weight_decay=0.0, fused=is_fused or None)
        self.clock = clock or Clock()
        self._warmup, self._falls_from, self._end = warmup, falls_from, 1.0  # shares of the course
        self.done = 0  # steps
        self.curve: list[Look] = []  # the held-out loss along the course
        self.is_given_up = False  # whether it ended because the held-out loss grew, or gained nothing
        self.gains_nothing = False  # whether it ended because the held-out loss got no smaller
        self.is_out_of_time = False  # whether it ended because time allows no further step
        self._looked = 0.0  # share of the course at the last look
        self.best: dict[str, Tensor] = {}  # the student's state where two looks in turn were best, if it gained there
        self.best_step, self._least = 0, math.inf  # its step, and the larger loss of these two looks
        self._began = self.clock.spent
        if self.path is not None and self.path.exists():
            with _reading_state(self.path):
                state = read_state(self.path, self.kind)
                self.student.load_state_dict(state["model"])
                self.optimizer.load_state_dict(state["optimizer"])
                for name in _KEPT:
                    setattr(self, name, state[name])
                self.rates = tuple(RateTrial(**each) for each in state["rates"])
                self.curve = [Look(**each) for each in state["curve"]]
                self.clock.go_on_from(state["spent"])

    def run(
        self,
        lesson: Teacher,
        batches: Batches,
        total: int,
        progress: bool | None = None,
        *,
        first: float = math.inf,
        look: Callable[[nn.Module], float] | None = None,
        again: Callable[[], Batches] | None = None,
    ) -> None:
        """Take the remaining steps, or as many as time and the held-out loss allow.

        A course of full length has ``total`` steps. ``look`` returns a network's held-out loss, which was ``first``
        before the first step; without it the course has its full length. ``again`` returns the batches from the first
        one on; with it the best state is kept, and a course ends after a fifth that gains nothing.
        """
        rest = itertools.islice(batches, self.done, None)
        began = kept = time.perf_counter()
        before = self.done
        with learning(self.student, batch_norms(self.student) if self.is_normed else []):
            shown = bar("distill", progress, range(self.done, total), total=total, done=self.done)
            for step in shown:
                if self.clock.seconds is not None:
                    # With its looks; the first one may take longer, and is taken if there is any time.
                    seconds_of_a_step = (time.perf_counter() - began) / max(self.done - before, 1)
                    if self.clock.left <= 0.0 or self.clock.left < seconds_of_a_step:
                        self.is_out_of_time = True
                        break
                    if self.done > before:
                        # So that the time left that is shown is no more than the limit leaves.
                        shown.total = min(total, self.done + 1 + int(self.clock.left / seconds_of_a_step))
                share = step / total  # of the steps, or of the time, that is used up
                if self.clock.seconds is not None:
                    taken = self.clock.spent - self._began
                    share = max(share, taken / max(taken + self.clock.left, 1e-9))
                if look is not None and int(share * LOOKS) > int(self._looked * LOOKS) and self.done:
                    self._look(look(self.student), share, first, total)
                    is_fifth = self._looked < _NO_GAIN_AT <= share and self.done >= _LEAST_STEPS
                    self._looked = share
                    if again is not None:
                        latest = [each.loss for each in self.curve[-2:]]
                        if len(latest) == 2 and max(latest) < min(first, self._least):
                            self._least, self.best_step = max(latest), self.done
                            self.best = copy.deepcopy(self.student.state_dict())
                        if is_fifth and not self.is_given_up:
                            self._end_without_gain(lesson, again(), look, first)
                if self.is_given_up or share >= self._end:
                    break
                # The first step has the rate of the second one, which isn't zero.
                rising = max(share, 1.0 / total) / self._warmup if share < self._warmup else 1.0
                falling = (self._end - share) / (self._end - self._falls_from) if share > self._falls_from else 1.0
                self._step(lesson, next(rest), self.rate * max(0.0, min(rising, falling, 1.0)))
                self.done += 1
                if time.perf_counter() - kept >= self._every:
                    self._keep()
                    kept = time.perf_counter()
        is_looked_at = bool(self.curve) and self.curve[-1].step == self.done
        if look is not None and self.done and not is_looked_at:
            self.curve.append(Look(self.done, self.optimizer.param_groups[0]["lr"], look(self.student)))
        if not self.is_given_up:
            self._keep()

    def _step(self, lesson: Teacher, batch: tuple[Any, list[Tensor]], rate: float) -> None:
        """Take one step."""
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.zero_grad()
        loss = lesson.objective(self.student, *batch)
        backward_in(lesson.precision, device_of(self.student), loss)
        if self._processes is not None:  # each has the gradients of its own images
            learned = self.optimizer.param_groups[0]["params"]
            for parameter in learned:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            self._processes.add([parameter.grad for parameter in learned], "the gradients of a step")
        self.optimizer.step()

    def _end_without_gain(
        self, lesson: Teacher, batches: Batches, look: Callable[[nn.Module], float], first: float
    ) -> None:
        """End the course if no look has found a smaller loss than the first, and it stays large where the rate falls.

        The rate falls to zero in half as many steps as were taken. If that helps, the course goes on from where it was.
        """
        if min(each.loss for each in self.curve) < first:
            return
        steps, rate = self.done // 2, self.optimizer.param_groups[0]["lr"]
        before = copy.deepcopy((self.student.state_dict(), self.optimizer.state_dict()))
        for step, batch in enumerate(itertools.islice(batches, steps)):
            self._step(lesson, batch, rate * (1.0 - step / steps))
        loss = look(self.student)
        if loss < _NO_GAIN * first:
            self.student.load_state_dict(before[0])
            self.optimizer.load_state_dict(before[1])
            return
        self.done += steps
        self.curve.append(Look(self.done, self.optimizer.param_groups[0]["lr"], loss))
        self.is_given_up = self.gains_nothing = True

    def _look(self, loss: float, share: float, first: float, total: int) -> None:
        """Note the held-out loss, and end the course, or let its rate fall, where that says so."""
        self.curve.append(Look(self.done, self.optimizer.param_groups[0]["lr"], loss))
        passed = [times for at, times in _LINES if self._looked < at <= share]
        least = min(each.loss for each in self.curve[-2:])
        # Of few steps little is known, unless it is time that allows no more of them.
        is_slow = share > self.done / total
        is_known = self.done >= (_LEAST_STEPS_IN_TIME if is_slow else _LEAST_STEPS)
        if not math.isfinite(loss) or (passed and is_known and not least <= passed[-1] * first):
            self.is_given_up = True
            return
        # Do the last looks at the full rate find no smaller mean loss than those before them? While the rate rises the
        # loss is often smaller than soon after.
        losses = [each.loss for each in self.curve if each.lr == self.rate]
        lately, before = sum(losses[-_WINDOW:]), sum(losses[-2 * _WINDOW : -_WINDOW])
        stands_still = len(losses) >= 2 * _WINDOW and lately > (1.0 - _PROGRESS) * before
        if stands_still and share < self._falls_from:
            self._falls_from, self._end = share, share / (1.0 - _FALL)

    def _keep(self) -> None:
        if self.path is None:
            return
        parts = {
            "format": _FORMAT,
            "kind": self.kind,
            **{name: getattr(self, name) for name in _KEPT},
            "spent": self.clock.spent,
            "rates": [asdict(each) for each in self.rates],
            "curve": [asdict(each) for each in self.curve],
            "model": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        write_tensors(self.path, parts)


def tried_steps(total: int) -> int:
    """Return how many steps the range test takes at each rate, where a whole course has ``total`` of them."""
    return max(_LEAST_TRIED, round(_SHARE * total))


def timed_step(
    lesson: Teacher,
    student: Callable[[], nn.Module],
    batches: Callable[[], Batches],
    *,
    is_normed: bool,
    processes: Processes | None = None,
) -> float:
    """Return the seconds of a step on the first batch, whose answers are known; arguments as of `try_rates`.

    One step before it isn't timed: libraries are loaded, programs chosen and the unpruned network asked. Of short ones
    three are timed, and the fastest counts.
    """
    taken: list[float] = []
    # Processes take their steps together, whatever the time of each.
    while len(taken) < 2 or (len(taken) < 4 and sum(taken) < 1.0 and processes is None):
        course = Course(student(), is_normed=is_normed, rate=min(RATES), processes=processes)
        began = time.perf_counter()
        course.run(lesson, batches(), 1, progress=False)
        wait_for(course.student)
        taken.append(time.perf_counter() - began)
    return min(taken[1:])


def wait_for(student: nn.Module) -> None:
    """Wait until a device has computed what Python has asked it for."""
    next(student.parameters()).flatten()[:1].cpu()


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
    seconds_of_a_step: float = 0.0,
    progress: bool | None = None,
    processes: Processes | None = None,
) -> tuple[RateTrial, ...]:
    """Try learning rates from the highest on until one can be taken; return what became of each.

    ``student`` returns a copy of the network that learns, ``batches`` the batches of a course from its first one on,
    and ``judge`` the held-out loss of a network, which it may change. That loss is ``first`` before any step, and
    ``constant`` for a network that always gives the same answer. A whole course has ``total`` steps.

    No rate is taken if all break the network. Under a limit of time each rate takes 3 % of what is left, or three steps
    where these take longer, by ``seconds_of_a_step``; no other rate is tried where time allows fewer than twenty more
    steps, and none at all where it is over.
    """
    clock = clock or Clock()
    if clock.left <= 0.0:
        return ()
    steps = tried_steps(total)

    def tried(rate: float) -> nn.Module:
        course = Course(student(), is_normed=is_normed, rate=rate, warmup=_RISE, falls_from=_RISE, processes=processes)
        course.run(lesson, batches(), steps, progress=False)
        wait_for(course.student)
        return course.student

    least_left = -math.inf  # seconds that are left for the course
    if clock.seconds is not None:
        least_left = _LEAST_LEFT * seconds_of_a_step
        steps = min(steps, max(_LEAST_KNOWN, int(_SHARE_OF_TIME * clock.left / seconds_of_a_step)))
    most = min(_MOST_LOSS * first, first + _MOST_GROWTH * abs(constant - first))
    found: list[RateTrial] = []
    for rate in bar("learning rate", progress, rates):
        if clock.left < least_left:
            break
        loss = judge(tried(rate))
        found.append(RateTrial(rate, steps, loss, loss <= most))
        if found[-1].is_taken:
            break
    return tuple(found)


def read_state(path: Path, kind: dict[str, Any]) -> dict[str, Any]:
    """Read a course's file.

    ConfigError if it is of a distillation that was another one in what ``kind`` says, DataError if it is no such file.
    """
    with _reading_state(path):
        state: dict[str, Any] = read_tensors(path)
        if state["format"] != _FORMAT:
            raise DataError(
                f"a state must be of the format {_FORMAT!r}, got {state['format']!r}, as other versions of nni_topo "
                f"write it; {DELETE} ({path})"
            )
        for key, value in kind.items():
            found = state["kind"].get(key)
            if found != value:
                raise ConfigError(
                    f"distillation must go on with {key} {found}, got {value}; another file, or none, begins anew "
                    f"({path})"
                )
    return state


def _reading_state(path: Path) -> AbstractContextManager[None]:
    return reading(path, "a state", "of this distillation", DELETE)


@contextmanager
def learning(student: nn.Module, norms: list[_BatchNorm]) -> Iterator[None]:
    """Let gradients be taken and some batch norms use their batches; what masks have made zero stays zero."""
    handles = []
    for module in student.modules():
        own = dict(module.named_parameters(recurse=False))  # scripted modules have no `_parameters`
        weight, bias = own.get("weight"), own.get("bias")
        if weight is None or bias is None:
            continue
        # A channel of zeros would come back by its bias, or by its norm's factor.
        rows = by_output(weight.detach(), module)
        lives = rows.reshape(len(rows), -1).any(1)
        if lives.shape == bias.shape:
            lives |= bias.detach() != 0
            if bool(lives.all()):
                continue
            vectors = (each for each in (weight, bias) if each.dim() == 1 and each.requires_grad)
            handles += [each.register_hook(lambda gradient, lives=lives: gradient * lives) for each in vectors]
    for norm in norms:
        norm.train()
        norm.momentum = norm.momentum or _MOMENTUM
    try:
        with zeros_held(student), inputs_laid_out(student), torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
