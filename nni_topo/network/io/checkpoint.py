"""Save a dense model in one file without code in it, and build it again from the unpruned model.

The file holds tensors, names and integers only, in PyTorch's format, which is read with ``weights_only=True``, or as
safetensors, whose header holds a recipe in JSON: which module has which sizes. Reading a file from elsewhere runs
nothing. What it doesn't hold is the model's forward: that comes with the model it is loaded into, whose layers are
made smaller to fit.

A pruned model of Transformers can also be saved as a folder that loads without this package.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from nni_topo._version import __version__
from nni_topo.disk import (
    check_free_disk,
    disk_errors,
    output_folder,
    path_of,
    read_tensors,
    reading,
    whole_file,
    write_tensors,
)
from nni_topo.errors import ConfigError, DataError, listed, raised, shown
from nni_topo.network.attention.config import built_by_config, is_pretrained
from nni_topo.network.attention.heads import Attention, find_attention, resize, set_size
from nni_topo.network.attention.unfused.own_width import FIRST, LAST, own_width_of, take_own_width
from nni_topo.network.io.card import CARD, may_write_card, model_card
from nni_topo.network.io.exporting import FORMATS
from nni_topo.network.layers.by_head import HEADS_TAKEN, takes_all_heads
from nni_topo.network.layers.derived import fold
from nni_topo.network.layers.integer_attributes import Place, places_of, put_sizes, sizes_of
from nni_topo.network.layers.kinds import (
    as_torch_layers,
    can_follow,
    is_transposed_linear,
    weight_of,
    with_linear_layers,
)
from nni_topo.network.layers.original_width import keep_original_width, response_norm
from nni_topo.network.layers.slicing import make_channelwise
from nni_topo.network.runtime.arguments import NETWORK, check_float, check_unwrapped
from nni_topo.network.runtime.copies import detached_copy
from nni_topo.network.runtime.inputs import model_within, tensors_of
from nni_topo.network.runtime.public import public
from nni_topo.network.runtime.reports import drop_report, report_of
from nni_topo.rules import ANYTHING, Rule, check_knobs, taking
from nni_topo.sharing import find_ties, named_tensors, tie_again, untie

_FORMAT = "nni-topo dense model"
_EXTRA_STATE = "_extra_state"  # what PyTorch calls the state that a module's get_extra_state returns
_FORMAT_VERSION = 1
_SAFE = ".safetensors"
_RECIPE = "nni_topo"  # its place in the header of a safetensors file
_KINDS: dict[str, type] = {
    "format": str,
    "format_version": int,
    "package_version": str,
    "modules": dict,
    "numbers": dict,
    "state_dict": dict,
    "buffers": dict,
    "fingerprints": dict,
    "blocks": dict,
    "parts": dict,
    "head_sizes": dict,
    "own_widths": dict,
}
_OLDER: dict[str, Any] = {
    key: {} for key in ("numbers", "buffers", "fingerprints", "blocks", "parts", "head_sizes", "own_widths")
}  # of older versions

# The attributes that say how large a module is, by the class that defines them.
_SIZES: dict[type[torch.nn.Module], tuple[str, ...]] = {
    torch.nn.modules.conv._ConvNd: ("in_channels", "out_channels", "groups"),
    torch.nn.Linear: ("in_features", "out_features"),
    torch.nn.modules.batchnorm._NormBase: ("num_features",),
    torch.nn.GroupNorm: ("num_channels", "num_groups"),
    torch.nn.RNNBase: ("input_size", "hidden_size"),
    torch.nn.LayerNorm: ("normalized_shape",),
    torch.nn.RMSNorm: ("normalized_shape",),
    torch.nn.Embedding: ("num_embeddings", "embedding_dim"),
    torch.nn.PReLU: ("num_parameters",),
    torch.nn.PixelShuffle: ("upscale_factor",),
}

_PathLike = str | os.PathLike[str]


_MODULE = Rule(NETWORK.words, NETWORK.holds, tell=NETWORK.tell)


def _told(value: Any) -> str:
    """Say what was given in place of a model or of a function that makes it."""
    tell = taking().tell if callable(value) else NETWORK.tell
    return shown(value) if tell is None else tell(value)


_UNPRUNED = Rule(
    "the unpruned torch.nn.Module or a function without arguments that makes it",
    lambda value: isinstance(value, torch.nn.Module) or taking().holds(value),
    tell=_told,
)


def save(dense: torch.nn.Module, path: _PathLike) -> None:
    """Save a dense model without pickled code, non-persistent buffers too.

    Parameters
    ----------
    dense : torch.nn.Module
        A model made by `nni_topo.to_dense`, fine-tuned or not. It isn't changed. Of a compiled one, or one in
        ``DataParallel`` or ``DistributedDataParallel``, the model within is saved.
    path : str or path-like
        The file to write, whole or not at all; an existing one is replaced. One that ends in ``.safetensors`` is
        written as safetensors, with the recipe (which module has which sizes) as JSON under ``"nni_topo"`` in its
        metadata; any other as PyTorch does.

    Raises
    ------
    ConfigError
        If ``dense`` is no module or is quantised, or the path ends as the files of :func:`nni_topo.export` do, in
        ``.onnx`` or ``.pt2``, or a module's extra state is no tensor.
    SpeedupError
        If the model is still wrapped by NNI.
    DataError
        If the file can't be written, or a parameter or buffer is on the meta device.

    See Also
    --------
    load : Builds the model again.
    save_pretrained : Writes a folder that Transformers loads by itself.
    """
    place = path_of(path)
    check_knobs("save", {"dense": dense}, {"dense": _MODULE})
    if place.suffix.lower() in FORMATS:
        raise ConfigError(f"files that end in {place.suffix} are those of nni_topo.export, got it for save ({place})")
    dense = model_within(dense)
    check_unwrapped(dense)
    check_float("model that is saved", dense, "save")
    in_state, every = dense.state_dict(keep_vars=True), named_tensors(dense)
    modules = dict[str, dict[str, Any]]()
    for name, module in dense.named_modules():
        if size_names(module):
            modules[name] = describe(module)
    state, buffers, fingerprints = dict[str, torch.Tensor](), dict[str, torch.Tensor](), dict[str, str]()
    for name, tensor in in_state.items():
        if tensor is None:  # the extra state of a module that has none to keep
            continue
        if not isinstance(tensor, torch.Tensor):
            raise ConfigError(
                f"the extra state of a saved model must be tensors, got {type(tensor).__name__} from get_extra_state "
                f"({name})"
            )
        state[name] = tensor.detach()
    for name, tensor in every.items():
        if tensor.is_meta:
            raise DataError(f"a saved model must have values, got a tensor on the meta device, without any ({name})")
        fingerprints[name] = fingerprint(tensor)
        if name not in in_state:
            buffers[name] = tensor.detach()
    document = {
        "format": _FORMAT,
        "format_version": _FORMAT_VERSION,
        "package_version": __version__,
        "modules": modules,
        "numbers": sizes_of(dense),
        "state_dict": state,
        "buffers": buffers,
        "fingerprints": fingerprints,
        "blocks": kept_blocks(dense),
        "parts": removed_parts(dense),
        "head_sizes": {name: attention.head_size for name, attention in find_attention(dense).items()},
        "own_widths": _own_widths(dense),
    }
    if place.suffix == _SAFE:
        with whole_file(place) as part:
            _write_safe(document, part)
    else:
        write_tensors(place, document)


@public(path=ANYTHING, model=_UNPRUNED)
def load(path: _PathLike, model: torch.nn.Module | Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """Build a saved dense model from the unpruned model.

    Parameters
    ----------
    path : str or path-like
        A file written by `save`.
    model : torch.nn.Module or callable
        The original, unpruned model, whatever its weights, or a function without arguments that makes it. It isn't
        changed. Of a compiled one, or one spread over devices, the model within counts.

    Returns
    -------
    torch.nn.Module
        A copy of ``model`` with the sizes and values of the file, in the modes and on the devices of
        ``model``, in the precision of the file; what ``model`` has on the meta device lies on the CPU. Layers that
        share a tensor in ``model`` share it if they did in the dense model.

    Raises
    ------
    DataError
        If the file is missing or cut short, isn't one that `save` writes, has unknown keys, or holds other values than
        were saved.
    ConfigError
        If ``model`` is neither a module nor a function that makes one, or the file doesn't fit it: other modules, other
        types, larger sizes, modules with two names that were two modules in the dense model, or tensors on the meta
        device of which the file has no values.

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
    built = detached_copy(model_within(model)) if isinstance(model, torch.nn.Module) else model_within(model())
    check_knobs("load", {"model": built}, {"model": _MODULE})
    check_unwrapped(built)
    drop_report(built)  # it is that of another network than the file's
    _take_out(document["blocks"], built, os.fspath(path))
    _take_out_parts(document["parts"], built, os.fspath(path))
    transposed = {name for name, module in built.named_modules() if is_transposed_linear(module)}
    if transposed & document["modules"].keys():
        with_linear_layers(built)  # as they were when they were pruned
    for name, module in built.named_modules():
        # A layer that computes its weight became a plain one where it was cut, which has another type in the file.
        description = document["modules"].get(name)
        if isinstance(description, dict) and description.get("type") != type(module).__name__:
            fold(module)
    _check_fit(document, built, os.fspath(path))
    stored = document["state_dict"] | document.get("buffers", {})
    _give_memory(built, stored, os.fspath(path))
    modules: dict[str, dict[str, Any]] = document["modules"]
    unpruned_attention = find_attention(built)
    for name, description in modules.items():
        _resize(built.get_submodule(name), description["sizes"])
    ties = find_ties(built)
    untie(built, ties)
    with torch.no_grad():
        for name, tensor in named_tensors(built).items():
            if name in stored:
                tensor.data = stored[name].to(tensor.device, copy=True)
    for name, tensor in stored.items():
        if _is_extra_state(name):
            built.get_submodule(name.rpartition(".")[0]).set_extra_state(tensor.clone())
    for name, attention in unpruned_attention.items():
        _resize_heads(built, attention, document["head_sizes"].get(name, attention.head_size), os.fspath(path))
    put_sizes(built, _smaller(document["numbers"], built, os.fspath(path)))
    _take_own_widths(document["own_widths"], built, os.fspath(path))
    for names in ties:
        tie_again(built, _shared(names, stored))
    _check_values(document.get("fingerprints", {}), stored, built, os.fspath(path))
    return built


def size_names(module: torch.nn.Module) -> tuple[str, ...]:
    """List the names of a module's size attributes; none for a type without."""
    names = next((names for kind, names in _SIZES.items() if isinstance(module, kind)), ())
    return (*names, "counted") if hasattr(module, "counted") else names


def describe(module: torch.nn.Module) -> dict[str, Any]:
    """Return a module's type and sizes, as a file's recipe has them."""
    sizes = {name: getattr(module, name) for name in size_names(module)}
    plain = {name: list(size) if isinstance(size, tuple) else int(size) for name, size in sizes.items()}
    return {"type": type(module).__name__, "sizes": plain}


def fingerprint(tensor: torch.Tensor) -> str:
    """Digest a tensor's type, shape and bits."""
    plain = tensor.detach().cpu()
    plain = (plain if plain.layout == torch.strided else plain.to_dense()).contiguous()
    digest = hashlib.sha256(f"{plain.dtype} {tuple(plain.shape)}".encode())
    digest.update(plain.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def model_fingerprint(model: torch.nn.Module) -> str:
    """Digest the names, types, shapes and bits of a model's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in named_tensors(model).items():
        digest.update(f"{name} {fingerprint(tensor)}\n".encode())
    return digest.hexdigest()


def _give_memory(built: torch.nn.Module, stored: Mapping[str, torch.Tensor], place: str) -> None:
    """Move the tensors of a model that are on the meta device to the CPU; they get their values later.

    Tied ones stay tied. ConfigError for one of which the file has no values.
    """
    made = dict[int, torch.Tensor]()
    for prefix, module in built.named_modules():
        for held in (module._parameters, module._buffers, vars(module)):
            for own, tensor in held.items():
                if not isinstance(tensor, torch.Tensor) or not tensor.is_meta:
                    continue
                name = f"{prefix}.{own}" if prefix else own
                if name not in stored:
                    raise ConfigError(
                        "a file must have the values of all tensors that a model has on the meta device, got none of "
                        f"{name}: make the model on another device ({place})"
                    )
                if id(tensor) not in made:
                    empty = torch.empty_like(tensor, device="cpu")
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
                held[own] = made[id(tensor)]


def _shared(names: list[str], stored: dict[str, torch.Tensor]) -> list[list[str]]:
    """Split a tie into the parts that were tied in the saved model: a file keeps one tensor in one place of memory."""
    parts: dict[Any, list[str]] = {}
    for name in names:
        value = stored.get(name)
        place = None if value is None else (value.data_ptr(), value.dtype, value.shape, value.stride())
        parts.setdefault(place, []).append(name)
    return list(parts.values())


def _check_values(
    fingerprints: dict[str, str], stored: dict[str, torch.Tensor], built: torch.nn.Module, place: str
) -> None:
    """Raise unless a model holds what was saved; files of older versions have no fingerprints."""
    for name, tensor in named_tensors(built).items():
        saved = fingerprints.get(name)
        if saved is None or fingerprint(tensor) == saved:
            continue
        if fingerprint(stored[name]) != saved:
            raise DataError(f"a dense model's file must hold what was saved, got other values ({name}, {place})")
        raise ConfigError(
            "a dense model must be loaded into the model it was pruned from, got one that shares tensors between "
            f"modules that the saved model doesn't share ({name}, {place})"
        )


def _write_safe(document: dict[str, Any], path: _PathLike) -> None:
    """Write the tensors as safetensors, each once, and all else as JSON into the header."""
    tensors = document["state_dict"] | document["buffers"]
    stored_as, values = dict[str, str](), dict[str, torch.Tensor]()
    for names in _shared([*tensors], tensors):
        first = names[0]
        stored_as |= dict.fromkeys(names, first)
        # A copy, for safetensors takes no two views of one memory.
        values[first] = tensors[first].cpu().contiguous().clone()
    recipe = document | {"state_dict": stored_as, "buffers": [*document["buffers"]]}
    try:
        save_file(values, os.fspath(path), {_RECIPE: json.dumps(recipe)})
    except SafetensorError as error:
        number = re.search(r"(?:os error |code: )(\d+)", str(error))  # "Os { code: 2, ... }" before 0.6
        raise (error if number is None else OSError(int(number[1]), os.strerror(int(number[1])))) from error


def _read_safe(path: _PathLike) -> Any:
    """Read what `_write_safe` wrote."""
    with safe_open(os.fspath(path), "pt") as file:
        recipe = json.loads((file.metadata() or {}).get(_RECIPE, "null"))
        if not isinstance(recipe, dict):
            return None
        values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    stored_as, buffers = recipe["state_dict"], recipe["buffers"]
    if unknown := values.keys() - {*stored_as.values()}:
        raise DataError(f"a dense model's recipe must name every tensor, got none of {min(unknown)} ({path})")
    tensors = {name: values[first] for name, first in stored_as.items()}
    in_buffers = {name: tensors.pop(name) for name in buffers}
    return recipe | {"state_dict": tensors, "buffers": in_buffers}


def _read(path: _PathLike) -> dict[str, Any]:
    """Read a file and check that it is one of ours."""
    file = path_of(path)
    place = os.fspath(file)
    with reading(file, "a dense model's file", "written by nni_topo.save"):
        document = _read_safe(file) if _is_safe(file) else read_tensors(file)
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        is_state = isinstance(document, dict) and all(isinstance(each, torch.Tensor) for each in document.values())
        got = "a state_dict, which load_state_dict takes" if document and is_state else "another kind"
        raise DataError(f"a dense model's file must be written by nni_topo.save, got {got} ({place})")
    if document.get("format_version") != _FORMAT_VERSION:
        raise DataError(
            f"a dense model's file must have format version {_FORMAT_VERSION}, got "
            f"{document.get('format_version')!r} from nni_topo {document.get('package_version')} ({place})"
        )
    document = _OLDER | document
    wrong = [str(key) for key in {**_KINDS, **document} if not isinstance(document.get(key), _KINDS.get(key, ()))]
    if wrong:
        raise DataError(f"a dense model's file must hold {', '.join(_KINDS)}, got it wrong at {wrong[0]!r} ({place})")
    return document


def _is_safe(file: Path) -> bool:
    """Tell whether a file is one of safetensors, by its content, for it may have been renamed; else by its name."""
    with file.open("rb") as stream:
        start = stream.read(9)
    # PyTorch's files are zip archives; those of safetensors have JSON after the number of its bytes, of 8 bytes.
    return start[8:] == b"{" or (file.suffix == _SAFE and not start.startswith(b"PK"))


def _take_out(blocks: dict[str, Any], model: torch.nn.Module, place: str) -> None:
    """Take the blocks out of a model that the file's model lacks, unless it was built without them."""
    modules, missing = dict(model.named_modules()), {}
    for name, kept in blocks.items():
        is_list = isinstance(kept, list) and bool(kept) and all(type(each) is int and each >= 0 for each in kept)
        if not is_list or kept != sorted(set(kept)):
            raise DataError(f"a recipe must number blocks in ascending order, got {kept!r:.80} ({name}, {place})")
        lists = isinstance(modules.get(name), (torch.nn.ModuleList, torch.nn.Sequential))
        count = len(modules[name]._modules) if lists else 0
        if count != len(kept):
            missing[name] = kept
            if kept[-1] >= count:
                rule = "a dense model must be loaded into the model it was pruned from"
                raise ConfigError(f"{rule}, got {count} blocks where block {kept[-1]} is kept ({name}, {place})")
    take_out_others(model, missing)


def _take_out_parts(parts: dict[str, Any], model: torch.nn.Module, place: str) -> None:
    """Take the parts out of a model's blocks that the file's model lacks."""
    modules = dict(model.named_modules())
    for name, outputs in parts.items():
        if type(outputs) is not int or outputs < 0:
            raise DataError(f"a recipe must say how many outputs a part had, got {outputs!r:.80} ({name}, {place})")
        if name not in modules:
            rule = "a dense model must be loaded into the model it was pruned from"
            raise ConfigError(f"{rule}, got one without a part that is to be taken out ({name}, {place})")
        take_out_part(model, name, outputs)


def _check_fit(document: dict[str, Any], model: torch.nn.Module, place: str) -> None:
    """Raise unless the file could come from a pruned copy of the model."""
    rule = "a dense model must be loaded into the model it was pruned from"
    stored: dict[str, dict[str, Any]] = document["modules"]
    _check_names(document, model, rule, place)
    modules, tensors = _modules_described(document, model), dict(model.state_dict(keep_vars=True))
    resizable = {*find_attention(model)}
    for name, module in model.named_modules(remove_duplicate=False):
        if size_names(module):
            resizable.add(name)
    for name, description in stored.items():
        kind, sizes = _checked(description, name, place)
        known = describe(modules[name])
        counts = "counted" in sizes and known["sizes"].keys() <= sizes.keys()
        if kind != known["type"] and not counts:
            raise ConfigError(f"{rule}, got {kind} where the model has {known['type']} ({name}, {place})")
        if not counts and sizes.keys() != known["sizes"].keys():
            raise DataError(f"a recipe must hold {', '.join(known['sizes'])}, got {', '.join(sizes)} ({name}, {place})")
    for name, tensor in tensors.items():
        if name.rpartition(".")[2] == _EXTRA_STATE:
            continue
        small, full = tuple(document["state_dict"][name].shape), tuple(tensor.shape)
        fits = len(small) == len(full) and all(a <= b for a, b in zip(small, full, strict=True))
        if small != full and not (fits and (name.rpartition(".")[0] in resizable or can_follow(name, tensor))):
            raise ConfigError(f"{rule}, got shape {small} where the model has {full} ({name}, {place})")
    for name, description in stored.items():
        _check_sizes(modules[name], description["sizes"], document, name, place)


def _check_sizes(
    module: torch.nn.Module, sizes: dict[str, Any], document: dict[str, Any], name: str, place: str
) -> None:
    """Raise unless a recipe's sizes are at most those of the unpruned module and are those of the file's tensors."""
    known = describe(module)["sizes"]
    for key, size in sizes.items():
        if key == "counted":
            continue
        before = known.get(key, size)
        new, old = size if isinstance(size, list) else [size], before if isinstance(before, list) else [before]
        if len(new) != len(old) or any(not min(most, 1) <= one <= most for one, most in zip(new, old, strict=True)):
            raise ConfigError(
                "a dense model must be loaded into the model it was pruned from, got "
                f"{key} {size} where the model has {known.get(key)} ({name}, {place})"
            )
    tensors = {**document["state_dict"], **document["buffers"]}
    stated, stated_unpruned = _stated(module, sizes), _stated(module, known)
    for own, shape in stated.items():
        # A user's class may hold its tensors in another way, which the model shows.
        mine, tensor = getattr(module, own, None), tensors.get(f"{name}.{own}".lstrip("."))
        is_usual = isinstance(mine, torch.Tensor) and mine.shape[: len(shape)] == stated_unpruned[own]
        if is_usual and tensor is not None and tensor.shape[: len(shape)] != shape:
            got = f"{sizes} for a {own} of shape {tuple(tensor.shape)}"
            raise DataError(f"a recipe's sizes must be those of its tensors, got {got} ({name}, {place})")
    if "counted" in sizes:
        least, most = _counts(module, tensors.get(f"{name}.taps".lstrip(".")))
        if not least <= sizes["counted"] <= most:
            rule = f"a recipe must count {least} channels" + ("" if least == most else " or more")
            raise DataError(f"{rule}, got {sizes['counted']} ({name}, {place})")


def _stated(module: Any, sizes: dict[str, Any]) -> dict[str, tuple[float, ...]]:
    """Return the first dimensions of a module's tensors, by name, if it has these sizes; NaN where no tensor fits."""
    if isinstance(module, torch.nn.modules.conv._ConvNd):
        groups = sizes["groups"]
        if module.transposed:
            return {"weight": (sizes["in_channels"], sizes["out_channels"] / groups)}
        # Inputs and outputs are dealt out to the groups alike.
        return {"weight": (sizes["out_channels"] // groups * groups, sizes["in_channels"] / groups)}
    if isinstance(module, torch.nn.Linear):
        return {"weight": (sizes["out_features"], sizes["in_features"])}
    if isinstance(module, torch.nn.modules.batchnorm._NormBase):
        return dict.fromkeys(("weight", "running_mean"), (sizes["num_features"],))
    if isinstance(module, torch.nn.GroupNorm):
        fits = sizes["num_channels"] % sizes["num_groups"] == 0
        return {"weight": (sizes["num_channels"] if fits else math.nan,)}
    if isinstance(module, torch.nn.RNNBase):
        gates = module.get_parameter("weight_hh_l0").shape[0] // module.hidden_size
        return {"weight_ih_l0": (gates * sizes["hidden_size"], sizes["input_size"])}
    if isinstance(module, (torch.nn.LayerNorm, torch.nn.RMSNorm)):
        return {"weight": tuple(sizes["normalized_shape"])}
    if isinstance(module, torch.nn.Embedding):
        return {"weight": (sizes["num_embeddings"], sizes["embedding_dim"])}
    if isinstance(module, torch.nn.PReLU):
        return {"weight": (sizes["num_parameters"],)}
    return {}


def _counts(module: Any, taps: torch.Tensor | None) -> tuple[int, float]:
    """Return the least and the largest original width that a module cut from this one may have in its statistics."""
    if hasattr(module, "counted"):
        return module.counted, module.counted
    if isinstance(module, torch.nn.Conv1d):  # a channel-wise convolution, which doesn't know the number of channels
        return (1 if taps is None else len(taps)), math.inf
    if isinstance(module, torch.nn.GroupNorm):
        return (module.num_channels // module.num_groups,) * 2
    if isinstance(module, (torch.nn.LayerNorm, torch.nn.RMSNorm)):
        return (module.normalized_shape[0],) * 2
    return (next(module.parameters()).numel(),) * 2


def _checked(description: Any, name: str, place: str) -> tuple[str, dict[str, Any]]:
    """Return the type and sizes that a recipe has of a module."""
    match description:
        case {"type": str(kind), "sizes": dict(sizes)}:
            numbers = list[Any]()
            for size in sizes.values():
                numbers += size if type(size) is list else [size]
            if all(type(number) is int and number >= 0 for number in numbers):
                return kind, sizes
    raise DataError(f"a recipe must give a module's type and whole sizes, got {description!r:.80} ({name}, {place})")


def _by_keys(value: Any) -> dict[str, Any]:
    """List numbers by the keys that lead to them, as `places_of` has them."""
    if isinstance(value, dict):
        return value
    return {str(at): each for at, each in enumerate(value)} if isinstance(value, list) else {"": value}


def _smaller(stored: dict[str, Any], model: torch.nn.Module, place: str) -> dict[Place, int]:
    """List the numbers in attributes that are smaller than in the unpruned model; the others say no size."""
    found: dict[Place, int] = {}
    known, places = sizes_of(model), places_of(model)
    for name, value in stored.items():
        new, old = _by_keys(value), _by_keys(known.get(name, []))
        if any(type(each) is not int for each in new.values()):
            raise DataError(f"a recipe must hold whole numbers, got {value!r:.80} ({name}, {place})")
        if type(value) is type(known.get(name)) and new.keys() == old.keys():
            found |= {places[name][keys]: size for keys, size in new.items() if 0 < size < old[keys]}
    return found


def _modules_described(document: dict[str, Any], model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return the modules of a model that a recipe has to describe, by name."""
    # A response norm has a size only where it was pruned.
    return {
        name: module
        for name, module in model.named_modules()
        if size_names(module) or (name in document["modules"] and response_norm(module))
    }


def _check_names(document: dict[str, Any], model: torch.nn.Module, rule: str, place: str) -> None:
    """Raise unless a file has the modules and tensors of a model."""
    problem = _name_problem(document, model)
    if problem:
        fits_plain = not _name_problem(document, as_torch_layers(model))
        hint = ": the file fits nni_topo.as_torch_layers(model)" if fits_plain else ""
        raise ConfigError(f"{rule}, got {problem}{hint} ({place})")


def _is_extra_state(name: str) -> bool:
    return name.rpartition(".")[2] == _EXTRA_STATE


def _name_problem(document: dict[str, Any], model: torch.nn.Module) -> str:
    """Say which modules or tensors a file has and a model lacks, or the other way round; "" if none."""
    of_file = document["modules"], document["state_dict"]
    of_model = _modules_described(document, model), model.state_dict(keep_vars=True)
    for kind, stored, known in zip(("modules", "tensors"), of_file, of_model, strict=True):
        for problem, names in (
            ("missing in the model", stored.keys() - known.keys()),
            # A module that had no extra state when the file was written may have some by now.
            ("missing in the file", {name for name in known.keys() - stored.keys() if not _is_extra_state(name)}),
        ):
            if names:
                return f"{kind} {problem}: {listed(sorted(names))}"
    return ""


def _resize_heads(model: torch.nn.Module, attention: Attention, size: Any, place: str) -> None:
    """Set the number of heads of attention and the size of each; its layers are cut already."""
    layer, channels = next(iter(attention.channels.items()))
    module, full_size = model.get_submodule(attention.name), attention.head_size
    if type(size) is not int or not 0 < size <= full_size:
        raise DataError(f"a head must have 1 to {full_size} channels, got {size!r:.80} ({attention.name}, {place})")
    weight = weight_of(model.get_submodule(layer))
    # Rows by the sizes of a head: those of one head, and those that all heads share, which stay.
    of_head = channels.shape[1] // full_size
    of_all = sum(rows.size // full_size for rows in attention.shared.get(layer, ()))
    heads = (len(weight) // size - of_all) // of_head
    resize(module, attention, heads, weight.shape[1])
    if size < full_size:
        set_size(module, full_size, size, heads)


def _own_widths(model: torch.nn.Module) -> dict[str, int]:
    """Return the modules whose forward no longer takes the width of its input, by name with the dimension."""
    found = dict[str, int]()
    for name, module in model.named_modules():
        dim = own_width_of(module)
        if dim is not None:
            found[name] = dim
    return found


def _take_own_widths(stored: dict[str, Any], model: torch.nn.Module, place: str) -> None:
    """Let the forwards of some modules take no width from their input."""
    modules = dict(model.named_modules())
    for name, dim in stored.items():
        if dim not in (FIRST, LAST):
            raise DataError(f"a recipe must say {LAST} or {FIRST} of a width, got {dim!r:.80} ({name}, {place})")
        if name not in modules or not (own_width_of(modules[name]) == dim or take_own_width(modules[name], dim)):
            rule = "a dense model must be loaded into the model it was pruned from"
            raise ConfigError(f"{rule}, got one without a forward that takes the width of its input ({name}, {place})")


def _resize(module: torch.nn.Module, sizes: dict[str, Any]) -> None:
    if "counted" in sizes and isinstance(module, torch.nn.Conv1d):
        make_channelwise(module, 1)  # the file holds the places of the kept channels
        module.counted = sizes["counted"]
    elif "counted" in sizes:
        keep_original_width(module, sizes["counted"])
    for name in size_names(module):
        size = sizes[name]
        setattr(module, name, tuple(size) if isinstance(size, list) else size)


@public(folder=ANYTHING)
def save_pretrained(dense: Any, folder: str | os.PathLike[str], *, card: bool = True) -> None:
    """Save a pruned model of Transformers as a folder that its ``from_pretrained`` loads without this package.

    Parameters
    ----------
    dense : transformers.PreTrainedModel
        A model made by `nni_topo.to_dense`. It isn't changed.
    folder : str or path-like
        The folder for ``config.json`` and ``model.safetensors``; made where there is none.
    card : bool, default=True
        Whether to write a model card for the Hugging Face hub, ``README.md``, from the model's report: what was pruned
        by what, the sizes before and after, and how much its answers change. An existing file is replaced only if it is
        such a card and nobody has changed it. A model without a report, as :func:`nni_topo.load` returns it, gets none,
        nor does one whose size has changed since.

    Raises
    ------
    ConfigError
        If the model isn't one of Transformers, its adapters merged, or its config can't say how wide its layers are: it
        has one number for all blocks, so all must be equally wide, but for heads, which Transformers 4 can prune block
        by block in BERT and its like (``config.pruned_heads``), and Transformers 5 takes only some numbers of heads.
        `save` and `load` take every model. If ``card`` isn't a bool.
    SpeedupError
        If the model is still wrapped by NNI.

    See Also
    --------
    save : One file for every model, for `load`.
    """
    place = path_of(folder, "folder")
    check_free_disk(place, 0)
    check_unwrapped(dense)
    name = type(dense).__name__
    if not is_pretrained(dense):
        raise ConfigError(
            f"a model must be one of Transformers, with adapters merged, got {name}; nni_topo.save takes any "
            "(save_pretrained)"
        )
    described = _described(dense)
    if described.why:
        raise ConfigError(
            f"from_pretrained must be able to build the model by its config, {described.why}; nni_topo.save and "
            f"nni_topo.load take it ({described.place}{name})"
        )
    if described.pruned_heads != (getattr(dense.config, "pruned_heads", None) or {}):
        dense.config.pruned_heads = described.pruned_heads  # put back at the end, as all of the model
    place = output_folder(place)
    with disk_errors(place), tempfile.TemporaryDirectory(dir=place) as beside:
        dense.save_pretrained(beside)
        report = report_of(dense)
        # One that was changed since, such as by `remove_blocks`, isn't what its report says.
        is_told = report is not None and report.parameters_left in (None, _parameters(dense))
        if card and report is not None and is_told and may_write_card(place / CARD):
            (Path(beside) / CARD).write_text(model_card(dense, report), encoding="utf-8")
        for file in sorted(Path(beside).iterdir()):
            with whole_file(place / file.name) as part:
                file.replace(part)


@dataclass(frozen=True)
class _Described:
    """Whether a model of Transformers can be built by its config."""

    why: str = ""  # what its config can't say; empty where it says everything
    place: str = ""  # the module that it can't say it of, with a comma
    pruned_heads: dict[int, list[int]] = field(default_factory=dict)  # what Transformers 4 has to be told beside it


def why_undescribed(model: Any) -> str:
    """Return what the config of a model of Transformers can't say of it; empty where `save_pretrained` takes it."""
    found = _described(model)
    place = f" ({found.place.removesuffix(', ')})" if found.place else ""
    return found.why + place


def tell_pruned_heads(model: Any) -> None:
    """Let the config of a pruned model name the heads that it lost, if that describes it: its own `save_pretrained`."""
    found = _described(model)
    if found.pruned_heads and not found.why:
        model.config.pruned_heads = found.pruned_heads


def _described(dense: Any) -> _Described:
    if parts := removed_parts(dense):
        return _Described("which has all parts in each block, got a model without some", f"{min(parts)}, ")
    config = copy.deepcopy(dense.config)
    known = dict(getattr(config, "pruned_heads", None) or {})
    config.pruned_heads = {}
    try:
        plain = built_by_config(dense, config)
    except Exception as error:  # each constructor has errors of its own
        return _Described(f"by which its class can't be built: {raised(error)}")
    _leave_out(plain, dense)
    got = _structure(dense)
    # What a model was loaded with comes first: Transformers knows heads that this package doesn't.
    for heads in (known, _pruned_heads(plain, dense)):
        built = copy.deepcopy(plain)
        if heads:
            built.prune_heads(heads)
        wanted = _structure(built)
        different = [each for each in {**wanted, **got} if wanted.get(each) != got.get(each)]
        if not different:
            break
    if different:
        first = different[0]
        before, after = find_attention(built).get(first), find_attention(dense).get(first)
        fewer = before is not None and after is not None and after.heads < before.heads
        why = "which has one width for all blocks"
        if fewer and not heads:
            why += f" (Transformers {version('transformers')} prunes no heads of this class)"
        return _Described(f"{why}, got {got.get(first)} where the config makes {wanted.get(first)}", f"{first}, ")
    try:
        # Transformers 5 also does so when it writes and reads a config.
        validate = getattr(dense.config, "validate", None)
        if callable(validate):
            validate()
    except Exception as error:
        told = f"Transformers {version('transformers')} refuses: {' '.join(str(error).split())}"
        return _Described(f"which {told}")
    return _Described(pruned_heads=heads)


def _leave_out(plain: torch.nn.Module, dense: torch.nn.Module) -> None:
    """Remove from a model built by its config the parts that another one was made without.

    An argument says so, such as ``add_pooling_layer=False``, which isn't in the config; ``from_pretrained`` takes it.
    """
    own = dict(dense.named_modules())
    for name, module in list(plain.named_modules()):
        for key in [key for key, child in module._modules.items() if child is not None]:
            if name in own and hasattr(own[name], key) and getattr(own[name], key) is None:
                setattr(module, key, None)


def _parameters(model: torch.nn.Module) -> int:
    return sum(each.numel() for each in model.parameters())


def _pruned_heads(plain: Any, dense: torch.nn.Module) -> dict[int, list[int]]:
    """Return ``config.pruned_heads`` for a model: pruned heads, by the number of their block.

    Which heads of a block are named makes no difference: the values of the others come from the file. Empty where the
    class can't prune heads, as none can since Transformers 5.
    """
    unpruned, pruned = find_attention(plain), find_attention(dense)
    probe, found = copy.deepcopy(plain), dict[int, list[int]]()
    for block in itertools.count():
        before = {name: each.heads for name, each in find_attention(probe).items()}
        try:
            probe.base_model._prune_heads({block: [0]})
        except Exception:  # there is no such block, or the class has heads that stay; each says so in its own way
            return found
        after = {name: each.heads for name, each in find_attention(probe).items()}
        changed = [name for name, count in before.items() if after.get(name, 0) != count]
        if not changed:
            return found
        missing = {unpruned[name].heads - pruned[name].heads if name in pruned else 0 for name in changed}
        count = missing.pop()
        # A block whose attention modules lose different numbers can't be described.
        if not missing and count > 0:
            found[block] = list(range(count))
    return found


def _structure(model: torch.nn.Module) -> dict[str, Any]:
    """Return what a config has to reproduce: the heads, the modules' sizes and the tensors' shapes, by name."""
    heads = {name: f"{each.heads} heads of {each.head_size}" for name, each in find_attention(model).items()}
    # Norms in the place of Transformers' own compute the same, if they have no statistics of another width; their
    # weights have the width already.
    described = []
    for name, module in model.named_modules():
        is_plain = isinstance(module, (torch.nn.RMSNorm, torch.nn.LayerNorm)) and not hasattr(module, "counted")
        if size_names(module) and not is_plain:
            described.append((name, module))
    sizes = {name: describe(module) for name, module in described}
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()}
    for name in list(shapes):
        owner, _, key = name.rpartition(".")
        if key == HEADS_TAKEN and takes_all_heads(model.get_submodule(owner)):
            del shapes[name]  # the model's own class computes the same table
    return heads | sizes | shapes


_NOTE = "kept_blocks"


def take_out(model: nn.Module, parent: str, first: int, count: int) -> None:
    """Take ``count`` blocks out of an ``nn.ModuleList`` or ``nn.Sequential``, from number ``first`` on, in place."""
    container: Any = model.get_submodule(parent)
    kept = list(getattr(container, _NOTE, range(len(container))))
    del container[first : first + count]
    del kept[first : first + count]
    setattr(container, _NOTE, tuple(kept))
    # Layers of Transformers look up their cached states by these numbers.
    for block in list(container)[first:]:
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx -= count


def kept_blocks(model: nn.Module) -> dict[str, list[int]]:
    """Return the numbers of the blocks that are kept, by the names of the lists that lost any."""
    return {name: list(getattr(module, _NOTE)) for name, module in model.named_modules() if hasattr(module, _NOTE)}


def take_out_others(model: nn.Module, kept: Mapping[str, list[int]]) -> None:
    """Take all blocks but the ``kept`` ones out of an unpruned model, in place."""
    before = {parent: len(model.get_submodule(parent)._modules) for parent in kept}
    for parent, numbers in kept.items():
        for number in sorted(set(range(before[parent])) - set(numbers), reverse=True):
            take_out(model, parent, number, 1)
    tell_depth(model, {parent: (before[parent], numbers) for parent, numbers in kept.items()})


def tells_depth(model: Any, parent: str) -> bool:
    """Say whether the ``config`` of a model of Transformers has the number of blocks in a list."""
    config: Any = getattr(model, "config", None)
    count = len(model.get_submodule(parent)._modules)
    return getattr(config, "num_hidden_layers", None) == count and not config.is_encoder_decoder


def tell_depth(model: Any, kept: Mapping[str, tuple[int, list[int]]]) -> None:
    """Set the number of blocks in the ``config`` of a model of Transformers, if that describes one list of blocks.

    ``kept``: by list, how many blocks there were, and the numbers of those that are kept.
    """
    config: Any = getattr(model, "config", None)
    count, numbers = next(iter(kept.values()), (0, []))
    if len(kept) != 1 or getattr(config, "num_hidden_layers", None) != count or config.is_encoder_decoder:
        return
    config.num_hidden_layers = len(numbers)
    kinds = getattr(config, "layer_types", None)
    if isinstance(kinds, list) and len(kinds) == count:
        config.layer_types = [kinds[number] for number in numbers]


class RemovedPart(nn.Module):
    """Takes the place of a part of a block that was removed, and adds nothing to the stream.

    Parameters
    ----------
    outputs : int, default=0
        The length of the tuple that the part returned, whose first entry is zeros and all others None; 0: it returned a
        tensor.
    """

    def __init__(self, outputs: int = 0) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return zeros of the shape of the first tensor."""
        zeros: torch.Tensor = torch.zeros_like(tensors_of((args, kwargs))[0])
        return (zeros, *[None] * (self.outputs - 1)) if self.outputs else zeros


def take_out_part(model: nn.Module, name: str, outputs: int) -> None:
    """Take a part of a block out, in place; ``outputs`` as for `RemovedPart`."""
    parent, _, key = name.rpartition(".")
    removed = RemovedPart(outputs)
    removed.train(model.get_submodule(name).training)
    setattr(model.get_submodule(parent), key, removed)


def removed_parts(model: nn.Module) -> dict[str, int]:
    """Return the parts that were taken out of blocks, with the lengths of the tuples that they returned."""
    return {name: module.outputs for name, module in model.named_modules() if isinstance(module, RemovedPart)}
