"""Inputs without labels: image files, arrays in a file, lines of text, and batches that a user's function yields."""

from __future__ import annotations

import importlib
import json
import logging
import zipfile
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import requests
import torch
from torch import Tensor

from nni_topo.disk import reading
from nni_topo.errors import ConfigError, DataError, NniTopoError, raised
from nni_topo.network.runtime.calibration import Calibration
from nni_topo.network.runtime.inputs import tensors_of
from nni_topo.registry import imported
from nni_topo.zoo.data import list_data
from nni_topo.zoo.labelled import Preprocessing, sources_of, subset

_logger = logging.getLogger(__name__)

SAMPLES = 64
"""Samples of a batch, of data that don't come in batches."""

_LABELS = ("y", "label", "labels", "target", "targets")
_UNLIMITED = 10**9  # more tokens than this are what tokenizers without a limit say
_SECONDS = 5.0  # for an answer from where tokenizers are fetched
_ARRAYS = (".npy", ".npz", ".safetensors")
_TEXTS = (".jsonl", ".txt")


def has_labels(source: str) -> bool:
    """Tell whether data has labels: a listed data set, ``.npz`` with ``y_train``, or a folder with classes.

    A folder has classes if it holds ``train``, or two or more folders with images and no image beside them.
    """
    path = Path(source)
    if source in list_data():
        return True
    if path.suffix == ".npz" and path.is_file():
        try:
            with np.load(path) as archive:
                return "y_train" in archive.files
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            return False  # the error comes when it is read
    if path.is_dir():
        from nni_topo.zoo.image_folder import has_classes  # torchvision is slow to import

        return has_classes(path)
    return False


def read_inputs(
    source: str,
    count: int,
    *,
    image_size: int | None = None,
    preprocessing: Preprocessing | None = None,
    workers: int | None = None,
    tokenizer: str | None = None,
    transform: str | None = None,
) -> Calibration:
    """Read the first samples of data without labels, in batches.

    Parameters
    ----------
    source : str
        A folder of images, with or without subfolders; an ``.npz``, ``.npy`` or ``.safetensors`` file of arrays, of
        which several are the model's arguments by name; a ``.txt`` file with a text in each line, or ``.jsonl`` with
        strings or objects that have one under ``text``; or ``package.module:function``, which returns batches.
    count : int
        Number of samples, at least 1; of a function's batches as many as hold them.
    image_size : int or None, default=None
        Side in pixels to which images are scaled.
    preprocessing : Preprocessing or None, default=None
        Mean, standard deviation, crop and interpolation of images. None: ImageNet's mean and standard deviation.
    workers : int or None, default=None
        Number of processes that read images. None: one per core, at most 8.
    tokenizer : str or None, default=None
        Folder or name of a tokenizer of Transformers, for texts.
    transform : str or None, default=None
        ``package.module:function`` from a Pillow image to a tensor, which replaces all scaling of images.

    Returns
    -------
    Calibration
        Batches of tensors, or of dicts of tensors by argument. The folder of an image's file is its group, if there are
        eight or more.

    Raises
    ------
    ConfigError
        If a function can't be imported, or texts come without a tokenizer.
    DataError
        If there is nothing to read, or it is damaged.
    """
    path, folders = Path(source), None
    if path.is_dir():
        from nni_topo.zoo.image_folder import unlabelled_images  # torchvision is slow to import

        side = 1 if transform is not None and image_size is None else image_size  # images may differ before it
        files = subset(unlabelled_images(path, side, preprocessing, workers), slice(count))
        images = files[:][0] if transform is None else _transform_files(files, transform)
        batches, folders = list[Any](images.split(SAMPLES)), sources_of(files, in_classes=False)
    elif path.suffix in _ARRAYS:
        batches = _in_batches(_arrays(path, count), path)
    elif path.suffix in _TEXTS:
        batches = _tokenize(_texts(path, count), tokenizer, path)
    elif ":" in source:
        batches = _call_for_batches(source, count)
    else:
        kinds = "a folder of images, an .npz, .npy, .safetensors, .txt or .jsonl file, or package.module:function"
        raise DataError(f"data must be one of {', '.join(list_data())}, {kinds}, got {source!r} (data)")
    inputs = Calibration(batches, groups=folders)
    inputs.name = "images" if path.is_dir() else "inputs"
    return inputs


def _arrays(path: Path, count: int) -> dict[str, Tensor]:
    """Read the first rows of a file's arrays, by name; the name of a single one is empty."""
    with reading(path, "a file of inputs", "of plain arrays"):
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return {name: tensor[:count] for name, tensor in load_file(path).items()}
        content = np.load(path, allow_pickle=False)
        if isinstance(content, np.ndarray):
            return {"": torch.from_numpy(content[:count])}
        with content as archive:
            arrays = {name: archive[name] for name in archive.files}
        labels = [name for name in _LABELS if name in arrays and arrays[name].dtype.kind in "iu"]
        labels = [name for name in labels if arrays[name].ndim == 1]
        if len(labels) == 1 and len(arrays) == 2:
            _logger.warning(
                "the array %r of %s is taken for labels, which aren't used: x_train, y_train, x_test and y_test give a "
                "column of the accuracy; if it is an input, another name makes it one",
                labels[0],
                path.name,
            )
            del arrays[labels[0]]
        return {name: torch.from_numpy(array[:count]) for name, array in arrays.items()}


def _in_batches(arrays: dict[str, Tensor], path: Path) -> list[Any]:
    """Split arrays into batches of dicts; a single array into tensors."""
    lengths = {name: len(array) if array.dim() else 0 for name, array in arrays.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise DataError(f"arrays of a file must hold equally many samples, at least one, got {lengths} ({path})")
    parts = {name: array.split(SAMPLES) for name, array in arrays.items()}
    if len(parts) == 1:
        return list(*parts.values())
    return [dict(zip(parts, batch, strict=True)) for batch in zip(*parts.values(), strict=True)]


def _texts(path: Path, count: int) -> list[str]:
    """Read the first lines that hold a text."""
    texts = list[str]()
    with reading(path, "a file of texts", "in UTF-8"), path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            text: Any = line.strip()
            if path.suffix == ".jsonl" and text:
                text = json.loads(text)
                if isinstance(text, dict):
                    text = text.get("text")
                if not isinstance(text, str):
                    raise DataError(
                        f"a line must be a string or have one under 'text', got none (line {number}, {path})"
                    )
            if text:
                texts.append(text)
            if len(texts) == count:
                break
    if not texts:
        raise DataError(f"a file of texts must hold a line with text, got none ({path})")
    return texts


def _tokenize(texts: list[str], tokenizer: str | None, path: Path) -> list[Any]:
    """Tokenize texts, in batches that are padded to their longest text."""
    if tokenizer is None:
        raise ConfigError(f"texts need a tokenizer, a folder or a name of Transformers, got none (tokenizer, {path})")
    loaded_tokenizer = _tokenizer(tokenizer)
    if loaded_tokenizer.pad_token is None:
        loaded_tokenizer.pad_token = loaded_tokenizer.eos_token
    longest = loaded_tokenizer.model_max_length
    is_limited = longest < _UNLIMITED
    if is_limited:
        token_ids = loaded_tokenizer(texts, verbose=False)["input_ids"]
        cut = sum(len(ids) > longest for ids in token_ids)
        if cut:
            _logger.warning(
                "%d of %d texts are cut to the %d tokens that the tokenizer allows", cut, len(texts), longest
            )
    parts = [texts[at : at + SAMPLES] for at in range(0, len(texts), SAMPLES)]
    return [dict(loaded_tokenizer(part, padding=True, truncation=is_limited, return_tensors="pt")) for part in parts]


def _tokenizer(name: str) -> Any:
    """Load a tokenizer from a folder or from the files that Transformers has stored, or else fetch it."""
    auto: Any = importlib.import_module("transformers").AutoTokenizer
    try:
        return auto.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = raised(error)
    if not Path(name).exists():
        endpoint = importlib.import_module("huggingface_hub").constants.ENDPOINT
        # Transformers tries for a minute; where nothing answers, a few seconds are enough.
        try:
            requests.head(endpoint, timeout=_SECONDS)
        except requests.RequestException:
            reason = f"no folder of that name, no stored files, and no answer from {endpoint}"
        else:
            try:
                return auto.from_pretrained(name)
            except (OSError, ValueError) as error:
                reason = raised(error)
    raise ConfigError(f"a tokenizer must be one that Transformers loads, got {name!r}: {reason} (tokenizer)")


def fitting_texts(inputs: Calibration, network: Any, source: str) -> list[Any]:
    """Return batches in which texts of a file are cut to the positions that a model of Transformers has."""
    batches = list(inputs)
    most = getattr(getattr(network, "config", None), "max_position_embeddings", None)
    if Path(source).suffix not in _TEXTS or not isinstance(most, int):
        return batches
    if max(shape_of(batch)[1] for batch in batches) > most:
        _logger.warning("texts are cut to the %d positions that the model has", most)
    return [{name: tensor[:, :most] for name, tensor in batch.items()} for batch in batches]


def _transform_files(files: Any, transform: str) -> Tensor:
    """Read image files by a user's function, from Pillow images to tensors of one shape."""
    from nni_topo.zoo.image_folder import opened_image  # torchvision is slow to import

    function = imported(transform, "a transform must be a function of a Pillow image")
    images = list[Tensor]()
    for index in range(len(files)):
        with opened_image(files.path(index)) as image:
            try:
                tensor = function(image)
            except Exception as error:  # a user's code runs, and may raise anything
                place = f"{transform}, {files.path(index)}"
                raise DataError(f"a transform must return a tensor, got {raised(error)} ({place})") from error
        if not isinstance(tensor, Tensor) or (images and tensor.shape != images[0].shape):
            got = f"shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            first = f" beside {tuple(images[0].shape)}" if images else ""
            raise DataError(
                f"a transform must return tensors of one shape, got {got}{first} ({transform}, {files.path(index)})"
            )
        images.append(tensor)
    return torch.stack(images)


def _call_for_batches(source: str, count: int) -> list[Any]:
    """Call a user's function, and return as many of its batches as hold the number of samples."""
    source_value = imported(source, "data must be a function or a list of batches")
    try:
        if callable(source_value):
            source_value = source_value()
        return _first_of(source_value, count, source)
    except NniTopoError:
        raise
    except Exception as error:  # a user's code runs, and may raise anything
        raise DataError(f"a function of data must return batches, got {raised(error)} ({source})") from error


def _first_of(source_batches: Any, count: int, source: str) -> list[Any]:
    """Return as many batches as hold the number of samples."""
    if isinstance(source_batches, (str, bytes, Tensor)) or not isinstance(source_batches, Iterable):
        raise ConfigError(f"a function of data must return batches, got {type(source_batches).__name__} ({source})")
    batches, samples = list[Any](), 0
    for batch in islice(source_batches, count):
        batches.append(batch)
        shape = shape_of(batch)
        samples += shape[0] if shape else 1
        if samples >= count:
            break
    if not batches:
        raise DataError(f"a function of data must return at least one batch, got none ({source})")
    return batches


def shape_of(batch: Any) -> tuple[int, ...]:
    """Return the shape of the first tensor of a batch; empty if it has none."""
    return next((tuple(tensor.shape) for tensor in tensors_of(batch)), ())
