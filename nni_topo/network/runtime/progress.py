"""Progress of what takes long: a bar in a terminal, lines in a file, a pipe or a notebook."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

from tqdm import tqdm

from nni_topo.context import context, in_context

P = ParamSpec("P")
R = TypeVar("R")

_DELAY = 5.0  # seconds after which progress appears that wasn't asked for
_PAUSE = 30.0  # seconds from one line to the next
LONG = 600.0
"""A forecast of more seconds than these is logged as a warning."""


class _Lines(tqdm):  # type: ignore[type-arg]
    """Progress in separate lines, for outputs that are no terminal, where a bar would be drawn again and again."""

    monitor_interval = 0  # no thread that draws anew
    _next = 0.0  # seconds after the start when the next line is due
    _last = ""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Write a line if one is due, or at the end, for which tqdm passes an empty message."""
        passed = self.format_dict["elapsed"]
        line = self._line(passed)
        if line == self._last or (msg is None and passed < self._next):
            return
        self._next, self._last = passed + _PAUSE, line
        self.fp.write(f"{line}\n")
        self.fp.flush()

    def _line(self, passed: float) -> str:
        """Say what is done, the time passed and the time left: "distill: 9 of 60, 00:40 passed, about 03:46 left"."""
        words = [f"{self.desc}: {self.n:g}" + (f" of {self.total:g}" if self.total else "")]
        words.append(f"{self.format_interval(passed)} passed")
        here = self.n - self.initial  # what was done before took none of this time
        # The first item says little of the others: it often has what is done once for all, as a pass over the data.
        if self.total and here > 1 and self.n < self.total:
            words.append(f"about {self.format_interval(passed / here * (self.total - self.n))} left")
        if self.postfix:
            words.append(str(self.postfix))
        return ", ".join(words)


def bar(
    what: str, progress: bool | None, items: Iterable[Any] | None = None, *, total: int | None = None, done: int = 0
) -> tqdm[Any]:
    """Return a progress bar of tqdm in a terminal; elsewhere one that writes a line every thirty seconds.

    ``progress``: True shows it at once, False never, and None after five seconds. Within :func:`quiet` none appears.
    """
    given: dict[str, Any] = {"desc": what, "total": total, "initial": done}
    is_hidden = progress is False or context().is_quiet or sys.stderr is None
    given |= {"delay": _DELAY if progress is None else 0.0, "disable": is_hidden}
    if sys.stderr is not None and sys.stderr.isatty():
        return tqdm(items, **given)
    return _Lines(items, **given, leave=False, miniters=1)


def duration(seconds: float) -> str:
    """Format a duration: "40 s", "12 minutes", "1.8 hours"."""
    if seconds < 100.0:
        return f"{seconds:.2g} s"
    minutes = seconds / 60.0
    return f"{minutes:.0f} minutes" if minutes < 100.0 else f"{minutes / 60.0:.2g} hours"


@contextmanager
def quiet(progress: object) -> Iterator[None]:
    """Show no progress bar within this block if ``progress`` is False."""
    with in_context(is_quiet=context().is_quiet or progress is False):
        yield


def quiet_if_asked(function: Callable[P, R]) -> Callable[P, R]:
    """Let no bar appear in a function that is called with the keyword ``progress=False``."""

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        with quiet(kwargs.get("progress")):
            return function(*args, **kwargs)

    return called
