"""Norms of the rows and columns that a channel takes out of a network's weight matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nni_topo.errors import ConfigError
from nni_topo.hooks.base import Data, DataCollector, MetricCalculator, Metrics, PruningContext
from nni_topo.hooks.collectors import WeightCollector
from nni_topo.hooks.functional import readers_of
from nni_topo.hooks.units import PruningUnit
from nni_topo.modes import evaluation_mode
from nni_topo.speedup.channels import ChannelFlow
from nni_topo.speedup.dependency import channel_flow
from nni_topo.speedup.inputs import call_arguments


class RowColumnCollector(DataCollector):
    """Per channel the norm of its row, and of the columns with which the next layers read it.

    Parameters
    ----------
    norm : {1, 2}
        Order of the norm.
    example_inputs : Any
        Inputs of the model, to find who reads a channel. None: rows alone.
    """

    def __init__(self, norm: int, example_inputs: Any) -> None:
        self.norm = norm
        self.example_inputs = example_inputs

    def collect(self, context: PruningContext) -> Data:
        """Return float64 ``(blocks, 2)``: norms of row and columns; no columns where no layer reads the channels."""
        weights = WeightCollector().collect(context)
        flow = None
        if self.example_inputs is not None:
            with evaluation_mode(context.model):
                flow = channel_flow(context.model, call_arguments(self.example_inputs, context.model))
        data: Data = {}
        for unit in context.units:
            columns = self._columns(unit, flow, context)
            for module, target in unit.members:
                rows = weights[module][target].norm(p=self.norm, dim=1)
                data.setdefault(module, {})[target] = torch.stack([rows, columns], dim=1)
        return data

    def _columns(self, unit: PruningUnit, flow: ChannelFlow | None, context: PruningContext) -> Tensor:
        none = torch.zeros(unit.blocks, dtype=torch.float64)
        if flow is None:
            return none
        try:
            readers = readers_of(unit, flow, context, order=float(self.norm))
        except ConfigError:
            return none
        columns: Tensor = torch.cat([reader.strength for reader in readers], dim=1).norm(p=self.norm, dim=1)
        return columns


class JointNorm(MetricCalculator):
    """The norm of everything that goes with a channel; of a dependency group, over all members' rows.

    Parameters
    ----------
    norm : {1, 2}
        Order of the norm.
    """

    def __init__(self, norm: int) -> None:
        self.norm = norm

    def calculate(self, data: Data, context: PruningContext) -> Metrics:
        """Return a norm per channel, the same for all members of a group."""
        metrics: Metrics = {}
        for unit in context.units:
            rows = [data[module][target][:, 0] for module, target in unit.members]
            lead, first = unit.members[0]
            joint = torch.stack([*rows, data[lead][first][:, 1]], dim=1).norm(p=self.norm, dim=1)
            for module, target in unit.members:
                metrics.setdefault(module, {})[target] = joint.reshape(context.metric_shape(module, target))
        return metrics
