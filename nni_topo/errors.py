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
    """Return the error for a name (of a `kind` of things) that isn't in a table, with the nearest names that are."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(names)}"
    return ConfigError(f"{kind} must be a known name, got {name!r}; {hint}")


def check_integer(name: str, value: Any, least: int, place: str) -> None:
    """Raise ConfigError, which names the knob and the place, unless it got an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r} ({place})")


def is_finite(value: Any) -> bool:
    """Say whether a value is a real number, finite and no truth value."""
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def check_seed(value: Any, place: str) -> None:
    """Raise ConfigError unless a seed is an integer of 32 bits, [0, 2^32), as scikit-learn's generators take."""
    check_integer("seed", value, 0, place)
    if value >= 2**32:
        raise ConfigError(f"seed must be below 2^32, got {value!r} ({place})")


def check_between(name: str, value: Any, low: float, high: float, place: str, *, closed: bool = False) -> None:
    """Raise ConfigError unless a number is in (low, high), or in (low, high] if `closed`."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not low < value <= high or (value == high and not closed):
        end = "]" if closed else ")"
        raise ConfigError(f"{name} must be in ({low:g}, {high:g}{end}, got {value!r} ({place})")


def as_settings(kind: type[Settings], value: Settings | Mapping[str, Any] | None, name: str) -> Settings:
    """Return a settings object (a dataclass), also from a mapping of its fields, as YAML has it; None: its defaults."""
    if isinstance(value, kind):
        return value
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(f"{name} must be a {kind.__name__} or a mapping of its fields, got {value!r} ({name})")
    known = [item.name for item in fields(kind)]  # type: ignore[arg-type]
    for key in value or ():
        if key not in known:
            raise unknown_name(f"key of {name}", str(key), known)
    return kind(**(value or {}))
