"""Weight clouds of a traced network: with what folds into a filter's weights, or with what scales and reads them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nni_topo.errors import DataError
from nni_topo.network.channels.flow import ChannelFlow, norms_after
from nni_topo.network.layers.kinds import norm_scale, through_norms
from nni_topo.network.runtime.fits import call_arguments
from nni_topo.pruners.clouds.functional import check_read, readers_of
from nni_topo.pruners.clouds.weight import WeightCollector
from nni_topo.pruners.hooks import Data, DataCollector, PruningContext
from nni_topo.pruners.units import PruningUnit, output_blocks
from nni_topo.rules import checked


class _TracedCollector(DataCollector):
    """A collector that traces the model with example inputs."""

    @checked()
    def __init__(self, example_inputs: Any) -> None:
        self.example_inputs = example_inputs


class CoupledWeightCollector(_TracedCollector):
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

    def check(self, model: nn.Module, modules: dict[str, nn.Module]) -> None:
        """Check that every layer is read, as :meth:`collect` needs it."""
        check_read(model, modules, call_arguments(self.example_inputs, model))

    def collect(self, context: PruningContext) -> Data:
        """Return float64 clouds ``(blocks, features)`` on the CPU."""
        weights = WeightCollector().collect(context)
        flow = context.analysis(self.example_inputs).flow
        norms = norm_scales(context, flow)
        listened = {}
        for unit in context.units:
            strengths = [reader.strength.pow(2).sum(1) for reader in readers_of(unit, flow, context)]
            listened[unit.name] = torch.stack(strengths).sum(0).sqrt()

        def points(unit: PruningUnit, module: str, target: str) -> Tensor:
            points = weights[module][target] * listened[unit.name][:, None]
            if module in norms:
                scale = norms[module][output_blocks(context.target_spaces[module][target], "coupled clouds")][..., None]
                points = (points.unflatten(1, (scale.shape[1], -1)) * scale).flatten(1)
            return points

        return context.collected(points)


def norm_scales(context: PruningContext, flow: ChannelFlow) -> dict[str, Tensor]:
    """Return ``|weight| / sqrt(variance + eps)``, float64 ``(channels,)``, of the norm directly after it, by layer."""
    norms = norms_after(context.model, flow).items()
    scales = ((layer, norm_scale(context.model.get_submodule(name))) for layer, name in norms)
    return {layer: scale.abs().cpu() for layer, scale in scales if scale is not None}


class FoldedWeightCollector(_TracedCollector):
    """The weight cloud of the network without batch norms; needs no data, only the shape of an input.

    A filter's coordinates are its weights times the scale of the batch norm directly after it, and one more: the bias
    that folding leaves, ``(bias - mean) * scale + shift``. Together they are the affine map of filter and norm in
    evaluation mode, so filters are near each other if their maps are, and at the origin if theirs is zero. A layer
    without a norm has its own weights and bias; one with neither has a zero for the bias.

    Parameters
    ----------
    example_inputs : Tensor, tuple, list or mapping of str to Any
        Inputs of the model, to find the batch norms by tracing it.

    See Also
    --------
    CoupledWeightCollector : also counts the weights that read the filter.

    Notes
    -----
    A norm without running statistics can't be folded and is left out.
    """

    def collect(self, context: PruningContext) -> Data:
        """Return float64 clouds ``(blocks, features + 1)`` on the CPU."""
        weights = WeightCollector().collect(context)
        norms = norms_after(context.model, context.analysis(self.example_inputs).flow)

        def points(_: PruningUnit, module: str, target: str) -> Tensor:
            outputs = output_blocks(context.target_spaces[module][target], "folded clouds")
            norm = [context.model.get_submodule(norms[module])] if module in norms else []
            own = weights[module][target].unflatten(1, (outputs.shape[1], -1))
            space = context.target_spaces[module].get("bias")
            unmasked: Any = context.model.get_submodule(module).bias if space is None else space.target
            if unmasked is None:
                bias = torch.zeros(outputs.size, dtype=torch.float64)
            else:
                bias = unmasked.detach().to("cpu", torch.float64)
            scale, offset = (values.cpu()[outputs][..., None] for values in through_norms(norm, bias))
            if not bool(torch.isfinite(scale).all() and torch.isfinite(offset).all()):
                raise DataError(f"biases and batch norms must be finite, got NaN or infinity ({module})")
            return torch.cat([own * scale, offset], 2).flatten(1)

        return context.collected(points)
