"""Free memory."""

from __future__ import annotations

import gc
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from nni_topo.errors import DataError

_SMALL = 2**26  # bytes up to which nothing is checked
_LARGE = 2**26  # parameters from which a model's graphs are freed at once


def free_memory() -> int:
    """Return the bytes that this process can allocate: the least of machine, control group and process limit."""
    import psutil

    free: list[int] = [psutil.virtual_memory().available]
    with suppress(OSError, ValueError, KeyError):  # only Linux has control groups, and few have a limit
        group = Path("/sys/fs/cgroup")
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free.append(int((group / "memory.max").read_text()) - int(statistics["anon"]))
    with suppress(ImportError):  # Windows has no such limits
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            free.append(limit - psutil.Process().memory_info().vms)
    return max(0, min(free))


def check_memory(needed: float, subject: str, cure: str, place: str, free: int | None = None) -> None:
    """Raise DataError with a ``cure`` unless ``needed`` bytes are free; ``free`` defaults to `free_memory`."""
    if needed <= _SMALL:
        return
    if free is None:
        free = free_memory()
    if needed > free:
        got = f"{needed / 2**30:.2f} GiB for {free / 2**30:.2f} GiB that are free"
        raise DataError(f"{subject} must fit into memory, got {got}: {cure} ({place})")


def free_memory_of(device: torch.device) -> int:
    """Return the bytes that this process can allocate on a device; what PyTorch caches on a GPU isn't free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_memory()


def give_back_memory(model: nn.Module) -> None:
    """Free the traced graphs of a large model, which are reference cycles."""
    if sum(parameter.numel() for parameter in model.parameters()) >= _LARGE:
        gc.collect()
