"""Matrix pruning: whole rows and columns of the weight matrices, by their norm.

A channel is a row of its own layer's matrix and a column (in a convolution, a block of columns) of each matrix that
reads it. Both are pruned together, so the matrices stay dense and get smaller.

Source: "Network Structure Pruning", AVLSI final project report, section VI (matrix-based pruning).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from nni.compression.base.wrapper import ModuleWrapper
from nni.compression.utils import Evaluator
from torch import nn

from nni_topo.errors import ConfigError
from nni_topo.network.runtime.hooks import example_inputs_of
from nni_topo.network.speedup.analysis import Analysis
from nni_topo.pruners.base import StructuredPruner
from nni_topo.pruners.budget import Budget
from nni_topo.pruners.checks import pruner_arguments
from nni_topo.pruners.clouds.functional import readers_of
from nni_topo.pruners.clouds.weight import WeightCollector
from nni_topo.pruners.hooks import Data, DataCollector, MetricCalculator, Metrics, PruningContext
from nni_topo.rules import Rule, whole


@dataclass
class RowColumnCollector(DataCollector):
    """Collects each channel's row, and the norms of the columns with which the next layers read it."""

    norm: int
    example_inputs: Any

    def collect(self, context: PruningContext) -> Data:
        """Return float64 ``(blocks, features)``; a unit's first member has the norms of the columns after its rows."""
        data = WeightCollector().collect(context)
        # Without example inputs it is unknown which layers read a channel: only rows count, as in NNI's norm pruners.
        if self.example_inputs is None:
            return data
        flow = Analysis.on(context.model, self.example_inputs, context.facts).flow
        for unit in context.units:
            with suppress(ConfigError):  # no layer reads the channels
                readers = readers_of(unit, flow, context, order=float(self.norm))
                module, target = unit.members[0]
                strengths = [reader.strength for reader in readers]
                data[module][target] = torch.cat([data[module][target], *strengths], dim=1)
        return data


@dataclass
class JointNorm(MetricCalculator):
    """The norm of all weights that are pruned with a channel, in all members of a dependency group."""

    norm: int

    def calculate(self, data: Data, context: PruningContext) -> Metrics:
        """Return a norm per channel, the same for all members of a group."""
        joint = {unit.name: torch.cat([data[m][t] for m, t in unit.members], dim=1) for unit in context.units}
        return context.spread({name: values.norm(p=self.norm, dim=1) for name, values in joint.items()})


class MatrixPruner(StructuredPruner):
    """Prune the neurons and filters whose rows and columns have the smallest norm.

    Parameters
    ----------
    model, evaluator, existed_wrappers, budget, round_to
        As for :class:`~nni_topo.StructuredPruner`.
    config_list : list of dict
        NNI's config_list. A ratio of 0.8 in every layer leaves a fifth of the rows *and* of the columns of an inner
        matrix, so about a twenty-fifth of its weights.
    norm : {1, 2}, default=2
        Order of the norm.
    example_inputs : Any, default=None
        Inputs of the model, to find which layers read a channel, and for a ``budget``. None: the evaluator's
        ``dummy_input`` or the first batch on which it evaluates; without an evaluator only rows count, as in NNI's
        norm pruners.

    Notes
    -----
    To prune at once, call ``compress()``. To prune in steps with training in between, use it inside NNI's
    ``LinearPruner`` or ``AGPPruner``, or :func:`nni_topo.pruners.rounds.prune_in_rounds`; each step measures new norms.

    The norm is over all weights that are pruned with a channel: its rows in all members of its dependency group, and
    the columns in all layers that read it. Batch norms don't count.

    Examples
    --------
    >>> import torch
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> model[0].weight.data = torch.tensor([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0]])
    >>> model[2].weight.data = torch.tensor([[0.0, 0.0, 4.0]])
    >>> config_list = [{"op_names": ["0"], "sparse_ratio": 0.4}]
    >>> pruner = MatrixPruner(model, config_list, example_inputs=torch.zeros(1, 2))
    >>> _, masks = pruner.compress()
    >>> masks["0"]["bias"].tolist()
    [1.0, 0.0, 1.0]
    """

    @pruner_arguments(norm=Rule("1 or 2", whole(1, 2).holds))
    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict[str, Any]],
        evaluator: Evaluator | None = None,
        existed_wrappers: dict[str, ModuleWrapper] | None = None,
        *,
        norm: Literal[1, 2] = 2,
        example_inputs: Any = None,
        budget: Budget | Mapping[str, Any] | None = None,
        round_to: int | None = None,
    ) -> None:
        inputs = example_inputs_of(example_inputs, model, evaluator=evaluator)
        collector, metric = RowColumnCollector(norm, inputs), JointNorm(norm)
        super().__init__(model, config_list, evaluator, existed_wrappers, collector=collector, calculator=metric)
