"""Keep one neuron of each cluster of features, the clusters being split while they vary too much."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from nni_topo.context import leaving_out
from nni_topo.maths.clustering.partition import IntArray
from nni_topo.maths.clustering.subclustering import Growth, SplitTree, grow, initial_clusters
from nni_topo.pruners.cluster.metric import Clusters, FeatureCloud, SurvivorMetric, merging_losses
from nni_topo.pruners.cluster.survivors import is_convolution
from nni_topo.pruners.hooks import PruningContext
from nni_topo.pruners.units import PruningUnit

_INITIAL = {"Conv": 0.35, "Linear": 0.05}


@dataclass(kw_only=True, eq=False)
class SubclusterMetric(SurvivorMetric):
    """As many clusters as splitting them while they vary too much leaves."""

    growth: Growth
    energy: Callable[[PruningUnit], float]
    # Of the latest call, by unit or, where it has several parts, ``name[part]``.
    trees: dict[str, SplitTree] = field(default_factory=dict, init=False)

    def cluster(self, clouds: dict[str, list[FeatureCloud]], context: PruningContext) -> dict[str, Clusters]:
        """Return the clusters of every unit."""
        context.check_memory(3.0, f"{leaving_out()}, or take ClusterPruner")
        self.trees = {}
        found = {}
        for unit in context.units:
            # At most its own ratio, if it has one, and its maximum ratio; a minimum ratio above its own ratio takes
            # that one's place, as in NNI.
            fewest, cap = unit.removable_rows
            if unit.sparse_ratio is not None and unit.global_group_id is None:
                cap = min(cap, max(fewest, int(unit.rows * unit.sparse_ratio)))
            found[unit.name] = self._clusters(unit, clouds[unit.name], context, cap)
        # The ratio of a global group caps what the group loses.
        grouped = [unit for unit in context.units if unit.global_group_id is not None and unit.sparse_threshold is None]
        bounded = []
        for unit in grouped:
            # Half a row more keeps int(rows * ratio) from falling short by rounding.
            largest = (unit.rows - found[unit.name].rows + 0.5) / unit.rows
            bounded.append(replace(unit, max_sparse_ratio=min(largest, 1.0)))
        # Without `round_to`, which is applied to the number of clusters.
        exact = replace(context.planner, round_to=None)
        shared = exact.rows(bounded, lambda unit: merging_losses(clouds[unit.name]), context.model)
        for unit in grouped:
            rows = shared[unit.name]
            if rows > found[unit.name].rows:
                found[unit.name] = self._clusters(unit, clouds[unit.name], context, unit.rows - rows)
        return found

    def _clusters(self, unit: PruningUnit, parts: list[FeatureCloud], context: PruningContext, cap: int) -> Clusters:
        """Cluster each part, of which at most ``cap`` neurons are pruned; all keep as many as the neediest part."""
        clouds = [cloud.living() for cloud in parts]
        fewest, most = unit.rows - cap, unit.rows - unit.removable_rows[0]
        labels = [self._labels(unit, part, cloud, context, fewest, most) for part, cloud in enumerate(clouds)]
        rows = context.planner.rounded(unit, max(fewest, 1, *(_count(each) for each in labels)))
        for part, cloud in enumerate(clouds):
            if _count(labels[part]) < min(rows, len(cloud.names)):
                labels[part] = self._labels(unit, part, cloud, context, rows, rows)
        shifts = np.cumsum([0, *(each.max(initial=-1) + 1 for each in labels)])
        joined = np.concatenate(
            [np.where(each < 0, -1, each + shift) for each, shift in zip(labels, shifts, strict=False)]
        )
        return Clusters(joined, rows)

    def _labels(
        self, unit: PruningUnit, part: int, cloud: FeatureCloud, context: PruningContext, at_least: int, at_most: int
    ) -> IntArray:
        """Grow the tree of one part, keep it, and return the part's labels."""
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
            energy=self.energy(unit),
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
    return default if knob is None else knob


def _count(labels: IntArray) -> int:
    return len(np.unique(labels[labels >= 0]))
