"""Progress bars of long computations."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, ParamSpec, TypeVar

from tqdm import tqdm

from nni_topo.context import context, in_context

P = ParamSpec("P")
R = TypeVar("R")

_DELAY = 5.0  # seconds after which progress appears by default
_PAUSE = 30.0  # seconds between updates if standard error is no terminal
LONG = 600.0
"""Longest forecast, in seconds, that isn't logged as a warning."""


def bar(
    label: str, progress: bool | None, items: Iterable[Any] | None = None, *, total: int | None = None, done: int = 0
) -> tqdm[Any]:
    """Return a progress bar of tqdm; in a file, a pipe or a notebook it is updated every thirty seconds.

    ``progress``: True shows it at once, False never, and None after five seconds. Within :func:`quiet` none appears.
    """
    return tqdm(
        items,
        desc=label,
        total=total,
        initial=done,
        mininterval=0.1 if sys.stderr is not None and sys.stderr.isatty() else _PAUSE,
        delay=_DELAY if progress is None else 0.0,
        disable=progress is False or context().is_quiet or sys.stderr is None,
    )


def duration(seconds: float) -> str:
    """Format a duration: "40 s", "12 minutes", "1.8 hours"."""
    if seconds < 100.0:
        return f"{seconds:.2g} s"
    minutes = seconds / 60.0
    if minutes < 100.0:
        return f"{minutes:.0f} minutes"
    return f"{minutes / 60.0:.2g} hours"


@contextmanager
def locked_by_threads() -> Iterator[None]:
    """Give tqdm a lock of threads within this block, unless it has one.

    Its own lock would settle how the user's process starts others. PyTorch's interpreters of graphs make bars, too.
    """
    if hasattr(tqdm, "_lock"):
        yield
        return
    tqdm.set_lock(threading.RLock())
    try:
        yield
    finally:
        with suppress(AttributeError):  # another thread came first
            del tqdm._lock  # type: ignore[attr-defined]


@contextmanager
def quiet(progress: object) -> Iterator[None]:
    """Show no progress bar within this block if ``progress`` is False."""
    with in_context(is_quiet=context().is_quiet or progress is False):
        yield


def quiet_if_asked(function: Callable[P, R]) -> Callable[P, R]:
    """Show no progress bar in a function that is called with the keyword ``progress=False``."""

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        with quiet(kwargs.get("progress")):
            return function(*args, **kwargs)

    return called
