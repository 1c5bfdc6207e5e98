"""Labelled images, in memory or in files, read in the same way.

Both kinds give tensors where they are sliced, ``images, labels = dataset[:100]``, and batches by :func:`batches`.
Files are read where they are asked for, by processes of a ``DataLoader``: what is in memory at a time doesn't depend
on how many files there are.
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
from nni_topo.network.runtime.memory import check_memory

_FILES_AT_ONCE = 32  # what a process reads between two answers: 5 MB at 224x224
_MOST_PROCESSES = 8


@dataclass(frozen=True)
class Preprocessing:
    """How an image file becomes a network's input."""

    # Of red, green and blue, in units of the largest value; ImageNet's. Grey images use their averages.
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    crop: float = 1.0  # side of the square that is cut out of the middle, as a share of the shorter side, in (0, 1]
    interpolation: str = "bilinear"  # of torchvision.transforms.InterpolationMode


@dataclass(frozen=True)
class Layout:
    """What all images of a folder have in common once they are read."""

    grey: bool
    side: int  # pixels, before padding
    scaled: bool  # whether files are scaled to the side; else they must have it
    padded: int  # pixels of a side, after padding with black
    preprocessing: Preprocessing

    @property
    def mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean that is subtracted and deviation that is divided by, per channel."""
        mean, std = self.preprocessing.mean, self.preprocessing.std
        return ((sum(mean) / len(mean),), (sum(std) / len(std),)) if self.grey else (mean, std)


@dataclass(frozen=True, eq=False)
class ImageFiles(Dataset[tuple[Tensor, Tensor]]):
    """Labelled images that stay in their files.

    ``dataset[i]`` is one image with its label; ``dataset[i:j]`` reads so many into memory: images
    ``[n, c, h, w]``, float32 and normalised, with labels ``[n]``, as of a ``TensorDataset``.
    """

    root: str  # folder that the files' paths begin from
    files: npt.NDArray[np.bytes_] = field(repr=False)  # a list of strings would be copied into every reading process
    labels: Tensor = field(repr=False)  # (n,), int64
    layout: Layout
    workers: int | None = None  # processes that read; 0: this one; None: one per core, at most 8, none for a few files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> tuple[Tensor, Tensor]:
        if not isinstance(index, slice):
            return self.normalised(self.pixels([index]))[0], self.labels[index]
        rows = torch.arange(len(self))[index]
        channels, side = len(self.layout.mean_std[0]), self.layout.padded
        needed = 2.0 * 4 * channels * side**2 * len(rows)  # read in batches, then in one tensor
        check_memory(needed, f"{len(rows)} images", "fewer images or a smaller image_size take less", self.root)
        if not len(rows):
            return torch.empty(0, channels, side, side), self.labels[rows]
        return next(batches(self, [rows], torch.device("cpu")))

    def path(self, index: int) -> str:
        """Return the path of a file."""
        return os.path.join(self.root, os.fsdecode(self.files[index]))

    def pixels(self, rows: Iterable[int]) -> Tensor:
        """Read files: uint8 ``[n, c, h, w]``, not normalised."""
        from nni_topo.zoo.image_folder import read_image  # torchvision is slow to import

        return torch.stack([read_image(self.path(row), self.layout) for row in rows])

    def normalised(self, pixels: Tensor) -> Tensor:
        """Return what was read as a network's input, on the device of the pixels."""
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device=pixels.device).view(1, -1, 1, 1)
            for values in self.layout.mean_std
        )
        return pixels.to(torch.float32).div_(255.0).sub_(mean).div_(std)


LabelledImages = TensorDataset | ImageFiles


def labels_of(dataset: LabelledImages) -> Tensor:
    """Return all labels, int64: (n,), of text (n, places)."""
    return dataset.labels if isinstance(dataset, ImageFiles) else dataset.tensors[1]


def subset(dataset: LabelledImages, rows: slice | Tensor) -> LabelledImages:
    """Return some of a data set, still in memory or still in files."""
    if isinstance(dataset, ImageFiles):
        chosen = torch.arange(len(dataset))[rows]
        return replace(dataset, files=dataset.files[chosen.tolist()], labels=dataset.labels[chosen])
    return TensorDataset(*(tensor[rows] for tensor in dataset.tensors))


def held_on(dataset: LabelledImages, device: torch.device) -> LabelledImages:
    """Return a data set in memory moved to a device; files stay where they are, their batches are moved."""
    if isinstance(dataset, ImageFiles):
        return dataset
    return TensorDataset(*(tensor.to(device) for tensor in dataset.tensors))


def batches(dataset: LabelledImages, chosen: Iterable[Tensor], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images and labels of rows, one batch for each tensor of row numbers, on the device."""
    if not isinstance(dataset, ImageFiles):
        images, labels = dataset.tensors
        for rows in chosen:
            yield images[rows.to(images.device)].to(device), labels[rows.to(labels.device)].to(device)
        return
    chosen = list(chosen)
    workers = dataset.workers
    if workers is None:
        is_small = sum(map(len, chosen)) <= 2 * _FILES_AT_ONCE
        # Starting processes takes longer than reading a few files, and daemons may start none.
        in_this_one = is_small or multiprocessing.current_process().daemon
        workers = 0 if in_this_one else min(_MOST_PROCESSES, int(joblib.cpu_count()))
    loader = DataLoader(
        _Reading(dataset),
        batch_size=None,
        # Processes read a few files at a time, however large the batches are: what waits in their queues has a bound.
        sampler=(piece.tolist() for rows in chosen for piece in rows.split(_FILES_AT_ONCE)),
        num_workers=workers,
        generator=torch.Generator(),  # without one of its own it draws from the global generator
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
        # An error's traceback holds these variables, and the processes end with the iterator at the earliest.
        del answers


class _Reading(Dataset[Any]):
    """Files by lists of row numbers; an error is an answer, so that it reaches the caller as it was raised."""

    def __init__(self, images: ImageFiles) -> None:
        self.images = images

    def __getitem__(self, rows: list[int]) -> Tensor | DataError:
        try:
            return self.images.pixels(rows)
        except DataError as error:
            return error
