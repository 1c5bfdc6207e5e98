"""Layer-wise reconstruction: a layer after pruned channels is solved again to reproduce its unpruned output.

The new weights predict the unpruned network's values at the layer's output from the activations of the pruned network
as compensated so far. If the output is added to others, they predict the sum: there the layer also makes up for what
the other summands lost. The weights are found by ridge least squares around the old weights, so weights that the
samples don't determine stay as they were.

Where a ReLU follows, the solution may be refined: values below zero in both networks count as equal, and where only the
pruned network is above zero, the target is zero. Each such step can only lower the error after the ReLU [3]_.

References
----------
.. [1] Y. He, X. Zhang and J. Sun, "Channel pruning for accelerating very deep neural networks",
   https://arxiv.org/abs/1707.06168
.. [2] J.-H. Luo, J. Wu and W. Lin, "ThiNet: a filter level pruning method for deep neural network compression",
   https://arxiv.org/abs/1707.06342
.. [3] X. Zhang, J. Zou, K. He and J. Sun, "Accelerating very deep convolutional networks for classification and
   detection" (which also takes the nonlinearity into account), https://arxiv.org/abs/1505.06798
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nni_topo.maths.least_squares.normal import Fit, NormalEquations, fit
from nni_topo.maths.least_squares.windows import Windows
from nni_topo.network.graph.nodes import tensor_shape
from nni_topo.network.layers.kinds import by_output, through_norms
from nni_topo.recovery.networks import Networks
from nni_topo.recovery.plan import Equation, Plan
from nni_topo.recovery.registry import RecoveryMethod
from nni_topo.recovery.replay import Values
from nni_topo.recovery.samples import (
    Samples,
    Task,
    are_windows_summed,
    input_rows,
    input_windows,
    output_rows,
    position_count,
)
from nni_topo.rules import NONE, check_fields, whole

_DEAD_SCALE = 1e-6
_REFINED_BELOW = 0.175  # share of the multiply-accumulates; benchmarks/selection/README.md says where it comes from
_STEPS = 2  # of refining, where the number isn't given


@dataclass(frozen=True)
class Reconstruct(RecoveryMethod):
    """Solve each layer after removed channels again, to reproduce its unpruned output or the sum it goes into."""

    # Number of refining steps, at least 0, for each layer before a ReLU. They count only what the ReLU lets through,
    # and use the ridge of the first step. They help if few channels are kept. None: two if the layers to solve keep
    # less than 17.5 % of their multiply-accumulates, else none.
    refine: int | None = None

    def __post_init__(self) -> None:
        check_fields(self, "reconstruct", refine=whole(0) | NONE)

    def tasks(self, plan: Plan, networks: Networks) -> list[Task]:
        """Return one task for each equation, followed by the tasks that refine it."""
        refining_steps = self.refine
        if refining_steps is None:
            refining_steps = _STEPS if kept_share(plan, networks) < _REFINED_BELOW else 0
        tasks: list[Task] = []
        for equation in plan.equations:
            steps = 1 + refining_steps * equation.rectified
            tasks += [
                ReconstructTask(equation, networks.pruned, networks.result, refines=step > 0) for step in range(steps)
            ]
        return tasks


def kept_share(plan: Plan, networks: Networks) -> float:
    """Return the share of the multiply-accumulates that the layers to solve keep; 1.0 if there is none."""
    kept_macs = full_macs = 0
    for equation in plan.equations:
        module: Any = networks.unpruned.get_submodule(equation.layer.name)
        positions = position_count(module, tensor_shape(equation.place) or ())
        weights_between_kept = equation.layer.columns.numel() * equation.layer.rows.shape[1]
        kept_macs += positions * weights_between_kept * module.weight[0, 0].numel()
        full_macs += positions * module.weight.numel()
    return kept_macs / full_macs if full_macs else 1.0


class ReconstructTask(Task):
    """Solve a layer's weights and constant to reproduce the unpruned values at a place after it, or their ReLU."""

    def __init__(self, equation: Equation, pruned: nn.Module, result: nn.Module, *, refines: bool = False) -> None:
        self.refines = refines
        self._is_rectified = equation.rectified
        self.layer = equation.layer
        self.place = equation.place
        self.watched = [equation.layer.source, equation.place]
        self._module: Any = pruned.get_submodule(self.layer.name)
        module: Any = self._module
        weight = by_output(module.weight, module)
        norms = [pruned.get_submodule(name) for name in equation.norms]
        # The norms' factor for a change of the output, in which their constants cancel.
        self._scale = through_norms(norms, weight.new_zeros(len(weight)))[0].to(weight.device)
        self._columns, self._rows = self.layer.columns.to(weight.device), self.layer.rows.to(weight.device)
        # Weights of kept outputs for removed inputs become zero, whatever these inputs are.
        with torch.no_grad():
            for net in (pruned, result):
                layer: Any = net.get_submodule(self.layer.name)
                rows = by_output(layer.weight, layer)
                place = self.block(rows)
                kept_weights = rows[place].clone()
                rows[self._rows.flatten()] = 0
                rows[place] = kept_weights
                layer.weight.copy_(by_output(rows, layer))

    @property
    def label(self) -> str:
        """The name of the place, in ``relu(...)`` for a refining step."""
        return f"relu({self.place.name})" if self.refines else self.place.name

    @property
    def unknowns(self) -> int:
        """Kept input channels times kernel elements."""
        return self.layer.columns.shape[1] * int(self._module.weight[0, 0].numel())

    def extent(self, unpruned: Values) -> tuple[int, int]:
        """Return the numbers of entries and of positions of the layer's output."""
        return len(unpruned[self.place]), position_count(self._module, unpruned[self.place].shape)

    def sums_windows(self, sampled: int, entries: int, positions: int) -> bool:
        """Tell whether all windows of a long kernel take less work than about ``sampled`` of them."""
        return are_windows_summed(self._module, self._columns, sampled, entries, positions)

    def samples(self, unpruned: Values, pruned: Values, part: slice, positions: Tensor | None) -> Samples:
        """Return the pruned network's input patches, the residuals at the place, and the unpruned values there."""
        targets, reached = unpruned[self.place][part], pruned[self.place][part]
        entering = pruned[self.layer.source][part]
        inputs: Tensor | Windows
        if positions is None:
            inputs = input_windows(self._module, entering, self._columns)
        else:
            inputs = input_rows(self._module, entering, self._columns, positions, targets.shape)
        targets, reached = (output_rows(self._module, values, self._rows, positions) for values in (targets, reached))
        if self.refines:  # the ReLU of the unpruned values is wanted, and any value below zero gives zero
            lacking = torch.where(targets > 0, targets.double() - reached, -reached.double().clamp(min=0.0))
            return inputs, lacking, targets.clamp(min=0.0)
        return inputs, targets.double() - reached, targets

    def fit(self, learned: NormalEquations, held: NormalEquations, ridge: float | None) -> Fit:
        """Solve by ridge least squares."""
        return fit(learned, held, ridge, intercept=self.layer.intercept is not None)

    def apply(self, net: nn.Module, found: Fit) -> None:
        """Add the solution to the layer's weights, and the constant to its bias or the batch norm's running mean."""
        # `inverse` converts a change at the place into a change of the layer's output; 0 where a norm's factor is 0.
        scale = self._scale[self._rows]
        is_dead = scale.abs() <= _DEAD_SCALE * self._scale.abs().max()
        inverse = (1.0 / scale).masked_fill(is_dead, 0.0)
        module: Any = net.get_submodule(self.layer.name)
        change = (found.solution.weights * inverse.unsqueeze(1)).transpose(1, 2)
        with torch.no_grad():
            rows = by_output(module.weight, module)
            place = self.block(rows)
            old = rows[place]
            rows[place] = (old.double() + change.reshape(old.shape)).to(old.dtype)
            module.weight.copy_(by_output(rows, module))
            if self.layer.intercept is not None:
                add_constant(net, self.layer.intercept, self._rows, found.solution.shift * inverse)

    def block(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the indices of the weights between kept channels in a weight by output, group by group."""
        return self._rows[:, :, None], (self._columns % rows.shape[1])[:, None, :]


def add_constant(net: nn.Module, taker: str, rows: Tensor, constant: Tensor) -> None:
    """Add a constant to a layer's output channels `rows` by its bias or by the running mean of the norm after it."""
    module: Any = net.get_submodule(taker)
    is_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
    vector, sign = (module.running_mean, -1.0) if is_norm else (module.bias, 1.0)
    vector[rows] = (vector[rows].double() + sign * constant).to(vector.dtype)
