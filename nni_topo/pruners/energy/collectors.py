"""Filter energies: how much of a chirp, or of real inputs, each filter lets through."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from nni_topo.errors import ConfigError, DataError, LayerError
from nni_topo.maths import signals
from nni_topo.network.layers.derived import call_of, inner_of, is_followed
from nni_topo.network.layers.kinds import WEIGHTED, by_channel
from nni_topo.network.runtime.calibration import Calibration
from nni_topo.network.runtime.fits import run
from nni_topo.network.runtime.hooks import watched
from nni_topo.pruners.clouds.moments import check_reached
from nni_topo.pruners.clouds.traced import norm_scales
from nni_topo.pruners.energy.responses import chirp_response_energy, input_sizes
from nni_topo.pruners.hooks import Data, DataCollector, PruningContext
from nni_topo.pruners.units import PruningUnit, holds_columns, output_blocks
from nni_topo.rules import as_settings, check_fields

Normalization = Literal["none", "area", "layer"]


@dataclass(eq=False)
class EnergyCollector(DataCollector):
    """What the two collectors of energies share: one number per filter, its scale, and what is refused."""

    example_inputs: Any = None
    normalization: Normalization = field(default="area", kw_only=True)
    batch_norm: bool = field(default=False, kw_only=True)
    bias: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.batch_norm and self.example_inputs is None:
            raise ConfigError("batch_norm=True needs example_inputs, got none (example_inputs)")

    @abstractmethod
    def energies(self, context: PruningContext) -> dict[str, tuple[Tensor, int]]:
        """Return, by module, the energy of each output channel per position, and the number of positions."""

    def check(self, model: nn.Module, modules: dict[str, nn.Module]) -> None:
        """Raise ConfigError for layers to prune that have no energy."""
        for name, module in modules.items():
            if not isinstance(module, WEIGHTED):
                raise LayerError(f"energies are defined for convolutions, got {type(module).__name__} ({name})", [name])

    def collect(self, context: PruningContext) -> Data:
        """Return energies ``(blocks, 1)``, float64 on the CPU, at least 0; ConfigError or DataError without."""
        self.check(context.model, {m: context.model.get_submodule(m) for u in context.units for m, _ in u.members})
        found = self.energies(context)
        scales = norm_scales(context, context.analysis(self.example_inputs).flow) if self.batch_norm else {}

        def points(unit: PruningUnit, module: str, target: str) -> Tensor:
            if holds_columns(space := context.target_spaces[module][target]):
                return torch.zeros(unit.blocks, 1, dtype=torch.float64)
            energy, positions = found[module]
            energy = energy * scales.get(module, torch.ones(())) ** 2
            if self.normalization == "none":
                energy = energy * positions
            elif self.normalization == "layer" and energy.sum() > 0:
                energy = energy / energy.sum()
            energy = energy[output_blocks(space, "energies")].sum(1)
            if not bool(torch.isfinite(energy).all()):
                raise DataError(f"energies must be finite, got NaN or infinity ({module}.{target})")
            return energy[:, None]

        return context.collected(points)


@dataclass(eq=False)
class ChirpEnergyCollector(EnergyCollector):
    """Energy of each filter's response to a chirp of the layer's own input size; needs no data."""

    signal: signals.Chirp | Mapping[str, Any] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.chirp = as_settings(signals.Chirp, self.signal, "signal")
        self._sizes: WeakKeyDictionary[nn.Module, tuple[int, ...]] = WeakKeyDictionary()

    def check(self, model: nn.Module, modules: dict[str, nn.Module]) -> None:
        """Check the layers and find their input sizes; ConfigError too if a size is unknown or below the kernel."""
        super().check(model, modules)
        wanted = [n for n, module in modules.items() if not isinstance(module, nn.Linear) and module not in self._sizes]
        if wanted:
            found = input_sizes(model, wanted, self.example_inputs)
            self._sizes.update({modules[name]: size for name, size in found.items()})

    def energies(self, context: PruningContext) -> dict[str, tuple[Tensor, int]]:
        """Return the mean energy of each filter's response per position, and the number of positions."""
        found = {}
        for unit in context.units:
            for name, _ in unit.members:
                weight, bias = masked_parameters(context, name)
                if not self.bias:
                    bias = None
                module = context.model.get_submodule(name)
                if isinstance(module, nn.Linear):
                    # No plane can enter: the expected energy of the output for uncorrelated inputs of energy 1 each.
                    found[name] = weight.double().pow(2).sum(1) + (0.0 if bias is None else bias.double().pow(2)), 1
                    continue
                planes = torch.from_numpy(self.chirp.planes(self._sizes[module]))
                separate = self.chirp.channels == "separate"
                found[name] = chirp_response_energy(module, weight, bias, planes, separate=separate)
        return found


@dataclass(eq=False)
class DataEnergyCollector(EnergyCollector):
    """Energy of each filter's responses to calibration data; the chirp approximates it."""

    calibration: Iterable[Any] = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.calibration = Calibration.of(self.calibration)

    def energies(self, context: PruningContext) -> dict[str, tuple[Tensor, int]]:
        """Return the mean energy of each channel's output, and the number of positions per image."""
        names = [name for unit in context.units for name, _ in unit.members]
        biases = [None if self.bias else masked_parameters(context, name)[1] for name in names]
        layers = [context.model.get_submodule(name) for name in names]
        sums = dict(zip(names, map(_Energy, layers, biases), strict=True))
        with watched(leaving=[(total.module, total.add) for total in sums.values()]):
            run(context.model, self.calibration)
        for name, total in sums.items():
            check_reached(total.samples, name, "response")
        return {name: ((total.energy / total.samples).cpu(), total.positions) for name, total in sums.items()}


class _Energy:
    """Energy of each channel of a layer, less its bias if one is given, summed over samples and positions."""

    def __init__(self, module: nn.Module, bias: Tensor | None) -> None:
        self.module, self.bias = module, bias
        self._goes_on = is_followed(module)
        self.energy: Any = 0.0
        self.samples = 0
        self.positions = 0

    def add(self, entering: Tensor, outputs: Tensor) -> None:
        if self._goes_on:  # its class computes more with the filters' responses
            outputs = call_of(self.module, entering).run()
        rows = by_channel(self.module, outputs).double()
        if self.bias is not None:
            rows = rows - self.bias.to(rows.device)[:, None]
        self.energy = self.energy + rows.pow(2).sum(1)
        self.samples += rows.shape[1]
        self.positions = 1 if isinstance(self.module, nn.Linear) else math.prod(outputs.shape[2:])


def masked_parameters(context: PruningContext, name: str) -> tuple[Tensor, Tensor | None]:
    """Return a layer's weight and bias (None: it has none), on the CPU, with what is masked already at zero."""
    weight = cast(Tensor, _masked(context, name, "weight"))
    return weight, _masked(context, name, "bias")


def _masked(context: PruningContext, name: str, target: str) -> Tensor | None:
    space = context.target_spaces[name].get(target)
    module = context.model.get_submodule(name)
    value = getattr(module, target) if space is None else space.target
    inner = inner_of(module)
    if inner is not None and not inner.is_own:
        value = getattr(inner, target)  # as its forward computes it
    if value is None:
        return None
    found: Tensor = value.detach().cpu()
    mask = None if space is None else space.mask
    return found if mask is None else found * mask.to(found)
