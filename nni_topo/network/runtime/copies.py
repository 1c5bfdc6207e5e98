"""Copies of models: public functions work on a copy of the user's model.

A model that can't be copied as it is (NNI has wrapped it, PyTorch spreads it over processes, it is timed as compiled)
is used itself; its modes, attributes, buffers and gradients are restored afterwards.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import io
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from operator import is_
from pickle import PicklingError
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any, ParamSpec, TypeVar

import torch
from nni.compression.base.compressor import Compressor
from nni.compression.base.wrapper import ModuleWrapper
from nni.compression.utils import Evaluator
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map_only

from nni_topo.context import context
from nni_topo.errors import ConfigError, out_of_memory
from nni_topo.network.runtime.memory import free_memory_of
from nni_topo.network.runtime.modules import (
    cast_tensor,
    has_compiled,
    is_compiled_function,
    is_compiled_module,
    is_plain,
    put_attribute,
)
from nni_topo.network.runtime.switches import one_call, package_settings, random_state_kept

_Given = ParamSpec("_Given")
_Made = TypeVar("_Made")

_SHARE = 0.25  # largest share of the free memory for a copy of a model's parameters
# Errors of copy.deepcopy for objects that it can't copy, such as pointers and queues between processes.
_NOT_COPIED = (TypeError, ValueError, RuntimeError, PicklingError)
# A model and its copies share these. In training under NNI a model holds methods of the pruner, and of the evaluator
# with its trainer and data.
_SHARED = (ModuleType, io.IOBase, type(threading.Lock()), type(threading.RLock()), Compressor, Evaluator)
_REGISTRIES = ("_parameters", "_buffers", "_modules")
_CONTAINERS = (list, tuple, set, frozenset, deque)
_CHANGING = frozenset({dict, OrderedDict, list, set})
_USUAL_CONTAINERS = _CHANGING | {tuple, frozenset}
_NEW: Any = copyreg.__newobj__  # type: ignore[attr-defined]
_ATOMS = frozenset({bool, int, float, complex, str, bytes, type(None), type, torch.dtype, torch.device})


def _refused_attribute(module: nn.Module, memo: Mapping[int, Any]) -> str:
    """Return the name of the attribute of a module that copy.deepcopy refuses; empty if it refuses the module alone.

    ``memo``: what stays as it is, among it all modules, because an attribute may hold the module itself.
    """
    registered: dict[str, Any] = {**module._parameters, **module._buffers}
    attributes: dict[str, Any] = {key: value for key, value in vars(module).items() if key not in _REGISTRIES}
    for name, value in (registered | attributes).items():
        try:
            copy.deepcopy(value, dict(memo))  # of its own: a refused object leaves half a copy in it
        except _NOT_COPIED:
            return name
    return ""


def detached_copy(model: nn.Module, *, light: bool = False, shared: Iterable[Tensor] = ()) -> Any:
    """Return a deep copy of a model; see `copied_together`."""
    return copied_together([model], light=light, shared=shared)[0]


def copied_together(models: Sequence[nn.Module], *, light: bool = False, shared: Iterable[Tensor] = ()) -> list[Any]:
    """Return deep copies of models, as copy.deepcopy makes them; what the models share, the copies share.

    A weight that was computed with gradients, as in a masked model in training, is detached in the copy. A function
    that holds a module or a tensor of a model, such as a hook, or the ``forward`` and ``to`` that accelerate sets on a
    model, holds the copy's. Compiled parts are copied uncompiled. Locks, files, Python's modules and the tensors
    ``shared`` aren't copied.

    ``light``: the copies' parameters use the memory of the models' parameters, so they mustn't be written to.

    ConfigError if copy.deepcopy can't copy a model, a copy holds a module or a tensor of the model, or a module holds a
    weak reference to another.
    """
    modules = {module: name for model in models for name, module in model.named_modules()}
    memo: dict[int, Any] = {id(tensor): tensor for tensor in shared}
    own_ids = set[int]()
    for module in modules:
        tensors = [tensor for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None]
        own_ids.update(id(part) for part in (module, *tensors) if id(part) not in memo)
    if light:
        for model in models:
            for parameter in model.parameters():
                memo.setdefault(id(parameter), _same_memory(parameter))

    def is_own(value: Any) -> bool:
        return any(id(part) in own_ids for part in _reached([value]))

    functions: list[tuple[FunctionType, list[str]]] = []
    cells: dict[int, tuple[CellType, CellType]] = {}  # with the old cell, so that its id isn't used again
    for value in _reached(map(vars, modules)):
        if type(value) in _USUAL_CONTAINERS:
            continue
        if issubclass(type(value), Tensor):  # isinstance is true for a tensor's proxy, too
            if not value.is_leaf:  # deepcopy refuses it
                memo.setdefault(id(value), value.detach().clone())
        elif isinstance(value, weakref.ReferenceType) and isinstance(value(), nn.Module) and id(value()) in own_ids:
            raise ConfigError(
                "a model must hold its modules directly, because a copy can't follow weak references, got one; hold "
                f"the module in a tuple, which doesn't register it ({type(value()).__name__})"
            )
        elif isinstance(value, _SHARED):
            memo[id(value)] = value
        elif type(value) is FunctionType and not is_compiled_function(value):
            # deepcopy doesn't copy functions: `memo` gets a copy of each that holds a module or tensor of a model. A
            # script or a notebook may set a forward that calls the old one by a global name.
            namespace = value.__globals__
            names = [
                name for name in value.__code__.co_names if isinstance(namespace.get(name), (nn.Module, MethodType))
            ]
            names = [name for name in names if is_own(namespace[name])]
            if names or is_own(value):
                closure = tuple(cells.setdefault(id(cell), (cell, CellType()))[1] for cell in value.__closure__ or ())
                namespace = {**namespace} if names else namespace
                memo[id(value)] = FunctionType(value.__code__, namespace, value.__name__, None, closure or None)
                functions.append((value, names))

    uncopied = {**memo, **{id(module): module for module in modules}}
    for module, name in reversed(modules.items()):  # inner modules first, so that an error names the right one
        try:
            _copy_into(memo, module)
        except _NOT_COPIED as error:
            if out_of_memory(error):
                raise
            attribute = _refused_attribute(module, uncopied)
            place = ".".join(part for part in (name, attribute) if part) or type(module).__name__
            raise ConfigError(f"copy.deepcopy must be able to copy a model, got: {error} ({place})") from error
    copies = [memo[id(model)] for model in models]
    for model_copy in copies:
        _check_own(model_copy, own_ids, light)
    for module in modules:
        # A module that torch.compile returned makes its own forward.
        if not is_compiled_module(module) and is_compiled_function(forward := vars(module).get("forward")):
            vars(memo[id(module)])["forward"] = copy.deepcopy(forward._torchdynamo_orig_callable, memo)

    def copied(value: Any) -> Any:
        if is_own(value):
            return copy.deepcopy(value, memo)
        return value

    for function, names in functions:
        new = memo[id(function)]
        vars(new).update({name: copied(value) for name, value in vars(function).items()})
        for name in names:
            new.__globals__[name] = copied(function.__globals__[name])
        if function.__defaults__ is not None:
            new.__defaults__ = tuple(map(copied, function.__defaults__))
        if function.__kwdefaults__ is not None:
            new.__kwdefaults__ = {name: copied(value) for name, value in function.__kwdefaults__.items()}
    for cell, filled in cells.values():
        with suppress(ValueError):  # a variable that has no value yet
            filled.cell_contents = copied(cell.cell_contents)
    return copies


def _copy_into(memo: dict[int, Any], module: nn.Module) -> None:
    """Copy a module as `copy.deepcopy` does, but quickly: it mostly holds empty dicts, and modules in ``memo``."""
    kind = type(module)
    if id(module) in memo:
        return
    reduced: Any = ()
    if getattr(module, "__deepcopy__", None) is None and kind not in copyreg.dispatch_table:
        reduced = module.__reduce_ex__(4)
    # how objects are made anew whose classes say nothing else: a function, its arguments, attributes
    if reduced[:2] != (_NEW, (kind,)) or type(reduced[2]) is not dict or any(reduced[3:]):
        copy.deepcopy(module, memo)
        return
    attributes = reduced[2]
    memo.setdefault(id(memo), []).append(attributes)  # so that no other object gets an id that `memo` has
    memo[id(module)] = copied = _NEW(kind)
    copied.__setstate__(_copied_entries(attributes, memo))


def _copied_entries(table: dict[Any, Any], memo: dict[Any, Any]) -> dict[Any, Any]:
    entries = dict[Any, Any]()
    for key, value in table.items():
        kind = type(value)
        if kind in _ATOMS:
            new = value
        elif id(value) in memo:
            new = memo[id(value)]
        elif kind in _CHANGING and not value:
            memo[id(value)] = new = kind()
        elif kind is tuple and _ATOMS.issuperset(map(type, value)):
            new = value
        elif kind is Tensor:
            new = _copied_tensor(value, memo)
        elif kind is dict:
            memo[id(value)] = new = {}
            new.update(_copied_entries(value, memo))
        else:
            new = copy.deepcopy(value, memo)
        if type(key) not in _ATOMS:
            key = copy.deepcopy(key, memo)
        entries[key] = new
    return entries


def _copied_tensor(tensor: Tensor, memo: dict[Any, Any]) -> Tensor:
    """Copy a tensor as `copy.deepcopy` does, but a usual buffer, which shares its memory with no other, quickly."""
    is_simple = tensor.layout == torch.strided and tensor.device.type in ("cpu", "cuda") and not tensor.requires_grad
    if not is_simple or tensor.is_quantized or tensor.is_complex() or not tensor.is_contiguous() or vars(tensor):
        copied: Tensor = copy.deepcopy(tensor, memo)
        return copied
    memory, memories = tensor.untyped_storage(), memo.setdefault("torch", {})  # where deepcopy notes copied memory
    if memory._cdata in memories or memory.nbytes() != tensor.nbytes:
        copied = copy.deepcopy(tensor, memo)
        return copied
    memo[id(tensor)] = copied = tensor.clone()
    memories[memory._cdata] = copied.untyped_storage()
    return copied


def _check_own(copied: nn.Module, own_ids: set[int], light: bool) -> None:
    """Raise ConfigError if a copy holds a module or tensor of the model, because of a class's ``__deepcopy__``."""
    for name, module in copied.named_modules():
        tensors = list(module._buffers.values())
        if not light:
            tensors += module._parameters.values()
        if id(module) in own_ids or any(id(tensor) in own_ids for tensor in tensors):
            raise ConfigError(
                "a copy of a model must have modules, buffers and parameters of its own, got one of the model's; check "
                f"__deepcopy__ of its class ({name or type(module).__name__})"
            )


def unwrapped_copy(model: nn.Module, *, light: bool = False) -> nn.Module:
    """Return a copy of a model without NNI's wrappers and masks, and without what `nni_topo.masked_model` changed."""
    copied: nn.Module = detached_copy(model, light=light)
    for module in list(copied.modules()):
        wrapper = getattr(module, "_nni_wrapper", None)
        if wrapper is not None:
            wrapper.unwrap()
        if {"whole", "kept", "kept_dim"} <= vars(module).keys():
            module.__class__ = vars(module)["whole"]
            del module.whole, module.kept, module.kept_dim, module.gives_none
        for key, hook in list(module._forward_pre_hooks.items()):
            if getattr(hook, "undone_by_copying", False):
                del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]
    return copied


def _same_memory(parameter: nn.Parameter) -> nn.Parameter:
    """Return another parameter in the same memory, with its own gradient; a parameter of a subclass itself."""
    if type(parameter) is not nn.Parameter or is_lazy(parameter) or parameter.is_inference():
        return parameter
    alias = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
    vars(alias).update(vars(parameter))
    return alias


def _reached(values: Iterable[Any]) -> Iterator[Any]:
    """Yield values, and all that their containers, functions, methods and partials hold; modules aren't opened."""
    waiting, seen = list(values), set[int]()
    while waiting:
        value = waiting.pop()
        kind = type(value)
        if kind in _ATOMS or (kind in _CHANGING and not value) or id(value) in seen:
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


def leaves_models_alone(function: Callable[_Given, _Made], *, as_compiled: bool = False) -> Callable[_Given, _Made]:
    """Let a public function work on copies of all models among its arguments, in lists and mappings too.

    Models are copied once, at the outermost call. Models that aren't copied are restored afterwards
    (`left_alone`): models that NNI has wrapped, that PyTorch spreads over processes, and compiled ones if
    ``as_compiled``, because a copy isn't compiled.
    """

    @functools.wraps(function)
    def run(*args: _Given.args, **kwargs: _Given.kwargs) -> _Made:
        models = list(dict.fromkeys(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, nn.Module)))
        copied = list[nn.Module]()
        if not context().is_running:
            for model in models:
                is_wrapped = any("_nni_wrapper" in module._modules for module in model.modules())
                if is_plain(model) and not is_wrapped and not (as_compiled and has_compiled(model)):
                    copied.append(model)
        uncopied = [model for model in models if model not in copied]
        with left_alone(*uncopied, as_compiled=as_compiled), _copies(copied) as copies:
            if not copied:
                return function(*args, **kwargs)
            positional: Any = [_with_copies(argument, copies) for argument in args]
            named: Any = {name: _with_copies(argument, copies) for name, argument in kwargs.items()}
            return function(*positional, **named)

    return run


def _with_copies(argument: Any, copies: Mapping[nn.Module, nn.Module]) -> Any:
    """Return an argument with copies in place of models; one without models is returned unchanged."""
    if not any(isinstance(leaf, nn.Module) for leaf in tree_leaves(argument)):
        return argument
    return tree_map_only(nn.Module, lambda model: copies.get(model, model), argument)


def has_room_for(models: list[nn.Module]) -> bool:
    """Tell whether the parameters of models take at most a quarter of the free memory."""
    needed: dict[torch.device, int] = {}
    for parameter in nn.ModuleList(models).parameters():
        if not is_lazy(parameter) and not parameter.is_meta:
            needed[parameter.device] = needed.get(parameter.device, 0) + parameter.nbytes
    return all(count <= _SHARE * free_memory_of(device) for device, count in needed.items())


@contextmanager
def _copies(models: list[nn.Module]) -> Iterator[dict[nn.Module, nn.Module]]:
    """Copy models for a block; copies get their own weights if there is room for them."""
    copies = copied_together(models, light=not has_room_for(models))
    for copied in copies:
        for parameter in copied.parameters():
            parameter.grad = None  # so that no gradient is added to the user's
    with _compiler_off(copies):
        yield dict(zip(models, copies, strict=True))


def _compiler_off(models: Iterable[nn.Module]) -> AbstractContextManager[object]:
    """Run compiled parts of models uncompiled."""
    return torch.compiler.set_stance("force_eager") if any(map(has_compiled, models)) else nullcontext()


@contextmanager
def left_alone(*models: Any, as_compiled: bool = False) -> Iterator[None]:
    """Restore the state of models and of all global random generators after the block, also after an error.

    The state of a model: modes, attributes, gradients, tensors' memory and values of buffers; a pruner's wrappers stay.
    Unless ``as_compiled``, compiled parts run uncompiled, because compiled code calls no hooks and shows no operations,
    and a caller's ``torch.autocast`` is off.
    """
    networks = [model for model in models if isinstance(model, nn.Module)]
    compiler = _compiler_off([] if as_compiled else networks)
    with one_call(), package_settings(as_compiled), compiler, random_state_kept():
        modules = list(dict.fromkeys(module for model in networks for module in model.modules()))
        modes = [(module, module.training) for module in modules]
        tensors, buffers = dict[int, Tensor](), list[Tensor]()
        for module in modules:
            own_buffers = [buffer for buffer in module._buffers.values() if buffer is not None]
            parameters = [parameter for parameter in module._parameters.values() if parameter is not None]
            tensors.update((id(tensor), tensor) for tensor in (*parameters, *own_buffers) if tensor.is_leaf)
            if not isinstance(module, ModuleWrapper):  # the masks of NNI's wrappers are buffers, and change
                buffers += own_buffers
        memories = [(tensor, tensor.detach()) for tensor in tensors.values() if _is_usual(tensor)]
        values = [(buffer, buffer.detach().clone()) for buffer in buffers if _is_usual(buffer)]
        gradients = [(tensor, tensor.grad, tensor.requires_grad) for tensor in tensors.values()]
        put_attributes_back = _note_attributes(modules)
        try:
            for tensor in tensors.values():
                tensor.grad = None  # so that nothing is added to it
            yield
        finally:
            put_attributes_back()
            _put_modes(modes)
            for tensor, memory in memories:  # a forward may set `data`, also to another size
                if tensor.dtype is not memory.dtype or not tensor.is_set_to(memory):
                    tensor.data = memory
            for buffer, value in values:
                if not torch.equal(buffer, value):
                    with torch.inference_mode(buffer.is_inference()):
                        buffer.data.copy_(value)
            for tensor, gradient, needs in gradients:
                if tensor.requires_grad != needs:
                    tensor.requires_grad_(needs)
                tensor.grad = gradient


def _is_usual(tensor: Tensor) -> bool:
    """Tell whether a tensor has plain memory, which can be compared and restored."""
    is_plain_kind = type(tensor) in (Tensor, nn.Parameter, nn.Buffer) and tensor.layout == torch.strided
    return is_plain_kind and not is_lazy(tensor) and not tensor.is_meta


def _note_attributes(modules: Iterable[nn.Module]) -> Callable[[], None]:
    """Record attributes of modules, and dicts, lists and sets in them; return a function that restores them."""
    plain = [module for module in modules if not isinstance(module, (torch.jit.ScriptModule, ModuleWrapper))]
    attributes = [(module, value) for module in plain for value in (vars(module), *vars(module).values())]
    before = [
        (module, container, container.copy() if container else ())
        for module, container in attributes
        if type(container) in _CHANGING
    ]

    def put_back() -> None:
        for module, container, entries in before:
            # NNI changes these dicts when it wraps a module.
            if (entries or container) and "_nni_wrapper" not in module._modules:
                container.clear()
                if isinstance(container, list):
                    container.extend(entries)
                else:
                    container.update(entries)

    return put_back


@contextmanager
def attributes_put_back(model: nn.Module) -> Iterator[None]:
    """Restore the attributes of modules after the block, and dicts, lists and sets in them; values aren't restored."""
    put_back = _note_attributes(model.modules())
    try:
        yield
    finally:
        put_back()


@contextmanager
def evaluation_mode(*models: nn.Module) -> Iterator[None]:
    """Put models into evaluation mode within the block, and restore the mode of every module afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    are_training = [model for model in models if model.training]
    if any(was_training for _, was_training in modes):
        for model in models:
            _switch(model, False)
    try:
        yield
    finally:
        for model in are_training:
            _switch(model, True)  # a class's own train undoes what its eval has done
        _put_modes(modes)


def evaluating(model: Any) -> Any:
    """Put a model into evaluation mode and return it, even if its own ``eval`` returns nothing."""
    _switch(model, False)
    return model


def training(model: Any) -> Any:
    """Put a model into training mode and return it."""
    _switch(model, True)
    return model


def forget_evaluated(model: nn.Module) -> None:
    """Clear values that modules cache in evaluation mode, such as LeViT's biases, by a switch to training mode."""
    modules = list(model.modules())
    if all(map(_sets_modes_alone, modules)) and not any(map(_notes_mode, set(map(type, modules)))):
        return  # their modes clear nothing
    modes = [(module, module.training) for module in modules]
    _switch(model, True)
    _switch(model, False)
    _put_modes(modes)


def put_modes_of(model: nn.Module, dense: nn.Module) -> None:
    """Put a smaller network, which is in evaluation mode, and its modules into the modes of the given model."""
    modules = dict(dense.named_modules(remove_duplicate=False))
    if model.training:
        _switch(dense, True)
    _put_modes([(modules[name], module.training) for name, module in model.named_modules() if name in modules])


def _switch(model: nn.Module, mode: bool) -> None:
    """Put a model into a mode by its own ``train`` or ``eval``, which may freeze batch norms or fill a cache.

    If the method changes weights, as when it merges adapters, or raises an error, all but the mode is restored.
    """
    if all(module.training == mode for module in model.modules()):
        return
    method = model.train if mode else model.eval
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    if all(map(_sets_modes_alone, modules)):
        method()
        return
    weights = _weights(model)
    values = [tensor.detach().clone() for tensor in weights]
    put_attributes_back = _note_attributes(modules)
    try:
        method()
        now = _weights(model)
        is_same = len(now) == len(weights) and all(map(is_, now, weights)) and all(map(torch.equal, now, values))
    except Exception:  # a user's method may raise anything
        is_same = False
    if not is_same:
        put_attributes_back()
        for tensor, value in zip(weights, values, strict=True):
            tensor.data.copy_(value)
        _put_modes((module, mode) for module in model.modules())


def _sets_modes_alone(module: nn.Module) -> bool:
    """Tell whether the ``train`` and ``eval`` of a module are those of `torch.nn.Module` or of Transformers."""
    # Transformers' call PyTorch's, unless the model is set to use other kernels.
    for method in (type(module).train, type(module).eval):
        # `__module__` of a decorated method may be wrong
        home = getattr(method, "__globals__", {}).get("__name__")
        if home not in ("torch.nn.modules.module", "transformers.modeling_utils"):
            return False
    return not getattr(module, "use_kernels", False)


def _notes_mode(kind: type[nn.Module]) -> bool:
    """Tell whether a class has code of its own that runs when a mode is set."""
    has_property = any("training" in vars(base) for base in kind.__mro__ if base is not nn.Module)
    return has_property or kind.__setattr__ is not nn.Module.__setattr__


def _weights(model: nn.Module) -> list[Tensor]:
    """List the parameters and persistent buffers of a model that have values."""
    tensors: list[Tensor] = [*model.parameters()]
    for module in model.modules():
        passing = module._non_persistent_buffers_set
        tensors += [buffer for name, buffer in module._buffers.items() if buffer is not None and name not in passing]
    return [tensor for tensor in tensors if not is_lazy(tensor) and not tensor.is_meta]


def _put_modes(modes: Iterable[tuple[nn.Module, bool]]) -> None:
    """Set modes one by one, without the modules' own methods."""
    for module, mode in modes:
        if module.training != mode:
            module.training = mode


@contextmanager
def lent_copy(model: nn.Module) -> Iterator[nn.Module]:
    """Yield a copy of a network for a user's function, which may train it; the random states are restored."""
    with random_state_kept(), _copies([model]) as copies:
        yield copies[model]


def put_parameters(model: nn.Module, make: Callable[[Tensor], Tensor]) -> None:
    """Replace a model's real and complex parameters; shared ones stay shared."""
    replacements = dict[int, tuple[Tensor, nn.Parameter]]()  # with the old one, so that its id isn't used again
    for module in model.modules():
        for name, old in list(module._parameters.items()):
            if old is not None and (old.is_floating_point() or old.is_complex()):
                if id(old) not in replacements:
                    replacements[id(old)] = old, nn.Parameter(make(old.detach()), requires_grad=False)
                put_attribute(module, name, replacements[id(old)][1])


def to_precision(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast the floats and complex numbers of a model to single or double precision, in place."""
    model._apply(functools.partial(cast_tensor, dtype=dtype))
    return model


def in_double(model: nn.Module) -> nn.Module:
    """Return a copy that computes in double precision; it shares large weights and casts them as it reads them."""
    copied: nn.Module = detached_copy(model, light=True)
    as_read: list[tuple[nn.Module, nn.Parameter]] = []
    for module in copied.modules():
        weight = module._parameters.get("weight")
        is_usual = isinstance(module, _READ_BY_FORWARD) and type(module)._apply is nn.Module._apply
        if is_usual and weight is not None and weight.is_floating_point():
            as_read.append((module, weight))
            del module._parameters["weight"]
    put_parameters(copied, torch.clone)  # casting works in place
    to_precision(copied, torch.float64)
    for module, weight in as_read:
        module._parameters["weight"] = weight
        kind = type(module)
        if kind not in _DOUBLING:
            members = {"weight": property(_weight_in_double), "__module__": kind.__module__}
            _DOUBLING[kind] = type(kind.__name__, (kind,), members)
        module.__class__ = _DOUBLING[kind]
    return copied


_READ_BY_FORWARD = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding)
_DOUBLING: dict[type[nn.Module], type[nn.Module]] = {}


def _weight_in_double(module: nn.Module) -> Tensor:
    weight = module._parameters["weight"]
    assert weight is not None  # a layer without weight keeps its class
    return weight.double()
