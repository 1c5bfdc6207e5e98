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

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nni_topo.errors import ConfigError, DataError
from nni_topo.maths.ties import first_largest

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_LEAST_PIVOT = 1e-10


def greedy_least_squares(
    gram: FloatArray | Sequence[FloatArray],
    cross: FloatArray | Sequence[FloatArray],
    keep: int,
    *,
    block: int | Sequence[int] = 1,
    parts: int = 1,
) -> IntArray:
    """Choose channels one by one for the least-squares prediction of targets.

    Parameters
    ----------
    gram : ndarray, shape (n * block, n * block), or a sequence of such
        ``X.T @ X`` of the columns of all channels, centred if a constant is fitted too. Channel j has the columns ``j *
        block ... (j + 1) * block - 1``. Where several layers read the channels, one for each.
    cross : ndarray, shape (n * block, outputs), or a sequence of such
        ``X.T @ Y`` with the targets.
    keep : int
        How many to choose, in [1, n].
    block : int or sequence of int, default=1
        Columns of a channel, at least 1; a sequence has one entry for each layer.
    parts : int, default=1
        Equal stretches of channels of which the same number is kept; divides n and ``keep``.

    Returns
    -------
    ndarray of int, shape (keep,)
        Channels in the order of choice; with one part each prefix is the choice for a smaller ``keep``. Of gains that
        are equal to 1e-6 of them the lowest channel wins.

    Raises
    ------
    ConfigError
        If ``keep``, ``block`` or ``parts`` is out of range.
    DataError
        If shapes don't fit or values aren't finite.

    Notes
    -----
    The gain of several layers is the sum of theirs: scale ``cross`` to weigh them.

    With N columns the cost is about ``N * keep * block * (keep * block + min(outputs, N))`` products.

    Examples
    --------
    >>> columns = np.eye(3) * [1.0, 3.0, 2.0]
    >>> greedy_least_squares(columns @ columns, columns @ [[1.0], [2.0], [3.0]], 2).tolist()
    [2, 1]
    """
    return forward_selection(gram, cross, keep, block=block, parts=parts)[0]


def forward_selection(
    gram: FloatArray | Sequence[FloatArray],
    cross: FloatArray | Sequence[FloatArray],
    keep: int,
    *,
    block: int | Sequence[int] = 1,
    parts: int = 1,
) -> tuple[IntArray, FloatArray]:
    """Return the order of :func:`greedy_least_squares`, and what each channel took off the squared error, (keep,)."""
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
    order, taken = np.empty(keep, dtype=np.int64), np.empty(keep)
    first = 0.0
    for step in range(keep):
        gains = np.sum([reader.gains() for reader in readers], axis=0)
        first = first or float(gains.max())
        # What is small beside the first gain is rounding: among such channels the lowest wins.
        order[step] = first_largest(np.where(left & (room[part] > 0), gains, -np.inf), first)
        taken[step] = gains[order[step]]
        left[order[step]] = False
        room[part[order[step]]] -= 1
        for reader in readers:
            reader.choose(int(order[step]))
    return order, taken


class _Reader:
    """The columns that one layer reads, kept orthogonal to those of the chosen channels."""

    def __init__(self, gram: FloatArray, cross: FloatArray, keep: int, block: int) -> None:
        self._gram = np.asarray(gram, dtype=np.float64)
        self._cross = _compressed(np.array(cross, dtype=np.float64))
        self._index = np.arange(len(gram)).reshape(-1, block)
        self._own = self._gram[self._index[:, :, None], self._index[:, None, :]]
        scale = np.trace(self._own, axis1=1, axis2=2) / block
        # A trace of ridge: columns that the chosen ones span leave a block of zeros, which has no factor.
        self._own += (_LEAST_PIVOT * np.where(scale > 0.0, scale, 1.0))[:, None, None] * np.eye(block)
        self._factor = np.zeros((len(gram), keep * block))
        self._done = 0

    def gains(self) -> FloatArray:
        """Return what each channel would take off the squared error, shape (n,)."""
        rows = self._cross.reshape(*self._index.shape, -1)
        if rows.shape[1] == 1:
            return np.asarray(np.einsum("cbp,cbp->c", rows, rows) / self._own[:, 0, 0])
        # trace(G^-1 R R'), G the block's own products and R those with the targets: what its least squares take off.
        return np.asarray((np.linalg.inv(self._own) * (rows @ rows.transpose(0, 2, 1))).sum((1, 2)))

    def choose(self, channel: int) -> None:
        """Take a channel, and what it explains off the others."""
        columns, past = self._index[channel], self._factor[:, : self._done]
        root = np.linalg.cholesky(self._own[channel])
        # One more block column of the Cholesky factor, for all channels: what they share with the chosen one and with
        # none before it.
        new = np.linalg.solve(root, (self._gram[:, columns] - past @ past[columns].T).T).T
        self._cross -= new @ np.linalg.solve(root, self._cross[columns])
        blocks = new.reshape(*self._index.shape, -1)
        # What is left of each channel's own block is its Schur complement.
        self._own -= blocks @ blocks.transpose(0, 2, 1)
        # Nothing of the chosen channel is left to invert; its gain isn't looked at again.
        self._own[channel] = np.eye(len(columns))
        self._factor[:, self._done : self._done + len(columns)] = new
        self._done += len(columns)


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
