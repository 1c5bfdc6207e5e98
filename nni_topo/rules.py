"""Rules for arguments, each a test with its words for messages, and checks of functions and dataclasses by them."""

from __future__ import annotations

import functools
import inspect
import math
import os
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import reduce
from numbers import Integral, Real
from operator import or_
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeGuard, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nni_topo.context import called_as
from nni_topo.errors import ConfigError, DataError, NniTopoError, _nearest, listed, shown, unknown_name

_Kind = TypeVar("_Kind")
_Given = ParamSpec("_Given")
_Returned = TypeVar("_Returned")


@dataclass(frozen=True)
class Rule:
    """What an argument must be: in words and as a test that never raises; ``names``: the allowed names, if any.

    ``tell`` describes a wrong value where that is clearer than its repr. ``look`` gets the argument's name, a value for
    which the rule holds, and the place; it raises an error for anything wrong inside the value.
    """

    words: str
    holds: Callable[[Any], bool]
    names: tuple[str, ...] = ()
    tell: Callable[[Any], str] | None = None
    error: type[NniTopoError] = ConfigError
    look: Callable[[str, Any, str], None] | None = None

    def __or__(self, other: Rule) -> Rule:
        def look(name: str, value: Any, place: str) -> None:
            found = self.look if self.holds(value) else other.look
            if found is not None:
                found(name, value, place)

        words = dict.fromkeys([*self.words.split(" or "), *other.words.split(" or ")])  # each once
        return Rule(
            " or ".join(words),
            lambda value: self.holds(value) or other.holds(value),
            self.names + other.names,
            self.tell or other.tell,
            self.error,
            look,
        )

    def check(self, name: str, value: Any, place: str) -> None:
        """Raise the rule's error, with the argument's name and place, unless the rule holds for the value."""
        if self.holds(value):
            if self.look is not None:
                self.look(name, value, place)
            return
        if self.names and isinstance(value, str):
            # The string is probably a misspelt name: only names are allowed, or one of them is similar.
            others = set(self.words.split(" or ")) - set(map(repr, self.names)) - {"None"}
            if not others or _nearest(value, self.names):
                raise unknown_name(name, value, self.names, place)
        found = shown(value) if self.tell is None else self.tell(value)
        raise self.error(f"{name} must be {self.words}, got {found} ({place})")


def whole(least: int, most: int = 2**31 - 1) -> Rule:
    """Return the rule for an integer from ``least`` to ``most``."""

    def holds(value: Any) -> bool:
        return not isinstance(value, bool) and isinstance(value, Integral) and least <= int(value) <= most

    limit = "" if most == 2**31 - 1 else f" and below 2^{most.bit_length()}"
    return Rule("an integer of 64 bits" if least == -(2**63) else f"an integer of at least {least}{limit}", holds)


def number(
    low: float = -math.inf, high: float = math.inf, closed: Literal["both", "left", "right", "neither"] = "both"
) -> Rule:
    """Return the rule for a finite number from ``low`` to ``high``; ``closed``: the ends that are included."""

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
    """Return the rule for one of several names."""
    known = tuple(names)
    return Rule(" or ".join(map(repr, known)), lambda value: isinstance(value, str) and value in known, known)


def instance(*kinds: type[Any]) -> Rule:
    """Return the rule for an instance of one of several classes."""
    words = (f"{'an' if kind.__name__[0] in 'AEIOUaeiou' else 'a'} {kind.__name__}" for kind in kinds)
    return Rule(" or ".join(words), lambda value: isinstance(value, kinds))


def settings(kind: type[Any]) -> Rule:
    """Return the rule for values that :func:`as_settings` accepts: an instance of a dataclass, or a mapping."""
    names = listed((item.name for item in fields(kind)), 6)
    return Rule(
        f"a {kind.__name__} or a mapping of its fields",
        lambda value: isinstance(value, (kind, Mapping)),
        tell=lambda value: f"{shown(value)}; the fields of a {kind.__name__} are {names}",
    )


def all_of(rule: Rule, kind: type[Any], least: int = 0) -> Rule:
    """Return the rule for a collection of class ``kind`` with at least ``least`` values that all follow a rule.

    Of a mapping, the values are checked.
    """

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
JOBS = Rule("at least 1, or -1 for all cores", lambda value: value == -1 or whole(1).holds(value))


def taking(*names: str) -> Rule:
    """Return the rule for a function that takes as many positional arguments as names are given."""

    def holds(value: Any) -> bool:
        if not callable(value):
            return False
        try:
            inspect.signature(value).bind(*names)
        except TypeError:
            return False
        except ValueError:  # a builtin function may have no signature
            pass
        return True

    def tell(value: Any) -> str:
        if not callable(value):
            return shown(value)
        return f"{getattr(value, '__name__', type(value).__name__)}{inspect.signature(value)}"

    return Rule(f"a function of ({', '.join(names)})", holds, tell=tell)


SEED = whole(0, 2**32 - 1)  # the range that NumPy and scikit-learn accept
PATH = instance(str, os.PathLike)
NUMBER = number()
INTEGER = whole(-(2**63), 2**63 - 1)
ARRAY = Rule("an array of real numbers", lambda value: _is_array(value), error=DataError)
_ROWS = Rule("an array of real numbers of at least one dimension", lambda value: _is_array(value, 1), error=DataError)
_PLAIN: dict[Any, Rule] = {
    Any: ANYTHING,
    inspect.Parameter.empty: ANYTHING,
    None: NONE,
    type(None): NONE,
    bool: FLAG,
    int: INTEGER,
    float: NUMBER,
    str: instance(str),
    Path: PATH,
}


def _is_array(value: Any, least: int = 0) -> bool:
    """Say whether NumPy can make an array of numbers, with at least ``least`` dimensions, from a value."""
    if value is None or isinstance(value, (str, bytes)):
        return False
    if hasattr(value, "is_meta"):  # a tensor; NumPy can't read bfloat16 nor tensors with gradients
        return not value.is_meta and str(value.layout) == "torch.strided" and value.dim() >= least
    try:
        array = np.asarray(value)
        return array.dtype.kind in "biufc" and array.ndim >= least
    except Exception:  # unreadable classes raise all kinds of errors
        return False


def check_knobs(place: str, given: Mapping[str, Any], rules: Mapping[str, Rule]) -> None:
    """Check the given arguments that have a rule of the same name."""
    for name, rule in rules.items():
        if name in given:
            rule.check(name, given[name], place)


def checked(**rules: Rule) -> Callable[[Callable[_Given, _Returned]], Callable[_Given, _Returned]]:
    """Decorate a function so that its arguments are checked: by the given rules, otherwise by their annotations."""

    def decorate(function: Callable[_Given, _Returned]) -> Callable[_Given, _Returned]:
        place = function.__qualname__.removesuffix(".__init__")
        parameters = inspect.signature(function).parameters
        names = list(parameters)
        if unknown := rules.keys() - parameters.keys():
            raise TypeError(f"{place} has no parameters {sorted(unknown)}")

        @functools.cache
        def table() -> dict[str, Rule]:
            # At the first call, because annotations may name classes that are defined further down.
            plain = {
                name: each.annotation
                for name, each in parameters.items()
                if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD) and name not in ("self", "cls")
            }
            scope = getattr(inspect.unwrap(function), "__globals__", {})
            return {name: rules[name] if name in rules else _rule(name, hint, scope) for name, hint in plain.items()}

        @functools.wraps(function)
        def run(*args: _Given.args, **kwargs: _Given.kwargs) -> _Returned:
            check_knobs(called_as(place), {**dict(zip(names, args, strict=False)), **kwargs}, table())
            return function(*args, **kwargs)

        vars(run)["rules"] = table
        return run

    return decorate


def check_fields(settings: Any, place: str = "", **rules: Rule) -> None:
    """Check a dataclass's fields: by the given rules, otherwise by their annotations."""
    scope = vars(sys.modules[type(settings).__module__])
    for item in fields(settings):
        rule = rules[item.name] if item.name in rules else _rule(item.name, item.type, scope)
        rule.check(item.name, getattr(settings, item.name), place or type(settings).__name__)


def _rule(name: str, hint: Any, scope: Mapping[str, Any]) -> Rule:
    """Return the rule for a parameter: for ``seed`` the same rule everywhere, otherwise its annotation's."""
    found = rule_of(hint, scope)
    if name == "seed":
        return SEED | NONE if found.holds(None) else SEED
    return found


def rule_of(hint: Any, scope: Mapping[str, Any] | None = None) -> Rule:
    """Return the rule for an annotation; annotations that it can't translate allow anything."""
    if isinstance(hint, str):
        try:
            hint = eval(hint, dict(scope or {}))
        except NameError:  # a class imported for type checkers only
            return ANYTHING
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is ArrayLike:
        return ARRAY
    if np.ndarray in (hint, origin) or NDArray in (hint, origin):
        return _ROWS
    if hint in _PLAIN:
        return _PLAIN[hint]
    if origin is Literal:
        names = [value for value in inner if isinstance(value, str)]
        others = [_equal(value) for value in inner if not isinstance(value, str)]
        return reduce(or_, [one_of(names), *others] if names else others)
    if origin in (typing.Union, types.UnionType):
        # Before NumPy 2.5 ArrayLike is a union, whose members merge into a wider union; since 2.5 it stays one name.
        swallowed = set(typing.get_args(ArrayLike))
        if swallowed and swallowed <= set(inner):
            return ARRAY | NONE if type(None) in inner else ARRAY
        return reduce(or_, (rule_of(each, scope) for each in inner))
    if origin is Callable:
        return FUNCTION
    if origin is type:
        kind = inner[0] if is_class(inner[0]) else object
        return Rule(f"a class of {kind.__name__}", lambda value: is_class(value) and issubclass(value, kind))
    if isinstance(origin, type) and issubclass(origin, Iterable):
        rules = [rule_of(each, scope) for each in inner if each is not ...]
        if issubclass(origin, Mapping):
            return _mapping(*rules)
        if issubclass(origin, tuple) and inner[-1:] != (...,):
            words = f"a tuple of {', '.join(rule.words for rule in rules)}"
            return Rule(words, lambda value: isinstance(value, (tuple, list)) and _all_hold(rules, value))
        return _several(rules[0], is_sized=issubclass(origin, Collection))
    if is_class(hint) and hint is not object and not getattr(hint, "_is_protocol", False):
        return instance(hint)
    return ANYTHING


def is_class(value: object) -> TypeGuard[type]:
    """Say whether a value is a class. ``list[int]`` isn't, although it is an instance of ``type`` in Python 3.10."""
    return isinstance(value, type) and not isinstance(value, types.GenericAlias)


def _equal(wanted: Any) -> Rule:
    return Rule(repr(wanted), lambda value: type(value) is type(wanted) and bool(value == wanted))


def _all_hold(rules: Sequence[Rule], values: Sequence[Any]) -> bool:
    return len(values) == len(rules) and all(rule.holds(each) for rule, each in zip(rules, values, strict=True))


def _mapping(key: Rule, item: Rule) -> Rule:
    def holds(value: Any) -> bool:
        return isinstance(value, Mapping) and all(key.holds(k) and item.holds(v) for k, v in value.items())

    return Rule("a mapping" if item is ANYTHING else f"a mapping, each value {item.words}", holds)


def _several(rule: Rule, *, is_sized: bool) -> Rule:
    """Return the rule for a collection of any class, arrays included; without ``is_sized`` also for iterators."""

    def holds(value: Any) -> bool:
        if not isinstance(value, Iterable) or isinstance(value, (str, bytes, Mapping)):
            return False
        if hasattr(value, "named_parameters"):  # a model is no collection, even if it can be iterated
            return False
        if not isinstance(value, Collection):
            return not is_sized
        try:
            each = iter(value)
            return rule is ANYTHING or all(map(rule.holds, each))
        except TypeError:  # a 0-d array
            return False

    words = "a sequence" if is_sized else "an iterable"
    return Rule(words if rule is ANYTHING else f"{words}, each value {rule.words}", holds)


def check_result(name: str, value: Any, place: str) -> float:
    """Return the result of a user's function as a float; ConfigError if it isn't a number."""
    # Tensors with one value and NumPy's numbers count as numbers, strings such as "0.5" don't.
    if value is not None and not isinstance(value, (str, bytes, bytearray)):
        with suppress(TypeError, ValueError, RuntimeError, OverflowError):
            return float(value)
    raise ConfigError(f"{name} must return a number, got {shown(value)} ({place})")


def is_finite(value: Any) -> bool:
    """Say whether a value is a finite real number; booleans aren't."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def as_settings(kind: type[_Kind], value: _Kind | Mapping[str, Any] | None, name: str) -> _Kind:
    """Return an argument as an instance of a dataclass; made from a mapping of its fields, or from defaults if None."""
    if isinstance(value, kind):
        return value
    (settings(kind) | NONE).check(name, value, name)
    given = dict(value) if isinstance(value, Mapping) else {}
    known = [item.name for item in fields(kind)]  # type: ignore[arg-type]
    for key in given:
        if key not in known:
            raise unknown_name(f"key of {name}", str(key), known, name)
    return kind(**given)
