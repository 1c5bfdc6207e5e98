"""Hooks that prune single weights and leave each layer's maximum spanning tree whole."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nni_topo.errors import ConfigError, DataError
from nni_topo.maths.topology.layer_graphs import LayerGraph
from nni_topo.maths.topology.layer_trees import channel_tree, plane_trees, spanning_forest
from nni_topo.network.runtime.memory import check_memory
from nni_topo.pruners.allocators import keep_highest
from nni_topo.pruners.hooks import Data, DataCollector, KeptSet, MetricCalculator, PruningContext
from nni_topo.pruners.units import PruningUnit

BoolArray = NDArray[np.bool_]
OnSubcritical = Literal["raise", "clip"]
TreeGraph = Literal["channel", "toeplitz", "toeplitz_full"]
_LEAST = 1e-300
_COPIES = 4  # of the magnitudes of all layers, in float64, while trees are computed


class MagnitudeCollector(DataCollector):
    """|w| of every weight; what a former mask took counts as 0, and as less than a 0 that was kept."""

    def collect(self, context: PruningContext) -> Data:
        """Return float64 columns ``(weights, 1)`` on the CPU."""
        weights = sum(unit.blocks for unit in context.units)
        check_memory(8 * _COPIES * weights, f"magnitudes of {weights} weights", "name fewer layers", "op_names")

        def points(_: PruningUnit, module: str, target: str) -> Tensor:
            space = context.target_spaces[module][target]
            size: Tensor = space.target.detach().to("cpu", torch.float64).abs().clamp(min=_LEAST)
            return (size if space.mask is None else size * space.mask.to("cpu", torch.float64)).reshape(-1, 1)

        return context.collected(points)


@dataclass(kw_only=True, eq=False)
class TreeMetric(MetricCalculator):
    """Keeps the largest weights, as many as planned, but never less than a layer's tree: else raises, or clips."""

    conv_graph: TreeGraph
    graphs: Mapping[str, LayerGraph]
    on_subcritical: OnSubcritical

    def calculate(self, data: Data, context: PruningContext) -> KeptSet:
        """Keep trees, and of the other weights the largest."""
        trees = self.trees(data, context)
        # Weights that must be kept get the highest score.
        worth = {
            unit.name: np.where(trees[unit.name], np.inf, data[module][target].numpy().reshape(-1))
            for unit in context.units
            for module, target in unit.members
        }
        rows = context.rows(lambda unit: worth[unit.name])
        sizes = {name: int(tree.sum()) for name, tree in trees.items()}
        if self.on_subcritical == "raise":
            _check_critical(context.units, rows, sizes)
        return context.keep(
            {u.name: keep_highest(u, worth[u.name], max(rows[u.name], sizes[u.name])) for u in context.units}
        )

    def trees(self, data: Data, context: PruningContext) -> dict[str, BoolArray]:
        """Return the weights of each unit's tree, ``(weights,)``."""
        found = {}
        for unit in context.units:
            ((module, target),) = unit.members
            space = context.target_spaces[module][target]
            size = data[module][target].reshape(space.target.shape)
            found[unit.name] = self.tree(module, space._wrapper.module, size).numpy().reshape(-1)
        return found

    def tree(self, name: str, module: Any, weight: Tensor) -> Tensor:
        """Mark the weights of a layer's tree: bool, the weight's shape."""
        if not bool(torch.isfinite(weight).all()):
            raise DataError(f"weights must be finite, got NaN or infinite values ({name})")
        values = weight.detach().to("cpu", torch.float64).numpy()
        if isinstance(module, nn.Linear) or self.conv_graph == "channel":
            return torch.from_numpy(channel_tree(values, groups=getattr(module, "groups", 1)))
        if self.conv_graph == "toeplitz":
            return torch.from_numpy(plane_trees(values, self.graphs[name]))
        mask = np.zeros(values.size, dtype=np.bool_)
        mask[spanning_forest(values, self.graphs[name]).elements] = True
        return torch.from_numpy(mask.reshape(values.shape))


def _check_critical(units: list[PruningUnit], rows: dict[str, int], sizes: dict[str, int]) -> None:
    """Refuse ratios that leave a layer, or the layers of a global group, less than the spanning trees' sizes."""
    groups: dict[object, list[PruningUnit]] = defaultdict(list)
    for unit in units:
        if unit.sparse_ratio is not None:
            groups[unit.name if unit.global_group_id is None else (unit.global_group_id,)].append(unit)
    for group in groups.values():
        # A layer whose own minimum takes of its tree is to blame alone, else all that share a ratio are.
        alone = [unit for unit in group if unit.kept_rows(0) < sizes[unit.name]]
        if alone or any(rows[unit.name] < sizes[unit.name] for unit in group):
            blamed = alone[:1] or group
            kept, total = sum(rows[unit.name] for unit in blamed), sum(unit.blocks for unit in blamed)
            tree = sum(max(sizes[unit.name], unit.blocks - unit.removable_rows[1]) for unit in blamed)
            raise ConfigError(
                f"sparse_ratio must leave a layer its spanning tree of {tree} of {total} weights, so be at most "
                f"{1 - tree / total:.6g} (compression {total / tree:.5f}), got {kept} left; on_subcritical='clip' "
                f"keeps the tree ({'+'.join(unit.name for unit in blamed)})"
            )
