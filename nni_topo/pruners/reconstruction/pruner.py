"""Reconstruction pruning: keep the channels from which the next layers' outputs can best be reconstructed.

References
----------
.. [1] Y. He, X. Zhang and J. Sun, "Channel pruning for accelerating very deep neural networks",
   https://arxiv.org/abs/1707.06168
.. [2] J.-H. Luo, J. Wu and W. Lin, "ThiNet: a filter level pruning method for deep neural network compression",
   https://arxiv.org/abs/1707.06342
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from nni.compression.base.wrapper import ModuleWrapper
from nni.compression.utils import Evaluator
from torch import nn

from nni_topo.errors import ConfigError
from nni_topo.network.layers.kinds import WEIGHTED
from nni_topo.network.runtime.fits import structure_call
from nni_topo.network.runtime.hooks import pruner_batches
from nni_topo.network.runtime.progress import bar
from nni_topo.pruners.base import StructuredPruner
from nni_topo.pruners.budget import ALLOCATIONS, Budget, as_budget
from nni_topo.pruners.checks import pruner_arguments
from nni_topo.pruners.clouds.functional import FunctionalCollector, check_read
from nni_topo.pruners.hooks import Data, PruningContext
from nni_topo.pruners.planner import Losses
from nni_topo.pruners.reconstruction.problems import (
    IntArray,
    ReconstructionProblem,
    ReconstructionProblems,
)
from nni_topo.pruners.selection import Clouds, SelectionMetric
from nni_topo.pruners.units import KeptBlocks


@dataclass(kw_only=True, eq=False)
class ReconstructionMetric(SelectionMetric):
    """Keeps in every unit the channels from which the next layers' outputs can best be reconstructed."""

    problems: ReconstructionProblems
    by_error: ReconstructionProblems | None = None
    """Compares blocks of all units by how much they reduce the readers' errors; None: by death times."""

    def losses(self, context: PruningContext, clouds: Clouds) -> Losses:
        """Return the function that says how much each block of a unit reduces its readers' errors."""
        if self.by_error is None:
            return super().losses(context, clouds)
        # A row has one block of every part.
        worth = {u.name: u.parts * problem.worth(u.parts) for u, problem in self.by_error.unit_problems(context, {})}
        return lambda unit: worth[unit.name]

    def chosen(self, problem: ReconstructionProblem, keep: int, parts: int) -> IntArray:
        """Return the kept channels of one unit, ``(keep,)``."""
        return problem.choose(keep, parts)

    def choose(self, context: PruningContext, clouds: Clouds, rows: dict[str, int]) -> KeptBlocks:
        """Return the kept blocks, chosen unit by unit in the order of the problems."""
        kept_blocks: KeptBlocks = {}
        with bar("choosing filters", self.progress, total=len(context.units)) as shown:
            for unit, problem in self.problems.unit_problems(context, kept_blocks):
                chosen = self.chosen(problem, rows[unit.name] * unit.parts, unit.parts)
                kept_blocks[unit.name] = np.isin(np.arange(unit.blocks), chosen)
                shown.update()
        return kept_blocks


class ReadCollector(FunctionalCollector):
    """The functional cloud of layers that a convolution or a linear layer reads."""

    def check(self, model: nn.Module, modules: dict[str, nn.Module]) -> None:
        """Check that a convolution or linear layer reads each layer to prune."""
        check_read(model, modules, structure_call(model, self.calibration), WEIGHTED)

    def collect(self, context: PruningContext) -> Data:
        """Return the clouds; they are computed only if thresholds, global groups or budgets compare layers."""
        return _WhenAsked(partial(super().collect, context))


class _WhenAsked(Data):
    """The clouds of all layers, computed when one of them is first asked for."""

    def __init__(self, collect: Callable[[], Data]) -> None:
        super().__init__()
        self._collect = collect

    def __missing__(self, name: str) -> dict[str, torch.Tensor]:
        self.update(self._collect())
        return self[name]


class ReconstructionPruner(StructuredPruner):
    """Prune the filters and neurons that are least needed to reconstruct the outputs of the layers that read them.

    Kept channels are chosen one by one: each time the channel that most reduces the squared error of the next layers'
    outputs on the calibration data, with their weights solved anew. All layers that read a channel count equally.

    Parameters
    ----------
    model, evaluator, existed_wrappers, example_inputs, round_to, progress
        As for :class:`~nni_topo.StructuredPruner`.
    config_list : list of dict
        NNI's config_list; all its keys keep their meaning. A ``dependency_group_id``'s members are chosen together.
        ``sparse_threshold`` and ``global_group_id`` compare half the H0 death times of the layers' functional clouds,
        in units of the layer's mean, as in :class:`~nni_topo.TopologicalPruner`.
    calibration : iterable or None, default=None
        As for the base class.
    sequential : bool, default=False
        Choose the channels of each layer in the network as pruned and reconstructed so far, instead of choosing all
        in the network as it is.
    budget : Budget, mapping or None, default=None
        As for the base class; ``{"flops": 0.25, "allocation": "error"}`` finds widths by reconstruction error.
    seed : int, default=0
        Draws the positions at which large feature maps are sampled. Same seed, same masks.

    See Also
    --------
    nni_topo.compensate : reconstructs the weights of the next layers, for which these channels are chosen.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    >>> config_list = [{"op_names": ["0"], "sparse_ratio": 0.75}]
    >>> pruner = ReconstructionPruner(model, config_list, calibration=[torch.randn(64, 16)])
    >>> _, masks = pruner.compress()
    >>> int(masks["0"]["bias"].sum())
    8
    """

    allocations = ALLOCATIONS

    @pruner_arguments()
    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict[str, Any]],
        evaluator: Evaluator | None = None,
        existed_wrappers: dict[str, ModuleWrapper] | None = None,
        *,
        calibration: Iterable[Any] | None = None,
        sequential: bool = False,
        budget: Budget | Mapping[str, Any] | None = None,
        example_inputs: Any = None,
        round_to: int | None = None,
        seed: int = 0,
        progress: bool | None = None,
    ) -> None:
        batches = pruner_batches(evaluator if calibration is None else calibration, model)
        if batches is None:
            raise ConfigError("ReconstructionPruner needs calibration data or an evaluator, got neither (calibration)")
        self.calibration = calibration = batches
        self._problems = ReconstructionProblems(calibration, seed=seed, sequential=sequential)
        is_by_error = budget is not None and as_budget(budget).allocation == "error"
        by_error = ReconstructionProblems(calibration, seed=seed) if is_by_error else None
        self._all_problems = [self._problems] if by_error is None else [self._problems, by_error]
        metric = ReconstructionMetric(problems=self._problems, by_error=by_error, progress=progress)
        super().__init__(
            model, config_list, evaluator, existed_wrappers, collector=ReadCollector(calibration), calculator=metric
        )

    def _keep_measurements(self) -> None:
        for problems in self._all_problems:
            problems.keeps = True
