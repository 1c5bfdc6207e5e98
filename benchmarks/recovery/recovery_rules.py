"""The recovery rules of other papers, the baselines of ``bench_recovery_rules.py``, as methods of ``compensate``.

They aren't part of the package because `Reconstruct` leaves a smaller error (``archive/recovery_methods.md``).
Importing this module registers their names::

    from benchmarks.recovery import recovery_rules

    nni_topo.compensate(model, masks, batches, method="sequential")

``"channel"`` [6]_ and ``"merge"`` change how a layer reads removed channels, as ``"pair"`` does; ``"mean"``,
``"scalar"``, ``"head"``, ``"layer"`` and ``"sequential"`` solve for a layer's weights, as ``"reconstruct"`` does. The
papers' penalties aren't used: the ridge of each layer is chosen on held-out samples, as in our methods.

References
----------
.. [1] Y. An, X. Zhao, T. Yu, M. Tang and J. Wang, "Fluctuation-based adaptive structured pruning for large language
   models", https://arxiv.org/abs/2312.11983 (``"mean"``)
.. [2] W. Kwon, S. Kim, M. W. Mahoney, J. Hassoun, K. Keutzer and A. Gholami, "A fast post-training pruning framework
   for transformers", https://arxiv.org/abs/2204.09656 (``"head"``)
.. [3] AIMET, channel pruning, https://github.com/quic/aimet (``"layer"``)
.. [4] Y. He, X. Zhang and J. Sun, "Channel pruning for accelerating very deep neural networks",
   https://arxiv.org/abs/1707.06168 (``"sequential"``)
.. [5] W. Kim, S. Kim, M. Park and G. Jeon, "Neuron merging: compensating for pruned neurons",
   https://arxiv.org/abs/2010.13160 (``"merge"``)
.. [6] W. Tang, D. Wang, L. Thiele and O. Saukh, "GRAIL: post-hoc compensation by linear reconstruction for compressed
   networks", https://arxiv.org/abs/2602.23795
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from nni_topo import RecoveryInfo, RecoveryMethod, register_recovery
from nni_topo.maths.least_squares.normal import Fit, NormalEquations, Solution, fit, fit_by
from nni_topo.maths.ties import first_largest_along
from nni_topo.network.channels.flow import norms_after
from nni_topo.network.layers.derived import weight_used
from nni_topo.network.layers.kinds import WEIGHTED, by_output, through_norms
from nni_topo.recovery.mixing import PairTask, readers_of_removed
from nni_topo.recovery.networks import Networks
from nni_topo.recovery.plan import Equation, Plan, Solvable, pruned_group_ids
from nni_topo.recovery.reconstruct import ReconstructTask
from nni_topo.recovery.replay import Values
from nni_topo.recovery.samples import Samples, Task, input_rows, output_rows

_LEAST_SIMILARITY, _SHARE_OF_SIMILARITY = 0.1, 0.85  # the paper's t and lambda for VGG
_TINY = 1e-12

Merged = Mapping[int, tuple[int, float]]


class ChannelTask(PairTask):
    """Predict every channel that a layer read from the kept ones, as GRAIL does [6]_."""

    @property
    def fitted(self) -> int:
        """Kept channels of each group."""
        return self.unknowns

    def fit(self, learned: NormalEquations, held: NormalEquations, ridge: float | None) -> Fit:
        """Solve by ridge least squares around "kept channels as they are"."""
        return fit(learned, held, ridge, intercept=self.layer.intercept is not None)


class MergeTask(PairTask):
    """Replace each removed channel by the kept channel of the most similar filter, times a factor [5]_."""

    # `merged` maps a removed channel's group id to its replacement's and the factor; it uses no samples.

    def __init__(self, layer: Solvable, group_ids: np.ndarray, pruned: nn.Module, merged: Merged) -> None:
        super().__init__(layer, group_ids, pruned)
        self._merged = merged

    def _solution(self, equations: NormalEquations) -> Solution:
        found = equations.unchanged()
        for group, numbers in enumerate(self._numbers.tolist()):
            ranks = {numbers[channel]: rank for rank, channel in enumerate(self.kept[group].tolist())}
            for channel, number in enumerate(numbers):
                replacement, factor = self._merged.get(number, (number, 0.0))
                if replacement in ranks and number not in ranks:
                    found.weights[group, ranks[replacement], channel] = factor
        return found


class ScalarTask(ReconstructTask):
    """Multiply the weights that read each kept channel, or head, by one number, as Kwon et al. do [2]_."""

    def __init__(self, equation: Equation, pruned: nn.Module, result: nn.Module, size: int = 1) -> None:
        # Each `size` consecutive channels form one head.
        super().__init__(equation, pruned, result)
        numbers = torch.arange(self._columns.shape[1]) if size == 1 else self._columns[0].cpu() // size
        elements = self._module.weight[0, 0].numel()
        self._factors = torch.unique(numbers, return_inverse=True)[1].repeat_interleave(elements).to(self._columns)

    @property
    def fitted(self) -> int:
        """Factors: one for each kept channel or head."""
        return int(self._factors.max()) + 1

    def fit(self, learned: NormalEquations, held: NormalEquations, ridge: float | None) -> Fit:
        """Solve for the difference of each factor from 1, from the sums for single weights."""
        weight = by_output(self._module.weight.detach(), self._module)
        # (groups, outputs, channels * kernel elements), scaled as at the place where the error is measured
        kernel = weight[self.block(weight)].double().flatten(2) * self._scale[self._rows].unsqueeze(2)
        fewer, others = (_summed_by_number(each, kernel, self._factors) for each in (learned, held))
        found = fit(fewer, others, ridge, intercept=False)
        solution = Solution(
            found.solution.weights[:, self._factors] * kernel.transpose(1, 2), learned.unchanged().shift
        )
        return Fit(solution, found.ridge, found.before, found.after, found.held_out)


class LayerTask(ReconstructTask):
    """Solve for a layer from its inputs in the unpruned network, as AIMET does [3]_."""

    def sums_windows(self, sampled: int, entries: int, positions: int) -> bool:
        """Return False: positions are always sampled."""
        return False

    def samples(self, unpruned: Values, pruned: Values, part: slice, positions: Tensor | None) -> Samples:
        """Return the unpruned network's input patches, what kept weights miss of its output, and the output."""
        assert positions is not None
        wanted = unpruned[self.place][part]
        entering = unpruned[self.layer.source][part]
        inputs = input_rows(self._module, entering, self._columns, positions, wanted.shape)
        wanted = output_rows(self._module, wanted, self._rows, positions)
        weight, bias = by_output(self._module.weight.detach(), self._module), self._module.bias
        reached = inputs.double() @ weight[self.block(weight)].double().flatten(2).mT  # what kept weights give
        constant = 0.0 if bias is None else bias.detach()[self._rows].double().unsqueeze(1)
        return inputs, wanted.double() - reached - constant, wanted


class MeanTask(LayerTask):
    """Add the removed channels' mean contribution in the unpruned network to the constant, as FLAP does [1]_."""

    @property
    def fitted(self) -> int:
        """0: only the constant is fitted."""
        return 0

    def fit(self, learned: NormalEquations, held: NormalEquations, ridge: float | None) -> Fit:
        """Return the mean of the missing output as the constant; weights don't change."""
        return fit_by(self._solution, learned, held)

    def _solution(self, equations: NormalEquations) -> Solution:
        found = equations.unchanged()
        if self.layer.intercept is None:
            return found  # no layer after it can take a constant
        return Solution(found.weights, equations.sums["y"] / equations.samples)


@dataclass(frozen=True)
class Sequential(RecoveryMethod):
    """Solve for each layer's output in the unpruned network, from its inputs in the network recovered so far [4]_."""

    task: ClassVar[type[ReconstructTask]] = ReconstructTask

    def tasks(self, plan: Plan, networks: Networks) -> list[Task]:
        """Return one task for each layer of the plan."""
        layers = {equation.layer.node: equation.layer for equation in plan.equations}
        # One equation for each layer, for its own output, in network order.
        nodes = [node for node in networks.unpruned.graph.nodes if node in layers]
        own = [Equation(layers[node], node, ()) for node in nodes]
        return [self.task(equation, networks.pruned, networks.result) for equation in own]


@dataclass(frozen=True)
class LayerAlone(Sequential):
    """Solve for each layer's output in the unpruned network, from its inputs there [3]_."""

    task = LayerTask


@dataclass(frozen=True)
class Mean(Sequential):
    """Add the mean contribution of the removed channels to the constant [1]_."""

    task = MeanTask


@dataclass(frozen=True)
class Scalar(RecoveryMethod):
    """Solve for one factor for each kept channel."""

    def tasks(self, plan: Plan, networks: Networks) -> list[Task]:
        """Return one task for each equation."""
        sizes = self.sizes(networks)
        return [
            ScalarTask(each, networks.pruned, networks.result, sizes.get(each.layer.name, 1)) for each in plan.equations
        ]

    def sizes(self, networks: Networks) -> dict[str, int]:
        """Return how many consecutive channels share a factor, by layer; 1 for layers that aren't named."""
        del networks
        return {}


@dataclass(frozen=True)
class Head(Scalar):
    """Solve for one factor for each kept head, and for each kept channel of other layers [2]_."""

    def sizes(self, networks: Networks) -> dict[str, int]:
        """Return the sizes of heads by the layer that reads them."""
        return {name: each.size for name, each in networks.flow.output_projections().items()}


@dataclass(frozen=True)
class Channel(RecoveryMethod):
    """Predict the removed channels from the kept ones, for every layer that read them [6]_."""

    def tasks(self, plan: Plan, networks: Networks) -> list[Task]:
        """Return a task for each layer that reads removed channels."""
        readers = readers_of_removed(plan, networks)
        return [ChannelTask(layer, group_ids, networks.pruned) for layer, group_ids in readers]


@dataclass(frozen=True)
class Merge(RecoveryMethod):
    """Replace each removed channel by the kept channel with the most similar weights [5]_."""

    def tasks(self, plan: Plan, networks: Networks) -> list[Task]:
        """Return a task for each layer that reads removed channels."""
        merged, readers = merged_channels(networks), readers_of_removed(plan, networks)
        return [MergeTask(layer, group_ids, networks.pruned, merged) for layer, group_ids in readers]


def merged_channels(networks: Networks) -> dict[int, tuple[int, float]]:
    """Return, by group id, the replacement of each removed channel and its factor, from the weights alone."""
    removed = pruned_group_ids(networks.unpruned, networks.flow, networks.masks)
    norms = norms_after(networks.unpruned, networks.flow)
    made: dict[int, list[tuple[str, Tensor, Tensor]]] = defaultdict(list)  # layer, weights (d,), bias () of each filter
    for name in networks.flow.layers:
        module: Any = networks.unpruned.get_submodule(name)
        if not isinstance(module, WEIGHTED):
            continue
        batch_norms = [networks.unpruned.get_submodule(norms[name])] if name in norms else []
        weights = by_output(weight_used(module).detach().double(), module).flatten(1)
        biases = weights.new_zeros(len(weights)) if module.bias is None else module.bias
        scale, biases = through_norms(batch_norms, biases)
        weights, biases = (weights * scale[:, None]).cpu(), biases.cpu()
        for group_id, weight, bias in zip(networks.flow.group_ids_of(name).tolist(), weights, biases, strict=True):
            made[group_id].append((name, weight, bias))
    # Channels are compared if the same layers make them; in a residual stream several layers make one channel.
    comparable: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for group_id, filters in made.items():
        comparable[tuple(layer for layer, _, _ in filters)].append(group_id)
    merged: dict[int, tuple[int, float]] = {}
    for layers, group_ids in comparable.items():
        kept = [group_id for group_id in group_ids if group_id not in removed]
        pruned = [group_id for group_id in group_ids if group_id in removed]
        if not kept or not pruned:
            continue
        rows, shifts = list[Tensor](), list[Tensor]()
        for side in (pruned, kept):
            rows.append(torch.stack([torch.cat([weight for _, weight, _ in made[each]]) for each in side]))
            shifts.append(torch.stack([torch.stack([bias for _, _, bias in made[each]]) for each in side]))
        nearest = _nearest(rows, shifts, is_normed=any(layer in norms for layer in layers))
        for group_id, (rank, factor) in zip(pruned, nearest, strict=True):
            merged[group_id] = kept[rank], factor
    return merged


def _nearest(rows: list[Tensor], biases: list[Tensor], *, is_normed: bool) -> list[tuple[int, float]]:
    """Return for each removed channel the rank of its replacement and the factor, 0.0 where none is similar.

    ``rows`` has the weights of the removed and of the kept channels, (n, d) each, ``biases`` their biases, (n, layers).
    """
    if not is_normed:  # without a norm the paper treats the bias as one more weight
        rows = [torch.cat(pair, 1) for pair in zip(rows, biases, strict=True)]
    norms = [each.norm(dim=1).clamp_min(_TINY) for each in rows]
    factors = norms[0][:, None] / norms[1]
    similarity = (rows[0] @ rows[1].T) / (norms[0][:, None] * norms[1])
    distances = (factors.unsqueeze(2) * biases[1] - biases[0].unsqueeze(1)).norm(dim=2)
    distances = distances / distances.amax(1, keepdim=True).clamp_min(_TINY)
    share = _SHARE_OF_SIMILARITY if is_normed else 1.0
    chosen = first_largest_along(share * (1.0 + similarity) + (1.0 - share) * (1.0 - distances), 1)
    found = []
    for row, rank in enumerate(chosen.tolist()):
        is_similar = float(similarity[row, rank]) >= _LEAST_SIMILARITY
        found.append((rank, float(factors[row, rank]) if is_similar else 0.0))
    return found


def _summed_by_number(equations: NormalEquations, kernel: Tensor, numbers: Tensor) -> NormalEquations:
    """Return the sums for one factor per number, common to all outputs, from the sums for single weights."""
    if not equations.samples:
        return NormalEquations()
    sums, groups = equations.sums, len(kernel)
    count = int(numbers.max()) + 1
    products = kernel.mT @ kernel * sums["xx"]
    products = products.new_zeros(groups, count, len(numbers)).index_add_(1, numbers, products)
    products = products.new_zeros(groups, count, count).index_add_(2, numbers, products)
    crossed = (kernel.mT * sums["xy"]).sum(2)
    crossed = crossed.new_zeros(groups, count).index_add_(1, numbers, crossed)
    nothing = torch.zeros_like(sums["y"][:, :1])
    spread = sums["rr"] - sums["r"].square() / equations.samples
    added = {
        "x": sums["x"].new_zeros(groups, count),
        "y": nothing,
        "r": nothing,
        "xx": products,
        "xy": crossed.unsqueeze(2),
        "yy": sums["yy"].sum(1, keepdim=True),
        "rr": spread.sum(1, keepdim=True),
    }
    return NormalEquations.of(equations.samples, added)


for _name, _kind, _summary in (
    ("sequential", Sequential, "solves for each layer's output from its inputs in the network recovered so far"),
    ("layer", LayerAlone, "solves for each layer's output from its inputs in the unpruned network"),
    ("mean", Mean, "adds the mean contribution of removed channels to the constant"),
    ("scalar", Scalar, "solves for one factor for each kept channel"),
    ("head", Head, "solves for one factor for each kept head"),
    ("channel", Channel, "predicts each removed channel from all kept ones"),
    ("merge", Merge, "replaces each removed channel by the one of the most similar kept filter"),
):
    register_recovery(RecoveryInfo(_name, f"{__name__}:{_kind.__name__}", _summary))
