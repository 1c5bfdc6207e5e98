"""Copies of models, and where they lie."""

from __future__ import annotations

import copyreg
import dis
import functools
import gc
import logging
import sys
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from operator import is_
from pickle import PicklingError
from types import BuiltinFunctionType, CellType, CodeType, EllipsisType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any, cast

import torch
from nni.compression.base.compressor import Compressor
from nni.compression.utils import Evaluator
from torch import Tensor, nn

from nni_topo.errors import ConfigError
from nni_topo.network.runtime.memory import out_of_memory

# What copy.deepcopy raises of what it can't copy: of locks and files, of pointers, of queues between processes.
_NOT_COPIED = (TypeError, ValueError, RuntimeError, PicklingError)
# What most attributes of modules are: values, tuples of these, and tables, most of them without an entry.
_PLAIN = {bool, int, float, str, type(None)}
_TABLES = {dict, OrderedDict, set}
# What holds nothing, and is its own copy.
_ATOMS = frozenset({*_PLAIN, complex, bytes, range, type, EllipsisType, CodeType, torch.dtype, torch.device})
# What may hold anything and is no model's own. In training under NNI a model holds functions that hold the pruner, and
# the evaluator with its trainer and data.
_NOBODYS = (type, ModuleType, logging.Logger, Compressor, Evaluator)
_READS = ("LOAD_ATTR", "LOAD_METHOD")
_PROXIES = (weakref.ProxyType, weakref.CallableProxyType)
_WEAK = (weakref.ReferenceType, *_PROXIES)
_WEAK_CONTAINERS = (weakref.WeakSet, weakref.WeakKeyDictionary, weakref.WeakValueDictionary)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter; of a model without any, the CPU."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def is_transformed(tensor: Tensor) -> bool:
    """Tell whether a tensor belongs to a transformation under way, as ``torch.vmap`` and ``torch.func.grad`` make them.

    It stands for all samples of another tensor, say, and can't be used after the transformation.
    """
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def detached_copy(model: nn.Module, *, light: bool = False, shared: Iterable[Tensor] = ()) -> Any:
    """Return a deep copy of a model, also where weights are computed, as those of a masked model in training are.

    A ``light`` one holds the model's own parameters, any one the ``shared`` tensors; these mustn't be written to then.

    A function that the model holds, in whatever container or object, such as a ``forward`` that replaces its class's,
    belongs to the copy: what it holds of the model in its closure and its defaults is the copy's, and so is what weak
    references refer to. What else a function holds, such as a list of results, is one of both models. What
    ``torch.compile`` has compiled is as it was written. An attribute that can't be copied, such as a lock or an open
    file, is one of both models; one that holds layers is a ConfigError.
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*shared, *(model.parameters() if light else ()))}
    modules = list(model.modules())
    held = {
        id(value): value
        for module in modules
        for value in (*vars(module).values(), *module._buffers.values(), *module._parameters.values())
        if issubclass(type(value), Tensor)  # a proxy of one says that it is one, too
    }
    # What a module has computed with gradients and keeps in a table of its own, as LeViT does, is no leaf either.
    for module in modules:
        for name, kept in vars(module).items():
            if type(kept) in (dict, list, tuple) and kept and name not in ("_modules", "_parameters", "_buffers"):
                leaves = kept.values() if isinstance(kept, dict) else kept
                held |= {id(each): each for each in leaves if issubclass(type(each), Tensor)}
    # What a forward has kept of a transformation has no memory and serves nobody after it: one for both models.
    memo |= {key: each for key, each in held.items() if is_transformed(each)}
    held = {key: each for key, each in held.items() if not is_transformed(each)}
    strided = [each for each in held.values() if type(each) in (Tensor, nn.Parameter) and each.layout == torch.strided]
    lookers = Counter(each.untyped_storage().data_ptr() for each in strided)
    for key, value in held.items():
        # Weights that are computed aren't leaves, which deepcopy refuses: in the copy they are tensors of their own.
        if key not in memo and (not value.is_leaf or _is_plain_tensor(value, lookers)):
            memo[key] = value.detach().clone()
    _check_classes(modules)
    replaced = [module for module in modules if "forward" in vars(module)]
    own = _ids_of_layers(modules) if replaced else set[int]()
    for module in replaced:
        _check_globals(vars(module)["forward"], own, type(module).__name__)
    # Deepcopy takes its time for the tables of each module, most of them empty.
    plain = [module for module in modules if _is_copied_by_state(type(module))]
    memo |= {id(module): type(module).__new__(type(module)) for module in plain}
    memo |= {id(vars(module)): vars(memo[id(module)]) for module in plain}
    copier = _Copier(model, memo)
    for module in reversed(plain):
        memo[id(module)].__setstate__(copier.state(module))
    try:
        return copier.copy(model)
    except ConfigError:
        raise
    except _NOT_COPIED as error:
        if out_of_memory(error):
            raise
        raise ConfigError(f"a model must be one that copy.deepcopy copies, got: {error} (model)") from error


def _ids_of_layers(modules: Iterable[nn.Module]) -> set[int]:
    """Return the ids of modules, and of their parameters and buffers."""
    own = set[int]()
    for module in modules:
        own.add(id(module))
        own |= {id(each) for each in (*module._parameters.values(), *module._buffers.values()) if each is not None}
    return own


def _check_globals(value: Any, own: set[int], kind: str) -> None:
    """Raise ConfigError for a forward that reads a module of the model from a global variable, as no copy can."""
    functions, seen = [value], set[int]()
    while functions:
        function = functions.pop()
        if not isinstance(function, FunctionType) or id(function) in seen:
            continue
        seen.add(id(function))
        functions += _held_by(function)
        for name in function.__code__.co_names:
            found = function.__globals__.get(name)
            if id(found) in own or id(getattr(found, "__self__", None)) in own:
                raise ConfigError(
                    "a forward that replaces that of its class must reach the model by its arguments or its closure, "
                    f"for a copy of the model has to compute with its own layers, got the global name {name!r} "
                    f"(forward of a {kind})"
                )


def _check_classes(modules: Sequence[nn.Module]) -> None:
    """Raise ConfigError for a class that reads a module of the model from an attribute of its own, as no copy can."""
    classes = {base for kind in set(map(type, modules)) for base in kind.__mro__ if issubclass(base, nn.Module)}
    for kind in classes:
        if kind.__module__.startswith("torch."):
            continue
        held = {name: value for name, value in vars(kind).items() if _is_layer(value)}
        if not held:
            continue
        own = _ids_of_layers(modules)
        names = {name for name, value in held.items() if id(value) in own}
        for reader in classes:
            for function in vars(reader).values():
                if not isinstance(function, FunctionType) or function.__name__ == "__init__":
                    continue
                read = {each.argval for each in dis.get_instructions(function) if each.opname in _READS}
                for name in sorted(names & read):
                    raise ConfigError(
                        "a model must hold its layers in attributes of its instances, for a copy of the model has to "
                        f"compute with its own layers, got one in the class attribute {name!r} (read by "
                        f"{function.__qualname__})"
                    )


def _held_by(function: FunctionType) -> list[Any]:
    """List what a function holds: in its closure, its defaults, and its attributes, such as ``__wrapped__``."""
    found: list[Any] = []
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # a variable that has no value yet
            found.append(cell.cell_contents)
    return [*found, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), *vars(function).values()]


def _reached(values: Iterable[Any], *, through_functions: bool = True, seen: set[int] | None = None) -> Iterator[Any]:
    """Go over all that values hold, however deep and in whatever object, these values first.

    The garbage collector knows what objects hold, those made in C and generators too. That of Python 3.13 doesn't know
    of the dictionary in which an object has its attributes: it is looked at here. Weak references are passed, not
    followed. Functions that modules of Python define, and classes, belong to nobody's model.
    """
    waiting, seen = list(values), set() if seen is None else seen
    while waiting:
        value = waiting.pop()
        kind = type(value)
        if kind in _ATOMS or id(value) in seen or issubclass(kind, _NOBODYS):
            continue
        seen.add(id(value))
        if kind is FunctionType:
            if not through_functions or _is_found_by_name(value):
                continue
            yield value
            waiting += _held_by(value)
        elif kind is FrameType:
            waiting += value.f_locals.values()
        elif kind is dict:
            yield value
            waiting += (*value, *value.values())
        else:
            yield value
            waiting += gc.get_referents(value)
            if kind.__dictoffset__:
                with suppress(AttributeError, TypeError):
                    waiting.append(object.__getattribute__(value, "__dict__"))


def _is_found_by_name(function: FunctionType) -> bool:
    """Tell whether a function is one that its module defines, as pickle asks, or gives another name."""
    module = sys.modules.get(function.__module__ or "")
    names = vars(module) if module is not None else {}
    first, *others = function.__qualname__.split(".")
    found = names.get(first)
    for name in others:
        found = getattr(found, name, None)
    return found is function or names.get(function.__name__) is function


def _is_layer(value: Any) -> bool:
    return issubclass(type(value), (nn.Module, Tensor))


def _referent(value: Any) -> Any:
    """Return what a weak reference or a proxy refers to, the object of a weak method; None where that is gone."""
    if type(value) in _PROXIES:
        try:
            return value.__reduce_ex__.__self__  # a proxy asks what it refers to for all but its type
        except (AttributeError, ReferenceError):
            return None
    found = value()
    return found.__self__ if isinstance(value, weakref.WeakMethod) and found is not None else found


class _Copier:
    """Copies as copy.deepcopy does, and copies besides what that hands on as it is: functions and weak references.

    With these left as they are ``self.act = lambda x: self.scale * x``, or a ``forward`` that calls the one before it,
    would go on computing with the original. Deepcopy can't be told how to copy them, so that each kind of value is
    copied here; classes say as ever how, by ``__deepcopy__`` or ``__reduce_ex__``. ``memo`` is deepcopy's: the copies
    by the ids of the originals.
    """

    def __init__(self, model: nn.Module, memo: dict[int, Any]) -> None:
        self.memo = memo
        self._model, self._place = model, type(model).__name__
        self._strangers = set[int]()  # which hold nothing of the model
        self._makers: dict[type, Callable[[Any], Any]] = {
            list: self._list,
            tuple: self._tuple,
            dict: self._dict,
            MethodType: self._method,
            FunctionType: self._function,
            BuiltinFunctionType: self._builtin,
            functools._lru_cache_wrapper: self._cached,
            weakref.ReferenceType: self._weak,
            **dict.fromkeys(_PROXIES, self._weak),
            Tensor: self._tensor,
            torch.Generator: lambda value: value.clone_state(),  # of which deepcopy knows nothing
        }

    @functools.cached_property
    def _own(self) -> set[int]:
        """The ids of what the model holds other than by functions, all of which is copied."""
        return {id(value) for value in _reached([self._model], through_functions=False)}

    def copy(self, value: Any) -> Any:
        """Return the copy of a value, which may be the value itself."""
        kind = type(value)
        if kind in _ATOMS:
            return value
        known = self.memo.get(id(value), self)
        if known is not self:
            return known
        make = self._makers.get(kind)
        copied = self._object(value) if make is None else make(value)
        if copied is not value:
            self._note(value, copied)
        return copied

    def state(self, module: nn.Module) -> dict[str, Any]:
        """Return the attributes of a module's copy."""
        found: dict[str, Any] = {}
        # A model has thousands of attributes, most of them values and empty tables of hooks: no call for each of these.
        for name, value in vars(module).items():
            kind = type(value)
            if kind in _PLAIN or (kind is tuple and _PLAIN.issuperset(map(type, value))):
                found[name] = value  # the same in every copy
            elif id(value) in self.memo:
                # A hook's handle holds the tables of its module, empty ones too, and mustn't get others of its own.
                found[name] = self.memo[id(value)]
            elif kind in _TABLES and not value:
                found[name] = self.memo[id(value)] = kind()
            elif name != "_compiled_call_impl":
                found[name] = self._attribute(module, name, value)
        own, copied = vars(module).get("forward"), cast(Any, found.get("forward"))
        # A function that stood for the class's own forward has become that of the copy, which needs no attribute.
        is_new = copied is not own and not isinstance(own, MethodType) and isinstance(copied, MethodType)
        if is_new and copied.__func__ is type(module).forward and copied.__self__ is self.memo[id(module)]:
            del found["forward"]
        return found

    def _attribute(self, module: nn.Module, name: str, value: Any) -> Any:
        if name in ("_parameters", "_buffers", "_modules"):
            # By the memo, for a function may hold the table itself.
            copied = self.memo[id(value)] = type(value)((key, self.copy(each)) for key, each in value.items())
            return copied
        self._place = f"{type(module).__name__}.{name}"
        return self._copied_or_shared(value, "an attribute", self._place)

    def _copied_or_shared(self, value: Any, what: str, place: str) -> Any:
        """Copy a value; one that can't be copied is shared, unless it holds layers."""
        try:
            return self.copy(value)
        except ConfigError:
            raise
        except _NOT_COPIED as error:
            # A lock, an open file, or what holds one, such as a writer of logs: one for the model and its copies.
            if out_of_memory(error):
                raise
            for each in _reached([value]):
                if _is_layer(each) or (issubclass(type(each), _WEAK) and id(_referent(each)) in self._own):
                    raise ConfigError(
                        f"{what} that holds layers or tensors must be one that copy.deepcopy copies, got "
                        f"{type(value).__name__}: {error} ({place})"
                    ) from error
            self.memo[id(value)] = value
            return value

    def _note(self, value: Any, copied: Any) -> None:
        self.memo[id(value)] = copied
        # Another object must not get the id of one that is gone; deepcopy keeps them in the same place.
        self.memo.setdefault(id(self.memo), []).append(value)

    def _tensor(self, value: Tensor) -> Any:
        if not value.is_leaf:  # deepcopy refuses what is computed: in the copy it is a tensor of its own
            return value.detach().clone()
        return self._object(value)

    def _list(self, value: list[Any]) -> list[Any]:
        copied: list[Any] = []
        self._note(value, copied)
        for each in value:
            copied.append(self.copy(each))  # noqa: PERF401  it may hold itself
        return copied

    def _tuple(self, value: tuple[Any, ...]) -> Any:
        copied = [self.copy(each) for each in value]
        if id(value) in self.memo:  # it holds itself
            return self.memo[id(value)]
        return value if all(map(is_, copied, value)) else tuple(copied)

    def _dict(self, value: dict[Any, Any]) -> dict[Any, Any]:
        copied: dict[Any, Any] = {}
        self._note(value, copied)
        for key, each in value.items():
            copied[self.copy(key)] = self.copy(each)
        return copied

    def _object(self, value: Any) -> Any:
        """Copy an object of any other class, as the class says."""
        kind = type(value)
        if issubclass(kind, _NOBODYS):
            return value
        if issubclass(kind, weakref.ReferenceType):
            return self._weak(value)
        if issubclass(kind, _WEAK_CONTAINERS):
            return self._weak_container(value)
        own = getattr(value, "__deepcopy__", None)
        if own is not None:
            if not issubclass(kind, Tensor) or vars(value):
                # It calls deepcopy for what it holds, which finds copies of the functions among that in the memo.
                for each in _reached([value]):
                    if type(each) is FunctionType or issubclass(type(each), _WEAK):
                        self.copy(each)
            return self.memo[id(value)] if id(value) in self.memo else own(self.memo)
        reduce = copyreg.dispatch_table.get(kind)
        reduced = value.__reduce_ex__(4) if reduce is None else reduce(value)
        return value if isinstance(reduced, str) else self._rebuilt(value, *reduced)

    def _rebuilt(
        self,
        value: Any,
        make: Callable[..., Any],
        args: tuple[Any, ...],
        state: Any = None,
        items: Iterable[Any] | None = None,
        pairs: Iterable[tuple[Any, Any]] | None = None,
    ) -> Any:
        """Make an object anew of what its class takes it apart into."""
        copied = make(*[self.copy(each) for each in args])
        self._note(value, copied)
        if state is not None:
            state = self.copy(state)
            if hasattr(copied, "__setstate__"):
                copied.__setstate__(state)
            else:
                attributes, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
                if attributes is not None:
                    vars(copied).update(attributes)
                for name, each in (slots or {}).items():
                    setattr(copied, name, each)
        for each in items or ():
            copied.append(self.copy(each))
        for key, each in pairs or ():
            copied[self.copy(key)] = self.copy(each)
        return copied

    def _method(self, value: MethodType) -> MethodType:
        return MethodType(self.copy(value.__func__), self.copy(value.__self__))

    def _builtin(self, value: Any) -> Any:
        """Copy a method of an object made in C, such as ``self.layers.get``."""
        holder = value.__self__
        if holder is None or isinstance(holder, (type, ModuleType)) or type(holder).__name__ == "PyCapsule":
            return value
        copied = self.copy(holder) if self._is_of_model([holder]) else holder
        return value if copied is holder else getattr(copied, value.__name__)

    def _cached(self, value: Any) -> Any:
        """Copy a function within ``functools.lru_cache``, the cache of which is empty at first."""
        written = value.__wrapped__
        copied = self.copy(written)
        return value if copied is written else functools.lru_cache(**value.cache_parameters())(copied)

    def _is_of_model(self, values: Iterable[Any], *, by_name: bool = False) -> bool:
        """Tell whether values hold anything that the model holds, or layers that no one has registered.

        Of a function that is found ``by_name`` unregistered layers are nobody's.
        """
        seen, others = set[int](), list[Any]()
        for value in _reached((each for each in values if id(each) not in self._strangers), seen=seen):
            if not by_name and issubclass(type(value), (nn.Module, nn.Parameter)):
                return True  # with most functions, without a look at all that the model holds
            others.append(value)
        for value in others:
            sought = _referent(value) if issubclass(type(value), _WEAK) else value
            if sought is not None and id(sought) in self._own:
                return True
        if not by_name:
            self._strangers |= seen
        return False

    def _function(self, value: FunctionType) -> Any:
        """Make a function anew where it holds anything of the model, with copies in its place; it isn't changed."""
        if is_compiled_function(value):
            written = value._torchdynamo_orig_callable  # type: ignore[attr-defined]
            copied = self.copy(written)
            return value if copied is written else copied
        held = _held_by(value)
        if not held or not self._is_of_model(held, by_name=_is_found_by_name(value)):
            return value
        cells, new = [], list[tuple[str, CellType, Any]]()
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            known = self.memo.get(id(cell))  # a variable that functions share
            if known is None:
                known = cell
                with suppress(ValueError):  # it has no value yet
                    if self._is_of_model([cell.cell_contents]):
                        known = CellType()
                        self._note(cell, known)
                        new.append((name, known, cell.cell_contents))
            cells.append(known)
        function = FunctionType(value.__code__, value.__globals__, value.__name__, None, tuple(cells) or None)
        self._note(value, function)  # before its variables get their values: it may hold itself
        for name, cell, content in new:
            cell.cell_contents = self._in_function(content, name)
        functools.update_wrapper(function, value, updated=())
        vars(function).clear()
        vars(function).update({name: self._in_function(each, name) for name, each in vars(value).items()})
        if value.__defaults__ is not None:
            names = value.__code__.co_varnames[: value.__code__.co_argcount][-len(value.__defaults__) :]
            function.__defaults__ = tuple(map(self._in_function, value.__defaults__, names))
        if value.__kwdefaults__ is not None:
            function.__kwdefaults__ = {
                name: self._in_function(each, name) for name, each in value.__kwdefaults__.items()
            }
        return function

    def _in_function(self, value: Any, name: str) -> Any:
        """Copy what a function holds if it is of the model."""
        if not self._is_of_model([value]):
            return value
        return self._copied_or_shared(value, "a variable of a function", f"{name} in {self._place}")

    def _weak(self, value: Any) -> Any:
        """Let a weak reference to what the model holds refer to the copy of that."""
        referent = _referent(value)
        if referent is None:
            return value
        copied = self._held(referent)
        if copied is referent:
            return value
        if type(value) in _PROXIES:
            return weakref.proxy(copied)
        if isinstance(value, weakref.WeakMethod):
            method = value()
            return value if method is None else type(value)(MethodType(self.copy(method.__func__), copied))
        return type(value)(copied, self.copy(value.__callback__))

    def _held(self, value: Any) -> Any:
        """Return the copy of what the model holds; anything else as it is, for else nobody would hold its copy."""
        known = self.memo.get(id(value), self)
        if known is not self:
            return known
        return self.copy(value) if id(value) in self._own else value

    def _weak_container(self, value: Any) -> Any:
        copied = type(value)()
        self._note(value, copied)
        if isinstance(value, weakref.WeakSet):
            for each in value:
                copied.add(self._held(each))
        elif isinstance(value, weakref.WeakKeyDictionary):
            for key, each in value.items():
                copied[self._held(key)] = self.copy(each)
        else:
            for key, each in value.items():
                copied[self.copy(key)] = self._held(each)
        return copied


def is_compiled_function(value: Any) -> bool:
    """Tell whether a function is what ``torch.compile`` made of another one."""
    return hasattr(value, "_torchdynamo_orig_callable") and not getattr(value, "_torchdynamo_disable", False)


def _is_plain_tensor(value: Tensor, lookers: Counter[int]) -> bool:
    """Tell whether a tensor is all of its memory, at which no other looks: a clone is a deep copy then, made sooner."""
    if type(value) is not Tensor or value.layout != torch.strided or value.requires_grad or vars(value):
        return False
    memory = value.untyped_storage()
    return value.is_contiguous() and memory.nbytes() == value.nbytes and lookers[memory.data_ptr()] == 1


def _is_copied_by_state(kind: type[nn.Module]) -> bool:
    """Tell whether deepcopy copies modules of a class attribute by attribute."""
    own = (kind.__reduce_ex__, kind.__reduce__, kind.__new__, getattr(kind, "__getstate__", None))
    usual = (object.__reduce_ex__, object.__reduce__, object.__new__, getattr(nn.Module, "__getstate__", None))
    return own == usual and not hasattr(kind, "__deepcopy__") and not copyreg._slotnames(kind)  # type: ignore[attr-defined]


def unwrapped_copy(model: nn.Module, *, light: bool = False) -> nn.Module:
    """Return a copy of a model that NNI has wrapped, without wrappers and masks; of any other model, a copy."""
    copied: nn.Module = detached_copy(model, light=light)
    for module in list(copied.modules()):
        wrapper = getattr(module, "_nni_wrapper", None)
        if wrapper is not None:
            wrapper.unwrap()
    return copied


class RandomWeights:
    """Random numbers for the weights of a network, of which layers of one scale may look at the same, none written to.

    To draw as many as a network has, and to find memory for them, takes longer than to run it.
    """

    _DRAWN = 262_147  # a prime, so that no two rows of a layer hold the same numbers
    _APART = 4096  # layers begin at different places

    def __init__(self, draw: Callable[..., Tensor], generator: torch.Generator | None = None) -> None:
        self._drawn = _drawn(draw, self._DRAWN, torch.default_generator if generator is None else generator)
        self._scaled: dict[tuple[torch.device, float], Tensor] = {}
        self._start = 0

    def like(self, weight: Tensor, scale: float, shift: float = 0.0) -> Tensor:
        """Return single-precision numbers ``scale * drawn + shift`` in the shape of a weight."""
        key, count = (weight.device, scale), weight.numel() + self._APART
        if key not in self._scaled or self._scaled[key].numel() < count:
            scaled = (self._drawn[:count] * scale + shift).to(weight.device)
            self._scaled[key] = scaled.repeat(-(-count // scaled.numel()))
        # An even place: complex numbers can be seen in the weights from there alone.
        self._start = (self._start + 102) % self._APART
        return self._scaled[key][self._start : self._start + weight.numel()].view(weight.shape)


def _drawn(draw: Callable[..., Tensor], count: int, generator: torch.Generator) -> Tensor:
    """Draw numbers, or take the same ones that were drawn before; the generator goes on as if they were drawn anew.

    They mustn't be written to.
    """
    if torch.get_default_device().type != "cpu" or generator.device.type != "cpu":
        return draw(count, generator=generator)
    state = generator.get_state()
    numbers, after = _drawn_from(draw, count, torch.get_default_dtype(), state.numpy(force=True).tobytes())
    generator.set_state(after)
    return numbers


@lru_cache(maxsize=4)  # what draws them nearly always begins with a seed of its own, the same in each run
def _drawn_from(draw: Callable[..., Tensor], count: int, dtype: torch.dtype, state: bytes) -> tuple[Tensor, Tensor]:
    """Return numbers that a generator in a state draws, and its state afterwards."""
    generator = torch.Generator()
    generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
    with torch.inference_mode(False):
        numbers = draw(count, generator=generator, dtype=dtype, device="cpu")
    return numbers, generator.get_state()


def put_attribute(module: nn.Module, name: str, value: Any) -> None:
    """Set an attribute of a module, past a ``__setattr__`` of its class that refuses, as one that freezes it does."""
    try:
        setattr(module, name, value)
    except Exception:
        nn.Module.__setattr__(module, name, value)


def put_parameters(model: nn.Module, make: Callable[[str, Tensor], Tensor]) -> None:
    """Put others in place of a model's real and complex parameters, by full name; one in several places stays one."""
    made = dict[int, tuple[Tensor, nn.Parameter]]()  # with the old one, so that no other gets its id
    for name, module in model.named_modules():
        for own, old in list(module._parameters.items()):
            if old is not None and (old.is_floating_point() or old.is_complex()):
                if id(old) not in made:
                    new = make(f"{name}.{own}".lstrip("."), old.detach())
                    made[id(old)] = old, nn.Parameter(new, requires_grad=False)
                put_attribute(module, own, made[id(old)][1])


def to_precision(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast a model to single or double precision, in place: its floats, and complex numbers to complex ones."""
    model._apply(partial(cast_tensor, dtype=dtype))
    return model


def cast_tensor(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a tensor of floats, or of complex numbers, to single or double precision; return any other as it is."""
    if tensor.is_complex():
        return tensor.to(dtype.to_complex())
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def in_double(model: nn.Module) -> nn.Module:
    """Return a copy of a model that computes in double precision, a large weight at a time: each as it is read.

    It holds the weights of linear layers, convolutions and embeddings as the model does: they mustn't be written to.
    """
    copied: nn.Module = detached_copy(model, light=True)
    as_read: list[tuple[nn.Module, nn.Parameter]] = []
    for module in copied.modules():
        weight = module._parameters.get("weight")
        is_usual = isinstance(module, _READ_BY_FORWARD) and type(module)._apply is nn.Module._apply
        if is_usual and weight is not None and weight.is_floating_point():
            as_read.append((module, weight))
            del module._parameters["weight"]
    put_parameters(copied, lambda _, old: old.clone())  # casting works in place
    to_precision(copied, torch.float64)
    for module, weight in as_read:
        module._parameters["weight"] = weight
        kind = type(module)
        if kind not in _DOUBLING:
            own = {"weight": property(_weight_in_double), "__module__": kind.__module__}
            _DOUBLING[kind] = type(kind.__name__, (kind,), own)
        module.__class__ = _DOUBLING[kind]
    return copied


_READ_BY_FORWARD = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding)
_DOUBLING: dict[type[nn.Module], type[nn.Module]] = {}


def _weight_in_double(module: nn.Module) -> Tensor:
    own = module._parameters["weight"]
    assert own is not None  # a layer without weight keeps its class
    return own.double()


def is_plain(model: Any) -> bool:
    """Say whether a model is a module whose layers are there to be seen: not scripted, compiled, or spread."""
    # By their names: to import these classes takes longer than all else that looks at a model.
    opaque = {"ScriptModule", "OptimizedModule", "DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"}
    kinds = {kind.__name__ for kind in type(model).__mro__}
    return isinstance(model, nn.Module) and not kinds & {*opaque, "FSDPModule"}
