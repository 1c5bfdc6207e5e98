"""Checks of knobs that many parts have, in one wording."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from nni_topo.errors import ConfigError


def check_integer(name: str, value: Any, least: int, place: str) -> None:
    """Check a number that counts something.

    Parameters
    ----------
    name : str
        The knob.
    value : Any
        What it was given.
    least : int
        The smallest that makes sense.
    place : str
        Where, for the message.

    Raises
    ------
    ConfigError
        If it isn't an integer, or is smaller.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r} ({place})")


def is_finite(value: Any) -> bool:
    """Say whether a value is a real number, finite and no truth value."""
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def check_seed(value: Any, place: str) -> None:
    """Check a seed of a generator that takes 32 bits, as scikit-learn's do.

    Parameters
    ----------
    value : Any
        What the knob was given.
    place : str
        Where, for the message.

    Raises
    ------
    ConfigError
        If it isn't an integer in [0, 2^32).
    """
    check_integer("seed", value, 0, place)
    if value >= 2**32:
        raise ConfigError(f"seed must be below 2^32, got {value!r} ({place})")


def check_between(name: str, value: Any, low: float, high: float, place: str, *, closed: bool = False) -> None:
    """Check a number between two others.

    Parameters
    ----------
    name : str
        The knob.
    value : Any
        What it was given.
    low, high : float
        The bounds; the lower one is never allowed itself.
    place : str
        Where, for the message.
    closed : bool, default=False
        Whether the upper bound is allowed.

    Raises
    ------
    ConfigError
        If it isn't a number, or lies outside.
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not low < value <= high or (value == high and not closed):
        end = "]" if closed else ")"
        raise ConfigError(f"{name} must be in ({low:g}, {high:g}{end}, got {value!r} ({place})")
