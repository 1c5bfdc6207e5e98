"""Cumulative energy: how much of a layer's energy goes when a filter and all weaker ones go."""

from __future__ import annotations

import torch
from torch import Tensor

from nni_topo.hooks.base import Data, MetricCalculator, Metrics, PruningContext
from nni_topo.ties import descending


class CumulativeEnergyMetric(MetricCalculator):
    """A filter's score is its cumulative share of the energy: its own and that of all weaker filters."""

    def calculate(self, data: Data, context: PruningContext) -> Metrics:
        """Return shares in (0, 1], equal for all members of a dependency group, whose energies add up."""
        metrics: Metrics = {}
        for unit in context.units:
            shares = cumulative_shares(torch.stack([data[m][t][:, 0] for m, t in unit.members]).sum(0))
            for module_name, target_name in unit.members:
                shape = context.metric_shape(module_name, target_name)
                metrics.setdefault(module_name, {})[target_name] = shares.reshape(shape)
        return metrics


def cumulative_shares(energies: Tensor) -> Tensor:
    """Return each filter's cumulative share of a layer's energy.

    Parameters
    ----------
    energies : torch.Tensor
        Shape ``(n,)``, at least 0. All zero counts as all equal.

    Returns
    -------
    torch.Tensor
        Shape ``(n,)``, float64: the sum of the energies from the weakest filter up to each, divided by the whole. The
        strongest has exactly 1. Of energies that are equal to 1e-6 of them the higher index counts as the weaker.

    References
    ----------
    .. [1] Janjic, MSc thesis, University of Manitoba, 2018, Algorithm 3, lines 7 to 9.

    Examples
    --------
    >>> cumulative_shares(torch.tensor([3.0, 1.0, 4.0])).tolist()
    [0.5, 0.125, 1.0]
    """
    energies = energies.to(torch.float64)
    if not bool(energies.any()):
        energies = torch.ones_like(energies)
    ascending = torch.from_numpy(descending(energies.cpu().numpy())).to(energies.device).flip(0)
    sums = energies[ascending].cumsum(0)
    shares = torch.empty_like(energies)
    shares[ascending] = sums / sums[-1]
    return shares
