"""Sub-clustering based neurogenetic pruning: clusters are split until none varies too much; one neuron of each is kept.

Source: S. S. John, "Sub-clustering based neurogenetic pruning", MTech thesis, Indian Institute of Space Science and
Technology, 2019, chapter 5, algorithms 2 and 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from nni.compression.base.wrapper import ModuleWrapper
from nni.compression.utils import Evaluator
from torch import nn

from nni_topo.context import leaving_out
from nni_topo.errors import ConfigError
from nni_topo.maths.clustering.partition import IntArray
from nni_topo.maths.clustering.subclustering import ENERGY, Growth, SplitTree, grow, initial_clusters
from nni_topo.pruners.checks import pruner_arguments
from nni_topo.pruners.cluster import (
    SURVIVOR,
    Clusters,
    FeatureCloud,
    FeaturePruner,
    Survivor,
    SurvivorMetric,
    feature_collector,
    is_convolution,
    merging_losses,
)
from nni_topo.pruners.hooks import PruningContext
from nni_topo.pruners.units import PruningUnit
from nni_topo.rules import NONE, all_of, as_settings, settings

_INITIAL = {"Conv": 0.35, "Linear": 0.05}
_ENERGY = 0.5


@dataclass(kw_only=True, eq=False)
class SubclusterMetric(SurvivorMetric):
    """Splits clusters until none varies too much, and keeps one neuron of each."""

    growth: Growth
    energy: float | Mapping[str, float]
    # Of the latest call, by unit or, where it has several parts, ``name[part]``.
    trees: dict[str, SplitTree] = field(default_factory=dict, init=False)

    def cluster(self, clouds: dict[str, list[FeatureCloud]], context: PruningContext) -> dict[str, Clusters]:
        """Return the clusters of every unit."""
        context.check_memory(3.0, f"{leaving_out()}, or take ClusterPruner")
        self.trees = {}
        clusters = {}
        for unit in context.units:
            # A unit loses at most its own ratio, if it has one, and its maximum ratio; a minimum ratio above its own
            # ratio replaces it, as in NNI.
            fewest, cap = unit.removable_rows
            if unit.sparse_ratio is not None and unit.global_group_id is None:
                cap = min(cap, max(fewest, int(unit.rows * unit.sparse_ratio)))
            clusters[unit.name] = self._clusters(unit, clouds[unit.name], context, cap)
        # The ratio of a global group caps what the group loses.
        grouped = [unit for unit in context.units if unit.global_group_id is not None and unit.sparse_threshold is None]
        bounded = []
        for unit in grouped:
            # Half a row more keeps int(rows * ratio) from falling short by rounding.
            largest = (unit.rows - clusters[unit.name].rows + 0.5) / unit.rows
            bounded.append(replace(unit, max_sparse_ratio=min(largest, 1.0)))
        # Without `round_to`, which is applied to the number of clusters.
        exact = replace(context.planner, round_to=None)
        shared = exact.rows(bounded, lambda unit: merging_losses(clouds[unit.name]), context.model)
        for unit in grouped:
            rows = shared[unit.name]
            if rows > clusters[unit.name].rows:
                clusters[unit.name] = self._clusters(unit, clouds[unit.name], context, unit.rows - rows)
        return clusters

    def _clusters(self, unit: PruningUnit, parts: list[FeatureCloud], context: PruningContext, cap: int) -> Clusters:
        """Cluster each part and prune at most ``cap`` neurons of it; all keep as many as the part that needs most."""
        clouds = [cloud.without_dead() for cloud in parts]
        fewest, most = unit.rows - cap, unit.rows - unit.removable_rows[0]
        labels = [self._labels(unit, part, cloud, context, fewest, most) for part, cloud in enumerate(clouds)]
        most_clusters = max(_count(part_labels) for part_labels in labels)
        rows = context.planner.round_rows(unit, max(fewest, 1, most_clusters))
        for part, cloud in enumerate(clouds):
            if _count(labels[part]) < min(rows, len(cloud.names)):
                labels[part] = self._labels(unit, part, cloud, context, rows, rows)
        joined = []
        shift = 0
        for part_labels in labels:
            joined.append(np.where(part_labels < 0, -1, part_labels + shift))
            shift += part_labels.max(initial=-1) + 1
        return Clusters(np.concatenate(joined), rows)

    def _labels(
        self, unit: PruningUnit, part: int, cloud: FeatureCloud, context: PruningContext, at_least: int, at_most: int
    ) -> IntArray:
        """Grow the tree of one part, store it, and return the part's labels."""
        rows, living = unit.rows, len(cloud.names)
        if not living:
            return np.full(rows, -1, dtype=np.intp)
        default = _INITIAL["Conv" if is_convolution(unit, context) else "Linear"]
        initial_ratio = of_layer(self.growth.initial_ratio, unit, default)
        tree = grow(
            cloud.points,
            cloud.covariance,
            min(living, initial_clusters(initial_ratio, rows)),
            self.growth,
            energy=of_layer(self.energy, unit, _ENERGY),
            threshold=unit.sparse_threshold,
            at_least=min(at_least, living),
            at_most=min(at_most, living),
            seed=self.seed,
        ).renamed(cloud.names)
        self.trees[unit.part_name(part)] = tree
        return tree.labels(unit.blocks)[part * rows : (part + 1) * rows]


def of_layer(knob: float | Mapping[str, float] | None, unit: PruningUnit, default: float) -> float:
    """Return a knob's value for a unit: the value of its first member that is named."""
    if isinstance(knob, Mapping):
        return next((knob[module_name] for module_name, _ in unit.members if module_name in knob), default)
    if knob is None:
        return default
    return knob


def _count(labels: IntArray) -> int:
    return len(np.unique(labels[labels >= 0]))


class SubclusterPruner(FeaturePruner):
    """Find the number of neurons each layer needs by splitting clusters of features, and keep one of each cluster.

    Parameters
    ----------
    model, evaluator, existed_wrappers, calibration, round_to, seed
        As for :class:`~nni_topo.StructuredPruner`.
    config_list : list of dict
        NNI's config_list, which names the layers; no ratio is needed. ``max_sparse_ratio``, and ``sparse_ratio`` if
        given, are the largest share that may be pruned: clusters are split further until enough neurons are kept.
        ``min_sparse_ratio`` ends the splitting early. ``sparse_threshold`` replaces the HoH threshold, in the
        unit of the features' covariances. The members of a ``dependency_group_id`` are clustered together; the ratio of
        a ``global_group_id`` caps what the group loses.
    energy : float or mapping of str to float, default=0.5
        The thesis's p, in (0, 1): the share of the covariances within a cluster that lies below its threshold. More
        energy, fewer splits, fewer neurons; the bins of ``growth`` change how many. A mapping gives it by
        module name; layers that aren't named have 0.5.
    growth : Growth, mapping or None, default=None
        :class:`~nni_topo.Growth`, or its fields: the initial number of clusters, and when one is split. None:
        ``Growth()``.
    survivor : str or sequence of str, default="auto"
        As for :class:`~nni_topo.ClusterPruner`.

    Notes
    -----
    All neurons that are zero on all samples are pruned, up to the largest share, unless the layer would be empty.

    Every call uses the network with its current masks: neurons that were pruned before are dead, and the threshold
    is computed from the remaining ones. So a second ``compress()``, or a schedule, may prune more than one call does.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 2))
    >>> config, batches = [{"op_names": ["0"]}], [torch.randn(128, 4)]
    >>> pruner = SubclusterPruner(model, config, calibration=batches, energy=0.5, growth={"initial_ratio": 0.2})
    >>> _, masks = pruner.compress()
    >>> tree = pruner.trees["0.weight"]
    >>> len(tree.initial) < len(tree.leaves) == int(masks["0"]["bias"].sum()) < 64
    True
    """

    needs_rule = False
    calculator: SubclusterMetric

    @pruner_arguments(
        energy=ENERGY | all_of(ENERGY, Mapping),
        growth=settings(Growth) | NONE,
        survivor=SURVIVOR,
    )
    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict[str, Any]],
        evaluator: Evaluator | None = None,
        existed_wrappers: dict[str, ModuleWrapper] | None = None,
        *,
        calibration: Iterable[Any] | None = None,
        energy: float | Mapping[str, float] = 0.5,
        growth: Growth | Mapping[str, Any] | None = None,
        survivor: Survivor = "auto",
        round_to: int | None = None,
        seed: int = 0,
    ) -> None:
        self.growth = as_settings(Growth, growth, "growth")
        _check_names(model, energy, "energy")
        _check_names(model, self.growth.initial_ratio, "initial_ratio")
        collector = feature_collector(calibration, evaluator, model)
        self.calibration = collector.calibration
        metric = SubclusterMetric(collector=collector, survivor=survivor, growth=self.growth, energy=energy, seed=seed)
        super().__init__(model, config_list, evaluator, existed_wrappers, collector=collector, calculator=metric)
        self._activate_targets(cap=1.0)

    @property
    def trees(self) -> dict[str, SplitTree]:
        """The split trees of each layer or group for the latest masks; see ``nni_topo.analysis.draw_splits``."""
        return self.calculator.trees


def _check_names(model: nn.Module, knob: Any, name: str) -> None:
    if not isinstance(knob, Mapping):
        return
    modules = dict(model.named_modules())
    unknown = [key for key in knob if key not in modules]
    if unknown:
        raise ConfigError(
            f"{name} must name modules of the model, got {', '.join(map(str, unknown))} (SubclusterPruner)"
        )
