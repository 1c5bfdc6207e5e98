"""Small files in the formats of the real data sets."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest


def idx_bytes(array: np.ndarray) -> bytes:
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def idx_folder(tmp_path: Path) -> Callable[..., Path]:
    """Write the four files of MNIST: 60 training and 20 test images of 28x28, ten classes in turn."""

    def write(place: str = "data", packed: bool = False) -> Path:
        folder = tmp_path / place
        folder.mkdir(parents=True)
        generator = np.random.default_rng(0)
        for prefix, count in (("train", 60), ("t10k", 20)):
            images = generator.integers(0, 256, (count, 28, 28))
            for stem, array in (("images-idx3", images), ("labels-idx1", np.arange(count) % 10)):
                content = idx_bytes(array)
                name = f"{prefix}-{stem}-ubyte" + (".gz" if packed else "")
                (folder / name).write_bytes(gzip.compress(content) if packed else content)
        return folder

    return write


@pytest.fixture
def npz_file(tmp_path: Path) -> Callable[..., Path]:
    """Write an .npz of 40 training and 10 test images of 3x6x6, four classes in turn."""

    def write(**replaced: np.ndarray | None) -> Path:
        generator = np.random.default_rng(0)
        arrays = {
            "x_train": generator.integers(0, 256, (40, 6, 6, 3), dtype=np.uint8),
            "y_train": np.arange(40) % 4,
            "x_test": generator.integers(0, 256, (10, 6, 6, 3), dtype=np.uint8),
            "y_test": np.arange(10) % 4,
        } | replaced
        path = tmp_path / "own.npz"
        np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
        return path

    return write
