"""Data collectors: the point clouds that pruners look at, one point per filter or neuron."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from nni_topo.errors import DataError
from nni_topo.network.layers.kinds import by_channel
from nni_topo.network.runtime.calibration import calibration_of
from nni_topo.network.runtime.hooks import watched
from nni_topo.network.runtime.memory import check_memory
from nni_topo.pruners.clouds.moments import ChannelMoments, points_of_gram
from nni_topo.pruners.clouds.narrowing import Narrowing, chunks
from nni_topo.pruners.hooks import Data, DataCollector, PruningContext
from nni_topo.pruners.units import PruningUnit, output_blocks
from nni_topo.rules import checked, one_of

Preprocess = Literal["none", "center", "standardize", "unit"]
_PREPROCESS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda points: points,
    "center": lambda points: points - points.mean(0),
    "standardize": lambda points: (points - points.mean(0)) / _nonzero(points.std(0, correction=0)),
    "unit": lambda points: points / _nonzero(points.norm(dim=1, keepdim=True)),
}


class WeightCollector(DataCollector):
    """The weight cloud: a block's own weights are its coordinates.

    A convolution of shape ``(out, in, kh, kw)`` gives ``out`` points in ``in * kh * kw`` dimensions, a linear layer
    ``(out, in)`` gives ``out`` points in ``in`` dimensions.

    Parameters
    ----------
    preprocess : {"none", "center", "standardize", "unit"}, default="none"
        As it is; mean point moved to the origin; also each feature scaled to unit variance; each point scaled to unit
        length (zero points stay). Constant features are left at zero by ``"standardize"``.
    max_features : int or None, default=None
        Project wider clouds at random onto this many features, at least 1. How far that may move distances is what
        :func:`nni_topo.topology.projection_error` returns for ``blocks + 1`` points (the origin counts); it is logged.
    projection_error : float or None, default=None
        Project onto as few features as keep every distance between points, and from the origin, within this share of
        it, in (0, 1), with probability 0.999 per weight. Clouds that have fewer features are left as they are.
    max_bytes : int, default=2**30
        Largest float64 cloud, in bytes, that is handed on as it is if there is no projection. Larger ones are handed on
        as the ``n`` points in ``n`` dimensions with the same inner products, where that is narrower: distances are kept
        to about 1e-8 of the largest norm.
    seed : int, default=0
        Of the projections.

    Raises
    ------
    ConfigError
        If a knob is out of range, or both ``max_features`` and ``projection_error`` are given.

    Notes
    -----
    A cloud that is made narrow is read in chunks of 64 MiB: beside the weight itself, memory is bounded by ``8 *
    blocks * max_features`` bytes, or ``8 * blocks**2``, which is what the distances take anyway. Projecting costs
    ``blocks * features * max_features`` products. Preprocessing comes before the projection.

    References
    ----------
    .. [1] Perera, "Topological Pruner", MSc thesis, University of Moratuwa, 2022: its table of contents
       names a point cloud made of the weight matrix; only its abstract and lists are public.
    .. [2] Dasgupta, Gupta, "An elementary proof of a theorem of Johnson and Lindenstrauss", Random Structures and
       Algorithms 22, 2003.
    """

    def __init__(
        self,
        *,
        preprocess: Preprocess = "none",
        max_features: int | None = None,
        projection_error: float | None = None,
        max_bytes: int = 2**30,
        seed: int = 0,
    ) -> None:
        self.preprocess = checked_preprocess(preprocess)
        self.narrowing = Narrowing(max_features, projection_error, max_bytes, seed)

    def collect(self, context: PruningContext) -> Data:
        """Return float64 clouds ``(blocks, features)`` on the CPU.

        Raises
        ------
        DataError
            If a weight is NaN or infinite.
        """

        def points(_: PruningUnit, module: str, target: str) -> Tensor:
            space = context.target_spaces[module][target]
            weight = space.target.detach()
            if not bool(torch.isfinite(weight).all()):
                raise DataError(f"weights must be finite, got NaN or infinity ({module}.{target})")
            shrink = None if space._scaler is None else space._scaler.shrink
            blocks = weight[..., None] if shrink is None else shrink(weight, lambda block: block, keepdim=True)
            return self._points(blocks.reshape(-1, blocks.shape[-1]), f"{module}.{target}")

        return context.collected(points)

    def _points(self, cloud: Tensor, name: str) -> Tensor:
        """Preprocess a cloud; make it narrow if it is too wide."""
        features = self.narrowing.features(*cloud.shape)
        if features is None and not self.narrowing.is_large(*cloud.shape):
            what = f"a cloud of {len(cloud)} points of {cloud.shape[1]} features"
            check_memory(16 * cloud.numel(), what, "WeightCollector(max_features=) makes it narrow", name)
            return preprocess_points(cloud.to("cpu", torch.float64), self.preprocess)
        steps = {"center": self.preprocess in ("center", "standardize"), "scale": self.preprocess == "standardize"}
        if features is None:
            points = points_of_gram(_total(part @ part.T for part in chunks(cloud, **steps)))
        else:
            points = self.narrowing.project(cloud, features, name, **steps)
        if self.preprocess == "unit":
            points = points / _nonzero(_total(part.pow(2).sum(1) for part in chunks(cloud)).sqrt())[:, None]
        return points


class ActivationCollector(DataCollector):
    """The activation cloud: a neuron's outputs over a calibration set are its coordinates.

    Only inner products of activations enter distances, so they are summed up batch by batch and the cloud is handed on
    as the ``n`` points in ``n`` dimensions that have these inner products. Memory doesn't grow with the number of
    samples; distances are those of the full cloud up to rounding (about 1e-8 of the largest norm).

    Parameters
    ----------
    calibration : iterable or None
        Batches of inputs, or of ``(inputs, ...)`` of which the first is used. Iterated once per collection, so pass a
        list or a DataLoader rather than a generator. None: the pruner's evaluator runs its evaluation instead.
    center : bool, default=True
        Subtract each neuron's mean first: the next layer's bias can take over a constant.
    preprocess : {"none", "center", "standardize", "unit"}, default="none"
        As in :class:`WeightCollector`, on the points handed on.

    Notes
    -----
    Distances are per sample and position: they don't grow with the size of the calibration set. Convolutions count
    every position of their output map as a sample.
    """

    @checked()
    def __init__(
        self,
        calibration: Iterable[Any] | None = None,
        *,
        center: bool = True,
        preprocess: Preprocess = "none",
    ) -> None:
        self.calibration = calibration_of(calibration)
        self.center = center
        self.preprocess = checked_preprocess(preprocess)

    def collect(self, context: PruningContext) -> Data:
        """Return float64 clouds ``(blocks, blocks)`` on the CPU.

        Raises
        ------
        ConfigError
            If there is neither calibration data nor an evaluator, or a target isn't pruned by output channel.
        DataError
            If no batch came, or activations are NaN or infinite.
        """
        moments = {module: ChannelMoments(module) for unit in context.units for module, _ in unit.members}
        layers = {name: context.model.get_submodule(name) for name in moments}

        def see(name: str, _: Tensor, outputs: Tensor) -> None:
            moments[name].add(by_channel(layers[name], outputs))

        with watched(leaving=[(layer, partial(see, name)) for name, layer in layers.items()]):
            context.run(self.calibration)

        def points(_: PruningUnit, module: str, target: str) -> Tensor:
            outputs = output_blocks(context.target_spaces[module][target], "activation clouds")
            found = points_of_gram(moments[module].gram(center=self.center))
            return preprocess_points(found[outputs].flatten(1), self.preprocess)

        return context.collected(points)


PREPROCESS = one_of(_PREPROCESS)


def checked_preprocess(preprocess: Preprocess) -> Preprocess:
    """Return the name of a preprocessing step, or raise :class:`~nni_topo.errors.ConfigError`."""
    PREPROCESS.check("preprocess", preprocess, "cloud")
    return preprocess


def preprocess_points(points: Tensor, preprocess: Preprocess) -> Tensor:
    """Return preprocessed points ``(n, features)``; see :class:`WeightCollector`."""
    return _PREPROCESS[preprocess](points)


def _total(parts: Iterable[Tensor]) -> Tensor:
    return sum(parts, torch.zeros((), dtype=torch.float64))


def _nonzero(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.ones_like(scale), scale)
