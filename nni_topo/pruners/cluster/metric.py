"""Keep one neuron of each cluster of features: what such metrics share, and the one with a given number of clusters."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from nni_topo.context import leaving_out
from nni_topo.errors import DataError
from nni_topo.maths.clustering import partition
from nni_topo.maths.clustering.partition import FloatArray, IntArray
from nni_topo.maths.ties import FLOOR, RELATIVE, descending, leveled
from nni_topo.network.channels.ids import Layer
from nni_topo.pruners.clouds.features import FeatureCollector
from nni_topo.pruners.cluster.survivors import best_of, survivor_scores
from nni_topo.pruners.hooks import Data, KeptSet, MetricCalculator, PruningContext
from nni_topo.pruners.planner import Planner
from nni_topo.pruners.units import PruningUnit, output_blocks

BoolArray = NDArray[np.bool_]
_CONSTANT = 1e-12
_MATRICES = {"kmeans": 0.5, "spectral": 7.0, "dbscan": 6.0}  # float64 numbers that are held for each pair of neurons
# Features were summed in single precision: near ties of distances are measured by the points' size, not by their own.
_MEASURED = RELATIVE / FLOOR


@dataclass(frozen=True)
class FeatureCloud:
    """One part of a unit: its neurons' features ``(rows, d)``, those of all members side by side."""

    points: FloatArray
    deviations: FloatArray
    names: IntArray

    @cached_property
    def covariance(self) -> FloatArray:
        """Covariances between the neurons, shape (rows, rows)."""
        covariance: FloatArray = self.deviations @ self.deviations.T
        return covariance

    @property
    def alive(self) -> BoolArray:
        """Which neurons ever put out anything but zero, shape (rows,)."""
        alive: BoolArray = (self.points != 0).any(1)
        return alive

    def living(self) -> FeatureCloud:
        """Return the cloud without its dead neurons."""
        kept = self.alive
        return self if kept.all() else FeatureCloud(self.points[kept], self.deviations[kept], self.names[kept])


@dataclass(frozen=True)
class Clusters:
    """Each neuron's cluster, ``(blocks,)``, -1 for dead ones, none in two parts; the rows that each part keeps."""

    labels: IntArray
    rows: int


@dataclass(kw_only=True, eq=False)
class SurvivorMetric(MetricCalculator):
    """Keeps one neuron of each cluster, by the ``survivor`` rules."""

    collector: FeatureCollector
    survivor: tuple[str, ...]
    seed: int
    # By layer, of the latest call: the survivor of each pruned neuron. Dead neurons need none.
    pairs: dict[str, dict[int, int]] = field(default_factory=dict, init=False)

    @abstractmethod
    def cluster(self, clouds: dict[str, list[FeatureCloud]], context: PruningContext) -> dict[str, Clusters]:
        """Return the clusters of every unit, given the clouds of its parts."""

    def calculate(self, data: Data, context: PruningContext) -> KeptSet:
        """Cluster every unit and choose the neurons to keep."""
        layers = self.collector.network.flow.layers
        clouds = {unit.name: _clouds(unit, data, layers) for unit in context.units}
        found = self.cluster(clouds, context)
        generator = np.random.default_rng(self.seed)
        self.pairs = {}
        kept = {}
        for unit in context.units:
            points = np.concatenate([cloud.points for cloud in clouds[unit.name]])
            closeness = _closeness(points, found[unit.name].labels)
            scores = survivor_scores(self.survivor, unit, context, self.collector.network, closeness, generator)
            kept[unit.name] = self._kept(unit, points, found[unit.name], scores, context)
        return context.keep(kept)

    def _kept(
        self, unit: PruningUnit, points: FloatArray, clusters: Clusters, scores: FloatArray, context: PruningContext
    ) -> BoolArray:
        """Choose the kept neurons of a unit and remember which neurons each stands for."""
        labels = clusters.labels
        best = best_of(labels, scores)
        distances = np.where(labels < 0, -1.0, np.linalg.norm(points - points[best], axis=1))
        kept = np.zeros(unit.blocks, dtype=bool)
        kept[best[best >= 0]] = True
        for part in np.arange(unit.blocks).reshape(unit.parts, unit.rows):
            others = part[~kept[part]]
            # Where a cap or another part asks for more neurons than there are clusters, those farthest from the
            # survivor of their cluster are kept too; dead ones last.
            lacking = clusters.rows - (len(part) - len(others))
            kept[others[descending(distances[others])[: max(lacking, 0)]]] = True
        pruned = np.flatnonzero(~kept & (best >= 0))
        lead, target = unit.members[0]
        outputs = output_blocks(context.target_spaces[lead][target], "clusters")
        both = zip(outputs[pruned].ravel().tolist(), outputs[best[pruned]].ravel().tolist(), strict=True)
        self.pairs[lead] = dict(both)
        return kept


@dataclass(kw_only=True, eq=False)
class ClusterMetric(SurvivorMetric):
    """As many clusters as the config_list leaves neurons, by :func:`~nni_topo.maths.clustering.partition`."""

    algorithm: str
    n_init: int
    min_samples: int
    graph: str

    def cluster(self, clouds: dict[str, list[FeatureCloud]], context: PruningContext) -> dict[str, Clusters]:
        """Return the clusters of every unit."""
        cure = f"{leaving_out()}, or take algorithm='kmeans'"
        context.check_memory(_MATRICES.get(self.algorithm, 2.0), cure)
        rows = context.rows(lambda unit: merging_losses(clouds[unit.name]))
        return {u.name: self._clusters(u, clouds[u.name], rows[u.name], context.planner) for u in context.units}

    def _clusters(self, unit: PruningUnit, parts: list[FeatureCloud], rows: int, planner: Planner) -> Clusters:
        alive = max(int(cloud.alive.sum()) for cloud in parts)
        # If any are pruned all dead neurons are, even more than the ratio asks for; the maximum ratio holds.
        if rows < unit.rows:
            rows = planner.rounded(unit, max(1, min(rows, alive), unit.rows - unit.removable_rows[1]))
        labels = np.full(unit.blocks, -1, dtype=np.intp)
        for cloud in (part.living() for part in parts):
            if len(cloud.names):
                found = partition(
                    cloud.points,
                    min(rows, len(cloud.names)),
                    self.algorithm,
                    seed=self.seed,
                    n_init=self.n_init,
                    min_samples=self.min_samples,
                    graph=self.graph,
                )
                labels[cloud.names] = found + labels.max() + 1
        return Clusters(labels, rows)


def _clouds(unit: PruningUnit, data: Data, layers: Mapping[str, Layer]) -> list[FeatureCloud]:
    """Join the members' features, of a neuron those of all its channels, and cut them into the unit's parts."""
    members = [data[m][t].unflatten(1, (layers[m].channels // unit.blocks, -1)).numpy() for m, t in unit.members]
    points, deviations = (
        np.concatenate([each.reshape(unit.blocks, -1) for each in some], axis=1) / np.sqrt(len(members))
        for some in (members, [each[..., 1:] for each in members])
    )
    scale = np.square(points).sum()
    if scale > 0 and np.square(deviations).sum() <= _CONSTANT * scale:
        raise DataError(f"features must vary over the calibration samples, got constants for all neurons ({unit.name})")
    names = np.arange(unit.blocks, dtype=np.intp).reshape(unit.parts, unit.rows)
    return [FeatureCloud(points[rows], deviations[rows], rows) for rows in names]


def _closeness(points: FloatArray, labels: IntArray) -> FloatArray:
    """Return the negative distance of each neuron to its cluster's mean, ``(blocks,)``; 0 for those in none."""
    closeness = np.zeros(len(points))
    scale = _MEASURED * float(np.linalg.norm(points, axis=1).max(initial=0.0))
    for label in np.unique(labels[labels >= 0]):
        members = labels == label
        distances = np.linalg.norm(points[members] - points[members].mean(0), axis=1)
        # Of a pair both are as far from the mean, which rounding mustn't deny.
        closeness[members] = leveled(-distances, scale)
    return closeness


def merging_losses(parts: list[FeatureCloud]) -> FloatArray:
    """Return what each cluster more is worth, in units of the mean, shape (blocks,)."""
    from scipy.cluster.hierarchy import linkage

    heights = np.zeros((len(parts), len(parts[0].points)))
    for part, cloud in enumerate(parts if heights.shape[1] > 1 else ()):
        # The j-th cluster is worth the distance at which Ward's agglomeration would merge it into fewer.
        merges = linkage(cloud.points, "ward")[::-1, 2]
        heights[part] = np.concatenate([merges[:1], merges])
    mean = heights.mean()
    return (heights / mean if mean > 0 else heights).reshape(-1)
