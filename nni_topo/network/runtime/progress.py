"""Bars on standard error for what takes long."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

_PATIENCE = 5.0


def bar(
    what: str, progress: bool | None, items: Iterable[Any] | None = None, *, total: int | None = None, done: int = 0
) -> tqdm[Any]:
    """Return tqdm's bar: at once if ``progress``; None: where five seconds don't do, in a terminal; False: never."""
    # tqdm itself takes None for a bar in a terminal alone
    hidden, patience = (None, _PATIENCE) if progress is None else (not progress, 0.0)
    return tqdm(items, desc=what, total=total, initial=done, disable=hidden, delay=patience)
