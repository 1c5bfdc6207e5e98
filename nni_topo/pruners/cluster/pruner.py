"""Clustered pruning: one neuron or filter of each cluster of features is kept.

Source: S. S. John, "Sub-clustering based neurogenetic pruning", MTech thesis, Indian Institute of Space Science and
Technology, 2019, chapter 4, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from nni.compression.base.wrapper import ModuleWrapper
from nni.compression.utils import Evaluator
from torch import nn

from nni_topo.errors import ConfigError
from nni_topo.maths.clustering.partition import Algorithm, NeighbourGraph, check_used
from nni_topo.network.runtime.hooks import pruner_batches
from nni_topo.pruners.base import StructuredPruner
from nni_topo.pruners.budget import Budget
from nni_topo.pruners.checks import pruner_arguments
from nni_topo.pruners.clouds.features import POOL, FeatureCollector, Pool
from nni_topo.pruners.cluster.metric import ClusterMetric
from nni_topo.pruners.cluster.survivors import SURVIVOR, Survivor, rules_of
from nni_topo.rules import whole


class ClusterPruner(StructuredPruner):
    """Cluster the neurons of each layer by what they put out, and keep one of each cluster.

    Parameters
    ----------
    model, evaluator, existed_wrappers, calibration, budget, example_inputs, round_to, seed
        As for :class:`~nni_topo.StructuredPruner`.
    config_list : list of dict
        NNI's config_list. The ratio says how many clusters there are; the members of a ``dependency_group_id`` are
        clustered together, features side by side. ``sparse_threshold`` and ``global_group_id`` compare layers by the
        distances at which Ward's agglomeration merges clusters, in units of the layer's mean.
    algorithm : {"kmeans", "spectral", "ward", "dbscan", "gmm", "gmm_full"}, default="kmeans"
        See :func:`nni_topo.maths.clustering.partition`. Points of noise of DBSCAN are kept.
    survivor : str or sequence of str, default="auto"
        Which neuron of a cluster is kept: ``"random"``; ``"center"``, the nearest to its mean; ``"weight"``, the
        largest sum of absolute weights on both sides (4.12); ``"bias"``, the largest bias (4.13); ``"bias_norm"``, the
        largest absolute bias. Of several the ranks are averaged. A batch norm after the layer is part of the bias.
        ``"auto"``: ``"bias_norm"`` for convolutions with a bias or a batch norm, else ``"weight"``.
    pool : {"none", "mean"} or int, default="none"
        Feature maps as they are, averaged to one value, or to so many in each direction.
    n_init : int, default=3
        Starts of k-means and mixtures, at least 1.
    min_samples : int, default=3
        DBSCAN's number of points that make a core, at least 1.
    graph : {"epsilon", "knn", "gaussian"}, default="epsilon"
        The graph of spectral clustering, see :func:`nni_topo.maths.clustering.partition`.

    Raises
    ------
    ConfigError, DataError
        If a knob or the request is bad, before the model is wrapped. If there are fewer than two samples, or all
        features of a layer are constant, when masks are made.

    See Also
    --------
    SubclusterPruner : Finds the number of clusters itself.

    Notes
    -----
    Neurons that are zero on all samples are all pruned, if anything is pruned, unless the layer would be empty.

    References
    ----------
    .. [1] S. S. John, "Sub-clustering based neurogenetic pruning", MTech thesis, Indian Institute of Space Science and
       Technology, 2019, chapter 4.

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

    calculator: ClusterMetric

    @pruner_arguments(
        survivor=SURVIVOR,
        pool=POOL,
        n_init=whole(1),
        min_samples=whole(1),
    )
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
        pool: Pool = "none",
        n_init: int = 3,
        min_samples: int = 3,
        graph: NeighbourGraph = "epsilon",
        budget: Budget | Mapping[str, Any] | None = None,
        example_inputs: Any = None,
        round_to: int | None = None,
        seed: int = 0,
    ) -> None:
        check_used(algorithm, type(self).__name__, n_init=n_init, min_samples=min_samples, graph=graph)
        collector = feature_collector(calibration, evaluator, model, pool)
        self.calibration = collector.calibration
        super().__init__(
            model,
            config_list,
            evaluator,
            existed_wrappers,
            collector=collector,
            calculator=ClusterMetric(
                collector=collector,
                survivor=rules_of(survivor),
                algorithm=algorithm,
                n_init=n_init,
                min_samples=min_samples,
                graph=graph,
                seed=seed,
            ),
        )

    @property
    def pairs(self) -> dict[str, dict[int, int]]:
        """By layer, for each pruned neuron, the kept one that stands in for it in the latest masks.

        For ``nni_topo.compensate(model, masks, calibration, method=nni_topo.recovery.Pair(pruner.pairs))``, the
        correlation-based update.
        """
        return self.calculator.pairs


def feature_collector(
    calibration: Iterable[Any] | None, evaluator: Evaluator | None, model: nn.Module, pool: Pool
) -> FeatureCollector:
    """Return the collector of a pruner that clusters features."""
    batches = pruner_batches(evaluator if calibration is None else calibration, model)
    if batches is None:
        raise ConfigError(
            "a pruner that clusters features needs calibration data or an evaluator, got neither (calibration)"
        )
    return FeatureCollector(batches, pool=pool)
