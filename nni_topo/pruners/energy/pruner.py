"""Energy-based pruning: filters with the least response to a chirp are pruned, up to a share of the energy.

Every layer gets a linear chirp of its own input size; the energies of its filters' responses, in ascending order, are
summed up, and the filters within the threshold are pruned. Neither data nor gradients are needed.

References
----------
.. [1] Janjic, "Exploring Redundancy in Neural Networks: Pruning by Genetic Algorithm & Filter Energy", MSc thesis,
   University of Manitoba, 2018, section 4.2, Algorithm 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

import torch
from nni.compression.base.wrapper import ModuleWrapper
from nni.compression.utils import Evaluator
from torch import Tensor, nn

from nni_topo.errors import ConfigError
from nni_topo.maths import signals
from nni_topo.maths.ties import descending
from nni_topo.network.runtime.hooks import example_inputs_of, pruner_batches
from nni_topo.pruners.base import StructuredPruner
from nni_topo.pruners.budget import Budget
from nni_topo.pruners.checks import pruner_arguments
from nni_topo.pruners.energy.collectors import (
    ChirpEnergyCollector,
    DataEnergyCollector,
    EnergyCollector,
    Normalization,
)
from nni_topo.pruners.hooks import Data, MetricCalculator, Metrics, PruningContext
from nni_topo.pruners.planner import Planner
from nni_topo.rules import Rule, number, one_of, settings


class CumulativeEnergyMetric(MetricCalculator):
    """A filter's score is its cumulative share of the energy: its own energy and the energy of all weaker filters."""

    def calculate(self, data: Data, context: PruningContext) -> Metrics:
        """Return shares in (0, 1], equal for all members of a dependency group, whose energies add up."""
        energies = {u.name: torch.stack([data[m][t][:, 0] for m, t in u.members]).sum(0) for u in context.units}
        return context.spread({name: cumulative_shares(each) for name, each in energies.items()})


def cumulative_shares(energies: Tensor) -> Tensor:
    """Return, float64 ``(n,)`` in (0, 1], each filter's energy with that of all weaker ones over the layer's."""
    energies = energies.to(torch.float64)
    if not bool(energies.any()):
        # A layer that lets nothing through has no shares: all of its filters count the same.
        energies = torch.ones_like(energies)
    # [1], Algorithm 3, lines 7 to 9. Of energies equal to 1e-6 of them the higher index counts as the weaker.
    ascending = torch.from_numpy(descending(energies.cpu().numpy())).to(energies.device).flip(0)
    sums = energies[ascending].cumsum(0)
    shares = torch.empty_like(energies)
    shares[ascending] = sums / sums[-1]
    return shares


TOLERANCE = 1e-9
"""Cumulative shares within this of the threshold count as equal to it; their filters are pruned."""


class EnergyFilterPruner(StructuredPruner):
    """Prune the filters whose responses to a chirp hold the least energy.

    Parameters
    ----------
    model, evaluator, existed_wrappers, budget, round_to
        As for :class:`~nni_topo.StructuredPruner`.
    config_list : list of dict
        NNI's config_list. ``sparse_threshold``, in (0, 1), is the share of the layer's energy that may be
        pruned: a filter is kept if its own energy and that of all weaker ones is *more* than this share (a tie, within
        1e-9, is pruned).
        ``sparse_ratio`` takes the weakest filters. In a dependency group the energies add up before they are sorted;
        under a ``global_group_id`` all layers get one threshold, the one that meets the ratio.
    example_inputs : Any, default=None
        As for the base class; they also tell every layer's input size, which the chirp needs.
    signal : {"chirp", "data"}, Chirp or mapping, default="chirp"
        Whose responses are measured: those to a :class:`~nni_topo.Chirp`, given or by its fields: direction and sweep,
        and whether it enters all input channels at once; or ``"data"``, the calibration images.
    calibration : iterable or None, default=None
        As for the base class, for ``signal="data"``.
    normalization : {"none", "area", "layer"}, default="area"
        How the members of a dependency group weigh: by the sum of their energies, per position, or the same each.
    batch_norm : bool, default=False
        Whether responses are scaled as the batch norm after the layer does; needs ``example_inputs``.
    bias : bool, default=True
        Whether the layer's bias is part of the response.

    Raises
    ------
    ConfigError, DataError
        If a knob or the request is bad, before the model is wrapped: a threshold outside (0, 1), an input size
        that is unknown or smaller than the kernel, weights that aren't real floating-point numbers.

    See Also
    --------
    nni_topo.signals.chirp_2d : the chirp.
    nni_topo.analysis.study_energy : filters, loss and accuracy per layer and threshold.

    Notes
    -----
    A chirp can't enter a linear layer: its neurons have the expected energy of their outputs for uncorrelated inputs of
    energy 1 each. ``signal="data"`` measures them like convolutions.

    A layer is never emptied. In scheduled pruning energies are measured again each time, on the weights as they are
    then; filters that are masked already have none and stay masked.

    Cost: one forward pass of the example inputs, then one convolved plane per filter.

    References
    ----------
    .. [1] Janjic, MSc thesis, University of Manitoba, 2018, section 4.2.

    Examples
    --------
    >>> import torch
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> config_list = [{"op_names": ["0"], "sparse_ratio": 0.5}]
    >>> pruner = EnergyFilterPruner(model, config_list, example_inputs=torch.ones(1, 3, 16, 16))
    >>> _, masks = pruner.compress()
    >>> int(masks["0"]["bias"].sum())
    4
    """

    setting_rules: ClassVar[Mapping[str, Rule]] = {"sparse_threshold": number(0, 1, "neither")}

    @pruner_arguments(signal=one_of(("chirp", "data")) | settings(signals.Chirp))
    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict[str, Any]],
        evaluator: Evaluator | None = None,
        existed_wrappers: dict[str, ModuleWrapper] | None = None,
        *,
        example_inputs: Any = None,
        signal: signals.Chirp | Mapping[str, Any] | Literal["chirp", "data"] = "chirp",
        calibration: Iterable[Any] | None = None,
        budget: Budget | Mapping[str, Any] | None = None,
        normalization: Normalization = "area",
        batch_norm: bool = False,
        bias: bool = True,
        round_to: int | None = None,
    ) -> None:
        self.calibration = pruner_batches(evaluator if calibration is None and signal == "data" else calibration, model)
        inputs = example_inputs
        if batch_norm or signal != "data":
            inputs = example_inputs_of(inputs, model, calibration=self.calibration, evaluator=evaluator)
        shared: dict[str, Any] = {"normalization": normalization, "batch_norm": batch_norm, "bias": bias}
        collector: EnergyCollector
        if signal == "data":
            if self.calibration is None:
                raise ConfigError("signal 'data' needs calibration data or an evaluator, got neither (calibration)")
            collector = DataEnergyCollector(inputs, calibration=self.calibration, **shared)
        else:
            chirp = None if isinstance(signal, str) else signal
            collector = ChirpEnergyCollector(inputs, signal=chirp, **shared)
        super().__init__(
            model,
            config_list,
            evaluator,
            existed_wrappers,
            collector=collector,
            calculator=CumulativeEnergyMetric(),
            planner=Planner(strict=True, tolerance=TOLERANCE, round_to=round_to),
        )
