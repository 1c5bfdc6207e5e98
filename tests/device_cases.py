"""Cases that run on the CPU and on another device, and what they are compared by."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nni_topo.pruners.registry import create_pruner, pruner_info
from nni_topo.testing import toy_evaluator, toy_images, toy_knobs, toy_model

HALF = [{"op_types": ["Conv2d", "Linear"], "exclude_op_names": ["head"], "sparse_ratio": 0.5}]
FREE = [{"op_types": ["Conv2d", "Linear"], "exclude_op_names": ["head"]}]
LINEAR = [{"op_names": ["hidden"], "sparse_ratio": 0.5}]
IMAGES = toy_images(12, seed=1)
LABELS = torch.arange(12) % 4
# Calibration data lie on the CPU, where a loader leaves them.
BATCHES = list(IMAGES.split(6))
LABELLED = [(IMAGES[:6], LABELS[:6]), (IMAGES[6:], LABELS[6:])]
GENERATIONS = {"population_size": 6, "generations": 2}
SEARCH = {"solver": GENERATIONS}
Case = Callable[[torch.device], Any]
CPU = torch.device("cpu")


def agree(case: Case, device: torch.device) -> None:
    """Run a case on the CPU and on a device, and compare: tensors, arrays, numbers and words, whatever holds them."""
    expected, found = tree_leaves(plain(case(CPU))), tree_leaves(plain(case(device)))
    assert len(expected) == len(found) > 0
    rtol, atol = (1e-5, 1e-7) if device.type == "far" else (1e-3, 1e-4)
    for one, other in zip(expected, found, strict=True):
        if np.asarray(one).dtype.kind == "f":
            np.testing.assert_allclose(other, one, rtol=rtol, atol=atol)
        else:
            np.testing.assert_array_equal(other, one)


def plain(value: Any) -> Any:
    """Return results as arrays, numbers and words."""
    if isinstance(value, Tensor):
        return value.detach().cpu().numpy()
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value) if "seconds" not in f.name}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items() if item is not None}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def states(model: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """Return a model's state, which has to lie on a device."""
    found = model.state_dict()
    assert {value.device for value in found.values()} == {device}
    return found


def prune(name: str, device: torch.device, config: Any = HALF, **knobs: Any) -> tuple[nn.Module, Any]:
    """Prune the toy network by name; return it unwrapped, and its masks, which have to lie where it lies."""
    model = toy_model().to(device)
    info = pruner_info(name)
    given = {**toy_knobs(info.knobs(), info.needs), **knobs}
    if given.get("evaluator") == "toy":
        given["evaluator"] = toy_evaluator(model)
    pruner = create_pruner(name, model, config, **given)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    held = [mask for targets in masks.values() for mask in targets.values() if mask is not None]
    assert {mask.device for mask in held} == {device}
    assert all(set(mask.unique().tolist()) <= {0.0, 1.0} for mask in held)
    return model, masks
