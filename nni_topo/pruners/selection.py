"""Metrics that choose a set of blocks: a unit's clouds, the losses of their blocks, and the cover of a cloud."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

from nni_topo.maths import topology
from nni_topo.maths.search.subsets import BoolArray, FloatArray
from nni_topo.maths.ties import first_largest
from nni_topo.pruners.clouds import Preprocess, preprocess_points
from nni_topo.pruners.hooks import Data, KeptSet, MetricCalculator, PruningContext
from nni_topo.pruners.planner import Losses
from nni_topo.pruners.units import KeptBlocks, PruningUnit

Clouds = Callable[[str], list["Cloud"]]
"""From a unit's name to the clouds of its parts, which are computed at the first call and cached."""


@dataclass(kw_only=True, eq=False)
class SelectionMetric(MetricCalculator):
    """Chooses the kept blocks of each unit by its clouds.

    ``preprocess``: applied to each member's points; ``origin``: whether the zero vector belongs to the clouds.
    """

    preprocess: Preprocess = "none"
    origin: bool = True
    progress: bool | None = None

    def calculate(self, data: Data, context: PruningContext) -> KeptSet:
        """Plan how many blocks each unit keeps, then choose which."""
        units = {unit.name: unit for unit in context.units}

        @cache
        def clouds(name: str) -> list[Cloud]:
            return self._clouds(units[name], data)

        return context.keep(self.choose(context, clouds, context.rows(self.losses(context, clouds))))

    def losses(self, context: PruningContext, clouds: Clouds) -> Losses:
        """Return the function from a unit to losses that are comparable across units; by default from death times."""
        del context
        return lambda unit: np.concatenate([cloud.losses() for cloud in clouds(unit.name)])

    def _clouds(self, unit: PruningUnit, data: Data) -> list[Cloud]:
        """Concatenate the point clouds of all layers of a unit, then split them into its parts."""
        members = [preprocess_points(data[module][target], self.preprocess).numpy() for module, target in unit.members]
        joined = np.concatenate(members, axis=1) if len(members) > 1 else members[0]
        parts = joined.reshape(unit.parts, unit.rows, -1)
        clouds = []
        for points in parts:
            if self.origin:
                points = topology.with_origin(points)
            clouds.append(Cloud(points, unit.rows))
        return clouds

    @abstractmethod
    def choose(self, context: PruningContext, clouds: Clouds, rows: dict[str, int]) -> KeptBlocks:
        """Return the kept blocks of each unit, boolean ``(blocks,)``; every part keeps its unit's ``rows``."""


@dataclass(frozen=True)
class Cloud:
    """The points of ``size`` blocks, followed by the origin if it belongs to the cloud."""

    points: FloatArray
    size: int

    @cached_property
    def distances(self) -> FloatArray:
        """Distances between all points, shape (points, points)."""
        return topology.pairwise_distances(self.points)

    @property
    def base(self) -> int | None:
        """Index of the origin among the points; None without the origin."""
        if len(self.points) == self.size:
            return None
        return self.size

    def losses(self) -> FloatArray:
        """Half the H0 death times, descending, in units of their mean, shape (size,).

        The j-th is the bottleneck distance by which the cloud's H0 diagram changes if only j - 1 blocks are kept.
        """
        deaths = topology.h0_deaths(self.distances)
        if len(deaths) < self.size:
            # Without the origin there is one death time fewer than blocks: the infinite bar counts as much as the
            # longest finite one.
            longest = deaths[:1] if len(deaths) else np.zeros(1)
            deaths = np.concatenate([longest, deaths])
        mean = deaths.mean()
        if mean > 0:
            deaths = deaths / (2.0 * mean)
        return deaths

    def cover(self, keep: int) -> BoolArray:
        """Mark ``keep`` blocks by farthest-point sampling from the origin or, without it, the most remote point."""
        start = first_largest(self.distances.sum(1)) if self.base is None else self.base
        order, _ = topology.farthest_point_order(self.distances, start)
        return np.isin(np.arange(self.size), order[order < self.size][:keep])
