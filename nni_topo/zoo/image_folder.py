"""Folders of image files: ``train/CLASS/*.png`` and ``test/CLASS/*.png``, or ``CLASS/*.png`` alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import find_classes
from torchvision.transforms import InterpolationMode, v2

from nni_topo.errors import DataError, listed
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
    # Otherwise the subfolders are the classes, and always the same 20 % of every class are the test set.
    if (folder / "train").is_dir():
        place = next((folder / name for name in ("test", "val") if (folder / name).is_dir()), None)
        if place is None:
            raise DataError(f"a folder with train must also hold a folder test or val, got neither ({folder})")
        root = folder / "train"
        train, test = _list_images(root), _list_images(place)
        unknown = sorted(set(test.names) - set(train.names))
        if unknown:
            raise DataError(f"test classes must be training classes, got {', '.join(unknown)} ({place})")
        _check_apart(train.places, test.places, "for training or for the test")
        test_labels = np.asarray([train.names.index(name) for name in test.names])[test.labels]
        train_files, train_labels, test_files = train.files, train.labels, test.files
    else:
        root = place = folder
        train = _list_images(folder)
        apart = stratified_fraction(train.labels, 0.2, np.random.default_rng(_SPLIT_SEED))
        train_files, train_labels = train.files[~apart], train.labels[~apart]
        test_files, test_labels = train.files[apart], train.labels[apart]
    firsts = np.unique(train.labels, return_index=True)[1]
    first = [str(root / os.fsdecode(train.files[row])) for row in firsts]
    layout = _layout(first, image_size, pad_to, preprocessing)
    # In rounds over the classes, so that even a few first images of the test set cover many classes.
    order = in_rounds(test_labels, np.random.default_rng(_SPLIT_SEED))
    train_images = ImageFiles(str(root), train_files, torch.from_numpy(train_labels), layout, workers)
    test_images = ImageFiles(str(place), test_files[order], torch.from_numpy(test_labels[order]), layout, workers)
    return train_images, test_images, train.names


def has_classes(folder: Path) -> bool:
    """Tell whether a folder holds ``train``, or two or more folders with images and no image beside them."""
    if (folder / "train").is_dir():
        return True
    entries = [child for child in folder.iterdir() if not child.name.startswith(".")]
    if any(child.name.lower().endswith(_SUFFIXES) for child in entries if not child.is_dir()):
        return False
    of_images = [child for child in entries if child.is_dir() and next(_images_below(str(child)), None)]
    return len(of_images) > 1


def unlabelled_images(
    folder: Path, image_size: int | None, preprocessing: Preprocessing | None, workers: int | None
) -> ImageFiles:
    """List all images in a folder and its subfolders, each once and sorted by path; DataError if there is none.

    Labels are 0.
    """
    begin = len(os.path.join(folder, ""))
    images = dict[str, str]()
    for path, real in _images_below(str(folder)):
        images.setdefault(real, path)
    if not images:
        raise DataError(
            f"a folder of images must hold an image, got none that ends in {', '.join(_SUFFIXES)} ({folder})"
        )
    paths = sorted(images.values(), key=os.path.split)
    layout = _layout(paths[:1], image_size, None, preprocessing)
    files = np.array([os.fsencode(path[begin:]) for path in paths])
    return ImageFiles(str(folder), files, torch.zeros(len(files), dtype=torch.int64), layout, workers)


def _layout(
    first: list[str], image_size: int | None, pad_to: int | None, preprocessing: Preprocessing | None
) -> Layout:
    """Return the layout that the first files determine, those of each class.

    It is grey if all these files are grey, else RGB; without ``image_size`` they must be squares of one size. Other
    files that differ raise an error when they are read.
    """
    modes, side = [], image_size or 0
    for path in first:
        with opened_image(path) as image:
            modes.append(image.mode)
            side = side or image.width
            if image_size is None and image.size != (side, side):
                raise _other_size(side, image.size, path)
    is_grey = all(mode in _GREY for mode in modes)
    return Layout(is_grey, side, image_size is not None, max(side, pad_to or 0), preprocessing or Preprocessing())


@dataclass(frozen=True)
class _Listed:
    """The images of a folder, sorted by class and path."""

    files: npt.NDArray[np.bytes_]  # paths within the folder
    labels: Array  # numbers of the classes, int (images,)
    names: tuple[str, ...]  # of the classes
    places: dict[str, str]  # by path without links, the path by which the image was found


def _list_images(folder: Path) -> _Listed:
    """List the images in the folders of classes, each image once; DataError if one is in two classes."""
    try:
        # hidden folders aren't classes
        names = [name for name in find_classes(folder)[0] if not name.startswith(".")]
        if not names:
            raise FileNotFoundError("only hidden folders")
    except OSError as error:
        raise _no_images(str(error), folder) from error
    begin = len(os.path.join(folder, ""))
    files, labels, empty, places = list[bytes](), list[int](), list[str](), dict[str, str]()
    for label, name in enumerate(names):
        images = dict[str, str]()
        for path, real in _images_below(os.path.join(folder, name)):
            images.setdefault(real, path)
        _check_apart(places, images, "of one class")
        places |= images
        if not images:
            empty.append(name)
        for path in sorted(images.values(), key=os.path.split):
            files.append(os.fsencode(path[begin:]))
            labels.append(label)
    if empty:
        raise _no_images(f"none for the classes {', '.join(empty)}. Images end in {', '.join(_SUFFIXES)}", folder)
    return _Listed(np.array(files), np.array(labels), tuple(names), places)


def _images_below(folder: str) -> Iterator[tuple[str, str]]:
    """Yield the images in a folder and its subfolders, each with its path without links; real folders before links.

    Links are followed, but every folder is read once, so that links to a folder around them end.
    """
    folders, links, seen = [folder], list[str](), set[str]()
    while folders or links:
        place = folders.pop() if folders else links.pop()
        real = os.path.realpath(place)
        if real in seen:
            continue
        seen.add(real)
        try:
            with os.scandir(place) as scanned:
                entries = sorted(scanned, key=lambda child: (child.is_symlink(), child.name))
        except OSError as error:
            raise DataError(f"a folder of images must be readable, got {error.strerror} ({place})") from error
        for child in entries:
            if child.is_dir(follow_symlinks=False):
                folders.append(child.path)
            elif child.is_symlink() and os.path.isdir(child.path):
                links.append(child.path)
            elif not child.name.lower().endswith(_SUFFIXES):
                continue
            elif child.is_file(follow_symlinks=False):
                real_path = child.path if place == real else os.path.join(real, child.name)
                yield child.path, real_path
            elif os.path.isfile(child.path):
                yield child.path, os.path.realpath(child.path)
            else:
                # A pipe would let its reader wait for ever.
                kind = "a link that leads to no file" if child.is_symlink() else "a pipe, a socket or a device"
                raise DataError(f"an image must be a file or a link to a file, got {kind} ({child.path})")


def _check_apart(images: dict[str, str], other_images: dict[str, str], purpose: str) -> None:
    """Raise DataError if an image is in two sets of images, which hold paths by paths without links."""
    shared = [f"{images[real]} and {other_images[real]}" for real in sorted(images.keys() & other_images.keys())]
    if shared:
        raise DataError(f"an image must be {purpose} alone, got links that make these the same: {listed(shared)}")


def _no_images(got: str, folder: Path) -> DataError:
    rule = "an image folder must hold one folder per class with at least one image, as docs/start.md shows"
    return DataError(f"{rule}, got: {got} ({folder})")


def read_image(path: str, layout: Layout) -> Tensor:
    """Read a file as uint8 ``[c, h, w]``: scaled, cropped and padded, not normalised. DataError for an unfit file."""
    with opened_image(path) as image:
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
def opened_image(path: str) -> Iterator[Image.Image]:
    """Open an image; DataError if it is damaged, also if that is found only when pixels are read in the block."""
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, Image.DecompressionBombError) as error:
        size = f"{os.path.getsize(path)} bytes" if os.path.exists(path) else "no file"
        raise DataError(
            f"an image file must be undamaged and readable by Pillow, got {error} in {size} ({path})"
        ) from error


def _other_size(side: int, size: tuple[int, int], path: str) -> DataError:
    rule = "images must be squares of one size unless image_size (--image-size) is given"
    return DataError(f"{rule}, got {size[1]}x{size[0]} beside {side}x{side} ({path})")
