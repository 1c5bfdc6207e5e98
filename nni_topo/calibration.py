"""Calibration data: what a model is called with, batch by batch, whatever they come in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from nni_topo.errors import ConfigError, DataError, NniTopoError
from nni_topo.modes import evaluation_mode
from nni_topo.speedup.inputs import Call, call_arguments, tensors_of


def checked_calibration(calibration: Iterable[Any] | None) -> Iterable[Any] | None:
    """Return a knob's calibration data, if there are any, so that they can be read more than once."""
    return None if calibration is None else repeatable(calibration)


def repeatable(calibration: Iterable[Any]) -> Iterable[Any]:
    """Return calibration data that can be read more than once.

    Parameters
    ----------
    calibration : iterable
        Batches. What can be read only once, as a generator, is put into a list.

    Raises
    ------
    ConfigError
        If it isn't an iterable of batches: a tensor, an array, a mapping and a text aren't.
    """
    if isinstance(calibration, (Tensor, np.ndarray)):
        kind = "tensor" if isinstance(calibration, Tensor) else "array"
        raise ConfigError(
            f"calibration must be an iterable of batches, e.g. a list of tensors, got one {kind} of shape "
            f"{tuple(calibration.shape)} (calibration)"
        )
    if isinstance(calibration, (str, bytes, Mapping)) or not isinstance(calibration, Iterable):
        raise ConfigError(f"calibration must be an iterable of batches, got {type(calibration).__name__} (calibration)")
    return list(calibration) if isinstance(calibration, Iterator) else calibration


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
    count = 0
    for count, batch in enumerate(calibration, start=1):
        if isinstance(batch, (tuple, list)) and not batch:
            raise DataError(f"a calibration batch must hold an input, got an empty one (batch {count - 1})")
        inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
        if not tensors_of(inputs):
            raise ConfigError(
                "the input of a calibration batch must be a tensor, or a tuple or mapping with a tensor in it, got "
                f"{type(inputs).__name__} (batch {count - 1})"
            )
        yield call_arguments(inputs, model)
    if count == 0:
        raise DataError("calibration must hold at least one batch, got none (was a generator used twice?)")


def first_call(model: nn.Module, calibration: Iterable[Any]) -> Call:
    """Return the arguments that the first batch stands for, tried out.

    Raises
    ------
    ConfigError, DataError
        As :func:`calls` and :func:`check_fits` do.
    """
    call = next(calls(model, calibration))
    check_fits(model, call)
    return call


def structure_call(model: nn.Module, calibration: Iterable[Any]) -> Call:
    """Return the arguments to follow a model's channels with: the first batch's, tried out, of two samples.

    All samples where the model takes no other number, or no fewer. To follow channels takes time and memory by sample.

    Raises
    ------
    ConfigError, DataError
        As :func:`first_call` does.
    """
    call = first_call(model, calibration)
    size = batch_size(call)
    few: Call = tree_map(
        lambda leaf: leaf[:2] if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == size else leaf, call
    )
    try:
        check_fits(model, few)
    except DataError:
        return call
    return few


def check_fits(model: nn.Module, call: Call) -> None:
    """Run a model on the first batch, in evaluation mode.

    Raises
    ------
    DataError
        If the model can't take it.
    """
    with fitting(0), evaluation_mode(model), torch.no_grad():
        model(*call[0], **call[1])


@contextmanager
def fitting(batch: int) -> Iterator[None]:
    """Say of which calibration batch an error comes that a model raises in the block.

    Parameters
    ----------
    batch : int
        Its number, from 0.

    Raises
    ------
    DataError
        If the model can't take it.
    """
    try:
        yield
    except (NniTopoError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(
            f"calibration must fit the model, got {type(error).__name__}: {reason} (batch {batch})"
        ) from error


def batch_size(call: Call) -> int:
    """Return the number of samples in a call, the length of its first tensor."""
    return len(tensors_of(call)[0])
