"""Models that are used and not changed: public functions work on copies.

Random states, and the switches for fast paths and for rounding, are put back.
"""

from __future__ import annotations

import functools
import logging
import os
import random
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from operator import is_
from types import FrameType
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from nni.compression.base.wrapper import ModuleWrapper
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from nni_topo.context import context, in_context, tell
from nni_topo.errors import DataError, listed
from nni_topo.network.runtime.copying import (
    copied_together,
    is_compiled_function,
    is_compiled_module,
    is_plain,
    is_transformed,
)
from nni_topo.network.runtime.inputs import starts_again
from nni_topo.network.runtime.memory import free_memory_of, out_of_memory
from nni_topo.network.runtime.precision import Switch, in_full_precision, is_within_autocast
from nni_topo.network.runtime.processes import is_in_step
from nni_topo.network.runtime.training_mode import put_mode

_Given = ParamSpec("_Given")
_Made = TypeVar("_Made")
_PutBack = Callable[[], object]


_logger = logging.getLogger(__name__)

_SHARE = 0.25  # of the free memory that a copy of a model's parameters may take
_PATIENCE = 10.0  # seconds after which a thread that waits for its turn says so


def leaves_models_alone(function: Callable[_Given, _Made], *, as_compiled: bool = False) -> Callable[_Given, _Made]:
    """Let a public function work on copies of all models among its arguments, in lists and mappings too.

    A copy has parameters of its own where these take at most a quarter of the free memory. Else it uses the memory of
    the model's; a warning then names parameters that a forward has written to.

    Models are copied once, at the outermost call. What isn't copied is put back (`left_alone`): a model that NNI has
    wrapped, one that PyTorch spreads over processes, and any model if ``as_compiled`` is True, because a copy isn't
    compiled.

    Where memory is short the function raises a DataError, unless `in_smaller_batches` around it starts again with
    fewer samples.
    """

    @functools.wraps(function)
    def run(*args: _Given.args, **kwargs: _Given.kwargs) -> _Made:
        models = list({id(each): each for given in (*args, *kwargs.values()) for each in _models_in(given)}.values())
        is_copied = context().models is None and not as_compiled
        copied = [each for each in models if is_copied and is_plain(each) and not _is_wrapped(each)]
        ids = {id(each) for each in copied}
        others = [each for each in models if id(each) not in ids]
        try:
            with left_alone(*others, as_compiled=as_compiled), _copies(copied) as copies:
                own: Any = [_replaced(given, copies) for given in args]
                named: Any = {name: _replaced(given, copies) for name, given in kwargs.items()}
                return function(*own, **named)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error) or starts_again() or is_in_step():
                raise
            reason = str(error).partition("\n")[0] or type(error).__name__
        # Outside of the except clause, because the error keeps the tensors of the failed call in memory.
        raise DataError(
            f"a device must have memory for a batch of the inputs, got: {reason} ({function.__qualname__}); give fewer "
            "samples in each"
        )

    return run


def _models_in(given: Any) -> list[nn.Module]:
    """List the models that an argument is or holds."""
    if isinstance(given, nn.Module):
        return [given]
    held = given.values() if isinstance(given, Mapping) else given if isinstance(given, (list, tuple)) else ()
    return [each for each in held if isinstance(each, nn.Module)]


def _is_wrapped(model: nn.Module) -> bool:
    return any("_nni_wrapper" in module._modules for module in model.modules())


def _replaced(given: Any, copies: Mapping[int, nn.Module]) -> Any:
    """Return an argument with copies in place of the models."""
    if isinstance(given, nn.Module):
        return copies.get(id(given), given)
    if not any(id(each) in copies for each in _models_in(given)):
        return given
    if isinstance(given, Mapping):
        return {key: copies.get(id(each), each) for key, each in given.items()}
    replaced = [copies.get(id(each), each) for each in given]
    return tuple(replaced) if isinstance(given, tuple) else replaced


@contextmanager
def _copies(models: list[nn.Module]) -> Iterator[dict[int, nn.Module]]:
    """Copy models for a block; warn of parameters that it has written to where the copies share their memory."""
    parameters = {id(each): each for model in models for each in model.parameters()}.values()
    is_light = not _have_room(parameters)
    versions = [(each, _version(each)) for each in parameters] if is_light else []
    copies = copied_together(models, light=is_light)
    try:
        with _compiler_off() if any(map(has_compiled, copies)) else nullcontext():
            yield {id(model): copied for model, copied in zip(models, copies, strict=True)}
    finally:
        written = {id(each) for each, version in versions if _version(each) != version}
        names = [name for model in models for name, each in model.named_parameters() if id(each) in written]
        if names:
            _logger.warning(
                "parameters that a forward or evaluate writes to must take at most a quarter of the free memory to be "
                "left alone; these have new values: %s",
                listed(names),
            )


def _have_room(parameters: Iterable[Tensor]) -> bool:
    """Tell whether copies of parameters take at most a quarter of the free memory of their devices."""
    needed: dict[torch.device, int] = {}
    for each in parameters:
        if not is_lazy(each) and not each.is_meta:
            needed[each.device] = needed.get(each.device, 0) + each.nbytes
    return all(count <= _SHARE * free_memory_of(device) for device, count in needed.items())


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() or is_lazy(tensor) else tensor._version


@contextmanager
def left_alone(*models: Any, as_compiled: bool = False, values: bool = False) -> Iterator[None]:
    """Put back, whatever happens in the block, what models hold, and the states of all global generators.

    See `state_kept` for what is put back; of a user's own model, or with ``values``, that includes the values of
    parameters. What isn't a module has nothing to put back.

    Parts that ``torch.compile`` has compiled run as they are written, for compiled ones call no hooks and show no
    operations, unless ``as_compiled`` is True. A caller's ``torch.autocast`` is off likewise.
    """
    modules = [model for model in models if isinstance(model, nn.Module)]
    runs_written = not as_compiled and any(map(has_compiled, modules))
    is_outermost = context().models is None
    # What is made in a caller's inference mode takes no gradients, for good. Sums of products that a caller's autocast
    # rounds to three digits say little of a network.
    inference = torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()
    precision = nullcontext() if as_compiled else _autocast_off()
    gradients = torch.set_grad_enabled(torch.is_grad_enabled())  # an interruption may come as ``no_grad`` begins
    with one_call(), gradients, inference, precision, nullcontext() if as_compiled else _on_cpu():
        compiler = _compiler_off() if runs_written else nullcontext()
        own, ids = context().models, {id(model) for model in modules}
        if own is None:
            own = set()
        if is_outermost:
            own |= ids
        values = values or not ids.isdisjoint(own)
        with state_kept(*modules, values=values), random_state_kept(), compiler:
            yield


@contextmanager
def state_kept(*models: nn.Module, values: bool = False) -> Iterator[None]:
    """Put back, whatever happens in the block, what the modules of models hold.

    That is their modes, attributes, parameters and buffers, ``requires_grad``, gradients, and the values of buffers;
    with ``values`` also those of parameters, if a copy of them takes at most a quarter of the free memory. Gradients
    are away within the block. What a pruner does to wrap a model stays.
    """
    put_back: list[_PutBack] = []
    modules = dict.fromkeys(module for model in models for module in model.modules())
    values = values and _have_room({id(each): each for model in models for each in model.parameters()}.values())
    seen: set[int] = set()
    try:
        for module in modules:
            tensors: list[Tensor] = list(module.parameters(recurse=False))
            if not isinstance(module, ModuleWrapper):  # whose masks change
                _note_module(module, put_back)
                tensors += module.buffers(recurse=False)
            for tensor in tensors:
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    _note_tensor(tensor, values or not isinstance(tensor, nn.Parameter), put_back)
        yield
    finally:
        try:
            for each in put_back:
                each()
        except BaseException:  # if that was interrupted, all of it once more, which does no harm
            for each in put_back:
                each()
            raise


def _note_module(module: nn.Module, put_back: list[_PutBack]) -> None:
    """Append what puts a module's mode and attributes back, those in its own dictionaries, lists and sets too."""
    mode = module.training
    if isinstance(module, torch.jit.ScriptModule):  # whose tables aren't Python's
        put_back.append(functools.partial(put_mode, module, mode))
        return
    tables = [vars(module), *(each for each in vars(module).values() if type(each) in (dict, OrderedDict))]
    held = [(table, dict(table)) for table in tables]
    others = [(each, each.copy()) for each in vars(module).values() if type(each) in (list, set)]

    def put() -> None:
        put_mode(module, mode)
        if "_nni_wrapper" in module._modules:  # NNI changes the tables to wrap a module
            return
        for table, before in held:
            if not _are_same(table, before) or not _are_same(table.values(), before.values()):
                table.clear()
                table.update(before)
        for items, were in others:
            if not _are_same(items, were):
                items.clear()
                (items.update if isinstance(items, set) else items.extend)(were)

    put_back.append(put)


def _are_same(one: Collection[Any], other: Collection[Any]) -> bool:
    """Tell whether two collections hold the same objects in the same order."""
    return len(one) == len(other) and all(map(is_, one, other))


def _note_tensor(tensor: Tensor, has_values: bool, put_back: list[_PutBack]) -> None:
    """Append what puts a tensor's memory, gradient and, if wanted, values back."""
    if is_transformed(tensor) or not tensor.is_leaf or is_lazy(tensor):
        return  # of use within torch.vmap alone, computed anew, or nothing yet
    gradient, needs, memory = tensor.grad, tensor.requires_grad, tensor.detach()
    is_usual = type(tensor) in (Tensor, nn.Parameter, nn.Buffer) and tensor.layout == torch.strided
    is_usual = is_usual and not tensor.is_meta
    values = memory.clone() if has_values and is_usual else None

    def put() -> None:
        if is_usual and (tensor.dtype is not memory.dtype or not tensor.is_set_to(memory)):
            tensor.data = memory
        if values is not None and memory.untyped_storage().nbytes() and not torch.equal(memory, values):
            with torch.inference_mode(memory.is_inference()):
                memory.copy_(values)
        if tensor.requires_grad != needs:
            tensor.requires_grad_(needs)
        if tensor.grad is not gradient:
            tensor.grad = gradient

    put_back.append(put)
    if gradient is not None:
        tensor.grad = None  # so that none is added to it


@contextmanager
def lent(model: nn.Module) -> Iterator[None]:
    """Lend a network to a user's function: what it does to the network, such as to train it, is put back."""
    with left_alone(model, values=True), turn_lent():
        yield


# The calls of all threads run one at a time: the random generators and the switches for fast paths and for rounding are
# those of the whole process. A call that waits for a user's function, or for threads of its own, lends its turn.
_turn = threading.Lock()
_thread = threading.local()  # ``has_turn``: whether a call of this thread runs, and hasn't lent its turn


def _forget_turns() -> None:
    """Let a forked process begin anew: the threads that had turns aren't there."""
    global _turn
    _turn, _thread.has_turn = threading.Lock(), False
    tell(models=None)


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forget_turns)


def _take_turn() -> None:
    if not _turn.acquire(timeout=_PATIENCE):
        _logger.warning("calls in several threads run one after another: this one waits for that of another thread")
        _turn.acquire()
    _thread.has_turn = True


def _give_turn() -> None:
    _thread.has_turn = False
    _turn.release()


@contextmanager
def one_call() -> Iterator[None]:
    """Mark a call of a public function, which is over when the outermost block is; also a decorator.

    Calls of several threads run one after another.
    """
    if getattr(_thread, "has_turn", False):
        yield
        return
    _take_turn()
    try:
        models = context().models
        with in_context(models=set() if models is None else models):
            yield
    finally:
        _give_turn()


@contextmanager
def turn_lent() -> Iterator[None]:
    """Let calls of other threads run while this thread waits for these, or for what a user's function does."""
    if not getattr(_thread, "has_turn", False):
        yield
        return
    _give_turn()
    try:
        yield
    finally:
        _take_turn()


@contextmanager
def _autocast_off() -> Iterator[None]:
    """Let models compute in their own precision within a caller's ``torch.autocast``; they may ask for another."""
    is_within = is_within_autocast()
    accelerator = torch.accelerator.current_accelerator()
    kinds = {"cpu", "cuda", *([] if accelerator is None else [accelerator.type])}
    with ExitStack() as stack:
        for kind in sorted(kinds):
            # That of one device says for all of them that casts aren't kept.
            if (kind == "cpu" and is_within) or torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False, cache_enabled=False))
        yield


class _OnCpu(TorchFunctionMode):
    """Puts what the package makes without a word of where on the CPU; what models make lies where it would."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func in _device_constructors() and given.get("device") is None and _is_called_by_package():
            given = {**given, "device": torch.device("cpu")}
        return func(*args, **given)


def _is_called_by_package() -> bool:
    """Tell whether it is code of the package that calls a function of PyTorch's."""
    frame: FrameType | None = sys._getframe(2)
    # PyTorch's own code calls for others, as do modes, which hand on what models call.
    while frame is not None and (_package_of(frame) == "torch" or frame.f_code.co_name == "__torch_function__"):
        frame = frame.f_back
    return frame is not None and _package_of(frame) == __name__.partition(".")[0]


def _package_of(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _on_cpu() -> AbstractContextManager[object]:
    """Let the package's own tensors lie on the CPU, whatever the default device is."""
    return nullcontext() if torch.get_default_device().type == "cpu" else _OnCpu()


def has_compiled(model: nn.Module) -> bool:
    """Tell whether ``torch.compile`` or ``compile()`` of a module has compiled a model, a part of it or a forward."""
    return any(
        each._compiled_call_impl is not None
        or is_compiled_module(each)
        or is_compiled_function(vars(each).get("forward"))
        for each in model.modules()
    )


def _without_fast_paths() -> _PutBack:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    return functools.partial(torch.backends.mha.set_fastpath_enabled, before)


def _without_compiler() -> _PutBack:
    stance = torch.compiler.set_stance("force_eager")
    return functools.partial(stance.__exit__, None, None, None)


_fast_paths_off = Switch(_without_fast_paths)
_compiler_off = Switch(_without_compiler)


@contextmanager
def as_written() -> Iterator[None]:
    """Let networks compute what they say for a while: attention step by step, and products in full precision.

    Networks that are compared have to differ by what they compute alone. The fast paths of attention and transformer
    layers turn padded batches into nested tensors, on which hooks and masks can't work. A GPU rounds the factors of
    convolutions to three digits where nobody forbids it, and those of matrices where
    ``torch.set_float32_matmul_precision`` allows it; which digits are lost depends on the layers' widths.
    """
    with _fast_paths_off(), in_full_precision():
        yield


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Leave the random states of PyTorch, NumPy and Python as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch_random_kept():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def torch_random_kept() -> AbstractContextManager[None]:
    """Leave PyTorch's random state as it was."""
    # Not to start CUDA for that, its generators are only kept if it is in use.
    return torch.random.fork_rng(list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else [])


def seed_torch(seed: int) -> None:
    """Seed PyTorch's global generators within `random_state_kept`.

    ``torch.manual_seed`` also notes the seed for devices that aren't in use: CUDA, started later, would begin with this
    one and not with the user's.
    """
    torch.default_generator.manual_seed(seed)
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or (accelerator.type == "cuda" and not torch.cuda.is_initialized()):
        return
    module: Any = torch.get_device_module(accelerator)
    # Apple's has one device.
    seed_all = getattr(module, "manual_seed_all", None) or getattr(module, "manual_seed", None)
    if seed_all is not None:
        seed_all(seed)


def random_states() -> list[Tensor]:
    """Return the states of PyTorch's random generators."""
    others = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *others]


def drawn_since(states: list[Tensor]) -> bool:
    """Tell whether random numbers were drawn since PyTorch's generators had these states."""
    # CUDA may have been started since, which has more of them.
    return not all(torch.equal(one, other) for one, other in zip(states, random_states(), strict=False))
