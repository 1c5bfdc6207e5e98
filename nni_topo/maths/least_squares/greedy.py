"""Greedy least-squares selection: which channels predict best what the next layer has to put out.

Forward selection: the channel is added that takes most off the squared error of the least-squares prediction from
the channels chosen so far. A channel may be a block of several columns, e.g. the kernel elements of a patch. All
columns are kept orthogonal to the chosen ones by a growing Cholesky factor, so that a step costs no new solution.

References
----------
.. [1] S. Chen, S. A. Billings and W. Luo, "Orthogonal least squares methods and their application to non-linear system
   identification", International Journal of Control 50, 1989.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nni_topo.errors import ConfigError, DataError
from nni_topo.maths.ties import descending, first_largest

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_LEAST_PIVOT = 1e-10
_FOREMOST, _AT_ONCE, _STALE = 64, 8, 0.5


def greedy_least_squares(
    gram: FloatArray | Sequence[FloatArray],
    cross: FloatArray | Sequence[FloatArray],
    keep: int,
    *,
    block: int | Sequence[int] = 1,
    parts: int = 1,
) -> IntArray:
    """Choose ``keep`` channels one by one for the least-squares prediction of targets; indices in the order of choice.

    ``gram``, (n * block, n * block), is ``X.T @ X`` of the columns of all n channels, centred if a constant is fitted
    too, ``block`` columns of each channel side by side; ``cross``, (n * block, outputs), ``X.T @ Y`` with the targets.
    Where several layers read the channels all three are sequences; the gain is the sum of theirs, so scale ``cross`` to
    weigh them. Of ``parts`` equal stretches of channels the same number is kept; with one, each prefix is the choice
    for a smaller ``keep``. Of gains that are equal to 1e-6 of them the lowest channel wins. ConfigError if a number is
    out of range, DataError if shapes don't fit or values aren't finite.

    Of more than 64 channels, all are compared at every eighth step, or sooner where the foremost 64 are used up, and
    these 64 in between: of what can be explained, no more than 0.1 % was lost by that in any problem tried. With N
    columns the cost is about ``N * keep * block * (keep * block + min(outputs, N))`` products.

    Examples
    --------
    >>> columns = np.eye(3) * [1.0, 3.0, 2.0]
    >>> greedy_least_squares(columns @ columns, columns @ [[1.0], [2.0], [3.0]], 2).tolist()
    [2, 1]
    """
    grams = [gram] if isinstance(gram, np.ndarray) else list(gram)
    crosses = [cross] if isinstance(cross, np.ndarray) else list(cross)
    blocks = [block] * len(grams) if isinstance(block, int) else list(block)
    channels = _check(grams, crosses, keep, blocks)
    if parts < 1 or channels % parts or keep % parts:
        raise ConfigError(f"parts must divide {channels} channels and {keep} kept ones, got {parts} (parts)")
    readers = [_Reader(*problem) for problem in zip(grams, crosses, [keep] * len(grams), blocks, strict=True)]
    part = np.arange(channels) // (channels // parts)
    room = np.full(parts, keep // parts)
    left = np.ones(channels, dtype=bool)
    order: list[int] = []
    first = 0.0
    while len(order) < keep:
        gains = _gains(readers)
        first = first or float(gains.max())
        free = np.flatnonzero(left & (room[part] > 0))
        ranked = free[descending(gains[free], first)]
        # For a few steps only the foremost are kept up to date; then, or as soon as the best of these falls well below
        # where the others were, all are, by products of larger matrices.
        near, bound = np.sort(ranked[:_FOREMOST]), float(gains[ranked[_FOREMOST:]].max(initial=-np.inf))
        fewer = [reader.part(near) for reader in readers] if len(free) > _FOREMOST else readers
        near = near if fewer is not readers else np.arange(channels)
        taken: list[int] = []
        while len(order) < keep and len(taken) < _AT_ONCE:
            now = np.where(left[near] & (room[part[near]] > 0), _gains(fewer), -np.inf)
            # What is small beside the first gain is rounding: among such channels the lowest wins.
            place = first_largest(now, first)
            if taken and now.max() < _STALE * bound:
                break
            channel = int(near[place])
            order.append(channel)
            taken.append(channel)
            left[channel] = False
            room[part[channel]] -= 1
            for reader in fewer:
                reader.take([place])
        if fewer is not readers and len(order) < keep:
            for reader in readers:
                reader.take(taken)
    return np.array(order, dtype=np.int64)


def _gains(readers: list[_Reader]) -> FloatArray:
    """Return what each channel would take off the squared error, shape (n,)."""
    return np.asarray(torch.stack([reader.gains() for reader in readers]).sum(0).numpy())


class _Reader:
    """The columns of some channels that one layer reads, kept orthogonal to those of the chosen channels."""

    def __init__(self, gram: FloatArray, cross: FloatArray, keep: int, block: int) -> None:
        self._gram = torch.from_numpy(np.asarray(gram, dtype=np.float64))
        self._index = torch.arange(len(gram)).view(-1, block)  # where the columns of each channel lie in `gram`
        self._cross = torch.from_numpy(_compressed(np.array(cross, dtype=np.float64))).unflatten(0, (-1, block))
        self._own = self._gram[self._index[:, :, None], self._index[:, None, :]]
        scale = self._own.diagonal(dim1=1, dim2=2).mean(1)
        # A trace of ridge: columns that the chosen ones span leave a block of zeros, which has no factor.
        pivots = _LEAST_PIVOT * scale.masked_fill(scale <= 0.0, 1.0)
        self._own.diagonal(dim1=1, dim2=2).add_(pivots.unsqueeze(1))
        self._factor = torch.zeros(keep * block, len(gram), dtype=torch.float64)  # transposed: it grows by whole rows
        self._done = 0

    def part(self, channels: IntArray) -> _Reader:
        """Return a reader of some channels, ascending, that goes on by itself."""
        other, index = copy.copy(self), torch.from_numpy(channels)
        other._index, other._cross, other._own = self._index[index], self._cross[index], self._own[index]
        room = self._done + _AT_ONCE * self._index.shape[1]
        columns = torch.arange(self._index.numel()).view(self._index.shape)[index].flatten()
        other._factor = self._factor[:room, columns]
        return other

    def gains(self) -> Tensor:
        """Return what each channel would take off the squared error, shape (n,)."""
        if self._index.shape[1] == 1:
            single: Tensor = self._cross.square().sum((1, 2)) / self._own[:, 0, 0]
            return single
        # trace(G^-1 R R'), G the block's own products and R those with the targets: what its least squares take off.
        gains: Tensor = (torch.linalg.inv(self._own) * (self._cross @ self._cross.mT)).sum((1, 2))
        return gains

    def take(self, places: list[int]) -> None:
        """Take channels, by their places among those of this reader, and what they explain off all others."""
        done, (channels, block) = self._done, self._index.shape
        columns = torch.arange(channels * block).view(channels, block)[places].flatten()
        end = done + len(columns)
        # What those taken share with all columns and with none taken before: (columns taken, columns).
        shared = self._gram[self._index[places].flatten()]
        shared = shared if len(self._gram) == channels * block else shared[:, self._index.flatten()]
        shared.addmm_(self._factor[:done, columns].mT, self._factor[:done], alpha=-1)
        inner, each = shared[:, columns].view(len(places), block, len(places), block), torch.arange(len(places))
        inner[each, :, each] = self._own[places]
        root = torch.linalg.cholesky(inner.view(len(columns), len(columns)))
        new = torch.linalg.solve_triangular(root, shared, upper=False, out=self._factor[done:end])
        met = torch.linalg.solve_triangular(root, self._cross[places].flatten(0, 1), upper=False)
        self._cross.flatten(0, 1).addmm_(new.mT, met, alpha=-1)
        # What is left of each channel's own block is its Schur complement.
        blocks = new.view(-1, channels, block).transpose(0, 1)
        self._own.baddbmm_(blocks.mT, blocks, alpha=-1)
        # Nothing of the chosen channels is left to invert; their gains aren't looked at again.
        self._own[places] = torch.eye(block, dtype=torch.float64)
        self._done = end


def _compressed(cross: FloatArray) -> FloatArray:
    """Return targets with at most as many columns as rows, and the same inner products between rows."""
    if cross.shape[1] <= cross.shape[0]:
        return cross
    # Gains look at targets only through inner products of rows, and updates mix rows: a rotation of the targets changes
    # neither.
    factor: FloatArray = np.asarray(np.linalg.qr(cross.T, mode="r"))
    return np.ascontiguousarray(factor.T)


def _check(grams: list[FloatArray], crosses: list[FloatArray], keep: int, blocks: list[int]) -> int:
    """Return the number of channels."""
    if not grams or not len(grams) == len(crosses) == len(blocks):
        raise DataError(
            f"gram, cross and block must belong together, got {len(grams)}, {len(crosses)} and {len(blocks)} of them"
        )
    for gram, cross, block in zip(grams, crosses, blocks, strict=True):
        size = len(gram)
        if gram.shape != (size, size) or cross.ndim != 2 or len(cross) != size:
            raise DataError(f"gram must be square and cross have as many rows, got {gram.shape} and {cross.shape}")
        if not (np.isfinite(gram).all() and np.isfinite(cross).all()):
            raise DataError("gram and cross must be finite, got NaN or infinity")
        if block < 1 or size % block:
            raise ConfigError(f"block must divide the number of columns, got {block} for {size} columns (block)")
    channels = {len(gram) // block for gram, block in zip(grams, blocks, strict=True)}
    if len(channels) > 1:
        raise DataError(f"all layers must read the same channels, got {sorted(channels)} of them (gram, block)")
    (count,) = channels
    if not 1 <= keep <= count:
        raise ConfigError(f"keep must be in [1, {count}], got {keep} (keep)")
    return count
