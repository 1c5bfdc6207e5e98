"""Checkpoints of weights: only tensors and plain values are written and read, no pickled code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from nni_topo.disk import output_folder, path_of, read_tensors, reading, write_tensors
from nni_topo.errors import DataError

_FORMAT = "nni-topo checkpoint 1"
_SHOWN = 3


def save_checkpoint(path: str | Path, model: nn.Module, meta: Mapping[str, Any]) -> None:
    """Write a model's parameters and buffers, and ``meta``; DataError if JSON can't hold ``meta``."""
    path = path_of(path)
    try:
        content = json.loads(json.dumps(dict(meta)))
    except (TypeError, ValueError) as error:
        raise DataError(f"meta must be JSON serializable, got: {error} (meta)") from error
    output_folder(path.parent)
    state = {key: value.detach().cpu() for key, value in model.state_dict().items()}
    write_tensors(path, {"format": _FORMAT, "state_dict": state, "meta": content})


def load_checkpoint(path: str | Path, model: nn.Module) -> dict[str, Any]:
    """Read weights into a model.

    Parameters
    ----------
    path : str or Path
        A file of :func:`save_checkpoint`, a safetensors file, or a file of ``torch.save`` that holds a state dict,
        directly or under the key ``state_dict`` or ``model``. Names may begin with ``module.`` or ``_orig_mod.``, as in
        state dicts of data-parallel and compiled models.
    model : nn.Module
        Gets the weights and stays on its device; unchanged if an error is raised.

    Returns
    -------
    dict
        The ``meta`` of :func:`save_checkpoint`, empty for other files.

    Raises
    ------
    DataError
        If the file is missing or damaged, holds pickled code, holds no state dict, or its names or shapes
        differ from the model's.
    """
    path = path_of(path)
    with reading(path, "a checkpoint", "of tensors and plain values only"):
        content: Any = load_file(path) if path.suffix == ".safetensors" else read_tensors(path)
    if not isinstance(content, dict):
        raise DataError(f"a checkpoint must hold a dict, got {type(content).__name__} ({path})")
    named = next((content[key] for key in ("state_dict", "model") if isinstance(content.get(key), dict)), content)
    state = {key: value for key, value in named.items() if isinstance(value, Tensor)}
    if not state:
        names = ", ".join(str(key) for key in list(named)[:_SHOWN]) or "nothing"
        raise DataError(f"a checkpoint must hold a state dict, got {names} ({path})")
    # A wrapper's prefix is removed if all names have it and the model has no attribute of that name. Each prefix is
    # tried twice, because wrappers may be nested.
    for prefix in ("_orig_mod.", "module.", "_orig_mod.", "module."):
        if all(key.startswith(prefix) for key in state) and not hasattr(model, prefix[:-1]):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    # Checked first, because load_state_dict changes the model before it raises an error.
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    model_shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    wrong = [
        f"{key}: {shapes.get(key, 'missing')}, in the model {model_shapes.get(key, 'missing')}"
        for key in {**model_shapes, **shapes}
        if shapes.get(key) != model_shapes.get(key)
    ]
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise DataError(f"a checkpoint must fit the model, got {'; '.join(wrong[:_SHOWN])}{more} ({path})")
    model.load_state_dict(state)
    if content.get("format") != _FORMAT:
        return {}
    return dict(content.get("meta", {}))
