"""Random structured pruning: the baseline every selection has to beat."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from nni.compression.base.wrapper import ModuleWrapper
from nni.compression.utils import Evaluator
from torch import nn

from nni_topo.hooks import WeightCollector
from nni_topo.hooks.metrics import RandomMetric
from nni_topo.pruners.base import StructuredPruner
from nni_topo.recovery.compensation import Method


class RandomPruner(StructuredPruner):
    """Prune filters and neurons at random.

    Parameters
    ----------
    model : torch.nn.Module
        Model to prune.
    config_list : list of dict
        NNI's config_list.
    evaluator : nni.compression.utils.Evaluator or None, default=None
        Needed for scheduled pruning only.
    existed_wrappers : dict or None, default=None
        Used by ``from_compressor``.
    seed : int, default=0
        Same seed, same masks.
    compensate, calibration, round_to
        See :class:`~nni_topo.pruners.base.StructuredPruner`.

    Raises
    ------
    ConfigError, DataError
        If the request is bad, before the model is wrapped.

    Examples
    --------
    >>> from torch import nn
    >>> pruner = RandomPruner(nn.Sequential(nn.Linear(4, 8)), [{"op_types": ["Linear"], "sparse_ratio": 0.5}], seed=1)
    >>> _, masks = pruner.compress()
    >>> int(masks["0"]["bias"].sum())
    4
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict[str, Any]],
        evaluator: Evaluator | None = None,
        existed_wrappers: dict[str, ModuleWrapper] | None = None,
        *,
        seed: int = 0,
        compensate: Method | None = None,
        calibration: Iterable[Any] | None = None,
        round_to: int | None = None,
    ) -> None:
        self.seed = seed
        super().__init__(
            model,
            config_list,
            evaluator,
            existed_wrappers,
            collector=WeightCollector(),
            calculator=RandomMetric(seed),
            compensate=compensate,
            calibration=calibration,
            round_to=round_to,
        )
