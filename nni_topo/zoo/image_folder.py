"""Folders of image files: ``train/CLASS/*.png`` and ``test/CLASS/*.png``, or ``CLASS/*.png`` alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from torchvision.datasets import DatasetFolder

from nni_topo.errors import DataError, check_memory
from nni_topo.zoo.sources import Array, RawData, split_off_test

_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_SPLIT_SEED = 1797
_COPIES = 6  # read, stacked, and as float32


def read_image_folder(folder: Path, image_size: int | None = None) -> RawData:
    """Read a folder of images, one folder per class, as ``uint8``; DataError if they can't be one data set."""
    # With a `train` folder inside, `test` (or `val`) beside it is the test set and must have no class that `train`
    # lacks. Otherwise the folders are the classes, and 20 % of every class are set apart for the test, always the same
    # ones. Images are grey if all files of the training set are, else RGB. With `image_size` the middle square is
    # scaled to it; without, the images must be squares of one size.
    if not (folder / "train").is_dir():
        whole = _listed(folder)
        return split_off_test(
            _images(whole, image_size, _is_grey(whole)), np.asarray(whole.targets), tuple(whole.classes), _SPLIT_SEED
        )
    place = next((folder / name for name in ("test", "val") if (folder / name).is_dir()), None)
    if place is None:
        raise DataError(f"beside train there must be a folder test or val, got none ({folder})")
    train, test = _listed(folder / "train"), _listed(place)
    unknown = sorted(set(test.classes) - set(train.classes))
    if unknown:
        raise DataError(f"test classes must be training classes, got {', '.join(unknown)} ({place})")
    grey = _is_grey(train)
    train_images, test_images = (_images(part, image_size, grey) for part in (train, test))
    labels = np.asarray([train.class_to_idx[test.classes[target]] for target in test.targets])
    return RawData(train_images, np.asarray(train.targets), test_images, labels, tuple(train.classes))


class _Listed(DatasetFolder):
    """The files of a folder by class; hidden folders aren't classes."""

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        names = [name for name in super().find_classes(directory)[0] if not name.startswith(".")]
        return names, {name: label for label, name in enumerate(names)}


def _listed(folder: Path) -> _Listed:
    try:
        return _Listed(folder, loader=_open, extensions=_SUFFIXES)
    except FileNotFoundError as error:
        raise DataError(
            f"an image folder must hold one folder per class with at least one image, got: {error} ({folder})"
        ) from error


def _is_grey(files: _Listed) -> bool:
    return all(_open(path).mode in ("1", "L", "I;16") for path, _ in files.samples)


def _images(files: _Listed, image_size: int | None, grey: bool) -> Array:
    """Read images ``[n, c, h, w]``."""
    pictures: list[Array] = []
    for path, _ in files.samples:
        picture = _read_image(path, image_size, grey)
        if pictures and picture.shape != pictures[0].shape:
            sizes = f"{pictures[0].shape[1:]} and {picture.shape[1:]}"
            raise DataError(f"images must share one size unless image_size is given, got {sizes} ({path})")
        if not pictures:
            needed = _COPIES * picture.nbytes * len(files)
            check_memory(needed, f"{len(files)} images", "a smaller image_size takes less", files.root)
        pictures.append(picture)
    return np.stack(pictures)


def _read_image(path: str, image_size: int | None, grey: bool) -> Array:
    try:
        image = _open(path).convert("L" if grey else "RGB")
    except OSError as error:
        size = Path(path).stat().st_size
        raise DataError(f"an image file must be whole, got {error} in {size} bytes ({path})") from error
    if image_size is not None:
        short = min(image.size)
        left, top = ((side - short) / 2 for side in image.size)
        box = (left, top, left + short, top + short)
        image = image.resize((image_size, image_size), Image.Resampling.BILINEAR, box=box)
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[None] if grey else pixels.transpose(2, 0, 1)


def _open(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            picture: Image.Image = image.copy()
            return picture
    except UnidentifiedImageError as error:
        size = Path(path).stat().st_size
        raise DataError(f"an image file must be of a known format, got {size} bytes ({path})") from error
