"""Processes that share calibration data: they add up their sums and take the same steps.

The processes form a ``torch.distributed`` group, which the caller starts and passes to :class:`nni_topo.Calibration`.
As with all collective operations of PyTorch, if a process fails the others wait until its connection is closed, or for
the group's timeout; a launcher such as ``torchrun`` ends them earlier.
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
    """A group of processes, in one of them; ``place`` names the step in errors, ProcessError if another has ended."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def gather(self, value: Any, place: str) -> list[Any]:
        """Return the values of all processes, by rank; they are pickled."""
        found: list[Any] = [None] * self.size
        with self._reaching(place):
            dist.all_gather_object(found, value, group=self.group)
        return found

    def add(self, tensors: Sequence[Tensor], place: str) -> None:
        """Replace tensors by their sums over all processes."""
        for tensor in tensors:
            self._collect(lambda buffer: dist.all_reduce(buffer, group=self.group), tensor, place)

    def total(self, tensor: Tensor | None, device: torch.device, place: str) -> Tensor | None:
        """Return the sum of the tensors of all processes, some of which may have none; None if no process has one."""
        shapes = [shape for shape in self.gather(None if tensor is None else tuple(tensor.shape), place) if shape]
        if not shapes:
            return None
        found = torch.zeros(shapes[0], dtype=torch.float64, device=device) if tensor is None else tensor.clone()
        self.add([found], place)
        return found

    def first(self, value: _Made, place: str) -> _Made:
        """Return the value of the first process, with tensors on the CPU; it is pickled."""
        found: _Made = self.gather(value if self.rank == 0 else None, place)[0]
        return found

    def agree(self, tensors: Sequence[Tensor], place: str) -> None:
        """Replace tensors by those of the first process: other processors round in another way."""
        first = dist.get_global_rank(self.group, 0)
        for tensor in tensors:
            self._collect(lambda buffer: dist.broadcast(buffer, src=first, group=self.group), tensor, place)

    @contextmanager
    def in_step(self, place: str, given: Mapping[str, Any] | None = None) -> Iterator[None]:
        """Run code in all processes; ``given`` must be equal in all. Nested blocks do nothing."""
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
        # NCCL takes tensors on GPUs only
        device = torch.device("cuda") if dist.get_backend(self.group) == "nccl" else tensor.device
        buffer = tensor.detach().to(device).contiguous()
        with self._reaching(place):
            work(buffer)
        if buffer is not tensor:
            tensor.detach().copy_(buffer)

    @contextmanager
    def _reaching(self, place: str) -> Iterator[None]:
        """Raise ProcessError if a collective operation fails because a process has ended or the timeout is over."""
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
    """Return the processes of a group; None without a group, or if this is the only process."""
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
    """Return the values of all processes, by rank; without processes, the value alone."""
    return [value] if processes is None else processes.gather(value, place)


def is_in_step() -> bool:
    """Return whether other processes run the same public function now."""
    return bool(context().in_step)


def in_step(function: Callable[_Given, _Made]) -> Callable[_Given, _Made]:
    """Check that processes that share calibration data call a public function with equal arguments.

    Compared are models, masks, names, entries of a config_list, settings and plain knobs; a ``device`` may differ.
    Without shared calibration data among the arguments nothing is compared.
    """
    place = function.__qualname__.removesuffix(".__init__")
    parameters = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def run(*args: _Given.args, **kwargs: _Given.kwargs) -> _Made:
        # Arguments without a name are numbered.
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
        # one type, so that equal masks of different types have equal digests
        found.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return found.hexdigest()


def _compared(value: Any) -> Any:
    """Return what must be equal in all processes of an argument; None if nothing must, or it can't be compared."""
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
        # Names of blocks, or the entries of a config_list. Batches differ.
        return [_compared(each) for each in value if not _is_batch(each)]
    return repr(value) if isinstance(value, _PLAIN) else None


def _is_batch(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(each, Tensor) for each in value.values())
