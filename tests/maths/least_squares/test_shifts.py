"""Products of patches by shifts are those of patches that are written down."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from nni_topo.maths.least_squares import shifts
from nni_topo.maths.least_squares.normal import NormalEquations
from nni_topo.maths.least_squares.shifts import (
    Geometry,
    Patches,
    PatchProducts,
    _SumsByFrequencies,
    _SumsByPairs,
    pays,
    symmetric,
)


@st.composite
def geometries(draw):
    dims = draw(st.integers(1, 3))

    def numbers(high):
        return tuple(draw(st.lists(st.integers(1, high), min_size=dims, max_size=dims)))

    return Geometry(numbers(4 if dims < 3 else 3), numbers(3), numbers(3), numbers(5 if dims < 3 else 3))


def inputs_of(geometry, entries, channels, seed, spare=0):
    """Padded inputs that just hold all windows, and ``spare`` pixels more."""
    pixels = [
        (size - 1) * stride + (kernel - 1) * dilation + 1 + spare
        for size, stride, kernel, dilation in zip(
            geometry.size, geometry.stride, geometry.kernel, geometry.dilation, strict=True
        )
    ]
    return torch.randn(entries, channels, *pixels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def written(inputs, groups, geometry):
    """The patches as PyTorch's unfold gives them, (groups, positions * entries, columns)."""
    windows, dims = inputs, len(geometry.kernel)
    for dim in range(dims):
        reach = geometry.dilation[dim] * (geometry.kernel[dim] - 1) + 1
        windows = windows.unfold(2 + dim, reach, geometry.stride[dim])[..., :: geometry.dilation[dim]]
        windows = windows.narrow(2 + dim, 0, geometry.size[dim])
    windows = windows.unflatten(1, (groups, -1))
    order = [1, *range(3, 3 + dims), 0, 2, *range(3 + dims, 3 + 2 * dims)]
    return windows.permute(order).reshape(groups, geometry.positions * len(inputs), -1)


@settings(max_examples=60, deadline=None)
@given(geometries(), st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(0, 1), st.integers(0, 99))
def test_sums_by_shifts_are_those_of_the_patches_that_unfold_gives(geometry, groups, channels, entries, spare, seed):
    inputs = inputs_of(geometry, entries, groups * channels, seed, spare)
    rows = written(inputs, groups, geometry)
    patches = Patches.of(inputs, groups, geometry)
    assert (patches.rows, patches.columns) == rows.shape[1:]
    assert torch.equal(patches.written(), rows)
    products = PatchProducts()
    for part in inputs.split(2):
        products.add(Patches.of(part, groups, geometry))
    torch.testing.assert_close(products.total(), rows.mT @ rows, rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(patches.total(), rows.sum(1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(patches.squares(), rows.square().sum(1), rtol=1e-12, atol=1e-12)
    values = torch.randn(groups, patches.rows, 2, dtype=torch.float64)
    torch.testing.assert_close(patches.cross(values), rows.mT @ values, rtol=1e-11, atol=1e-11)
    weights = torch.randn(groups, patches.columns, 2, dtype=torch.float64)
    torch.testing.assert_close(patches.times(weights), rows @ weights, rtol=1e-11, atol=1e-11)
    marks = torch.arange(entries) % 2 == 0
    chosen = patches.chosen(marks.repeat(geometry.positions))
    assert torch.equal(chosen.written(), rows[:, marks.repeat(geometry.positions)])


@st.composite
def large_kernels(draw):
    dims = draw(st.integers(1, 3))
    kernel = draw(st.permutations([1, *draw(st.sampled_from([(9, 1), (12, 2), (5, 6)]))]))[:dims]
    size = draw(st.lists(st.integers(1, 6), min_size=dims, max_size=dims))
    dilation = draw(st.lists(st.integers(1, 3), min_size=dims, max_size=dims))
    # along dimensions without shifts any stride will do
    stride = [1 if elements > 1 else draw(st.integers(1, 3)) for elements in kernel]
    return Geometry(tuple(kernel), tuple(stride), tuple(dilation), tuple(size))


@settings(max_examples=60, deadline=None)
@given(large_kernels(), st.integers(1, 3), st.integers(1, 4), st.integers(0, 1), st.integers(0, 99))
def test_sums_of_large_kernels_are_the_same_pair_by_pair_and_by_frequencies(geometry, groups, channels, spare, seed):
    found = {}
    for way in (_SumsByPairs, _SumsByFrequencies):
        if way is _SumsByFrequencies and not geometry.shifted:
            continue
        sums = way()
        # images of two sizes
        for more in (0, 2):
            size = tuple(each + more for each in geometry.size)
            own = replace(geometry, size=size)
            sums.add(Patches.of(inputs_of(own, 5, groups * channels, seed + more, spare), groups, own))
        found[way] = {(one, other): products for one, other, products in sums.each(geometry)}
    first = found.pop(_SumsByPairs)
    for others in found.values():
        assert first.keys() == others.keys()
        for pair, products in first.items():
            torch.testing.assert_close(others[pair], products, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("kernel", [(1, 40), (40, 1), (7, 7), (3, 1, 30)])
def test_products_with_outputs_are_the_same_by_frequencies(kernel, dilation):
    others = [2 if each == 1 else 1 for each in kernel]
    geometry = Geometry(
        kernel, tuple(others), (dilation,) * len(kernel), tuple(20 if each > 1 else 3 for each in kernel)
    )
    assert geometry.takes_frequencies_once()
    inputs = inputs_of(geometry, 3, 4, seed=2)
    patches, rows = Patches.of(inputs, 2, geometry), written(inputs, 2, geometry)
    values = torch.randn(2, patches.rows, 3, dtype=torch.float64)
    weights = torch.randn(2, patches.columns, 3, dtype=torch.float64)
    torch.testing.assert_close(patches.cross(values), rows.mT @ values, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(patches.times(weights), rows @ weights, rtol=1e-11, atol=1e-11)
    assert patches.cross(values[..., :0]).shape == (2, patches.columns, 0)
    assert patches.times(weights[..., :0]).shape == (2, patches.rows, 0)


def test_frequencies_are_taken_where_they_are_less_work_and_no_more_memory():
    assert Geometry((64,), (1,), (1,), (128,)).takes_frequencies(16)
    assert Geometry((7, 7), (1, 1), (1, 1), (14, 14)).takes_frequencies(16)
    assert not Geometry((3, 3), (1, 1), (1, 1), (14, 14)).takes_frequencies(16)
    assert not Geometry((64,), (4,), (1,), (128,)).takes_frequencies(16)
    assert not Geometry((1,), (1,), (1,), (128,)).takes_frequencies(16)


@pytest.mark.parametrize("kernel", [(1, 40), (40, 1), (7, 7)])
def test_products_of_large_kernels_with_padding_are_those_of_rows(kernel):
    geometry = Geometry(kernel, (1, 1), (1, 1), tuple(12 if each > 1 else 3 for each in kernel))
    inputs = inputs_of(geometry, 6, 4, seed=1)
    for dim, each in enumerate(kernel):
        # as with padding by half of the kernel
        inputs.narrow(2 + dim, 0, each // 2).zero_()
        inputs.narrow(2 + dim, inputs.shape[2 + dim] - each // 2, each // 2).zero_()
    assert geometry.takes_frequencies(4)
    products = PatchProducts()
    for part in inputs.split(4):
        products.add(Patches.of(part, 1, geometry))
    rows = written(inputs, 1, geometry)
    torch.testing.assert_close(products.total(), rows.mT @ rows, rtol=1e-11, atol=1e-10)


@pytest.mark.parametrize("kernel", [(1, 7), (7, 1), (5, 4), (3, 2, 3)])
def test_borders_of_zeros_may_be_narrower_in_later_batches(kernel, monkeypatch):
    # Ends of every batch are multiplied on their own; of the first there is nothing but zeros to see.
    monkeypatch.setattr(shifts, "_TOGETHER", 1)
    dims = len(kernel)
    geometry = Geometry(kernel, (1,) * dims, (1,) * dims, (6,) * dims)
    inputs = inputs_of(geometry, 5, 2, seed=3)
    for entry, border in enumerate((100, 4, 2, 3, 0)):
        for dim in range(dims):
            inputs[entry].narrow(1 + dim, 0, min(border, inputs.shape[2 + dim])).zero_()
            behind = max(inputs.shape[2 + dim] - border, 0)
            inputs[entry].narrow(1 + dim, behind, inputs.shape[2 + dim] - behind).zero_()
    rows = written(inputs, 1, geometry)
    products = PatchProducts()
    for part in inputs.split(1):
        products.add(Patches.of(part, 1, geometry))
    torch.testing.assert_close(products.total(), rows.mT @ rows, rtol=1e-12, atol=1e-11)


@settings(max_examples=60, deadline=None)
@given(geometries(), st.integers(0, 99), st.data())
def test_batches_with_zeros_at_other_borders_add_up(geometry, seed, data):
    inputs = inputs_of(geometry, 4, 2, seed)
    batches = list(inputs.split(1))
    for batch in batches:
        for dim, pixels in enumerate(batch.shape[2:], start=2):
            first = data.draw(st.integers(0, pixels - 1))
            behind = data.draw(st.integers(first + 1, pixels))
            batch.narrow(dim, 0, first).zero_()
            batch.narrow(dim, behind, pixels - behind).zero_()
    rows = written(inputs, 1, geometry)
    products = PatchProducts()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shifts, "_TOGETHER", 1)  # each batch is multiplied by itself
        for batch in batches:
            products.add(Patches.of(batch, 1, geometry))
    torch.testing.assert_close(products.total(), rows.mT @ rows, rtol=1e-12, atol=1e-11)


def test_a_column_that_only_meets_padding_is_exactly_zero():
    geometry = Geometry((9,), (1,), (1,), (3,))
    inputs = functional.pad(torch.randn(5, 2, 3, dtype=torch.float64), (4, 4))
    products = PatchProducts()
    products.add(Patches.of(inputs, 1, geometry))
    rows = written(inputs, 1, geometry)[0]
    found, is_zero = products.total()[0], (rows == 0).all(0)
    assert 0 < is_zero.sum() < len(is_zero)
    assert not found[is_zero].any()
    assert not found[:, is_zero].any()
    torch.testing.assert_close(found.diagonal(), rows.square().sum(0))


@pytest.mark.parametrize("known", [False, True])
def test_equations_of_patches_and_of_rows_are_solved_alike(known):
    geometry = Geometry((3, 2), (1, 2), (1, 1), (5, 4))
    inputs = inputs_of(geometry, 12, 4, 1) + 0.3
    rows = written(inputs, 2, geometry)
    targets = rows @ torch.randn(2, rows.shape[2], 3, dtype=torch.float64) + 0.1 * torch.randn(2, rows.shape[1], 3)
    by_rows, by_shifts = NormalEquations(), NormalEquations()
    by_rows.add(rows, targets, targets)
    by_shifts.add(Patches.of(inputs, 2, geometry), targets, targets)
    if known:  # a second right-hand side to the same inputs
        targets = targets.clamp(min=0.0)
        by_rows, by_shifts = NormalEquations(by_rows), NormalEquations(by_shifts)
        by_rows.add(rows, targets, targets)
        by_shifts.add(Patches.of(inputs, 2, geometry), targets, targets)
    assert by_shifts.samples == by_rows.samples
    expected, found = (each.solve(1e-3, intercept=True) for each in (by_rows, by_shifts))
    torch.testing.assert_close(found.weights, expected.weights, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found.shift, expected.shift, rtol=1e-9, atol=1e-10)
    assert by_shifts.squared_error(found) == pytest.approx(by_rows.squared_error(expected), rel=1e-9)


def test_rows_and_patches_may_be_added_to_the_same_equations():
    geometry = Geometry((3,), (1,), (1,), (6,))
    inputs = inputs_of(geometry, 10, 2, 2)
    rows = written(inputs, 1, geometry)
    both = NormalEquations()
    first = written(inputs[:4], 1, geometry)
    both.add(first, first[..., :1], first[..., :1])
    rest = written(inputs[4:], 1, geometry)
    both.add(Patches.of(inputs[4:], 1, geometry), rest[..., :1], rest[..., :1])
    torch.testing.assert_close(both.sums["xx"], symmetric(rows), rtol=1e-12, atol=1e-12)
    assert both.is_finite()
    both.add(Patches.of(inputs * torch.nan, 1, geometry), rows[..., :1], rows[..., :1])
    assert not both.is_finite()


@pytest.mark.parametrize(
    ("geometry", "channels", "outputs", "entries", "sampled", "expected"),
    [
        (Geometry((64,), (1,), (1,), (100,)), 32, 16, 1000, 100_000, True),
        (Geometry((5, 5), (1, 1), (1, 1), (32, 32)), 32, 32, 100, 102_400, True),
        # they save less than their many small products cost
        (Geometry((3, 3), (1, 1), (1, 1), (6, 6)), 128, 128, 128, 18_432, False),
        # a small share of the positions is enough
        (Geometry((3, 3), (1, 1), (1, 1), (56, 56)), 64, 64, 1000, 16_384, False),
        # one element has no neighbour, and with a large stride patches share nothing
        (Geometry((1, 1), (1, 1), (1, 1), (16, 16)), 32, 32, 100, 25_600, False),
        (Geometry((4, 4), (4, 4), (1, 1), (16, 16)), 32, 32, 100, 25_600, False),
        # fewer rows than columns are kept as they are; as many aren't
        (Geometry((64,), (1,), (1,), (4,)), 32, 16, 100, 16_384, False),
        (Geometry((64,), (1,), (1,), (20,)), 32, 16, 102, 16_384, False),
        (Geometry((64,), (1,), (1,), (16,)), 32, 16, 128, 16_384, True),
    ],
)
def test_shifts_pay_for_large_kernels_at_many_places(geometry, channels, outputs, entries, sampled, expected):
    assert pays(geometry, channels, outputs, entries, sampled) is expected


def test_products_with_outputs_are_counted_as_they_are_computed():
    long, short = Geometry((64,), (1,), (1,), (100,)), Geometry((2,), (1,), (1,), (4,))
    assert long.takes_frequencies_once()
    assert long.multiplications_once(3, 5) < 64 * 100 * 3 * 5
    assert not short.takes_frequencies_once()
    assert short.multiplications_once(3, 5) == 2 * 4 * 3 * 5
