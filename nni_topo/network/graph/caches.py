"""Caches that a forward reads or fills while it is recorded.

A traced integer has the hash of its value and equals it, so that a dict with sizes as keys works. A function under
`functools.lru_cache` would therefore return the plain numbers of an earlier run, or numbers computed from another size
of the same value, and would keep traced ones. So the first hash of a traced integer ends a run; the model is then
recorded while every cached function in the process computes anew what it is asked for with traced integers.
"""

from __future__ import annotations

import functools
import gc
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import CellType
from typing import Any, TypeVar

from torch import nn

from nni_topo.context import context
from nni_topo.network.graph.traced_int import NOTES, Hashed, Notes, TracedInt, plain
from nni_topo.network.runtime.inputs import let_go

_Result = TypeVar("_Result")
_Cached: Any = type(functools.lru_cache(plain))
_FIXED = (tuple, frozenset)


_ANEW = threading.Event()  # set while cached functions compute anew


def without_caches(record: Callable[[Notes], _Result], model: nn.Module) -> _Result:
    """Record a model; again if a traced integer is hashed, and then with cached functions that compute anew.

    They do so until the outermost public function ends, because it takes time to find them all.
    """
    with ExitStack() as stack:
        if not _ANEW.is_set():
            try:
                return _noted(record, model, may_hash=False)
            except Hashed:
                (context().at_end or stack).enter_context(_computed_anew())
        return _noted(record, model, may_hash=True)


def _noted(record: Callable[[Notes], _Result], model: nn.Module, *, may_hash: bool) -> _Result:
    notes = Notes(may_hash)
    token = NOTES.set(notes)
    try:
        return record(notes)
    except Hashed as error:
        let_go(error)
        raise
    finally:
        NOTES.reset(token)
        release(notes.numbers, model)


@contextmanager
def _computed_anew() -> Iterator[None]:
    """Replace cached functions within the block, wherever classes, namespaces, containers and closures hold them."""
    before: list[tuple[Callable[[Any], None], Any]] = []
    replaced = dict[int, Any]()
    for holder in _holders():
        put, entries = _entries(holder)
        for key, value in entries:
            new = _anew(value, replaced)
            if new is not value:
                before.append((functools.partial(put, key), value))
                put(key, new)
    _ANEW.set()
    try:
        yield
    finally:
        _ANEW.clear()
        for put_back, value in reversed(before):
            put_back(value)


def _holders() -> list[Any]:
    """List what holds cached functions: classes first, because a class must know that its dict changes."""
    gc.unfreeze()  # the collector doesn't list frozen objects
    objects = gc.get_objects()
    # By `type`, because a proxy may do something if it is asked for its class.
    cached = {id(each) for each in objects if type(each) is _Cached}
    indirect = {staticmethod, classmethod, property}
    metaclasses = {type}
    for metaclass in (waiting := [type]):
        waiting += type.__subclasses__(metaclass)
        metaclasses.add(metaclass)
    classes, others = list[Any](), list[Any]()
    for each in objects:
        kind = type(each)
        if kind is dict:
            if not cached.isdisjoint(map(id, each.values())):
                others.append(each)
        elif kind is list:
            if each is not objects and not cached.isdisjoint(map(id, each)):
                others.append(each)
        elif kind is CellType:
            if any(type(content) is _Cached for _, content in _entries(each)[1]):
                others.append(each)
        elif kind in metaclasses:
            table = vars(each).values()
            if not cached.isdisjoint(map(id, table)) or not indirect.isdisjoint(map(type, table)):
                classes.append(each)
    return classes + others


def _anew(value: Any, replaced: dict[int, Any]) -> Any:
    """Return a function that computes anew for traced integers in place of a cached one; other values unchanged."""
    kind = type(value)
    if kind in (staticmethod, classmethod):
        new = _anew(value.__func__, replaced)
        return value if new is value.__func__ else kind(new)
    if kind is property:
        new = _anew(value.fget, replaced)
        return value if new is value.fget else property(new, value.fset, value.fdel, value.__doc__)
    if kind is not _Cached:
        return value
    cached = value
    if id(cached) in replaced:
        return replaced[id(cached)]

    @functools.wraps(cached)
    def call(*args: Any, **kwargs: Any) -> Any:
        notes = NOTES.get()
        if notes is None:
            return cached(*args, **kwargs)
        before = notes.hashes
        hash((args, tuple(kwargs.values())))  # whatever holds the arguments' numbers, it hashes them
        return (cached if notes.hashes == before else cached.__wrapped__)(*args, **kwargs)

    for name in ("cache_info", "cache_clear"):
        setattr(call, name, getattr(cached, name))
    replaced[id(cached)] = call
    return call


def release(numbers: list[TracedInt], model: nn.Module) -> None:
    """Make traced integers forget what they hold, and take those that the forward has kept out of its containers."""
    for held in map(vars, numbers):
        held.clear()
    for module in model.modules() if _still_held(numbers) else ():
        _without_traced(vars(module))
    targets: list[Any] = _still_held(numbers)
    if targets:
        gc.unfreeze()  # the collector doesn't list frozen objects
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
    return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)


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
    return (
        (table.__setitem__, list(table.items()))
        if isinstance(table, dict)
        else (functools.partial(setattr, holder), [])
    )
