"""Energy-based pruning: filters with the least response to a chirp are pruned, up to a share of the energy.

Every layer gets a linear chirp of its own input size. The energies of its filters' responses are summed up from the
smallest on, and the filters whose sum is within the threshold are pruned. Neither data nor gradients are needed.

References
----------
.. [1] Janjic, "Exploring Redundancy in Neural Networks: Pruning by Genetic Algorithm & Filter Energy", MSc thesis,
   University of Manitoba, 2018, section 4.2, Algorithm 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from nni.compression.base.wrapper import ModuleWrapper
from nni.compression.utils import Evaluator
from torch import Tensor, nn

from nni_topo.errors import ConfigError, DataError, LayerError
from nni_topo.maths import signals
from nni_topo.maths.ties import descending
from nni_topo.network.layers.derived import call_of, inner_of
from nni_topo.network.layers.kinds import CONVOLUTIONS, TRANSPOSED, WEIGHTED
from nni_topo.network.runtime.hooks import example_inputs_of
from nni_topo.network.speedup.analysis import Analysis, Facts
from nni_topo.pruners.base import StructuredPruner
from nni_topo.pruners.budget import Budget
from nni_topo.pruners.checks import pruner_arguments
from nni_topo.pruners.hooks import Data, DataCollector, MetricCalculator, Metrics, PruningContext
from nni_topo.pruners.planner import Planner
from nni_topo.pruners.units import PruningUnit, holds_columns, output_blocks
from nni_topo.rules import NONE, Rule, as_settings, number, settings


def input_sizes(
    model: nn.Module, names: Sequence[str], example_inputs: Any, facts: Facts | None = None
) -> dict[str, tuple[int, ...]]:
    """Return the spatial input sizes of convolutions, by name; ConfigError if unknown or, padded, below the kernel."""
    if names and example_inputs is None:
        raise ConfigError(
            "a layer's input size must be known, from example_inputs or an evaluator that has a dummy_input or "
            f"evaluates, got neither ({names[0]})"
        )
    if not names:
        return {}
    planes = Analysis.on(model, example_inputs, facts).planes
    for name in names:
        if name not in planes:
            raise ConfigError(f"the input size of a layer must be known, got example_inputs that miss it ({name})")
    return {name: planes[name][0] for name in names}


def chirp_response_energy(
    module: nn.Module, weight: Tensor, bias: Tensor | None, planes: Tensor, *, most: int = 2**24
) -> Tensor:
    """Return each filter's mean squared response, float64 ``(out,)``, to planes ``(n, ...)`` in all input channels.

    Filters are taken in chunks of at most ``most`` values, by default 128 MiB of float64.
    """
    # Each filter's kernels for the input channels that it reads: ``(out, in / groups, *kernel)``.
    every = weight.double()
    if isinstance(module, TRANSPOSED):
        # ``(in, out / groups, ...)``: outputs follow group by group.
        every = every.unflatten(0, (int(module.groups), -1)).transpose(1, 2).flatten(0, 1)
    # With x in every input channel, sum_c(w_c * x) is sum_c(w_c) * x, which costs one channel only.
    kernels = every.sum(1)[:, None]
    if bias is None:
        bias = every.new_zeros(len(every))
    offset = bias.double()
    energies = []
    for plane in planes:
        entering = plane.to(kernels.device)[None, None]
        positions = _respond(module, kernels[:1], entering)[0, 0].numel()
        turn = max(1, most // max(positions, plane.numel()))
        in_turns = []
        for part, shift in zip(kernels.split(turn), offset.split(turn), strict=True):
            in_turns.append((_respond(module, part, entering)[0].flatten(1) + shift[:, None]).pow(2).mean(1))
        energies.append(torch.cat(in_turns))
    return torch.stack(energies).mean(0)


def _respond(module: nn.Module, kernels: Tensor, planes: Tensor) -> Tensor:
    """Convolve one plane, shape ``(1, 1, ...)``, with kernels ``(n, 1, ...)`` as a layer does."""
    # A transposed kernel is (in, out, ...), here with one input channel.
    weight = kernels.transpose(0, 1) if isinstance(module, TRANSPOSED) else kernels
    if inner_of(module) is not None:
        # Before it convolves, its class treats all channels alike.
        call = call_of(module, planes.expand(-1, int(module.in_channels), *planes.shape[2:]))  # type: ignore[arg-type]
        entering = call.entering[:, :1]
        return replace(
            call, arguments={**call.arguments, "input": entering, "weight": weight, "bias": None, "groups": 1}
        ).run()
    # A layer of PyTorch's class with the class's forward, because NNI replaces the forward of a wrapped layer.
    kind: Any = next(kind for kind in (*CONVOLUTIONS, *TRANSPOSED) if isinstance(module, kind))
    layer = kind.__new__(kind)
    vars(layer).update(vars(module), weight=weight, bias=None, groups=1)
    response: Tensor = kind.forward(layer, planes)
    return response


@dataclass(eq=False)
class ChirpEnergyCollector(DataCollector):
    """Energy of each filter's response to a chirp of the layer's own input size; needs no data."""

    example_inputs: Any
    chirp: signals.Chirp = signals.Chirp()  # noqa: RUF009 - it is frozen
    bias: bool = True

    def check(self, model: nn.Module, modules: dict[str, nn.Module]) -> None:
        """Raise ConfigError for layers without an energy, or whose input size is unknown or below the kernel."""
        for name, module in modules.items():
            if not isinstance(module, WEIGHTED):
                raise LayerError(
                    f"energies need convolutions or linear layers, got {type(module).__name__} ({name})", [name]
                )
        input_sizes(model, _convolutions(modules), self.example_inputs)

    def collect(self, context: PruningContext) -> Data:
        """Return energies ``(blocks, 1)``, float64 on the CPU, at least 0; ConfigError or DataError if impossible."""
        layers = {name: context.model.get_submodule(name) for unit in context.units for name, _ in unit.members}
        sizes = input_sizes(context.model, _convolutions(layers), self.example_inputs, context.facts)
        energies = {}
        for name, module in layers.items():
            weight, bias = masked_parameters(context, name)
            if not self.bias:
                bias = None
            if isinstance(module, nn.Linear):
                # A plane can't enter: the expected energy of the output for uncorrelated inputs of energy 1 each.
                energies[name] = weight.double().pow(2).sum(1)
                if bias is not None:
                    energies[name] += bias.double().pow(2)
            else:
                planes = torch.from_numpy(self.chirp.planes(sizes[name]))
                energies[name] = chirp_response_energy(module, weight, bias, planes)

        def points(unit: PruningUnit, module: str, target: str) -> Tensor:
            if holds_columns(space := context.target_spaces[module][target]):
                return torch.zeros(unit.blocks, 1, dtype=torch.float64)
            energy = energies[module][output_blocks(space, "energies")].sum(1)
            if not bool(torch.isfinite(energy).all()):
                raise DataError(f"energies must be finite, got NaN or infinity ({module}.{target})")
            return energy[:, None]

        return context.collected(points)


def _convolutions(layers: Mapping[str, nn.Module]) -> list[str]:
    return [name for name, layer in layers.items() if not isinstance(layer, nn.Linear)]


def masked_parameters(context: PruningContext, name: str) -> tuple[Tensor, Tensor | None]:
    """Return a layer's weight and bias (None: it has none), on the CPU, with masked elements at zero."""
    module = context.model.get_submodule(name)
    inner = inner_of(module)
    parameters: list[Any] = []
    for target in ("weight", "bias"):
        space = context.target_spaces[name].get(target)
        if inner is not None and not inner.is_own:
            value = getattr(inner, target)  # as its forward computes it
        elif space is None:
            value = getattr(module, target)
        else:
            value = space.target
        if value is not None:
            value = value.detach().cpu()
            if space is not None and space.mask is not None:
                value = value * space.mask.to(value)
        parameters.append(value)
    weight, bias = parameters
    return weight, bias


class CumulativeEnergyMetric(MetricCalculator):
    """A filter's score is its cumulative share of the energy: its own energy and the energy of all weaker filters."""

    def calculate(self, data: Data, context: PruningContext) -> Metrics:
        """Return shares in [0, 1], equal for all members of a dependency group, whose energies add up."""
        energies = {u.name: torch.stack([data[m][t][:, 0] for m, t in u.members]).sum(0) for u in context.units}
        shares = {name: cumulative_shares(unit_energies) for name, unit_energies in energies.items()}
        return context.spread(shares)


def cumulative_shares(energies: Tensor) -> Tensor:
    """Return each filter's cumulative share of the layer's energy, float64 ``(n,)`` in [0, 1]."""
    energies = energies.to(torch.float64)
    if not bool(energies.any()):
        # No filter has any energy: all count the same.
        energies = torch.ones_like(energies)
    # [1], Algorithm 3, lines 7 to 9. Of energies within a relative 1e-6 the higher index counts as the weaker.
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
        NNI's config_list. ``sparse_threshold``, in (0, 1), is the share of the layer's energy that may be pruned: a
        filter is kept if its own energy plus the energy of all weaker ones is *more* than this share (a tie, within
        1e-9, is pruned). ``sparse_ratio`` prunes the weakest filters. In a dependency group the energies add up before
        they are sorted; under a ``global_group_id`` all layers get one threshold, which meets the ratio.
    example_inputs : Any, default=None
        As for the base class; they also give every layer's input size, which the chirp needs.
    signal : Chirp, mapping or None, default=None
        The :class:`~nni_topo.Chirp` to which responses are measured, or its fields. None: ``Chirp()``.
    bias : bool, default=True
        Whether the layer's bias is part of the response.

    See Also
    --------
    nni_topo.signals.chirp_2d : the chirp.
    nni_topo.analysis.study_energy : filters, loss and accuracy per layer and threshold.

    Notes
    -----
    A chirp can't enter a linear layer: its neurons have the expected energy of their outputs for uncorrelated inputs of
    energy 1 each.

    In a dependency group each member counts by its mean energy per position.

    In scheduled pruning energies are measured again at each step, on the current weights; masked filters have no energy
    and stay masked.

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

    @pruner_arguments(signal=settings(signals.Chirp) | NONE)
    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict[str, Any]],
        evaluator: Evaluator | None = None,
        existed_wrappers: dict[str, ModuleWrapper] | None = None,
        *,
        example_inputs: Any = None,
        signal: signals.Chirp | Mapping[str, Any] | None = None,
        budget: Budget | Mapping[str, Any] | None = None,
        bias: bool = True,
        round_to: int | None = None,
    ) -> None:
        inputs = example_inputs_of(example_inputs, model, evaluator=evaluator)
        collector = ChirpEnergyCollector(inputs, as_settings(signals.Chirp, signal, "signal"), bias)
        metric, planner = CumulativeEnergyMetric(), Planner(strict=True, tolerance=TOLERANCE, round_to=round_to)
        super().__init__(
            model, config_list, evaluator, existed_wrappers, collector=collector, calculator=metric, planner=planner
        )
