"""Wide clouds made narrow: what a collector does with a weight whose float64 copy would be too large."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nni_topo.errors import ConfigError, check_integer
from nni_topo.maths import topology

_logger = logging.getLogger(__name__)
_STRETCH = 2**23


@dataclass(frozen=True)
class Narrowing:
    """How many features a cloud may have.

    Parameters
    ----------
    max_features : int or None
        Wider clouds are projected at random onto this many features.
    projection_error : float or None
        In (0, 1): clouds are projected onto as few features as keep every distance within this share of it, with
        probability 0.999; narrower ones are left as they are.
    max_bytes : int
        A cloud whose float64 copy is larger, and that isn't projected, is handed on as ``n`` points in ``n`` dimensions
        with the same inner products, if that is narrower.
    seed : int
        Of the projections.

    Raises
    ------
    ConfigError
        If a number is out of range, or both of the first two are given.
    """

    max_features: int | None
    projection_error: float | None
    max_bytes: int
    seed: int

    def __post_init__(self) -> None:
        if self.max_features is not None and self.projection_error is not None:
            raise ConfigError("a projection must have max_features or projection_error, got both (WeightCollector)")
        if self.projection_error is not None and not 0.0 < self.projection_error < 1.0:
            raise ConfigError(f"projection_error must be in (0, 1), got {self.projection_error!r} (WeightCollector)")
        for name in ("max_features", "max_bytes"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 1, "WeightCollector")

    def features(self, points: int, features: int) -> int | None:
        """Return how many features a cloud is projected onto; None: it isn't projected."""
        if self.projection_error is not None:
            most = topology.projected_features(points + 1, self.projection_error)
        elif self.max_features is not None:
            most = self.max_features
        else:
            return None
        return most if most < features else None

    def is_large(self, points: int, features: int) -> bool:
        """Say whether a cloud is to be handed on by its inner products."""
        return points < features and 8 * points * features > self.max_bytes

    def project(self, cloud: Tensor, features: int, name: str, *, center: bool, scale: bool) -> Tensor:
        """Return a random projection of a cloud ``(n, any)``, shape ``(n, features)``, float64."""
        error = topology.projection_error(len(cloud) + 1, features)
        _logger.info("%s: %s features projected onto %s, distances to %.3g", name, cloud.shape[1], features, error)
        columns = (stretch.numpy() for stretch in stretches(cloud, center=center, scale=scale))
        return torch.from_numpy(topology.random_projection(columns, features, self.seed))


def stretches(cloud: Tensor, *, center: bool = False, scale: bool = False) -> Iterator[Tensor]:
    """Yield a cloud's features in stretches of at most 64 MiB, float64, on the CPU.

    Parameters
    ----------
    cloud : torch.Tensor
        Shape ``(n, features)``, any floating type and device.
    center, scale : bool, default=False
        Whether each feature's mean is taken off, and whether it is divided by its standard deviation, if that isn't 0.

    Yields
    ------
    torch.Tensor
        Shape ``(n, some features)``.
    """
    for part in cloud.split(max(1, _STRETCH // len(cloud)), dim=1):
        stretch = part.to("cpu", torch.float64)
        if center:
            stretch = stretch - stretch.mean(0)
        if scale:
            deviation = stretch.std(0, correction=0)
            stretch = stretch / torch.where(deviation == 0, 1.0, deviation)
        yield stretch
