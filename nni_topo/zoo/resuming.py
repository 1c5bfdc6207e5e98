"""The state of a training on disk, so that it can be killed anywhere and goes on after its last whole epoch."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nni_topo.errors import DataError

_FORMAT = "nni-topo training 1"


def save_training(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    progress: Mapping[str, Any],
) -> None:
    """Write what lasts between epochs, with plain values in `progress`; the file appears whole or not at all."""
    state = {
        "format": _FORMAT,
        "progress": dict(progress),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "generators": [generator.get_state(), torch.get_rng_state()],
    }
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        torch.save(state, part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def load_training(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator
) -> dict[str, Any]:
    """Put a training back and return its ``progress``, empty without a file; DataError if it isn't the model's."""
    if not path.exists():
        return {}
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["format"] != _FORMAT:
            raise KeyError(state["format"])
        model.load_state_dict(state["model"])
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"a training's state must be a whole file of this model, got: {reason} ({path})") from error
    optimizer.load_state_dict(state["optimizer"])
    own, common = (Tensor.byte(state) for state in state["generators"])
    generator.set_state(own)
    torch.set_rng_state(common)
    return dict(state["progress"])
