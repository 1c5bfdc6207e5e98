"""Scores that hold a ranking: what metrics share that choose a set of blocks and rank the rest behind it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from nni_topo.maths import topology
from nni_topo.maths.search.subsets import BoolArray, FloatArray
from nni_topo.maths.ties import first_largest
from nni_topo.pruners.allocators import ConfigAllocator, profile
from nni_topo.pruners.hooks import Data, MetricCalculator, Metrics, PruningContext
from nni_topo.pruners.units import PruningUnit

IntArray = NDArray[np.intp]
Clouds = dict[str, list["Cloud"]]
Rankings = dict[str, list[IntArray]]
_RANK_STEP = 1e-12


class RankingMetric(MetricCalculator):
    """Scores that rank a unit's blocks so that its kept ones come first; which ones, `rankings` says.

    The j-th block of the ranking gets half the j-th longest H0 death time of the unit's cloud, in units of their mean:
    what the cloud's H0 diagram loses, in bottleneck distance, once this block and all after it are gone. So the scores
    serve ratios, thresholds and global ranking alike. The allocator says how many blocks each unit keeps; ``exact``,
    since the scores hold a ranking. ``origin``: whether the zero vector belongs to the clouds.
    """

    def __init__(self, allocator: ConfigAllocator, *, origin: bool = True, progress: bool = False) -> None:
        self.allocator = allocator
        self.origin = origin
        self.progress = progress

    def calculate(self, data: Data, context: PruningContext) -> Metrics:
        """Choose the kept blocks of every unit and return scores that hold the choice."""
        clouds = {unit.name: _clouds(unit, data, origin=self.origin) for unit in context.units}
        losses = {name: np.stack([_death_profile(cloud) for cloud in parts]) for name, parts in clouds.items()}
        profiles = {unit.name: profile(unit, torch.from_numpy(losses[unit.name])) for unit in context.units}
        rankings = self.rankings(context, clouds, self.allocator.rounded_rows(context, profiles))
        metrics: Metrics = {}
        for unit in context.units:
            scores = np.empty((unit.parts, unit.rows))
            for row, ranking, loss in zip(scores, rankings[unit.name], losses[unit.name], strict=True):
                row[ranking] = loss - _RANK_STEP * np.arange(unit.rows)
            for module_name, target_name in unit.members:
                shape = context.metric_shape(module_name, target_name)
                metrics.setdefault(module_name, {})[target_name] = torch.from_numpy(scores.copy()).reshape(shape)
        return metrics

    def rankings(self, context: PruningContext, clouds: Clouds, rows: dict[str, int]) -> Rankings:
        """Return, by unit, the blocks of each part, those that stay first; of each part ``rows`` stay."""
        raise NotImplementedError


@dataclass(frozen=True)
class Cloud:
    """Distances of ``size`` blocks, and of the origin behind them if it belongs to the cloud."""

    distances: FloatArray
    size: int
    base: int | None

    def with_base(self, population: BoolArray) -> BoolArray:
        """Keep the origin in every subset, ``(individuals, size)`` to ``(individuals, points)``."""
        if self.base is None:
            return population
        return np.pad(population, ((0, 0), (0, 1)), constant_values=True)


def _clouds(unit: PruningUnit, data: Data, *, origin: bool) -> list[Cloud]:
    """Join the members' clouds and cut them into the unit's parts."""
    joined = np.concatenate([data[module][target].numpy() for module, target in unit.members], axis=1)
    return list(_each_part(joined.reshape(unit.parts, unit.rows, -1), origin=origin))


def _each_part(parts: FloatArray, *, origin: bool) -> Iterator[Cloud]:
    for points in parts:
        cloud = topology.with_origin(points) if origin else points
        yield Cloud(topology.pairwise_distances(cloud), len(points), len(points) if origin else None)


def _death_profile(cloud: Cloud) -> FloatArray:
    """Half the H0 death times, descending, in units of their mean; one per block.

    Without the origin there is one death less than there are blocks: the component that lives forever counts as much as
    the longest finite one.
    """
    deaths = topology.h0_deaths(cloud.distances)
    if len(deaths) < cloud.size:
        deaths = np.concatenate([deaths[:1] if len(deaths) else np.zeros(1), deaths])
    mean = deaths.mean()
    return deaths / (2.0 * mean) if mean > 0 else deaths


def greedy_ranking(cloud: Cloud) -> IntArray:
    """Farthest points first, from the origin or, without it, from the most remote point."""
    start = first_largest(cloud.distances.sum(1)) if cloud.base is None else cloud.base
    order, _ = topology.farthest_point_order(cloud.distances, start)
    return order if cloud.base is None else order[order != cloud.base]
