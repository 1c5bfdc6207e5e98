"""Copies of models, and where they lie."""

from __future__ import annotations

import copy
import functools
import io
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from pickle import PicklingError
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from nni.compression.base.compressor import Compressor
from nni.compression.utils import Evaluator
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from nni_topo.errors import ConfigError
from nni_topo.network.runtime.memory import out_of_memory

# What copy.deepcopy raises of what it can't copy: of pointers, of queues between processes.
_NOT_COPIED = (TypeError, ValueError, RuntimeError, PicklingError)
# One for a model and its copies. In training under NNI a model holds methods of the pruner, and of the evaluator with
# its trainer and data.
_SHARED = (ModuleType, io.IOBase, type(threading.Lock()), type(threading.RLock()), Compressor, Evaluator)
_CONTAINERS = (list, tuple, set, frozenset, deque)
_ATOMS = frozenset({bool, int, float, complex, str, bytes, type(None), type, torch.dtype, torch.device})


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter; of a model without any, the CPU."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def is_transformed(tensor: Tensor) -> bool:
    """Tell whether a tensor belongs to a transformation under way, as ``torch.vmap`` and ``torch.func.grad`` make them.

    It stands for all samples of another tensor, say, and can't be used after the transformation.
    """
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def detached_copy(model: nn.Module, *, light: bool = False, shared: Iterable[Tensor] = ()) -> Any:
    """Return a deep copy of a model; see `copied_together`."""
    return copied_together([model], light=light, shared=shared)[0]


def copied_together(models: Sequence[nn.Module], *, light: bool = False, shared: Iterable[Tensor] = ()) -> list[Any]:
    """Return deep copies of models, as copy.deepcopy makes them, that share with each other what the models share.

    Weights that are computed with gradients, as those of a masked model in training are, become tensors of the copy's
    own. A function that holds a module or a tensor of a model, such as a forward that replaces its class's, or a hook,
    holds the copy's. What ``torch.compile`` has compiled is as it was written. Locks, files and Python's modules are
    shared.

    Parameters
    ----------
    models : sequence of torch.nn.Module
        The models.
    light : bool, default=False
        Whether the copies' parameters use the memory of the models' own, which mustn't be written to then.
    shared : iterable of Tensor, default=()
        Tensors that the copies hold themselves.

    Raises
    ------
    ConfigError
        If copy.deepcopy can't copy a model, or a copy would hold what is the model's.
    """
    modules = [module for model in models for module in model.modules()]
    memo: dict[int, Any] = {id(tensor): tensor for tensor in shared}
    shared_ids = set(memo)
    own = set[int]()
    for module in modules:
        held = (module, *module.parameters(recurse=False), *module.buffers(recurse=False))
        own.update(id(each) for each in held)
        # deepcopy is slow at an OrderedDict, and every module has many empty ones for its hooks.
        memo.update(
            (id(value), OrderedDict()) for value in vars(module).values() if type(value) is OrderedDict and not value
        )
    if light:
        for model in models:
            for parameter in model.parameters():
                memo.setdefault(id(parameter), _same_memory(parameter))
    functions = _Functions(own, memo)
    for value in _reached([vars(module) for module in modules]):
        if issubclass(type(value), Tensor):  # a proxy of one says that it is one, too
            if is_transformed(value):  # it has no memory and serves nobody after the transformation
                memo.setdefault(id(value), value)
            elif not value.is_leaf:  # deepcopy refuses it
                memo.setdefault(id(value), value.detach().clone())
        elif isinstance(value, _SHARED):
            memo[id(value)] = value
        elif type(value) is FunctionType and not is_compiled_function(value):
            functions.add(value)
    try:
        copied: list[Any] = copy.deepcopy(list(models), memo)
        functions.fill()
    except _NOT_COPIED as error:
        if out_of_memory(error):
            raise
        raise ConfigError(
            f"a model must be one that copy.deepcopy copies, got: {error} ({_not_copied(models, memo)})"
        ) from error
    for module in modules:
        forward: Any = vars(module).get("forward")
        if is_compiled_function(forward) and not is_compiled_module(module):  # which compiles what it holds
            memo[id(module)].forward = copy.deepcopy(forward._torchdynamo_orig_callable, memo)
    _check_independent(copied, own - shared_ids)
    return copied


def _same_memory(parameter: nn.Parameter) -> nn.Parameter:
    """Return another parameter in the same memory, with a gradient of its own; one of another class is returned."""
    if type(parameter) is not nn.Parameter or is_lazy(parameter) or parameter.is_inference():
        return parameter
    other = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
    vars(other).update(vars(parameter))
    return other


def _reached(values: Iterable[Any]) -> Iterator[Any]:
    """Go over values and what they hold: containers, functions, bound methods and partials; modules end a path."""
    waiting, seen = list(values), set[int]()
    while waiting:
        value = waiting.pop()
        kind = type(value)
        if kind in _ATOMS or id(value) in seen:
            continue
        seen.add(id(value))
        yield value
        if issubclass(kind, dict):
            waiting += value.values()
        elif issubclass(kind, _CONTAINERS):
            waiting += value
        elif kind is MethodType:
            waiting += (value.__func__, value.__self__)
        elif issubclass(kind, functools.partial):
            waiting += (value.func, *value.args, *value.keywords.values())
        elif kind is FunctionType and not is_compiled_function(value):
            waiting += (*map(_content, value.__closure__ or ()), *(value.__defaults__ or ()), vars(value))
            waiting += (value.__kwdefaults__ or {}).values()


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a variable that has no value yet
        return None


class _Functions:
    """Functions that hold what is a model's: deepcopy, which hands functions on as they are, finds copies of these.

    A copy holds the copies of what is the model's, and what else the function holds.
    """

    def __init__(self, own: set[int], memo: dict[int, Any]) -> None:
        self._own, self._memo = own, memo
        self._made: list[tuple[FunctionType, FunctionType]] = []
        self._cells: dict[int, tuple[CellType, CellType]] = {}  # with the old one, so that no other gets its id

    def add(self, function: FunctionType) -> None:
        """Make a copy of a function if it needs one; what it holds comes later."""
        if not self._is_own(function):
            return
        cells = [self._cells.setdefault(id(cell), (cell, CellType()))[1] for cell in function.__closure__ or ()]
        copied = FunctionType(function.__code__, function.__globals__, function.__name__, None, tuple(cells) or None)
        self._made.append((function, copied))
        self._memo[id(function)] = copied

    def fill(self) -> None:
        """Let the copies hold what they should."""
        for function, copied in self._made:
            functools.update_wrapper(copied, function, updated=())
            vars(copied).clear()
            vars(copied).update({name: self._copy(value) for name, value in vars(function).items()})
            if function.__defaults__ is not None:
                copied.__defaults__ = tuple(map(self._copy, function.__defaults__))
            if function.__kwdefaults__ is not None:
                copied.__kwdefaults__ = {name: self._copy(value) for name, value in function.__kwdefaults__.items()}
        for cell, new in self._cells.values():
            with suppress(ValueError):  # a variable that has no value yet
                new.cell_contents = self._copy(cell.cell_contents)

    def _is_own(self, value: Any) -> bool:
        return any(id(each) in self._own for each in _reached([value]))

    def _copy(self, value: Any) -> Any:
        return copy.deepcopy(value, self._memo) if self._is_own(value) else value


def _not_copied(models: Iterable[nn.Module], memo: dict[int, Any]) -> str:
    """Name the attribute that copy.deepcopy can't copy."""
    for model in models:
        for name, module in model.named_modules():
            for attribute, value in vars(module).items():
                if attribute not in ("_modules", "_parameters", "_buffers"):
                    try:
                        copy.deepcopy(value, dict(memo))
                    except _NOT_COPIED:
                        return f"{name}.{attribute}".lstrip(".")
    return "model"


def _check_independent(copied: Iterable[nn.Module], own: set[int]) -> None:
    """Raise ConfigError for a copy that holds what is the model's, itself or by a weak reference."""
    for model in copied:
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            for attribute, value in vars(module).items():
                place = f"{name}.{attribute}".lstrip(".")
                for each in (value, *value.values()) if isinstance(value, dict) else (value,):
                    if isinstance(each, weakref.ReferenceType) and id(each()) in own:
                        raise ConfigError(
                            "a model must hold its modules by themselves, for a copy of it has its own, got a weak "
                            f"reference to one ({place}); hold the module in a tuple, which doesn't register it"
                        )
                    if id(each) in own and not isinstance(each, nn.Parameter):
                        raise ConfigError(
                            "a copy of a model must have modules and buffers of its own, got one that is the model's, "
                            f"by the __deepcopy__ of a class ({place})"
                        )


def is_compiled_module(module: nn.Module) -> bool:
    """Tell whether a module is what ``torch.compile`` made of another one."""
    return type(module).__name__ == "OptimizedModule"  # by its name, for importing the class takes long


def is_compiled_function(value: Any) -> bool:
    """Tell whether a function is what ``torch.compile`` made of another one."""
    return hasattr(value, "_torchdynamo_orig_callable") and not getattr(value, "_torchdynamo_disable", False)


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
