"""Products of the windows of a one-dimensional convolution, exactly and without writing the windows down.

Neighbouring windows share all but one of their elements. With ``z(t)`` the products ``x(t) x(t + lag)^T``, summed over
entries, the products of kernel elements ``i`` and ``i + lag`` are the sum of ``z`` over ``t = i, ..., i + P - 1`` for
``P`` positions, which a cumulative sum gives for all ``i`` at once: with kernels of ``k`` elements that takes ``k``
products of channels for each pixel, not ``k^2``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

_SMALL_PRODUCTS = 2  # how many times longer small products take than one large product of as many multiplications


@dataclass(frozen=True)
class Windows:
    """Rows (groups, entries * positions, channels * kernel): windows of sequences at all positions, with stride 1.

    Rows are ordered by entry and then by position, columns by channel and then by kernel element.

    Attributes
    ----------
    sequences : Tensor of float64, shape (groups, entries, channels, pixels)
        Inputs of the convolution, with their padding.
    kernel : int
        Elements of a window, at least 1.
    dilation : int
        Pixels between neighbouring elements, at least 1.
    """

    sequences: Tensor
    kernel: int
    dilation: int = 1

    @property
    def positions(self) -> int:
        """Positions of the window in each entry."""
        return self.sequences.shape[3] - self._reach

    @property
    def columns(self) -> int:
        """Channels times kernel elements."""
        return self.sequences.shape[2] * self.kernel

    @property
    def _reach(self) -> int:
        return (self.kernel - 1) * self.dilation

    def of_rows(self, rows: Tensor) -> Windows:
        """Return some of the rows, marked by bool (rows,); of an entry all or none."""
        return Windows(self.sequences[:, rows[:: self.positions]], self.kernel, self.dilation)

    def total(self) -> Tensor:
        """Return the sums over rows, (groups, columns)."""
        starts = range(0, self._reach + 1, self.dilation)
        sums = self.sequences.sum(1)
        return torch.stack([sums[..., start : start + self.positions].sum(-1) for start in starts], 2).flatten(1)

    def products(self) -> Tensor:
        """Return ``rows.mT @ rows``, (groups, columns, columns)."""
        groups, _, channels, _ = self.sequences.shape
        # (groups, pixels, entries, channels)
        by_pixel, positions = self.sequences.permute(0, 3, 1, 2).contiguous(), self.positions
        # From a position's pixels to those that follow it: what comes in after the last position, and what goes out.
        after, before = by_pixel[:, positions:], by_pixel[:, : self._reach]
        ends, signed = torch.cat([after, before], 2), torch.cat([after, -before], 2)
        products = by_pixel.new_empty(groups, self.kernel, self.kernel, channels, channels)
        for lag in range(self.kernel):
            behind, firsts = lag * self.dilation, (self.kernel - lag - 1) * self.dilation
            first = by_pixel[:, :positions].flatten(1, 2).mT @ by_pixel[:, behind : behind + positions].flatten(1, 2)
            changes = signed[:, :firsts].mT @ ends[:, behind : behind + firsts]
            sums = torch.cat([first.unsqueeze(1), changes], 1).cumsum_(1)[:, :: self.dilation].permute(0, 2, 3, 1)
            products.diagonal(lag, dim1=1, dim2=2).copy_(sums)
            products.diagonal(-lag, dim1=1, dim2=2).copy_(sums.transpose(1, 2))
        return products.permute(0, 3, 1, 4, 2).flatten(3).flatten(1, 2)

    def times(self, weights: Tensor) -> Tensor:
        """Return ``rows @ weights`` for weights (groups, columns, outputs): (groups, rows, outputs)."""
        if not weights.shape[2]:
            return weights.new_zeros(len(weights), self.sequences.shape[1] * self.positions, 0)
        kernels = weights.mT.unflatten(2, (-1, self.kernel))
        products = [
            functional.conv1d(sequences, kernel, dilation=self.dilation)
            for sequences, kernel in zip(self.sequences, kernels, strict=True)
        ]
        return torch.stack(products).transpose(2, 3).flatten(1, 2)

    def cross(self, values: Tensor) -> Tensor:
        """Return ``rows.mT @ values`` for values (groups, rows, outputs): (groups, columns, outputs)."""
        groups, entries = self.sequences.shape[:2]
        if not values.shape[2]:
            return values.new_zeros(groups, self.columns, 0)
        # As a convolution of channels, in which entries are summed over: pixels, and the kernel is the values.
        by_output = values.unflatten(1, (entries, self.positions)).permute(0, 3, 1, 2)
        products = [
            functional.conv1d(sequences.transpose(0, 1), kernel, dilation=1)[..., :: self.dilation]
            for sequences, kernel in zip(self.sequences, by_output, strict=True)
        ]
        return torch.stack(products).permute(0, 1, 3, 2).flatten(1, 2)


def windows_pay(kernel: int, channels: int, outputs: int, entries: int, positions: int, sampled: int) -> bool:
    """Tell whether all windows of ``entries`` sequences take less work than ``sampled`` ones that are written down.

    ``channels`` and ``outputs`` are those of a group.
    """
    columns = channels * kernel
    if kernel == 1 or entries * positions < columns:  # fewer rows than columns are kept as they are
        return False
    rows = min(sampled, entries * positions)
    written = rows * columns * (columns / 2 + outputs)
    summed = entries * columns * ((positions + kernel) * channels + positions * outputs)
    return _SMALL_PRODUCTS * summed < written
