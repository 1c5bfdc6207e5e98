"""In layers that read removed channels, one kept channel and a constant replace each of them.

``f_u = alpha f_s + beta`` is the correlation-based update of [1]_, equations 5.8 to 5.12.

A padded convolution reads zeros beyond the border, not the constant, so the constant in its bias is exact only where
the kernel lies within the image. The contribution of a constant to a transposed convolution with a stride differs
between positions; the bias takes the mean.

References
----------
.. [1] "Sub-clustering neurogenetic pruning", chapter 5, correlation-based update.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from nni_topo.errors import ConfigError, DataError, unknown_name
from nni_topo.maths.least_squares.normal import Fit, NormalEquations, Solution, fit_by
from nni_topo.maths.ties import first_largest_along
from nni_topo.network.layers.kinds import TRANSPOSED, by_output, kept_channels, weight_of
from nni_topo.recovery.networks import Networks
from nni_topo.recovery.plan import Plan, Solvable, pruned_group_ids
from nni_topo.recovery.reconstruct import add_constant
from nni_topo.recovery.registry import RecoveryMethod
from nni_topo.recovery.replay import Values
from nni_topo.recovery.samples import Samples, Task
from nni_topo.rules import NONE, Rule, all_of, check_fields, checked, instance, whole

# Share of a channel's mean square below which its variance is a rounding error of the difference of two sums.
_LEAST_VARIANCE = 1e-12

Pairs = Mapping[str, Mapping[int, int]]
_PAIRS = Rule(
    "a mapping of layers to mappings of channels",
    lambda pairs: all_of(instance(Mapping), Mapping).holds(pairs) and all(isinstance(name, str) for name in pairs),
)


class PairTask(Task):
    """For each removed channel, let one kept channel replace it: the one in `survivors`, else the most correlated."""

    # `group_ids` (inputs,) has for each input channel or feature the id of the channel that it comes from. After
    # flattening, the features of one channel count as its samples.
    # With `biases` the constant for a removed channel u is ``beta * biases[u]``, the same for each output, as (5.9)
    # prints it, instead of `beta` times the weights that read u.

    def __init__(
        self,
        layer: Solvable,
        group_ids: np.ndarray,
        pruned: nn.Module,
        survivors: Mapping[int, int] | None = None,
        biases: Mapping[int, float] | None = None,
    ) -> None:
        self.layer = layer
        self.place = layer.source
        self.watched = [layer.source]
        self._module: Any = pruned.get_submodule(layer.name)
        self._places, self.kept = _places(layer, group_ids, self._module)
        # All places of a channel have the same group id.
        self._numbers = torch.from_numpy(group_ids)[self._places[:, :, 0]]
        self._survivors = survivors or {}
        self._biases = biases

    @property
    def unknowns(self) -> int:
        """Kept channels of each group."""
        return self.kept.shape[1]

    @property
    def fitted(self) -> int:
        """For each removed channel, the factor of the kept channel that replaces it."""
        return 1

    def extent(self, unpruned: Values) -> tuple[int, int]:
        """Return the numbers of entries and of positions of the layer's input."""
        return len(unpruned[self.place]), self._last(unpruned[self.place]).shape[1]

    def samples(self, unpruned: Values, pruned: Values, part: slice, positions: Tensor | None) -> Samples:
        """Return the pruned network's kept channels, the residuals of all channels, and the unpruned channels."""
        assert positions is not None  # windows aren't summed here
        targets = self._rows(unpruned[self.place][part], positions)
        reached = self._rows(pruned[self.place][part], positions)
        index = self.kept.to(targets.device)[:, None, :].expand(-1, targets.shape[1], -1)
        inputs = reached.gather(2, index)
        # The residual of a kept channel is its change by earlier pruning; for a removed channel it is the whole
        # channel. So the ridge draws the solution towards unchanged kept channels.
        lacking = targets.double()
        # In float64, because after little pruning a residual is a small difference of two large values.
        return inputs, lacking.scatter_add(2, index, -inputs.double()), targets

    def fit(self, learned: NormalEquations, held: NormalEquations, ridge: float | None) -> Fit:
        """Solve for ``alpha`` and ``beta`` of every pair."""
        # One unknown per channel needs no ridge, and [1]_ has none: held-out samples only measure the error.
        return fit_by(self._solution, learned, held)

    def apply(self, net: nn.Module, found: Fit) -> None:
        """Fold the mixing matrix into the weights of the layer that reads the channels."""
        module: Any = net.get_submodule(self.layer.name)
        # Each position of a transposed convolution gets one of this many taps.
        taps = math.prod(module.stride) if isinstance(module, TRANSPOSED) else 1
        with torch.no_grad():
            weight = by_output(module.weight, module)
            for group, (rows, places, kept_ranks) in enumerate(
                zip(self.layer.rows, self._places, self.kept, strict=True)
            ):
                # Places count over all groups, the weight's second axis over one group.
                rows, local = rows.to(weight.device), places.to(weight.device) % weight.shape[1]
                # (outputs, channels, places of a channel, kernel elements): a channel's factor multiplies all of its
                # places, in a linear layer after flattening as in a convolution.
                old = weight[rows[:, None], local.flatten()].double().unflatten(1, local.shape)
                mixing = found.solution.weights[group].to(old.device)
                # The weights of removed channels become zero; a kept channel takes over with one factor for all
                # kernel elements.
                new = torch.zeros_like(old)
                new[:, kept_ranks] = old[:, kept_ranks] + torch.einsum("kc,ocq...->okq...", mixing, old)
                weight[rows[:, None], local.flatten()] = new.flatten(1, 2).to(weight.dtype)
                if self.layer.intercept is not None:
                    # The old weights of the removed channels multiply their constants: `old`, not `new`.
                    shift = found.solution.shift[group].to(old.device)
                    if self._biases is None:
                        constant = (old.flatten(2).sum(2) / taps) @ shift
                    else:
                        # As printed: not multiplied by the weights that read u, so the constant doesn't follow from
                        # (5.10).
                        biases = [self._biases.get(int(number), 0.0) for number in self._numbers[group]]
                        constant = (shift * shift.new_tensor(biases)).sum().expand(len(rows))
                    add_constant(net, self.layer.intercept, rows, constant)
            module.weight.copy_(by_output(weight, module))

    def _rows(self, values: Tensor, positions: Tensor) -> Tensor:
        """Return channels as ``(groups, samples, channels)``."""
        flat = self._last(values)
        chosen = flat[torch.arange(len(flat), device=flat.device)[:, None], positions.to(flat.device)].flatten(0, 1)
        return chosen[:, self._places.to(flat.device)].permute(1, 0, 3, 2).flatten(1, 2)

    def _last(self, values: Tensor) -> Tensor:
        """Return values as ``(entries, positions, channels)``."""
        last = values if isinstance(self._module, nn.Linear) else values.movedim(1, -1)
        return last.reshape(len(last), -1, last.shape[-1])

    def _solution(self, equations: NormalEquations) -> Solution:
        sums, count = equations.sums, equations.samples
        means = (sums["x"] / count, sums["y"] / count)
        if self.layer.intercept is None:
            # No module can take a constant: the lines go through the origin.
            means = (torch.zeros_like(means[0]), torch.zeros_like(means[1]))
        # Differences of sums lose digits where means are much larger than deviations: in float64 four digits are left
        # at a mean of 1e6 deviations.
        shared = sums["xy"] / count - means[0].unsqueeze(2) * means[1].unsqueeze(1)
        spread = sums["xx"].diagonal(dim1=1, dim2=2) / count - means[0].square()
        # A channel that doesn't vary beyond rounding predicts nothing: slope and correlation become 0.
        spread = spread.masked_fill(spread <= _LEAST_VARIANCE * sums["xx"].diagonal(dim1=1, dim2=2) / count, torch.inf)
        # This ranks the kept channels as the correlation does; the removed channel's deviation is left out.
        chosen = self._chosen(shared.abs() * spread.rsqrt().unsqueeze(2)).to(shared.device)
        slopes = (shared / spread.unsqueeze(2)).gather(1, chosen.unsqueeze(1))
        # Kept channels aren't replaced: no slope, no shift.
        is_removed = torch.ones_like(means[1]).scatter(1, self.kept.to(shared.device), 0.0)
        weights = torch.zeros_like(shared).scatter(1, chosen.unsqueeze(1), slopes * is_removed.unsqueeze(1))
        shift = (means[1] - slopes.squeeze(1) * means[0].gather(1, chosen)) * is_removed
        return Solution(weights, shift)

    def _chosen(self, likeness: Tensor) -> Tensor:
        """Return the rank of each channel's survivor among the kept channels, (groups, channels)."""
        # Near ties go to the first channel, so that rounding doesn't choose between equally good ones.
        chosen = first_largest_along(likeness, 1).cpu()
        for group, numbers in enumerate(self._numbers.tolist()):
            ranks = {numbers[channel]: rank for rank, channel in enumerate(self.kept[group].tolist())}
            for channel, number in enumerate(numbers):
                survivor = self._survivors.get(number)
                if survivor is None:
                    continue
                if survivor not in ranks:
                    raise ConfigError(
                        "both channels of a pair must be inputs of the same group of a layer, "
                        f"got a pair that isn't (pairs, {self.layer.name})"
                    )
                chosen[group, channel] = ranks[survivor]
        return chosen


@dataclass(frozen=True)
class Pair(RecoveryMethod):
    """Let one kept channel and a constant replace each removed channel."""

    pairs: Pairs | None = None  # {layer: {removed channel: kept channel}}; else that with the largest |correlation|
    as_printed: bool = False  # the constant of equation (5.9) as printed, from the removed neuron's own bias

    def __post_init__(self) -> None:
        check_fields(self, "pair", pairs=_PAIRS | NONE)

    def tasks(self, plan: Plan, networks: Networks) -> list[Task]:
        """Return a task for each layer that reads removed channels; ConfigError if ``pairs`` can't be used."""
        flow, unpruned = networks.flow, networks.unpruned
        removed = pruned_group_ids(unpruned, flow, networks.masks)
        survivors: dict[int, int] = {}  # group ids: removed channel -> kept channel
        for name, chosen in (self.pairs or {}).items():
            if name not in flow.layers:
                raise unknown_name("a layer of pairs", name, flow.layers, "pairs")
            group_ids = flow.group_ids_of(name).tolist()
            is_kept = kept_channels(unpruned.get_submodule(name), networks.requested_masks.get(name, {}))
            for lost, survivor in chosen.items():
                inside = all(channel in range(len(group_ids)) for channel in (lost, survivor))
                if inside and group_ids[lost] in removed and group_ids[survivor] not in removed:
                    survivors[group_ids[lost]] = group_ids[survivor]
                # A masked channel stays if another layer needs it, and then needs no survivor.
                elif not inside or is_kept is None or bool(is_kept[lost]) or not bool(is_kept[survivor]):
                    raise ConfigError(
                        f"pairs must map channels that are removed to channels that are kept, got {lost}: {survivor} "
                        f"({name})"
                    )
        biases: dict[int, float] | None = None
        if self.as_printed:  # the bias in the first layer that has the channel; 0 without a bias
            biases = {}
            for name in flow.layers:
                numbers = flow.group_ids_of(name)
                bias = getattr(unpruned.get_submodule(name), "bias", None)
                values = np.zeros(len(numbers)) if bias is None else bias.detach().double().cpu().numpy()
                for number, value in zip(numbers.tolist(), values.tolist(), strict=True):
                    biases.setdefault(number, value)
        readers = readers_of_removed(plan, networks)
        return [PairTask(layer, group_ids, networks.pruned, survivors, biases) for layer, group_ids in readers]


def readers_of_removed(plan: Plan, networks: Networks) -> list[tuple[Solvable, np.ndarray]]:
    """Return the layers that read removed channels, in network order, each with the group ids of all its inputs."""
    layers: dict[str, Solvable] = {}
    for equation in plan.equations:
        module = networks.pruned.get_submodule(equation.layer.name)
        if equation.layer.columns.shape[1] < by_output(weight_of(module), module).shape[1]:
            layers[equation.layer.name] = equation.layer
    in_order = [name for name in networks.flow.layers if name in layers]
    return [(layers[name], networks.flow.entering_group_ids(name)) for name in in_order]


@checked()
def pair_coefficients(removed: ArrayLike, survivor: ArrayLike, *, iterations: int | None = None) -> tuple[float, float]:
    """Return alpha and beta of the line that predicts a removed channel ``f_u`` from a kept one ``f_s``, (5.10).

    It is ``argmin ||f_u - alpha f_s - beta||^2`` over the same samples, arrays of equal shapes; where ``f_s`` is
    constant, alpha is 0. With ``iterations``, (5.11) and (5.12) alternate that many times from ``beta = 0``; each time
    the distance to the closed form shrinks by ``mean(f_s)^2 / mean(f_s^2)``. (5.12) prints no mean; as beta is one
    number, it is the mean over samples. The text's small value in the denominators is 0. ConfigError if ``iterations``
    is less than 1, DataError if there is no sample, the shapes differ, or a value isn't finite.

    Examples
    --------
    >>> pair_coefficients([1.0, 3.0, 5.0], [0.0, 1.0, 2.0])
    (2.0, 1.0)
    """
    if iterations is not None:
        whole(1).check("iterations", iterations, "pair_coefficients")
    u, s = np.asarray(removed, dtype=np.float64).ravel(), np.asarray(survivor, dtype=np.float64).ravel()
    if u.shape != s.shape or not u.size:
        raise DataError(f"activations of a pair must be of one shape and not empty, got {u.size} and {s.size} values")
    if not (np.isfinite(u).all() and np.isfinite(s).all()):
        raise DataError("activations of a pair must be finite, got NaN or infinity")
    spread = float(((s - s.mean()) ** 2).sum())
    # A kept channel that doesn't vary predicts nothing, so the line is a constant.
    if spread <= _LEAST_VARIANCE * float(s @ s):
        return 0.0, float(u.mean())
    if iterations is None:
        # Centred first: the difference of raw moments would cancel where the means are large.
        alpha = float((u - u.mean()) @ (s - s.mean())) / spread
        return alpha, float(u.mean() - alpha * s.mean())
    # Each step is a least-squares solution in one of the two unknowns with the other fixed: the error never rises.
    alpha = beta = 0.0
    square = float(s @ s)
    for _ in range(iterations):
        alpha = float(u @ s - beta * s.sum()) / square
        beta = float((u - alpha * s).mean())
    return alpha, beta


def _places(layer: Solvable, group_ids: np.ndarray, module: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the inputs of each channel, (groups, channels, places), and the ranks of kept channels, (groups, kept)."""
    step = by_output(weight_of(module), module).shape[1]
    groups = layer.columns[:, 0] // step
    counts = np.unique(np.unique(group_ids, return_counts=True)[1])
    # After flattening, each channel has equally many features. The id 0, FIXED, marks inputs that can't be pruned; it
    # is no channel.
    if isinstance(module, nn.Linear) and len(counts) == 1 and counts[0] > 1 and group_ids.min() > 0:
        # Stable: the features of each channel stay in the order of their positions, so that the p-th features of all
        # channels lie at one position and form a sample.
        order = np.argsort(group_ids, kind="stable").reshape(-1, counts[0])
        # Sorted by first features: channels in the order of the layer's weight.
        places = torch.from_numpy(order[np.argsort(order[:, 0])])[None]
    else:
        places = (groups[:, None] * step + torch.arange(step))[:, :, None]
    kept_ranks = [
        torch.isin(group_places[:, 0], columns).nonzero().flatten()
        for group_places, columns in zip(places, layer.columns, strict=True)
    ]
    return places, torch.stack(kept_ranks)
