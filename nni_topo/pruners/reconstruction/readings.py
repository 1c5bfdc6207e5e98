"""What enters a layer from a unit, in the original network and in another one, summed up for least squares."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nni_topo.maths.least_squares.normal import NormalEquations
from nni_topo.pruners.clouds.functional import Reader
from nni_topo.recovery.samples import draw_positions, input_rows, position_count

_LEAST_SAMPLES = 8192
_SAMPLES_PER_COLUMN = 4


class Reading:
    """The least squares of a layer's share of its output, in the original network, by what enters its twin."""

    # ``images`` come in all. A layer with ``c`` columns is sampled at about ``max(8192, 4 * c)`` positions over all of
    # them, evenly spread.

    def __init__(self, reader: Reader, twin: nn.Module, images: int, seed: int) -> None:
        self.module: Any = reader.module
        self.twin = twin
        self.columns = column_count(reader) // len(reader.places)  # of a channel: kernel elements times positions
        self.equations = NormalEquations()
        weight: Any = reader.module.weight
        self._inputs = torch.from_numpy(reader.places).reshape(1, -1).to(weight.device)
        self._weights = self._read_weights()
        self._wanted = max(_LEAST_SAMPLES, _SAMPLES_PER_COLUMN * column_count(reader)) // images + 1
        self._generator = torch.Generator().manual_seed(seed)
        self._places = 0
        self._before: Tensor
        self._now: Tensor

    def met(self, entering: Tensor, output: Tensor) -> None:
        """See a call of the layer."""
        self._before, self._places = entering, position_count(self.module, output)

    def reached(self, entering: Tensor) -> None:
        """See a call of the twin."""
        self._now = entering

    def add(self) -> None:
        """Add the batch that went through."""
        before, now = self._before, self._now
        del self._before, self._now  # they may be large
        positions = draw_positions(self._places, len(before), self._wanted, self._generator).to(before.device)
        rows = input_rows(self.module, now, self._inputs, positions).double()
        first = rows if now is before else input_rows(self.module, before, self._inputs, positions).double()
        # What the unit adds to the layer's output, without the other channels and the bias.
        outputs = first @ self._weights
        self.equations.add(rows, outputs, outputs)

    def _read_weights(self) -> Tensor:
        """Weights by which the layer reads the unit's columns, ``(channels * columns, outputs)``, float64."""
        weight: Tensor = self.module.weight.detach().double()
        inputs = self._inputs[0]
        kernels = weight.flatten(2) if weight.dim() > 2 else weight[..., None]
        rows = weight.new_zeros(len(inputs), kernels.shape[2], len(weight))
        step, width = len(weight) // getattr(self.module, "groups", 1), weight.shape[1]
        for index, channel in enumerate(inputs.tolist()):
            group = channel // width
            outputs = slice(group * step, (group + 1) * step)
            rows[index, :, outputs] = kernels[outputs, channel % width].T
        return rows.flatten(0, 1)


def column_count(reader: Reader) -> int:
    """Columns that enter a reader from its unit."""
    weight: Any = reader.module.weight
    return int(reader.places.size * (weight[0, 0].numel() if weight.dim() > 2 else 1))
