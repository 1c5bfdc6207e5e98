"""Save a dense model in one file without code in it, and build it again from the unpruned model.

The file holds tensors as safetensors, and in its header a recipe in JSON: the sizes by module, and the removed blocks.
Reading a file from elsewhere runs no code. The forward isn't in the file: it comes with the model that the file is
loaded into, whose layers are made smaller to fit.

A pruned model of Transformers can also be saved as a folder that loads without this package.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from nni_topo._version import __version__
from nni_topo.disk import (
    check_free_disk,
    disk_errors,
    output_folder,
    path_of,
    reading,
    scratch_folder,
    whole_file,
    write_safetensors,
)
from nni_topo.errors import ConfigError, DataError, listed, raised
from nni_topo.network.attention.config import built_by_config, is_pretrained
from nni_topo.network.attention.heads import find_attention, resize
from nni_topo.network.attention.unfused.own_width import FIRST, LAST, own_width_of, take_own_width
from nni_topo.network.io.exporting import FORMATS
from nni_topo.network.layers.derived import fold
from nni_topo.network.layers.integer_attributes import Place, numbers_in, numbers_of, put_sizes
from nni_topo.network.layers.kinds import is_transposed_linear, with_linear_layers, with_transposed_weights
from nni_topo.network.runtime.arguments import NETWORK, check_float, check_unwrapped
from nni_topo.network.runtime.copies import detached_copy, forget_evaluated
from nni_topo.network.runtime.inputs import model_within, tensors_of
from nni_topo.network.runtime.public import public
from nni_topo.network.runtime.reports import report_of
from nni_topo.network.runtime.switches import random_state_kept
from nni_topo.rules import ANYTHING, Rule, all_of, check_knobs, checked, rule_of, taking, whole
from nni_topo.sharing import find_ties, named_tensors, tie_again, untie

_FORMAT = "nni-topo dense model"
_FORMAT_VERSION = 3
_RECIPE = "nni_topo"  # the recipe's key in the header of a file
_OTHER = "a dense model must be loaded into the model it was pruned from"

_PathLike = str | os.PathLike[str]


def _is_ascending(numbers: Sequence[int]) -> bool:
    return len(numbers) > 0 and numbers[0] >= 0 and all(one < other for one, other in pairwise(numbers))


_NUMBERS = rule_of(Mapping[str, list[int]])
_RULES = {
    "stored_as": rule_of(Mapping[str, str]),
    "not_persistent": rule_of(list[str]),
    "layers": rule_of(Mapping[str, str]),
    "sizes": rule_of(list[tuple[str, str, list[int | str], int]]),
    "attention": Rule(
        "a mapping of names to three numbers from 1 on",
        lambda value: _NUMBERS.holds(value) and all(len(each) == 3 and min(each) > 0 for each in value.values()),
    ),
    "own_widths": Rule(
        f"a mapping of names to {FIRST} or {LAST}",
        lambda value: rule_of(Mapping[str, int]).holds(value) and set(value.values()) <= {FIRST, LAST},
    ),
    "blocks": Rule(
        "a mapping of names to ascending numbers from 0 on",
        lambda value: _NUMBERS.holds(value) and all(map(_is_ascending, value.values())),
    ),
    "parts": all_of(whole(0), Mapping),
}
"""Rules for the keys of a recipe that `load` reads."""


_UNPRUNED = Rule(
    "the unpruned torch.nn.Module or a function without arguments that makes it",
    lambda value: isinstance(value, nn.Module) or taking().holds(value),
    tell=NETWORK.tell,
)


def save(dense: nn.Module, path: _PathLike) -> None:
    """Save a dense model, with its non-persistent buffers and without pickled code.

    Parameters
    ----------
    dense : nn.Module
        A model made by `nni_topo.to_dense`, fine-tuned or not. It isn't changed. If it is compiled, or in
        ``DataParallel`` or ``DistributedDataParallel``, the inner model is saved.
    path : str or path-like
        The file to write, completely or not at all; an existing one is replaced. It holds safetensors, whatever its
        name, and the recipe (the sizes of each module) as JSON under ``"nni_topo"`` in its metadata.

    Raises
    ------
    ConfigError
        If ``dense`` is no module or is quantised, or the path ends in ``.onnx`` or ``.pt2``, as files of
        :func:`nni_topo.export` do, or the model's state_dict holds more than parameters and buffers.
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
    check_knobs("save", {"dense": dense}, {"dense": NETWORK})
    if place.suffix.lower() in FORMATS:
        raise ConfigError(f"files that end in {place.suffix} are those of nni_topo.export, got it for save ({place})")
    dense = model_within(dense)
    check_unwrapped(dense)
    check_float("model that is saved", dense, "save")
    tensors, state = named_tensors(dense), dense.state_dict(keep_vars=True)
    for name, value in state.items():
        if name not in tensors and value is not None:
            raise ConfigError(f"the state of a saved model must be its parameters and buffers, got more ({name})")
    first_names, stored_as, values = dict[int, str](), dict[str, str](), dict[str, Tensor]()
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise DataError(f"a saved model must have values, got a tensor on the meta device, without any ({name})")
        stored_as[name] = first_names.setdefault(id(tensor), name)
        if stored_as[name] == name:
            # Copies, because safetensors refuses tensors that share memory.
            values[name] = tensor.detach().cpu().contiguous().clone()
    attention = find_attention(dense)
    own_widths = {name: own_width_of(module) for name, module in dense.named_modules()}
    recipe = {
        "format": _FORMAT,
        "format_version": _FORMAT_VERSION,
        "package_version": __version__,
        "stored_as": stored_as,  # by tensor name, the name in the file; shared tensors are stored once
        "not_persistent": [name for name in tensors if name not in state],
        "layers": _layers(dense),
        "sizes": [[*place, number] for place, number in _sizes(dense).items()],
        "attention": {name: [each.query_heads, each.head_size, each.width] for name, each in attention.items()},
        "own_widths": {name: dim for name, dim in own_widths.items() if dim is not None},
        "blocks": kept_blocks(dense),
        "parts": removed_parts(dense),
    }
    recipe["digest"] = _digest(recipe, values)
    with whole_file(place) as part:
        write_safetensors(part, values, {_RECIPE: json.dumps(recipe)})


@checked(path=ANYTHING, model=_UNPRUNED)
def load(path: _PathLike, model: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    """Build a saved dense model from the unpruned model.

    Parameters
    ----------
    path : str or path-like
        A file written by `save`.
    model : nn.Module or callable
        The unpruned model, with any weights, or a function without arguments that makes it. It isn't changed. If it is
        compiled or spread over devices, the inner model counts. If the pruned model was made by
        :func:`nni_topo.as_torch_layers`, pass the model that this function returns.

    Returns
    -------
    torch.nn.Module
        A copy of ``model`` with the sizes and values of the file, in the modes and on the devices of
        ``model``, in the precision of the file; tensors on the meta device move to the CPU. Layers that
        share a tensor in ``model`` share it if they did in the dense model.

    Raises
    ------
    DataError
        If the file is missing, damaged or changed, or isn't one that `save` writes.
    ConfigError
        If ``model`` is neither a module nor a function that makes one, or the file doesn't fit it: other modules, other
        types, larger sizes, one module under two names that were two modules in the dense model, or tensors
        on the meta device whose values the file lacks.

    Examples
    --------
    >>> import tempfile
    >>> make = lambda width=3: torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Linear(width, 2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(make(width=2), f"{folder}/dense.safetensors")
    ...     load(f"{folder}/dense.safetensors", make)
    Sequential(
      (0): Linear(in_features=4, out_features=2, bias=True)
      (1): Linear(in_features=2, out_features=2, bias=True)
    )
    """
    file = path_of(path)
    recipe, values = _read(file)
    built = detached_copy(model_within(model)) if isinstance(model, nn.Module) else model_within(model())
    check_knobs("load", {"model": built}, {"model": NETWORK})
    check_unwrapped(built)
    if report_of(built) is not None:
        del built.report  # it describes the unpruned model
    _take_out_missing(recipe, built, file)
    layers, modules = recipe["layers"], dict(built.named_modules())
    if any(layers.get(name) == "Linear" and is_transposed_linear(module) for name, module in modules.items()):
        with_linear_layers(built)  # the dense model's layers were converted before pruning
    for name, kind in layers.items():
        # A layer that computes its weight was replaced by a plain layer when it was cut.
        if name in modules and _plain_class(modules[name]) != kind:
            fold(modules[name])
    _check_fit(recipe, values, built, file)

    attention, ties = find_attention(built), find_ties(built)
    untie(built, ties)
    if any(tensor.is_meta for tensor in named_tensors(built).values()):
        built._apply(lambda each: torch.empty_like(each, device="cpu") if each.is_meta else each)
    stored_as, filled = recipe["stored_as"], dict[int, Tensor]()
    for name, tensor in named_tensors(built).items():
        if name in stored_as:
            value = values[stored_as[name]]
            first = filled.setdefault(id(tensor), value)
            if first is not value and not torch.equal(first, value):
                raise ConfigError(
                    f"{_OTHER}, got one that shares tensors between modules that the saved model doesn't share "
                    f"({name}, {file})"
                )
            tensor.data = value.to(tensor.device, copy=True)
    unpruned = _sizes(built)
    for name, each in attention.items():
        queries, size, width = recipe["attention"].get(name, (each.query_heads, each.head_size, each.width))
        if size != each.head_size:
            raise ConfigError(
                f"a dense model's heads must have as many channels as the unpruned model's, got {size} in the file and "
                f"{each.head_size} in the model ({name}, {file})"
            )
        resize(built.get_submodule(name), each, each.heads * queries // each.query_heads, width)
    current, sizes = _sizes(built), {}  # of attention a width may be the input's or the heads'
    for name, key, path_in, number in recipe["sizes"]:
        at = name, key, tuple(path_in)
        # Larger numbers don't count channels.
        if 0 < number <= unpruned.get(at, 0) and number != current.get(at):
            sizes[at] = number
    put_sizes(built, sizes)
    for name, dim in recipe["own_widths"].items():
        module = modules.get(name)
        if module is None or (own_width_of(module) != dim and not take_own_width(module, dim)):
            raise ConfigError(f"{_OTHER}, got one whose forward doesn't take the width of its input ({name}, {file})")
    for names in ties:
        shared: dict[str, list[str]] = {}
        for name in names:
            shared.setdefault(stored_as.get(name, name), []).append(name)
        tie_again(built, shared.values())
    if not built.training:
        forget_evaluated(built)
    return built


def _plain_class(module: nn.Module) -> str:
    """Return the name of a module's class; for a class that this package derived, the original class's."""
    return next(kind for kind in type(module).__mro__ if not kind.__module__.startswith("nni_topo.")).__name__


def _layers(model: nn.Module) -> dict[str, str]:
    """Return the classes of the modules that have parameters of their own, by name."""
    layers = {}
    for name, module in model.named_modules():
        if any(each is not None for each in module._parameters.values()):
            layers[name] = _plain_class(module)
    return layers


def _sizes(model: nn.Module) -> dict[Place, int]:
    """List the integers in attributes of a model's modules, PyTorch's layers included, by place."""
    sizes = numbers_of(model)
    for name, key, value in _layer_attributes(model):
        sizes |= {(name, key, path): number for path, number in (numbers_in(value) or {}).items()}
    return sizes


def _layer_attributes(model: nn.Module) -> Iterator[tuple[str, str, Any]]:
    """List the attributes of PyTorch's own layers: module name, key and value."""
    for name, module in model.named_modules():
        if type(module).__module__.startswith("torch.nn."):
            yield from ((name, key, value) for key, value in vars(module).items() if not key.startswith("_"))


def _digest(recipe: Mapping[str, Any], values: Mapping[str, Tensor]) -> str:
    """Return a digest of all that a file holds, because safetensors has no checksum."""
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode())
    for name in sorted(values):
        value = values[name].detach().cpu()
        value = (value if value.layout == torch.strided else value.to_dense()).contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the recipe and the tensors of a file, and check that nothing was changed since `save`."""
    what, written = "a dense model's file", "written by nni_topo.save"
    with reading(file, what, written):
        with safe_open(str(file), "pt") as opened:
            recipe: dict[str, Any] = json.loads((opened.metadata() or {}).get(_RECIPE, "{}"))
            if recipe.get("format") != _FORMAT:
                raise DataError(f"{what} must be {written}, got other safetensors ({file})")
            if recipe.get("format_version") != _FORMAT_VERSION:
                found = f"{recipe.get('format_version')!r} from nni_topo {recipe.get('package_version')}"
                raise DataError(f"{what} must have format version {_FORMAT_VERSION}, got {found} ({file})")
            values = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
        if recipe.pop("digest", None) != _digest(recipe, values):
            raise DataError(f"{what} must hold what was saved, got something else ({file})")
        # A digest can be computed for any content.
        check_knobs("recipe", {key: recipe.get(key) for key in _RULES}, _RULES)
        if missing := set(recipe["stored_as"].values()) - values.keys():
            raise DataError(f"{what} must hold the tensors that its recipe names, got no {listed(sorted(missing))}")
    return recipe, values


def _take_out_missing(recipe: dict[str, Any], model: nn.Module, file: Path) -> None:
    """Remove the blocks and parts that the saved model lacks, unless the model was built without them."""
    modules = dict(model.named_modules())
    for name, kept in recipe["blocks"].items():
        blocks = modules.get(name)
        count = len(blocks) if isinstance(blocks, (nn.ModuleList, nn.Sequential)) else 0
        if count == len(kept):
            continue
        if kept[-1] >= count:
            raise ConfigError(f"{_OTHER}, got {count} blocks where block {kept[-1]} is kept ({name}, {file})")
        keep_blocks(model, name, kept)
    modules = dict(model.named_modules())
    for name, outputs in recipe["parts"].items():
        if name not in modules or not name:
            raise ConfigError(f"{_OTHER}, got one without a part that is to be taken out ({name}, {file})")
        take_out_part(model, name, outputs)


def _is_computed(modules: Mapping[str, nn.Module], name: str) -> bool:
    """Tell whether a tensor of this name is computed from a model's parameters, as by weight norm."""
    place, _, key = name.rpartition(".")
    module = modules.get(place)
    return module is not None and (is_parametrized(module, key) or key in vars(module))


def _check_fit(recipe: dict[str, Any], values: dict[str, Tensor], model: nn.Module, file: Path) -> None:
    """Raise ConfigError unless the file can hold a pruned copy of the model."""
    tensors, layers = named_tensors(model), _layers(model)
    stored = {name: values[first] for name, first in recipe["stored_as"].items()}
    persistent = stored.keys() - set(recipe["not_persistent"])
    own = tensors.keys() & model.state_dict(keep_vars=True).keys()
    modules = dict(model.named_modules())
    for place, names in (("model", persistent - own), ("file", own - persistent)):
        if names:
            text = f"{_OTHER}, got tensors missing in the {place}: {listed(sorted(names))} ({file})"
            if any(_is_computed(modules, name) for name in persistent - own):
                text += "; the model computes them: load into nni_topo.as_torch_layers(model)"
            raise ConfigError(text)
    for name, kind in recipe["layers"].items():
        if layers.get(name, kind) != kind:
            raise ConfigError(f"{_OTHER}, got {kind} where the model has {layers[name]} ({name}, {file})")
    of_layers = {(name, key) for name, key, _ in _layer_attributes(model)}
    known = _sizes(model)
    for name, key, path_in, size in recipe["sizes"]:
        largest = known.get((name, key, tuple(path_in)), size)
        if (name, key) in of_layers and size > largest:
            raise ConfigError(f"{_OTHER}, got {key} {size} where the model has {largest} ({name}, {file})")
    for name in sorted(persistent):
        small, full = tuple(stored[name].shape), tuple(tensors[name].shape)
        if len(small) != len(full) or any(one > most for one, most in zip(small, full, strict=True)):
            raise ConfigError(f"{_OTHER}, got shape {small} where the model has {full} ({name}, {file})")
    for name, tensor in tensors.items():
        if tensor.is_meta and name not in stored:
            raise ConfigError(
                "a file must have the values of all tensors that a model has on the meta device, got none of "
                f"{name}: make the model on another device ({file})"
            )


@public(folder=ANYTHING)
def save_pretrained(dense: Any, folder: str | os.PathLike[str]) -> None:
    """Save a pruned model of Transformers as a folder that its ``from_pretrained`` loads without this package.

    Parameters
    ----------
    dense : transformers.PreTrainedModel
        A model made by `nni_topo.to_dense`. It isn't changed.
    folder : str or path-like
        The folder for ``config.json`` and ``model.safetensors``; created if it is missing.

    Raises
    ------
    ConfigError
        If the model isn't one of Transformers with adapters merged, or its config can't describe its widths: a config
        has one width for all blocks. Only the number of heads may differ between blocks, in BERT and similar models of
        Transformers 4 (``config.pruned_heads``); Transformers 5 accepts only some numbers of heads. `save` and `load`
        take every model.
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
    with_transposed_weights(dense)  # `dense` is a copy: see `public`
    if why := why_undescribed(dense):  # may change the copy's config
        raise ConfigError(
            f"from_pretrained must be able to build the model by its config, {why}; nni_topo.save and nni_topo.load "
            f"take it ({name})"
        )
    place = output_folder(place)
    with disk_errors(place), scratch_folder(place) as beside:
        dense.save_pretrained(beside)
        _check_loaded(dense, str(beside), name)
        for file in sorted(beside.iterdir()):
            with whole_file(place / file.name) as part:
                file.replace(part)


def _check_loaded(dense: Any, folder: str, name: str) -> None:
    """Raise ConfigError unless ``from_pretrained`` builds the model from a folder, with the same weights."""
    try:
        with random_state_kept():
            loaded = type(dense).from_pretrained(folder).state_dict()
    except Exception as error:  # each class has errors of its own
        raise ConfigError(
            f"from_pretrained must be able to load what save_pretrained writes, got {raised(error)}; nni_topo.save and "
            f"nni_topo.load take it ({name})"
        ) from error
    for key, tensor in dense.state_dict().items():
        other = loaded.get(key)
        if other is None or other.shape != tensor.shape or not torch.equal(other.to(tensor), tensor):
            raise ConfigError(
                f"from_pretrained must load the weights that save_pretrained writes, got others for {key}; "
                f"nni_topo.save and nni_topo.load take it ({name})"
            )


def why_undescribed(dense: Any) -> str:
    """Return why the config of a model of Transformers can't rebuild it, with the place; empty if it can.

    If the config has to list the removed heads, as in Transformers 4, they are added to it.
    """
    if parts := removed_parts(dense):
        return f"which has all parts in each block, got a model without some ({min(parts)})"
    config = copy.deepcopy(dense.config)
    known = dict(getattr(config, "pruned_heads", None) or {})
    config.pruned_heads = {}
    try:
        plain = built_by_config(dense, config)
    except Exception as error:  # each constructor has errors of its own
        return f"by which its class can't be built: {raised(error)}"
    # Arguments that leave out parts, such as ``add_pooling_layer=False``, aren't in the config.
    own = dict(dense.named_modules())
    for name, module in list(plain.named_modules()):
        for key in [key for key, child in module._modules.items() if child is not None]:
            if name in own and hasattr(own[name], key) and getattr(own[name], key) is None:
                setattr(module, key, None)
    got, wanted = _structure(dense), _structure(plain)
    heads = dict[int, list[int]]()
    if wanted != got:
        # Assumes one attention module in each block. Only the number of removed heads matters.
        kept, removed = find_attention(dense), dict[int, list[int]]()
        for block, (name, attention) in enumerate(find_attention(plain).items()):
            count = attention.heads - kept[name].heads if name in kept else 0
            if count > 0:
                removed[block] = list(range(count))
        # The config's own list comes first: it may have heads of modules that this package doesn't find.
        for candidate in (known, removed):
            built = copy.deepcopy(plain)
            try:
                built.prune_heads(candidate)
            except Exception:  # classes that can't prune heads raise different errors
                continue
            wanted = _structure(built)
            if wanted == got:
                heads = candidate
                break
        else:
            first = next(each for each in {**wanted, **got} if wanted.get(each) != got.get(each))
            before, after = find_attention(plain).get(first), kept.get(first)
            why = "which has one width for all blocks"
            if before is not None and after is not None and after.heads < before.heads:
                why += f" (Transformers {version('transformers')} prunes no heads of this class)"
            return f"{why}, got {got.get(first)} where the config makes {wanted.get(first)} ({first})"
    try:
        # Transformers 5 validates configs when it writes and reads them.
        validate = getattr(dense.config, "validate", None)
        if callable(validate):
            validate()
    except Exception as error:
        return f"which Transformers {version('transformers')} refuses: {' '.join(str(error).split())}"
    if heads != known:
        dense.config.pruned_heads = heads
    return ""


def _structure(model: Any) -> dict[str, Any]:
    """Return what a config must reproduce, by name: heads, sizes of layers and shapes of tensors."""
    heads = {name: f"{each.heads} heads of {each.head_size}" for name, each in find_attention(model).items()}
    sizes = {}
    tokens = getattr(model.config.get_text_config(), "vocab_size", None)
    for name, key, value in _layer_attributes(model):
        if key == "normalized_shape":  # a norm of PyTorch may replace one of Transformers
            continue
        if key == "padding_idx" and model.get_submodule(name).num_embeddings == tokens:
            # config.pad_token_id may have been set after loading. This stops a gradient only; of embeddings of
            # positions, as of RoBERTa, it is where positions start.
            continue
        if numbers_in(value) is not None:
            sizes[f"{name}.{key}"] = value
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()}
    return heads | sizes | shapes


_NOTE = "_kept_blocks"


def keep_blocks(model: nn.Module, parent: str, numbers: Sequence[int]) -> None:
    """Keep only the blocks with these numbers in an ``nn.ModuleList`` or ``nn.Sequential``, in place.

    The list records the numbers of its blocks in the unpruned model, and a config of Transformers their count.
    """
    container: Any = model.get_submodule(parent)
    blocks = list(container)
    known = getattr(container, _NOTE, range(len(blocks)))
    tell_depth(getattr(model, "config", None), len(blocks), numbers)
    del container[:]
    for new, old in enumerate(numbers):
        container.append(blocks[old])
        # Layers of Transformers find their cached states by this number.
        for module in blocks[old].modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx -= old - new
    setattr(container, _NOTE, tuple(known[number] for number in numbers))


def kept_blocks(model: nn.Module) -> dict[str, list[int]]:
    """Return the numbers of the kept blocks, by the names of the lists that lost blocks."""
    return {name: list(getattr(module, _NOTE)) for name, module in model.named_modules() if hasattr(module, _NOTE)}


def tells_depth(config: Any, count: int) -> bool:
    """Tell whether a config of Transformers holds a list's number of blocks."""
    return getattr(config, "num_hidden_layers", None) == count and not config.is_encoder_decoder


def tell_depth(config: Any, count: int, kept: Sequence[int]) -> None:
    """Set the number of blocks in a config of Transformers, if it was ``count``."""
    if tells_depth(config, count):
        config.num_hidden_layers = len(kept)
        kinds = getattr(config, "layer_types", None)
        if isinstance(kinds, list) and len(kinds) == count:
            config.layer_types = [kinds[number] for number in kept]


class RemovedPart(nn.Module):
    """Replaces a removed part of a block and adds zeros to the residual stream.

    Parameters
    ----------
    outputs : int, default=0
        Length of the returned tuple, whose first entry is zeros and whose others are None; 0: a tensor is returned.
    """

    def __init__(self, outputs: int = 0) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return zeros of the shape of the first tensor."""
        zeros: Tensor = torch.zeros_like(tensors_of((args, kwargs))[0])
        return (zeros, *[None] * (self.outputs - 1)) if self.outputs else zeros


def take_out_part(model: nn.Module, name: str, outputs: int) -> None:
    """Remove a part of a block, in place; ``outputs`` as for `RemovedPart`."""
    parent, _, key = name.rpartition(".")
    removed = RemovedPart(outputs)
    removed.train(model.get_submodule(name).training)
    setattr(model.get_submodule(parent), key, removed)


def removed_parts(model: nn.Module) -> dict[str, int]:
    """Return the removed parts of blocks by name, with their ``outputs``."""
    return {name: module.outputs for name, module in model.named_modules() if isinstance(module, RemovedPart)}
