"""Wide clouds made narrow: what a collector does with a weight whose float64 copy would be too large."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nni_topo.errors import ConfigError
from nni_topo.maths import topology
from nni_topo.rules import NONE, SEED, check_knobs, number, whole

_logger = logging.getLogger(__name__)
_STRETCH = 2**23
_RULES = {
    "max_features": whole(1) | NONE,
    "projection_error": number(0, 1, "neither") | NONE,
    "max_bytes": whole(1, 2**63 - 1),
    "seed": SEED,
}


@dataclass(frozen=True)
class Narrowing:
    """How wide a cloud may be, by the knobs of :class:`WeightCollector`; ConfigError if one is out of range."""

    max_features: int | None
    projection_error: float | None
    max_bytes: int
    seed: int

    def __post_init__(self) -> None:
        if self.max_features is not None and self.projection_error is not None:
            raise ConfigError("a projection must have max_features or projection_error, got both (WeightCollector)")
        check_knobs("WeightCollector", vars(self), _RULES)

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
        columns = (chunk.numpy() for chunk in chunks(cloud, center=center, scale=scale))
        return torch.from_numpy(topology.random_projection(columns, features, self.seed))


def chunks(cloud: Tensor, *, center: bool = False, scale: bool = False) -> Iterator[Tensor]:
    """Yield chunks ``(n, some features)`` of a cloud ``(n, features)``, float64, on the CPU, 64 MiB at most."""
    for part in cloud.split(max(1, _STRETCH // len(cloud)), dim=1):
        chunk = part.to("cpu", torch.float64)
        if center:
            chunk = chunk - chunk.mean(0)
        if scale:
            # A constant feature has no scale of its own and stays as it is.
            deviation = chunk.std(0, correction=0)
            chunk = chunk / torch.where(deviation == 0, 1.0, deviation)
        yield chunk
