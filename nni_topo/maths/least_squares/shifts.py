"""Products of a convolution's input patches, exactly and over all positions, without writing the patches down.

The patches at neighbouring positions share all but one of their columns. With ``G[i, j]`` the sum over positions ``p``
of ``x[p + i] x[p + j]^T`` (channels x channels, for kernel elements ``i`` and ``j``),

    G[i + 1, j + 1] = G[i, j] - x[i] x[j]^T + x[i + P] x[j + P]^T

for ``P`` positions. So only pairs with ``i`` or ``j`` at the first element are sums over all positions; the others
follow from these and from the patches at both ends. With several dimensions this holds in each of them, "both ends"
being the first and the last positions along it. With stride ``s`` and dilation ``d`` patches are the same again after
``lcm(s, d)`` pixels: the step is ``lcm / d`` kernel elements and ``lcm / s`` positions.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

_TOGETHER = 1024  # rows at the ends that are multiplied at once: each product goes through all pairs of columns


@dataclass(frozen=True)
class Geometry:
    """How a convolution's windows lie on its padded input, a number for each dimension of the image.

    Attributes
    ----------
    kernel, stride, dilation : tuple of int
        Elements of a window, and pixels between neighbouring windows and between neighbouring elements, at least 1.
    size : tuple of int
        Positions of the window.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Elements of a window."""
        return math.prod(self.kernel)

    @property
    def positions(self) -> int:
        """Positions of the window."""
        return math.prod(self.size)

    @property
    def steps(self) -> tuple[tuple[int, int], ...]:
        """By dimension, after how many kernel elements and after how many positions the same pixels meet again."""
        common = [math.lcm(stride, dilation) for stride, dilation in zip(self.stride, self.dilation, strict=True)]
        return tuple(
            (pixels // dilation, pixels // stride)
            for pixels, stride, dilation in zip(common, self.stride, self.dilation, strict=True)
        )

    def full_pairs(self) -> dict[int, list[int]]:
        """Return, by flat kernel element, the elements from it on whose products with it are sums over all positions.

        Pairs that aren't listed follow from others, or are the transpose of a listed one.
        """
        return _full_pairs(self.kernel, tuple(elements for elements, _ in self.steps))

    def ends(self, dim: int) -> tuple[Geometry, int] | None:
        """Return the windows at one end of a dimension, and the pixel where those after its last position begin.

        They lack the last kernel elements, which no other element follows from. None if no element follows from
        another.
        """
        elements, positions = self.steps[dim]
        if elements >= self.kernel[dim]:
            return None
        kernel, size = list(self.kernel), list(self.size)
        kernel[dim] -= elements
        size[dim] = positions
        return replace(self, kernel=tuple(kernel), size=tuple(size)), self.size[dim] * self.stride[dim]

    def multiplications(self, channels: int) -> float:
        """Return how many multiplications the products of all pairs take for one entry of the batch."""
        pairs = sum(map(len, self.full_pairs().values()))
        total = float(pairs * self.positions * channels**2)
        for dim in range(len(self.kernel)):
            found = self.ends(dim)
            if found is not None:
                total += 2.0 * (channels * found[0].elements) ** 2 * found[0].positions
        return total


@dataclass(frozen=True)
class Patches:
    """The patches of a batch as rows of a matrix ``(groups, rows, columns)`` that isn't written down.

    Rows are ordered by position and then by entry of the batch, columns by channel and then by kernel element.

    Attributes
    ----------
    padded : Tensor of float64, shape (groups, channels, *pixels, entries)
        What enters the convolution, with its padding.
    geometry : Geometry
        Of the convolution.
    """

    padded: Tensor
    geometry: Geometry

    @classmethod
    def of(cls, padded: Tensor, groups: int, geometry: Geometry) -> Patches:
        """Take padded inputs ``(entries, groups * channels, *pixels)``."""
        by_group = padded.double().unflatten(1, (groups, -1))
        # entries last: in one dimension with stride 1 the values under a kernel element are then a view
        return cls(by_group.movedim(0, -1).contiguous(), geometry)

    @property
    def entries(self) -> int:
        """Entries of the batch."""
        return self.padded.shape[-1]

    @property
    def rows(self) -> int:
        """Positions times entries."""
        return self.geometry.positions * self.entries

    @property
    def columns(self) -> int:
        """Channels of a group times kernel elements."""
        return self.padded.shape[1] * self.geometry.elements

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept."""
        return self.padded.nbytes

    def chosen(self, rows: Tensor) -> Patches:
        """Return the patches of some entries, of which all rows or none are marked, bool ``(rows,)``."""
        return replace(self, padded=self.padded[..., rows[-self.entries :]])

    def total(self) -> Tensor:
        """Return the sums over rows, ``(groups, columns)``."""
        sums = torch.stack([self._under(element).sum(2) for element in range(self.geometry.elements)], dim=2)
        return sums.flatten(1)

    def squares(self) -> Tensor:
        """Return the sums of squares over rows, ``(groups, columns)``."""
        return replace(self, padded=self.padded.square()).total()

    def cross(self, values: Tensor) -> Tensor:
        """Return the products with values ``(groups, rows, outputs)``: ``(groups, columns, outputs)``."""
        products = [self._under(element) @ values for element in range(self.geometry.elements)]
        return torch.stack(products, dim=2).flatten(1, 2)

    def times(self, weights: Tensor) -> Tensor:
        """Return the rows times weights ``(groups, columns, outputs)``: ``(groups, rows, outputs)``."""
        by_element = weights.unflatten(1, (-1, self.geometry.elements))
        found = self.padded.new_zeros(len(weights), self.rows, weights.shape[2])
        for element in range(self.geometry.elements):
            found.baddbmm_(self._under(element).mT, by_element[:, :, element])
        return found

    def written(self) -> Tensor:
        """Return the matrix itself, ``(groups, rows, columns)``."""
        by_channel: Tensor = self._by_element().transpose(1, 2)
        return by_channel.flatten(1, 2).mT

    def _under(self, element: int) -> Tensor:
        """Return the values under a kernel element, ``(groups, channels, rows)``."""
        geometry = self.geometry
        place = np.unravel_index(element, geometry.kernel)
        pixels = []
        for index, stride, dilation, size in zip(place, geometry.stride, geometry.dilation, geometry.size, strict=True):
            first = int(index) * dilation
            pixels.append(slice(first, first + (size - 1) * stride + 1, stride))
        chosen = (slice(None), slice(None), *pixels)
        values: Tensor = self.padded[chosen]
        return values.flatten(2)

    def _by_element(self) -> Tensor:
        """Return the values under every kernel element, ``(groups, elements, channels, rows)``."""
        return torch.stack([self._under(element) for element in range(self.geometry.elements)], dim=1)

    def _from(self, dim: int, pixel: int, geometry: Geometry) -> Patches:
        """Return other windows on the pixels of a dimension from one on."""
        return Patches(self.padded.narrow(2 + dim, pixel, self.padded.shape[2 + dim] - pixel), geometry)


class PatchProducts:
    """Sums the products of patches with each other, batch by batch: ``rows.T @ rows`` of all of them."""

    def __init__(self) -> None:
        self._geometry: Geometry | None = None
        self._squares: Tensor | None = None  # (groups, columns)
        # By kernel element, of the products with the elements of `Geometry.full_pairs`: (groups, channels, others *
        # channels).
        self._full: dict[int, Tensor] = {}
        # By dimension, products after its last positions less those at its first, (groups, columns, columns), whose
        # columns are ordered by kernel element and then by channel.
        self._ends: dict[int, Tensor] = {}
        # By dimension, values of some batches after its last positions and at its first, (groups, columns, rows).
        self._waiting: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def add(self, patches: Patches) -> None:
        """Add a batch."""
        geometry = self._geometry = patches.geometry
        squares = patches.squares()
        self._squares = squares if self._squares is None else self._squares.add_(squares)
        for element, others in geometry.full_pairs().items():
            mine = patches._under(element)
            products = torch.cat([mine @ patches._under(other).mT for other in others], dim=2)
            self._full[element] = self._full[element].add_(products) if element in self._full else products
        for dim in range(len(geometry.kernel)):
            found = geometry.ends(dim)
            if found is None:
                continue
            windows, behind = found
            last, first = (patches._from(dim, pixel, windows)._by_element().flatten(1, 2) for pixel in (behind, 0))
            waiting = self._waiting.setdefault(dim, [])
            waiting.append((last, first))
            if sum(2 * one.shape[2] for one, _ in waiting) >= _TOGETHER:
                self._multiply(dim)

    def _multiply(self, dim: int) -> None:
        """Multiply the rows at the ends of a dimension that wait for it."""
        waiting = self._waiting.pop(dim, [])
        if not waiting:
            return
        last, first = (torch.cat(rows, dim=2) for rows in zip(*waiting, strict=True))
        if dim not in self._ends:
            self._ends[dim] = last.new_zeros(*last.shape[:2], last.shape[1])
        # Few rows and many columns: in place, which saves more than the half that symmetry would.
        self._ends[dim].baddbmm_(torch.cat([last, -first], dim=2), torch.cat([last, first], dim=2).mT)

    def total(self) -> Tensor:
        """Return the products of all pairs of columns, ``(groups, columns, columns)``; the sums are used up."""
        geometry, squares = self._geometry, self._squares
        assert geometry is not None  # of no batch nobody asks for products
        assert squares is not None
        first = next(iter(self._full.values()))
        groups, channels, elements = len(first), first.shape[1], geometry.elements
        found = first.new_zeros(groups, elements, channels, elements, channels)
        for element, others in geometry.full_pairs().items():
            products = self._full.pop(element).unflatten(2, (len(others), channels))
            for index, other in enumerate(others):
                found[:, element, :, other] = products[:, :, index]
                found[:, other, :, element] = products[:, :, index].mT
        dims = len(geometry.kernel)
        # (groups, *kernel, channels, *kernel, channels)
        by_place = found.view(groups, *geometry.kernel, channels, *geometry.kernel, channels)
        # The last dimension first: what the earlier ones write follows from pairs that it has written.
        for dim in reversed(range(dims)):
            windows = geometry.ends(dim)
            if windows is None:
                continue
            self._multiply(dim)
            step, kernel = geometry.steps[dim][0], windows[0].kernel
            ends = self._ends.pop(dim).view(groups, *kernel, channels, *kernel, channels)
            for place in range(step, geometry.kernel[dim]):
                before = _at(dim, dims, place - step, slice(None, -step))
                after = _at(dim, dims, place, slice(step, None))
                by_place[after] = by_place[before] + ends[_at(dim, dims, place - step, slice(None))]
        products = found.permute(0, 2, 1, 4, 3).reshape(groups, channels * elements, channels * elements)
        # Sums and differences leave rounding where a column is zero throughout, such as one that meets only padding.
        is_zero = squares == 0
        if bool(is_zero.any()):
            products.masked_fill_(is_zero.unsqueeze(1) | is_zero.unsqueeze(2), 0.0)
        products.diagonal(dim1=1, dim2=2).copy_(squares)
        return products


def symmetric(rows: Tensor) -> Tensor:
    """Return the products of columns of rows ``(groups, rows, columns)``: ``(groups, columns, columns)``."""
    if rows.device.type != "cpu":
        return rows.mT @ rows
    # NumPy sees that both factors are one matrix and computes half of the symmetric product; PyTorch computes it all.
    with np.errstate(invalid="ignore", over="ignore"):
        products = [each.T @ each for each in rows.numpy()]
    return torch.from_numpy(np.stack(products) if len(products) > 1 else products[0][None])


def pays(geometry: Geometry, channels: int, outputs: int, entries: int, sampled: int, passes: int = 1) -> bool:
    """Say whether shifts over all positions take less work than rows at some of them.

    Parameters
    ----------
    geometry : Geometry
        Of the convolution.
    channels, outputs : int
        Of a group, at least 1 and at least 0.
    entries : int
        Of all batches.
    sampled : int
        Rows that would be drawn of all batches.
    passes : int, default=1
        How often the patches are multiplied with values of the outputs.
    """
    columns, rows = channels * geometry.elements, entries * geometry.positions
    # A system with fewer rows than columns is solved by the products of rows.
    if geometry.elements == 1 or rows < columns:
        return False
    drawn = min(sampled, rows) * columns * (columns / 2.0 + passes * outputs)
    shifted = entries * geometry.multiplications(channels) + rows * columns * passes * outputs
    # Many small products take about twice as long as one large product of as many multiplications.
    return 2.0 * shifted < drawn


def _at(dim: int, dims: int, place: int, others: slice) -> tuple[int | slice, ...]:
    """Index ``(groups, *kernel, channels, *kernel, channels)`` by a place in one dimension and by others' places."""
    index: list[int | slice] = [slice(None)] * (1 + 2 * (dims + 1))
    index[1 + dim] = place
    index[2 + dims + dim] = others
    return tuple(index)


@functools.cache
def _full_pairs(kernel: tuple[int, ...], steps: tuple[int, ...]) -> dict[int, list[int]]:
    """Return the pairs of flat kernel elements of which one at least is before the first step in each dimension."""
    places = list(itertools.product(*map(range, kernel)))
    found: dict[int, list[int]] = {}
    for one, first in enumerate(places):
        for other in range(one, len(places)):
            nearest = map(min, first, places[other])
            if all(place < step for place, step in zip(nearest, steps, strict=True)):
                found.setdefault(one, []).append(other)
    return found
