"""Inputs of models, in any container of tensors, and calls with them."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from nni_topo.errors import ConfigError, DataError, NniTopoError, SpeedupError, out_of_memory, raised, shown
from nni_topo.network.runtime.modules import cast_tensor, device_of

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a model."""

MODEL_ERRORS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)
"""Errors of a model that doesn't run on its inputs."""

_IMAGE_CHANNELS = (1, 3)
_WITHOUT_TENSORS = frozenset({bool, int, float, str, type(None)})

PADDING = {"attention_mask": True, "key_padding_mask": False, "src_key_padding_mask": False}
"""Names of padding masks; True if their nonzero positions are real, False if these are padding."""


def arguments_of(example_inputs: Any, model: torch.nn.Module | None = None) -> Call:
    """Split inputs, batch first, into positional and keyword arguments.

    A mapping may be the only argument itself, and so may several tensors, as in ``x, lengths = inputs``.
    """
    call: Call
    if isinstance(example_inputs, Mapping):
        named = dict(example_inputs)
        call = ((named,), {}) if model is not None and is_argument(named, model) else ((), named)
    elif isinstance(example_inputs, (tuple, list)):
        is_one = model is not None and len(example_inputs) > 1 and takes_one_argument(model)
        call = (tuple(example_inputs), {})
        if is_one and share_samples(example_inputs):
            call = ((example_inputs,), {})
    else:
        call = ((example_inputs,), {})
    if not tensors_of(call):
        raise ConfigError(
            "example_inputs must be a tensor, a tuple of arguments or a dict of keyword arguments "
            f"with a tensor in it, got {shown(example_inputs)}"
        )
    return call


def is_argument(mapping: Mapping[Any, Any], model: torch.nn.Module) -> bool:
    """Tell whether a mapping must be the single argument of a model, as in ``forward(self, batch)``."""
    parameters = _parameters_of(model)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return False
    if any(parameter.name in mapping and parameter.kind is not parameter.POSITIONAL_ONLY for parameter in parameters):
        return False
    required = [
        parameter
        for parameter in parameters
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_POSITIONAL
    ]
    return len(required) == 1 and required[0].kind is not required[0].KEYWORD_ONLY


def takes_one_argument(model: torch.nn.Module) -> bool:
    """Tell whether a model's forward takes one positional argument, and no more."""
    parameters = _parameters_of(model)
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    has_more = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)
    return not has_more and sum(parameter.kind in by_position for parameter in parameters) == 1


def share_samples(value: Any) -> bool:
    """Tell whether a tuple or list holds tensors of the same samples, as in ``(x, lengths)``, not one for each sample.

    The first dimensions of tensors of the same samples are equal. Those of images, as detectors take them, are too, but
    images have three dimensions, and few channels first. In a list the tensors must differ in type or number of
    dimensions, which samples don't, such as recordings of equal length.
    """
    tensors = tensors_of(value)
    if not isinstance(value, (tuple, list)) or not tensors or not all(tensor.dim() for tensor in tensors):
        return False
    if len({len(tensor) for tensor in tensors}) > 1:
        return False
    if len({(tensor.dim(), tensor.dtype) for tensor in tensors}) > 1:
        return True
    first = tensors[0]
    are_images = first.dim() == 3 and len(first) in _IMAGE_CHANNELS
    return isinstance(value, tuple) and not are_images


def required_arguments(model: torch.nn.Module) -> int:
    """Return the number of positional arguments that a model's forward requires."""
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(
        parameter.kind in by_position and parameter.default is parameter.empty for parameter in _parameters_of(model)
    )


def _parameters_of(model: torch.nn.Module) -> list[inspect.Parameter]:
    """List the parameters of a model's forward (of `model_within`); none if it isn't written in Python."""
    try:
        return list(inspect.signature(model_within(model).forward).parameters.values())
    except (AttributeError, TypeError, ValueError):
        return []


def model_within(model: torch.nn.Module) -> torch.nn.Module:
    """Return the inner model of a compiled model, or of one spread over devices; any other model itself."""
    within = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}
    inner = getattr(model, within.get(type(model).__name__, ""), None)
    if isinstance(inner, nn.Module):
        return model_within(inner)
    return model


def on_device(tree: Any, device: torch.device, *, copy: bool = False) -> Any:
    """Move or copy the tensors of nested containers to a device, without their gradients."""

    def move(tensor: Tensor) -> Tensor:
        if tensor.is_meta and device.type != "meta":
            raise DataError("inputs of a model must be tensors with values, got one on the meta device (inputs)")
        return tensor.detach().to(device, copy=copy)

    return tree_map_only(Tensor, move, tree)


def copied_for(model: nn.Module, call: Call) -> Call:
    """Copy a call to a model's device, and cast its floats to the type of the parameters if all have one type."""
    call = on_device(call, device_of(model), copy=True)
    types = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    computed = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
    if len(types) == 1 and types <= computed:
        return cast_floats(call, types.pop())
    return call


def bind_arguments(model: torch.nn.Module, call: Call) -> dict[str, Any]:
    """Return a call's arguments by name, also of ``**kwargs``, without defaults; ConfigError if they don't fit."""
    try:
        signature = inspect.signature(model.forward)
        bound = signature.bind(*call[0], **call[1])
    except TypeError as error:
        raise ConfigError(f"example_inputs must fit {type(model).__name__}.forward: {error}") from error
    named = dict(bound.arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            named |= named.pop(parameter.name, {})
    return named


def call_by_name(model: torch.nn.Module, named: Mapping[str, Any]) -> Call:
    """Undo `bind_arguments`: pass ``x, /``, ``*inputs`` and arguments before them by position, others by name."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    alone = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)
    places = [
        place for place, parameter in enumerate(parameters, 1) if parameter.kind in alone and parameter.name in named
    ]
    args: list[Any] = []
    kwargs = dict(named)
    for parameter in parameters[: max(places, default=0)]:
        value = kwargs.pop(parameter.name, parameter.default)
        args += value if parameter.kind is parameter.VAR_POSITIONAL else [value]
    return tuple(args), kwargs


def real_positions_of(model: torch.nn.Module, call: Call) -> Tensor | None:
    """Return which positions of a call aren't padding: bool, (samples, places); None if the call has no mask."""
    try:
        return real_positions(bind_arguments(model, call))
    except ConfigError:  # the model itself raises an error that says more
        return None


def real_positions(named: Mapping[str, Any]) -> Tensor | None:
    """Return which positions aren't padding: bool, (samples, places); None if no argument masks padding."""
    if len(named) == 1 and isinstance(only := next(iter(named.values())), Mapping):
        named = only  # the model takes all arguments in one mapping
    for name, counts in PADDING.items():
        mask = named.get(name)
        if isinstance(mask, Tensor) and mask.dim() == 2:
            return (mask != 0) == counts
    return None


def tensors_of(tree: Any) -> list[torch.Tensor]:
    """List the tensors of nested tuples, lists, dicts and data classes in a fixed order."""
    tensors: list[torch.Tensor] = []
    _add_tensors(tensors, tree)
    return tensors


def _add_tensors(tensors: list[torch.Tensor], tree: Any) -> None:
    kind = type(tree)
    if kind in _WITHOUT_TENSORS:
        return
    if isinstance(tree, Tensor):
        tensors.append(tree)
    elif kind in (tuple, list, dict):  # the usual containers, without PyTorch's long way
        for element in tree.values() if kind is dict else tree:
            _add_tensors(tensors, element)
    else:
        for leaf in tree_leaves(tree):
            if leaf is not tree:
                _add_tensors(tensors, leaf)
            elif is_dataclass(leaf) and not isinstance(leaf, type):
                # PyTorch's trees treat a data class as a leaf.
                _add_tensors(tensors, [getattr(leaf, field.name, None) for field in fields(leaf)])


def returned_tensors(output: Any) -> list[torch.Tensor]:
    """List the tensors of a model's output, in containers of any kind and in attributes, in a fixed order."""
    return [tensor for _, tensor in returned_by_name(output)]


def returned_by_name(output: Any) -> list[tuple[str, torch.Tensor]]:
    """List the tensors of a model's output, in containers or attributes, with the keys that lead to them.

    Caches of Transformers are skipped, because they go back into the model. SpeedupError for an iterator.
    """
    named_tensors: list[tuple[str, torch.Tensor]] = []
    seen = set[int]()  # ids of objects, which may refer to each other

    def look(value: Any, name: str) -> None:
        if isinstance(value, Tensor):
            named_tensors.append((name or "output", value))
            return
        if value is None or isinstance(value, _NO_OUTPUTS) or id(value) in seen or _is_cache(value):
            return
        if isinstance(value, Iterator):
            raise SpeedupError(f"a model's output must be complete when its forward ends, got {type(value).__name__}")
        seen.add(id(value))
        parts: Iterable[tuple[Any, Any]]
        if isinstance(value, Mapping):
            parts = value.items()
        elif isinstance(value, tuple) and hasattr(value, "_fields"):  # a named tuple
            parts = zip(value._fields, value, strict=True)
        elif isinstance(value, Collection):
            parts = enumerate(value)
        else:
            parts = getattr(value, "__dict__", {}).items()
        for key, part in parts:
            if isinstance(key, int):
                path = f"{name or 'output'}[{key}]"
            elif name:
                path = f"{name}.{key}"
            else:
                path = str(key)
            look(part, path)

    look(output, "")
    return named_tensors


def _is_cache(value: Any) -> bool:
    """Tell whether a value is a cache of Transformers."""
    kinds = type(value).__mro__
    return any(kind.__name__.endswith("Cache") and kind.__module__.startswith("transformers.") for kind in kinds)


# A traced number refers to the tensor whose size it is.
_NUMBERS = (int, float, complex, torch.SymInt, torch.SymFloat, torch.SymBool)
_NO_OUTPUTS = (
    *(*_NUMBERS, range, str, bytes, torch.dtype, torch.device),
    *(nn.Module, type, ModuleType, FunctionType, MethodType, np.ndarray),
)


def random_like(call: Call, generator: torch.Generator) -> Call:
    """Return a call with standard normal random numbers."""

    def draw(tensor: Tensor) -> Tensor:
        # Integers and booleans may be indices or masks, where a random value may be out of range.
        if tensor.is_complex():
            return torch.complex(draw(tensor.real), draw(tensor.imag))
        if not tensor.is_floating_point():
            return tensor.clone()
        return torch.randn(tensor.shape, generator=generator).to(tensor)

    drawn: Call = tree_map_only(Tensor, draw, call)
    return drawn


def first_samples(call: Call) -> Call:
    """Return a call with its first two samples; the call itself if it has no more."""
    return take_samples(call, torch.arange(2)) if batch_size(call) > 2 else call


def run_few(model: nn.Module, call: Call) -> Any:
    """Run a model on the first two samples of a call; on the whole call if that fails."""
    few = first_samples(call)
    try:
        return model(*few[0], **few[1])
    except Exception as error:  # a user's model may raise anything
        if out_of_memory(error):
            raise
        return model(*call[0], **call[1])


def call_in_precision(call: Call, dtype: torch.dtype) -> Call:
    """Return a call with its floats and complex numbers in single or double precision."""
    cast: Call = tree_map_only(Tensor, lambda tensor: cast_tensor(tensor, dtype), call)
    return cast


def cast_floats(call: Call, dtype: torch.dtype) -> Call:
    """Return a call with its floats cast to another floating type."""
    cast: Call = tree_map_only(Tensor, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, call)
    return cast


def let_go(error: BaseException | None) -> None:
    """Free the local variables that an error's traceback holds, such as the tensors of an unfinished trace."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def take_samples(call: Any, index: Tensor) -> Any:
    """Return a call with some of its samples. ``index``: int64, their indices, or bool, (samples,)."""
    count = batch_size(call)

    def take(tensor: Tensor) -> Tensor:
        has_samples = tensor.dim() > 0 and len(tensor) == count
        if has_samples:
            return tensor[index.to(tensor.device)]
        return tensor

    return tree_map_only(Tensor, take, call)


def inputs_of(batch: Any, index: int = 0, name: str = "calibration") -> Any:
    """Return the inputs of a batch: a tensor, a dict of keyword arguments or a tuple of positional ones."""
    if isinstance(batch, (tuple, list)):
        if not batch:
            raise DataError(f"a batch must hold an input, got an empty one ({name}, batch {index})")
        batch = batch[0]
    inputs = dict(batch) if isinstance(batch, Mapping) else batch
    if not isinstance(inputs, Tensor):
        for leaf in tree_leaves(inputs):
            # Tensors in other containers can't be split into samples.
            if (is_dataclass(leaf) and not isinstance(leaf, type)) or _is_cache(leaf):
                raise ConfigError(
                    "the inputs of a batch must be tensors, alone or in tuples, lists or mappings, got a "
                    f"{type(leaf).__name__} ({name}, batch {index})"
                )
    if not tensors_of(inputs):
        raise ConfigError(
            "the input of a batch must be a tensor, or a tuple or mapping with a tensor in it, got "
            f"{shown(inputs)} ({name}, batch {index})"
        )
    return inputs


def check_inputs(batch: Any, index: int, name: str) -> None:
    """Raise DataError unless all tensors of a batch's inputs are dense and have values, none of them NaN or +inf."""
    inputs = inputs_of(batch, index, name)
    for tensor in tensors_of(inputs):
        if tensor.numel() == 0:
            tensor_name = next((key for key, value in returned_by_name(inputs) if value is tensor), "output")
            if tensor_name.startswith("output"):
                tensor_name = tensor_name.replace("output", "inputs", 1)
            description = f"an empty one: {tensor_name} of shape {tuple(tensor.shape)}"
            raise DataError(f"a batch must hold inputs, got {description} ({name}, batch {index})")
        if tensor.layout != torch.strided or tensor.is_meta:
            kind = "meta" if tensor.is_meta else str(tensor.layout).removeprefix("torch.")
            raise DataError(f"inputs must be dense tensors with values, got a {kind} tensor ({name}, batch {index})")
        # Minus infinity may be a mask of attention.
        if tensor.is_floating_point() and not bool((tensor < torch.inf).all()):
            raise DataError(f"inputs must be finite (or -inf, as in masks), got NaN or inf ({name}, batch {index})")


def calls(model: nn.Module, calibration: Iterable[Any]) -> Iterator[Call]:
    """Yield a call of the model for each batch, as copies, since a model may change its inputs in place."""
    name = name_of(calibration)
    count = 0
    for count, batch in enumerate(calibration, start=1):
        call = _bound(model, arguments_of(inputs_of(batch, count - 1, name), model), count - 1, name)
        yield copied_for(model, call)
    if count == 0:
        raise DataError(f"{name} must hold at least one batch, got none (was a generator used twice?)")


def _bound(model: nn.Module, call: Call, index: int, name: str) -> Call:
    """Return a call without keyword arguments that the model doesn't have; DataError if the rest doesn't fit."""
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # not written in Python
        return call
    args, kwargs = call
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values())
    accepted = {key: value for key, value in kwargs.items() if takes_any or key in signature.parameters}
    try:
        signature.bind(*args, **(accepted or kwargs))
    except TypeError as error:
        raise DataError(
            f"{name} must fit the model, got TypeError: {error} on {described(args or kwargs)} (batch {index})"
        ) from error
    return args, accepted


def name_of(calibration: Iterable[Any]) -> str:
    """Return the name of calibration batches in messages."""
    return getattr(calibration, "name", "calibration")


def _number(calibration: Iterable[Any], index: int) -> int:
    """Return the number of a batch in the data as given, for messages."""
    number: int = calibration.given_as(index) if hasattr(calibration, "given_as") else index
    return number


def described(tree: Any) -> str:
    """Describe tensors in nested containers by their types and shapes, and in mappings by their keys."""
    if isinstance(tree, Tensor):
        return f"{str(tree.dtype).removeprefix('torch.')} of shape {tuple(tree.shape)}"
    if isinstance(tree, Mapping):
        named = [f"{key!r}: {described(value)}" for key, value in tree.items() if tensors_of(value)]
        return f"{{{', '.join(named)}}}"
    entries = tree if isinstance(tree, (tuple, list)) else tensors_of(tree)
    return ", ".join(described(element) for element in entries if tensors_of(element))


@contextmanager
def fitting(batch: int, batches: Any = "calibration", call: Call | None = None) -> Iterator[None]:
    """Turn a model's error within the block into a DataError that names the batch.

    ``batch``: its number, from 0, in ``batches``: a `Calibration`, which may be a part of the data, or a name.
    """
    try:
        yield
    except NniTopoError:
        raise
    except MODEL_ERRORS as error:
        if out_of_memory(error):
            raise
        suffix = "" if call is None else f" on {described(call)}"
        knob = batches
        if not isinstance(batches, str):
            knob, batch = name_of(batches), _number(batches, batch)
        raise DataError(f"{knob} must fit the model, got {raised(error)}{suffix} (batch {batch})") from error


def check_inputs_last(call: Any, model: nn.Module) -> None:
    """Raise ConfigError if a model has freed the memory of its inputs, which are used again: reading them would crash.

    Invertible networks free it, because they can compute their inputs from their outputs.
    """
    for tensor in tensors_of(call):
        if tensor.layout == torch.strided and tensor.numel() and not tensor.untyped_storage().nbytes():
            raise ConfigError(
                "a model must leave its inputs as they are, because they are used again, got one that frees the memory "
                f"of {described(tensor)} in its forward: switch that off, in torch_geometric by disable=True "
                f"({type(model).__name__})"
            )


def first_of_samples(call: Any) -> Tensor:
    """Return the first tensor of a call that has a dimension (of samples); the first tensor if none has."""
    tensors = tensors_of(call)
    return next((tensor for tensor in tensors if tensor.dim()), tensors[0])


def batch_size(call: Any) -> int:
    """Return the number of samples in a call; 1 if none of its tensors has dimensions."""
    return next((len(tensor) for tensor in tensors_of(call) if tensor.dim()), 1)


def lists_of_samples(inputs: Any) -> list[Any]:
    """Return the arguments of a batch that hold one tensor per sample, such as a detector's list of images.

    If another argument is a tensor of n samples, only lists of n tensors count, and not if each tensor has length n:
    the others hold states or levels of all samples. Nor do tensors of the same samples count, see `share_samples`.
    """
    values: Iterable[Any] = ()
    if isinstance(inputs, Mapping):
        values = inputs.values()
    elif isinstance(inputs, (tuple, list)):
        values = inputs
    count = next((len(value) for value in values if isinstance(value, Tensor) and value.dim()), None)
    lists = []
    for value in values:
        if not isinstance(value, (tuple, list)) or not tensors_of(value) or share_samples(value):
            continue
        is_of_all = isinstance(value, tuple) or len(value) != count
        if count is None or not (
            is_of_all or all(tensor.dim() and len(tensor) == count for tensor in tensors_of(value))
        ):
            lists.append(value)
    return lists
