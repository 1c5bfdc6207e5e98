"""Products of a convolution's input patches, exactly and over all positions, without writing the patches down.

The patches at neighbouring positions share all but one of their columns. With ``G[i, j]`` the sum over positions ``p``
of ``x[p + i] x[p + j]^T`` (channels x channels, for kernel elements ``i`` and ``j``),

    G[i + 1, j + 1] = G[i, j] - x[i] x[j]^T + x[i + P] x[j + P]^T

for ``P`` positions. So only pairs with ``i`` or ``j`` at the first element are sums over all positions; the others
follow from these and from the patches at both ends. With several dimensions this holds in each of them, "both ends"
being the first and the last positions along it. With stride ``s`` and dilation ``d`` patches are the same again after
``lcm(s, d)`` pixels: the step is ``lcm / d`` kernel elements and ``lcm / s`` positions.

With stride 1 the sums over all positions are correlations of the channels, at as many shifts as the kernel has
elements. For large kernels all shifts together are computed by Fourier transforms, frequency by frequency [1]_.

References
----------
.. [1] W. Press, S. Teukolsky, W. Vetterling and B. Flannery, "Numerical recipes", 3rd ed., section 13.2, Cambridge
   University Press, 2007
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.fft import next_fast_len
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
        total = min(self._by_pairs(channels), self._by_frequencies(channels))
        for dim in range(len(self.kernel)):
            found = self.ends(dim)
            if found is not None:
                total += 2.0 * (channels * found[0].elements) ** 2 * found[0].positions
        return total

    @property
    def extents(self) -> tuple[int, ...]:
        """Pixels that the windows cover, by dimension."""
        return tuple(
            (size - 1) * stride + (kernel - 1) * dilation + 1
            for size, stride, kernel, dilation in zip(self.size, self.stride, self.kernel, self.dilation, strict=True)
        )

    @property
    def shifted(self) -> tuple[int, ...]:
        """The dimensions along which the kernel has more than one element."""
        return tuple(dim for dim, kernel in enumerate(self.kernel) if kernel > 1)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of Fourier transforms along the shifted dimensions, such that no shift wraps around."""
        return tuple(next_fast_len(self.extents[dim], real=True) for dim in self.shifted)

    @property
    def frequencies(self) -> int:
        """Frequencies of real numbers' transforms; the others are conjugates of these."""
        return math.prod(self.lengths[:-1]) * (self.lengths[-1] // 2 + 1)

    @property
    def has_spectra(self) -> bool:
        """Whether sums over positions are correlations: with stride 1 along all shifted dimensions."""
        return bool(self.shifted) and all(self.stride[dim] == 1 for dim in self.shifted)

    @property
    def shifts(self) -> tuple[slice, ...]:
        """By shifted dimension, the pixels from a window's first one to the others of its kernel elements."""
        return tuple(
            slice(0, (self.kernel[dim] - 1) * self.dilation[dim] + 1, self.dilation[dim]) for dim in self.shifted
        )

    def takes_frequencies(self, channels: int) -> bool:
        """Say whether sums over all positions are computed by Fourier transforms: where that takes less work."""
        return self._by_frequencies(channels) < self._by_pairs(channels)

    def takes_frequencies_once(self) -> bool:
        """Say whether products of patches with outputs or weights are computed by Fourier transforms."""
        return self.has_spectra and 2.0 * self._in_complex() < self.elements * self.positions

    def multiplications_once(self, channels: int, outputs: int) -> float:
        """Return how many multiplications products with outputs take for one entry of the batch."""
        each = self._in_complex() if self.takes_frequencies_once() else float(self.elements * self.positions)
        return each * channels * outputs

    def _by_pairs(self, channels: int) -> float:
        """Return how many multiplications the sums over all positions take, pair by pair."""
        return float(sum(map(len, self.full_pairs().values())) * self.positions * channels**2)

    def _by_frequencies(self, channels: int) -> float:
        """Return how many they take by Fourier transforms; infinite where these don't apply or take more memory."""
        # By shifted dimension but the first, shifts go in either direction.
        spectra = 2 ** (len(self.shifted) - 1) if self.has_spectra else 0
        if not spectra or 2 * spectra * self.frequencies > self.elements**2:
            return math.inf  # complex numbers, more of them than the products have entries
        length = math.prod(self.lengths)
        transforms = 2.0 ** len(self.shifted) * channels * length * max(math.log2(length), 1.0)
        return spectra * self._in_complex() * channels**2 + self._others * transforms

    def _in_complex(self) -> float:
        """Return the multiplications, four for complex numbers, of one pair of channels at all frequencies."""
        return 4.0 * self.frequencies * self._others

    @property
    def _others(self) -> float:
        """Positions along the dimensions without shifts."""
        return self.positions / math.prod(self.size[dim] for dim in self.shifted)


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
        values = self.padded.sum(-1)
        geometry = self.geometry
        sizes = zip(geometry.kernel, geometry.stride, geometry.dilation, geometry.size, strict=True)
        for dim, (elements, stride, dilation, size) in enumerate(sizes, start=2):
            windows = values.unfold(dim, (size - 1) * stride + 1, dilation).narrow(dim, 0, elements)
            values = windows[..., ::stride].sum(-1)
        return values.flatten(1)

    def squares(self) -> Tensor:
        """Return the sums of squares over rows, ``(groups, columns)``."""
        return replace(self, padded=self.padded.square()).total()

    def cross(self, values: Tensor) -> Tensor:
        """Return the products with values ``(groups, rows, outputs)``: ``(groups, columns, outputs)``."""
        geometry = self.geometry
        if values.shape[2] and geometry.takes_frequencies_once():
            by_place = _shifted_first(values.mT.unflatten(2, (*geometry.size, self.entries)), geometry)
            spectrum = _spectrum(by_place, geometry.lengths).conj() @ self.spectrum.mT
            wanted = [range(each.stop)[each] for each in geometry.shifts]
            by_element = _at_pixels(spectrum, geometry.lengths, wanted).flatten(1, len(geometry.shifted))
            return by_element.permute(0, 3, 1, 2).flatten(1, 2)
        products = torch.stack([self._under(element) @ values for element in range(geometry.elements)], dim=2)
        return products.flatten(1, 2)

    def times(self, weights: Tensor) -> Tensor:
        """Return the rows times weights ``(groups, columns, outputs)``: ``(groups, rows, outputs)``."""
        geometry, outputs = self.geometry, weights.shape[2]
        by_element = weights.unflatten(1, (-1, geometry.elements))
        if outputs and geometry.takes_frequencies_once():
            kernel = weights.new_zeros(len(weights), by_element.shape[1], *geometry.lengths, outputs)
            sizes = [geometry.kernel[dim] for dim in geometry.shifted]
            index = (slice(None), slice(None), *geometry.shifts)
            kernel[index] = by_element.unflatten(2, sizes)
            spectrum = self.spectrum.mT @ _spectrum(kernel, geometry.lengths).conj()
            by_place = _from_spectrum(spectrum, geometry.lengths)
            for number, dim in enumerate(geometry.shifted):
                by_place = by_place.narrow(1 + number, 0, geometry.size[dim])
            return _as_rows(by_place, geometry, self.entries)
        found = self.padded.new_zeros(len(weights), self.rows, outputs)
        for element in range(geometry.elements):
            found.baddbmm_(self._under(element).mT, by_element[:, :, element])
        return found

    def ending(self, ends: Sequence[bool]) -> Tensor:
        """Return the pixels under windows, ``(groups, channels, *pixels along shifted dimensions, entries)``.

        Along dimensions that ``ends`` marks they end after as many pixels as there are positions. Positions along
        dimensions without shifts are further entries.
        """
        geometry, values = self.geometry, self.padded
        for dim, extent in enumerate(geometry.extents):
            values = values.narrow(2 + dim, 0, extent)
            if dim not in geometry.shifted:
                values = values[(slice(None),) * (2 + dim) + (slice(None, None, geometry.stride[dim]),)]
        for dim, is_short in zip(geometry.shifted, ends, strict=True):
            values = values.narrow(2 + dim, 0, geometry.size[dim]) if is_short else values
        return _shifted_first(values, geometry)

    @functools.cached_property
    def spectrum(self) -> Tensor:
        """Fourier transform of the pixels under windows, ``(groups, frequencies, channels, entries)``."""
        return _spectrum(self.ending([False] * len(self.geometry.shifted)), self.geometry.lengths)

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


class _SumsByPairs:
    """Sums over all positions, pair by pair of kernel elements."""

    def __init__(self) -> None:
        # By kernel element, of the products with the elements of `Geometry.full_pairs`: (groups, channels, others *
        # channels).
        self._sums: dict[int, Tensor] = {}

    def add(self, patches: Patches) -> None:
        """Add a batch."""
        for element, others in patches.geometry.full_pairs().items():
            mine = patches._under(element)
            products = torch.cat([mine @ patches._under(other).mT for other in others], dim=2)
            self._sums[element] = self._sums[element].add_(products) if element in self._sums else products

    def each(self, geometry: Geometry) -> Iterator[tuple[int, int, Tensor]]:
        """Yield the pairs of kernel elements and their sums, ``(groups, channels, channels)``, which are used up."""
        for element, others in geometry.full_pairs().items():
            products = self._sums.pop(element)
            for other, one in zip(others, products.chunk(len(others), dim=2), strict=True):
                yield element, other, one


class _SumsByFrequencies:
    """Sums over all positions, at all shifts together: products of Fourier transforms, summed by frequency.

    Of two kernel elements whose products are summed over all positions one is the first along each dimension. Its
    values are those of as many first pixels as there are positions; the other's follow by the shift. In the order of
    `Geometry.full_pairs` the later element is never before the other along the first dimension, so that only along
    further dimensions shifts go backward as well.
    """

    def __init__(self) -> None:
        # By lengths of the transforms, which images of another size have others of, and by directions of the shifts:
        # (groups, frequencies, channels, channels).
        self._sums: dict[tuple[tuple[int, ...], tuple[bool, ...]], Tensor] = {}

    def add(self, patches: Patches) -> None:
        """Add a batch."""
        geometry = patches.geometry
        count, lengths = len(geometry.shifted), geometry.lengths
        spectra = {
            ends: _spectrum(patches.ending(ends), lengths) if any(ends) else patches.spectrum
            for ends in itertools.product((True, False), repeat=count)
        }
        for forward in itertools.product((True,), *[(True, False)] * (count - 1)):
            backward = tuple(not each for each in forward)
            products = spectra[forward].conj() @ spectra[backward].mT
            key = lengths, forward
            self._sums[key] = self._sums[key].add_(products) if key in self._sums else products

    def each(self, geometry: Geometry) -> Iterator[tuple[int, int, Tensor]]:
        """Yield the pairs of kernel elements and their sums, ``(groups, channels, channels)``, which are used up."""
        by_shift, dims = [], geometry.shifted
        while self._sums:
            (lengths, forward), sums = self._sums.popitem()
            # Backward shifts wrap around.
            wanted = [
                [
                    shift * geometry.dilation[dim] % length
                    for shift in range(1 - geometry.kernel[dim], geometry.kernel[dim])
                ]
                for dim, length in zip(dims, lengths, strict=True)
            ]
            by_shift.append((forward, _at_pixels(sums, lengths, wanted)))
        for element, others in geometry.full_pairs().items():
            first = np.unravel_index(element, geometry.kernel)
            for other in others:
                second = np.unravel_index(other, geometry.kernel)
                steps = [int(second[dim] - first[dim]) for dim in dims]
                directions = tuple(step >= 0 for step in steps)
                place: tuple[slice | int, ...] = (
                    slice(None),
                    *(step + geometry.kernel[dim] - 1 for step, dim in zip(steps, dims, strict=True)),
                )
                total = None
                for forward, sums in by_shift:
                    if forward == directions:
                        total = sums[place] if total is None else total + sums[place]
                assert total is not None  # each direction has its sums
                yield element, other, total


def _order(geometry: Geometry) -> list[int]:
    """Return all dimensions, those with shifts first."""
    return [*geometry.shifted, *(dim for dim in range(len(geometry.kernel)) if dim not in geometry.shifted)]


def _shifted_first(values: Tensor, geometry: Geometry) -> Tensor:
    """Take ``(groups, channels, *positions, entries)`` as ``(groups, channels, *those with shifts, all others)``."""
    count = 2 + len(geometry.shifted)
    return values.permute(0, 1, *(2 + dim for dim in _order(geometry)), values.dim() - 1).flatten(count)


def _as_rows(values: Tensor, geometry: Geometry, entries: int) -> Tensor:
    """Take ``(groups, *positions with shifts, all other positions and entries, outputs)`` as rows of all positions."""
    order = _order(geometry)
    others = [geometry.size[dim] for dim in order[len(geometry.shifted) :]]
    values = values.unflatten(-2, (*others, entries))
    back = [1 + order.index(dim) for dim in range(len(order))]
    return values.permute(0, *back, -2, -1).flatten(1, -2)


def _spectrum(values: Tensor, lengths: Sequence[int]) -> Tensor:
    """Transform ``(groups, channels, *pixels, entries)`` into ``(groups, frequencies, channels, entries)``."""
    dims = tuple(range(2, 2 + len(lengths)))
    transformed: Tensor = torch.fft.rfftn(values, s=lengths, dim=dims)
    return transformed.flatten(2, dims[-1]).transpose(1, 2).contiguous()


def _from_spectrum(products: Tensor, lengths: Sequence[int]) -> Tensor:
    """Transform ``(groups, frequencies, ...)`` back into ``(groups, *pixels, ...)``."""
    kept = (*lengths[:-1], lengths[-1] // 2 + 1)
    dims = tuple(range(1, 1 + len(lengths)))
    values: Tensor = torch.fft.irfftn(products.unflatten(1, kept), s=lengths, dim=dims)
    return values


def _at_pixels(products: Tensor, lengths: Sequence[int], wanted: Sequence[Sequence[int]]) -> Tensor:
    """Transform ``(groups, frequencies, ...)`` back at some pixels of each dimension, ``(groups, *pixels, ...)``.

    For as few pixels as a kernel has, this takes less time than the inverse transform, which gives all of them.
    """
    half = lengths[-1] // 2 + 1
    values = products.unflatten(1, (*lengths[:-1], half))
    for number, (length, pixels) in enumerate(zip(lengths, wanted, strict=True), start=1):
        is_last = number == len(lengths)
        frequencies = torch.arange(half if is_last else length, dtype=torch.float64, device=values.device)
        places = torch.tensor(list(pixels), dtype=torch.float64, device=values.device)
        sizes = torch.full_like(frequencies, 1 / length)
        if is_last:  # the conjugates of the others are left out
            sizes[1 : (length + 1) // 2] *= 2
        waves = torch.polar(sizes.expand(len(places), -1), places[:, None] * frequencies * (2 * math.pi / length))
        moved = values.movedim(number, 1)
        values = (waves @ moved.flatten(2)).unflatten(2, moved.shape[2:]).movedim(1, number)
    found: Tensor = values.real
    return found


class _EndProducts:
    """Sums of the products of patches at one end of a dimension with each other.

    Where a window lies on the padding there are only zeros. The kernel elements before the first and behind the last
    that meets anything else, along the first dimension, are left out.
    """

    def __init__(self, kernel: tuple[int, ...]) -> None:
        self._kernel = kernel
        self._sums: Tensor | None = None  # (groups, columns, columns) of the elements that aren't left out
        self.first, self.behind = kernel[0], 0  # of these

    def add(self, columns: Tensor) -> None:
        """Add patches, ``(groups, channels, elements along the first dimension, all other elements, rows)``."""
        met = (columns != 0).any(4).any(3).any(1).any(0).nonzero().flatten()
        if not len(met):
            return
        first, behind = min(int(met[0]), self.first), max(int(met[-1]) + 1, self.behind)
        if (first, behind) != (self.first, self.behind):
            self._widen(first, behind, columns.shape[1])
        values = columns[:, :, first:behind].flatten(1, 3)
        # Few rows and many columns: in place, which saves more than the half that symmetry would.
        self._sums = values @ values.mT if self._sums is None else self._sums.baddbmm_(values, values.mT)

    def by_place(self, channels: int) -> Tensor | None:
        """Return the sums as ``(groups, channels, *kernel, channels, *kernel)``; None if all of them are zero."""
        if self._sums is None:
            return None
        sizes = channels, self.behind - self.first, *self._kernel[1:]
        return self._sums.view(len(self._sums), *sizes, *sizes)

    def _widen(self, first: int, behind: int, channels: int) -> None:
        """Make room for more elements along the first dimension."""
        old = self.by_place(channels)
        if old is not None:
            sizes = channels, behind - first, *self._kernel[1:]
            new = old.new_zeros(len(old), *sizes, *sizes)
            start, size = self.first - first, self.behind - self.first
            new.narrow(2, start, size).narrow(3 + len(self._kernel), start, size).copy_(old)
            columns = math.prod(sizes)
            self._sums = new.view(len(new), columns, columns)
        self.first, self.behind = first, behind


class PatchProducts:
    """Sums the products of patches with each other, batch by batch: ``rows.T @ rows`` of all of them."""

    def __init__(self) -> None:
        self._geometry: Geometry | None = None
        self._squares: Tensor | None = None  # (groups, columns)
        self._channels = 0
        self._full: _SumsByPairs | _SumsByFrequencies = _SumsByPairs()
        # By dimension, products after its last positions, and those at its first.
        self._ends: dict[int, tuple[_EndProducts, _EndProducts]] = {}
        # By dimension, patches of some batches after its last positions and at its first, (groups, channels, elements
        # along the first dimension, all other elements, rows).
        self._waiting: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def add(self, patches: Patches) -> None:
        """Add a batch."""
        geometry, channels = patches.geometry, patches.padded.shape[1]
        if self._geometry is None:
            self._geometry, self._channels = geometry, channels
            if geometry.takes_frequencies(channels):
                self._full = _SumsByFrequencies()
        squares = patches.squares()
        self._squares = squares if self._squares is None else self._squares.add_(squares)
        self._full.add(patches)
        for dim in range(len(geometry.kernel)):
            found = geometry.ends(dim)
            if found is None:
                continue
            windows, behind = found
            last, first = (
                patches._from(dim, pixel, windows)._by_element().transpose(1, 2).unflatten(2, (windows.kernel[0], -1))
                for pixel in (behind, 0)
            )
            waiting = self._waiting.setdefault(dim, [])
            waiting.append((last, first))
            if sum(2 * one.shape[-1] for one, _ in waiting) >= _TOGETHER:
                self._multiply(dim, windows)

    def _multiply(self, dim: int, windows: Geometry) -> None:
        """Multiply the patches at the ends of a dimension that wait for it."""
        waiting = self._waiting.pop(dim, [])
        if dim not in self._ends:
            self._ends[dim] = _EndProducts(windows.kernel), _EndProducts(windows.kernel)
        for sums, columns in zip(self._ends[dim], zip(*waiting, strict=True), strict=True):
            sums.add(torch.cat(columns, dim=-1))

    def total(self) -> Tensor:
        """Return the products of all pairs of columns, ``(groups, columns, columns)``; the sums are used up."""
        geometry, squares = self._geometry, self._squares
        assert geometry is not None  # of no batch nobody asks for products
        assert squares is not None
        groups, channels, elements = len(squares), self._channels, geometry.elements
        # All of it is written: the pairs that are summed over all positions, and what follows from them.
        products = squares.new_empty(groups, channels * elements, channels * elements)
        found = products.view(groups, channels, elements, channels, elements)
        for element, other, sums in self._full.each(geometry):
            found[:, :, element, :, other] = sums
            found[:, :, other, :, element] = sums.mT
        by_place = found.view(groups, channels, *geometry.kernel, channels, *geometry.kernel)
        # The last dimension first: what the earlier ones write follows from pairs that it has written.
        for dim in reversed(range(len(geometry.kernel))):
            windows = geometry.ends(dim)
            if windows is None:
                continue
            if self._waiting.get(dim):
                self._multiply(dim, windows[0])
            self._follow(by_place, dim, geometry)
        # Sums and differences leave rounding where a column is zero throughout, such as one that meets only padding.
        is_zero = squares == 0
        if bool(is_zero.any()):
            products.masked_fill_(is_zero.unsqueeze(1) | is_zero.unsqueeze(2), 0.0)
        products.diagonal(dim1=1, dim2=2).copy_(squares)
        return products

    def _follow(self, by_place: Tensor, dim: int, geometry: Geometry) -> None:
        """Write the products of the elements behind the first ones of a dimension: each follows from one before it."""
        step = geometry.steps[dim][0]
        pairs = _Pairs(by_place, dim)
        ends = [
            (alpha, sums, found)
            for alpha, sums in zip((1.0, -1.0), self._ends.pop(dim), strict=True)
            if (found := sums.by_place(self._channels)) is not None
        ]
        for place in range(step, geometry.kernel[dim]):
            pairs.at(place, step, None).copy_(pairs.at(place - step, 0, -step))
            for alpha, sums, found in ends:
                changes = _Pairs(found, dim)
                if dim:
                    followers = pairs.at(place, step, None, along_first=slice(sums.first, sums.behind))
                    followers.add_(changes.at(place - step, 0, None), alpha=alpha)
                elif sums.first <= place - step < sums.behind:
                    followers = pairs.at(place, sums.first + step, sums.behind + step)
                    followers.add_(changes.at(place - step - sums.first, 0, None), alpha=alpha)


@dataclass(frozen=True)
class _Pairs:
    """Products ``(groups, channels, *kernel, channels, *kernel)``, looked at along one dimension of the kernel."""

    products: Tensor
    dim: int

    def at(self, place: int, first: int, behind: int | None, *, along_first: slice = slice(None)) -> Tensor:
        """Return those of a place with the others from a first one on; ``along_first`` picks of the first dimension."""
        dims = (self.products.dim() - 3) // 2
        index: list[int | slice] = [slice(None)] * self.products.dim()
        index[2], index[3 + dims] = along_first, along_first
        index[2 + self.dim], index[3 + dims + self.dim] = place, slice(first, behind)
        return self.products[tuple(index)]


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
    shifted = entries * (geometry.multiplications(channels) + passes * geometry.multiplications_once(channels, outputs))
    # Many small products take about twice as long as one large product of as many multiplications.
    return 2.0 * shifted < drawn


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
