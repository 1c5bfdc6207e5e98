"""The point clouds by name, for the ``cloud`` knob of a pruner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nni_topo.errors import ConfigError
from nni_topo.network.runtime.calibration import Calibration
from nni_topo.pruners.clouds.functional import FunctionalCollector
from nni_topo.pruners.clouds.weight import WeightCollector
from nni_topo.pruners.hooks import DataCollector
from nni_topo.rules import check_fields, instance, one_of

CLOUDS = ("auto", "weight", "functional")
"""Names of clouds."""
Preprocess = Literal["none", "center", "standardize", "unit"]


def preprocess_points(points: Tensor, preprocess: Preprocess) -> Tensor:
    """Return preprocessed points ``(n, features)``; see :class:`PointCloud`."""
    if preprocess == "none":
        return points
    if preprocess == "unit":
        scale = points.norm(dim=1, keepdim=True)
    else:
        points = points - points.mean(0)
        if preprocess == "center":
            return points
        scale = points.std(0, correction=0)
    return points / torch.where(scale == 0, torch.ones_like(scale), scale)


@dataclass(frozen=True)
class PointCloud:
    """The points that represent a layer's filters.

    Parameters
    ----------
    kind : {"auto", "weight", "functional"} or DataCollector, default="auto"
        The filters' weights, or the effect of their outputs on the layers that read them, over the calibration data.
        ``"auto"``: ``"functional"`` if there are calibration data, else ``"weight"``. A collector makes its own points.
    preprocess : {"none", "center", "standardize", "unit"}, default="none"
        Each member's cloud unchanged; with its mean point moved to the origin; also with each feature scaled to unit
        variance (constant features become 0); or with each point scaled to unit length (zero points stay).
    origin : bool, default=True
        Whether the origin, where pruned filters lie, belongs to the cloud.

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

    def collector(self, calibration: Calibration | None) -> DataCollector:
        """Return the collector of the points, which doesn't preprocess them: the metric does."""
        if isinstance(self.kind, DataCollector):
            return self.kind
        if self.kind == "weight" or (self.kind == "auto" and calibration is None):
            return WeightCollector()
        if calibration is None:
            raise ConfigError(f"cloud {self.kind!r} needs calibration data or an evaluator, got neither (calibration)")
        return FunctionalCollector(calibration)
