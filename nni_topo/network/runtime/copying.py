"""Copies of models, and where they lie."""

from __future__ import annotations

import copy
import copyreg
import functools
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from operator import is_
from pickle import PicklingError
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from nni_topo.errors import ConfigError
from nni_topo.network.runtime.memory import out_of_memory

# What copy.deepcopy raises of what it can't copy: of locks and files, of pointers, of queues between processes.
_NOT_COPIED = (TypeError, ValueError, RuntimeError, PicklingError)
# What most attributes of modules are: values, tuples of these, and tables, most of them without an entry.
_PLAIN = {bool, int, float, str, type(None)}
_TABLES = {dict, OrderedDict, set}


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter; of a model without any, the CPU."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def detached_copy(model: nn.Module, *, light: bool = False, shared: Iterable[Tensor] = ()) -> Any:
    """Return a deep copy of a model, also where weights are computed, as those of a masked model in training are.

    A ``light`` one holds the model's own parameters, any one the ``shared`` tensors; these mustn't be written to then.

    A function that a module holds, such as a ``forward`` that replaces its class's, belongs to the copy: what it holds
    of the model in its closure is the copy's, and so is what a weak reference refers to. What ``torch.compile`` has
    compiled is as it was written. An attribute that can't be copied, such as a lock or an open file, is one of both
    models; one that holds layers is a ConfigError.
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*shared, *(model.parameters() if light else ()))}
    modules = list(model.modules())
    held = {
        id(value): value
        for module in modules
        for value in (*vars(module).values(), *module._buffers.values(), *module._parameters.values())
        if isinstance(value, Tensor)
    }
    # What a module has computed with gradients and keeps in a table of its own, as LeViT does, is no leaf either.
    for module in modules:
        for name, kept in vars(module).items():
            if type(kept) in (dict, list, tuple) and kept and name not in ("_modules", "_parameters", "_buffers"):
                leaves = kept.values() if isinstance(kept, dict) else kept
                held |= {id(each): each for each in leaves if isinstance(each, Tensor)}
    strided = [each for each in held.values() if type(each) in (Tensor, nn.Parameter) and each.layout == torch.strided]
    lookers = Counter(each.untyped_storage().data_ptr() for each in strided)
    for key, value in held.items():
        # Weights that are computed aren't leaves, which deepcopy refuses: in the copy they are tensors of their own.
        if key not in memo and (not value.is_leaf or _is_plain_tensor(value, lookers)):
            memo[key] = value.detach().clone()
    # Deepcopy takes its time for the tables of each module, most of them empty.
    plain = [module for module in modules if _is_copied_by_state(type(module))]
    memo |= {id(module): type(module).__new__(type(module)) for module in plain}
    for module in reversed(plain):
        given = {key: value for key, value in vars(module).items() if key != "_compiled_call_impl"}
        memo[id(module)].__setstate__({key: _copied(module, key, value, memo) for key, value in given.items()})
    try:
        copied = copy.deepcopy(model, memo)
    except _NOT_COPIED as error:
        if out_of_memory(error):
            raise
        raise ConfigError(f"a model must be one that copy.deepcopy copies, got: {error} (model)") from error
    _bind_functions(modules, memo)
    return copied


def evaluating(model: Any) -> Any:
    """Put a model into evaluation mode and return it, also where an ``eval`` or ``train`` of its own returns nothing.

    A ``train`` that keeps batch norms frozen often forgets to return the model.
    """
    model.eval()
    return model


def _bind_functions(modules: Sequence[nn.Module], memo: dict[int, Any]) -> None:
    """Let the functions that copies of modules hold compute with the copies.

    Deepcopy hands a function on as it is, so that ``self.act = lambda x: self.scale * x``, or a ``forward`` that calls
    the one before it, would go on computing with the original. ``memo`` has the copies by the ids of the originals.
    """
    own = {id(module) for module in modules}
    for module in modules:
        own |= {id(each) for each in (*module._parameters.values(), *module._buffers.values()) if each is not None}
    for module in modules:
        if id(module) not in memo:
            continue
        held = vars(memo[id(module)])
        for name, value in vars(module).items():
            if _is_plain(value) or (type(value) in _TABLES and not value):
                continue
            if name in ("_modules", "_parameters", "_buffers") or name not in held or not _holds_function(value):
                continue
            if name == "forward":
                _check_globals(value, own, type(module).__name__)
            if not _reaches(value, own, set()):
                continue
            bound = _bound(held[name], memo, {})
            if isinstance(bound, dict):  # a hook's handle holds the table itself
                held[name].update(bound)
            elif name == "forward" and getattr(bound, "__func__", None) is type(module).forward:
                del held[name]  # that of its class
            else:
                held[name] = bound


def _is_plain(value: Any) -> bool:
    """Tell whether a value is the same in every copy: a number, a text, or a tuple of such, as the size of a kernel."""
    return type(value) in _PLAIN or (type(value) is tuple and _PLAIN.issuperset(map(type, value)))


def _holds_function(value: Any) -> bool:
    """Tell at once of most attributes of a module that they hold no function."""
    return isinstance(value, (FunctionType, MethodType, functools.partial)) or (
        isinstance(value, (list, tuple, dict)) and len(value) > 0
    )


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


def _reaches(value: Any, own: set[int], seen: set[int]) -> bool:
    """Tell whether a value is or holds a function that holds a module or a tensor of a model, by their ids."""
    if id(value) in seen:
        return False
    seen.add(id(value))
    if isinstance(value, FunctionType):
        held = _held_by(value)
        return any(id(each) in own or id(getattr(each, "__self__", None)) in own for each in held) or any(
            _reaches(each, own, seen) for each in held
        )
    if isinstance(value, MethodType):
        return _reaches(value.__func__, own, seen)
    if isinstance(value, functools.partial):
        return any(_reaches(each, own, seen) for each in (value.func, value.args, value.keywords))
    if isinstance(value, dict):
        return any(_reaches(each, own, seen) for each in value.values())
    return isinstance(value, (list, tuple)) and any(_reaches(each, own, seen) for each in value)


def _held_by(function: FunctionType) -> list[Any]:
    """List what a function holds: in its closure, its defaults, and its attributes, such as ``__wrapped__``."""
    found: list[Any] = []
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # a variable that has no value yet
            found.append(cell.cell_contents)
    return [*found, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), *vars(function).values()]


def _bound(value: Any, memo: dict[int, Any], made: dict[int, Any]) -> Any:
    """Return a value with copies in the place of what they are copies of; nothing that it holds is changed.

    ``made`` has what is new, or being made, by the ids of what it stands for.
    """
    if isinstance(value, (nn.Module, Tensor)):
        return memo.get(id(value), value)
    if id(value) in made:
        return made[id(value)]
    if isinstance(value, MethodType):
        return MethodType(_bound(value.__func__, memo, made), memo.get(id(value.__self__), value.__self__))
    if isinstance(value, functools.partial):
        keywords = {key: _bound(each, memo, made) for key, each in value.keywords.items()}
        function = _bound(value.func, memo, made)
        return functools.partial(function, *(_bound(each, memo, made) for each in value.args), **keywords)
    if type(value) in (list, tuple):
        made[id(value)] = value  # where it holds itself
        found = [_bound(each, memo, made) for each in value]
        return value if all(map(is_, found, value)) else type(value)(found)
    if type(value) in (dict, OrderedDict):
        made[id(value)] = value
        entries = {key: _bound(each, memo, made) for key, each in value.items()}
        return value if all(map(is_, entries.values(), value.values())) else type(value)(entries)
    if not isinstance(value, FunctionType):
        return value
    if is_compiled_function(value):
        return _bound(value._torchdynamo_orig_callable, memo, made)  # type: ignore[attr-defined]
    # Its cells are filled once it is known: it may hold itself.
    cells = tuple(CellType() for _ in value.__closure__ or ())
    function = FunctionType(value.__code__, value.__globals__, value.__name__, None, cells or None)
    made[id(value)] = function
    for old, new in zip(value.__closure__ or (), cells, strict=True):
        with suppress(ValueError):
            new.cell_contents = _bound(old.cell_contents, memo, made)
    functools.update_wrapper(function, value, updated=())
    vars(function).clear()
    vars(function).update({name: _bound(each, memo, made) for name, each in vars(value).items()})
    function.__defaults__ = _bound(value.__defaults__, memo, made)
    function.__kwdefaults__ = _bound(value.__kwdefaults__, memo, made)
    return function


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


def _copied(module: nn.Module, key: str, value: Any, memo: dict[int, Any]) -> Any:
    """Copy an attribute of a module; what can't be copied is shared, unless it holds layers."""
    if _is_plain(value):
        return value
    # A hook's handle holds the tables of its module, empty ones too, and mustn't get others of its own.
    if id(value) in memo:
        return memo[id(value)]
    if type(value) in _TABLES and not value:
        memo[id(value)] = type(value)()
        return memo[id(value)]
    if key in ("_parameters", "_buffers", "_modules"):
        return type(value)((name, copy.deepcopy(each, memo)) for name, each in value.items())
    if type(value) is weakref.ref and id(value()) in memo:  # to a module: to its copy
        return weakref.ref(memo[id(value())])
    if isinstance(value, torch.Generator):  # of which deepcopy knows nothing
        memo[id(value)] = value.clone_state()
        return memo[id(value)]
    try:
        return copy.deepcopy(value, memo)
    except _NOT_COPIED as error:
        # A lock, an open file, or what holds one, such as a writer of logs: there is one for the model and its copies.
        if out_of_memory(error):
            raise
        if _holds_layers(value, set()):
            raise ConfigError(
                "an attribute that holds layers or tensors must be one that copy.deepcopy copies, got "
                f"{type(value).__name__}: {error} ({type(module).__name__}.{key})"
            ) from error
        memo[id(value)] = value
        return value


def _holds_layers(value: Any, seen: set[int]) -> bool:
    """Tell whether a module or a tensor is a value, or is in its entries or attributes."""
    if isinstance(value, (nn.Module, Tensor)):
        return True
    if id(value) in seen or isinstance(value, (str, bytes, type, FunctionType, ModuleType)):
        return False
    seen.add(id(value))
    held: list[Any] = [*getattr(value, "__dict__", {}).values()]
    if isinstance(value, (list, tuple, set)):
        held += value
    elif isinstance(value, Mapping):
        held += value.values()
    return any(_holds_layers(each, seen) for each in held)


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
    """Put others in place of a model's floating parameters, given by full name; one in several places stays one."""
    made = dict[int, tuple[Tensor, nn.Parameter]]()  # with the old one, so that no other gets its id
    for name, module in model.named_modules():
        for own, old in list(module._parameters.items()):
            if old is not None and old.is_floating_point():
                if id(old) not in made:
                    new = make(f"{name}.{own}".lstrip("."), old.detach())
                    made[id(old)] = old, nn.Parameter(new, requires_grad=False)
                put_attribute(module, own, made[id(old)][1])


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
    put_parameters(copied, lambda _, old: old.clone())  # `double` works in place
    copied.double()
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
