"""The decorator of all public functions that take models or calibration data."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from nni_topo.context import context, in_context
from nni_topo.network.runtime.copies import leaves_models_alone
from nni_topo.network.runtime.progress import locked_by_threads
from nni_topo.rules import Rule, checked

_Given = ParamSpec("_Given")
_Made = TypeVar("_Made")


@dataclass(frozen=True)
class Running:
    """How a public function runs."""

    # For functions without a config_list: how a user excludes layers, for messages; ``{}`` stands for the layers.
    leaves_out: str = ""
    as_compiled: bool = False  # whether compiled models stay compiled; then they aren't copied


_USUAL = Running()


def public(how: Running = _USUAL, /, **rules: Rule) -> Callable[[Callable[_Given, _Made]], Callable[_Given, _Made]]:
    """Decorate a public function that takes models or calibration data.

    Within the function each warning of the package is logged once, and no progress is shown if its ``progress`` is
    False. Arguments are checked by the ``rules`` of their names, or by their annotations, see `checked`. Models among
    them are copied, see `leaves_models_alone`.
    """

    def decorate(function: Callable[_Given, _Made]) -> Callable[_Given, _Made]:
        work = checked(**rules)(leaves_models_alone(function, as_compiled=how.as_compiled))

        @functools.wraps(function)
        def run(*args: _Given.args, **kwargs: _Given.kwargs) -> _Made:
            settings: dict[str, Any] = {"is_quiet": context().is_quiet or kwargs.get("progress") is False}
            if how.leaves_out:
                settings["leaves_out"] = how.leaves_out
            if context().told is None:
                _filter_warnings()
                settings["told"] = set()
            with in_context(**settings), locked_by_threads():
                return work(*args, **kwargs)

        return run

    return decorate


class _Once(logging.Filter):
    """Drops a warning that was logged before in the same call of a public function."""

    def filter(self, record: logging.LogRecord) -> bool:
        texts = context().told
        if texts is None or record.levelno < logging.WARNING:
            return True
        text = record.getMessage()
        is_new = text not in texts
        texts.add(text)
        return is_new


_ONCE = _Once()


def _filter_warnings() -> None:
    """Add the filter to all loggers of the package: a logger's filter doesn't see the records of its children."""
    package = __name__.partition(".")[0]
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(f"{package}."):
            logging.getLogger(name).addFilter(_ONCE)  # a second time adds nothing
