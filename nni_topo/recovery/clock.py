"""The wall time of a call, its limit, and the time that judging networks takes."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from nni_topo.context import advice


def seconds_knob() -> str:
    """Return what limits the time of a distillation, for messages."""
    return advice("seconds=", "--distill-seconds")


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
    def remaining_seconds(self) -> float:
        """Remaining seconds for steps; infinite without a limit."""
        if self.seconds is None:
            return math.inf
        return self.seconds - self.seconds_to_judge(self.judged_at_end) - self.spent
