"""Memory that is free, missing, or not yet given back to the system."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import nn

from nni_topo.errors import DataError, words_of

_SMALL = 2**26  # bytes that needn't be asked for
_LARGE = 2**26  # parameters of a model that is worth freeing at once

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of mallopt, as malloc.h of glibc numbers them
_PAGES_OF_THEIR_OWN = 2**20  # bytes of a tensor from which on it gets pages of its own
# glibc raises its threshold to the size of what is freed, up to this. A process that has freed a large tensor is there.
_HIGHEST_THRESHOLD = 2**25


def free_memory() -> int:
    """Return the bytes that this process can still take: of the machine, its control group and its own limit."""
    import psutil

    free: list[int] = [psutil.virtual_memory().available]
    with suppress(OSError, ValueError, KeyError):  # Linux alone has such groups, and few have a limit
        group = Path("/sys/fs/cgroup")
        held = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free.append(int((group / "memory.max").read_text()) - int(held["anon"]))
    with suppress(ImportError):  # Windows has no such limits
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            free.append(limit - psutil.Process().memory_info().vms)
    return max(0, min(free))


def check_memory(needed: float, what: str, cure: str, place: str, free: int | None = None) -> None:
    """Raise DataError with a cure where so many bytes aren't free, of the machine unless ``free`` says how many are."""
    if needed <= _SMALL:
        return
    free = free_memory() if free is None else free
    if needed > free:
        got = f"{needed / 2**30:.2f} GiB for {free / 2**30:.2f} GiB that are free"
        raise DataError(f"{what} must fit into memory, got {got}: {cure} ({place})")


def free_memory_of(device: torch.device) -> int:
    """Return the bytes that this process can take on a device; what PyTorch keeps of a GPU counts as taken."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()


def out_of_memory(error: Exception) -> bool:
    """Say whether an error means that memory is short; PyTorch's error for a CPU only says so in words."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in words_of(error)


def give_back_memory(model: nn.Module) -> None:
    """Free graphs of a traced large model, which refer to themselves, and the heap's free pages."""
    if sum(each.numel() for each in model.parameters()) >= _LARGE:
        gc.collect()
        trim_heap()


def trim_heap() -> None:
    """Give the heap's free pages back to the system where the C library keeps them, as glibc does."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # other C libraries have no malloc_trim
            ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def freed_at_once() -> Iterator[None]:
    """Let glibc give the memory of a tensor of 1 MiB or more back to the system as soon as it is freed.

    By itself it keeps that of tensors below 32 MiB, in pieces that no larger tensor fits into: the process grows.
    Nothing is done where the user has set a threshold in the environment.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    is_set = "MALLOC_MMAP_THRESHOLD_" in os.environ or "mmap_threshold" in tunables
    if is_set or not _set_threshold(_PAGES_OF_THEIR_OWN):
        yield
        return
    trim_heap()
    try:
        yield
    finally:
        _set_threshold(_HIGHEST_THRESHOLD)


def _set_threshold(nbytes: int) -> bool:
    """Let glibc take pages of their own for what has so many bytes or more; return whether the C library can."""
    if sys.platform != "linux":
        return False
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # other C libraries
        return False
    return bool(set_option(_MMAP_THRESHOLD, nbytes)) and bool(set_option(_TRIM_THRESHOLD, 2 * nbytes))
