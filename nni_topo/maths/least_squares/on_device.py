"""Forward selection on a GPU: the steps of :mod:`~nni_topo.maths.least_squares.greedy`, each in a few large operations.

A processor works through chunks that fit into its cache, and moves the columns that are left together. A GPU would wait
for the launch of each chunk, so here every step updates the columns of all channels, and what the chosen ones share
with a new one is set to zero.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class DeviceReader(ABC):
    """The columns that one layer reads, (channels * block, ...), kept orthogonal to those of the chosen channels."""

    def __init__(self, own: Tensor, cross: Tensor, rows: Tensor, least_pivot: float) -> None:
        # `own` (channels, block, block): products of each channel's columns with each other; `cross`: what is left of
        # the targets; `rows`: one for each column, see the classes below.
        self._block = own.shape[1]
        scale = own.diagonal(dim1=1, dim2=2).mean(1)
        trace = least_pivot * torch.where(scale > 0.0, scale, 1.0)[:, None, None]
        self._own = own + trace * torch.eye(self._block, dtype=own.dtype, device=own.device)
        self._cross, self._rows = cross, rows
        self._left = torch.ones(len(own), 1, 1, dtype=own.dtype, device=own.device)

    def gains(self) -> Tensor:
        """Return what each channel would take off the squared error, (channels,); 0 for the chosen ones."""
        blocks = self._cross.unflatten(0, (-1, self._block))
        found: Tensor
        if self._block == 1:
            found = blocks.square().sum((1, 2)) / self._own[:, 0, 0]
        else:
            found = (torch.linalg.inv_ex(self._own).inverse * (blocks @ blocks.mT)).sum((1, 2))
        return found * self._left[:, 0, 0]

    def choose(self, channel: int) -> None:
        """Take a channel, and what it explains off the others."""
        mine = slice(channel * self._block, (channel + 1) * self._block)
        # the inverse of the Cholesky factor of the channel's own products
        own = self._own[channel]
        if self._block == 1:
            inverse = own.rsqrt()
        else:
            factor = torch.linalg.cholesky_ex(own).L
            inverse = torch.linalg.solve_triangular(factor, torch.eye(self._block).to(own), upper=False)
        target = inverse @ self._cross[mine]
        new = self._shared(mine, inverse)
        self._left[channel] = 0.0
        blocks = new.unflatten(0, (-1, self._block))
        blocks *= self._left
        # A chosen channel's own block stays as it is, so that it has an inverse.
        self._own.baddbmm_(blocks, blocks.mT, alpha=-1.0)
        self._cross.addmm_(new, target, alpha=-1.0)

    @abstractmethod
    def _shared(self, mine: slice, inverse: Tensor) -> Tensor:
        """Return what all columns share with a channel's, which the `inverse` scales, (channels * block, block)."""


class ProductsOnDevice(DeviceReader):
    """By products: the Cholesky factor of the chosen columns grows by a block column a step."""

    def __init__(self, gram: Tensor, cross: Tensor, block: int, keep: int, least_pivot: float) -> None:
        own = gram.unflatten(1, (-1, block)).unflatten(0, (-1, block)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        super().__init__(own, _compressed(cross), gram.new_zeros(keep * block, len(gram)), least_pivot)
        self._gram, self._done = gram, 0

    def _shared(self, mine: slice, inverse: Tensor) -> Tensor:
        # The factor lies transposed, so that what is there so far is contiguous.
        factor, block = self._rows[: self._done], self._block
        shared = torch.addmm(self._gram[mine], factor[:, mine].mT, factor, alpha=-1.0)
        new = (inverse @ shared).mT.contiguous()
        # What is chosen already shares nothing with it.
        kept = self._left.expand(-1, block, 1).reshape(-1, 1)
        self._rows[self._done : self._done + block] = (new * kept).mT
        self._done += block
        return new


class SamplesOnDevice(DeviceReader):
    """By samples: what the chosen columns explain is projected out of these, fewer than there are columns."""

    def __init__(self, columns: Tensor, targets: Tensor, ridge: Tensor, block: int, least_pivot: float) -> None:
        blocks = columns.unflatten(0, (-1, block))
        own = blocks @ blocks.mT + torch.diag_embed(ridge.unflatten(0, (-1, block)))
        super().__init__(own, columns @ _compressed(targets), columns, least_pivot)
        self._left_over = torch.eye(columns.shape[1], dtype=columns.dtype, device=columns.device)

    def _shared(self, mine: slice, inverse: Tensor) -> Tensor:
        new = self._left_over @ (self._rows[mine].mT @ inverse.mT)
        self._left_over.addmm_(new, new.mT, alpha=-1.0)
        return self._rows @ new


def _compressed(cross: Tensor) -> Tensor:
    """Return targets with at most as many columns as rows, and the same inner products between rows, as a copy."""
    return cross.clone() if cross.shape[1] <= cross.shape[0] else torch.linalg.qr(cross.mT, mode="r").R.mT.contiguous()
