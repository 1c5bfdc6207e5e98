"""Memory that is free and not yet given back to the system."""

from __future__ import annotations

import ctypes
import gc
import sys
from contextlib import suppress

from torch import nn

_LARGE = 2**20  # parameters of a model that is worth freeing at once


def give_back_memory(model: nn.Module) -> None:
    """Free graphs of a traced model, which refer to themselves, and give the heap's free pages back to the system.

    Nothing is done for a small ``model``: it would take longer than all else.
    """
    if sum(each.numel() for each in model.parameters()) >= _LARGE:
        gc.collect()
        trim_heap()


def trim_heap() -> None:
    """Give the heap's free pages back to the system where the C library keeps them, as glibc does."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # other C libraries have no malloc_trim
            ctypes.CDLL(None).malloc_trim(0)
