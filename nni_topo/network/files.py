"""Save a dense model in one file without code in it, and build it again from the unpruned model.

The file holds tensors, names and integers only and is read with ``weights_only=True``, so that reading a file
from elsewhere runs nothing. What it doesn't hold is the model's forward: that comes with the model it
is loaded into, whose layers are made smaller to fit.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nni_topo._version import __version__
from nni_topo.disk import read_tensors, reading, write_tensors
from nni_topo.errors import ConfigError, DataError
from nni_topo.network.attention import find_attention, resize
from nni_topo.network.counted import count
from nni_topo.network.labels import can_follow
from nni_topo.network.layers import weight_of
from nni_topo.network.masks import check_unwrapped
from nni_topo.sharing import find_ties, named_tensors, tie_again, untie

_FORMAT = "nni-topo dense model"
_FORMAT_VERSION = 1

# The attributes that say how large a module is, by the class that defines them.
_SIZES: dict[type[torch.nn.Module], tuple[str, ...]] = {
    torch.nn.modules.conv._ConvNd: ("in_channels", "out_channels", "groups"),
    torch.nn.Linear: ("in_features", "out_features"),
    torch.nn.modules.batchnorm._NormBase: ("num_features",),
    torch.nn.GroupNorm: ("num_channels", "num_groups"),
    torch.nn.RNNBase: ("input_size",),
    torch.nn.LayerNorm: ("normalized_shape",),
    torch.nn.Embedding: ("num_embeddings", "embedding_dim"),
    torch.nn.PReLU: ("num_parameters",),
    torch.nn.PixelShuffle: ("upscale_factor",),
}

_PathLike = str | os.PathLike[str]


def save(dense: torch.nn.Module, path: _PathLike) -> None:
    """Save a dense model without pickled code, non-persistent buffers too.

    Parameters
    ----------
    dense : torch.nn.Module
        A model made by `nni_topo.to_dense`, fine-tuned or not. It isn't changed.
    path : str or path-like
        The file to write, whole or not at all; an existing one is replaced.

    Raises
    ------
    SpeedupError
        If the model is still wrapped by NNI.
    DataError
        If the file can't be written.

    See Also
    --------
    load : Builds the model again.
    """
    check_unwrapped(dense)
    listed, every = dense.state_dict(keep_vars=True), named_tensors(dense)
    document = {
        "format": _FORMAT,
        "format_version": _FORMAT_VERSION,
        "package_version": __version__,
        "modules": {name: _describe(module) for name, module in dense.named_modules() if _sizes(module)},
        "state_dict": {name: tensor.detach() for name, tensor in listed.items()},
        "buffers": {name: tensor.detach() for name, tensor in every.items() if name not in listed},
        "fingerprints": {name: _fingerprint(tensor) for name, tensor in every.items()},
    }
    write_tensors(Path(path), document)


def load(path: _PathLike, model: torch.nn.Module | Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """Build a saved dense model from the unpruned model.

    Parameters
    ----------
    path : str or path-like
        A file written by `save`.
    model : torch.nn.Module or callable
        The original, unpruned model, whatever its weights, or a function without arguments that makes it.
        It isn't changed.

    Returns
    -------
    torch.nn.Module
        A copy of ``model`` with the sizes and values of the file, in the modes and on the devices of
        ``model``, in the precision of the file. Layers that share a tensor in ``model`` share it if they
        did in the dense model.

    Raises
    ------
    DataError
        If the file is missing, isn't one that `save` writes, or holds other values than were saved.
    ConfigError
        If the file doesn't fit the model: other modules, other types, larger sizes, or modules with two names
        that were two modules in the dense model.

    Examples
    --------
    >>> import tempfile
    >>> make = lambda width=3: torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Linear(width, 2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(make(width=2), f"{folder}/dense.pt")
    ...     load(f"{folder}/dense.pt", make)
    Sequential(
      (0): Linear(in_features=4, out_features=2, bias=True)
      (1): Linear(in_features=2, out_features=2, bias=True)
    )
    """
    document = _read(path)
    built = copy.deepcopy(model) if isinstance(model, torch.nn.Module) else model()
    check_unwrapped(built)
    _check_fit(document, built, os.fspath(path))
    modules: dict[str, dict[str, Any]] = document["modules"]
    whole = find_attention(built)
    for name, description in modules.items():
        _resize(built.get_submodule(name), description["sizes"])
    ties = find_ties(built)
    untie(built, ties)
    stored = document["state_dict"] | document.get("buffers", {})
    with torch.no_grad():
        for name, tensor in named_tensors(built).items():
            if name in stored:
                tensor.data = stored[name].to(tensor.device, copy=True)
    for name, attention in whole.items():
        layer, channels = next(iter(attention.channels.items()))
        resize(built.get_submodule(name), attention, len(weight_of(built.get_submodule(layer))) // channels.shape[1])
    tie_again(built, [part for names in ties for part in _shared(names, stored)])
    _check_values(document.get("fingerprints", {}), stored, built, os.fspath(path))
    return built


def _sizes(module: torch.nn.Module) -> tuple[str, ...]:
    """List the names of a module's size attributes; none for a type without."""
    names = next((names for kind, names in _SIZES.items() if isinstance(module, kind)), ())
    return (*names, "counted") if hasattr(module, "counted") else names


def _describe(module: torch.nn.Module) -> dict[str, Any]:
    sizes = {name: getattr(module, name) for name in _sizes(module)}
    plain = {name: list(size) if isinstance(size, tuple) else int(size) for name, size in sizes.items()}
    return {"type": type(module).__name__, "sizes": plain}


def _fingerprint(tensor: torch.Tensor) -> str:
    """Digest a tensor's type, shape and bits."""
    plain = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{plain.dtype} {tuple(plain.shape)}".encode())
    digest.update(plain.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _shared(names: list[str], stored: dict[str, torch.Tensor]) -> list[list[str]]:
    """Split a tie into the parts that were tied in the saved model: a file keeps one tensor in one place of memory."""
    parts: dict[Any, list[str]] = {}
    for name in names:
        value = stored.get(name)
        place = None if value is None else (value.data_ptr(), value.shape, value.stride())
        parts.setdefault(place, []).append(name)
    return list(parts.values())


def _check_values(
    fingerprints: dict[str, str], stored: dict[str, torch.Tensor], built: torch.nn.Module, place: str
) -> None:
    """Raise unless a model holds what was saved; files of older versions have no fingerprints."""
    for name, tensor in named_tensors(built).items():
        saved = fingerprints.get(name)
        if saved is None or _fingerprint(tensor) == saved:
            continue
        if _fingerprint(stored[name]) != saved:
            raise DataError(f"a dense model's file must hold what was saved, got other values ({name}, {place})")
        raise ConfigError(
            "a dense model must be loaded into the model it was pruned from, got one that shares tensors between "
            f"modules that the saved model doesn't share ({name}, {place})"
        )


def _read(path: _PathLike) -> dict[str, Any]:
    """Read a file and check that it is one of ours."""
    place = os.fspath(path)
    with reading(Path(path), "a dense model's file", "written by nni_topo.save"):
        document = read_tensors(Path(path))
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise DataError(f"a dense model's file must be written by nni_topo.save, got another kind ({place})")
    if document.get("format_version") != _FORMAT_VERSION:
        raise DataError(
            f"a dense model's file must have format version {_FORMAT_VERSION}, got "
            f"{document.get('format_version')!r} from nni_topo {document.get('package_version')} ({place})"
        )
    return document


def _check_fit(document: dict[str, Any], model: torch.nn.Module, place: str) -> None:
    """Raise unless the file could come from a pruned copy of the model."""
    rule = "a dense model must be loaded into the model it was pruned from"
    modules = {name: module for name, module in model.named_modules() if _sizes(module)}
    resizable = {name for name, module in model.named_modules(remove_duplicate=False) if _sizes(module)}
    resizable |= find_attention(model).keys()
    stored: dict[str, dict[str, Any]] = document["modules"]
    tensors = dict(model.state_dict(keep_vars=True))
    _check_names(rule, "modules", set(stored), set(modules), place)
    _check_names(rule, "tensors", set(document["state_dict"]), set(tensors), place)
    for name, description in stored.items():
        counts = "counted" in description["sizes"] and set(_sizes(modules[name])) <= set(description["sizes"])
        if description["type"] != type(modules[name]).__name__ and not counts:
            raise ConfigError(
                f"{rule}, got {description['type']} where the model has {type(modules[name]).__name__} "
                f"({name}, {place})"
            )
    for name, tensor in tensors.items():
        small, full = tuple(document["state_dict"][name].shape), tuple(tensor.shape)
        fits = len(small) == len(full) and all(a <= b for a, b in zip(small, full, strict=True))
        if small != full and not (fits and (name.rpartition(".")[0] in resizable or can_follow(tensor))):
            raise ConfigError(f"{rule}, got shape {small} where the model has {full} ({name}, {place})")


def _check_names(rule: str, kind: str, stored: set[str], known: set[str], place: str) -> None:
    for problem, names in (("missing in the model", stored - known), ("missing in the file", known - stored)):
        if names:
            listed = ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
            raise ConfigError(f"{rule}, got {kind} {problem}: {listed} ({place})")


def _resize(module: torch.nn.Module, sizes: dict[str, Any]) -> None:
    if "counted" in sizes:
        count(module, sizes["counted"])
    for name in _sizes(module):
        size = sizes[name]
        setattr(module, name, tuple(size) if isinstance(size, list) else size)
