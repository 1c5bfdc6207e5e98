"""The point clouds by name, as the ``cloud`` knob of a pruner takes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from nni_topo.errors import ConfigError
from nni_topo.network.runtime.calibration import Calibration
from nni_topo.pruners.clouds.functional import FunctionalCollector
from nni_topo.pruners.clouds.gradient import GradientCollector
from nni_topo.pruners.clouds.traced import CoupledWeightCollector, FoldedWeightCollector
from nni_topo.pruners.clouds.weight import ActivationCollector, WeightCollector
from nni_topo.pruners.hooks import DataCollector
from nni_topo.rules import check_fields, instance, one_of

TRACED: dict[str, Callable[..., DataCollector]] = {
    "coupled": CoupledWeightCollector,
    "folded": FoldedWeightCollector,
}
MEASURED: dict[str, Callable[..., DataCollector]] = {
    "activation": ActivationCollector,
    "functional": FunctionalCollector,
    "gradient": GradientCollector,
}
CLOUDS = ("auto", "weight", *TRACED, *MEASURED)
"""Names of clouds."""

Preprocess = Literal["none", "center", "standardize", "unit"]
_PREPROCESS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda points: points,
    "center": lambda points: points - points.mean(0),
    "standardize": lambda points: (points - points.mean(0)) / _nonzero(points.std(0, correction=0)),
    "unit": lambda points: points / _nonzero(points.norm(dim=1, keepdim=True)),
}


def preprocess_points(points: Tensor, preprocess: Preprocess) -> Tensor:
    """Return preprocessed points ``(n, features)``; see :class:`PointCloud`."""
    return _PREPROCESS[preprocess](points)


def _nonzero(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.ones_like(scale), scale)


@dataclass(frozen=True)
class PointCloud:
    """Which points stand for a layer's filters.

    Parameters
    ----------
    kind : {"auto", "weight", "folded", "coupled", "activation", "functional", "gradient"} or DataCollector
        The filters' weights; the same with bias and batch norm folded in, or scaled by batch norm and by the weights
        that read them (both need ``example_inputs``); the filters' outputs over the calibration data; what these
        outputs do in the layers that read them; or what removing a filter does to each labelled sample's loss. Default
        ``"auto"``: ``"functional"`` if there are calibration data, else ``"weight"``. A collector makes its own points.
    preprocess : {"none", "center", "standardize", "unit"}, default="none"
        Each member's cloud as it is; its mean point moved to the origin; also each feature scaled to unit variance;
        each point scaled to unit length (zero points stay). Constant features are left at zero by ``"standardize"``.
    origin : bool, default=True
        Whether the origin, to which a pruned filter falls, belongs to the cloud.

    Examples
    --------
    >>> PointCloud("weight", preprocess="unit").origin
    True
    """

    kind: str | DataCollector = "auto"
    preprocess: Preprocess = "none"
    origin: bool = True

    def __post_init__(self) -> None:
        check_fields(self, "cloud", kind=one_of(CLOUDS) | instance(DataCollector))

    def collector(self, calibration: Calibration | None, example_inputs: Any) -> DataCollector:
        """Return what collects the points; they are preprocessed where subsets of them are chosen."""
        if isinstance(self.kind, DataCollector):
            return self.kind
        kind = self.kind
        if kind == "auto":
            kind = "weight" if calibration is None else "functional"
        if kind == "weight":
            return WeightCollector()
        if kind in TRACED:
            if example_inputs is None:
                raise ConfigError(
                    f"cloud {kind!r} needs example_inputs or an evaluator that has a dummy_input or evaluates, got "
                    "neither (example_inputs)"
                )
            return TRACED[kind](example_inputs)
        if calibration is None:
            needed = "of (inputs, targets), got none" if kind == "gradient" else "or an evaluator, got neither"
            raise ConfigError(f"cloud {kind!r} needs calibration data {needed} (calibration)")
        return MEASURED[kind](calibration)
