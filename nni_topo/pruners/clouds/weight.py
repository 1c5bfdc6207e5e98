"""The weight cloud: one point per filter or neuron."""

from __future__ import annotations

import torch
from torch import Tensor

from nni_topo.context import leaving_out
from nni_topo.errors import DataError
from nni_topo.network.runtime.memory import check_memory
from nni_topo.pruners.hooks import Data, DataCollector, PruningContext
from nni_topo.pruners.units import PruningUnit


class WeightCollector(DataCollector):
    """The weight cloud: a block's own weights are its coordinates.

    A convolution of shape ``(out, in, kh, kw)`` gives ``out`` points in ``in * kh * kw`` dimensions, a linear layer
    ``(out, in)`` gives ``out`` points in ``in`` dimensions.

    References
    ----------
    .. [1] Perera, "Topological Pruner", MSc thesis, University of Moratuwa, 2022: its table of contents
       names a point cloud made of the weight matrix; only its abstract and lists are public.
    """

    def collect(self, context: PruningContext) -> Data:
        """Return float64 clouds ``(blocks, features)`` on the CPU."""

        def points(_: PruningUnit, module: str, target: str) -> Tensor:
            space = context.target_spaces[module][target]
            weight = space.target.detach()
            if not bool(torch.isfinite(weight).all()):
                raise DataError(f"weights must be finite, got NaN or infinity ({module}.{target})")
            if space._scaler is None:
                blocks = weight[..., None]
            else:
                blocks = space._scaler.shrink(weight, lambda block: block, keepdim=True)
            cloud: Tensor = blocks.reshape(-1, blocks.shape[-1])
            purpose = f"a cloud of {len(cloud)} points of {cloud.shape[1]} features"
            check_memory(16 * cloud.numel(), purpose, f"{leaving_out()}, or choose by norms", f"{module}.{target}")
            return cloud.to("cpu", torch.float64)

        return context.collected(points)
