"""Layer-wise reconstruction: each layer behind pruned channels is solved anew by ridge least squares."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from nni_topo.recovery.normal import NormalEquations, fit
from nni_topo.recovery.patches import draw_positions, input_rows, output_rows, position_count
from nni_topo.recovery.plan import Equation, Solvable, path_scale
from nni_topo.recovery.replay import Replay
from nni_topo.recovery.report import LayerReport

_HELD_OUT = 5
_LEAST_ROWS = 16384
_ROWS_PER_UNKNOWN = 16
_CHUNK = 2**23
_DEAD_SCALE = 1e-6
RECT = False

@dataclass(frozen=True)
class Calibration:
    """What is known of the calibration batches: entries in each of them."""

    sizes: tuple[int, ...]

    @property
    def images(self) -> int:
        """Entries of all batches."""
        return sum(self.sizes)


class Reconstruction:
    def __init__(self, replay: Replay, pruned: GraphModule, result: nn.Module, calibration: Calibration, ridge, seed):
        self.replay, self.pruned, self.result = replay, pruned, result
        self.calibration, self.ridge = calibration, ridge
        self._generator = torch.Generator().manual_seed(seed)

    def prepare(self, layer: Solvable) -> None:
        """Zero the weights that read removed channels, so that what these hold doesn't matter."""
        for net in (self.pruned, self.result):
            _cut_columns(net.get_submodule(layer.name), layer)

    def solve(self, equation: Equation, settled: int) -> LayerReport:
        began = time.perf_counter()
        layer = equation.layer
        found = fit(*self._collect(equation, settled), self.ridge, intercept=layer.intercept is not None)
        scale = path_scale(self.pruned, equation.norms, self.pruned.get_submodule(layer.name).weight.shape[0])
        for net in (self.pruned, self.result):
            _add(net, layer, found.fit.solution if False else found.solution, scale)
        return found, time.perf_counter() - began

    def _collect(self, equation: Equation, settled: int):
        layer, place = equation.layer, equation.place
        module: Any = self.pruned.get_submodule(layer.name)
        sides = NormalEquations(), NormalEquations()
        seen = 0
        source = layer.source
        for index, (original, pruned) in enumerate(self.replay.run(settled, [source, place])):
            wanted, reached = original[place], pruned[place]
            if RECT and equation.rect:
                residual = torch.where(wanted > 0, wanted - reached, -reached.clamp(min=0))
            else:
                residual = wanted - reached
            unknowns = layer.columns.shape[1] * int(module.weight[0, 0].numel())
            positions = self._positions(position_count(module, wanted), len(wanted), unknowns, index)
            step = max(1, _CHUNK // (positions.shape[1] * unknowns * len(layer.columns)))
            for first in range(0, len(wanted), step):
                part = slice(first, first + step)
                x = input_rows(module, pruned[source][part], layer.columns, positions[part])
                r = output_rows(module, residual[part], layer.rows, positions[part])
                y = output_rows(module, wanted[part], layer.rows, positions[part])
                held = (torch.arange(seen + first, seen + first + len(positions[part])) % _HELD_OUT == _HELD_OUT - 1)
                held = held.repeat_interleave(positions.shape[1])
                for side, chosen in zip(sides, (~held, held)):
                    if chosen.any():
                        side.add(x[:, chosen], r[:, chosen], y[:, chosen])
            seen += len(wanted)
        return sides

    def _positions(self, count: int, entries: int, unknowns: int, index: int) -> Tensor:
        rows = max(_LEAST_ROWS, _ROWS_PER_UNKNOWN * unknowns)
        share = self.calibration.sizes[index] / self.calibration.images
        wanted = -(-int(rows * share + 1) // entries)
        return draw_positions(count, entries, wanted, self._generator)


def _local(module, layer):
    return layer.columns % module.weight.shape[1]

def _cut_columns(module, layer):
    with torch.no_grad():
        w = module.weight
        local = _local(module, layer)
        kept = w[layer.rows[:, :, None], local[:, None, :]].clone()
        w[layer.rows.flatten()] = 0
        w[layer.rows[:, :, None], local[:, None, :]] = kept

def _add(net, layer, solution, scale):
    module = net.get_submodule(layer.name)
    with torch.no_grad():
        s = scale[layer.rows]  # g, o
        alive = s.abs() > _DEAD_SCALE * scale.abs().max()
        inv = torch.where(alive, 1 / s, 0)
        w = module.weight
        local = _local(module, layer)
        delta = solution.weights * inv.unsqueeze(1)     # g, D, o
        g, o = layer.rows.shape
        delta = delta.transpose(1, 2).reshape(g, o, local.shape[1], *w.shape[2:])
        idx = (layer.rows[:, :, None], local[:, None, :])
        w[idx] = (w[idx].double() + delta).to(w.dtype)
        if layer.intercept is None: return
        shift = solution.shift * inv
        if layer.intercept == layer.name:
            module.bias[layer.rows] = (module.bias[layer.rows].double() + shift).to(w.dtype)
        else:
            rm = net.get_submodule(layer.intercept).running_mean
            rm[layer.rows] = (rm[layer.rows].double() - shift).to(rm.dtype)
