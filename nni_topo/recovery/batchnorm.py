"""Batch-norm re-calibration: running statistics measured anew on calibration data."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from nni.compression.utils import Evaluator
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from nni_topo.errors import DataError, listed
from nni_topo.network.runtime.arguments import BATCHES, MODEL
from nni_topo.network.runtime.copies import detached_copy, evaluation_mode, left_alone
from nni_topo.network.runtime.fits import structure_call
from nni_topo.network.runtime.hooks import batches_of
from nni_topo.network.runtime.inputs import calls, fitting
from nni_topo.network.runtime.public import public
from nni_topo.network.runtime.reports import hand_on_report
from nni_topo.recovery.frozen import FROZEN, frozen_parameters

_logger = logging.getLogger(__name__)


def batch_norms(model: nn.Module) -> tuple[dict[str, _BatchNorm], dict[str, _BatchNorm]]:
    """Return a model's batch norms that have running statistics by name: those to measure, and the frozen ones."""
    frozen = frozen_parameters(model)
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    }
    frozen_norms = {name: norm for name, norm in norms.items() if f"{name}.weight" in frozen}
    return {name: norm for name, norm in norms.items() if name not in frozen_norms}, frozen_norms


@public(model=MODEL, calibration=BATCHES)
def recalibrate_batch_norm(model: nn.Module, calibration: Iterable[Any] | Evaluator) -> nn.Module:
    """Return a copy of a model whose batch norms have the statistics of its own activations.

    Pruning changes the inputs of a batch norm, but its running mean and variance still belong to the unpruned
    network. Measuring them anew needs no labels and no gradients.

    Parameters
    ----------
    model : torch.nn.Module
        Any model; it isn't changed. Batch norms whose parameters don't require gradients keep their statistics, unless
        the model has no parameter that requires them; a warning names the norms.
    calibration : iterable or nni.compression.utils.Evaluator
        Batches of inputs, or of ``(inputs, ...)``, with at least two samples each. If it is an evaluator, the batches
        it evaluates on.

    Returns
    -------
    torch.nn.Module
        The copy, in the training mode that the model was in. Without batch norms it equals the model.

    Raises
    ------
    DataError
        If there is no batch, inputs or activations are NaN or infinite, or a batch doesn't fit the model.

    Notes
    -----
    The statistics are the average over the batches, each batch counting the same. Only batch norms are in training mode
    meanwhile; dropout is off.
    """
    copied: nn.Module = detached_copy(model)
    batches = batches_of(calibration, model)
    structure_call(model, batches)  # raises an error that says what to change
    norms, frozen = batch_norms(copied)
    if frozen:
        _logger.warning("these batch norms keep their statistics: %s (%s)", listed(frozen), FROZEN)
    measured: dict[str, dict[str, torch.Tensor]] = {}
    with left_alone(copied), evaluation_mode(copied), torch.no_grad():
        for norm in norms.values():
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        for index, (args, kwargs) in enumerate(calls(copied, batches)):
            with fitting(index, batches):
                copied(*args, **kwargs)
        for name, norm in norms.items():
            measured[name] = {key: value.clone() for key, value in norm.named_buffers(recurse=False)}
    # `left_alone` has restored the buffers; only the statistics are changed.
    for name, values in measured.items():
        for key, value in values.items():
            if not bool(torch.isfinite(value).all()):
                raise DataError(f"activations must be finite, got NaN or infinity ({name})")
            getattr(norms[name], key).copy_(value)
    hand_on_report(model, copied, "batch norms recalibrated (nni_topo.recalibrate_batch_norm)")
    return copied
