"""Readers of data sets: each returns :class:`RawData` as stored, not yet normalised."""

from __future__ import annotations

import gzip
import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nni_topo.disk import reading
from nni_topo.errors import DataError

Array = npt.NDArray[Any]

_NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test")
_DIGITS_SPLIT_SEED = 1797
_ROW, _PARTS = 128, 40
_NOT_READ = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data"}


@dataclass(frozen=True)
class RawData:
    """Images and labels of a training and a test set."""

    train_images: Array  # (n, channels, height, width), uint8 in [0, 255] or floats as stored; test_images likewise
    train_labels: Array  # int64 (n,), from 0; test_labels likewise; for text images and labels are (n, positions)
    test_images: Array
    test_labels: Array
    class_names: tuple[str, ...]


def read_digits() -> RawData:
    """Return scikit-learn's 1,797 digits of 8x8; the same 20 % of every class are always the test set."""
    from sklearn.datasets import load_digits  # slow to import

    images, labels = load_digits(return_X_y=True)
    pixels = (images / 16.0).astype(np.float32).reshape(-1, 1, 8, 8)
    return split_off_test(pixels, labels.astype(np.int64), tuple("0123456789"), _DIGITS_SPLIT_SEED)


def read_idx_folder(folder: Path, download: bool, kind: str, class_names: tuple[str, ...]) -> RawData:
    """Read the four idx files of torchvision's data set ``kind``; DataError if one is missing or damaged."""
    if download:
        from torchvision import datasets  # slow to import

        getattr(datasets, kind)(folder, download=True)
    parts = []
    for prefix in ("train", "t10k"):
        images = _read_idx(folder, f"{prefix}-images-idx3-ubyte", 3)
        labels = _read_idx(folder, f"{prefix}-labels-idx1-ubyte", 1)
        parts.append((images[:, None], labels.astype(np.int64)))
    return RawData(*parts[0], *parts[1], class_names)


def _read_idx(folder: Path, stem: str, axes: int) -> Array:
    """Read an idx file of unsigned bytes with ``axes`` axes, plain or gzipped, from a folder, ``raw`` or ``*/raw``."""
    # Some copies have a dot before ``idx``; torchvision stores the files in ``*/raw``.
    names = [name + suffix for name in (stem, stem.replace("-idx", ".idx")) for suffix in ("", ".gz")]
    places = (folder, folder / "raw", *sorted(folder.glob("*/raw")))
    path = next((place / name for place in places for name in names if (place / name).is_file()), None)
    if path is None:
        raise DataError(f"the folder must hold {stem} or {stem}.gz, got none ({folder})")
    with reading(path, "an idx file", f"of unsigned bytes with {axes} axes"):
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        # two zero bytes, the code of unsigned bytes, the number of axes and the length of each, then the elements
        shape = np.frombuffer(content, ">u4", axes, offset=4)
        if content[:4] != bytes((0, 0, 8, axes)):
            raise ValueError(f"magic number {content[:4].hex()}")
        return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)


def read_cifar(folder: Path, download: bool, kind: str) -> RawData:
    """Read torchvision's ``CIFAR10`` or ``CIFAR100`` and check MD5 sums; DataError if files are missing or damaged."""
    from torchvision import datasets  # slow to import

    try:
        train, test = (getattr(datasets, kind)(folder, train=train, download=download) for train in (True, False))
    except RuntimeError as error:
        raise DataError(
            f"{kind.lower()} must be in the folder, got: {error} ({folder}); download=True fetches it"
        ) from error
    parts = [(part.data.transpose(0, 3, 1, 2), np.asarray(part.targets, dtype=np.int64)) for part in (train, test)]
    return RawData(*parts[0], *parts[1], tuple(train.classes))


def read_stdlib() -> RawData:
    """Read the sources of Python's standard library as rows of 128 bytes; the labels are the following bytes."""
    root, rows = Path(sysconfig.get_path("stdlib")), dict[bool, list[Array]]({True: [], False: []})
    files = [path.relative_to(root) for path in root.rglob("*.py")]
    paths = sorted(path for path in files if not _NOT_READ & {*path.parts[:-1]})
    for path in paths:
        # Chosen by the file's name, so that it doesn't depend on which other files exist.
        is_test = zlib.crc32(path.as_posix().encode()) % _PARTS == 0
        rows[is_test].append(np.frombuffer((root / path).read_bytes(), dtype=np.uint8))
    if not (rows[True] and rows[False]):
        raise DataError(f"Python's standard library must come with its sources, got {len(paths)} files ({root})")
    return RawData(*_in_rows(rows[False]), *_in_rows(rows[True]), tuple(map(str, range(256))))


def _in_rows(texts: list[Array]) -> tuple[Array, Array]:
    """Return rows of bytes and, as labels, the byte that follows each byte."""
    text = np.concatenate(texts)
    text = text[: (len(text) - 1) // _ROW * _ROW + 1]
    return text[:-1].reshape(-1, _ROW), text[1:].reshape(-1, _ROW).astype(np.int64)


def read_npz(path: Path) -> RawData:
    """Read an ``.npz`` file with ``x_train, y_train, x_test, y_test``; DataError if it holds something else."""
    # Images [n, h, w], [n, c, h, w] or [n, h, w, c] with 1 or 3 channels, uint8 or floats; labels [n] or [n, 1],
    # integers from 0. Without `class_names` the largest training label gives the number of classes.
    with reading(path, "an .npz data set", "of plain arrays"), np.load(path, allow_pickle=False) as archive:
        arrays: dict[str, Array] = {key: archive[key] for key in archive.files}
    missing = [key for key in _NPZ_KEYS if key not in arrays]
    if missing:
        keys = ", ".join(sorted(arrays)) or "no arrays"
        raise DataError(f"an .npz data set must hold {', '.join(_NPZ_KEYS)}, got {keys} ({path})")
    train_labels, test_labels = (_npz_labels(arrays[key], f"{key} in {path}") for key in ("y_train", "y_test"))
    train_images, test_images = (_npz_images(arrays[key], f"{key} in {path}") for key in ("x_train", "x_test"))
    if "class_names" in arrays:
        names = tuple(str(label) for label in arrays["class_names"])
    else:
        names = tuple(str(label) for label in range(int(train_labels.max(initial=-1)) + 1))
    return RawData(train_images, train_labels, test_images, test_labels, names)


def split_off_test(images: Array, labels: Array, class_names: tuple[str, ...], seed: int) -> RawData:
    """Use 20 % of every class as the test set; callers pass a constant seed, so that all runs share the test set."""
    test = stratified_fraction(labels, 0.2, np.random.default_rng(seed))
    return RawData(images[~test], labels[~test], images[test], labels[test], class_names)


def stratified_fraction(labels: Array, fraction: float, generator: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Draw ``floor(fraction * m)`` of the m images of every class; return a mask, bool (n,). ``fraction`` in [0, 1)."""
    counts = np.bincount(labels)
    return np.asarray(class_rank(labels, generator) < np.floor(fraction * counts + 1e-9)[labels])


def class_rank(labels: Array, generator: np.random.Generator) -> npt.NDArray[np.int64]:
    """Return each image's position, from 0, in a random order of its class, shape (n,)."""
    order = np.lexsort((generator.random(len(labels)), labels))
    counts = np.bincount(labels)
    starts = np.cumsum(counts) - counts
    ranks = np.empty(len(labels), dtype=np.int64)
    ranks[order] = np.arange(len(labels)) - starts[labels[order]]
    return ranks


def in_rounds(labels: Array, generator: np.random.Generator) -> npt.NDArray[np.int64]:
    """Return an order of the images in rounds: each holds one image of every class that has some left, shuffled."""
    return np.lexsort((generator.random(len(labels)), class_rank(labels, generator)))


def _npz_labels(labels: Array, place: str) -> Array:
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(f"labels must be integers of shape (n,), got {labels.dtype} of shape {labels.shape} ({place})")
    return labels.astype(np.int64)


def _npz_images(images: Array, place: str) -> Array:
    if images.dtype != np.uint8 and images.dtype.kind != "f":
        raise DataError(f"images must be uint8 or floats, got {images.dtype} ({place})")
    if images.ndim == 3:
        return images[:, None]
    if images.ndim == 4 and images.shape[1] in (1, 3):
        return images
    if images.ndim == 4 and images.shape[3] in (1, 3):
        return np.moveaxis(images, 3, 1)
    raise DataError(
        f"images must be (n, h, w), (n, c, h, w) or (n, h, w, c) with 1 or 3 channels, got {images.shape} ({place})"
    )
