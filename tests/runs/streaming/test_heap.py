"""What the C library does with memory that is free."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

_HAS_GLIBC = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallinfo2")
pytestmark = pytest.mark.skipif(not _HAS_GLIBC, reason="needs glibc 2.33 or later")

# In a process of its own: where the heap has a hole, a tensor fits into it whatever the threshold.
_PROGRAM = """
import contextlib
import ctypes

import torch

from nni_topo.runs.streaming.heap import freed_at_once

MIB = 2**20


class Counts(ctypes.Structure):  # what mallinfo2 returns
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]


def own_pages():
    count = ctypes.CDLL(None).mallinfo2
    count.restype = Counts
    return count().hblks


def has_own_pages(nbytes):
    before = own_pages()
    tensor = torch.empty(nbytes, dtype=torch.uint8)
    after = own_pages()
    del tensor
    return after > before


torch.empty(31 * MIB, dtype=torch.uint8)  # freed: glibc keeps what is smaller from here on
sizes = (MIB // 4, 4 * MIB, 40 * MIB)
filling = [torch.empty(4 * MIB, dtype=torch.uint8) for _ in range(32)]  # the holes that imports have left
print(*map(has_own_pages, sizes))
with freed_at_once():  # a larger one: what was freed above may be a hole by now
    print(*map(has_own_pages, (MIB // 4, 5 * MIB, 40 * MIB)))
print(*map(has_own_pages, sizes))
with contextlib.suppress(KeyError), freed_at_once():
    raise KeyError
print(*map(has_own_pages, sizes))
"""


def said(**environment: str) -> list[str]:
    """Return whether a quarter MiB, 4 and 40 MiB have pages of their own: before, within, after, after an error."""
    run = subprocess.run(
        [sys.executable, "-c", _PROGRAM], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return run.stdout.splitlines()


@pytest.mark.slow
def test_large_tensors_get_pages_of_their_own_for_a_while() -> None:
    kept = "False False True"
    assert said() == [kept, "False True True", kept, kept]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value"),
    [("MALLOC_MMAP_THRESHOLD_", str(2**24)), ("GLIBC_TUNABLES", f"glibc.malloc.mmap_threshold={2**24}")],
)
def test_a_threshold_of_the_user_stays(name: str, value: str) -> None:
    assert said(**{name: value}) == ["False False True"] * 4
