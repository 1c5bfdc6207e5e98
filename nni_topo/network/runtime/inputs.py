"""Example inputs and model outputs, whatever container they come in."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from nni_topo.errors import ConfigError, DataError, NniTopoError
from nni_topo.network.runtime.copying import device_of
from nni_topo.network.runtime.untouched import evaluation_mode, left_alone

Call = tuple[tuple[Any, ...], dict[str, Any]]
_Given = ParamSpec("_Given")
_Made = TypeVar("_Made")
Variation = tuple[float, float]
"""By which inputs are multiplied, after what is added to them."""
VARIATIONS: tuple[Variation, ...] = ((0.01, 0.0), (100.0, 0.0), (1.0, 3.0))
_SIDE = 64  # pixels at which models are tried where they can be
_logger = logging.getLogger(__name__)

PADDING = {"attention_mask": True, "key_padding_mask": False, "src_key_padding_mask": False}
"""Arguments that tell by position what is padding, and whether something other than zero there counts."""


def call_arguments(example_inputs: Any, model: torch.nn.Module) -> Call:
    """Split inputs, batch first, into positional and keyword arguments, and copy them to a model's device."""
    call: Call = copied(arguments_of(example_inputs, model), device_of(model))
    return call


def arguments_of(example_inputs: Any, model: torch.nn.Module | None = None) -> Call:
    """Split inputs, batch first, into positional and keyword arguments of a model.

    This is the one rule of how inputs become arguments. A mapping holds keyword arguments, unless it is itself the
    single argument of the model, see :func:`is_argument`; without a model it always holds keyword arguments.
    """
    if isinstance(example_inputs, Mapping) and model is not None and is_argument(example_inputs, model):
        call: Call = ((dict(example_inputs),), {})
    elif isinstance(example_inputs, Mapping):
        call = ((), dict(example_inputs))
    elif isinstance(example_inputs, (tuple, list)):
        call = (tuple(example_inputs), {})
    else:
        call = ((example_inputs,), {})
    if not tensors_of(call):
        raise ConfigError(
            "example_inputs must be a tensor, a tuple of arguments or a dict of keyword arguments "
            f"with a tensor in it, got {type(example_inputs).__name__}"
        )
    first = tensors_of(call)[0]
    if first.dim() and not len(first):
        raise ConfigError(
            f"example_inputs must hold a sample at least, got a tensor of shape {tuple(first.shape)} (example_inputs)"
        )
    return call


def is_argument(mapping: Mapping[Any, Any], model: torch.nn.Module) -> bool:
    """Say whether a mapping can only be meant as the single argument of a model, as in ``forward(self, batch)``.

    So it is where the model's forward has one required parameter, which is positional, takes no arbitrary keyword
    arguments, and has no parameter that is called like a key of the mapping.
    """
    parameters = _parameters_of(model)
    if parameters is None or any(each.kind is each.VAR_KEYWORD for each in parameters):
        return False
    if any(each.name in mapping and each.kind is not each.POSITIONAL_ONLY for each in parameters):
        return False
    required = [each for each in parameters if each.default is each.empty and each.kind is not each.VAR_POSITIONAL]
    return len(required) == 1 and required[0].kind in (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    )


def _parameters_of(model: torch.nn.Module) -> list[inspect.Parameter] | None:
    """List the parameters of a model's forward; None where it isn't written in Python.

    Of a compiled model, or one that is spread over devices, those of the model within.
    """
    for attribute, kinds in _WITHIN.items():
        if type(model).__name__ in kinds and isinstance(inner := getattr(model, attribute, None), nn.Module):
            return _parameters_of(inner)
    try:
        return list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):
        return None


_WITHIN = {"_orig_mod": ("OptimizedModule",), "module": ("DataParallel", "DistributedDataParallel")}


def cure_of_mapping(call: Call, model: torch.nn.Module) -> str:
    """Say how a mapping is passed as an argument, where a model's first parameter got none by its name; else nothing.

    For errors of arguments that don't fit.
    """
    args, kwargs = call
    parameters = _parameters_of(model)
    if args or not kwargs or not parameters:
        return ""
    first = parameters[0]
    if first.name in kwargs or first.kind is not first.POSITIONAL_OR_KEYWORD:
        return ""
    return (
        f"; a mapping holds arguments by name: if this one is itself the argument {first.name!r}, pass "
        f"{{{first.name!r}: mapping}}"
    )


def cure_of_argument(error: Exception) -> str:
    """Say why a model got a dict, where an error of it speaks of one; else nothing."""
    if not isinstance(error, (TypeError, AttributeError)) or "dict" not in str(error):
        return ""
    return (
        "; a mapping is passed as the model's single argument where none of its keys is a parameter of forward: to "
        "pass its entries by name, use the names of these parameters as keys"
    )


def on_device(tree: Any, device: torch.device) -> Any:
    """Move the tensors of nested containers to a device, without their gradients."""
    return tree_map_only(Tensor, lambda tensor: _moved(tensor, device), tree)


def copied(tree: Any, device: torch.device) -> Any:
    """Copy the tensors of nested containers to a device, without their gradients."""
    return tree_map_only(Tensor, lambda tensor: _moved(tensor, device, copy=True), tree)


def _moved(tensor: Tensor, device: torch.device, *, copy: bool = False) -> Tensor:
    if tensor.is_meta and device.type != "meta":
        raise DataError("inputs of a model must be tensors with values, got one on the meta device (inputs)")
    return tensor.detach().to(device, copy=copy)


def bind_arguments(model: torch.nn.Module, call: Call) -> dict[str, Any]:
    """Name a call's arguments in the order of ``model.forward``, without defaults; a ConfigError if unfit."""
    try:
        bound = inspect.signature(model.forward).bind(*call[0], **call[1])
    except TypeError as error:
        cure = cure_of_mapping(call, model)
        raise ConfigError(f"example_inputs must fit {type(model).__name__}.forward: {error}{cure}") from error
    return dict(bound.arguments)


def real_positions_of(model: torch.nn.Module, call: Call) -> Tensor | None:
    """Return which positions of a call aren't padding, bool ``(samples, places)``; None if no mask tells."""
    try:
        return real_positions(bind_arguments(model, call))
    except ConfigError:  # what doesn't fit the model is for the model to say
        return None


def real_positions(named: Mapping[str, Any]) -> Tensor | None:
    """Return which positions of named arguments aren't padding, bool ``(samples, places)``; None if no mask tells."""
    for name, counts in PADDING.items():
        mask = named.get(name)
        if isinstance(mask, Tensor) and mask.dim() == 2:
            return (mask != 0) == counts
    # A model may take all of them in one mapping.
    if len(named) == 1:
        only = next(iter(named.values()))
        return real_positions(only) if isinstance(only, Mapping) else None
    return None


def tensors_of(tree: Any) -> list[torch.Tensor]:
    """List the tensors of nested tuples, lists and dicts in a fixed order."""
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor)]


def random_like(call: Call, generator: torch.Generator, *, positive: bool = False) -> Call:
    """Draw the floats of a call anew: standard normal, or ``positive``, uniform in [0.5, 1.5]."""

    def draw(tensor: Tensor) -> Tensor:
        # Integers and booleans may be indices or masks, for which not every value will do.
        if not tensor.is_floating_point():
            return tensor.clone()
        values = torch.rand if positive else torch.randn
        return (values(tensor.shape, generator=generator) + 0.5 * positive).to(tensor)

    drawn: Call = tree_map_only(Tensor, draw, call)
    return drawn


def shrunk(call: Call, side: int = _SIDE) -> Call:
    """Cut large images of a call, 4-D tensors, to a corner, and leave two of them."""
    small: Call = tree_map_only(
        torch.Tensor,
        lambda each: each[:2, :, :side, :side] if each.dim() == 4 and each.shape[1] < _SIDE else each,
        call,
    )
    return small if all(each.dim() == 4 for each in tensors_of(call)) else call


def varied(call: Call, variation: Variation) -> Call:
    """Shift the floats of a call and multiply them."""
    factor, shift = variation
    new: Call = tree_map_only(Tensor, lambda t: (t + shift) * factor if t.is_floating_point() else t, call)
    return new


def variations_of(call: Call) -> tuple[Variation, ...]:
    """List how the inputs of a call may be varied: not at all where none are floats."""
    return VARIATIONS if any(each.is_floating_point() for each in tensors_of(call)) else ()


def together(call: Call, variations: tuple[Variation, ...]) -> Call | None:
    """Put the first sample of a call and its variations into one batch; None if not all floats hold samples."""
    size = batch_size(call)
    if any(each.is_floating_point() and (not each.dim() or len(each) != size) for each in tensors_of(call)):
        return None
    one = taken(call, torch.arange(1))
    several = [one, *(varied(one, variation) for variation in variations)]
    leaves = [tree_flatten(each) for each in several]
    joined = [
        torch.cat(each) if isinstance(each[0], Tensor) and each[0].dim() and len(each[0]) == 1 else each[0]
        for each in zip(*(found for found, _ in leaves), strict=True)
    ]
    batch: Call = tree_unflatten(joined, leaves[0][1])
    return batch


def run_small(model: nn.Module, call: Call) -> Any:
    """Run a model on a corner of large images; where it doesn't take that, on the whole."""
    small = shrunk(call)
    try:
        return model(*small[0], **small[1])
    except Exception as error:  # it may fail in as many ways as it is written
        if out_of_memory(error):
            raise
        return model(*call[0], **call[1])


def cast_floats(call: Call, dtype: torch.dtype) -> Call:
    """Cast the floating tensors of a call to a floating type."""
    cast: Call = tree_map_only(Tensor, lambda each: each.to(dtype) if each.is_floating_point() else each, call)
    return cast


@dataclass
class _Share:
    """How many samples may run together, None: all; and how many did at most."""

    most: int | None
    seen: int = 0


_SHARE: ContextVar[_Share | None] = ContextVar("share", default=None)


def in_smaller_batches(work: Callable[_Given, _Made]) -> Callable[_Given, _Made]:
    """Do some work once more, by half as many samples at a time, wherever a device's memory doesn't hold them.

    Raises DataError where it doesn't hold a single one.
    """
    place = work.__qualname__

    @functools.wraps(work)
    def run(*args: _Given.args, **kwargs: _Given.kwargs) -> _Made:
        outer = _SHARE.get()
        share = _Share(None if outer is None else outer.most)
        while True:
            token = _SHARE.set(share)
            try:
                return work(*args, **kwargs)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                reason = str(error).partition("\n")[0]
            finally:
                _SHARE.reset(token)
            # Out here, so that the error no longer holds the tensors of what failed.
            if share.seen < 2:
                raise DataError(f"a device must have memory for a sample at a time, got: {reason} ({place})")
            share = _Share(share.seen // 2)
            _logger.warning("out of memory: once more, %d samples at a time (%s)", share.most, place)

    return run


def out_of_memory(error: Exception) -> bool:
    """Say whether an error is that of memory that there isn't: a GPU's, or, by its words, a CPU's."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def at_once(samples: int) -> int:
    """Return how many of so many samples run together, within the work of :func:`in_smaller_batches`."""
    share = _SHARE.get()
    if share is None:
        return samples
    least = samples if share.most is None else min(samples, share.most)
    share.seen = max(share.seen, least)
    return least


def parts(call: Any) -> Iterator[Any]:
    """Cut a call, or a batch with its targets, into nearly equal ones of as many samples as may run together."""
    size = batch_size(call)
    most = at_once(size)
    if most == size:
        yield call
        return
    for part in torch.arange(size).tensor_split(-(-size // most)):
        yield taken(call, part)


def taken(call: Any, index: Tensor) -> Any:
    """Return the entries `index` of a call."""
    count = batch_size(call)
    return tree_map_only(
        Tensor, lambda each: each[index.to(each.device)] if each.dim() and len(each) == count else each, call
    )


def inputs_of(batch: Any, index: int = 0, name: str = "calibration") -> Any:
    """Return the inputs of a batch: a tensor, a dict of keyword arguments or a tuple of positional ones.

    This is the one rule of what a batch may be, see :class:`nni_topo.Calibration`.
    """
    if isinstance(batch, (tuple, list)):
        if not batch:
            raise DataError(f"a batch must hold an input, got an empty one ({name}, batch {index})")
        batch = batch[0]
    inputs = dict(batch) if isinstance(batch, Mapping) else batch
    if not tensors_of(inputs):
        raise ConfigError(
            "the input of a batch must be a tensor, or a tuple or mapping with a tensor in it, got "
            f"{type(inputs).__name__} ({name}, batch {index})"
        )
    return inputs


def check_inputs(batch: Any, index: int, name: str) -> None:
    """Raise DataError unless all tensors among a batch's inputs have values, finite ones where they float."""
    for tensor in tensors_of(inputs_of(batch, index, name)):
        if tensor.numel() == 0:
            raise DataError(f"a batch must hold inputs, got an empty one ({name}, batch {index})")
        if tensor.layout != torch.strided or tensor.is_meta:
            kind = "meta" if tensor.is_meta else str(tensor.layout).removeprefix("torch.")
            raise DataError(f"inputs must be dense tensors with values, got a {kind} tensor ({name}, batch {index})")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise DataError(f"inputs must be finite, got NaN or infinity ({name}, batch {index})")


def calls(model: nn.Module, calibration: Iterable[Any]) -> Iterator[Call]:
    """Yield the arguments that calibration batches stand for, copies on a model's device; DataError if they don't fit.

    A model may change what enters it in place: copies keep the batches as they are.
    """
    name = name_of(calibration)
    count = 0
    for count, batch in enumerate(calibration, start=1):
        call = _bound(model, arguments_of(inputs_of(batch, count - 1, name), model), batch, count - 1, name)
        for part in parts(call):
            yield copied(part, device_of(model))
    if count == 0:
        raise DataError(f"{name} must hold at least one batch, got none (was a generator used twice?)")


def _bound(model: nn.Module, call: Call, batch: Any, index: int, name: str) -> Call:
    """Return a call without entries of a mapping that the model has no argument for; DataError if it doesn't fit."""
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # not written in Python
        return call
    args, kwargs = call
    takes_any = any(each.kind is each.VAR_KEYWORD for each in signature.parameters.values())
    known = {key: value for key, value in kwargs.items() if takes_any or key in signature.parameters}
    try:
        signature.bind(*args, **(known or kwargs))
    except TypeError as error:
        several = isinstance(batch, (tuple, list)) and len(batch) > 1
        cure = f"; {_SEVERAL}" if several else ""
        if unknown := [str(key) for key in kwargs if key not in known]:
            cure = f"; it has no argument called {', '.join(unknown)}"
        cure += cure_of_mapping(call, model)
        raise DataError(f"{name} must fit the model, got TypeError: {error}{cure} (batch {index})") from error
    return args, known


_SEVERAL = (
    "of a batch that is a tuple or list, the first entry is the input and the others are targets: hand several inputs "
    "on as ((images, vectors),) or as {'images': images, 'vectors': vectors}"
)


def first_call(model: nn.Module, calibration: Iterable[Any]) -> Call:
    """Return the arguments that the first batch stands for, tried out."""
    call = next(calls(model, calibration))
    check_fits(model, call, name_of(calibration))
    return call


def structure_call(model: nn.Module, calibration: Iterable[Any]) -> Call:
    """Return the arguments to follow a model's channels with: the first batch's, tried out, of two samples."""
    return structure_of(model, next(calls(model, calibration)), name_of(calibration))


def name_of(calibration: Iterable[Any]) -> str:
    """Return what messages call some batches."""
    return getattr(calibration, "name", "calibration")


def structure_of(model: nn.Module, call: Call, name: str = "calibration") -> Call:
    """Return a call's first two samples where the model takes them, else the call; DataError if it takes neither."""
    # To follow channels takes time and memory by sample.
    few: Call = taken(call, torch.arange(min(2, batch_size(call))))
    try:
        check_fits(model, few, name)
    except DataError:
        # The model takes no other number of samples, or no fewer.
        check_fits(model, call, name)
        return call
    return few


def check_fits(model: nn.Module, call: Call, name: str = "calibration") -> None:
    """Run a model on the first batch, in evaluation mode; a DataError if it can't take it."""
    with fitting(0, name), left_alone(model), evaluation_mode(model), torch.no_grad():
        model(*call[0], **call[1])


@contextmanager
def fitting(batch: int, knob: str = "calibration") -> Iterator[None]:
    """Turn an error of a model in the block into a DataError that names the knob's batch, from 0."""
    try:
        yield
    except NniTopoError:
        raise
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        if out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0] + cure_of_argument(error)
        raise DataError(f"{knob} must fit the model, got {type(error).__name__}: {reason} (batch {batch})") from error


def batch_size(call: Any) -> int:
    """Return the number of samples in a call, the length of its first tensor that has one."""
    return next((len(each) for each in tensors_of(call) if each.dim()), 1)
