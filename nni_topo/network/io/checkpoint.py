"""Save a dense model in one file without code in it, and build it again from the unpruned model.

The file is one of safetensors: tensors, and in its header a recipe in JSON, which says which module has which sizes.
Reading a file from elsewhere runs nothing. What it doesn't hold is the model's forward: that comes with the model it is
loaded into, whose layers are made smaller to fit.

A pruned model of Transformers can also be saved as a folder that loads without this package.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from nni_topo._version import __version__
from nni_topo.disk import check_free_disk, disk_errors, output_folder, path_of, reading, whole_file, write_safetensors
from nni_topo.errors import ConfigError, DataError, listed, raised
from nni_topo.network.attention.config import built_by_config, is_pretrained
from nni_topo.network.attention.heads import find_attention, resize, set_size
from nni_topo.network.attention.unfused.own_width import own_width_of, take_own_width
from nni_topo.network.cost.measure import count_params
from nni_topo.network.io.card import CARD, may_write_card, model_card
from nni_topo.network.io.exporting import FORMATS
from nni_topo.network.layers.by_head import HEADS_TAKEN, takes_all_heads
from nni_topo.network.layers.derived import fold
from nni_topo.network.layers.integer_attributes import numbers_of, put_sizes
from nni_topo.network.layers.kinds import is_transposed_linear, with_linear_layers, with_transposed_weights
from nni_topo.network.layers.norms import channel_dim, width_names
from nni_topo.network.runtime.arguments import NETWORK, check_float, check_unwrapped
from nni_topo.network.runtime.copies import detached_copy
from nni_topo.network.runtime.inputs import model_within, tensors_of
from nni_topo.network.runtime.public import public
from nni_topo.network.runtime.reports import drop_report, report_of
from nni_topo.rules import ANYTHING, Rule, check_knobs, checked, taking
from nni_topo.sharing import find_ties, named_tensors, tie_again, untie

_FORMAT = "nni-topo dense model"
_FORMAT_VERSION = 2
_RECIPE = "nni_topo"  # its place in the header of a file
_OTHER = "a dense model must be loaded into the model it was pruned from"

# The attributes that say how large a module is, by the class that defines them.
_SIZES: dict[type[nn.Module], tuple[str, ...]] = {
    nn.modules.conv._ConvNd: ("in_channels", "out_channels", "groups"),
    nn.Linear: ("in_features", "out_features"),
    nn.modules.batchnorm._NormBase: ("num_features",),
    nn.GroupNorm: ("num_channels", "num_groups"),
    nn.RNNBase: ("input_size", "hidden_size"),
    nn.LayerNorm: ("normalized_shape",),
    nn.RMSNorm: ("normalized_shape",),
    nn.Embedding: ("num_embeddings", "embedding_dim"),
    nn.PReLU: ("num_parameters",),
    nn.PixelShuffle: ("upscale_factor",),
}

_PathLike = str | os.PathLike[str]


_UNPRUNED = Rule(
    "the unpruned torch.nn.Module or a function without arguments that makes it",
    lambda value: isinstance(value, nn.Module) or taking().holds(value),
    tell=NETWORK.tell,
)


def save(dense: nn.Module, path: _PathLike) -> None:
    """Save a dense model without pickled code, non-persistent buffers too.

    Parameters
    ----------
    dense : torch.nn.Module
        A model made by `nni_topo.to_dense`, fine-tuned or not. It isn't changed. Of a compiled one, or one in
        ``DataParallel`` or ``DistributedDataParallel``, the model within is saved.
    path : str or path-like
        The file to write, whole or not at all; an existing one is replaced. It is written as safetensors, whatever it
        is called, with the recipe (which module has which sizes) as JSON under ``"nni_topo"`` in its metadata.

    Raises
    ------
    ConfigError
        If ``dense`` is no module or is quantised, or the path ends as the files of :func:`nni_topo.export` do, in
        ``.onnx`` or ``.pt2``, or the model's state_dict holds more than parameters and buffers.
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
            # A copy, because safetensors takes no two views of one memory.
            values[name] = tensor.detach().cpu().contiguous().clone()
    attention = find_attention(dense)
    own_widths = {name: own_width_of(module) for name, module in dense.named_modules()}
    recipe = {
        "format": _FORMAT,
        "format_version": _FORMAT_VERSION,
        "package_version": __version__,
        "stored_as": stored_as,  # by tensor, the name under which the file has its values: shared tensors have one
        "not_persistent": [name for name in tensors if name not in state],
        "modules": {name: describe(module) for name, module in dense.named_modules() if size_names(module)},
        "numbers": [[*place, number] for place, number in numbers_of(dense).items()],
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
    model : torch.nn.Module or callable
        The original, unpruned model, whatever its weights, or a function without arguments that makes it. It isn't
        changed. Of a compiled one, or one spread over devices, the model within counts. If what was pruned is a model
        made by :func:`nni_topo.as_torch_layers`, it is that one.

    Returns
    -------
    torch.nn.Module
        A copy of ``model`` with the sizes and values of the file, in the modes and on the devices of
        ``model``, in the precision of the file; what ``model`` has on the meta device lies on the CPU. Layers that
        share a tensor in ``model`` share it if they did in the dense model.

    Raises
    ------
    DataError
        If the file is missing or cut short, isn't one that `save` writes, or holds something else than was saved.
    ConfigError
        If ``model`` is neither a module nor a function that makes one, or the file doesn't fit it: other modules, other
        types, larger sizes, modules with two names that were two modules in the dense model, or parameters or buffers
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
    drop_report(built)  # the report of the unpruned model, not of the one in the file
    _take_out_missing(recipe, built, file)
    modules: dict[str, dict[str, Any]] = recipe["modules"]
    if any(name in modules and is_transposed_linear(module) for name, module in built.named_modules()):
        with_linear_layers(built)  # as they were when they were pruned
    for name, module in built.named_modules():
        # A layer that computes its weight became a plain one where it was cut, which has another type in the file.
        if name in modules and modules[name]["type"] != type(module).__name__:
            fold(module)
    _check_fit(recipe, values, built, file)

    attention, ties = find_attention(built), find_ties(built)
    for name, description in modules.items():
        module, sizes = built.get_submodule(name), description["sizes"]
        for key, size in sizes.items():
            setattr(module, key, tuple(size) if isinstance(size, list) else size)
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
    for name, each in attention.items():
        queries, size, width = recipe["attention"].get(name, (each.query_heads, each.head_size, each.width))
        heads = each.heads * queries // each.query_heads
        resize(built.get_submodule(name), each, heads, width)
        if size < each.head_size:
            set_size(built.get_submodule(name), each.head_size, size, heads)
    known, smaller = numbers_of(built), {}
    for name, key, path_in, number in recipe["numbers"]:
        at = name, key, tuple(path_in)
        if 0 < number < known.get(at, 0):  # the others count no channels
            smaller[at] = number
    put_sizes(built, smaller)
    for name, dim in recipe["own_widths"].items():
        module = built.get_submodule(name)
        if own_width_of(module) != dim and not take_own_width(module, dim):
            raise ConfigError(f"{_OTHER}, got one whose forward doesn't take the width of its input ({name}, {file})")
    for names in ties:
        shared: dict[str, list[str]] = {}
        for name in names:
            shared.setdefault(stored_as.get(name, name), []).append(name)
        tie_again(built, shared.values())
    return built


def size_names(module: nn.Module) -> tuple[str, ...]:
    """List the names of a module's size attributes; none for a type without."""
    names = next((names for kind, names in _SIZES.items() if isinstance(module, kind)), ())
    own = [each for each in module._parameters.values() if each is not None]
    if not names and own and channel_dim(module) is not None:
        names = tuple(width_names(module, own[0].numel()))
    return names


def describe(module: nn.Module) -> dict[str, Any]:
    """Return a module's type and sizes, as a file's recipe has them."""
    sizes = {name: getattr(module, name) for name in size_names(module)}
    plain = {name: list(size) if isinstance(size, tuple) else int(size) for name, size in sizes.items()}
    return {"type": type(module).__name__, "sizes": plain}


def fingerprint(tensor: Tensor) -> str:
    """Digest a tensor's type, shape and bits."""
    plain = tensor.detach().cpu()
    plain = (plain if plain.layout == torch.strided else plain.to_dense()).contiguous()
    digest = hashlib.sha256(f"{plain.dtype} {tuple(plain.shape)}".encode())
    digest.update(plain.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def model_fingerprint(model: nn.Module) -> str:
    """Digest the names, types, shapes and bits of a model's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in named_tensors(model).items():
        digest.update(f"{name} {fingerprint(tensor)}\n".encode())
    return digest.hexdigest()


def _digest(recipe: Mapping[str, Any], values: Mapping[str, Tensor]) -> str:
    """Digest all that a file holds."""
    fingerprints = {name: fingerprint(value) for name, value in values.items()}
    return hashlib.sha256(json.dumps([recipe, fingerprints], sort_keys=True).encode()).hexdigest()


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the recipe and the tensors of a file, and check that they are what `save` wrote."""
    what, written = "a dense model's file", "written by nni_topo.save"
    if zipfile.is_zipfile(file):
        raise DataError(f"{what} must be {written}, got one of torch.save ({file})")
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
    return recipe, values


def _take_out_missing(recipe: dict[str, Any], model: nn.Module, file: Path) -> None:
    """Take the blocks and parts out of a model that the file's model lacks, unless it was built without them."""
    modules, missing = dict(model.named_modules()), {}
    for name, kept in recipe["blocks"].items():
        blocks = modules.get(name)
        count = len(blocks) if isinstance(blocks, (nn.ModuleList, nn.Sequential)) else 0
        if count != len(kept):
            missing[name] = kept
            if kept[-1] >= count:
                raise ConfigError(f"{_OTHER}, got {count} blocks where block {kept[-1]} is kept ({name}, {file})")
    take_out_others(model, missing)
    modules = dict(model.named_modules())
    for name, outputs in recipe["parts"].items():
        if name not in modules:
            raise ConfigError(f"{_OTHER}, got one without a part that is to be taken out ({name}, {file})")
        take_out_part(model, name, outputs)


def _check_fit(recipe: dict[str, Any], values: dict[str, Tensor], model: nn.Module, file: Path) -> None:
    """Raise unless the file could come from a pruned copy of the model."""
    modules: dict[str, dict[str, Any]] = recipe["modules"]
    described = {}
    for name, module in model.named_modules():
        if size_names(module):
            described[name] = describe(module)
    tensors, state = named_tensors(model), model.state_dict(keep_vars=True)
    stored = {name: values[first] for name, first in recipe["stored_as"].items()}
    persistent = stored.keys() - set(recipe["not_persistent"])
    for kind, of_file, of_model in (
        ("modules", modules.keys(), described.keys()),
        ("tensors", persistent, tensors.keys() & state.keys()),
    ):
        for problem, names in (
            ("missing in the model", of_file - of_model),
            ("missing in the file", of_model - of_file),
        ):
            if names:
                raise ConfigError(f"{_OTHER}, got {kind} {problem}: {listed(sorted(names))} ({file})")
    for name, description in modules.items():
        kind, sizes, known = description["type"], description["sizes"], described[name]["sizes"]
        if "counted" not in sizes and kind != described[name]["type"]:
            raise ConfigError(f"{_OTHER}, got {kind} where the model has {described[name]['type']} ({name}, {file})")
        for key in sizes.keys() & known.keys() - {"counted"}:
            if sizes[key] > known[key]:
                raise ConfigError(f"{_OTHER}, got {key} {sizes[key]} where the model has {known[key]} ({name}, {file})")
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
    with_transposed_weights(dense)  # a copy, as is all that a public function gets
    if why := why_undescribed(dense):  # it changes the config of the copy of the model that this function works on
        raise ConfigError(
            f"from_pretrained must be able to build the model by its config, {why}; nni_topo.save and nni_topo.load "
            f"take it ({name})"
        )
    place = output_folder(place)
    with disk_errors(place), tempfile.TemporaryDirectory(dir=place) as beside:
        dense.save_pretrained(beside)
        report = report_of(dense)
        # One that was changed since, such as by `remove_blocks`, isn't what its report says.
        is_told = report is not None and report.parameters_left in (None, count_params(dense))
        if card and report is not None and is_told and may_write_card(place / CARD):
            (Path(beside) / CARD).write_text(model_card(dense, report), encoding="utf-8")
        for file in sorted(Path(beside).iterdir()):
            with whole_file(place / file.name) as part:
                file.replace(part)


def why_undescribed(dense: Any) -> str:
    """Return what the config of a model of Transformers can't say of it, with the place; empty if it says everything.

    The config of a model that lost heads then names them, which Transformers 4 reads.
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
        why = "which has one width for all blocks"
        if before is not None and after is not None and after.heads < before.heads and not heads:
            why += f" (Transformers {version('transformers')} prunes no heads of this class)"
        return f"{why}, got {got.get(first)} where the config makes {wanted.get(first)} ({first})"
    try:
        # Transformers 5 also validates a config when it writes or reads it.
        validate = getattr(dense.config, "validate", None)
        if callable(validate):
            validate()
    except Exception as error:
        return f"which Transformers {version('transformers')} refuses: {' '.join(str(error).split())}"
    if heads != known:
        dense.config.pruned_heads = heads
    return ""


def _leave_out(plain: torch.nn.Module, dense: torch.nn.Module) -> None:
    """Remove from a model built by its config the parts that another one was made without.

    An argument says so, such as ``add_pooling_layer=False``, which isn't in the config; ``from_pretrained`` takes it.
    """
    own = dict(dense.named_modules())
    for name, module in list(plain.named_modules()):
        for key in [key for key, child in module._modules.items() if child is not None]:
            if name in own and hasattr(own[name], key) and getattr(own[name], key) is None:
                setattr(module, key, None)


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
