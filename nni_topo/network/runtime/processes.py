"""Processes that share calibration data: they add up their sums and take the same steps.

The processes are those of a ``torch.distributed`` group, which the caller starts and hands to
:class:`nni_topo.Calibration`. As with all collective operations of PyTorch, the others wait for a process that has
failed until its connection is closed, or until the group's timeout; a launcher such as ``torchrun`` ends them before.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nni_topo.context import called_as, context, in_context
from nni_topo.errors import ConfigError, ProcessError

_Given = ParamSpec("_Given")
_Made = TypeVar("_Made")

_PLAIN = (bool, int, float, str, type(None))


class Processes:
    """The processes of a group, as one of them sees them.

    ``place`` says how far this process has come. A method raises ProcessError if another process is gone.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def gather(self, value: Any, place: str) -> list[Any]:
        """Return what each process has, by rank; it is pickled on the way."""
        found: list[Any] = [None] * self.size
        with self._reaching(place):
            dist.all_gather_object(found, value, group=self.group)
        return found

    def add(self, tensors: Sequence[Tensor], place: str) -> None:
        """Replace tensors by their sums over all processes."""
        for tensor in tensors:
            self._collect(lambda buffer: dist.all_reduce(buffer, group=self.group), tensor, place)

    def total(self, tensor: Tensor | None, device: torch.device, place: str) -> Tensor | None:
        """Return the sum of the tensors of all processes, of which some may have none; None if none has any."""
        shapes = [shape for shape in self.gather(None if tensor is None else tuple(tensor.shape), place) if shape]
        if not shapes:
            return None
        found = torch.zeros(shapes[0], dtype=torch.float64, device=device) if tensor is None else tensor.clone()
        self.add([found], place)
        return found

    def first(self, value: _Made, place: str) -> _Made:
        """Return the value of the first process, of tensors on the CPU; it is pickled on the way."""
        found: _Made = self.gather(value if self.rank == 0 else None, place)[0]
        return found

    def agree(self, tensors: Sequence[Tensor], place: str) -> None:
        """Replace tensors by those of the first process, which have the same shapes.

        Equal sums can lead to different last digits on processors of different kinds.
        """
        first = dist.get_global_rank(self.group, 0)
        for tensor in tensors:
            self._collect(lambda buffer: dist.broadcast(buffer, src=first, group=self.group), tensor, place)

    @contextmanager
    def in_step(self, place: str, given: Mapping[str, Any] | None = None) -> Iterator[None]:
        """Mark a block that all processes run; what is ``given`` has to be equal in all. Nested blocks do nothing."""
        if is_in_step():
            yield
            return
        with in_context(in_step=place):
            found = self.gather(given, place)
            if any(each != found[0] for each in found):
                names = dict.fromkeys(name for each in found for name in each)
                unequal = [name for name in names if any(each.get(name) != found[0].get(name) for each in found)]
                raise ConfigError(
                    f"models, masks and knobs must be equal in all processes, got different ones: {', '.join(unequal)} "
                    f"({place})"
                )
            yield

    def _collect(self, work: Callable[[Tensor], object], tensor: Tensor, place: str) -> None:
        """Run a collective operation on a tensor, in place."""
        # NCCL connects GPUs alone
        device = torch.device("cuda") if dist.get_backend(self.group) == "nccl" else tensor.device
        buffer = tensor.detach().to(device).contiguous()
        with self._reaching(place):
            work(buffer)
        if buffer is not tensor:
            tensor.detach().copy_(buffer)

    @contextmanager
    def _reaching(self, place: str) -> Iterator[None]:
        """Raise ProcessError if a collective operation ends because a process is gone or has waited too long."""
        try:
            yield
        except RuntimeError as error:
            verb = context().in_step
            at = f"{place}, {verb}" if verb and verb not in place else place
            raise ProcessError(
                f"all {self.size} processes must reach the same place, but one has ended, or didn't answer within the "
                f"group's timeout; its own output says why ({at})"
            ) from error


def processes_of(group: Any, place: str) -> Processes | None:
    """Return the processes of a group; None without a group, or where this process is the only one."""
    if group is None:
        return None
    is_known = dist.is_available() and dist.is_initialized() and isinstance(group, dist.ProcessGroup)
    if not is_known or dist.get_rank(group) < 0:
        raise ConfigError(
            "process_group must be a group of torch.distributed that this process belongs to, such as "
            f"torch.distributed.group.WORLD, or None, got {type(group).__name__} ({place})"
        )
    return Processes(group) if dist.get_world_size(group) > 1 else None


def gathered(processes: Processes | None, value: Any, place: str) -> list[Any]:
    """Return what each process has, by rank; of a process that shares nothing, its own value alone."""
    return [value] if processes is None else processes.gather(value, place)


def is_in_step() -> bool:
    """Say whether other processes take the same steps now."""
    return bool(context().in_step)


def in_step(function: Callable[_Given, _Made]) -> Callable[_Given, _Made]:
    """Check that the processes that share a public function's calibration data give it the same arguments.

    Without shared calibration data among its arguments it is the function as it was. Models, masks, names, entries of a
    config_list, settings and plain knobs among the arguments have to be equal in all processes; a ``device`` is each
    one's own.
    """
    place = function.__qualname__.removesuffix(".__init__")
    parameters = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def run(*args: _Given.args, **kwargs: _Given.kwargs) -> _Made:
        # Of functions that take any number of arguments, those that have no name of their own go by their number.
        names = [*parameters[: len(args)], *map(str, range(len(parameters), len(args)))]
        named = {**dict(zip(names, args, strict=True)), **kwargs}
        named.pop("device", None)
        found = [getattr(value, "processes", None) for value in named.values()]
        shared = [each for each in found if isinstance(each, Processes)]
        if not shared or is_in_step():
            return function(*args, **kwargs)
        compared = {name: told for name, value in named.items() if (told := _compared(value)) is not None}
        with shared[0].in_step(called_as(place), compared):
            return function(*args, **kwargs)

    return run


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return a hexadecimal SHA-256 digest of named tensors: names, shapes and values in single precision."""
    found = hashlib.sha256()
    for name, tensor in tensors:
        found.update(f"{name} {tuple(tensor.shape)}".encode())
        # one type, so that equal masks have one digest whatever they were made of
        found.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return found.hexdigest()


def _compared(value: Any) -> Any:
    """Return what of an argument has to be equal in all processes; None if nothing has, or it can't be compared."""
    if isinstance(value, nn.Module):
        return digest((name, each) for name, each in value.state_dict().items() if isinstance(each, Tensor))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):  # a budget, or a recovery method
        value = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        found = {}
        for name, each in value.items():
            found[name] = digest([("", each)]) if isinstance(each, Tensor) else _compared(each)
        return found
    if isinstance(value, (list, tuple)):
        # Names of blocks, or the entries of a config_list. Batches are each process's own.
        batches = [
            isinstance(each, Mapping) and any(isinstance(one, Tensor) for one in each.values()) for each in value
        ]
        return [_compared(each) for each, is_batch in zip(value, batches, strict=True) if not is_batch]
    return repr(value) if isinstance(value, _PLAIN) else None


def _is_batch(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(each, Tensor) for each in value.values())
