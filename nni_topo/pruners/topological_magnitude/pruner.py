"""Topological iterative magnitude pruning (T-IMP): keep each layer's spanning tree, fill up by magnitude.

The maximum spanning tree of a layer's graph holds its zeroth homology in the descending filtration of |w|. While a
layer keeps more weights than its tree has, the largest ones are kept too; below the size of the tree it isn't pruned.

Source: Zeroth-Order Topological Insights into Iterative Magnitude Pruning, section 3.4.
"""

from __future__ import annotations

from typing import Any

from nni.compression.base.target_space import PruningTargetSpace
from nni.compression.base.wrapper import ModuleWrapper
from nni.compression.utils import Evaluator
from torch import nn

from nni_topo.errors import ConfigError
from nni_topo.maths.topology.layer_graphs import LayerGraph
from nni_topo.network.layers.derived import graph_of_convolution
from nni_topo.network.layers.kinds import CONVOLUTIONS
from nni_topo.network.runtime.hooks import example_inputs_of
from nni_topo.network.speedup.analysis import Analysis
from nni_topo.pruners.base import StructuredPruner
from nni_topo.pruners.checks import check_single_weights, of_single_weights, pruner_arguments
from nni_topo.pruners.topological_magnitude.trees import MagnitudeCollector, OnSubcritical, TreeGraph, TreeMetric
from nni_topo.pruners.units import in_network_order, is_active


class TopologicalMagnitudePruner(StructuredPruner):
    """Prune single weights by magnitude, with each layer's maximum spanning tree kept.

    Parameters
    ----------
    model : torch.nn.Module
        Model to prune; linear layers and convolutions of one to three dimensions.
    config_list : list of dict
        NNI's config_list, at its default granularity, here single weights. A ``sparse_ratio`` is local, or over all
        layers of one ``global_group_id``. A ``sparse_threshold`` keeps the tree and every |w| at least that large.
    evaluator : nni.compression.utils.Evaluator or None, default=None
        For NNI's scheduled pruners.
    existed_wrappers
        As for :class:`~nni_topo.StructuredPruner`.
    on_subcritical : {"raise", "clip"}, default="raise"
        A ratio that leaves a layer less than its tree is refused, or the layer keeps its tree.
    conv_graph : {"channel", "toeplitz", "toeplitz_full"}, default="channel"
        Graph of a convolution. ``"channel"``: input and output channels, joined by the largest |w| of their kernel; a
        tree is one weight per edge. ``"toeplitz"``: the paper's, every kernel by itself from input plane to output
        plane; its trees take most weights of each kernel. ``"toeplitz_full"``: all channels and positions at once.
    example_inputs : Tensor, tuple, list, mapping of str to Any or None, default=None
        The model's inputs, which the Toeplitz graphs need. None: the evaluator's ``dummy_input``, or the first batch on
        which it evaluates.

    Raises
    ------
    ConfigError, DataError
        If the request is bad, before the model is wrapped: also a layer of another type, a dependency group, a
        granularity, or a ratio beyond the critical one.

    See Also
    --------
    nni_topo.pruners.rounds.prune_in_rounds : the iterations of T-IMP, with rewinding and training in between.

    Notes
    -----
    A weight that was masked once stays so while there are others. Ties: the first in row-major order is kept.

    A bias stays where a weight of its row does, as with NNI's ``LevelPruner``. The tree reaches every row, so that all
    biases stay; by magnitude alone, from ratios of about 0.9 on, some rows of small layers lose all their weights, and
    their biases with them.

    Examples
    --------
    >>> layer = nn.Sequential(nn.Linear(10, 10))
    >>> pruner = TopologicalMagnitudePruner(layer, [{"op_types": ["Linear"], "sparse_ratio": 0.8}])
    >>> _, masks = pruner.compress()
    >>> int(masks["0"]["weight"].sum()), round(pruner.critical_ratios()["0"], 2)
    (20, 5.26)
    """

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
        self._metric = TreeMetric(conv_graph=conv_graph, graphs=graphs, on_subcritical=on_subcritical)
        super().__init__(
            model,
            of_single_weights(config_list),
            evaluator,
            existed_wrappers,
            collector=MagnitudeCollector(),
            calculator=self._metric,
        )

    def critical_ratios(self) -> dict[str, float]:
        """Return how far each layer's weights can be pruned now: all of them over those of its tree, by module name."""
        context = self.context
        trees = self._metric.trees(self.collector.collect(context), context)
        return {unit.members[0][0]: unit.blocks / int(trees[unit.name].sum()) for unit in context.units}

    def wrap_model(self) -> None:
        """Check the targets, then wrap the model."""
        self._target_spaces = in_network_order(self.bound_model, self._target_spaces)
        for name, spaces in self._target_spaces.items():
            for target, space in spaces.items():
                if not is_active(space):
                    continue
                check_single_weights(name, target, space, "a spanning tree needs the weight")
                reached = self.conv_graph == "channel" or name in self._metric.graphs
                if not reached and not isinstance(space._wrapper.module, nn.Linear):
                    raise ConfigError(
                        f"conv_graph {self.conv_graph!r} needs example_inputs that run every layer, got one that isn't "
                        f"run ({name})"
                    )
        context = self.context
        if self._target_spaces and not context.units:
            raise ConfigError(
                "config_list must give the weight of at least one layer a ratio or a threshold, got none "
                f"({', '.join(self._target_spaces)})"
            )
        # A ratio that is too high is refused here, while the model isn't wrapped.
        self._metric.calculate(self.collector.collect(context), context)
        super().wrap_model()

    def _set_default_sparse_granularity(self, target_space: PruningTargetSpace) -> list[int] | str | None:
        return None
