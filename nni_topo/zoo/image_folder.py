"""Folders of image files: ``train/CLASS/*.png`` and ``test/CLASS/*.png``, or ``CLASS/*.png`` alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import find_classes, make_dataset
from torchvision.transforms import InterpolationMode, v2

from nni_topo.errors import DataError
from nni_topo.zoo.labelled import ImageFiles, Layout, Preprocessing
from nni_topo.zoo.sources import Array, in_rounds, stratified_fraction

_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_SPLIT_SEED = 1797
_GREY = ("1", "L", "I;16")


def list_image_folder(
    folder: Path,
    image_size: int | None,
    pad_to: int | None,
    preprocessing: Preprocessing | None,
    workers: int | None,
) -> tuple[ImageFiles, ImageFiles, tuple[str, ...]]:
    """List the training and test images of a folder, and its classes; DataError if they can't be one data set."""
    # If the folder holds `train`, the test set is `test` (or `val`), and it must have no class that `train` lacks.
    # Otherwise the subfolders are the classes, and always the same 20 % of every class are the test set. The first file
    # of every training class determines the layout: grey if all these files are grey, else RGB; without `image_size`
    # they must be squares of one size. Other files that differ raise an error when they are read.
    if (folder / "train").is_dir():
        place = next((folder / name for name in ("test", "val") if (folder / name).is_dir()), None)
        if place is None:
            raise DataError(f"a folder with train must also hold a folder test or val, got neither ({folder})")
        root = folder / "train"
        files, labels, names = _listed(root)
        test_files, test_labels, test_names = _listed(place)
        unknown = sorted(set(test_names) - set(names))
        if unknown:
            raise DataError(f"test classes must be training classes, got {', '.join(unknown)} ({place})")
        test_labels = np.asarray([names.index(name) for name in test_names])[test_labels]
        train_files, train_labels = files, labels
    else:
        root = place = folder
        files, labels, names = _listed(folder)
        apart = stratified_fraction(labels, 0.2, np.random.default_rng(_SPLIT_SEED))
        train_files, train_labels = files[~apart], labels[~apart]
        test_files, test_labels = files[apart], labels[apart]
    first = [str(root / os.fsdecode(files[row])) for row in np.unique(labels, return_index=True)[1]]
    modes, side = [], image_size or 0
    for path in first:
        with _opened(path) as image:
            modes.append(image.mode)
            side = side or image.width
            if image_size is None and image.size != (side, side):
                raise _other_size(side, image.size, path)
    is_grey = all(mode in _GREY for mode in modes)
    padded = max(side, pad_to or 0)
    layout = Layout(is_grey, side, image_size is not None, padded, preprocessing or Preprocessing())
    # In rounds over the classes, so that even a few first images of the test set cover many classes.
    order = in_rounds(test_labels, np.random.default_rng(_SPLIT_SEED))
    train = ImageFiles(str(root), train_files, torch.from_numpy(train_labels), layout, workers)
    test = ImageFiles(str(place), test_files[order], torch.from_numpy(test_labels[order]), layout, workers)
    return train, test, names


def _listed(folder: Path) -> tuple[npt.NDArray[np.bytes_], Array, tuple[str, ...]]:
    """Return the paths of a folder's images, sorted by class, their class numbers, and the names of the classes."""
    try:
        # hidden folders aren't classes
        names = [name for name in find_classes(folder)[0] if not name.startswith(".")]
        if not names:
            raise FileNotFoundError("only hidden folders")
        images = make_dataset(folder, {name: rank for rank, name in enumerate(names)}, extensions=_SUFFIXES)
    except FileNotFoundError as error:
        raise DataError(
            f"an image folder must hold one folder per class with at least one image, as docs/sources.md shows, got: "
            f"{error} ({folder})"
        ) from error
    begin = len(os.path.join(folder, ""))
    files = np.array([os.fsencode(path[begin:]) for path, _ in images])
    return files, np.array([label for _, label in images]), tuple(names)


def read_image(path: str, layout: Layout) -> Tensor:
    """Read a file as uint8 ``[c, h, w]``: scaled, cropped and padded, not normalised. DataError for an unfit file."""
    with _opened(path) as image:
        if layout.grey and image.mode not in _GREY:
            raise DataError(
                f"images must all be grey if the first image of every class is, got mode {image.mode} ({path})"
            )
        picture = image.convert("L" if layout.grey else "RGB")
    if layout.scaled:
        # the middle square, scaled
        mode = InterpolationMode(layout.preprocessing.interpolation)
        short = round(layout.side / layout.preprocessing.crop)
        scaled = v2.functional.resize(picture, [short], interpolation=mode, antialias=True)
        picture = v2.functional.center_crop(scaled, [layout.side])
    elif picture.size != (layout.side, layout.side):
        raise _other_size(layout.side, picture.size, path)
    pixels: Tensor = v2.functional.pil_to_tensor(picture)
    missing = layout.padded - layout.side
    before, after = missing // 2, missing - missing // 2
    return torch.nn.functional.pad(pixels, (before, after, before, after))


@contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    """Open an image; DataError if it is damaged, also if that is found only when pixels are read in the block."""
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, Image.DecompressionBombError) as error:
        size = f"{Path(path).stat().st_size} bytes" if Path(path).exists() else "no file"
        raise DataError(
            f"an image file must be undamaged and readable by Pillow, got {error} in {size} ({path})"
        ) from error


def _other_size(side: int, size: tuple[int, int], path: str) -> DataError:
    rule = "images must be squares of one size unless image_size is given"
    return DataError(f"{rule}, got {size[1]}x{size[0]} beside {side}x{side} ({path})")
