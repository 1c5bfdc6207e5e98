"""Folders of image files: ``train/CLASS/*.png`` and ``test/CLASS/*.png``, or ``CLASS/*.png`` alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from nni_topo.errors import DataError
from nni_topo.zoo.sources import Array, RawData, split_off_test

_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
_TEST_NAMES = ("test", "val")
_SPLIT_SEED = 1797


def read_image_folder(folder: Path, image_size: int | None = None) -> RawData:
    """Read a folder of images, one folder per class, as ``uint8``; DataError if they can't be one data set."""
    # With a `train` folder inside, `test` (or `val`) beside it is the test set and must have no class that `train`
    # lacks. Otherwise the folders are the classes, and 20 % of every class are set apart for the test, always the same
    # ones. Images are grey if all files of the training set are, else RGB. With `image_size` the middle square is
    # scaled to it; without, the images must be squares of one size.
    if not (folder / "train").is_dir():
        class_names = _classes(folder)
        images, labels = _read_split(folder, class_names, image_size, grey=_all_grey(folder, class_names))
        return split_off_test(images, labels, class_names, _SPLIT_SEED)
    test = _test_folder(folder)
    class_names = _classes(folder / "train")
    unknown = sorted(set(_classes(test)) - set(class_names))
    if unknown:
        raise DataError(f"test classes must be training classes, got {', '.join(unknown)} ({test})")
    grey = _all_grey(folder / "train", class_names)
    train_part = _read_split(folder / "train", class_names, image_size, grey)
    test_part = _read_split(test, _classes(test), image_size, grey)
    return RawData(*train_part, test_part[0], _renumber(test_part[1], _classes(test), class_names), class_names)


def _test_folder(folder: Path) -> Path:
    for name in _TEST_NAMES:
        if (folder / name).is_dir():
            return folder / name
    raise DataError(f"beside train there must be a folder test or val, got none ({folder})")


def _renumber(labels: Array, found: tuple[str, ...], class_names: tuple[str, ...]) -> Array:
    """Turn labels in ``found`` into labels in ``class_names``."""
    table = np.asarray([class_names.index(name) for name in found], dtype=np.int64)
    return np.asarray(table[labels])


def _classes(folder: Path) -> tuple[str, ...]:
    names = tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")))
    if not names:
        raise DataError(f"an image folder must hold one folder per class, got none ({folder})")
    return names


def _files(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
    if not files:
        raise DataError(f"a class must hold at least one image, got none ({folder})")
    return files


def _all_grey(folder: Path, class_names: tuple[str, ...]) -> bool:
    return all(_open(path).mode in ("1", "L", "I;16") for name in class_names for path in _files(folder / name))


def _read_split(folder: Path, class_names: tuple[str, ...], image_size: int | None, grey: bool) -> tuple[Array, Array]:
    """Read the images ``[n, c, h, w]`` and labels ``[n]`` of one split."""
    pictures: list[Array] = []
    labels: list[int] = []
    for label, name in enumerate(class_names):
        for path in _files(folder / name):
            picture = _read_image(path, image_size, grey)
            if pictures and picture.shape != pictures[0].shape:
                sizes = f"{pictures[0].shape[1:]} and {picture.shape[1:]}"
                raise DataError(f"images must share one size unless image_size is given, got {sizes} ({path})")
            pictures.append(picture)
            labels.append(label)
    return np.stack(pictures), np.asarray(labels, dtype=np.int64)


def _read_image(path: Path, image_size: int | None, grey: bool) -> Array:
    try:
        image = _open(path).convert("L" if grey else "RGB")
    except OSError as error:
        raise DataError(f"an image file must be whole, got {error} in {path.stat().st_size} bytes ({path})") from error
    if image_size is not None:
        image = _resized(image, image_size)
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[None] if grey else pixels.transpose(2, 0, 1)


def _open(path: Path) -> Image.Image:
    try:
        with path.open("rb") as file, Image.open(file) as image:
            picture: Image.Image = image.copy()
            return picture
    except UnidentifiedImageError as error:
        raise DataError(f"an image file must be of a known format, got {path.stat().st_size} bytes ({path})") from error


def _resized(image: Image.Image, side: int) -> Image.Image:
    """Cut the middle square out and scale it to ``side``."""
    width, height = image.size
    short = min(width, height)
    left, top = (width - short) / 2, (height - short) / 2
    box = (left, top, left + short, top + short)
    return image.resize((side, side), Image.Resampling.BILINEAR, box=box)
