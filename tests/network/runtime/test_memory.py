"""What the C library does with memory that is free."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest
import torch

from nni_topo.network.runtime import freed_at_once

_MIB = 2**20
_FIELDS = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class _Counts(ctypes.Structure):
    """What ``mallinfo2`` of glibc returns."""

    _fields_ = [(name, ctypes.c_size_t) for name in _FIELDS]


def _own_pages() -> int:
    """Return how many allocations have pages of their own."""
    count = ctypes.CDLL(None).mallinfo2
    count.restype = _Counts
    return int(count().hblks)


def _has_own_pages(nbytes: int) -> bool:
    """Say whether a tensor of so many bytes gets pages of its own."""
    before = _own_pages()
    tensor = torch.empty(nbytes, dtype=torch.uint8)
    after = _own_pages()
    del tensor
    return after > before


_HAS_GLIBC = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallinfo2")
_on_glibc = pytest.mark.skipif(not _HAS_GLIBC, reason="needs glibc 2.33 or later")


@_on_glibc
def test_large_tensors_get_pages_of_their_own_for_a_while() -> None:
    torch.empty(32 * _MIB - 1, dtype=torch.uint8)  # freed: glibc keeps what is smaller from here on
    with freed_at_once():
        assert _has_own_pages(4 * _MIB)
        assert not _has_own_pages(_MIB // 4)
    assert not _has_own_pages(4 * _MIB)
    assert _has_own_pages(40 * _MIB)


@_on_glibc
def test_thresholds_are_put_back_after_an_error() -> None:
    with pytest.raises(KeyError), freed_at_once():
        raise KeyError
    assert not _has_own_pages(4 * _MIB)


_IN_A_PROCESS = """
import sys
import torch
from nni_topo.network.runtime import freed_at_once
sys.path.insert(0, sys.argv[1])
from test_memory import _has_own_pages
torch.empty(2**25 - 1, dtype=torch.uint8)
with freed_at_once():
    print(_has_own_pages(2**22))
print(_has_own_pages(2**22))
"""


@_on_glibc
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value"),
    [("MALLOC_MMAP_THRESHOLD_", str(2**24)), ("GLIBC_TUNABLES", f"glibc.malloc.mmap_threshold={2**24}")],
)
def test_a_threshold_of_the_user_stays(name: str, value: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", _IN_A_PROCESS, os.path.dirname(__file__)],
        env={**os.environ, name: value},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split() == ["False", "False"]
