"""Caches that a forward reads or fills while it is recorded.

A traced integer has the hash of its value and equals it, so that a dict with sizes as keys works. A function under
`functools.lru_cache` would therefore return the plain numbers of an earlier run, or numbers computed from another size
of the same value, and would keep traced ones. So code that hashes a traced integer is searched for cached functions,
with all that it and its callers can name. If there are any, they compute anew from then on what they are asked for with
traced integers, and the model is recorded once more.
"""

from __future__ import annotations

import functools
import gc
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack
from types import CellType, CodeType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any, TypeVar

from torch import Tensor, nn

from nni_topo.context import context
from nni_topo.network.graph.traced_int import NOTES, Hashed, Notes, TracedInt, plain
from nni_topo.network.runtime.inputs import let_go

_Result = TypeVar("_Result")
_Cached: Any = type(functools.lru_cache(plain))
_FIXED = (tuple, frozenset)
_INDIRECT = (staticmethod, classmethod, property)
_CONTAINERS = (dict, list, tuple, set, frozenset, deque)
_CALLS = "torch.nn.modules.module"  # calls forwards and hooks, and caches nothing
_PACKAGE = __name__.partition(".")[0]
_SETTLED = set[CodeType]()  # code whose cached functions are replaced, until the outermost public function ends


def without_caches(record: Callable[[Notes], _Result], model: nn.Module) -> _Result:
    """Record a model; again if it hashes traced integers near cached functions, which then compute anew for them.

    They do so until the outermost public function ends.
    """
    with ExitStack() as stack:
        at_end = context().at_end or stack
        if not _SETTLED:
            _SETTLED.add(_CALL)
            at_end.callback(_SETTLED.clear)
        while True:
            notes = Notes(functools.partial(_replace_caches, at_end), _SETTLED)
            token = NOTES.set(notes)
            try:
                return record(notes)
            except Hashed as error:
                let_go(error)
            finally:
                NOTES.reset(token)
                release(notes.numbers, model, notes.spaces)


def _replace_caches(at_end: ExitStack, frame: FrameType) -> bool:
    """Replace the cached functions that code in a frame, or its callers, can name; return whether there are any."""
    roots, names = list[Any](), set[str]()
    caller: FrameType | None = frame
    while caller is not None and (code := caller.f_code) is not without_caches.__code__:
        place = str(caller.f_globals.get("__name__"))
        if place != _CALLS and place.partition(".")[0] != _PACKAGE:
            named = {*code.co_names, *(constant for constant in code.co_consts if type(constant) is str)}
            space = caller.f_globals
            values = [*(space[name] for name in named & space.keys()), *caller.f_locals.values()]
            if caller is frame:
                for value in values:
                    if type(value) is FunctionType:  # it may return a cached one
                        roots.append(value.__globals__)
            roots += [space, *values]
            names |= named
        caller = caller.f_back
    replaced = dict[int, Any]()
    for holder in _holders(roots, names):
        put, entries = _entries(holder)
        for key, value in entries:
            new = _anew(value, replaced)
            if new is not value:
                at_end.callback(put, key, value)
                put(key, new)
    return bool(replaced)


def _holders(roots: Iterable[Any], names: Collection[str]) -> Iterator[Any]:
    """Yield the containers within values, also indirectly; of modules and classes, only ``names`` are opened."""
    waiting, seen = deque[Any](roots), set[int]()
    alive = list[Any]()  # so that no other object gets an id that was seen
    while waiting:
        value = waiting.popleft()
        kind = type(value)
        if id(value) in seen or issubclass(kind, (Tensor, str, bytes, int, float)) or value is None:
            continue
        seen.add(id(value))
        alive.append(value)
        if issubclass(kind, ModuleType):
            waiting += [vars(value)] + [content for name, content in vars(value).items() if name in names]
        elif issubclass(kind, _CONTAINERS):
            yield value
            if not issubclass(kind, dict):
                waiting += value
            elif "__builtins__" not in value:  # else the global names of a module
                waiting += value.values()
        elif kind is CellType:
            yield value
            waiting += [content for _, content in _entries(value)[1]]
        elif kind is FunctionType and value.__code__ is not _CALL:
            waiting += [*(value.__closure__ or ()), value.__defaults__, value.__kwdefaults__, vars(value)]
        elif kind is MethodType:
            waiting += [value.__func__, value.__self__]
        elif issubclass(kind, functools.partial):
            waiting += [value.func, value.args, value.keywords]
        elif issubclass(kind, type):
            for base in value.__mro__:
                yield base
                waiting += [content for name, content in vars(base).items() if name in names]
        elif kind not in (_Cached, FunctionType):
            waiting.append(kind)
            if isinstance(table := getattr(value, "__dict__", None), dict):
                waiting.append(table)


def _anew(value: Any, replaced: dict[int, Any]) -> Any:
    """Return a function that computes anew for traced integers in place of a cached one; other values unchanged."""
    kind = type(value)
    if kind in (staticmethod, classmethod):
        new = _anew(value.__func__, replaced)
        if new is value.__func__:
            return value
        return kind(new)
    if kind is property:
        new = _anew(value.fget, replaced)
        if new is value.fget:
            return value
        return property(new, value.fset, value.fdel, value.__doc__)
    if kind is not _Cached:
        return value
    if id(value) not in replaced:
        replaced[id(value)] = _call_of(value)
    return replaced[id(value)]


def _call_of(cached: Any) -> Any:
    @functools.wraps(cached)
    def call(*args: Any, **kwargs: Any) -> Any:
        notes = NOTES.get()
        if notes is None:
            return cached(*args, **kwargs)
        before = notes.hashes
        hash((args, tuple(kwargs.values())))  # whatever holds the arguments' numbers, it hashes them
        if notes.hashes == before:
            return cached(*args, **kwargs)
        return cached.__wrapped__(*args, **kwargs)

    for name in ("cache_info", "cache_clear"):
        setattr(call, name, getattr(cached, name))
    return call


_CALL = _call_of(functools.lru_cache(plain)).__code__


def release(numbers: list[TracedInt], model: nn.Module, spaces: Iterable[dict[str, Any]]) -> None:
    """Make traced integers forget what they hold, and take those that the forward has kept out of its containers.

    ``spaces``: global names of code that hashed them.
    """
    for attributes in map(vars, numbers):
        attributes.clear()
    if _still_held(numbers):
        for module in model.modules():
            _without_traced(vars(module))
    targets: list[Any] = _still_held(numbers)
    seen = {id(numbers), id(targets)}
    while targets:
        fixed = list[Any]()
        for holder in gc.get_referrers(*targets):
            if id(holder) in seen:
                continue
            seen.add(id(holder))
            if issubclass(type(holder), _FIXED):
                fixed.append(holder)
            else:
                _without_traced(holder)
        targets = fixed
        seen.add(id(targets))
    if _still_held(numbers):
        # The collector doesn't list what holds them: perhaps a module's containers that were made before gc.freeze().
        modules = {type(module).__module__ for module in model.modules()}
        all_spaces = [*spaces, *(vars(sys.modules[name]) for name in modules if name in sys.modules)]
        for holder in _holders([model, *(value for space in all_spaces for value in space.values())], ()):
            if not issubclass(type(holder), _FIXED):
                _without_traced(holder)


def _still_held(numbers: list[TracedInt]) -> list[Any]:
    """List the numbers that anything but their list holds."""
    (least,) = [sys.getrefcount(unheld) for unheld in [object()]]
    return [number for number in numbers if sys.getrefcount(number) > least]


def _is_released(value: Any) -> bool:
    if issubclass(type(value), _FIXED):
        return any(map(_is_released, value))
    return type(value) is TracedInt and not vars(value)


def _plainly(value: Any) -> Any:
    """Return a value with plain integers in place of released traced ones, also within tuples."""
    if not _is_released(value):
        return value
    if isinstance(value, TracedInt):
        return plain(value)
    entries = map(_plainly, value)
    if hasattr(value, "_fields"):
        return type(value)(*entries)
    return type(value)(entries)


def _without_traced(holder: Any) -> None:
    """Take released integers out of a container: entries with such keys are removed, others get plain values."""
    kind = type(holder)
    if issubclass(kind, set):
        holder.difference_update([value for value in holder if _is_released(value)])
        return
    if issubclass(kind, dict):
        for key in [key for key in holder if _is_released(key)]:
            del holder[key]
    put, entries = _entries(holder)
    for key, value in entries:
        if _is_released(value):
            put(key, _plainly(value))


def _entries(holder: Any) -> tuple[Callable[[Any, Any], Any], list[tuple[Any, Any]]]:
    """Return the entries of a container, a closure's cell, a class or an object, and a function that replaces one."""
    kind = type(holder)
    if issubclass(kind, type):  # must know that its dict changes
        return functools.partial(type.__setattr__, holder), list(vars(holder).items())
    if kind is CellType:
        try:
            return functools.partial(setattr, holder), [("cell_contents", holder.cell_contents)]
        except ValueError:  # a variable that has no value yet
            return functools.partial(setattr, holder), []
    if issubclass(kind, (list, deque)):
        return holder.__setitem__, list(enumerate(holder))
    table = holder if issubclass(kind, dict) else getattr(holder, "__dict__", None)
    if isinstance(table, dict):
        return (table.__setitem__, list(table.items()))
    return (functools.partial(setattr, holder), [])
