"""Warnings that a verb of several steps gives once, though several steps find the same."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextvars import ContextVar
from typing import ParamSpec, TypeVar

_Given = ParamSpec("_Given")
_Returned = TypeVar("_Returned")
_TOLD: ContextVar[set[str] | None] = ContextVar("told", default=None)


class _Once(logging.Filter):
    """Lets a warning pass unless the verb that runs has given it."""

    def filter(self, record: logging.LogRecord) -> bool:
        told = _TOLD.get()
        if told is None or record.levelno < logging.WARNING:
            return True
        text = record.getMessage()
        is_new = text not in told
        told.add(text)
        return is_new


_ONCE = _Once()


def tells_once(function: Callable[_Given, _Returned]) -> Callable[_Given, _Returned]:
    """Decorate a verb whose steps may find the same: no warning of the package is given twice within a call."""

    @functools.wraps(function)
    def run(*args: _Given.args, **kwargs: _Given.kwargs) -> _Returned:
        package = __name__.partition(".")[0]
        # A filter of a logger isn't asked about its children's records, so each has it; a second time adds nothing.
        for name in list(logging.root.manager.loggerDict):
            if name.startswith(f"{package}."):
                logging.getLogger(name).addFilter(_ONCE)
        token = _TOLD.set(set())
        try:
            return function(*args, **kwargs)
        finally:
            _TOLD.reset(token)

    return run
