"""What all public functions that take models or calibration data have in common."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from nni_topo.context import context, in_context
from nni_topo.network.runtime.copies import leaves_models_alone
from nni_topo.rules import Rule, checked

_Given = ParamSpec("_Given")
_Made = TypeVar("_Made")


@dataclass(frozen=True)
class Running:
    """How a public function runs."""

    # Of a function without a config_list, how layers are left out of its request; ``{}`` stands for the layers.
    leaves_out: str = ""
    as_compiled: bool = False  # whether compiled models run as such; then they aren't copied


_USUAL = Running()


def public(how: Running = _USUAL, /, **rules: Rule) -> Callable[[Callable[_Given, _Made]], Callable[_Given, _Made]]:
    """Decorate a public function that takes models or calibration data.

    Within it no warning of the package is given twice, and no progress is shown if its ``progress`` is False. Its
    arguments are checked by the rules of these names, the others by their annotations, see `checked`. Models among
    them are copied, see `leaves_models_alone`.
    """

    def decorate(function: Callable[_Given, _Made]) -> Callable[_Given, _Made]:
        work = checked(**rules)(leaves_models_alone(function, as_compiled=how.as_compiled))

        @functools.wraps(function)
        def run(*args: _Given.args, **kwargs: _Given.kwargs) -> _Made:
            known: dict[str, Any] = {"is_quiet": context().is_quiet or kwargs.get("progress") is False}
            if how.leaves_out:
                known["leaves_out"] = how.leaves_out
            if context().told is None:
                _filter_warnings()
                known["told"] = set()
            with in_context(**known):
                return work(*args, **kwargs)

        return run

    return decorate


class _Once(logging.Filter):
    """Lets a warning pass unless the public function that runs has given it."""

    def filter(self, record: logging.LogRecord) -> bool:
        told = context().told
        if told is None or record.levelno < logging.WARNING:
            return True
        text = record.getMessage()
        is_new = text not in told
        told.add(text)
        return is_new


_ONCE = _Once()


def _filter_warnings() -> None:
    """Give the filter to all loggers of the package: a logger's filter doesn't see the records of its children."""
    package = __name__.partition(".")[0]
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(f"{package}."):
            logging.getLogger(name).addFilter(_ONCE)  # a second time adds nothing
