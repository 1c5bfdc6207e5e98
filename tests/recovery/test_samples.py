from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.fx import symbolic_trace

from nni_topo.errors import ConfigError
from nni_topo.maths.least_squares.normal import NormalEquations
from nni_topo.recovery.plan import Equation, Solvable
from nni_topo.recovery.reconstruct import ReconstructTask
from nni_topo.recovery.samples import (
    OtherSamplesError,
    Sampler,
    _add,
    _check_same_entries,
    _Chunk,
    _parts,
    _sampled_rows,
    check_ridge,
    draw_unpadded,
    numbers_drawn,
    pass_over,
)


def test_samples_are_kept_for_refinements_as_long_as_they_just_fit():
    chunk = _Chunk(torch.zeros(1, 4, 2), torch.zeros(1, 4, 3), torch.zeros(1, 4, 3), torch.zeros(4, dtype=torch.bool))
    assert chunk.nbytes == 4 * 4 * (2 + 3 + 3)
    for cache_bytes, is_refined, kept in [(256, True, 2), (255, True, None), (256, False, None)]:
        sampler = Sampler(None, (), 0, cache_bytes)
        assert len(list(sampler._keep(iter([chunk, chunk]), is_refined))) == 2
        assert (sampler._chunks and len(sampler._chunks)) == kept


def test_of_layers_with_many_positions_some_are_drawn_and_the_generator_says_how_many():
    """Of 12 positions of two entries the real ones are 3 and 6: a share of 3 / 8."""
    real = torch.zeros(2, 12, dtype=torch.bool)
    real[0, :3] = real[1, :6] = True
    for mask, wanted, count, drawn in (
        (None, 4, 4, 8),
        (None, 12, 12, 0),
        (None, 13, 12, 0),
        (real, 3, 8, 16),
        (real, 4, 11, 22),
        (real, 5, 12, 0),
        (real[:, :6], 4, 4, 8),  # not of these positions
        (torch.zeros(2, 12, dtype=torch.bool), 1, 12, 0),
    ):
        assert numbers_drawn(12, 2, wanted, mask) == drawn
        one, other = (torch.Generator().manual_seed(3) for _ in range(2))
        positions, stay = draw_unpadded(12, 2, wanted, one, mask)
        assert positions.shape == (2, count)
        if mask is None or mask.shape != (2, 12):
            assert stay is None
        else:
            assert stay.tolist() == [
                [bool(row[at]) for at in places] for row, places in zip(mask, positions, strict=True)
            ]
        pass_over(other, drawn)
        assert torch.equal(torch.rand(2, generator=one), torch.rand(2, generator=other))


@pytest.mark.parametrize(
    ("entries", "size", "parts"),
    [
        (5, 0, [(0, 5)]),
        (5, 2**22, [(0, 2), (2, 4), (4, 5)]),
        (3, 2**23, [(0, 1), (1, 2), (2, 3)]),
        (2, 2**30, [(0, 1), (1, 2)]),
        (0, 1, []),
    ],
)
def test_entries_are_cut_into_parts_of_eight_million_numbers(entries, size, parts):
    assert [range(entries)[part] for part in _parts(entries, size)] == [range(*each) for each in parts]


@pytest.mark.parametrize(("unknowns", "rows"), [(1, 16384), (1024, 16384), (1025, 16400), (5000, 80000)])
def test_sixteen_rows_are_drawn_for_each_unknown_or_many(unknowns, rows):
    layer = nn.Linear(unknowns, 2)
    graph = symbolic_trace(nn.Sequential(layer))
    node = next(node for node in graph.graph.nodes if node.op == "call_module")
    solvable = Solvable("0", node, torch.arange(unknowns)[None], torch.arange(2)[None], "0")
    task = ReconstructTask(Equation(solvable, node, ()), graph, graph)
    assert (task.unknowns, _sampled_rows(task)) == (unknowns, rows)
    sampler = Sampler(None, (3, 1), 0, 0)
    assert [sampler._wanted(task, index, entries) for index, entries in ((0, 3), (1, 1), (0, 30))] == [
        rows // 4 + 1,
        rows // 4 + 1,
        rows * 3 // 4 // 30 + 1,
    ]


def test_every_fifth_entry_is_held_out_or_the_entries_of_groups():
    sampler = Sampler(None, (4, 7), 0, 0)
    assert sampler.held_out.nonzero().flatten().tolist() == [4, 9]
    assert sampler._marks(0, 0, 4).tolist() == [False] * 4
    assert sampler._marks(1, 4, 7).nonzero().flatten().tolist() == [0, 5]
    assert sampler._marks(1, 8, 14).nonzero().flatten().tolist() == [1, 6, 11]
    marks = torch.tensor([False, True, False, False, True, False])
    grouped = Sampler(None, (2, 4), 0, 0, marks)
    assert grouped.held_out is marks
    assert grouped._marks(0, 0, 2).tolist() == [False, True]
    assert grouped._marks(1, 2, 4).tolist() == [False, False, True, False]
    assert grouped._marks(0, 0, 4).tolist() == [False, False, True, True]
    assert grouped._marks(1, 3, 3).tolist() == [False, True, False]  # not a number for each sample


@pytest.mark.parametrize("is_held", [False, True])
def test_sums_are_of_the_marked_rows(is_held):
    generator = torch.Generator().manual_seed(0)
    inputs, lacking, wanted = (torch.randn(1, 6, width, generator=generator).double() for width in (2, 3, 3))
    marks = torch.tensor([True, False, True, False, False, False])
    rows = marks if is_held else ~marks
    sums = NormalEquations()
    _add(sums, _Chunk(inputs, lacking, wanted, marks), rows)
    assert sums.samples == int(rows.sum())
    torch.testing.assert_close(sums.sums["x"], inputs[:, rows].sum(1))
    torch.testing.assert_close(sums.sums["y"], lacking[:, rows].sum(1))
    _add(sums, _Chunk(inputs, lacking, wanted, marks), torch.zeros(6, dtype=torch.bool))
    assert sums.samples == int(rows.sum())


def test_layers_that_get_other_samples_are_told():
    node = symbolic_trace(nn.Sequential(nn.Linear(2, 2))).graph
    node = next(each for each in node.nodes if each.op == "call_module")
    solvable = Solvable("0", node, torch.arange(2)[None], torch.arange(2)[None], "0")
    net = nn.Sequential(nn.Linear(2, 2))
    task = ReconstructTask(Equation(solvable, node, ()), net, net)
    _check_same_entries(task, {node: torch.zeros(3, 2)}, {node: torch.zeros(3, 2)})
    with pytest.raises(OtherSamplesError, match=r"got 3 and 2: .* \(0\)"):
        _check_same_entries(task, {node: torch.zeros(3, 2)}, {node: torch.zeros(2, 2)})


@pytest.mark.parametrize("ridge", [0, 0.0, 2, 1e9, "auto"])
def test_ridges_at_their_bounds_are_taken(ridge):
    check_ridge(ridge)
    for wrong in (math.inf, -1e-9, None, False, "", [0.1]):
        with pytest.raises(ConfigError, match="ridge must be 'auto' or a finite number of at least 0, got"):
            check_ridge(wrong)
