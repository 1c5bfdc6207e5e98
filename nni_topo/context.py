"""The state of the public function that runs: how messages name it, and what is done once per call of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Context:
    """What is known of the outermost public function, and of those between it and here; without one, the defaults."""

    is_quiet: bool = False  # whether no progress is shown
    # How layers are left out of its request; ``{}`` stands for the layers.
    leaves_out: str = "exclude {} from the config_list (exclude_op_names)"
    called_as: tuple[str, str] = ("", "")  # a function, and the public one that passes its arguments to it
    told: set[str] | None = None  # the warnings that were given; None: no public function runs
    is_running: bool = False  # whether a public function runs: the models within are copies, or put back by it
    is_as_written: bool = False  # whether networks compute what they say (`as_written`)
    facts: Any = None  # what is known of the model that is passed on (`Facts`)
    # A tensor that says which positions of the model's current call aren't padding: bool, (samples, places). None: all.
    real: Any = None


_NONE = Context()
_CONTEXT: ContextVar[Context] = ContextVar("context", default=_NONE)


def context() -> Context:
    """Return what is known of the public function that runs."""
    return _CONTEXT.get()


@contextmanager
def in_context(**known: Any) -> Iterator[None]:
    """Change fields of the context for a block."""
    token = _CONTEXT.set(replace(context(), **known))
    try:
        yield
    finally:
        _CONTEXT.reset(token)


def tell(**known: Any) -> None:
    """Change fields of the context until the end of the block around it."""
    _CONTEXT.set(replace(context(), **known))


def leaving_out(layers: str = "the layer") -> str:
    """Return the advice to leave layers out, with the knob that does so in the call that runs."""
    return context().leaves_out.format(layers)


def called_as(place: str) -> str:
    """Return the name by which the user called a function: its own, or the name of the function that calls it."""
    function, public = context().called_as
    return public if place == function else place
