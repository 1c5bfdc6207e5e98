"""A pruned model of Transformers as a folder that loads without this package."""

from __future__ import annotations

import copy
import itertools
import os
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from nni_topo.disk import check_free_disk, disk_errors, output_folder, path_of, whole_file
from nni_topo.errors import ConfigError
from nni_topo.network.attention import find_attention
from nni_topo.network.io.checkpoint import describe, size_names
from nni_topo.network.layers import ShiftedRMSNorm
from nni_topo.network.runtime import check_unwrapped, leaves_models_alone
from nni_topo.sharing import named_tensors


@leaves_models_alone
def save_pretrained(dense: Any, folder: str | os.PathLike[str]) -> None:
    """Save a pruned model of Transformers as a folder that its ``from_pretrained`` loads without this package.

    Parameters
    ----------
    dense : transformers.PreTrainedModel
        A model made by `nni_topo.to_dense`. It isn't changed.
    folder : str or path-like
        The folder for ``config.json`` and ``model.safetensors``; made where there is none.

    Raises
    ------
    ConfigError
        If the model isn't one of Transformers, or its config can't say how wide its layers are: it has one number for
        all blocks, so all must be equally wide, but for heads, which Transformers 4 can prune block by block in BERT
        and its like (``config.pruned_heads``). `save` and `load` take every model.
    SpeedupError
        If the model is still wrapped by NNI.

    See Also
    --------
    save : One file for every model, for `load`.
    """
    place = path_of(folder, "folder")
    check_free_disk(place, 0)
    check_unwrapped(dense)
    config, name = getattr(dense, "config", None), type(dense).__name__
    if config is None or not callable(getattr(dense, "save_pretrained", None)):
        raise ConfigError(f"a model must be one of Transformers, got {name}; nni_topo.save takes any (save_pretrained)")
    config = copy.deepcopy(config)
    known = dict(getattr(config, "pruned_heads", None) or {})
    config.pruned_heads = {}
    with torch.device("meta"):
        plain = type(dense)(config)
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
        whole, left = find_attention(built), find_attention(dense)
        fewer = different[0] in whole and different[0] in left and left[different[0]].heads < whole[different[0]].heads
        why = "has one width for all blocks"
        if fewer and not heads:
            why += f" (Transformers {version('transformers')} prunes no heads of this class)"
        raise ConfigError(
            f"from_pretrained must be able to build the model by its config, which {why}, got "
            f"{got.get(different[0])} where the config makes {wanted.get(different[0])}; nni_topo.save and "
            f"nni_topo.load take it ({different[0]}, {name})"
        )
    if heads != known:
        dense.config.pruned_heads = heads  # put back at the end, as all of the model
    place = output_folder(place)
    with disk_errors(place), tempfile.TemporaryDirectory(dir=place) as beside:
        dense.save_pretrained(beside)
        for file in sorted(Path(beside).iterdir()):
            with whole_file(place / file.name) as part:
                file.replace(part)


def _pruned_heads(plain: Any, dense: torch.nn.Module) -> dict[int, list[int]]:
    """Return what ``config.pruned_heads`` must say of a model: by the number of a block, heads that are gone.

    Which of a block's heads these are makes no difference: their values come from the file. What else depends on it
    has another shape then. Nothing where the class can't prune heads, as none can since Transformers 5.
    """
    whole, left = find_attention(plain), find_attention(dense)
    probe, found = copy.deepcopy(plain), dict[int, list[int]]()
    for block in itertools.count():
        before = {name: each.heads for name, each in find_attention(probe).items()}
        try:
            probe.base_model._prune_heads({block: [0]})
        except Exception:  # there is no such block, or the class has heads that stay; each says so in its own way
            return found
        after = {name: each.heads for name, each in find_attention(probe).items()}
        changed = [name for name, count in before.items() if after.get(name, 0) != count]
        gone = {whole[name].heads - left[name].heads if name in left else 0 for name in changed}
        if not changed:
            return found
        if len(gone) == 1 and (count := gone.pop()) > 0:
            found[block] = list(range(count))
    return found


def _structure(model: torch.nn.Module) -> dict[str, Any]:
    """Return what a config must say of a model: the heads, the modules' sizes, and the tensors' shapes, by name."""
    heads = {name: f"{each.heads} heads of {each.head_size}" for name, each in find_attention(model).items()}
    # A norm as PyTorch's in the place of one of Transformers' own computes the same; its weight says how wide it is.
    plain = (torch.nn.RMSNorm, ShiftedRMSNorm, torch.nn.LayerNorm)
    described = [each for each in model.named_modules() if size_names(each[1]) and type(each[1]) not in plain]
    sizes = {name: describe(module) for name, module in described}
    return heads | sizes | {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()}
