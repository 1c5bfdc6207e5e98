"""Labelled images, in memory or in files, with one interface.

Slices of both kinds are tensors, ``images, labels = dataset[:100]``, and :func:`batches` yields batches of both. Files
are read when they are needed, by processes of a ``DataLoader``, so that memory doesn't depend on the number of files.
"""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import joblib
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from nni_topo.errors import DataError
from nni_topo.network.runtime.calibration import HELD_OUT
from nni_topo.network.runtime.memory import check_memory

_FILES_AT_ONCE = 32  # number of files that a process reads and returns together: 5 MB at 224x224
_MOST_PROCESSES = 8


@dataclass(frozen=True)
class Preprocessing:
    """How an image file becomes a network's input."""

    # Per channel (red, green, blue), as a fraction of the largest value; ImageNet's. Grey images use the averages.
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    crop: float = 1.0  # side of the square that is cropped from the middle, as a share of the shorter side, in (0, 1]
    interpolation: str = "bilinear"  # of torchvision.transforms.InterpolationMode


@dataclass(frozen=True)
class Layout:
    """Format that all images of a folder have after they are read."""

    grey: bool
    side: int  # pixels, before padding
    scaled: bool  # whether files are scaled to `side`; otherwise they must have this size
    padded: int  # side in pixels, after padding with black
    preprocessing: Preprocessing

    @property
    def mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation per channel, by which images are normalised."""
        mean, std = self.preprocessing.mean, self.preprocessing.std
        if self.grey:
            return (sum(mean) / len(mean),), (sum(std) / len(std),)
        return mean, std


@dataclass(frozen=True, eq=False)
class ImageFiles(Dataset[tuple[Tensor, Tensor]]):
    """Labelled images that stay in their files.

    ``dataset[i]`` is one image with its label. ``dataset[i:j]`` reads images into memory: ``[n, c, h, w]``, float32 and
    normalised, with labels ``[n]``, like a ``TensorDataset``.
    """

    root: str  # folder to which the files' paths are relative
    files: npt.NDArray[np.bytes_] = field(repr=False)  # a list of strings would be copied into every reading process
    labels: Tensor = field(repr=False)  # (n,), int64
    layout: Layout
    workers: int | None = None  # reading processes; 0: this process; None: one per core, at most 8; 0 for few files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> tuple[Tensor, Tensor]:
        if not isinstance(index, slice):
            return self.normalised(self.pixels([index]))[0], self.labels[index]
        rows = torch.arange(len(self))[index]
        channels, side = len(self.layout.mean_std[0]), self.layout.padded
        needed = 2.0 * 4 * channels * side**2 * len(rows)  # twice the images: read in parts, then joined
        check_memory(needed, f"{len(rows)} images", "fewer images or a smaller image_size take less", self.root)
        if not len(rows):
            return torch.empty(0, channels, side, side), self.labels[rows]
        return next(batches(self, [rows], torch.device("cpu")))

    def path(self, index: int) -> str:
        """Return the path of a file, by its index."""
        return os.path.join(self.root, os.fsdecode(self.files[index]))

    def pixels(self, rows: Iterable[int]) -> Tensor:
        """Read files: uint8 ``[n, c, h, w]``, not normalised."""
        from nni_topo.zoo.image_folder import read_image  # torchvision is slow to import

        return torch.stack([read_image(self.path(row), self.layout) for row in rows])

    def normalised(self, pixels: Tensor) -> Tensor:
        """Return pixels as a network's input: float32 and normalised, on the same device."""
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device=pixels.device).view(1, -1, 1, 1)
            for values in self.layout.mean_std
        )
        return pixels.to(torch.float32).div_(255.0).sub_(mean).div_(std)


LabelledImages = TensorDataset | ImageFiles


def sources_of(images: LabelledImages, *, in_classes: bool) -> list[str] | None:
    """Return the source of each image, which is the folder of its file; None without files, or with too few folders.

    A folder of a class is no source: ``in_classes``, images must lie in folders within it.
    """
    if not isinstance(images, ImageFiles):
        return None
    folders = [os.path.dirname(os.fsdecode(file)) for file in images.files]
    is_deep = all(os.path.dirname(folder) for folder in folders)
    if len(set(folders)) < HELD_OUT or (in_classes and not is_deep):
        return None
    return folders


def labels_of(dataset: LabelledImages) -> Tensor:
    """Return all labels, int64: (n,), for text (n, positions)."""
    if isinstance(dataset, ImageFiles):
        return dataset.labels
    return dataset.tensors[1]


def subset(dataset: LabelledImages, rows: slice | Tensor) -> LabelledImages:
    """Return some samples of a data set; images in files stay in files."""
    if isinstance(dataset, ImageFiles):
        chosen = torch.arange(len(dataset))[rows]
        return replace(dataset, files=dataset.files[chosen.tolist()], labels=dataset.labels[chosen])
    return TensorDataset(*(tensor[rows] for tensor in dataset.tensors))


def held_on(dataset: LabelledImages, device: torch.device) -> LabelledImages:
    """Move a data set in memory to a device; a data set in files is returned unchanged, :func:`batches` moves it."""
    if isinstance(dataset, ImageFiles):
        return dataset
    return TensorDataset(*(tensor.to(device) for tensor in dataset.tensors))


def batches(dataset: LabelledImages, chosen: Iterable[Tensor], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield one batch of images and labels, on the device, for each tensor of row numbers."""
    if not isinstance(dataset, ImageFiles):
        images, labels = dataset.tensors
        for rows in chosen:
            yield images[rows.to(images.device)].to(device), labels[rows.to(labels.device)].to(device)
        return
    chosen = list(chosen)
    workers = dataset.workers
    if workers is None:
        is_small = sum(map(len, chosen)) <= 2 * _FILES_AT_ONCE
        # Starting processes takes longer than reading a few files, and daemons can't start processes.
        in_this_one = is_small or multiprocessing.current_process().daemon
        workers = 0 if in_this_one else min(_MOST_PROCESSES, int(joblib.cpu_count()))
    loader = DataLoader(
        _Reading(dataset),
        batch_size=None,
        # Processes read a few files at a time, whatever the batch size, so that their queues need little memory.
        sampler=(piece.tolist() for rows in chosen for piece in rows.split(_FILES_AT_ONCE)),
        num_workers=workers,
        generator=torch.Generator(),  # otherwise DataLoader draws from the global generator
    )
    answers = iter(loader)
    try:
        for rows in chosen:
            read = []
            for _ in range(math.ceil(len(rows) / _FILES_AT_ONCE)):
                pixels = next(answers)
                if isinstance(pixels, DataError):
                    raise pixels
                read.append(dataset.normalised(pixels.to(device)))
            if read:
                yield torch.cat(read), dataset.labels[rows].to(device)
    finally:
        # Deleted, because an error's traceback would keep the iterator and its processes alive.
        del answers


class _Reading(Dataset[Any]):
    """Read files by lists of row numbers; errors are returned, not raised, so that the caller gets them unchanged."""

    def __init__(self, images: ImageFiles) -> None:
        self.images = images

    def __getitem__(self, rows: list[int]) -> Tensor | DataError:
        try:
            return self.images.pixels(rows)
        except DataError as error:
            return error
