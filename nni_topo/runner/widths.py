"""Which layers a comparison prunes, and the common ratio that meets a budget of multiply-accumulates."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from torch import Tensor, nn

from nni_topo import zoo
from nni_topo.errors import ConfigError
from nni_topo.registry import create_pruner
from nni_topo.speedup import dependency_groups, to_dense
from nni_topo.speedup.dependency import channel_flow
from nni_topo.speedup.inputs import call_arguments

_STEPS = 12


def pruning_config(model: nn.Module, example_inputs: Tensor, ratio: float) -> list[dict[str, Any]]:
    """Return a config_list that prunes every convolution and linear layer but those that make the output.

    Parameters
    ----------
    model : torch.nn.Module
        The model; it isn't changed.
    example_inputs : torch.Tensor
        A batch of inputs.
    ratio : float
        ``sparse_ratio`` of every layer, in [0, 1).

    Returns
    -------
    list of dict
        With dependency groups.
    """
    config = {"op_names": _inner_layers(model, example_inputs), "sparse_ratio": float(ratio)}
    return dependency_groups(model, example_inputs, [config])


def ratio_for_macs(model: nn.Module, example_inputs: Tensor, share: float) -> float:
    """Return the common ``sparse_ratio`` whose dense model is nearest to a share of the model's MACs.

    Parameters
    ----------
    model : torch.nn.Module
        The model; it isn't changed.
    example_inputs : torch.Tensor
        A batch of inputs.
    share : float
        MACs to be left, in (0, 1].

    Returns
    -------
    float
        In [0, 1). Widths are whole numbers, so the share is met as nearly as they allow.

    Raises
    ------
    ConfigError
        If even one channel per layer costs more than twice the budget.
    """
    whole = zoo.count_macs(model, example_inputs)
    low, high = 0.0, 1.0 - 1e-6
    tried = {low: 1.0, high: _share(model, example_inputs, high, whole)}
    if tried[high] > 2.0 * share:
        raise ConfigError(
            f"a flops target must be reachable, got {share:g} where one channel per layer leaves {tried[high]:.3g} "
            "(target)"
        )
    for _ in range(_STEPS):
        middle = (low + high) / 2.0
        tried[middle] = _share(model, example_inputs, middle, whole)
        low, high = (middle, high) if tried[middle] > share else (low, middle)
    return min(tried, key=lambda ratio: (abs(tried[ratio] - share), ratio))


def _share(model: nn.Module, example_inputs: Tensor, ratio: float, whole: int) -> float:
    """Share of the MACs that a common ratio leaves: the choice of channels doesn't matter, their number does."""
    victim = copy.deepcopy(model)
    pruner = create_pruner("l1", victim, pruning_config(victim, example_inputs, ratio))
    _, masks = pruner.compress()
    return zoo.count_macs(to_dense(model, example_inputs, masks, check=False), example_inputs) / whole


def _inner_layers(model: nn.Module, example_inputs: Tensor) -> list[str]:
    flow = channel_flow(model, call_arguments(example_inputs))
    prunable = (nn.modules.conv._ConvNd, nn.Linear)
    return [
        name
        for name in flow.layers
        if isinstance(model.get_submodule(name), prunable) and not np.isin(flow.layer_roots(name), flow.at_output).any()
    ]
