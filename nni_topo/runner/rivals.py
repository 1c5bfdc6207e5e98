"""Torch-Pruning's pruners as rows of a comparison; they need the extra ``bench``.

Torch-Pruning cuts the model itself instead of making masks, and rounds widths its own way, so its common ratio is
solved for the multiply-accumulates that the other rows have.
"""

from __future__ import annotations

import copy
import importlib
import time
from typing import Any

from torch import Tensor, nn

from nni_topo import zoo
from nni_topo.errors import ConfigError, unknown_name
from nni_topo.runner.widths import bisect_ratio, inner_layers

PREFIX = "torch-pruning"
_IMPORTANCES: dict[str, tuple[str, dict[str, Any]]] = {
    PREFIX: ("GroupMagnitudeImportance", {"p": 2}),
    f"{PREFIX}-l1": ("GroupMagnitudeImportance", {"p": 1}),
    f"{PREFIX}-fpgm": ("FPGMImportance", {"p": 2}),
}


def is_rival(name: str) -> bool:
    """Say whether a name is one of Torch-Pruning's rows: ``torch-pruning`` is its group L2 norm.

    Raises
    ------
    ConfigError
        If the name begins like one and isn't, or the package isn't installed.
    """
    if not name.startswith(PREFIX):
        return False
    if name not in _IMPORTANCES:
        raise unknown_name("pruner", name, _IMPORTANCES)
    _package()
    return True


def rival_dense(name: str, model: nn.Module, example_inputs: Tensor, macs: int) -> tuple[nn.Module, dict[str, float]]:
    """Return a copy of a model, pruned by Torch-Pruning to the nearest number of MACs, and the seconds it took.

    Parameters
    ----------
    name : str
        See :func:`is_rival`.
    model : torch.nn.Module
        The model; it isn't changed.
    example_inputs : torch.Tensor
        A batch of inputs.
    macs : int
        MACs to be left.

    Returns
    -------
    torch.nn.Module
        The dense model.
    dict of str to float
        ``prune_seconds``, the search for the ratio left out, and ``speedup_seconds``, which is 0: it's one step.
    """
    ratio = bisect_ratio(lambda r: zoo.count_macs(_pruned(name, model, example_inputs, r), example_inputs), macs)
    began = time.perf_counter()
    dense = _pruned(name, model, example_inputs, ratio)
    return dense, {"prune_seconds": time.perf_counter() - began, "speedup_seconds": 0.0}


def _pruned(name: str, model: nn.Module, example_inputs: Tensor, ratio: float) -> nn.Module:
    package = _package()
    copied = copy.deepcopy(model)
    inner = set(inner_layers(copied, example_inputs))
    layers = {n: m for n, m in copied.named_modules() if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear))}
    importance, knobs = _IMPORTANCES[name]
    pruner = package.pruner.BasePruner(
        copied,
        example_inputs,
        importance=getattr(package.importance, importance)(**knobs),
        pruning_ratio=ratio,
        ignored_layers=[module for layer, module in layers.items() if layer not in inner],
    )
    pruner.step()
    return copied


def _package() -> Any:
    try:
        return importlib.import_module("torch_pruning")
    except ImportError as error:
        raise ConfigError(
            "pruner 'torch-pruning' must be installed: pip install 'nni_topo[bench]', got no torch_pruning (pruners)"
        ) from error
