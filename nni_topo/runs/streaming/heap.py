"""Memory that glibc gives back to the system while a model is pruned block by block."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of mallopt, as malloc.h of glibc numbers them
_OWN_PAGES = 2**20  # bytes; tensors of this size or larger get pages of their own
# bytes; glibc raises its threshold up to this when larger memory is freed, and large tensors have been freed by then
_HIGHEST_THRESHOLD = 2**25


def give_back() -> None:
    """Free the graphs of traced blocks, which refer to themselves, and the heap's free pages."""
    gc.collect()
    if _has_glibc():
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def freed_at_once() -> Iterator[None]:
    """Let glibc return the memory of tensors of 1 MiB or more to the system as soon as it is freed.

    By default glibc keeps the memory of tensors below 32 MiB, in pieces too small for larger tensors, so that the
    process grows. If the user has set a threshold in the environment, this does nothing.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    is_set = "MALLOC_MMAP_THRESHOLD_" in os.environ or "mmap_threshold" in tunables
    if is_set or not _has_glibc():
        yield
        return
    _set_threshold(_OWN_PAGES)
    give_back()
    try:
        yield
    finally:
        _set_threshold(_HIGHEST_THRESHOLD)


def _has_glibc() -> bool:
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim")


def _set_threshold(nbytes: int) -> None:
    """Let glibc use separate pages for memory of ``nbytes`` or more."""
    set_option = ctypes.CDLL(None).mallopt
    set_option(_MMAP_THRESHOLD, nbytes)
    set_option(_TRIM_THRESHOLD, 2 * nbytes)
