"""Torch-Pruning's pruners as baselines of a comparison; they need the extra ``bench``.

Torch-Pruning changes a model instead of making masks. Here it prunes the same layers to the same numbers of channels as
the other pruners.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from nni_topo.errors import ConfigError, unknown_name
from nni_topo.network.layers.kinds import output_channels, spread
from nni_topo.network.runtime.copies import detached_copy
from nni_topo.network.speedup.analysis import Analysis
from nni_topo.pruners.hooks import Masks

PREFIX = "torch-pruning"
KINDS = (nn.modules.conv._ConvNd, nn.Linear, nn.LSTM)
"""Types of layers that Torch-Pruning prunes here."""
_IMPORTANCES: dict[str, tuple[str, dict[str, Any]]] = {
    # the group L2 norm
    PREFIX: ("GroupMagnitudeImportance", {"p": 2}),
    f"{PREFIX}-l1": ("GroupMagnitudeImportance", {"p": 1}),
    f"{PREFIX}-fpgm": ("FPGMImportance", {"p": 2}),
}
_ROUNDING = 1e-9  # because 6 * (1 - 1 / 3) is less than 4 in floating point


def is_baseline(name: str) -> bool:
    """Say whether a name is a Torch-Pruning baseline; ConfigError if it is misspelt or Torch-Pruning is missing."""
    if not name.startswith(PREFIX):
        return False
    if name not in _IMPORTANCES:
        raise unknown_name("pruner", name, _IMPORTANCES, "pruners")
    _package()
    return True


def baseline_masks(
    name: str, analysis: Analysis, ratios: dict[str, float], importance_of: Callable[[nn.Module], Any] | None = None
) -> tuple[Masks, float]:
    """Prune a copy by Torch-Pruning with a ``sparse_ratio`` per layer, attention by heads.

    Return the pruning as NNI's masks, and its seconds. ``importance_of`` returns an importance of Torch-Pruning for
    the copy, in place of the one that the name stands for.
    """
    model = analysis.model
    heads = dict[str, int]()
    for layer, attention in analysis.flow.heads.items():
        if layer in ratios and not attention.recurrent:  # the heads of a recurrent layer are its units
            heads[layer] = len(attention.channels[layer])
    began = time.perf_counter()
    _, kept_channels = cut(name, model, analysis.call[0], ratios, heads, importance_of)
    seconds = time.perf_counter() - began
    masks: Masks = {}
    for layer, channels in kept_channels.items():
        module: Any = model.get_submodule(layer)
        masks[layer] = {"weight": spread(module, channels)}
        if module.bias is not None:
            masks[layer]["bias"] = channels
    return masks, seconds


def cut(
    name: str,
    model: nn.Module,
    example_inputs: Any,
    ratios: dict[str, float],
    heads: Mapping[str, int] = MappingProxyType({}),
    importance_of: Callable[[nn.Module], Any] | None = None,
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return the network pruned by Torch-Pruning and, by layer, a mask (channels,): 1 for each kept output channel."""
    # `heads`: the number of heads of query, key and value layers, from which whole heads are removed.
    package = _package()
    dense: nn.Module = detached_copy(model)
    layers = {n: m for n, m in dense.named_modules() if isinstance(m, KINDS)}
    kind, knobs = _IMPORTANCES[name]
    importance = getattr(package.importance, kind)(**knobs) if importance_of is None else importance_of(dense)
    exact_ratios = {}
    for layer, ratio in ratios.items():
        exact_ratios[layers[layer]] = _exact(output_channels(layers[layer]) or 1, ratio)
    pruner = package.pruner.BasePruner(
        dense,
        example_inputs,
        importance=importance,
        pruning_ratio=0.0,
        pruning_ratio_dict=exact_ratios,
        num_heads={layers[layer]: count for layer, count in heads.items()},
        prune_num_heads=bool(heads),
        prune_head_dims=not heads,
        head_pruning_ratio_dict={layers[layer]: _exact(count, ratios[layer]) for layer, count in heads.items()},
        ignored_layers=[module for layer, module in layers.items() if layer not in ratios],
    )
    names = {module: layer for layer, module in layers.items() if layer in ratios}
    kept_channels = {layer: torch.ones(output_channels(layers[layer]) or 1) for layer in ratios}
    for group in pruner.step(interactive=True):
        for dependency, channels in group:
            pruned_layer = names.get(dependency.target.module)
            if pruned_layer is not None and pruner.DG.is_out_channel_pruning_fn(dependency.handler):
                kept_channels[pruned_layer][channels] = 0.0
        group.prune()
    return dense, kept_channels


def _exact(count: int, ratio: float) -> float:
    """Return the ratio at which Torch-Pruning, which rounds kept channels down, removes as many channels as NNI."""
    removed = int(count * ratio + _ROUNDING)
    if not removed:
        return 0.0
    return (removed - 0.5) / count


def _package() -> Any:
    try:
        return importlib.import_module("torch_pruning")
    except ImportError as error:
        raise ConfigError(
            "pruner 'torch-pruning' must be installed: pip install 'nni_topo[bench]', got no torch_pruning (pruners)"
        ) from error
