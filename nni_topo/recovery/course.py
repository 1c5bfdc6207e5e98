"""A course of gradient steps: which parameters learn, how many steps are done, and the file to continue from."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from nni_topo.disk import DELETE, output_file, read_tensors, reading, write_tensors
from nni_topo.errors import ConfigError
from nni_topo.network.layers import by_output, inputs_laid_out, zeros_held
from nni_topo.network.runtime import bar
from nni_topo.recovery.lesson import Batches, Lesson

_FORMAT = "nni-topo distillation 2"
_MOMENTUM = 0.1  # of batch norms that have none of their own


_LOOKS = ((0.1, 10.0), (0.2, 4.0), (0.5, 2.0))
"""A course ends early if, after these shares of its steps, the held-out loss is so many times the first one.

At a high rate the loss rises at first and falls again as the rate does; it doesn't fall from above these lines to less
than at first, or the next lower rate falls further.
"""

_LEAST_STEPS, _LEAST_STEPS_IN_TIME = 50, 5  # before a course may end early


class Course:
    """Gradient steps of a student, the rate falling along half a cosine; they go on from a file if it is there.

    Attributes
    ----------
    is_left : bool
        Whether it ended early because the held-out loss grew.
    seconds : float or None
        Time for all steps; None: as long as they take. A course that goes on from a file has that of its beginning.
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        is_normed: bool,
        rate: float,
        kind: dict[str, Any] | None = None,
        seconds: float | None = None,
        warmup: float = 0.0,
        path: str | Path | None = None,
        every: float = 30.0,
    ) -> None:
        self.student, self.rate = student, rate
        self._warmup = warmup  # share of the steps, or of the time, in which the rate rises
        norms = [each for each in student.modules() if isinstance(each, _BatchNorm) and each.track_running_stats]
        self._norms = norms if is_normed else []
        self.kind, self.path = kind or {}, None if path is None else Path(path)
        self._every = every  # seconds from one state in the file to the next
        self.optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], weight_decay=0.0)
        self.done, self.spent = 0, 0.0
        self.seconds = seconds
        self.ended_early = False
        if self.path is not None and self.path.exists():
            self._resume(self.path)

    def run(
        self,
        lesson: Lesson,
        batches: Batches,
        total: int,
        progress: bool | None = None,
        *,
        grows: Callable[[nn.Module, float], bool] = lambda student, times: False,
    ) -> None:
        """Take the remaining steps, or as many as time allows; stop if the held-out loss `grows` by so many times."""
        rest = itertools.islice(batches, self.done, None)
        with _learning(self.student, self._norms):
            for share in self._shares(total, progress, grows):
                if share < self._warmup:
                    level = max(share, 1.0 / total) / self._warmup
                else:
                    level = (1.0 + math.cos(math.pi * (share - self._warmup) / (1.0 - self._warmup))) / 2.0
                self.optimizer.param_groups[0]["lr"] = level * self.rate
                self.optimizer.zero_grad()
                lesson.objective(self.student, *next(rest)).backward()
                self.optimizer.step()

    def _shares(self, total: int, progress: bool | None, grows: Callable[[nn.Module, float], bool]) -> Iterator[float]:
        """Yield before each step the share of the steps, or of the time, that is used up."""
        last = 0.0
        began = kept = time.perf_counter() - self.spent
        for step in bar("distill", progress, range(self.done, total), total=total, done=self.done):
            self.spent = time.perf_counter() - began
            share = max(step / total, 0.0 if self.seconds is None else self.spent / self.seconds)
            if share >= 1.0:
                break
            passed = [times for at, times in _LOOKS if last < at <= share]
            # Of few steps little is known, unless it is time that allows no more of them.
            is_slow = self.seconds is not None and share > step / total
            is_known = self.done >= (_LEAST_STEPS_IN_TIME if is_slow else _LEAST_STEPS)
            if passed and is_known and grows(self.student, passed[-1]):
                self.ended_early = True
                break
            last = share
            yield share
            self.done += 1
            if time.perf_counter() - kept >= self._every:
                self._keep()
                kept = time.perf_counter()
        if not self.ended_early:
            self._keep()

    def forget(self) -> None:
        """Remove the file, so that another course can begin."""
        if self.path is not None:
            output_file(self.path).unlink(missing_ok=True)

    def _keep(self) -> None:
        if self.path is not None:
            now = {
                "done": self.done,
                "spent": self.spent,
                "rate": self.rate,
                "seconds": self.seconds,
                "model": self.student.state_dict(),
            }
            parts = {"format": _FORMAT, "kind": self.kind, **now, "optimizer": self.optimizer.state_dict()}
            write_tensors(self.path, parts)

    def _resume(self, path: Path) -> None:
        with reading(path, "a state", "of this distillation", DELETE):
            state = read_tensors(path)
            if state["format"] != _FORMAT:
                raise KeyError(state["format"])
            self.student.load_state_dict(state["model"])
            for key, value in self.kind.items():
                found = state["kind"].get(key)
                if found != value:
                    raise ConfigError(f"distillation must go on with {key} {found}, got {value} ({path})")
            self.optimizer.load_state_dict(state["optimizer"])
            self.done, self.spent, self.rate = state["done"], state["spent"], state["rate"]
            self.seconds = state["seconds"]


@contextmanager
def _learning(student: nn.Module, norms: list[_BatchNorm]) -> Iterator[None]:
    """Let gradients be taken and some batch norms use their batches; what masks have made zero stays zero."""
    handles = []
    for module in student.modules():
        own = dict(module.named_parameters(recurse=False))  # scripted modules have no dicts of theirs
        weight, bias = own.get("weight"), own.get("bias")
        if weight is None or bias is None:
            continue
        # A channel of zeros would come back by its bias, or by its norm's factor.
        rows = by_output(weight.detach(), module)
        lives = rows.reshape(len(rows), -1).any(1)
        if lives.shape == bias.shape:
            lives |= bias.detach() != 0
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
