"""Exceptions that the package raises on purpose.

Every message states the rule, the value that broke it and the place it was found, in this order.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

Settings = TypeVar("Settings")
_Given = ParamSpec("_Given")
_Returned = TypeVar("_Returned")


class NniTopoError(Exception):
    """Base class of every error the package raises itself; ``page`` of the documentation, if any, says more."""

    page = ""


class ConfigError(NniTopoError, ValueError):
    """A config_list, a knob or a name that can't be used."""


class LayerError(ConfigError):
    """Layers that a pruner can make nothing of; ``layers`` has their names."""

    def __init__(self, message: str, layers: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.layers = tuple(layers)


class DataError(NniTopoError, ValueError):
    """Tensors, files or data sets that can't be used: NaN weights, missing files, wrong shapes."""


class SpeedupError(NniTopoError, RuntimeError):
    """Masks that can't be turned into a dense model that computes the same function."""

    page = "docs/compatibility.md"


class ExportError(NniTopoError, RuntimeError):
    """A network that can't be written such that the file computes the same."""

    page = "docs/export.md"


class CompatibilityError(NniTopoError, RuntimeError):
    """The installed NNI or PyTorch isn't one the package can work with."""

    page = "docs/compatibility.md"


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ConfigError:
    """Build the error for a name of some ``kind`` that isn't in a table, with the nearest names that are."""
    names = sorted(set(known))
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(names)}"
    return ConfigError(f"{kind} must be a known name, got {name!r}; {hint}")


@dataclass(frozen=True)
class Rule:
    """What a knob must be: in words, and as a test that raises for no value; ``names``, where it is one of them."""

    words: str
    holds: Callable[[Any], bool]
    names: tuple[str, ...] = ()

    def __or__(self, other: Rule) -> Rule:
        return Rule(
            f"{self.words} or {other.words}",
            lambda value: self.holds(value) or other.holds(value),
            self.names + other.names,
        )

    def check(self, name: str, value: Any, place: str) -> None:
        """Raise a ConfigError, with the name of the knob and of its place, unless a value is what it must be."""
        if self.holds(value):
            return
        if self.names and isinstance(value, str):
            raise unknown_name(name, value, self.names)
        raise ConfigError(f"{name} must be {self.words}, got {shown(value)} ({place})")


def whole(least: int, most: int = 2**31 - 1) -> Rule:
    """Return the rule of a number that counts something."""

    def holds(value: Any) -> bool:
        return not isinstance(value, bool) and isinstance(value, Integral) and least <= int(value) <= most

    limit = "" if most == 2**31 - 1 else f" and below 2^{most.bit_length()}"
    return Rule(f"an integer of at least {least}{limit}", holds)


def number(
    low: float = -math.inf, high: float = math.inf, closed: Literal["both", "left", "right", "neither"] = "both"
) -> Rule:
    """Return the rule of a finite number within two others."""

    def holds(value: Any) -> bool:
        if not is_finite(value):
            return False
        above = value >= low if closed in ("both", "left") else value > low
        return bool(above and (value <= high if closed in ("both", "right") else value < high))

    if math.isfinite(high):
        start, end = "[" if closed in ("both", "left") else "(", "]" if closed in ("both", "right") else ")"
        return Rule(f"in {start}{low:g}, {high:g}{end}", holds)
    above = f"{'at least' if closed == 'both' else 'above'} {low:g} and finite"
    return Rule(above if math.isfinite(low) else "a finite number", holds)


def one_of(names: Iterable[str]) -> Rule:
    """Return the rule of a name in a table."""
    known = tuple(names)
    return Rule(" or ".join(map(repr, known)), lambda value: isinstance(value, str) and value in known, known)


def instance(*kinds: type[Any]) -> Rule:
    """Return the rule of an object of one of several classes."""
    words = (f"{'an' if kind.__name__[0] in 'AEIOUaeiou' else 'a'} {kind.__name__}" for kind in kinds)
    return Rule(" or ".join(words), lambda value: isinstance(value, kinds))


def settings(kind: type[Any]) -> Rule:
    """Return the rule of what :func:`as_settings` takes for a class of settings; that has a table of its own."""
    return Rule(f"a {kind.__name__} or a mapping of its fields", lambda value: isinstance(value, (kind, Mapping)))


def all_of(rule: Rule, kind: type[Any], least: int = 0) -> Rule:
    """Return the rule of a sequence, or of a mapping by names, of at least so many values that all keep a rule."""

    def holds(value: Any) -> bool:
        if not isinstance(value, kind) or isinstance(value, (str, bytes)) or len(value) < least:
            return False
        each = value.values() if isinstance(value, Mapping) else value
        return all(map(rule.holds, each))

    size = f" of at least {least}" if least else ""
    return Rule(f"a {kind.__name__.lower()}{size}, each value {rule.words}", holds, rule.names)


ANYTHING = Rule("anything", lambda value: True)
NONE = Rule("None", lambda value: value is None)
FLAG = Rule("True or False", lambda value: isinstance(value, bool))
FUNCTION = Rule("a function", callable)
SEED = whole(0, 2**32 - 1)  # what NumPy's and scikit-learn's generators take
PATH = instance(str, os.PathLike)


def check_knobs(place: str, given: Mapping[str, Any], rules: Mapping[str, Rule]) -> None:
    """Check what is given by the rules of the same names."""
    for name, rule in rules.items():
        if name in given:
            rule.check(name, given[name], place)


def checked(**rules: Rule) -> Callable[[Callable[_Given, _Returned]], Callable[_Given, _Returned]]:
    """Check a function's arguments before it runs, by their names."""

    def decorate(function: Callable[_Given, _Returned]) -> Callable[_Given, _Returned]:
        place = function.__qualname__.removesuffix(".__init__")
        names = list(inspect.signature(function).parameters)

        @functools.wraps(function)
        def run(*args: _Given.args, **kwargs: _Given.kwargs) -> _Returned:
            check_knobs(place, {**dict(zip(names, args, strict=False)), **kwargs}, rules)
            return function(*args, **kwargs)

        return run

    return decorate


def check_integer(name: str, value: Any, least: int, place: str) -> None:
    """Check a number that counts something."""
    whole(least).check(name, value, place)


def check_jobs(n_jobs: Any, place: str) -> None:
    """Check a number of jobs at a time."""
    if n_jobs != -1:
        try:
            whole(1).check("n_jobs", n_jobs, place)
        except ConfigError:
            raise ConfigError(f"n_jobs must be at least 1, or -1 for all cores, got {n_jobs!r} ({place})") from None


def is_finite(value: Any) -> bool:
    """Say whether a value is a real number, finite and no truth value."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def check_between(name: str, value: Any, low: float, high: float, place: str, *, closed: bool = False) -> None:
    """Check a number above one other and below, or with ``closed`` up to, a second."""
    number(low, high, "right" if closed else "neither").check(name, value, place)


def as_settings(kind: type[Settings], value: Settings | Mapping[str, Any] | None, name: str) -> Settings:
    """Return a knob's settings object, also from a mapping of its fields, as YAML has it; None: with its defaults."""
    if isinstance(value, kind):
        return value
    (settings(kind) | NONE).check(name, value, name)
    given = dict(value) if isinstance(value, Mapping) else {}
    known = [item.name for item in fields(kind)]  # type: ignore[arg-type]
    for key in given:
        if key not in known:
            raise unknown_name(f"key of {name}", str(key), known)
    return kind(**given)


def shown(value: Any) -> str:
    """Return a value as a message shows it, in one line and not too long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else f"{text[:97]}..."


_SMALL = 2**26


def free_memory() -> int:
    """Return the bytes that this process can still take: of the machine, its control group and its own limit."""
    import psutil

    free: list[int] = [psutil.virtual_memory().available]
    with suppress(OSError, ValueError, KeyError):  # Linux alone has such groups, and few have a limit
        group = Path("/sys/fs/cgroup")
        held = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free.append(int((group / "memory.max").read_text()) - int(held["anon"]))
    with suppress(ImportError):  # Windows has no such limits
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            free.append(limit - psutil.Process().memory_info().vms)
    return max(0, min(free))


def check_memory(needed: float, what: str, cure: str, place: str) -> None:
    """Raise DataError, with the knob that makes it less, where so many bytes aren't free for what comes next."""
    if needed > _SMALL and needed > (free := free_memory()):
        got = f"{needed / 2**30:.2f} GiB for {free / 2**30:.2f} GiB that are free"
        raise DataError(f"{what} must fit into memory, got {got}: {cure} ({place})")
