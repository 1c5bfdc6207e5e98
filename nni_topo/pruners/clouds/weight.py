"""Data collectors: the point clouds that pruners look at, one point per filter or neuron."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nni_topo.context import leaving_out
from nni_topo.errors import DataError
from nni_topo.network.layers.kinds import by_channel
from nni_topo.network.runtime.calibration import Calibration
from nni_topo.network.runtime.fits import run
from nni_topo.network.runtime.hooks import watched
from nni_topo.network.runtime.memory import check_memory
from nni_topo.pruners.clouds.moments import ChannelMoments, points_of_gram
from nni_topo.pruners.hooks import Data, DataCollector, PruningContext
from nni_topo.pruners.units import PruningUnit, output_blocks
from nni_topo.rules import checked


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
            shrink = None if space._scaler is None else space._scaler.shrink
            blocks = weight[..., None] if shrink is None else shrink(weight, lambda block: block, keepdim=True)
            cloud: Tensor = blocks.reshape(-1, blocks.shape[-1])
            what = f"a cloud of {len(cloud)} points of {cloud.shape[1]} features"
            check_memory(16 * cloud.numel(), what, f"{leaving_out()}, or choose by norms", f"{module}.{target}")
            return cloud.to("cpu", torch.float64)

        return context.collected(points)


class ActivationCollector(DataCollector):
    """The activation cloud: a neuron's outputs over a calibration set, less their mean, are its coordinates.

    Only inner products of activations enter distances, so they are summed up batch by batch and the cloud is handed on
    as the ``n`` points in ``n`` dimensions that have these inner products. Memory doesn't grow with the number of
    samples; distances are those of the full cloud up to rounding (about 1e-8 of the largest norm).

    Parameters
    ----------
    calibration : iterable
        Batches of inputs, or of ``(inputs, ...)`` of which the first is used. A list or DataLoader, not a generator.

    Notes
    -----
    Distances are per sample and position: they don't grow with the size of the calibration set. Convolutions count
    every position of their output map as a sample.
    """

    @checked()
    def __init__(self, calibration: Iterable[Any]) -> None:
        self.calibration = Calibration.of(calibration)

    def collect(self, context: PruningContext) -> Data:
        """Return float64 clouds ``(blocks, blocks)`` on the CPU."""
        moments = {module: ChannelMoments(module) for unit in context.units for module, _ in unit.members}
        layers = {name: context.model.get_submodule(name) for name in moments}

        def see(name: str, _: Tensor, outputs: Tensor) -> None:
            moments[name].add(by_channel(layers[name], outputs))

        with watched(leaving=[(layer, partial(see, name)) for name, layer in layers.items()]):
            run(context.model, self.calibration)

        def points(_: PruningUnit, module: str, target: str) -> Tensor:
            outputs = output_blocks(context.target_spaces[module][target], "activation clouds")
            return points_of_gram(moments[module].gram())[outputs].flatten(1)

        return context.collected(points)
