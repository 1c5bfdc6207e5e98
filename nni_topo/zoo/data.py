"""Data sets by name, normalised, with a validation split and a test set.

``load_data("digits")`` needs no files; most others read ``data_dir``, a folder or an ``.npz`` file. Nothing is
downloaded without ``download=True``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from nni_topo.errors import ConfigError, DataError, unknown_name
from nni_topo.rules import NONE, checked, number, whole
from nni_topo.zoo.labelled import LabelledImages, Preprocessing, labels_of, subset
from nni_topo.zoo.sources import (
    Array,
    RawData,
    class_rank,
    in_rounds,
    read_cifar,
    read_digits,
    read_idx_folder,
    read_npz,
    read_stdlib,
    stratified_fraction,
)

_MOST_ROWS = 1000  # largest validation set of text; each row has many labels
_CLOTHES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
_IDX = {"mnist": ("MNIST", tuple("0123456789")), "fashion-mnist": ("FashionMNIST", _CLOTHES)}
_CIFAR = {"cifar10": "CIFAR10", "cifar100": "CIFAR100"}
_FOLDER = "image-folder"
_DATA = ("digits", *_IDX, *_CIFAR, _FOLDER, "python-stdlib")


@dataclass(frozen=True, repr=False)
class DataBundle:
    """A data set ready for training.

    Attributes
    ----------
    train, validation, test : TensorDataset or ImageFiles
        A slice of each gives two tensors: float32 images ``[n, in_channels, image_size, image_size]``, normalised per
        channel, and int64 labels ``[n]`` in ``[0, num_classes)``. For text: int64 rows ``[n, image_size]`` and, as
        labels, the byte after each position. Images of a folder stay in their files; all other data are in memory.
    in_channels, image_size, num_classes : int
        Channels of the images, their side in pixels after padding, and the number of classes.
    mean, std : tuple of float
        Mean and standard deviation per channel by which images are normalised: of the stored training images before
        padding (``uint8`` divided by 255); for an image folder the values of ``preprocessing``.
    name : str
        The name or path that was loaded.
    class_names : tuple of str
        One name per class.
    """

    train: LabelledImages
    validation: LabelledImages
    test: LabelledImages
    in_channels: int
    image_size: int
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    name: str
    class_names: tuple[str, ...]

    def __repr__(self) -> str:
        counts = f"{len(self.train)} training, {len(self.validation)} validation, {len(self.test)} test"
        size = f"rows of {self.image_size}"
        if not self.is_text:
            size = f"images of shape ({self.in_channels}, {self.image_size}, {self.image_size})"
        return f"{type(self).__name__}({self.name}: {counts} {size}, {self.num_classes} classes)"

    @property
    def is_text(self) -> bool:
        """Whether every position of a row has its own label: the byte after it."""
        return labels_of(self.train).dim() == 2

    @property
    def black(self) -> Tensor:
        """The normalised value of a stored 0, per channel, shape (in_channels,)."""
        return -torch.tensor(self.mean) / torch.tensor(self.std)


def list_data() -> list[str]:
    """Return the names that :func:`load_data` knows; it also takes paths of folders and ``.npz`` files."""
    return list(_DATA)


def check_data_name(name: str, place: str) -> None:
    """Raise an error unless data is a listed name or an existing path; ``place``: the function that got the name."""
    path = Path(name)
    if name in _DATA or path.suffix == ".npz" or path.is_dir():
        return
    if path.exists() or path.suffix or {"/", "\\"} & set(name):
        raise DataError(f"data must be a listed name, or an .npz file or a folder that exists, got none ({name})")
    raise unknown_name("data", name, [*_DATA, "FOLDER", "FILE.npz"], place)


def holds_photographs(name: str) -> bool:
    """Say whether data, by a listed name or a path, are photographs."""
    return name in (*_CIFAR, _FOLDER) or (name not in _DATA and Path(name).is_dir())


@checked(
    limit=whole(1) | NONE,
    validation=number(0, 1, "left"),
    pad_to=whole(1) | NONE,
    image_size=whole(1) | NONE,
    workers=whole(0) | NONE,
)
def load_data(
    name: str,
    data_dir: str | Path | None = None,
    *,
    limit: int | None = None,
    validation: float = 0.1,
    pad_to: int | None = None,
    image_size: int | None = None,
    seed: int = 0,
    download: bool = False,
    preprocessing: Preprocessing | None = None,
    workers: int | None = None,
) -> DataBundle:
    """Load a data set.

    Parameters
    ----------
    name : str
        ``digits`` (8x8, embedded in scikit-learn), ``mnist`` or ``fashion-mnist`` (idx files, plain or gzipped),
        ``cifar10`` or ``cifar100`` (as torchvision stores them), ``python-stdlib`` (bytes of Python's own sources),
        the path of an image folder, or of an ``.npz`` file with ``x_train, y_train, x_test, y_test``.
    data_dir : str, Path or None, default=None
        Folder of the files; needed for MNIST, Fashion-MNIST and CIFAR.
    limit : int or None, default=None
        Number of training images to keep, at least 1, drawn evenly from the classes after the validation split. For an
        image folder the same limit also applies to the validation set. The test set is never limited.
    validation : float, default=0.1
        Fraction of every class of the training images that becomes the validation set, in [0, 1); for text at most
        1,000 rows.
    pad_to : int or None, default=None
        Side in pixels to which smaller images are padded with zeros (black), equally on all sides if possible.
    image_size : int or None, default=None
        Side in pixels to which the files of an image folder are scaled; None: not scaled.
    seed : int, default=0
        Seed of the validation split and the limit. The test set doesn't depend on it.
    download : bool, default=False
        Whether torchvision may fetch missing files into ``data_dir``.
    preprocessing : Preprocessing or None, default=None
        Mean, standard deviation, crop and interpolation for an image folder. None: ImageNet's mean and standard
        deviation, the whole middle square, bilinear.
    workers : int or None, default=None
        Number of processes that read an image folder, at least 0; 0: this process. None: one per core, at most 8.

    Returns
    -------
    DataBundle

    Raises
    ------
    ConfigError
        If the name is unknown, ``data_dir`` is missing or a number is out of its range.
    DataError
        If files are missing or damaged, or images and labels don't match.

    Notes
    -----
    Mean and standard deviation are computed on all training images, including the validation split, so that
    neither ``limit`` nor ``seed`` changes the inputs of a trained model.

    Images of a folder are ordered in rounds of one image per class, at random by ``seed``; the order of the test set
    is always the same. Loading opens only the first file of every training class.

    Examples
    --------
    >>> data = load_data("digits", limit=100)
    >>> data.train.tensors[0].shape, len(data.test), data.num_classes
    (torch.Size([100, 1, 8, 8]), 355, 10)
    """
    check_data_name(name, "zoo.load_data")
    folder = Path(name if data_dir is None else data_dir)
    if name in (*_IDX, *_CIFAR, _FOLDER):
        if data_dir is None:
            raise ConfigError(f"data_dir must be given for data that is read from files, got None ({name})")
        if not download and not folder.is_dir():
            raise DataError(f"data_dir must be a folder that exists, got none ({data_dir})")
    generator = np.random.default_rng(seed)
    if name in _IDX:
        raw = read_idx_folder(folder, download, *_IDX[name])
    elif name in _CIFAR:
        raw = read_cifar(folder, download, _CIFAR[name])
    elif name == "digits":
        raw = read_digits()
    elif name == "python-stdlib":
        return _text(read_stdlib(), name, limit, validation, generator)
    elif Path(name).suffix == ".npz":
        raw = read_npz(Path(name))
    else:
        from nni_topo.zoo.image_folder import list_image_folder  # torchvision is slow to import

        folder = folder if name == _FOLDER else Path(name)
        train_files, test_files, names = list_image_folder(folder, image_size, pad_to, preprocessing, workers)
        mean, std = train_files.layout.mean_std
        labels = train_files.labels.numpy(force=True)
        held_out = stratified_fraction(labels, validation, generator)

        def draw(rows: Array) -> LabelledImages:
            """Return at most ``limit`` images, in rounds over the classes."""
            return subset(train_files, torch.from_numpy(rows[in_rounds(labels[rows], generator)][:limit]))

        train, watched = draw(np.flatnonzero(~held_out)), draw(np.flatnonzero(held_out))
        padded = train_files.layout.padded
        return DataBundle(train, watched, test_files, len(mean), padded, len(names), mean, std, name, names)
    _check_raw(raw, name)
    held_out = stratified_fraction(raw.train_labels, validation, generator)
    training_rows = np.flatnonzero(~held_out)
    if limit is not None:
        # one image of each class in turn; small classes run out first
        labels = raw.train_labels[training_rows]
        order = np.lexsort((labels, class_rank(labels, generator)))
        training_rows = training_rows[np.sort(order[:limit])]
    mean_of, std_of = _statistics(raw.train_images)

    def dataset(images: Array, labels: Array) -> TensorDataset:
        """Return float32 images, divided by 255 if uint8, padded and normalised, with their labels."""
        scale = 255.0 if images.dtype == np.uint8 else 1.0
        pixels = torch.tensor(images).to(torch.float32).div_(scale)
        missing = max(0, (pad_to or 0) - pixels.shape[-1])
        before, after = missing // 2, missing - missing // 2
        pixels = torch.nn.functional.pad(pixels, (before, after, before, after))
        shift, factor = (value.to(torch.float32).view(1, -1, 1, 1) for value in (mean_of, std_of))
        return TensorDataset(pixels.sub_(shift).div_(factor), torch.from_numpy(labels))

    learned = dataset(raw.train_images[training_rows], raw.train_labels[training_rows])
    return DataBundle(
        train=learned,
        validation=dataset(raw.train_images[held_out], raw.train_labels[held_out]),
        test=dataset(raw.test_images, raw.test_labels),
        in_channels=learned.tensors[0].shape[1],
        image_size=learned.tensors[0].shape[2],
        num_classes=len(raw.class_names),
        mean=tuple(mean_of.tolist()),
        std=tuple(std_of.tolist()),
        name=name,
        class_names=raw.class_names,
    )


def _text(raw: RawData, name: str, limit: int | None, validation: float, generator: np.random.Generator) -> DataBundle:
    """Return a bundle of text rows: not normalised, with a label for every position."""
    order = generator.permutation(len(raw.train_images))
    held_out, training_rows = np.split(order, [min(int(validation * len(order)), _MOST_ROWS)])

    def dataset(rows: Array, labels: Array) -> TensorDataset:
        return TensorDataset(torch.from_numpy(rows.astype(np.int64)), torch.from_numpy(labels))

    training_rows, held_out = np.sort(training_rows[:limit]), np.sort(held_out)
    train = dataset(raw.train_images[training_rows], raw.train_labels[training_rows])
    watched = dataset(raw.train_images[held_out], raw.train_labels[held_out])
    test = dataset(raw.test_images, raw.test_labels)
    return DataBundle(
        train, watched, test, 1, raw.train_images.shape[1], len(raw.class_names), (), (), name, raw.class_names
    )


def _check_raw(raw: RawData, name: str) -> None:
    """Check that images and labels match, and that images are finite squares of one shape."""
    for part, images, labels in (
        ("training", raw.train_images, raw.train_labels),
        ("test", raw.test_images, raw.test_labels),
    ):
        if len(images) != len(labels) or len(labels) == 0:
            raise DataError(f"there must be one label per image, got {len(images)} and {len(labels)} ({part}, {name})")
        if labels.min() < 0 or labels.max() >= len(raw.class_names):
            label_range = f"{labels.min()} to {labels.max()}"
            raise DataError(f"labels must be in [0, {len(raw.class_names)}), got {label_range} ({part}, {name})")
        if images.dtype.kind == "f" and not np.isfinite(images).all():
            raise DataError(f"images must be finite, got NaN or infinity ({part}, {name})")
    train_shape, test_shape = raw.train_images.shape[1:], raw.test_images.shape[1:]
    if train_shape != test_shape:
        raise DataError(f"training and test images must share a shape, got {train_shape} and {test_shape} ({name})")
    if train_shape[1] != train_shape[2]:
        raise DataError(f"images must be squares, got {train_shape[1]}x{train_shape[2]} ({name})")


def _statistics(images: Array) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation per channel, in float64; a constant channel gets standard deviation 1."""
    pixels = images.transpose(1, 0, 2, 3).reshape(images.shape[1], -1)
    if images.dtype == np.uint8:
        counts = np.stack([np.bincount(channel, minlength=256) for channel in pixels])
        values = np.arange(256) / 255.0
        mean = counts @ values / pixels.shape[1]
        std = np.sqrt(counts @ values**2 / pixels.shape[1] - mean**2)
    else:
        mean, std = pixels.mean(axis=1, dtype=np.float64), pixels.std(axis=1, dtype=np.float64)
    return torch.from_numpy(mean), torch.from_numpy(np.where(std > 1e-8, std, 1.0))
