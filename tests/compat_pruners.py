"""A small network pruned by this package's pruners and by NNI's, and NNI as it was for the time of a test."""

from __future__ import annotations

from typing import Any

from nni.compression.base.compressor import Pruner
from nni.compression.pruning import L1NormPruner
from torch import nn

import nni_topo
from nni_topo.testing import toy_model

STEM = [{"op_names": ["stem"], "sparse_ratio": 0.5}]


def kept(pruner: Pruner) -> dict[str, int]:
    """Filters that stay, by layer."""
    _, masks = pruner.compress()
    pruner.unwrap_model()
    return {name: int(targets["weight"].flatten(1)[:, 0].sum()) for name, targets in masks.items()}


def ours(config: list[dict[str, Any]], model: nn.Module | None = None) -> nni_topo.RandomPruner:
    return nni_topo.RandomPruner(model or toy_model(), config)


def nnis(config: list[dict[str, Any]], model: nn.Module | None = None) -> L1NormPruner:
    """NNI's pruner with its layers in alphabetical order: as it is, the order depends on the hash seed."""
    pruner = L1NormPruner(model or toy_model(), config)
    pruner._target_spaces = dict(sorted(pruner._target_spaces.items()))
    return pruner
