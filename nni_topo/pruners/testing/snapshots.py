"""Snapshots of a model and of the global generators, to check that neither changes."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nni_topo.network.runtime.arguments import MODEL
from nni_topo.rules import checked

# Parameters and buffers are parts of their own. PyTorch renews a recurrent layer's lists when it copies the layer.
_LEFT_OUT = ("_parameters", "_buffers", "_modules", "_flat_weights", "_flat_weight_refs")


@checked(model=MODEL)
def snapshot(model: nn.Module) -> dict[str, Any]:
    """Return, by part, the state of an unwrapped model that pruning without training has to leave as it was.

    The parts: digests of parameters and buffers, which of them are shared, which require gradients, their gradients,
    the modes, classes, attributes and hooks of all modules, and the states of Python's, NumPy's and PyTorch's
    generators.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    tensors = {
        f"{name}.{key}": value
        for name, module in modules.items()
        for key, value in (*module._parameters.items(), *module._buffers.items())
        if value is not None
    }
    first: dict[int, str] = {}
    return {
        "tensors": {name: (value.dtype, value.shape, _digest(value)) for name, value in tensors.items()},
        "ties": {name: first.setdefault(id(value), name) for name, value in tensors.items()},
        "requires_grad": {name: value.requires_grad for name, value in tensors.items()},
        "modes": {name: module.training for name, module in modules.items()},
        "classes": {name: type(module) for name, module in modules.items()},
        "attributes": {
            f"{name}.{key}": _content(value)
            for name, module in modules.items()
            for key, value in vars(module).items()
            if key not in _LEFT_OUT and not key.endswith("_hooks")
        },
        "gradients": {
            name: value.grad if value.grad is None else (id(value.grad), _digest(value.grad))
            for name, value in tensors.items()
            if value.is_leaf
        },
        "hooks": {
            f"{name}.{key}": list(value)
            for name, module in modules.items()
            for key, value in vars(module).items()
            if key.endswith("_hooks") and value
        },
        "generators": (random.getstate(), _content(np.random.get_state()), _digest(torch.get_rng_state())),
    }


@checked()
def require_unchanged(before: dict[str, Any], model: nn.Module) -> None:
    """Raise AssertionError, with the changed part, if a model isn't as it was when :func:`snapshot` was called."""
    after = snapshot(model)
    for part, value in before.items():
        if after[part] != value:
            keys = value.keys() | after[part].keys() if isinstance(value, dict) else ()
            changed = [key for key in sorted(keys) if value.get(key) != after[part].get(key)]
            raise AssertionError(f"broken promise: {part} stay as they were {changed}")


def _digest(value: Tensor) -> bytes:
    """Return a digest of a tensor's bytes, so that a snapshot of a large model takes no memory."""
    return hashlib.sha256(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data).digest()


def _content(value: Any, depth: int = 3) -> Any:
    """Return a comparable form of an attribute's value, nested objects down to ``depth``."""
    if isinstance(value, Tensor):
        return value.dtype, value.shape, _digest(value)
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, value.tobytes()
    if isinstance(value, dict):
        return [(repr(key), _content(element, depth)) for key, element in value.items()]
    if isinstance(value, (list, tuple)):
        return [_content(element, depth) for element in value]
    if callable(value) or not hasattr(value, "__dict__") or not depth:
        return repr(value)
    return _content(vars(value), depth - 1)
