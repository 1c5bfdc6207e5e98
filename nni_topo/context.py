"""State of the public function that is running: how messages name it, and what happens once per call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Context:
    """State of the running public function, shared with the functions that it calls; the defaults if none runs."""

    is_quiet: bool = False  # whether progress bars are hidden
    is_command: bool = False  # whether the command line runs, whose user has flags and no arguments
    # Advice on how to exclude layers, for messages; ``{}`` stands for the layers.
    leaves_out: str = "exclude {} from the config_list (exclude_op_names)"
    called_as: tuple[str, str] = ("", "")  # a function, and the public function that passes its arguments to it
    told: set[str] | None = None  # warnings already given in this call; None: no public function runs
    is_running: bool = False  # whether a public function runs; its models are copies, or it restores them
    at_end: ExitStack | None = None  # what is undone when the outermost public function ends
    is_as_written: bool = False  # whether the block of `as_written` is active
    facts: Any = None  # `Facts` about the model that is passed on
    # Which positions of the model's current input aren't padding: bool tensor (samples, positions). None: all.
    real: Any = None
    kinds: Any = ()  # what the outputs hold that are compared, as is known; empty: distillation finds out
    read_as: str | None = None  # the same in words, for the report of weight reconstruction; None: it finds out


_NONE = Context()
_CONTEXT: ContextVar[Context] = ContextVar("context", default=_NONE)


def context() -> Context:
    """Return the context of the running public function."""
    return _CONTEXT.get()


@contextmanager
def in_context(**known: Any) -> Iterator[None]:
    """Change fields of the context within a block."""
    token = _CONTEXT.set(replace(context(), **known))
    try:
        yield
    finally:
        _CONTEXT.reset(token)


def tell(**known: Any) -> None:
    """Change fields of the context until the enclosing block of `in_context` ends."""
    _CONTEXT.set(replace(context(), **known))


def leaving_out(layers: str = "the layer") -> str:
    """Return the advice on how to exclude layers, with the argument of the running function that does so."""
    return context().leaves_out.format(layers)


def advice(call: str, command: str) -> str:
    """Return advice for whoever calls a function, or for whoever has typed a command."""
    return command if context().is_command else call


def called_as(place: str) -> str:
    """Return the name that the user called: the function's own, or the public one that passes arguments to it."""
    function, public = context().called_as
    return public if place == function else place
