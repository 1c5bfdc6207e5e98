"""The folded weight cloud: weights and bias of a filter as they are once its batch norm is folded into them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nni_topo.errors import DataError
from nni_topo.network.channels.flow import norms_after
from nni_topo.network.layers.kinds import through_norms
from nni_topo.pruners.clouds.weight import WeightCollector
from nni_topo.pruners.hooks import Data, DataCollector, PruningContext
from nni_topo.pruners.units import PruningUnit, output_blocks
from nni_topo.rules import checked


class FoldedWeightCollector(DataCollector):
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

    @checked()
    def __init__(self, example_inputs: Any) -> None:
        self.example_inputs = example_inputs

    def collect(self, context: PruningContext) -> Data:
        """Return float64 clouds ``(blocks, features + 1)`` on the CPU.

        Raises
        ------
        ConfigError
            If a target isn't pruned by output channel.
        SpeedupError
            If the model can't be traced.
        DataError
            If a weight, a bias or a batch norm's statistics are NaN or infinite.
        """
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
