"""Topological iterative magnitude pruning (T-IMP): keep each layer's spanning tree, then the largest weights.

The maximum spanning tree of a layer's graph holds its zeroth homology in the descending filtration of |w|. If a layer
keeps more weights than its tree has, the others are the largest ones; a layer isn't pruned below the size of its tree.

Source: Zeroth-Order Topological Insights into Iterative Magnitude Pruning, section 3.4.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from nni.compression.base.target_space import PruningTargetSpace
from nni.compression.base.wrapper import ModuleWrapper
from nni.compression.utils import Evaluator
from numpy.typing import NDArray
from torch import Tensor, nn

from nni_topo.errors import ConfigError, DataError
from nni_topo.maths.topology.layer_graphs import LayerGraph
from nni_topo.maths.topology.layer_trees import channel_tree, plane_trees
from nni_topo.network.layers.derived import graph_of_convolution
from nni_topo.network.layers.kinds import CONVOLUTIONS
from nni_topo.network.runtime.hooks import example_inputs_of
from nni_topo.network.runtime.memory import check_memory
from nni_topo.network.speedup.analysis import Analysis
from nni_topo.pruners.allocators import keep_highest
from nni_topo.pruners.base import StructuredPruner
from nni_topo.pruners.checks import check_single_weights, of_single_weights, pruner_arguments
from nni_topo.pruners.hooks import Data, DataCollector, KeptSet, MetricCalculator, PruningContext
from nni_topo.pruners.units import PruningUnit, in_network_order, is_active

BoolArray = NDArray[np.bool_]
OnSubcritical = Literal["raise", "clip"]
TreeGraph = Literal["channel", "toeplitz"]
_LEAST = 1e-300
_COPIES = 4  # of the magnitudes of all layers, in float64, while trees are computed


class MagnitudeCollector(DataCollector):
    """Collects |w| of every weight; a masked weight counts as 0, and as less than an unmasked weight of 0."""

    def collect(self, context: PruningContext) -> Data:
        """Return float64 columns ``(weights, 1)`` on the CPU."""
        weights = sum(unit.blocks for unit in context.units)
        check_memory(8 * _COPIES * weights, f"magnitudes of {weights} weights", "name fewer layers", "op_names")

        def points(_: PruningUnit, module: str, target: str) -> Tensor:
            space = context.target_spaces[module][target]
            size: Tensor = space.target.detach().to("cpu", torch.float64).abs().clamp(min=_LEAST)
            if space.mask is not None:
                size = size * space.mask.to("cpu", torch.float64)
            return size.reshape(-1, 1)

        return context.collected(points)


@dataclass(kw_only=True, eq=False)
class TreeMetric(MetricCalculator):
    """Keeps each layer's tree and the largest weights, as many as planned; for fewer than the tree: raises or clips."""

    conv_graph: TreeGraph
    graphs: Mapping[str, LayerGraph]
    on_subcritical: OnSubcritical

    def calculate(self, data: Data, context: PruningContext) -> KeptSet:
        """Keep the trees and the largest of the other weights."""
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
        trees = {}
        for unit in context.units:
            ((module, target),) = unit.members
            space = context.target_spaces[module][target]
            layer, sizes = space._wrapper.module, data[module][target].reshape(space.target.shape).numpy()
            if not np.isfinite(sizes).all():
                raise DataError(f"weights must be finite, got NaN or infinite values ({module})")
            if isinstance(layer, nn.Linear) or self.conv_graph == "channel":
                mask = channel_tree(sizes, groups=getattr(layer, "groups", 1))
            else:
                mask = plane_trees(sizes, self.graphs[module])
            trees[unit.name] = mask.reshape(-1)
        return trees


def _check_critical(units: list[PruningUnit], rows: dict[str, int], sizes: dict[str, int]) -> None:
    """Raise for ratios that leave a layer, or the layers of a global group, fewer weights than their trees."""
    groups: dict[object, list[PruningUnit]] = defaultdict(list)
    for unit in units:
        if unit.sparse_ratio is not None:
            key: object = unit.name if unit.global_group_id is None else (unit.global_group_id,)
            groups[key].append(unit)
    for group in groups.values():
        # Blame the layer whose own minimum ratio cuts into its tree, else all layers that share the ratio.
        alone = [unit for unit in group if unit.kept_rows(0) < sizes[unit.name]]
        if alone or any(rows[unit.name] < sizes[unit.name] for unit in group):
            blamed = alone[:1] or group
            n_kept = sum(rows[unit.name] for unit in blamed)
            total = sum(unit.blocks for unit in blamed)
            tree = sum(max(sizes[unit.name], unit.blocks - unit.removable_rows[1]) for unit in blamed)
            raise ConfigError(
                f"sparse_ratio must leave a layer its spanning tree of {tree} of {total} weights, so be at most "
                f"{1 - tree / total:.6g} (compression {total / tree:.5f}), got {n_kept} left; on_subcritical='clip' "
                f"keeps the tree ({'+'.join(unit.name for unit in blamed)})"
            )


class TopologicalMagnitudePruner(StructuredPruner):
    """Prune single weights by magnitude, with each layer's maximum spanning tree kept.

    Parameters
    ----------
    model, evaluator, existed_wrappers
        As for :class:`~nni_topo.StructuredPruner`; linear layers and convolutions are pruned.
    config_list : list of dict
        NNI's config_list, at its default granularity, here single weights. A ``sparse_ratio`` is local, or over all
        layers of one ``global_group_id``. A ``sparse_threshold`` keeps the tree and every |w| at least that large.
    on_subcritical : {"raise", "clip"}, default="raise"
        If a ratio leaves a layer fewer weights than its tree: raise a ConfigError, or keep the tree.
    conv_graph : {"channel", "toeplitz"}, default="channel"
        Graph of a convolution. ``"channel"``: input and output channels, joined by the largest |w| of their kernel; a
        tree is one weight per edge. ``"toeplitz"``: the paper's, one graph per kernel, from input plane to output
        plane; its trees hold most weights of each kernel.
    example_inputs : Any, default=None
        As for the base class, for the Toeplitz graph.

    See Also
    --------
    nni_topo.pruners.rounds.prune_in_rounds : the iterations of T-IMP, with rewinding and training in between.

    Notes
    -----
    A masked weight stays masked as long as unmasked weights are enough. Ties: the first in row-major order is kept.

    A bias is kept if a weight of its row is, as in NNI's ``LevelPruner``: the tree reaches every row, so all biases are
    kept.

    Examples
    --------
    >>> layer = nn.Sequential(nn.Linear(10, 10))
    >>> pruner = TopologicalMagnitudePruner(layer, [{"op_types": ["Linear"], "sparse_ratio": 0.8}])
    >>> _, masks = pruner.compress()
    >>> int(masks["0"]["weight"].sum()), round(pruner.critical_ratios()["0"], 2)
    (20, 5.26)
    """

    calculator: TreeMetric

    @pruner_arguments()
    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict[str, Any]],
        evaluator: Evaluator | None = None,
        existed_wrappers: dict[str, ModuleWrapper] | None = None,
        *,
        on_subcritical: OnSubcritical = "raise",
        conv_graph: TreeGraph = "channel",
        example_inputs: Any = None,
    ) -> None:
        graphs = dict[str, LayerGraph]()
        if conv_graph != "channel":
            inputs = example_inputs_of(example_inputs, model, evaluator=evaluator)
            if inputs is None:
                raise ConfigError(
                    f"conv_graph {conv_graph!r} needs example_inputs, or an evaluator that evaluates, got neither "
                    "(TopologicalMagnitudePruner)"
                )
            planes = Analysis.on(model, inputs).planes
            for name, module in model.named_modules():
                if isinstance(module, CONVOLUTIONS) and name in planes:
                    graphs[name] = graph_of_convolution(module, planes[name][0])
        metric = TreeMetric(conv_graph=conv_graph, graphs=graphs, on_subcritical=on_subcritical)
        entries = of_single_weights(config_list)
        super().__init__(model, entries, evaluator, existed_wrappers, collector=MagnitudeCollector(), calculator=metric)

    def critical_ratios(self) -> dict[str, float]:
        """Return each layer's largest compression now, by module name: its number of weights over its tree's."""
        context = self.context
        trees = self.calculator.trees(self.collector.collect(context), context)
        return {unit.members[0][0]: unit.blocks / int(trees[unit.name].sum()) for unit in context.units}

    def wrap_model(self) -> None:
        """Check the targets, then wrap the model."""
        self._target_spaces = in_network_order(self.bound_model, self._target_spaces)
        for name, spaces in self._target_spaces.items():
            for target, space in spaces.items():
                if not is_active(space):
                    continue
                check_single_weights(name, target, space, "a spanning tree needs the weight")
                reached = self.conv_graph == "channel" or name in self.calculator.graphs
                if not reached and not isinstance(space._wrapper.module, nn.Linear):
                    raise ConfigError(
                        f"conv_graph {self.conv_graph!r} needs example_inputs that run every layer, got one that isn't "
                        f"run ({name})"
                    )
        # Raises for a ratio that is too high, before the model is wrapped.
        context = self.context
        self.calculator.calculate(self.collector.collect(context), context)
        super().wrap_model()

    def _set_default_sparse_granularity(self, target_space: PruningTargetSpace) -> list[int] | str | None:
        return None
