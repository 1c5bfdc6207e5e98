"""Which layers a comparison prunes, and the widths that meet a budget of multiply-accumulates."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from nni_topo.errors import ConfigError
from nni_topo.hooks.budget import solve_uniform
from nni_topo.runner.cells import Target
from nni_topo.speedup import dependency_groups
from nni_topo.speedup.cost import NetworkCost
from nni_topo.speedup.dependency import channel_flow
from nni_topo.speedup.inputs import call_arguments
from nni_topo.speedup.layers import output_channels


@dataclass(frozen=True)
class _Unit:
    """Layers that lose the same channels: ``rows`` steps of ``parts`` channels each."""

    layers: tuple[str, ...]
    rows: int
    parts: int


def layer_ratios(model: nn.Module, example_inputs: Tensor, target: Target) -> dict[str, float]:
    """Return the ``sparse_ratio`` of every layer that a comparison prunes.

    Parameters
    ----------
    model : torch.nn.Module
        The model; it isn't changed.
    example_inputs : torch.Tensor
        A batch of inputs.
    target : Target
        One ratio for all layers, or the share of the MACs to be left.

    Returns
    -------
    dict of str to float
        By layer, in network order; in [0, 1). For a share of the MACs every layer loses the same share of its
        channels, up to one step of rounding, which is dealt to the layers such that the whole meets the budget.

    Raises
    ------
    ConfigError
        If even one channel per layer costs more than twice the budget.
    """
    config_list = _grouped(model, example_inputs)
    if target.kind == "ratio":
        return {name: target.value for entry in config_list for name in entry["op_names"]}
    units = _units(model, config_list)
    cost = NetworkCost(model, example_inputs)
    removed = _solved(units, cost, target.value)
    # Half a step more than asked keeps int(rows * ratio) from falling short by rounding.
    ratios = {
        name: (count + 0.5) / unit.rows if count else 0.0
        for unit, count in zip(units, removed, strict=True)
        for name in unit.layers
    }
    return {name: ratios[name] for entry in config_list for name in entry["op_names"]}


def pruning_config(model: nn.Module, example_inputs: Tensor, ratios: dict[str, float]) -> list[dict[str, Any]]:
    """Return a config_list with a ratio per layer and dependency groups.

    Parameters
    ----------
    model : torch.nn.Module
        The model; it isn't changed.
    example_inputs : torch.Tensor
        A batch of inputs.
    ratios : dict of str to float
        ``sparse_ratio`` by layer; see :func:`layer_ratios`.
    """
    entries = [{"op_names": [name], "sparse_ratio": float(ratio)} for name, ratio in ratios.items()]
    return dependency_groups(model, example_inputs, entries)


def inner_layers(model: nn.Module, example_inputs: Tensor) -> list[str]:
    """Return the convolutions and linear layers whose channels aren't the model's output, in network order."""
    flow = channel_flow(model, call_arguments(example_inputs))
    prunable = (nn.modules.conv._ConvNd, nn.Linear)
    return [
        name
        for name in flow.layers
        if isinstance(model.get_submodule(name), prunable) and not np.isin(flow.layer_roots(name), flow.at_output).any()
    ]


def _grouped(model: nn.Module, example_inputs: Tensor) -> list[dict[str, Any]]:
    layers = inner_layers(model, example_inputs)
    return dependency_groups(model, example_inputs, [{"op_names": layers, "sparse_ratio": 0.0}])


def _units(model: nn.Module, config_list: list[dict[str, Any]]) -> list[_Unit]:
    layers: dict[str, list[str]] = defaultdict(list)
    parts: dict[str, int] = defaultdict(lambda: 1)
    for entry in config_list:
        (name,) = entry["op_names"]
        key = entry.get("dependency_group_id", name)
        layers[key].append(name)
        parts[key] = math.lcm(parts[key], entry.get("internal_metric_block", 1))
    return [
        _Unit(tuple(names), (output_channels(model.get_submodule(names[0])) or 0) // parts[key], parts[key])
        for key, names in layers.items()
    ]


def _solved(units: list[_Unit], cost: NetworkCost, share: float) -> list[int]:
    """Rows that each unit loses, so that the MACs left are nearest to a share of the whole."""
    whole = cost({}).macs

    def left(removed: Sequence[int]) -> float:
        kept = {
            name: np.tile(np.arange(unit.rows) >= count, unit.parts)
            for unit, count in zip(units, removed, strict=True)
            for name in unit.layers
        }
        return cost(kept).macs / whole

    least = left([unit.rows - 1 for unit in units])
    if least > 2.0 * share:
        raise ConfigError(
            f"a flops target must be reachable, got {share:g} where one channel per layer leaves {least:.3g} (target)"
        )
    return solve_uniform([unit.rows for unit in units], left, share)
