"""A layer's inputs from a unit, in the original network and in another one, summed up for least squares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nni_topo.maths.least_squares.greedy import Products, SampleMatrix
from nni_topo.maths.least_squares.normal import NormalEquations
from nni_topo.maths.least_squares.windows import Windows
from nni_topo.network.layers.derived import call_of, has_own_forward, weight_used
from nni_topo.network.layers.kinds import by_output
from nni_topo.pruners.clouds.functional import ChannelReader
from nni_topo.recovery.samples import (
    are_windows_summed,
    draw_unpadded,
    input_rows,
    input_windows,
    position_count,
)

_LEAST_SAMPLES = 8192
_SAMPLES_PER_COLUMN = 4
_RIDGE = 1e-4
_FEW = 4  # if this many times the samples are at most a layer's columns, no products are formed


class Reading:
    """Least squares for a unit's share of a layer's output, by the inputs of its twin: the layer in another network."""

    # A layer with ``c`` columns is sampled at about ``max(8192, 4 * c)`` positions of all ``images``, evenly spread.

    def __init__(self, reader: ChannelReader, twin: nn.Module, images: int, seed: int) -> None:
        self.module: Any = reader.module
        self.twin = twin
        self._all_columns = column_count(reader)
        self.columns = self._all_columns // len(reader.places)  # per channel: kernel elements times positions
        self.equations = NormalEquations()
        weight: Any = reader.module.weight
        self._inputs = torch.from_numpy(reader.places.clip(min=0)).reshape(1, -1).to(weight.device)
        # Channels that enter in fewer places than others are padded with empty columns.
        elements = self._all_columns // reader.places.size
        self._empty = torch.from_numpy(reader.places.reshape(-1) < 0).repeat_interleave(elements).to(weight.device)
        # If the twin is the layer itself, the outputs follow from the products of the inputs.
        is_own_twin = self.module is twin
        self._weights = (
            weight.new_zeros(self._all_columns, 0, dtype=torch.float64) if is_own_twin else self._read_weights()
        )
        # Positions per entry.
        self._n_positions = max(_LEAST_SAMPLES, _SAMPLES_PER_COLUMN * self._all_columns) // images + 1
        self._images = images
        self._generator = torch.Generator().manual_seed(seed)
        self._shape: Sequence[int]
        self._before: Tensor
        self._now: Tensor

    def record_call(self, entering: Tensor, output: Tensor) -> None:
        """Record a call of the layer."""
        self._before, self._shape = entering, tuple(output.shape)
        if has_own_forward(self.module):  # which may compute more after its convolution
            size = call_of(self.module, entering).output_size
            self._shape = (len(entering), 1, *size) if size else tuple(entering.shape)

    def record_twin_call(self, entering: Tensor) -> None:
        """Record a call of the twin."""
        self._now = entering

    def add(self, counted: Tensor | None) -> None:
        """Add the recorded batch; ``counted``, ``(entries, places)``, says which positions count, None: all do."""
        before, now, shape = self._before, self._now, self._shape
        del self._before, self._now  # they may be large
        places = position_count(self.module, shape)
        sampled = self._n_positions * self._images
        if counted is None and are_windows_summed(self.module, self._inputs, sampled, self._images, places):

            def read(entering: Tensor) -> Tensor | Windows:
                return input_windows(self.module, entering, self._inputs)
        else:
            positions, stay = draw_unpadded(places, len(before), self._n_positions, self._generator, counted)
            real = slice(None) if stay is None else stay.flatten()

            def read(entering: Tensor) -> Tensor | Windows:
                return input_rows(self.module, entering, self._inputs, positions, shape)[:, real].double()

        rows = first = read(now)
        if now is not before:
            first = read(before)
        # What the unit adds to the layer's output, without the other channels and the bias.
        outputs = first.times(self._weights[None]) if isinstance(first, Windows) else first @ self._weights
        self.equations.add(rows, outputs, outputs)

    def layer(self) -> Products | SampleMatrix:
        """Return the problem, targets scaled to a total variance of 1, and free the sums."""
        sums, self.equations = self.equations, NormalEquations()
        if sums.samples * _FEW <= sums.unknowns:
            root = sums.samples**0.5
            rows, outputs = (values[0].div_(root) for values in sums.centred())
            del sums  # as large as the weights that are read now
            rows[:, self._empty] = 0.0
            if self.module is self.twin:
                outputs = rows @ self._read_weights()
            scaled_outputs = outputs * _inverse_root(outputs.square().sum())
            columns = np.ascontiguousarray(rows.T.cpu().numpy())
            ridge = _RIDGE * np.square(columns).sum(1)
            ridge[self._empty.cpu().numpy()] = 1.0
            return SampleMatrix(columns, scaled_outputs.cpu().numpy(), ridge, self.columns, rows.device)
        gram, across, variances = (values[0] for values in sums.covariances())
        gram[self._empty] = gram[:, self._empty] = across[self._empty] = 0.0
        gram.diagonal()[self._empty] = 1.0
        if self.module is self.twin:
            weights = self._read_weights()
            across = gram @ weights
            variances = (weights * across).sum(0)
        gram.diagonal().mul_(1.0 + _RIDGE)
        targets = (across * _inverse_root(variances.sum())).cpu().numpy()
        return Products(gram.cpu().numpy(), targets, self.columns, gram.device)

    def _read_weights(self) -> Tensor:
        """Return the weights that read the unit's columns, ``(channels * columns, outputs)``, float64."""
        weight = by_output(weight_used(self.module).detach(), self.module)
        inputs = self._inputs[0]
        kernels = weight.flatten(2) if weight.dim() > 2 else weight[..., None]
        rows = weight.new_zeros(len(inputs), kernels.shape[2], len(weight), dtype=torch.float64)
        step, width = len(weight) // getattr(self.module, "groups", 1), weight.shape[1]
        for index, channel in enumerate(inputs.tolist()):
            group = channel // width
            outputs = slice(group * step, (group + 1) * step)
            rows[index, :, outputs] = kernels[outputs, channel % width].T
        rows = rows.flatten(0, 1)
        rows[self._empty] = 0.0
        return rows


def _inverse_root(variance: Tensor) -> float:
    return float(variance) ** -0.5 if variance > 0 else 0.0


def column_count(reader: ChannelReader) -> int:
    """Return the number of columns that a reader has for its unit."""
    weight: Any = reader.module.weight
    return int(reader.places.size * (weight[0, 0].numel() if weight.dim() > 2 else 1))
