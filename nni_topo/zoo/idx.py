"""The idx files of MNIST and Fashion-MNIST, plain or gzipped.

An idx file opens with two zero bytes, the code of the element type, the number of axes, and the length of
each axis as a big-endian 32-bit integer; the elements follow. Here the elements are unsigned bytes (code 8).

Source: Y. LeCun, C. Cortes and C. Burges, "The MNIST database of handwritten digits", section "The idx file format"
"""

from __future__ import annotations

import gzip
import math
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nni_topo.disk import reading
from nni_topo.errors import DataError

_UNSIGNED_BYTE = 8


def read_idx(path: Path, axes: int) -> npt.NDArray[np.uint8]:
    """Read one idx file of unsigned bytes with so many axes, gzipped if it ends with ``.gz``; DataError if damaged."""
    content = _content(path)
    header = 4 + 4 * axes
    expected = bytes((0, 0, _UNSIGNED_BYTE, axes))
    if len(content) < header:
        raise DataError(f"an idx file must hold at least {header} bytes, got {len(content)} ({path})")
    if content[:4] != expected:
        raise DataError(f"the magic number must be {expected.hex()}, got {content[:4].hex()} ({path})")
    shape = struct.unpack(f">{axes}I", content[4:header])
    size = header + math.prod(shape)
    if len(content) != size:
        raise DataError(f"an idx file of shape {shape} must hold {size} bytes, got {len(content)} ({path})")
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)


def find_idx(folder: Path, stem: str) -> Path:
    """Find an idx file, e.g. ``train-images-idx3-ubyte``, in the folder, its ``raw`` or ``*/raw``; else DataError."""
    # Also with a dot before ``idx`` and gzipped; ``*/raw`` is how torchvision lays the files out.
    names = [name + suffix for name in (stem, stem.replace("-idx", ".idx")) for suffix in ("", ".gz")]
    for place in (folder, folder / "raw", *sorted(folder.glob("*/raw"))):
        for name in names:
            if (place / name).is_file():
                return place / name
    raise DataError(f"the folder must hold {stem} or {stem}.gz, got none ({folder})")


def _content(path: Path) -> bytes:
    with reading(path, "an idx file"):
        packed = path.read_bytes()
        return gzip.decompress(packed) if path.suffix == ".gz" else packed
