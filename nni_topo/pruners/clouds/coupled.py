"""The coupled weight cloud: a filter's weights, with what scales and reads them in the traced network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nni_topo.network.channels.flow import norms_after
from nni_topo.network.layers.kinds import norm_scale
from nni_topo.network.runtime.fits import call_arguments
from nni_topo.pruners.clouds.functional import check_read, readers_of
from nni_topo.pruners.clouds.weight import WeightCollector
from nni_topo.pruners.hooks import Data, DataCollector, PruningContext
from nni_topo.pruners.units import PruningUnit, output_blocks
from nni_topo.rules import checked


class CoupledWeightCollector(DataCollector):
    """The weight cloud with each filter scaled by what follows it; needs no data, only the shape of an input.

    A filter's coordinates are its weights, times the scale that its batch norm gives them
    (``weight / sqrt(var + eps)``), times the norm of all weights that read its channel. So a filter that the next
    layers barely listen to lies near the origin, whatever its own weights. Removing a filter removes both sides; this
    is what group norms count, too.

    Parameters
    ----------
    example_inputs : Tensor, tuple, list or mapping of str to Any
        Inputs of the model, to trace it.

    See Also
    --------
    FunctionalCollector : the same idea with activations instead of weights; needs calibration data.
    """

    @checked()
    def __init__(self, example_inputs: Any) -> None:
        self.example_inputs = example_inputs

    def check(self, model: nn.Module, modules: dict[str, nn.Module]) -> None:
        """Check that every layer is read, as :meth:`collect` needs it."""
        check_read(model, modules, call_arguments(self.example_inputs, model))

    def collect(self, context: PruningContext) -> Data:
        """Return float64 clouds ``(blocks, features)`` on the CPU."""
        weights = WeightCollector().collect(context)
        flow = context.analysis(self.example_inputs).flow
        norms = norms_after(context.model, flow)
        listened = {}
        for unit in context.units:
            strengths = [reader.strength.pow(2).sum(1) for reader in readers_of(unit, flow, context)]
            listened[unit.name] = torch.stack(strengths).sum(0).sqrt()

        def points(unit: PruningUnit, module: str, target: str) -> Tensor:
            points = weights[module][target] * listened[unit.name][:, None]
            by_channel = norm_scale(context.model.get_submodule(norms[module])) if module in norms else None
            if by_channel is not None:
                outputs = output_blocks(context.target_spaces[module][target], "coupled clouds")
                scale = by_channel.abs().cpu()[outputs][..., None]
                points = (points.unflatten(1, (scale.shape[1], -1)) * scale).flatten(1)
            return points

        return context.collected(points)
