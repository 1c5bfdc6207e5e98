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

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg.blas import dgemm
from threadpoolctl import ThreadpoolController

from nni_topo.errors import ConfigError, DataError
from nni_topo.maths.least_squares.on_device import DeviceReader, ProductsOnDevice, SamplesOnDevice
from nni_topo.maths.ties import first_largest

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

CPU = torch.device("cpu")
LEAST_PIVOT = 1e-10
"""Of a channel's own products, on their diagonal: what keeps columns that the chosen ones span from having none."""

_NOTHING = 1e-5  # of what the chosen ones took: where no channel takes more, the others follow by what they would take
_MANY = 2**16  # numbers of a layer: fewer are worked through by the CPU sooner than a GPU has launched its operations
_CACHED = 2**20  # bytes of targets that are worked on at a time


def forward_selection(
    layers: Sequence[Products | SampleMatrix], keep: int, parts: int = 1
) -> tuple[IntArray, FloatArray]:
    """Choose channels one by one for the least-squares prediction of targets.

    Parameters
    ----------
    layers : sequence of Products or SampleMatrix
        What each layer that reads the channels is to be met from. The gain of several is the sum of theirs.
    keep : int
        How many to choose, in [1, n].
    parts : int, default=1
        Equal segments of channels of which the same number is kept; divides n and ``keep``.

    Returns
    -------
    channels : ndarray of int, shape (keep,)
        In the order of choice; with one part each prefix is the choice for a smaller ``keep``. Of gains that are equal
        to 1e-6 of them the lowest channel wins. From where no channel takes off more than 1e-5 of what those before it
        took, the others follow by the gains that they have then: the targets are met.
    taken : ndarray, shape (keep,)
        What each channel took off the squared error.

    Raises
    ------
    ConfigError
        If ``keep`` or ``parts`` is out of range, or a block doesn't divide the columns.
    DataError
        If shapes don't fit or values aren't finite.

    Notes
    -----
    With N columns the cost is about ``N * keep * block * (keep * block + min(outputs, N))`` products.

    Examples
    --------
    >>> columns = np.eye(3) * [1.0, 3.0, 2.0]
    >>> forward_selection([Products(columns @ columns, columns @ [[1.0], [2.0], [3.0]], 1)], 2)[0].tolist()
    [2, 1]
    """
    channels = channels_read(layers, keep)
    if parts < 1 or channels % parts or keep % parts:
        raise ConfigError(f"parts must divide {channels} channels and {keep} kept ones, got {parts} (parts)")
    device = _device(layers)
    with on_one_thread():
        if device.type != "cpu":
            return _chosen([_on_device(one, keep, device) for one in layers], channels, keep, parts)
        readers = [_InProducts(one, keep) if isinstance(one, Products) else _InSamples(one) for one in layers]
        return _chosen(readers, channels, keep, parts)


def _device(layers: Sequence[Products | SampleMatrix]) -> torch.device:
    """Return where channels are chosen: on the network's device if the numbers are many, else on the CPU."""
    for layer in layers:
        rows, outputs = (layer.gram, layer.cross) if isinstance(layer, Products) else (layer.columns, layer.targets)
        if layer.device.type != "cpu" and max(rows.size, len(rows) * outputs.shape[1]) >= _MANY:
            return layer.device
    return CPU


def _on_device(layer: Products | SampleMatrix, keep: int, device: torch.device) -> DeviceReader:
    """Return a layer whose columns lie on a device."""

    def tensor(values: FloatArray) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=device)

    if isinstance(layer, Products):
        return ProductsOnDevice(tensor(layer.gram), tensor(layer.cross), layer.block, keep, LEAST_PIVOT)
    given = tensor(layer.columns), tensor(layer.targets), tensor(layer.ridge)
    return SamplesOnDevice(*given, layer.block, LEAST_PIVOT)


def _chosen(
    readers: Sequence[_Reader] | Sequence[DeviceReader], channels: int, keep: int, parts: int
) -> tuple[IntArray, FloatArray]:
    part = np.arange(channels) // (channels // parts)
    room = np.full(parts, keep // parts)
    left = np.ones(channels, dtype=bool)
    order, taken = np.empty(keep, dtype=np.int64), np.empty(keep)
    gains, is_met = np.empty(0), False
    for step in range(keep):
        if not is_met:
            found = sum(reader.gains() for reader in readers)
            gains = found.cpu().numpy() if isinstance(found, torch.Tensor) else np.asarray(found)
        open_gains = np.where(left & (room[part] > 0), gains, -np.inf)
        # What is small beside the first gain is rounding: among such channels the lowest wins.
        order[step] = first_largest(open_gains, taken[0] if step else 0.0)
        taken[step] = gains[order[step]]
        left[order[step]] = False
        room[part[order[step]]] -= 1
        is_met = is_met or taken[step] <= _NOTHING * taken[:step].sum()
        if not is_met and step < keep - 1:  # nobody asks what is left after the last one
            for reader in readers:
                reader.choose(int(order[step]))
    return order, taken


def on_one_thread() -> AbstractContextManager[object]:
    """Keep BLAS on one thread for a while."""
    # A step's products are tall and a block wide: threads would only wait for each other, above all beside other work.
    limited: AbstractContextManager[object] = _libraries().limit(limits=1, user_api="blas")
    return limited


@cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()


@dataclass(frozen=True)
class Products:
    """What a layer reads and has to put out: ``X.T @ X`` (n * block, n * block), ``X.T @ Y`` (n * block, outputs)."""

    gram: FloatArray
    cross: FloatArray
    block: int
    device: torch.device = CPU  # the network's


@dataclass(frozen=True)
class SampleMatrix:
    """The same by samples, for few of them: X.T (n * block, samples), Y (samples, outputs), a ridge (n * block,)."""

    columns: FloatArray
    targets: FloatArray
    ridge: FloatArray
    block: int
    device: torch.device = CPU

    @property
    def gram(self) -> FloatArray:
        """``X.T @ X``, the ridge on its diagonal."""
        return np.asarray(self.columns @ self.columns.T + np.diag(self.ridge))

    @property
    def cross(self) -> FloatArray:
        """``X.T @ Y``."""
        return np.asarray(self.columns @ self.targets)


class _Reader(ABC):
    """The columns that one layer reads, kept orthogonal to those of the chosen channels."""

    # Channels that were chosen are dropped: the last one takes their place, so that what is left lies together.

    def __init__(self, own: FloatArray, cross: FloatArray, rows: FloatArray) -> None:
        # `own` (n, block, block) are the products of each channel's columns with each other, `rows` one for each
        # column, of what else is to be moved with it.
        count, self._block = own.shape[:2]
        scale = np.trace(own, axis1=1, axis2=2) / self._block
        # A trace of ridge: columns that the chosen ones span leave a block of zeros, which has no factor.
        self._own = own + (LEAST_PIVOT * np.where(scale > 0.0, scale, 1.0))[:, None, None] * np.eye(self._block)
        self._cross, self._rows = cross, rows
        self._channels, self._place, self._left = np.arange(count), np.arange(count), count
        self._met = np.empty_like(own)  # products of what is left of the targets, channel by channel
        for chunk in self._chunks():
            self._meet(chunk)

    def gains(self) -> FloatArray:
        """Return what each channel would take off the squared error, shape (n,); 0 for the chosen ones."""
        own, met = self._own[: self._left], self._met[: self._left]
        gains = np.zeros(len(self._channels))
        gains[self._channels[: self._left]] = explained(own, met)
        return gains

    def choose(self, channel: int) -> None:
        """Take a channel, and what it explains off the others."""
        place, block = self._place[channel], self._block
        inverse = np.linalg.inv(np.linalg.cholesky(self._own[place]))
        mine = slice(place * block, (place + 1) * block)
        filled = self._filled()
        row, target = filled[mine].copy(), inverse @ self._cross[mine]
        self._left -= 1
        for values, size in ((self._channels, 1), (self._own, 1), (self._cross, block), (filled, block)):
            last = self._left * size
            values[place * size : (place + 1) * size] = values[last : last + size]
        self._place[self._channels[place]] = place
        new = self._shared(channel, row, inverse)
        blocks = new.reshape(-1, block, block)
        # What is left of each channel's own block is its Schur complement.
        self._own[: self._left] -= blocks @ blocks.transpose(0, 2, 1)
        for chunk in self._chunks():
            rows = slice(chunk.start * block, chunk.stop * block)
            dgemm(-1.0, target.T, new[rows].T, 1.0, self._cross[rows].T, overwrite_c=True)  # in place
            self._meet(chunk)

    def _filled(self) -> FloatArray:
        """Return what there is so far of the rows."""
        return self._rows

    @abstractmethod
    def _shared(self, channel: int, row: FloatArray, inverse: FloatArray) -> FloatArray:
        """Return what the columns left share with a chosen channel's, (left * block, block), and with none before."""
        # These are scaled to length 1 by the `inverse` of their own products' Cholesky factor.

    def _chunks(self) -> Iterator[slice]:
        """Yield chunks of the remaining channels whose rows fit into a processor's cache."""
        step = max(1, _CACHED // (8 * self._block * self._cross.shape[1]))
        for start in range(0, self._left, step):
            yield slice(start, min(start + step, self._left))

    def _meet(self, chunk: slice) -> None:
        rows = self._cross[chunk.start * self._block : chunk.stop * self._block]
        blocks = rows.reshape(-1, self._block, rows.shape[1])
        self._met[chunk] = blocks @ blocks.transpose(0, 2, 1)


class _InProducts(_Reader):
    """By products: the Cholesky factor of the chosen columns grows by a block column a step."""

    def __init__(self, layer: Products, keep: int) -> None:
        channels = np.arange(len(layer.gram) // layer.block)
        # By channel and column, twice.
        self._gram = np.asarray(layer.gram, dtype=np.float64).reshape((len(channels), layer.block) * 2)
        own = self._gram[channels, :, channels]
        # The factor lies transposed, so that what is there so far is contiguous.
        super().__init__(own, compressed(layer.cross), np.zeros((keep * layer.block, len(layer.gram))).T)
        self._done = 0

    def _filled(self) -> FloatArray:
        return self._rows[:, : self._done]

    def _shared(self, channel: int, row: FloatArray, inverse: FloatArray) -> FloatArray:
        columns = self._left * self._block
        shared = self._gram[channel][:, self._channels[: self._left]].reshape(self._block, -1)
        shared -= row @ self._filled()[:columns].T
        new = np.ascontiguousarray((inverse @ shared).T)
        self._rows[:columns, self._done : self._done + self._block] = new
        self._done += self._block
        return new


class _InSamples(_Reader):
    """By samples: what the chosen columns explain is projected out of these, fewer than there are columns."""

    def __init__(self, layer: SampleMatrix) -> None:
        columns = np.array(layer.columns, dtype=np.float64)
        blocks = columns.reshape(-1, layer.block, columns.shape[1])
        own = blocks @ blocks.transpose(0, 2, 1)
        own += layer.ridge.reshape(-1, layer.block, 1) * np.eye(layer.block)
        super().__init__(own, columns @ compressed(layer.targets), columns)
        self._left_over = np.eye(columns.shape[1])

    def _shared(self, channel: int, row: FloatArray, inverse: FloatArray) -> FloatArray:
        new = self._left_over @ (row.T @ inverse.T)
        self._left_over -= new @ new.T
        return np.asarray(self._rows[: self._left * self._block] @ new)


def explained(own: FloatArray, met: FloatArray) -> FloatArray:
    """Return what blocks take off the squared error, (...), by their own products and those of what they share with it.

    Both are (..., block, block): with ``G`` and ``R R'`` it is ``trace(G^-1 R R')``.
    """
    if own.shape[-1] == 1:
        return np.asarray(met[..., 0, 0] / own[..., 0, 0])
    return np.asarray((np.linalg.inv(own) * met).sum((-2, -1)))


def compressed(cross: FloatArray) -> FloatArray:
    """Return targets with at most as many columns as rows, and the same inner products between rows, as a copy."""
    values = np.array(cross, dtype=np.float64, order="C")
    if values.shape[1] <= values.shape[0]:
        return values
    # Gains look at targets only through inner products of rows, and updates mix rows: a rotation of the targets changes
    # neither.
    factor: FloatArray = np.asarray(np.linalg.qr(values.T, mode="r"))
    return np.ascontiguousarray(factor.T)


def channels_read(layers: Sequence[Products | SampleMatrix], keep: int) -> int:
    """Return the number of channels that some layers read, of which so many are to be kept; raise what is wrong."""
    for layer in layers:
        held = [layer.gram, layer.cross] if isinstance(layer, Products) else [layer.columns, layer.targets]
        size = len(held[0])
        if isinstance(layer, Products) and (held[0].shape != (size, size) or held[1].ndim != 2 or len(held[1]) != size):
            raise DataError(f"gram must be square and cross have as many rows, got {held[0].shape} and {held[1].shape}")
        if not all(np.isfinite(values).all() for values in held):
            raise DataError("gram and cross must be finite, got NaN or infinity")
        if layer.block < 1 or size % layer.block:
            raise ConfigError(f"block must divide the number of columns, got {layer.block} for {size} columns (block)")
    channels = {(len(one.gram if isinstance(one, Products) else one.columns)) // one.block for one in layers}
    if len(channels) > 1:
        raise DataError(f"all layers must read the same channels, got {sorted(channels)} of them (gram, block)")
    (count,) = channels
    if not 1 <= keep <= count:
        raise ConfigError(f"keep must be in [1, {count}], got {keep} (keep)")
    return count
