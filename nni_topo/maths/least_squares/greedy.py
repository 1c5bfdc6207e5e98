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
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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

    Notes
    -----
    With N columns the cost is about ``N * keep * block * (keep * block + min(outputs, N))`` products.

    Examples
    --------
    >>> columns = np.eye(3) * [1.0, 3.0, 2.0]
    >>> forward_selection([Products(columns @ columns, columns @ [[1.0], [2.0], [3.0]], 1)], 2)[0].tolist()
    [2, 1]
    """
    channels = layers[0].channels
    device = _device(layers)
    # A step's products are tall and a block wide: threads would only wait for each other, above all beside other work.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        readers = [
            _InProducts(one, keep, device) if isinstance(one, Products) else _InSamples(one, device) for one in layers
        ]
        part = np.arange(channels) // (channels // parts)
        room = np.full(parts, keep // parts)
        left = np.ones(channels, dtype=bool)
        order, taken = np.empty(keep, dtype=np.int64), np.empty(keep)
        gains, is_met = np.empty(0), False
        for step in range(keep):
            if not is_met:
                gains = np.sum([reader.gains() for reader in readers], axis=0)
            open_gains = np.where(left & (room[part] > 0), gains, -np.inf)
            # Gains that are tiny compared with the first one are rounding: among such channels the lowest wins.
            order[step] = first_largest(open_gains, taken[0] if step else 0.0)
            taken[step] = gains[order[step]]
            left[order[step]] = False
            room[part[order[step]]] -= 1
            is_met = is_met or taken[step] <= _NOTHING * taken[:step].sum()
            if not is_met and step < keep - 1:  # after the last choice no gains are needed
                for reader in readers:
                    reader.choose(int(order[step]))
    finally:
        torch.set_num_threads(threads)
    return order, taken


def _device(layers: Sequence[Products | SampleMatrix]) -> torch.device:
    """Return where channels are chosen: on the network's device if the numbers are many, else on the CPU."""
    for layer in layers:
        rows, outputs = (layer.gram, layer.cross) if isinstance(layer, Products) else (layer.columns, layer.targets)
        if layer.device.type != "cpu" and max(rows.size, len(rows) * outputs.shape[1]) >= _MANY:
            return layer.device
    return CPU


@dataclass(frozen=True)
class Products:
    """What a layer reads and has to put out: ``X.T @ X`` (n * block, n * block), ``X.T @ Y`` (n * block, outputs)."""

    gram: FloatArray
    cross: FloatArray
    block: int
    device: torch.device = CPU  # the network's

    @property
    def channels(self) -> int:
        """How many channels are read."""
        return len(self.gram) // self.block


@dataclass(frozen=True)
class SampleMatrix:
    """The same by samples, for few of them: X.T (n * block, samples), Y (samples, outputs), a ridge (n * block,)."""

    columns: FloatArray
    targets: FloatArray
    ridge: FloatArray
    block: int
    device: torch.device = CPU

    @property
    def channels(self) -> int:
        """How many channels are read."""
        return len(self.columns) // self.block

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

    def __init__(self, own: Tensor, cross: Tensor, rows: Tensor) -> None:
        # `own` (n, block, block) are the products of each channel's columns with each other, `cross` what is left of
        # the targets, `rows` one for each column, of what else is to be moved with it.
        count, self._block = own.shape[:2]
        scale = own.diagonal(dim1=1, dim2=2).mean(1)
        # A trace of ridge: columns that the chosen ones span leave a block of zeros, which has no factor.
        trace = LEAST_PIVOT * torch.where(scale > 0.0, scale, 1.0)
        self._unit = torch.eye(self._block, dtype=torch.float64, device=own.device)
        self._own = own + trace[:, None, None] * self._unit
        self._cross, self._rows = cross, rows
        self._channels, self._place, self._left = np.arange(count), np.arange(count), count
        # A processor works through chunks of targets that fit into its cache; a GPU would wait for the launch of each.
        in_cache = max(1, _CACHED // (8 * self._block * cross.shape[1]))
        self._chunk = in_cache if own.device.type == "cpu" else count
        self._met = torch.empty_like(self._own)  # products of what is left of the targets, channel by channel
        for chunk in self._chunks():
            self._meet(chunk)

    def gains(self) -> FloatArray:
        """Return what each channel would take off the squared error, shape (n,); 0 for the chosen ones."""
        # With ``G`` the channel's own products and ``R`` what it shares with the error it is ``trace(G^-1 R R')``.
        own, met = self._own[: self._left], self._met[: self._left]
        explained = met / own if self._block == 1 else torch.linalg.inv_ex(own).inverse * met
        gains = np.zeros(len(self._channels))
        gains[self._channels[: self._left]] = explained.sum((1, 2)).cpu().numpy()
        return gains

    def choose(self, channel: int) -> None:
        """Take a channel, and what it explains off the others."""
        place, block = self._place[channel], self._block
        factor = torch.linalg.cholesky_ex(self._own[place]).L
        inverse = torch.linalg.solve_triangular(factor, self._unit, upper=False)
        mine = slice(place * block, (place + 1) * block)
        filled = self._filled()
        row, target = filled[mine].clone(), inverse @ self._cross[mine]
        self._left -= 1
        for values, size in ((self._own, 1), (self._cross, block), (filled, block)):
            last = self._left * size
            values[place * size : (place + 1) * size] = values[last : last + size].clone()
        self._channels[place] = self._channels[self._left]
        self._place[self._channels[place]] = place
        new = self._shared(channel, row, inverse)
        blocks = new.unflatten(0, (-1, block))
        # What is left of each channel's own block is its Schur complement.
        self._own[: self._left].baddbmm_(blocks, blocks.mT, alpha=-1.0)
        for chunk in self._chunks():
            rows = slice(chunk.start * block, chunk.stop * block)
            self._cross[rows].addmm_(new[rows], target, alpha=-1.0)
            self._meet(chunk)

    def _filled(self) -> Tensor:
        """Return what there is so far of the rows."""
        return self._rows

    @abstractmethod
    def _shared(self, channel: int, row: Tensor, inverse: Tensor) -> Tensor:
        """Return what the columns left share with a chosen channel's, (left * block, block), and with none before."""
        # These are scaled to length 1 by the `inverse` of their own products' Cholesky factor.

    def _chunks(self) -> Iterator[slice]:
        """Yield chunks of the remaining channels."""
        for start in range(0, self._left, self._chunk):
            yield slice(start, min(start + self._chunk, self._left))

    def _meet(self, chunk: slice) -> None:
        blocks = self._cross[chunk.start * self._block : chunk.stop * self._block].unflatten(0, (-1, self._block))
        torch.bmm(blocks, blocks.mT, out=self._met[chunk])


class _InProducts(_Reader):
    """By products: the Cholesky factor of the chosen columns grows by a block column a step."""

    def __init__(self, layer: Products, keep: int, device: torch.device) -> None:
        self._gram = _tensor(layer.gram, device).unflatten(1, (-1, layer.block)).unflatten(0, (-1, layer.block))
        own = self._gram.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        # The rows of the factor, as long as it will be; it lies transposed, so that what there is so far is contiguous.
        rows = torch.zeros(keep * layer.block, len(layer.gram), dtype=torch.float64, device=device).mT
        super().__init__(own, _compressed(_tensor(layer.cross, device)), rows)
        self._done = 0

    def _filled(self) -> Tensor:
        return self._rows[:, : self._done]

    def _shared(self, channel: int, row: Tensor, inverse: Tensor) -> Tensor:
        columns = self._left * self._block
        left = torch.from_numpy(self._channels[: self._left]).to(row.device)
        shared = self._gram[channel][:, left].flatten(1)
        shared.addmm_(row, self._filled()[:columns].mT, alpha=-1.0)
        new: Tensor = (inverse @ shared).mT.contiguous()
        self._rows[:columns, self._done : self._done + self._block] = new
        self._done += self._block
        return new


class _InSamples(_Reader):
    """By samples: what the chosen columns explain is projected out of these, fewer than there are columns."""

    def __init__(self, layer: SampleMatrix, device: torch.device) -> None:
        columns = _tensor(layer.columns, device).clone()
        blocks = columns.unflatten(0, (-1, layer.block))
        own = blocks @ blocks.mT + torch.diag_embed(_tensor(layer.ridge, device).unflatten(0, (-1, layer.block)))
        super().__init__(own, columns @ _compressed(_tensor(layer.targets, device)), columns)
        self._left_over = torch.eye(columns.shape[1], dtype=torch.float64, device=device)

    def _shared(self, channel: int, row: Tensor, inverse: Tensor) -> Tensor:
        new = self._left_over @ (row.mT @ inverse.mT)
        self._left_over.addmm_(new, new.mT, alpha=-1.0)
        shared: Tensor = self._rows[: self._left * self._block] @ new
        return shared


def _tensor(values: FloatArray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64)).to(device)


def _compressed(cross: Tensor) -> Tensor:
    """Return targets with at most as many columns as rows, and the same inner products between rows, as a copy."""
    # Gains look at targets only through inner products of rows, and updates mix rows: a rotation of the targets changes
    # neither.
    return cross.clone() if cross.shape[1] <= cross.shape[0] else torch.linalg.qr(cross.mT, mode="r").R.mT.contiguous()
