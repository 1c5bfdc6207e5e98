"""Exchanges after greedy least-squares selection: a pruned channel replaces a kept one where that lowers the error.

Forward selection takes nothing back: a channel that was best alone stays when others have made it dispensable. The
exchange algorithm [1]_ looks at all pairs of a chosen and another channel, and makes the exchange that takes most off
the squared error, again and again until none does. The pruner ``exchange:ExchangePruner`` of the benchmarks does so
after the selection of `ReconstructionPruner`.

With ``G`` the products of the columns with each other and ``K`` the chosen ones, what an exchange takes off follows
exactly from the inverse of ``G_KK``, from the Schur complements of the others and from what these share with the chosen
ones, and a sweep [2]_ brings all of them up to date: no exchange needs another solution.

References
----------
.. [1] V. V. Fedorov, "Theory of Optimal Experiments", Academic Press, 1972.
.. [2] J. H. Goodnight, "A tutorial on the SWEEP operator", The American Statistician 33, 1979.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.linalg.blas import dgemm
from threadpoolctl import threadpool_limits

from nni_topo.errors import ConfigError
from nni_topo.maths.least_squares.greedy import (
    LEAST_PIVOT,
    FloatArray,
    IntArray,
    Products,
    SampleMatrix,
)
from nni_topo.maths.ties import RELATIVE, descending
from nni_topo.pruners.reconstruction.problems import ReconstructionProblem
from nni_topo.pruners.reconstruction.pruner import ReconstructionMetric, ReconstructionPruner
from nni_topo.rules import whole

_WORTHWHILE = 1e-5  # of what the chosen channels explain: an exchange that takes off no more isn't made
_TOGETHER = 2**22  # bytes of one block for every pair that is looked at together


def exchange(
    layers: Sequence[Products | SampleMatrix], chosen: Sequence[int] | IntArray, most: int, parts: int = 1
) -> tuple[IntArray, FloatArray]:
    """Exchange chosen channels for others as long as that lowers the squared error of the least-squares prediction.

    Parameters
    ----------
    layers : sequence of Products or SampleMatrix
        What each layer that reads the channels is to be met from; their errors are summed.
    chosen : sequence of int, shape (keep,)
        Channels that :func:`~nni_topo.maths.least_squares.greedy.forward_selection` chose, or others.
    most : int
        The most exchanges, at least 0.
    parts : int, default=1
        Equal segments of channels; an exchange stays within one.

    Returns
    -------
    channels : ndarray of int, shape (keep,)
        What is chosen now, each new one in the place of the one that went. No prefix is a choice for fewer.
    taken : ndarray, shape (exchanges,)
        What each exchange took off the squared error.

    Raises
    ------
    ConfigError
        If ``chosen`` isn't a set of channels, or ``most`` or ``parts`` is out of range.
    DataError
        If shapes don't fit or values aren't finite.

    Notes
    -----
    An exchange is made if it takes off more than 1e-5 of what the chosen channels explain. Of exchanges that are equal
    to 1e-6 of that, the one whose new channel, then whose old one has the lowest index wins.

    With N columns, K of them chosen, the cost is about ``N * K * K`` products before, as much as selection, and ``N *
    block * (4 * K + outputs)`` an exchange, beside small ones for all pairs whose new channel would, added, take off
    more than the best exchange found.
    """
    whole(0).check("most", most, "exchange")
    channels = layers[0].channels
    order = np.array(chosen, dtype=np.int64)
    if not len(np.unique(order)) == len(order) or not 0 <= order.min() <= order.max() < channels:
        raise ConfigError(f"chosen must be different channels in [0, {channels - 1}], got {order.tolist()} (exchange)")
    if parts < 1 or channels % parts:
        raise ConfigError(f"parts must divide {channels} channels, got {parts} (parts)")
    part = np.arange(channels) // (channels // parts)
    taken: list[float] = []
    if most and len(order) < channels:
        with threadpool_limits(1, "blas"):  # threads would wait for each other's small products
            readers = [
                _InProducts(one, order) if isinstance(one, Products) else _InSamples(one, order) for one in layers
            ]
            _improve(readers, order, part, taken, most)
    return order, np.array(taken)


@dataclass(kw_only=True, eq=False)
class ExchangeMetric(ReconstructionMetric):
    """Forward selection, then at most so many exchanges."""

    swaps: int

    def chosen(self, problem: ReconstructionProblem, keep: int, parts: int) -> IntArray:
        """Return the kept channels of one unit, ``(keep,)``."""
        return exchange(problem.layers, problem.choose(keep, parts), self.swaps, parts)[0]


class ExchangePruner(ReconstructionPruner):
    """`ReconstructionPruner` with at most ``swaps`` exchanges of a kept and a removed channel of each unit."""

    def __init__(
        self,
        model: Any,
        config_list: list[dict[str, Any]],
        evaluator: Any = None,
        existed_wrappers: Any = None,
        *,
        calibration: Any = None,
        swaps: int = 1000,
        sequential: bool = False,
        seed: int = 0,
    ) -> None:
        self.swaps = swaps
        super().__init__(
            model, config_list, evaluator, existed_wrappers, calibration=calibration, sequential=sequential, seed=seed
        )
        self.calculator = ExchangeMetric(problems=self.calculator.problems, swaps=swaps)


def _improve(readers: Sequence[_Reader], order: IntArray, part: IntArray, taken: list[float], most: int) -> None:
    """Make exchanges in place, and note what each took off."""
    met = sum(reader.explained() for reader in readers)
    while len(taken) < most:
        gain, coming, leaving = _best(readers, order, part, met)
        if gain <= _WORTHWHILE * met:
            break
        for reader in readers:
            reader.sweep(leaving)
            reader.sweep(coming)
        order[order == leaving] = coming
        taken.append(gain)
        met += gain


def _best(readers: Sequence[_Reader], order: IntArray, part: IntArray, met: float) -> tuple[float, int, int]:
    """Return what the best exchange takes off, the channel that comes and the one that goes."""
    kept = np.sort(order)
    left = np.setdiff1d(np.arange(len(part)), kept)
    alone = np.sum([reader.gains(left) for reader in readers], axis=0)
    gains = np.full((len(left), len(kept)), -np.inf)
    best, even = _WORTHWHILE * met, RELATIVE * met
    step = max(1, _TOGETHER // (8 * max(reader.block for reader in readers) ** 2 * len(kept)))
    ranked = descending(alone)
    for start in range(0, len(ranked), step):
        some = ranked[start : start + step]
        # Beside all that are kept a channel takes off at least what it does in the place of one.
        if alone[some[0]] < best - even:
            break
        found = np.sum([reader.exchanges(left[some], kept) for reader in readers], axis=0)
        gains[some] = np.where(part[left[some], None] == part[kept], found, -np.inf)
        best = max(best, float(gains[some].max()))
    coming, leaving = np.unravel_index(int((gains >= gains.max() - even).argmax()), gains.shape)
    return float(gains[coming, leaving]), int(left[coming]), int(kept[leaving])


class _Reader(ABC):
    """What one layer reads, with some channels chosen: their blocks of its swept products."""

    # ``own`` (n, block, block) and ``rest`` (n * block, outputs) are of a channel that is left out its Schur complement
    # and what it shares with what is left of the targets: trace(own^-1 rest rest') is what it would take off the error.
    # Of a chosen one they are such that the error is as much more without it; for products, the inverse's block and the
    # solution. ``diagonal`` (n * block,) scales a block where it goes over from the one to the other.

    def __init__(self, block: int, own: FloatArray, rest: FloatArray, diagonal: FloatArray, chosen: IntArray) -> None:
        self.block, self._own, self._rest = block, own, np.ascontiguousarray(rest)
        self._diagonal = diagonal.reshape(-1, block, 1)
        self._is_kept = np.isin(np.arange(len(own)), chosen)

    @abstractmethod
    def explained(self) -> float:
        """Return what the chosen channels take off the squared error."""

    def gains(self, channels: IntArray) -> FloatArray:
        """Return what each of some channels would take off the squared error, or costs without it, (channels,)."""
        rest = self._rest_of(channels)
        return _explained(self._own[channels], rest @ rest.transpose(0, 2, 1))

    def exchanges(self, coming: IntArray, leaving: IntArray) -> FloatArray:
        """Return what exchanges take off the squared error, (coming, leaving)."""
        shared = self._shared(coming, leaving)  # (coming, leaving, block, block)
        through = _times(shared, _inverses(self._own[leaving]))
        new, old = self._rest_of(coming), self._rest_of(leaving)
        # Without the old channel, what is left of the new one's columns and of its share in the targets is more.
        own = self._own[coming][:, None] + _times(through, shared.swapaxes(2, 3))
        both = (new.reshape(len(coming) * self.block, -1) @ old.reshape(len(leaving) * self.block, -1).T).reshape(
            len(coming), self.block, len(leaving), self.block
        )
        mixed = _times(through, both.transpose(0, 2, 3, 1))
        met = (new @ new.transpose(0, 2, 1))[:, None] + mixed + mixed.swapaxes(2, 3)
        met += _times(_times(through, old @ old.transpose(0, 2, 1)), through.swapaxes(2, 3))
        return _explained(own, met) - self.gains(leaving)

    def sweep(self, channel: int) -> None:
        """Take a chosen channel out, or another one in."""
        mine = slice(channel * self.block, (channel + 1) * self.block)
        shared, inverse = self._column(channel), _inverses(self._own[channel])
        step = (shared if self._is_kept[channel] else -shared) @ inverse
        moved = step.reshape(self._own.shape) @ shared.reshape(self._own.shape).transpose(0, 2, 1)
        self._own += np.where(self._is_kept, -1.0, 1.0)[:, None, None] * moved
        scaled = self._diagonal[channel] * inverse
        self._own[channel] = scaled * self._diagonal[channel].T
        rest = self._rest[mine].copy()
        _add_product(self._rest, step, rest)
        self._rest[mine] = scaled @ rest
        self._follow(channel, step, inverse)
        self._is_kept[channel] ^= True

    @abstractmethod
    def _shared(self, coming: IntArray, leaving: IntArray) -> FloatArray:
        """Return the blocks that channels left out share with chosen ones, (coming, leaving, block, block)."""

    @abstractmethod
    def _column(self, channel: int) -> FloatArray:
        """Return the blocks that all channels share with one, (n * block, block)."""

    @abstractmethod
    def _follow(self, channel: int, step: FloatArray, inverse: FloatArray) -> None:
        """Sweep what the shared blocks come from: for all columns a step (n * block, block) times the channel's own."""

    def _rest_of(self, channels: IntArray) -> FloatArray:
        return self._rest.reshape(len(self._own), self.block, -1)[channels]


class _InProducts(_Reader):
    """By products: of the swept matrix, the columns of the chosen channels."""

    def __init__(self, layer: Products, chosen: IntArray) -> None:
        gram, block = np.asarray(layer.gram, dtype=np.float64), layer.block
        cross = _compressed(layer.cross)
        self._gram, self._slots = gram, np.array(chosen)
        self._slot = np.zeros(len(gram) // block, dtype=np.int64)
        self._slot[chosen] = np.arange(len(chosen))
        self._index = np.arange(len(gram)).reshape(-1, block)
        own = gram[self._index[:, :, None], self._index[:, None, :]]
        scale = np.trace(own, axis1=1, axis2=2) / block
        trace = LEAST_PIVOT * np.where(scale > 0.0, scale, 1.0)  # as in selection: columns that others span have none
        own += trace[:, None, None] * np.eye(block)
        kept = self._index[chosen].ravel()
        among = gram[np.ix_(kept, kept)]
        among.flat[:: len(kept) + 1] += trace[chosen].repeat(block)
        inverse = cho_solve(cho_factor(among, lower=True), np.eye(len(kept)))
        inverse = (inverse + inverse.T) / 2.0
        across = gram[:, kept]
        # Of a column left out its coefficients on the chosen ones; of a chosen one the inverse's row, negative.
        table = across @ inverse
        rows = table.reshape(-1, block, len(kept))
        own -= rows @ across.reshape(rows.shape).transpose(0, 2, 1)
        places = np.arange(len(chosen))
        own[chosen] = inverse.reshape(len(chosen), block, len(chosen), block)[places, :, places]
        table[kept] = -inverse
        solution = inverse @ cross[kept]
        self._explained = float((solution * cross[kept]).sum())
        rest = cross - across @ solution
        rest[kept] = solution
        self._table = np.ascontiguousarray(table)
        super().__init__(block, own, rest, np.ones(len(gram)), chosen)

    def explained(self) -> float:
        return self._explained

    def _shared(self, coming: IntArray, leaving: IntArray) -> FloatArray:
        blocks = self._table.reshape(len(self._own), self.block, len(self._slots), self.block)
        return np.asarray(blocks[coming][:, :, self._slot[leaving]].transpose(0, 2, 1, 3))

    def _column(self, channel: int) -> FloatArray:
        if self._is_kept[channel]:
            return np.array(self._table[:, self._columns_of(channel)])
        # The free slot is empty.
        mine, kept = self._index[channel], self._index[self._slots].ravel()
        column = np.ascontiguousarray(self._gram[:, mine] - self._table @ self._gram[np.ix_(kept, mine)])
        is_taken = self._is_kept[self._slots]
        own = self._table[mine].reshape(self.block, -1, self.block).transpose(1, 2, 0)
        column.reshape(self._own.shape)[self._slots[is_taken]] = own[is_taken]
        column[mine] = self._own[channel]
        return column

    def _follow(self, channel: int, step: FloatArray, inverse: FloatArray) -> None:
        mine = self._index[channel]
        row = self._table[mine].copy()
        _add_product(self._table, step, row)
        self._table[mine] = inverse @ row
        if self._is_kept[channel]:
            self._table[:, self._columns_of(channel)] = 0.0
            return
        free = int(np.flatnonzero(~self._is_kept[self._slots])[0])
        self._slots[free], self._slot[channel] = channel, free
        self._table[:, self._columns_of(channel)] = -step
        self._table[mine, self._columns_of(channel)] = -inverse

    def _columns_of(self, channel: int) -> slice:
        return slice(self._slot[channel] * self.block, (self._slot[channel] + 1) * self.block)


class _InSamples(_Reader):
    """By samples: the columns, what the chosen ones explain taken out of them."""

    def __init__(self, layer: SampleMatrix, chosen: IntArray) -> None:
        self._columns, block = np.asarray(layer.columns, dtype=np.float64), layer.block
        targets = _compressed(layer.targets)
        diagonal = np.maximum(layer.ridge, LEAST_PIVOT * np.square(self._columns).sum(1))
        diagonal[diagonal == 0.0] = 1.0
        count = len(self._columns) // block
        kept = np.arange(len(self._columns)).reshape(-1, block)[chosen].ravel()
        scaled = self._columns[kept] / diagonal[kept, None]
        among = np.eye(self._columns.shape[1]) + self._columns[kept].T @ scaled
        left_over = cho_solve(cho_factor(among, lower=True), np.eye(len(among)))
        self._left_over = np.ascontiguousarray(self._columns @ left_over)
        rest = self._left_over @ targets
        # Of the targets' squares, less the ridge, the chosen columns explain what isn't left over.
        self._explained = float((targets * (targets - left_over @ targets)).sum())
        blocks = self._columns.reshape(count, block, -1)
        within = self._left_over.reshape(blocks.shape) @ blocks.transpose(0, 2, 1)
        sign = np.where(np.isin(np.arange(count), chosen), -1.0, 1.0)[:, None, None]
        own = sign * within + diagonal.reshape(count, block, 1) * np.eye(block)
        super().__init__(block, own, rest, diagonal, chosen)

    def explained(self) -> float:
        return self._explained

    def _shared(self, coming: IntArray, leaving: IntArray) -> FloatArray:
        new, old = (
            values.reshape(len(self._own), self.block, -1)[channels].reshape(len(channels) * self.block, -1)
            for values, channels in ((self._left_over, coming), (self._columns, leaving))
        )
        shared = (new @ old.T).reshape(len(coming), self.block, len(leaving), self.block)
        return np.asarray(shared.transpose(0, 2, 1, 3))

    def _column(self, channel: int) -> FloatArray:
        return np.asarray(self._left_over @ self._columns[channel * self.block : (channel + 1) * self.block].T)

    def _follow(self, channel: int, step: FloatArray, inverse: FloatArray) -> None:
        del inverse
        _add_product(self._left_over, step, self._left_over[channel * self.block : (channel + 1) * self.block].copy())


def _inverses(blocks: FloatArray) -> FloatArray:
    return np.asarray(np.linalg.inv(blocks), dtype=np.float64)


def _explained(own: FloatArray, met: FloatArray) -> FloatArray:
    """Return what blocks (..., block, block) take off the squared error: ``trace(G^-1 R R')`` of ``G`` and ``R R'``."""
    if own.shape[-1] == 1:
        return np.asarray(met[..., 0, 0] / own[..., 0, 0])
    return np.asarray((np.linalg.inv(own) * met).sum((-2, -1)))


def _compressed(cross: FloatArray) -> FloatArray:
    """Return targets with at most as many columns as rows, and the same inner products between rows, as a copy."""
    values = np.array(cross, dtype=np.float64, order="C")
    if values.shape[1] <= values.shape[0]:
        return values
    return np.ascontiguousarray(np.linalg.qr(values.T, mode="r").T)


def _times(left: FloatArray, right: FloatArray) -> FloatArray:
    """Multiply square blocks (..., block, block); those of one column element by element, which is faster."""
    return left * right if left.shape[-1] == 1 else left @ right


def _add_product(values: FloatArray, left: FloatArray, right: FloatArray) -> None:
    """Add a product of a tall and a wide matrix to values that lie row by row, in place."""
    dgemm(1.0, right.T, left.T, 1.0, values.T, overwrite_c=True)
