"""Exceptions that the package raises on purpose.

Every message states the rule, the value that broke it and the place it was found, in this order.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import fields
from numbers import Integral, Real
from typing import Any, TypeVar

Settings = TypeVar("Settings")


class NniTopoError(Exception):
    """Base class of every error the package raises itself."""


class ConfigError(NniTopoError, ValueError):
    """A config_list, a knob or a name that can't be used."""


class DataError(NniTopoError, ValueError):
    """Tensors, files or data sets that can't be used: NaN weights, missing files, wrong shapes."""


class SpeedupError(NniTopoError, RuntimeError):
    """Masks that can't be turned into a dense model that computes the same function."""


class ExportError(NniTopoError, RuntimeError):
    """A network that can't be written such that the file computes the same."""


class CompatibilityError(NniTopoError, RuntimeError):
    """The installed NNI or PyTorch isn't one the package can work with."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ConfigError:
    """Build the error for a name that isn't in a table, with the nearest names that are.

    Parameters
    ----------
    kind : str
        What the name should name, e.g. ``"pruner"``.
    name : str
        The name that was given.
    known : iterable of str
        The names of the table.

    Returns
    -------
    ConfigError
        To be raised by the caller.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(names)}"
    return ConfigError(f"{kind} must be a known name, got {name!r}; {hint}")


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


def as_settings(kind: type[Settings], value: Settings | Mapping[str, Any] | None, name: str) -> Settings:
    """Return a settings object, also from a mapping of its fields, as YAML has it; None: with its defaults.

    Parameters
    ----------
    kind : type
        Class of the settings, a dataclass.
    value : kind, mapping or None
        What was given.
    name : str
        Of the knob, for messages.

    Raises
    ------
    ConfigError
        If it is anything else, or a field is unknown or out of its range.
    """
    if isinstance(value, kind):
        return value
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(f"{name} must be a {kind.__name__} or a mapping of its fields, got {value!r} ({name})")
    known = [item.name for item in fields(kind)]  # type: ignore[arg-type]
    for key in value or ():
        if key not in known:
            raise unknown_name(f"key of {name}", str(key), known)
    return kind(**(value or {}))
