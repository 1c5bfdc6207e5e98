"""Calibration batches: what a model is called with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from nni_topo.errors import DataError
from nni_topo.speedup.inputs import Call, call_arguments


def calls(model: nn.Module, calibration: Iterable[Any]) -> Iterator[Call]:
    """Yield the arguments that calibration batches stand for, on a model's device.

    Parameters
    ----------
    model : torch.nn.Module
        Says which device.
    calibration : iterable
        Batches. Each is an input, or a tuple or list whose first entry is the input, e.g. ``(images, labels)``. An
        input is a tensor; or a mapping, of keyword arguments; or, within such a batch, a tuple of positional ones.

    Yields
    ------
    tuple of (tuple, dict)
        Positional and keyword arguments.

    Raises
    ------
    ConfigError
        If there is no tensor in an input.
    DataError
        If a batch is empty; or there is no batch, after the last one would have come.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    count = 0
    for count, batch in enumerate(calibration, start=1):
        if isinstance(batch, (tuple, list)) and not batch:
            raise DataError(f"a calibration batch must hold an input, got an empty one (batch {count - 1})")
        inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
        call = call_arguments(inputs)
        yield tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, call)
    if count == 0:
        raise DataError("calibration must hold at least one batch, got none (was a generator used twice?)")
