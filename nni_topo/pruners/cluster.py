"""Clustered pruning: one neuron or filter of each cluster of features is kept.

Source: S. S. John, "Sub-clustering based neurogenetic pruning", MTech thesis, Indian Institute of Space Science and
Technology, 2019, chapter 4, algorithm 1; on which neuron of a cluster is kept, sections 4.3.1 and 5.3.5.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from nni.compression.base.wrapper import ModuleWrapper
from nni.compression.utils import Evaluator
from scipy.stats import rankdata
from torch import nn

from nni_topo.context import leaving_out
from nni_topo.errors import ConfigError, DataError, LayerError
from nni_topo.maths.clustering import partition
from nni_topo.maths.clustering.partition import Algorithm, FloatArray, IntArray, NeighbourGraph, check_used
from nni_topo.maths.ties import FLOOR, RELATIVE, descending, first_largest, leveled
from nni_topo.network.channels.ids import Layer
from nni_topo.network.layers.kinds import by_output, through_norms
from nni_topo.network.runtime.hooks import pruner_batches
from nni_topo.pruners.base import StructuredPruner
from nni_topo.pruners.budget import Budget
from nni_topo.pruners.checks import pruner_arguments
from nni_topo.pruners.clouds.features import FeatureCollector, TracedNetwork
from nni_topo.pruners.clouds.functional import read_strength, readers_of
from nni_topo.pruners.hooks import Data, KeptSet, MetricCalculator, PruningContext
from nni_topo.pruners.units import PruningUnit, output_blocks
from nni_topo.rules import all_of, one_of

_CONSTANT = 1e-12
_MATRICES = {"kmeans": 0.5, "spectral": 7.0, "dbscan": 6.0}  # float64 values in memory per pair of neurons
# Features have single precision, so ties of distances are judged relative to the points' norms, not to the distances.
_MEASURED = RELATIVE / FLOOR

RULES = ("random", "center", "weight", "bias", "bias_norm")
Survivor = str | Sequence[str]
SURVIVOR = one_of(("auto", *RULES)) | all_of(one_of(RULES), Sequence, least=1)


@dataclass(frozen=True)
class FeatureCloud:
    """One part of a unit: its neurons' features ``(rows, d)``, all members side by side."""

    points: FloatArray
    deviations: FloatArray
    names: IntArray

    @cached_property
    def covariance(self) -> FloatArray:
        """Covariances between the neurons, shape (rows, rows)."""
        covariance: FloatArray = self.deviations @ self.deviations.T
        return covariance

    def without_dead(self) -> FeatureCloud:
        """Return the cloud without the neurons whose outputs are all zero."""
        is_alive = (self.points != 0).any(1)
        return FeatureCloud(self.points[is_alive], self.deviations[is_alive], self.names[is_alive])


@dataclass(frozen=True)
class Clusters:
    """Each neuron's cluster, ``(blocks,)``, -1 for dead neurons; each part has its own clusters and keeps ``rows``."""

    labels: IntArray
    rows: int


@dataclass(kw_only=True, eq=False)
class SurvivorMetric(MetricCalculator):
    """Keeps one neuron of each cluster, by the ``survivor`` rules."""

    collector: FeatureCollector
    survivor: Survivor
    seed: int
    # Of the latest call, by layer: the survivor of each pruned neuron that is in a cluster.
    pairs: dict[str, dict[int, int]] = field(default_factory=dict, init=False)

    @abstractmethod
    def cluster(self, clouds: dict[str, list[FeatureCloud]], context: PruningContext) -> dict[str, Clusters]:
        """Return the clusters of every unit, given the clouds of its parts."""

    def calculate(self, data: Data, context: PruningContext) -> KeptSet:
        """Cluster every unit and choose the neurons to keep."""
        network = self.collector.network
        clouds = {unit.name: _clouds(unit, data, network.flow.layers) for unit in context.units}
        clusters = self.cluster(clouds, context)
        generator = np.random.default_rng(self.seed)
        rules = (self.survivor,) if isinstance(self.survivor, str) else tuple(self.survivor)
        self.pairs, all_kept = {}, {}
        for unit in context.units:
            points = np.concatenate([cloud.points for cloud in clouds[unit.name]])
            labels = clusters[unit.name].labels
            best = best_of(labels, survivor_scores(rules, unit, context, network, points, labels, generator))
            distances = np.where(labels < 0, -1.0, np.linalg.norm(points - points[best], axis=1))
            is_kept = np.zeros(unit.blocks, dtype=np.bool_)
            is_kept[best[best >= 0]] = True
            for part in np.arange(unit.blocks).reshape(unit.parts, unit.rows):
                candidates = part[~is_kept[part]]
                # If a cap or another part requires more neurons than clusters, also keep those farthest from the
                # survivor of their cluster; dead neurons come last.
                lacking = clusters[unit.name].rows - (len(part) - len(candidates))
                is_kept[candidates[descending(distances[candidates])[: max(lacking, 0)]]] = True
            all_kept[unit.name] = is_kept
            pruned = np.flatnonzero(~is_kept & (best >= 0))
            lead, target = unit.members[0]
            outputs = output_blocks(context.target_spaces[lead][target], "clusters")
            both = zip(outputs[pruned].ravel().tolist(), outputs[best[pruned]].ravel().tolist(), strict=True)
            self.pairs[lead] = dict(both)
        return context.keep(all_kept)


def survivor_scores(
    rules: tuple[str, ...],
    unit: PruningUnit,
    context: PruningContext,
    network: TracedNetwork,
    points: FloatArray,
    labels: IntArray,
    generator: np.random.Generator,
) -> FloatArray:
    """Score the neurons of a unit, ``(blocks,)`` float64, by a rule or the mean rank of several; highest = kept."""
    biases = offsets(unit, context, network)
    if rules == ("auto",):
        has_bias = is_convolution(unit, context) and biases is not None
        rules = ("bias_norm",) if has_bias else ("weight",)
    scores = []
    for rule in rules:
        if rule == "random":
            scores.append(generator.random(unit.blocks))
        elif rule == "center":
            # The negative distance to the cluster's mean. Rounding mustn't decide between the two neurons of a pair.
            closeness = np.zeros(len(points))
            scale = _MEASURED * float(np.linalg.norm(points, axis=1).max(initial=0.0))
            for label in np.unique(labels[labels >= 0]):
                cluster_points = points[labels == label]
                distances = np.linalg.norm(cluster_points - cluster_points.mean(0), axis=1)
                closeness[labels == label] = leveled(-distances, scale)
            scores.append(closeness)
        elif rule == "weight":
            # The sum of the absolute weights into and out of each neuron, equation (4.12).
            total = np.zeros(unit.blocks)
            for module_name, target_name in unit.members:
                space = context.target_spaces[module_name][target_name]
                weight = by_output(space.target, space._wrapper.module).detach().double().cpu().numpy()
                total += np.abs(weight).reshape(unit.blocks, -1).sum(1)
            with suppress(LayerError):  # no layer reads the channels, such as the model's outputs
                for reader in readers_of(unit, network.flow, context):
                    total += read_strength(reader.module, reader.places, 1.0).sum(1).numpy()
            scores.append(total)
        elif biases is None:
            raise ConfigError(f"survivor {rule!r} needs a bias or a batch norm, got neither ({unit.name})")
        elif rule == "bias":
            scores.append(biases)
        else:
            scores.append(np.abs(biases))
    if len(scores) == 1:
        return scores[0]
    # Rules have different units (distances, sums of weights, biases), so several are combined by ranks.
    ranks = [rankdata(leveled(scores_of_rule)) for scores_of_rule in scores]
    mean_ranks: FloatArray = np.mean(ranks, axis=0)
    return mean_ranks


def is_convolution(unit: PruningUnit, context: PruningContext) -> bool:
    """Say whether a unit's first layer is a convolution."""
    return isinstance(context.model.get_submodule(unit.members[0][0]), nn.modules.conv._ConvNd)


def offsets(unit: PruningUnit, context: PruningContext, network: TracedNetwork) -> FloatArray | None:
    """Return a unit's constants ``(blocks,)``, from biases and batch norms, summed over members; None without any."""
    constants: list[FloatArray] = []
    modules = dict(context.model.named_modules())
    for name in dict.fromkeys(module_name for module_name, _ in unit.members):
        norms = [modules[norm] for norm in network.taps[name].norms]
        bias = getattr(modules[name], "bias", None)
        if bias is not None or norms:
            if bias is None:
                bias = torch.zeros(network.flow.layers[name].channels)
            # The constant that reaches the activation: the bias after the batch norms in between.
            constants.append(through_norms(norms, bias)[1].cpu().numpy().reshape(unit.blocks, -1).sum(1))
    if not constants:
        return None
    total: FloatArray = np.sum(constants, axis=0)
    return total


def best_of(labels: IntArray, scores: FloatArray) -> IntArray:
    """Return for each node the one with its cluster's highest score, ``(n,)``; -1 for nodes without a cluster."""
    best = np.full(len(labels), -1, dtype=np.intp)
    for label in np.unique(labels[labels >= 0]):
        members = np.flatnonzero(labels == label)
        best[members] = members[first_largest(scores[members])]
    return best


@dataclass(kw_only=True, eq=False)
class ClusterMetric(SurvivorMetric):
    """Makes as many clusters as neurons are to be kept, by :func:`~nni_topo.maths.clustering.partition`."""

    algorithm: str
    graph: str

    def cluster(self, clouds: dict[str, list[FeatureCloud]], context: PruningContext) -> dict[str, Clusters]:
        """Return the clusters of every unit."""
        cure = f"{leaving_out()}, or take algorithm='kmeans'"
        context.check_memory(_MATRICES.get(self.algorithm, 2.0), cure)
        planned = context.rows(lambda unit: merging_losses(clouds[unit.name]))
        clusters = {}
        for unit in context.units:
            rows, parts = planned[unit.name], [part.without_dead() for part in clouds[unit.name]]
            # If any neuron is pruned, all dead ones are, even beyond the ratio, but not beyond the maximum ratio.
            if rows < unit.rows:
                alive = max(len(part.names) for part in parts)
                rows = context.planner.round_rows(unit, max(1, min(rows, alive), unit.rows - unit.removable_rows[1]))
            labels = np.full(unit.blocks, -1, dtype=np.intp)
            for part in parts:
                if count := min(rows, len(part.names)):
                    part_labels = partition(part.points, count, self.algorithm, seed=self.seed, graph=self.graph)
                    labels[part.names] = part_labels + labels.max() + 1
            clusters[unit.name] = Clusters(labels, rows)
        return clusters


def _clouds(unit: PruningUnit, data: Data, layers: Mapping[str, Layer]) -> list[FeatureCloud]:
    """Join the members' features, all channels of a neuron side by side, and split them into the unit's parts."""
    members = [data[m][t].unflatten(1, (layers[m].channels // unit.blocks, -1)).numpy() for m, t in unit.members]

    def side_by_side(features: list[FloatArray]) -> FloatArray:
        flat = [member.reshape(unit.blocks, -1) for member in features]
        joined: FloatArray = np.concatenate(flat, axis=1) / np.sqrt(len(members))
        return joined

    points, deviations = side_by_side(members), side_by_side([member[..., 1:] for member in members])
    scale = np.square(points).sum()
    if scale > 0 and np.square(deviations).sum() <= _CONSTANT * scale:
        raise DataError(f"features must vary over the calibration samples, got constants for all neurons ({unit.name})")
    names = np.arange(unit.blocks, dtype=np.intp).reshape(unit.parts, unit.rows)
    return [FeatureCloud(points[rows], deviations[rows], rows) for rows in names]


def merging_losses(parts: list[FeatureCloud]) -> FloatArray:
    """Return the worth of each additional cluster, divided by the mean, shape (blocks,)."""
    from scipy.cluster.hierarchy import linkage

    heights = np.zeros((len(parts), len(parts[0].points)))
    if heights.shape[1] > 1:
        for part, cloud in enumerate(parts):
            # The j-th cluster is worth the distance of Ward's merge from j to j - 1 clusters, the first as much as the
            # 2nd.
            merges = linkage(cloud.points, "ward")[::-1, 2]
            heights[part] = np.concatenate([merges[:1], merges])
    mean = heights.mean()
    if mean > 0:
        heights /= mean
    return heights.reshape(-1)


class FeaturePruner(StructuredPruner):
    """The base class of pruners that cluster features."""

    calculator: SurvivorMetric

    @property
    def pairs(self) -> dict[str, dict[int, int]]:
        """By layer, the kept neuron that replaces each pruned one, for the latest masks.

        The correlation-based update uses them:
        ``nni_topo.compensate(model, masks, calibration, method=nni_topo.recovery.Pair(pruner.pairs))``.
        """
        return self.calculator.pairs


class ClusterPruner(FeaturePruner):
    """Cluster the neurons of each layer by their outputs, and keep one of each cluster.

    Parameters
    ----------
    model, evaluator, existed_wrappers, calibration, budget, example_inputs, round_to, seed
        As for :class:`~nni_topo.StructuredPruner`.
    config_list : list of dict
        NNI's config_list. The ratio sets the number of clusters; the members of a ``dependency_group_id`` are
        clustered together, features side by side. ``sparse_threshold`` and ``global_group_id`` compare layers by the
        distances at which Ward's agglomeration merges clusters, in units of the layer's mean.
    algorithm : {"kmeans", "spectral", "ward", "dbscan", "gmm", "gmm_full"}, default="kmeans"
        See :func:`nni_topo.maths.clustering.partition`. Points of noise of DBSCAN are kept.
    survivor : str or sequence of str, default="auto"
        Which neuron of a cluster is kept: ``"random"``; ``"center"``, the nearest to its mean; ``"weight"``, the
        largest sum of absolute weights in and out (4.12); ``"bias"``, the largest bias (4.13); ``"bias_norm"``, the
        largest absolute bias. Ranks of several are averaged. A batch norm after the layer is part of the bias.
        ``"auto"``: ``"bias_norm"`` for convolutions with a bias or a batch norm, else ``"weight"``.
    graph : {"epsilon", "knn"}, default="epsilon"
        The graph of spectral clustering, see :func:`nni_topo.maths.clustering.partition`.

    Raises
    ------
    DataError
        When masks are made, if there are fewer than two samples, or all features of a layer are constant.

    Notes
    -----
    If a layer loses any neuron, it loses all that are zero on all samples, unless it would be empty.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> config_list = [{"op_names": ["0"], "sparse_ratio": 0.75}]
    >>> pruner = ClusterPruner(model, config_list, calibration=[torch.randn(64, 4)], algorithm="ward")
    >>> _, masks = pruner.compress()
    >>> int(masks["0"]["bias"].sum())
    4
    """

    @pruner_arguments(survivor=SURVIVOR)
    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict[str, Any]],
        evaluator: Evaluator | None = None,
        existed_wrappers: dict[str, ModuleWrapper] | None = None,
        *,
        calibration: Iterable[Any] | None = None,
        algorithm: Algorithm = "kmeans",
        survivor: Survivor = "auto",
        graph: NeighbourGraph = "epsilon",
        budget: Budget | Mapping[str, Any] | None = None,
        example_inputs: Any = None,
        round_to: int | None = None,
        seed: int = 0,
    ) -> None:
        check_used(algorithm, graph, type(self).__name__)
        collector = feature_collector(calibration, evaluator, model)
        self.calibration = collector.calibration
        metric = ClusterMetric(collector=collector, survivor=survivor, algorithm=algorithm, graph=graph, seed=seed)
        super().__init__(model, config_list, evaluator, existed_wrappers, collector=collector, calculator=metric)


def feature_collector(
    calibration: Iterable[Any] | None, evaluator: Evaluator | None, model: nn.Module
) -> FeatureCollector:
    """Return the collector of a pruner that clusters features."""
    batches = pruner_batches(evaluator if calibration is None else calibration, model)
    if batches is None:
        raise ConfigError(
            "a pruner that clusters features needs calibration data or an evaluator, got neither (calibration)"
        )
    return FeatureCollector(batches)
