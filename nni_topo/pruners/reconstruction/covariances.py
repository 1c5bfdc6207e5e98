"""Streamed covariances of what enters a layer, in the original network and in another one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nni_topo.pruners.clouds.functional import Reader
from nni_topo.recovery.samples import draw_positions, input_rows, position_count

_LEAST_SAMPLES = 8192
_SAMPLES_PER_COLUMN = 4


class EnteringCovariances:
    """Covariances of the patches that one layer reads from a unit.

    Parameters
    ----------
    reader : Reader
        The layer in the original network, and where the unit's channels enter.
    twin : torch.nn.Module
        The same layer in the other network, or itself.
    images : int
        Images that will come; a layer with ``c`` columns is sampled at about ``max(8192, 4 * c)`` positions over all of
        them, evenly spread.
    seed : int
        Of the positions.

    Attributes
    ----------
    columns : int
        Columns of a channel: kernel elements times positions.
    """

    def __init__(self, reader: Reader, twin: nn.Module, images: int, seed: int) -> None:
        self.module: Any = reader.module
        self.twin = twin
        self._columns = torch.from_numpy(reader.places).reshape(1, -1)
        self._wanted = max(_LEAST_SAMPLES, _SAMPLES_PER_COLUMN * column_count(reader)) // images + 1
        self._generator = torch.Generator().manual_seed(seed)
        self._before: Tensor
        self._now: Tensor
        self._places = 0
        self.columns = column_count(reader) // len(reader.places)
        self.samples = 0
        self.own: Any = 0.0
        self.across: Any = 0.0
        self.target: Any = 0.0
        self.means: list[Any] = [0.0, 0.0]

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
        columns = self._columns.to(before.device)
        rows = input_rows(self.module, now, columns, positions)[0].double()
        first = rows if now is before else input_rows(self.module, before, columns, positions)[0].double()
        self.samples += len(rows)
        self.own = self.own + rows.T @ rows
        self.means = [self.means[0] + rows.sum(0), self.means[1] + first.sum(0)]
        if now is not before:
            self.across = self.across + rows.T @ first
            self.target = self.target + first.T @ first

    def covariances(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the covariances of the network, between it and the original, and of the original."""
        now, before = (total / self.samples for total in self.means)
        own = self.own / self.samples - torch.outer(now, now)
        if isinstance(self.across, float):
            return own, own, own
        across = self.across / self.samples - torch.outer(now, before)
        return own, across, self.target / self.samples - torch.outer(before, before)

    def weights(self) -> Tensor:
        """Weights by which a layer reads the unit's columns, ``(channels * columns, outputs)``, float64."""
        module = self.module
        weight = module.weight.detach().double()
        groups = getattr(module, "groups", 1)
        inputs = self._columns[0]
        kernel = int(weight[0, 0].numel()) if weight.dim() > 2 else 1
        rows = torch.zeros(len(inputs), kernel, len(weight), dtype=torch.float64)
        step = len(weight) // groups
        width = weight.shape[1]
        for index, channel in enumerate(inputs.tolist()):
            group = channel // width
            outputs = slice(group * step, (group + 1) * step)
            rows[index, :, outputs] = weight[outputs, channel % width].reshape(step, kernel).T.cpu()
        return rows.flatten(0, 1)


def column_count(reader: Reader) -> int:
    """Columns that enter a reader from its unit."""
    weight: Any = reader.module.weight
    return int(reader.places.size * (weight[0, 0].numel() if weight.dim() > 2 else 1))
