"""Greedy least-squares selection of the channels that best predict the outputs of the next layer.

Forward selection adds the channel that most reduces the squared error of the least-squares prediction from the
channels chosen so far. A channel may be a block of several columns, e.g. the kernel elements of a patch. A growing
Cholesky factor keeps all columns orthogonal to the chosen ones, so that no step solves the problem anew.

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
"""Ridge on a channel's own products, as a share of their diagonal, for columns that the chosen ones span."""

STOP = 1e-4
"""Share of the reduction so far: if no channel reduces more, the others follow by their current gains. The plan in
benchmarks/selection/README.md chose it."""
_ROUNDING_OF_A_REST = 1e3
"""Rounding of the gains once nothing more is gained, as a multiple of that of the first gain."""
_MANY = 2**16  # numbers of a layer from which a GPU is faster than the CPU; for fewer its launches take longer
_CACHED = 2**20  # bytes of targets that are processed at a time


def forward_selection(
    layers: Sequence[Products | SampleMatrix], keep: int, parts: int = 1
) -> tuple[IntArray, FloatArray]:
    """Choose channels one by one for the least-squares prediction of targets.

    Parameters
    ----------
    layers : sequence of Products or SampleMatrix
        The data of each layer that reads the channels. The gains of several layers are added.
    keep : int
        Number of channels to choose, in [1, n].
    parts : int, default=1
        Number of equal segments of channels; each keeps the same number of channels. Divides n and ``keep``.

    Returns
    -------
    channels : ndarray of int, shape (keep,)
        In the order of selection; with one part each prefix is the selection for a smaller ``keep``. Of gains that are
        equal to within 1e-6 the lowest channel wins. The targets are met once no channel reduces the error by more than
        1e-4 of the reduction so far: the others follow by their gains at that step, equal within 1e-9 of the first one.
    reductions : ndarray, shape (keep,)
        Reduction of the squared error by each channel.

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
    # The matrices of a step are tall and a block wide: threads would wait for each other, above all on a busy machine.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        readers = [
            _InProducts(layer, keep, device) if isinstance(layer, Products) else _InSamples(layer, device)
            for layer in layers
        ]
        part = np.arange(channels) // (channels // parts)
        room = np.full(parts, keep // parts)
        is_available = np.ones(channels, dtype=bool)
        order, reductions = np.empty(keep, dtype=np.int64), np.empty(keep)
        gains, is_met = np.empty(0), False
        for step in range(keep):
            if not is_met:
                gains = np.sum([reader.gains() for reader in readers], axis=0)
            open_gains = np.where(is_available & (room[part] > 0), gains, -np.inf)
            first, reduced = reductions[0] if step else 0.0, reductions[:step].sum()
            is_met = is_met or open_gains.max() <= STOP * reduced
            # Gains that are tiny compared with the first one are rounding: among such channels the lowest wins.
            order[step] = first_largest(open_gains, _ROUNDING_OF_A_REST * first if is_met else first)
            reductions[step] = gains[order[step]]
            is_available[order[step]] = False
            room[part[order[step]]] -= 1
            if not is_met and step < keep - 1:  # after the last choice no gains are needed
                for reader in readers:
                    reader.choose(int(order[step]))
    finally:
        torch.set_num_threads(threads)
    return order, reductions


def _device(layers: Sequence[Products | SampleMatrix]) -> torch.device:
    """Return the device to compute on: the network's if a layer has many numbers, else the CPU."""
    for layer in layers:
        rows, outputs = (layer.gram, layer.cross) if isinstance(layer, Products) else (layer.columns, layer.targets)
        if layer.device.type != "cpu" and max(rows.size, len(rows) * outputs.shape[1]) >= _MANY:
            return layer.device
    return CPU


@dataclass(frozen=True)
class Products:
    """Products of inputs X and targets Y: ``X.T @ X`` (n * block, n * block), ``X.T @ Y`` (n * block, outputs)."""

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
    """Few samples of these: X.T (n * block, samples), Y (samples, outputs), and a ridge (n * block,)."""

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
        """``X.T @ X`` with the ridge on its diagonal."""
        return np.asarray(self.columns @ self.columns.T + np.diag(self.ridge))

    @property
    def cross(self) -> FloatArray:
        """``X.T @ Y``."""
        return np.asarray(self.columns @ self.targets)


class _Reader(ABC):
    """The columns that one layer reads, kept orthogonal to those of the chosen channels."""

    # The remaining channels are contiguous: the last one takes the place of a chosen one.

    def __init__(self, grams: Tensor) -> None:
        # `grams` (n, block, block): products of each channel's columns with each other.
        count, self._block = grams.shape[:2]
        scale = grams.diagonal(dim1=1, dim2=2).mean(1)
        # A tiny ridge: columns that the chosen ones span leave a block of zeros, which has no Cholesky factor.
        trace = LEAST_PIVOT * torch.where(scale > 0.0, scale, 1.0)
        self._unit = torch.eye(self._block, dtype=torch.float64, device=grams.device)
        self._grams = grams + trace[:, None, None] * self._unit
        # With C the products of a channel's columns with what is left of the targets: C C', channel by channel.
        self._target_products = torch.empty_like(self._grams)
        self._channels, self._place, self._left = np.arange(count), np.arange(count), count

    def gains(self) -> FloatArray:
        """Return by how much each channel would reduce the squared error, shape (n,); 0 for the chosen ones."""
        # It is ``trace(G^-1 C C')``, with ``G`` the channel's own products.
        grams, target_products = self._grams[: self._left], self._target_products[: self._left]
        explained = (
            target_products / grams if self._block == 1 else torch.linalg.inv_ex(grams).inverse * target_products
        )
        gains = np.zeros(len(self._channels))
        gains[self._channels[: self._left]] = explained.sum((1, 2)).cpu().numpy()
        return gains

    def choose(self, channel: int) -> None:
        """Choose a channel, and subtract what it explains from the others."""
        place = int(self._place[channel])
        factor = torch.linalg.cholesky_ex(self._grams[place]).L
        inverse = torch.linalg.solve_triangular(factor, self._unit, upper=False)
        self._left -= 1
        for blocks in (self._grams, self._target_products):
            blocks[place] = blocks[self._left].clone()
        self._channels[place] = self._channels[self._left]
        self._place[self._channels[place]] = place
        self._subtract(channel, place, inverse)

    @abstractmethod
    def _subtract(self, channel: int, place: int, inverse: Tensor) -> None:
        """Subtract what a chosen channel explains from the products of the remaining ones."""
        # The channel stood at `place` of the columns, where the last remaining one goes. Its new directions are
        # orthogonal to earlier ones; `inverse` (of a Cholesky factor) scales them to length 1.


class _InProducts(_Reader):
    """Reads products: the Cholesky factor of the chosen columns grows by a block column per step."""

    def __init__(self, layer: Products, keep: int, device: torch.device) -> None:
        self._gram = _tensor(layer.gram, device).unflatten(1, (-1, layer.block)).unflatten(0, (-1, layer.block))
        super().__init__(self._gram.diagonal(dim1=0, dim2=2).permute(2, 0, 1))
        self._cross = _compress(_tensor(layer.cross, device))
        # The rows of the factor at its final length, stored transposed, so that the filled part is contiguous.
        self._rows = torch.zeros(keep * layer.block, len(layer.gram), dtype=torch.float64, device=device).mT
        self._filled = 0
        # The CPU processes chunks of targets that fit into its cache; on a GPU, launching each chunk would take longer.
        in_cache = max(1, _CACHED // (8 * layer.block * self._cross.shape[1]))
        self._chunk = in_cache if device.type == "cpu" else layer.channels
        for chunk in self._chunks():
            self._meet(chunk)

    def _subtract(self, channel: int, place: int, inverse: Tensor) -> None:
        block, filled = self._block, slice(self._filled, self._filled + self._block)
        chosen = slice(place * block, (place + 1) * block)
        row, target = self._rows[chosen, : self._filled].clone(), inverse @ self._cross[chosen]
        columns = self._left * block
        for values in (self._cross, self._rows[:, : self._filled]):
            values[chosen] = values[columns : columns + block].clone()
        remaining = torch.from_numpy(self._channels[: self._left]).to(row.device)
        shared = self._gram[channel][:, remaining].flatten(1)
        shared.addmm_(row, self._rows[:columns, : self._filled].mT, alpha=-1.0)
        new = (inverse @ shared).mT.contiguous()
        self._rows[:columns, filled] = new
        self._filled += block
        blocks = new.unflatten(0, (-1, block))
        # Each channel's own block becomes its Schur complement.
        self._grams[: self._left].baddbmm_(blocks, blocks.mT, alpha=-1.0)
        for chunk in self._chunks():
            rows = slice(chunk.start * block, chunk.stop * block)
            self._cross[rows].addmm_(new[rows], target, alpha=-1.0)
            self._meet(chunk)

    def _chunks(self) -> Iterator[slice]:
        """Yield chunks of the remaining channels."""
        for start in range(0, self._left, self._chunk):
            yield slice(start, min(start + self._chunk, self._left))

    def _meet(self, chunk: slice) -> None:
        blocks = self._cross[chunk.start * self._block : chunk.stop * self._block].unflatten(0, (-1, self._block))
        torch.bmm(blocks, blocks.mT, out=self._target_products[chunk])


class _InSamples(_Reader):
    """Reads samples: what the chosen columns explain is projected out of the samples."""

    # Products of columns with targets are never formed. Where X are a channel's columns, P projects out the chosen
    # ones and E are the targets that are left, a direction n with ``t = n' E`` turns ``X' E E' X`` into
    # ``(X' E - S t)(X' E - S t)' = X' E E' X - S W' - W S'``, with ``S = X' n``, ``W = X' u - S (t t') / 2``,
    # ``u = E t'``.

    def __init__(self, layer: SampleMatrix, device: torch.device) -> None:
        columns, targets = _tensor(layer.columns, device), _tensor(layer.targets, device)
        blocks = columns.unflatten(0, (-1, layer.block))
        super().__init__(
            blocks @ blocks.mT + torch.diag_embed(_tensor(layer.ridge, device).unflatten(0, (-1, layer.block)))
        )
        left_over = targets @ targets.mT
        products = (columns @ left_over).unflatten(0, (-1, layer.block))
        torch.bmm(products, blocks.mT, out=self._target_products)
        self._columns = columns.clone()
        self._errors = left_over  # E E', (samples, samples)
        self._projection = torch.eye(len(targets), dtype=torch.float64, device=device)

    def _subtract(self, channel: int, place: int, inverse: Tensor) -> None:
        block, columns = self._block, self._left * self._block
        chosen = self._columns[place * block : (place + 1) * block]
        scaled = chosen.mT @ inverse.mT
        chosen.copy_(self._columns[columns : columns + block].clone())
        directions, effects = self._projection @ scaled, self._errors @ scaled  # n and u, (samples, block)
        self._projection.addmm_(directions, directions.mT, alpha=-1.0)
        squares = scaled.mT @ effects  # t t'
        half = effects - directions @ (squares / 2.0)
        both = torch.cat([directions, half], 1)
        self._errors.addmm_(both, torch.cat([half, directions], 1).mT, alpha=-1.0)
        shared = self._columns[:columns] @ both
        first, second = shared.unflatten(0, (-1, block)).split(block, 2)  # S and W
        self._grams[: self._left].baddbmm_(first, first.mT, alpha=-1.0)
        change = first @ second.mT
        self._target_products[: self._left].sub_(change).sub_(change.mT)


def _tensor(values: FloatArray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64)).to(device)


def _compress(cross: Tensor) -> Tensor:
    """Return a copy of the targets with at most as many columns as rows, and the same inner products of rows."""
    # Gains depend on targets only through inner products of rows, and updates mix rows: a rotation of the targets
    # changes neither.
    return cross.clone() if cross.shape[1] <= cross.shape[0] else torch.linalg.qr(cross.mT, mode="r").R.mT.contiguous()
