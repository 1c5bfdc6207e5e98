"""Metric calculators that need nothing but a seed."""

from __future__ import annotations

import torch

from nni_topo.hooks.base import Data, MetricCalculator, Metrics, PruningContext


class RandomMetric(MetricCalculator):
    """Uniform random scores: the baseline that a selection has to beat.

    Parameters
    ----------
    seed : int
        Seed; one draw per unit in the order of the network's modules.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def calculate(self, data: Data, context: PruningContext) -> Metrics:
        """Return scores in [0, 1), equal for all members of a dependency group."""
        generator = torch.Generator().manual_seed(self.seed)
        metrics: Metrics = {}
        for unit in context.units:
            scores = torch.rand(unit.blocks, generator=generator, dtype=torch.float64)
            for module_name, target_name in unit.members:
                shape = context.metric_shape(module_name, target_name)
                metrics.setdefault(module_name, {})[target_name] = scores.reshape(shape)
        return metrics
