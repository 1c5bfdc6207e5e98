"""Which layers a comparison prunes, and the common ratio that meets a budget of multiply-accumulates."""

from __future__ import annotations

import copy
from collections.abc import Callable
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
_LARGEST = 1.0 - 1e-6


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
    config = {"op_names": inner_layers(model, example_inputs), "sparse_ratio": float(ratio)}
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
    least = macs_at(model, example_inputs, _LARGEST)
    if least > 2.0 * share * whole:
        raise ConfigError(
            f"a flops target must be reachable, got {share:g} where one channel per layer leaves {least / whole:.3g} "
            "(target)"
        )
    return bisect_ratio(lambda ratio: macs_at(model, example_inputs, ratio), share * whole)


def bisect_ratio(macs_of: Callable[[float], int], macs: float) -> float:
    """Return the ratio whose MACs are nearest to a budget; of equally near ones the smallest.

    Parameters
    ----------
    macs_of : callable
        Maps a ratio in [0, 1) to MACs, never increasing.
    macs : float
        The budget.

    Returns
    -------
    float
        In [0, 1), from a bisection in a fixed number of steps.
    """
    low, high = 0.0, _LARGEST
    tried = {ratio: macs_of(ratio) for ratio in (low, high)}
    for _ in range(_STEPS):
        middle = (low + high) / 2.0
        tried[middle] = macs_of(middle)
        low, high = (middle, high) if tried[middle] > macs else (low, middle)
    return min(tried, key=lambda ratio: (abs(tried[ratio] - macs), ratio))


def inner_layers(model: nn.Module, example_inputs: Tensor) -> list[str]:
    """Return the convolutions and linear layers whose channels aren't the model's output, in network order."""
    flow = channel_flow(model, call_arguments(example_inputs))
    prunable = (nn.modules.conv._ConvNd, nn.Linear)
    return [
        name
        for name in flow.layers
        if isinstance(model.get_submodule(name), prunable) and not np.isin(flow.layer_roots(name), flow.at_output).any()
    ]


def macs_at(model: nn.Module, example_inputs: Tensor, ratio: float) -> int:
    """Return the MACs that a common ratio leaves: which channels go doesn't matter, only how many."""
    victim = copy.deepcopy(model)
    pruner = create_pruner("l1", victim, pruning_config(victim, example_inputs, ratio))
    _, masks = pruner.compress()
    return zoo.count_macs(to_dense(model, example_inputs, masks, check=False), example_inputs)
