"""Models that are used and not changed: their state is noted before, and put back afterwards.

So are modes, random states, and the switches for fast paths and for rounding.
"""

from __future__ import annotations

import functools
import logging
import os
import random
import sys
import threading
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from operator import is_
from types import BuiltinFunctionType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from nni.compression.base.wrapper import ModuleWrapper
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils.data import DataLoader, Dataset

from nni_topo.errors import DataError
from nni_topo.network.runtime.copying import is_compiled_function, is_transformed
from nni_topo.network.runtime.inputs import starts_again
from nni_topo.network.runtime.memory import out_of_memory
from nni_topo.network.runtime.precision import Switch, in_full_precision, is_within_autocast
from nni_topo.network.runtime.processes import is_in_step
from nni_topo.network.runtime.training_mode import put_mode
from nni_topo.network.runtime.values import ParameterValues, users_code, values_kept

_Given = ParamSpec("_Given")
_Made = TypeVar("_Made")
_CALL: ContextVar[object | None] = ContextVar("call", default=None)  # the outermost block of `left_alone`
_PutBack = Callable[[], object]
_Note = Callable[[Iterable[Any], list[_PutBack], ParameterValues], None]
_logger = logging.getLogger(__name__)

_PATIENCE = 10.0  # seconds after which a thread that waits for its turn says so

_PLAIN = frozenset({bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size})
_TABLES = frozenset({dict, OrderedDict})
# What no forward writes to, may be large, or isn't the model's own; and subclasses of numbers and texts.
_OTHERS = (
    *(type, ModuleType, FunctionType, BuiltinFunctionType, ModuleWrapper, Optimizer, Dataset, DataLoader),
    *(int, float, complex, str, bytes),
)
# What NNI and `set_unfused` put into a module while they wrap it; the wrapper's targets come on top.
_WRAPPING = frozenset({"_nni_wrapper", "forward", "_qkv_same_embed_dim"})


@contextmanager
def left_alone(*models: Any, as_compiled: bool = False) -> Iterator[None]:
    """Put back, whatever happens in the block, what models hold, and the states of all global generators.

    That is what a deep copy of a model would copy: modes, parameters, buffers, hooks, attributes and what these hold.
    Gradients are away within the block. Parameters that nothing writes to aren't written to here either, so that a
    pass forward from before can still go backward; see `ParameterValues`. What a pruner does to wrap a model stays. A
    model that isn't a module has nothing to put back.

    Parts that ``torch.compile`` has compiled run as they are written, for compiled ones call no hooks and show no
    operations, unless ``as_compiled`` is True. A caller's ``torch.autocast`` is off likewise.
    """
    runs_written = not as_compiled and any(isinstance(model, nn.Module) and has_compiled(model) for model in models)
    # What is made in a caller's inference mode takes no gradients, for good. Sums of products that a caller's autocast
    # rounds to three digits say little of a network.
    inference = torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()
    precision = nullcontext() if as_compiled else _autocast_off()
    with one_call(), inference, precision, nullcontext() if as_compiled else _on_cpu():
        kept = _put_back_after(_write_down_all, models, is_watched=not as_compiled)
        with kept, random_state_kept(), _compiler_off() if runs_written else nullcontext():
            yield


@contextmanager
def _put_back_after(note: _Note, models: Iterable[Any], *, is_watched: bool) -> Iterator[None]:
    """Put back after a block, whatever happens in it, what ``note`` writes down of the models before it.

    Gradients are taken away one by one while it does so: what was written down until then is put back if it is
    interrupted.
    """
    put_back: list[_PutBack] = []
    values = ParameterValues()
    try:
        note(models, put_back, values)
        with values_kept(values, models, is_watched=is_watched, is_own=_is_called_by_package):
            try:
                yield
            finally:
                for each in put_back:
                    each()
                put_back.clear()
    finally:
        for each in put_back:  # all of it once more if that was interrupted, which does no harm
            each()


class _Turns:
    """The calls of all threads, of which one runs at a time.

    A call that waits for a user's function, or for threads of its own, lends its turn. Calls that begin meanwhile are
    over before it goes on: so each puts a model back as it found it, the last one first.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._calls: list[_Turn] = []  # the one that runs is the last, unless it lends

    def begin(self) -> _Turn:
        """Wait for this thread's turn, and take it."""
        turn = _Turn(threading.get_ident())
        with self._changed:
            if not self._changed.wait_for(functools.partial(self._is_free_for, turn), _PATIENCE):
                _logger.warning(
                    "calls in several threads run one after another: this one waits for that of another thread"
                )
                self._changed.wait_for(functools.partial(self._is_free_for, turn))
            self._calls.append(turn)
        return turn

    def is_mine(self) -> bool:
        """Tell whether a call of this thread runs, and hasn't lent its turn."""
        with self._changed:
            own = [each for each in self._calls if each.thread == threading.get_ident()]
            return bool(own) and not own[-1].is_lent

    def end(self, turn: _Turn) -> None:
        """Let the next call begin or go on."""
        with self._changed:
            self._calls.remove(turn)
            self._changed.notify_all()

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Lend the turn of this thread's call for a while, if it has one."""
        with self._changed:
            turn = self._calls[-1] if self._calls else None
            if turn is None or turn.is_lent or turn.thread != threading.get_ident():
                turn = None
            else:
                turn.is_lent = True
                self._changed.notify_all()
        try:
            yield
        finally:
            if turn is not None:
                with self._changed:
                    self._changed.wait_for(lambda: self._calls[-1] is turn)
                    turn.is_lent = False

    def _is_free_for(self, turn: _Turn) -> bool:
        last = self._calls[-1] if self._calls else None
        return last is None or last.is_lent or last.thread == turn.thread


@dataclass(eq=False)
class _Turn:
    thread: int
    is_lent: bool = False


_turns = _Turns()


def _forget_turns() -> None:
    """Let a forked process begin anew: the threads that had turns aren't there."""
    global _turns
    _turns = _Turns()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forget_turns)


@contextmanager
def one_call() -> Iterator[None]:
    """Mark a call of a public function, which is over when the outermost block is; also a decorator.

    Calls of several threads run one after another: a model that one of them prunes isn't as it was until the end, and
    the random generators and the switches for fast paths and for rounding are those of the whole process.
    """
    turns = _turns
    if _CALL.get() is not None and turns.is_mine():
        yield
        return
    turn = turns.begin()
    try:
        before = _CALL.set(_CALL.get() or object())
        try:
            yield
        finally:
            _CALL.reset(before)
    finally:
        turns.end(turn)


def turn_lent() -> AbstractContextManager[None]:
    """Let calls of other threads run while this thread waits for these, or for what a user's function does."""
    return _turns.lent()


def running_call() -> object | None:
    """Return what stands for the public function that runs, the outermost one; None where none leaves models alone.

    Between two calls anything may change on which a model's forward depends, globals and closures too.
    """
    return _CALL.get()


@contextmanager
def parameters_kept(model: nn.Module) -> Iterator[None]:
    """Put back the parameters of a model alone, as after forwards of a light copy, which holds the same ones."""
    with _put_back_after(_write_down_parameters, [model], is_watched=True):
        yield


@contextmanager
def state_kept(model: nn.Module) -> Iterator[None]:
    """Put back all that a model holds, as after a forward that counts its calls; random states go on."""
    with _put_back_after(_write_down_all, [model], is_watched=True):
        yield


@contextmanager
def lent(model: nn.Module) -> Iterator[None]:
    """Lend a network to a user's function: what it does to the network, such as to train it, is put back."""
    with left_alone(model), users_code(), turn_lent():
        yield


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


def leaves_models_alone(function: Callable[_Given, _Made], *, as_compiled: bool = False) -> Callable[_Given, _Made]:
    """Let a public function leave all models among its arguments as they were, in lists and mappings too.

    Where memory is short it raises a DataError, unless `in_smaller_batches` around it starts again with fewer samples.
    ``as_compiled``: see `left_alone`.
    """

    @functools.wraps(function)
    def run(*args: _Given.args, **kwargs: _Given.kwargs) -> _Made:
        models: list[Any] = []
        for given in (*args, *kwargs.values()):
            if isinstance(given, Mapping):
                models += given.values()
            elif isinstance(given, (list, tuple)):
                models += given
            else:
                models.append(given)
        try:
            with left_alone(*models, as_compiled=as_compiled):
                return function(*args, **kwargs)
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


def _write_down_all(models: Iterable[Any], put_back: list[_PutBack], values: ParameterValues) -> None:
    """Append to a list what puts back all that models hold; what isn't a module has nothing to put back."""
    seen: dict[int, Any] = {}
    for model in models:
        if isinstance(model, nn.Module):
            _write_down(model, put_back, seen, values)


def _write_down_parameters(models: Iterable[nn.Module], put_back: list[_PutBack], values: ParameterValues) -> None:
    """Append to a list what puts back the parameters of models alone."""
    for model in models:
        for parameter in model.parameters():
            _add_tensor(parameter, put_back, values)


def _write_down(model: nn.Module, put_back: list[_PutBack], seen: dict[int, Any], values: ParameterValues) -> None:
    """Append to a list what puts back all that can be reached from a model; ``seen`` keeps ids from being reused.

    The parameters among it are noted in ``values``.
    """
    waiting: list[Any] = [model]
    # Most tables of a module are empty, those of its hooks above all: one function puts all of these back.
    empty: list[dict[Any, Any]] = []
    while waiting:
        value = waiting.pop()
        if type(value) in _PLAIN or id(value) in seen:
            continue
        if type(value) in _TABLES and not value:
            seen[id(value)] = value
            empty.append(value)
            continue
        if isinstance(value, _OTHERS):
            continue
        seen[id(value)] = value
        if isinstance(value, Tensor):
            waiting += _add_tensor(value, put_back, values)
        elif isinstance(value, nn.Module):
            waiting += _add_module(value, put_back, seen, values)
        elif isinstance(value, dict):
            put_back.append(functools.partial(_put_tables, [(value, dict(value))]))
            waiting += value.values()
        elif isinstance(value, (list, deque)):
            put_back.append(functools.partial(_put_items, value, list(value)))
            waiting += value
        elif isinstance(value, set):
            put_back.append(functools.partial(_put_members, value, set(value)))
        elif isinstance(value, (array, bytearray)):
            put_back.append(functools.partial(_put_numbers, value, value[:]))
        elif isinstance(value, tuple):
            waiting += value
        elif isinstance(value, np.ndarray):
            if not value.dtype.hasobject:
                put_back.append(functools.partial(_put_entries, value, value.copy()))
        elif isinstance(value, torch.Generator):
            put_back.append(functools.partial(value.set_state, value.get_state()))
        elif isinstance(value, random.Random):
            put_back.append(functools.partial(value.setstate, value.getstate()))
        elif isinstance(value, np.random.Generator):
            put_back.append(functools.partial(setattr, value.bit_generator, "state", value.bit_generator.state))
        elif isinstance(value, MethodType):
            waiting.append(value.__self__)
        elif isinstance(value, functools.partial):
            waiting += (value.func, value.args, value.keywords)
        elif _is_copied_by_attributes(type(value)):
            if hasattr(value, "__dict__"):
                put_back.append(functools.partial(_put_tables, [(vars(value), dict(vars(value)))]))
                waiting += vars(value).values()
            for name in _slots(type(value)):
                if hasattr(value, name):
                    put_back.append(functools.partial(object.__setattr__, value, name, getattr(value, name)))
                    waiting.append(getattr(value, name))
    put_back.append(functools.partial(_put_tables, [(table, {}) for table in empty]))


def _add_module(
    module: nn.Module, put_back: list[_PutBack], seen: dict[int, Any], values: ParameterValues
) -> list[Any]:
    """Append what puts a module's own tables back; return what they hold."""
    if isinstance(module, torch.jit.ScriptModule):  # whose tables aren't Python's, so that no forward changes them
        put_back.append(functools.partial(put_mode, module, module.training))
        for parameter in module.parameters(recurse=False):
            _add_tensor(parameter, put_back, values)
            values.copy(parameter)  # what TorchScript does can't be watched
        return [*module.buffers(recurse=False), *module.children()]
    targets = _targets(module)
    wrapper = module._modules.get("_nni_wrapper")
    for parameter in () if wrapper is None else wrapper.parameters(recurse=False):
        if type(parameter) is nn.Parameter and not parameter.is_meta:
            values.note(parameter, parameter.detach())  # a layer may hold its memory before it first runs
    held: list[Any] = []
    tables = [(table, dict(table)) for table in (vars(module), module._parameters, module._buffers, module._modules)]
    put_back.append(functools.partial(_put_tables, tables, module, targets))
    for table, entries in tables:
        seen[id(table)] = table
        for name, value in entries.items():
            # What NNI has put in the place of a target is what the wrapped layer computes with, new at each call.
            if type(value) in _PLAIN or name in targets or name in _WRAPPING:
                continue
            # Asked first whether it is a tensor: to ask for a parameter takes long, a function of Python's answers.
            if isinstance(value, Tensor) and isinstance(value, nn.Parameter) and id(value) not in seen:
                seen[id(value)] = value
                held += _add_tensor(value, put_back, values)
            else:
                held.append(value)
    return held


def _targets(module: nn.Module) -> frozenset[str]:
    """Name the attributes of a module in whose place a wrapper puts others."""
    wrapper = module._modules.get("_nni_wrapper")
    return frozenset(() if wrapper is None else wrapper.pruning_target_spaces)  # type: ignore[arg-type]


def _put_tables(
    tables: list[tuple[dict[Any, Any], dict[Any, Any]]],
    module: nn.Module | None = None,
    targets: frozenset[str] = frozenset(),
) -> None:
    """Put back the entries of tables, in their order, from copies of these.

    In the tables of a module what wraps it stays as it is; ``targets`` are those of its wrapper when they were copied.
    """
    for table, before in tables:
        if not table and not before:
            continue
        # A model has thousands of entries, of which hardly any changes: no loop of Python's goes over these.
        same_names = len(table) == len(before) and all(map(is_, before, table))
        if same_names and all(map(is_, before.values(), table.values())):
            continue
        untouched = frozenset[str]() if module is None else _WRAPPING | targets | _targets(module)
        now = dict(table)
        wanted = {}
        for key, value in before.items():
            if key not in untouched:
                wanted[key] = value
            elif key in now:
                wanted[key] = now[key]
        for key in now:
            if key in untouched:
                wanted.setdefault(key, now[key])
        # A subclass may do more than to hold what it is given.
        kind: Any = OrderedDict if isinstance(table, OrderedDict) else dict
        kind.clear(table)
        for key, value in wanted.items():
            kind.__setitem__(table, key, value)


def _put_items(items: list[Any] | deque[Any], before: list[Any]) -> None:
    if len(items) != len(before) or any(new is not old for new, old in zip(items, before, strict=True)):
        items.clear()
        items.extend(before)


def _put_members(members: set[Any], before: set[Any]) -> None:
    if members != before:
        members.clear()
        members.update(before)


def _put_numbers(numbers: array[Any] | bytearray, before: array[Any] | bytearray) -> None:
    if numbers != before or len(numbers) != len(before):
        numbers[:] = before  # type: ignore[assignment]


def _put_entries(array: np.ndarray[Any, Any], before: np.ndarray[Any, Any]) -> None:
    if array.tobytes() != before.tobytes():
        np.copyto(array, before)


def _add_tensor(tensor: Tensor, put_back: list[_PutBack], values: ParameterValues) -> Iterable[Any]:
    """Append what puts a tensor back: values, gradient, memory, attributes; return what these hold.

    The values of a parameter are those that are noted in ``values``.
    """
    if is_transformed(tensor) or not tensor.is_leaf or is_lazy(tensor):
        return ()  # of use within torch.vmap alone, computed anew, or nothing yet
    gradient, needs, memory = tensor.grad, tensor.requires_grad, tensor.detach()
    is_usual = type(tensor) in (Tensor, nn.Parameter, nn.Buffer) and tensor.layout == torch.strided
    has_values = is_usual and not tensor.is_meta
    clone = memory.clone() if has_values and not isinstance(tensor, nn.Parameter) else None
    if has_values and clone is None:
        values.note(tensor, memory)
    attributes = dict(vars(tensor)) if is_usual else {}

    def put() -> None:
        if has_values and (tensor.dtype is not memory.dtype or not tensor.is_set_to(memory)):
            tensor.data = memory
        if clone is not None and not torch.equal(memory, clone):
            with torch.inference_mode(memory.is_inference()):
                memory.copy_(clone)
        if tensor.requires_grad != needs:
            tensor.requires_grad_(needs)
        if tensor.grad is not gradient:
            tensor.grad = gradient
        if is_usual and (attributes or vars(tensor)):
            _put_tables([(vars(tensor), attributes)])

    put_back.append(put)
    if gradient is not None:
        tensor.grad = None  # so that none is added to it
    return attributes.values()


def _is_copied_by_attributes(kind: type) -> bool:
    """Tell whether deepcopy copies objects of a class attribute by attribute; what says itself how holds itself."""
    own: Any = kind
    usual = own.__reduce_ex__ is object.__reduce_ex__ and own.__reduce__ is object.__reduce__
    return usual and not hasattr(kind, "__deepcopy__")


def _slots(kind: type) -> Iterator[str]:
    for each in kind.__mro__:
        slots = vars(each).get("__slots__", ())
        names = (slots,) if isinstance(slots, str) else slots
        yield from (name for name in names if name not in ("__dict__", "__weakref__") and not name.startswith("__"))


def has_compiled(model: nn.Module) -> bool:
    """Tell whether ``torch.compile`` or ``compile()`` of a module has compiled a model, a part of it or a forward."""
    # The class is known by its name alone, for importing it takes long.
    return any(
        each._compiled_call_impl is not None
        or type(each).__name__ == "OptimizedModule"
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
