"""Values of parameters, copied before something writes to them, and put back afterwards."""

from __future__ import annotations

import logging
import threading
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn, overrides
from torch._ops import OpOverload, OpOverloadPacket
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from nni_topo.errors import listed
from nni_topo.network.runtime.memory import free_memory_of

_logger = logging.getLogger(__name__)

_SHARE = 0.25  # of the free memory that copies of parameters may take
_SMALL = 2**20  # bytes of a copy for which nobody asks how much memory is free

_IN_PLACE = frozenset(
    f"__{name}__"
    for name in (
        *("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow"),
        *("iand", "ior", "ixor", "ilshift", "irshift"),
    )
)
# Ends like an operation in place, and leaves the values as they are.
_NOT_IN_PLACE = frozenset({"requires_grad_", "share_memory_", "detach_", "rename_"})
_HANDED_OUT = frozenset({"numpy", "__array__", "__dlpack__"})  # the memory itself, to libraries that may write to it


@dataclass(eq=False)
class _Memory:
    """The memory of one or several parameters, and a copy of it once something writes to it."""

    start: int
    storage: torch.UntypedStorage
    device: torch.device
    parameters: list[tuple[Tensor, int]] = field(default_factory=list)  # with their versions
    copy: Tensor | None = None


class ParameterValues:
    """Values of parameters when a block begins: they are copied when something writes to them, and put back.

    A copy of all would take as long as a dry run of the model does. So the operations of forwards are watched, and what
    one is about to write to is copied first, by memory: it may be reached through ``.data``, a view or another name.

    Not seen is what goes past PyTorch's functions, such as a kernel that takes an address, and not copied what doesn't
    fit into a quarter of the free memory. Of these a warning names the parameters where their version says that they
    were written to.
    """

    def __init__(self) -> None:
        self._memories: dict[int, _Memory] = {}
        self._starts: list[int] | None = None
        self._ids = set[int]()
        self._copied: dict[torch.device, int] = {}

    def __len__(self) -> int:
        return len(self._memories)

    def note(self, parameter: Tensor, memory: Tensor) -> None:
        """Add a parameter; ``memory`` is the same without gradients."""
        self._ids.add(id(parameter))
        storage = memory.untyped_storage()
        start = storage.data_ptr()
        if start == 0:  # of no entries, or without memory of its own
            return
        if start not in self._memories:
            self._memories[start] = _Memory(start, storage, memory.device)
            self._starts = None
        self._memories[start].parameters.append((parameter, _version(parameter)))

    def holds(self, parameter: Tensor) -> bool:
        """Tell whether a tensor is one of the parameters."""
        return id(parameter) in self._ids

    def copy(self, tensor: Tensor) -> bool:
        """Copy the memory at which a tensor looks, if it is a parameter's; return whether it is."""
        if self._starts is None:
            self._starts = sorted(self._memories)
        try:
            address = tensor.data_ptr()
        except RuntimeError:  # without memory, as what PyTorch traces
            return False
        place = bisect_right(self._starts, address) - 1
        if place < 0:
            return False
        found = self._memories[self._starts[place]]
        if address >= found.start + found.storage.nbytes() or found.device != tensor.device:
            return False
        self._copy(found)
        return True

    def copy_all(self) -> None:
        """Copy everything now, for a block that mustn't be watched."""
        for each in self._memories.values():
            self._copy(each)

    def _copy(self, memory: _Memory) -> None:
        # What something has written to already, unseen, isn't what it was: it would be put back wrongly.
        if memory.copy is not None or any(_version(each) != version for each, version in memory.parameters):
            return
        size, copied = memory.storage.nbytes(), self._copied.get(memory.device, 0)
        if size > _SMALL and copied + size > _SHARE * (free_memory_of(memory.device) + copied):
            return
        memory.copy = _as_numbers(memory).clone()
        self._copied[memory.device] = copied + size

    def put_back(self, models: Iterable[Any]) -> list[Tensor]:
        """Put back what has changed, warn of what can't be; return the parameters that were written to."""
        written: list[Tensor] = []
        lost: list[Tensor] = []
        for memory in self._memories.values():
            if memory.copy is None:
                lost += [each for each, version in memory.parameters if _version(each) != version]
                continue
            # Memory that was taken away, as a sharded model's is, has nothing to put back.
            if memory.storage.data_ptr() != memory.start or memory.storage.nbytes() != memory.copy.nbytes:
                continue
            now = _as_numbers(memory)
            if not torch.equal(now, memory.copy):
                now.copy_(memory.copy)
            written += [each for each, _ in memory.parameters]
        if lost:
            _logger.warning(
                "parameters that a forward writes to must fit into a quarter of the free memory, and be written to by "
                "functions of PyTorch, to be put back: these keep their new values: %s",
                listed(_names(lost, models)),
            )
        return [*written, *lost]

    def take_versions(self, parameters: Iterable[Tensor]) -> None:
        """Take parameters for unwritten that a block within this one has put back, or has warned of."""
        ids = {id(each) for each in parameters}
        if ids:
            for memory in self._memories.values():
                memory.parameters = [
                    (each, _version(each) if id(each) in ids else version) for each, version in memory.parameters
                ]


def _as_numbers(memory: _Memory) -> Tensor:
    """Return the whole of a memory as integers: whatever numbers it holds, they are compared bit by bit."""
    numbers = torch.empty(0, dtype=torch.uint8, device=memory.device).set_(memory.storage)
    return numbers.view(torch.int64) if memory.storage.nbytes() % 8 == 0 else numbers


def _version(tensor: Tensor) -> int:
    try:
        return tensor._version
    except RuntimeError:  # a tensor of inference mode
        return 0


def _names(parameters: list[Tensor], models: Iterable[Any]) -> list[str]:
    wanted = {id(each) for each in parameters}
    found: dict[int, str] = {}
    for model in models:
        if isinstance(model, nn.Module):
            for name, each in model.named_parameters():
                if id(each) in wanted:
                    found.setdefault(id(each), name)
    return [found.get(id(each), "a parameter outside of the model's modules") for each in parameters]


class _Watch(TorchFunctionMode):
    """Lets the parameters of a thread's blocks be copied before an operation of a forward writes to them.

    Only forwards of modules that hold such parameters are watched. All else is the package's own code, which asks
    tensors for their shapes thousands of times; and networks that it trains, to which it may write.
    """

    def __init__(self, is_own: Callable[[], bool]) -> None:
        super().__init__()
        self._blocks: list[ParameterValues] = []
        self._is_own = is_own
        self._outermost: nn.Module | None = None  # whose forward is watched
        self._depth = 0  # of its calls
        self._hooks: list[RemovableHandle] = []
        self._is_holding = weakref.WeakKeyDictionary[nn.Module, bool]()

    @property
    def is_on(self) -> bool:
        """Whether operations are watched now."""
        return self in overrides._get_current_function_mode_stack()

    def add(self, values: ParameterValues) -> None:
        """Begin a block within all others."""
        self._blocks.append(values)
        self._is_holding.clear()

    def remove(self, values: ParameterValues, written: Iterable[Tensor]) -> None:
        """End a block that has put back the parameters that were written to."""
        self._blocks.remove(values)
        self._is_holding.clear()
        for each in self._blocks:
            each.take_versions(written)

    @contextmanager
    def of_forwards(self) -> Iterator[None]:
        """Watch the forwards of modules that hold parameters of the blocks."""
        self._see_forwards()
        try:
            yield
        finally:
            self._see_none()
            # An interruption calls no hooks.
            while self.is_on:
                overrides._pop_mode()

    @contextmanager
    def of_everything(self) -> Iterator[None]:
        """Watch all operations for a while."""
        if self.is_on:
            yield
            return
        self._see_none()  # PyTorch warns who compiles a model while there are such hooks
        try:
            with self:
                yield
        finally:
            self._see_forwards()

    @contextmanager
    def of_nothing(self) -> Iterator[None]:
        """Watch nothing for a while; the other modes stay in their order."""
        modes = overrides._get_current_function_mode_stack()
        below = modes.index(self) if self in modes else len(modes)
        above = [overrides._pop_mode() for _ in modes[below:]][:-1]
        for each in reversed(above):
            overrides._push_mode(each)
        sees_forwards = bool(self._hooks)
        self._see_none()
        _threads.watch = None
        try:
            yield
        finally:
            _threads.watch = self
            if sees_forwards:
                self._see_forwards()
            if self in modes:
                above = [overrides._pop_mode() for _ in overrides._get_current_function_mode_stack()[below:]]
                for each in (self, *reversed(above)):
                    overrides._push_mode(each)

    def _see_forwards(self) -> None:
        self._hooks = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]

    def _see_none(self) -> None:
        for each in self._hooks:
            each.remove()
        self._hooks = []

    def _enter(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling() or getattr(_threads, "watch", None) is not self:
            return
        if self._outermost is not None:
            self._depth += module is self._outermost
            return
        holds = self._is_holding.get(module)
        if holds is None:
            holds = any(block.holds(each) for each in module.parameters() for block in self._blocks)
            self._is_holding[module] = holds
        if holds and not self.is_on:
            self._outermost, self._depth = module, 1
            self.__enter__()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if module is not self._outermost or getattr(_threads, "watch", None) is not self:
            return
        self._depth -= 1
        if self._depth == 0:
            self._outermost = None
            self.__exit__(None, None, None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given: Mapping[str, Any] = kwargs or {}
        if not torch.compiler.is_compiling():
            name = getattr(func, "__name__", "")
            if _is_in_place(name) or (given.get("inplace") is True):
                self._copy(args[:1] or tuple(given.values())[:1])
            elif given and (given.get("out") is not None or given.get("max_norm") is not None):
                self._copy((*args, given.get("out"), *given.values()))
            elif isinstance(func, (OpOverload, OpOverloadPacket)):
                if _writes(func):
                    self._copy((*args, *given.values()))
            elif name in _HANDED_OUT and not self._is_own():
                self._copy(args[:1])
        return func(*args, **given)

    def _copy(self, given: Any) -> None:
        for each in given:
            if isinstance(each, Tensor):
                # A block within another one puts back what it has copied, so that the other needs no copy.
                for block in reversed(self._blocks):
                    if block.copy(each):
                        break
            elif isinstance(each, (list, tuple)):
                self._copy(each)


@lru_cache(maxsize=4096)
def _is_in_place(name: str) -> bool:
    name = name.partition(".")[0]  # mul_.Tensor
    return name in _IN_PLACE or (name.endswith("_") and not name.endswith("__") and name not in _NOT_IN_PLACE)


def _writes(operation: Any) -> bool:
    """Tell whether an operation of a library says of an argument that it writes to it."""
    every = (
        [operation]
        if isinstance(operation, OpOverload)
        else [getattr(operation, name) for name in operation.overloads()]
    )
    return any(
        argument.alias_info is not None and argument.alias_info.is_write
        for each in every
        for argument in each._schema.arguments
    )


_threads = threading.local()


@contextmanager
def values_kept(
    values: ParameterValues, models: Iterable[Any], *, is_watched: bool, is_own: Callable[[], bool]
) -> Iterator[None]:
    """Put the values of parameters back after a block.

    Parameters
    ----------
    values : ParameterValues
        The parameters.
    models : iterable
        For their names.
    is_watched : bool
        False for a block whose time is measured, or that is compiled: everything is copied before.
    is_own : callable
        Tells of the code that called a function whether it is the package's, which writes to no memory.
    """
    watch: _Watch | None = getattr(_threads, "watch", None)
    with ExitStack() as stack:
        if not is_watched:
            values.copy_all()
            if watch is not None:
                stack.enter_context(watch.of_nothing())
        elif watch is None and len(values):
            watch = _threads.watch = _Watch(is_own)
            stack.callback(setattr, _threads, "watch", None)
            stack.enter_context(watch.of_forwards())
        if watch is not None:
            watch.add(values)
        try:
            yield
        finally:
            written = values.put_back(models)
            if watch is not None:
                watch.remove(values, written)


@contextmanager
def users_code() -> Iterator[None]:
    """Watch what a user's function does to parameters outside of forwards, too, as one that trains."""
    watch: _Watch | None = getattr(_threads, "watch", None)
    with nullcontext() if watch is None else watch.of_everything():
        yield
