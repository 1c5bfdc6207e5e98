from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import nni_topo
from nni_topo.hooks import PruningUnit
from nni_topo.pruners.agreement import Agreement


def unit(name, ties, parts=1, members=1):
    targets = tuple((f"{name}{place}", "weight") for place in range(members))
    return PruningUnit(name, targets, len(ties), parts, 2, 0.5, None, 0.0, 1.0, ties=tuple(ties))


def first(units, counts):
    """The first blocks of each part of each unit, so many each."""
    rows = zip(units, counts, strict=True)
    return {each.name: np.tile(np.arange(each.rows) < count, each.parts) for each, count in rows}


def agreed(units, counts, scores=None):
    kept = first(units, counts)
    scores = {each.name: scores[each.name] if scores else np.zeros(each.blocks) for each in units}
    return {name: np.flatnonzero(own).tolist() for name, own in Agreement(units)(kept, scores).items()}


def test_what_has_no_ties_comes_back_as_it_is():
    kept = {"a": np.array([False, True, True])}
    assert Agreement([unit("a", ())])(kept, {"a": np.arange(3)[::-1]})["a"] is kept["a"]


def test_a_wide_unit_follows_a_narrow_one_and_fills_up_with_its_own():
    units = [unit("wide", range(8)), unit("narrow", range(4, 8))]
    scores = {"wide": [1, 2, 3, 4, 9, 9, 9, 9], "narrow": [0, 5, 0, 5]}
    assert agreed(units, [4, 2], scores) == {"wide": [2, 3, 5, 7], "narrow": [1, 3]}
    assert agreed(units, [5, 2], scores)["wide"] == [1, 2, 3, 5, 7]


def test_units_that_hold_one_another_all_keep_what_they_ask_for():
    units = [unit("c", range(9)), unit("a", range(3)), unit("b", range(6))]
    assert agreed(units, [4, 2, 3]) == {"a": [0, 1], "b": [0, 1, 3], "c": [0, 1, 3, 6]}


def test_what_units_share_keeps_the_share_that_they_keep():
    # No unit lies within another, so that no order of the units would do where each takes its best.
    units = [unit("ab", [0, 1, 2, 3]), unit("bc", [2, 3, 4, 5]), unit("ca", [4, 5, 0, 1])]
    scores = {"ab": [1, 1, 9, 9], "bc": [9, 9, 1, 1], "ca": [1, 1, 1, 1]}
    assert agreed(units, [2, 2, 2], scores) == {"ab": [0, 2], "bc": [0, 2], "ca": [0, 2]}


def test_blocks_of_one_unit_that_are_tied_go_together():
    units = [unit("twice", [0, 1, 2, 3, 0, 1, 2, 3]), unit("once", range(4))]
    assert agreed(units, [4, 2]) == {"twice": [0, 1, 4, 5], "once": [0, 1]}
    # An odd number can't stay of pairs: one more does.
    assert agreed(units, [3, 1]) == {"twice": [0, 1, 4, 5], "once": [0, 1]}


def test_where_counts_contradict_each_other_more_stays():
    units = [unit("wide", range(4)), unit("narrow", [2, 3])]
    assert agreed(units, [4, 1]) == {"wide": [0, 1, 2, 3], "narrow": [0, 1]}
    assert agreed(units, [1, 2]) == {"wide": [2, 3], "narrow": [0, 1]}


def test_scores_count_for_each_target_that_holds_a_block():
    units = [unit("one", range(2)), unit("many", range(2), members=3)]
    assert agreed(units, [1, 1], {"one": [4, 0], "many": [0, 1]})["one"] == [0]
    assert agreed(units, [1, 1], {"one": [2, 0], "many": [0, 1]})["one"] == [1]


def test_of_equal_scores_and_equal_but_for_rounding_the_first_stay():
    units = [unit("wide", range(6)), unit("narrow", range(3, 6))]
    scores = {"wide": [1, 1 + 1e-9, 1, 0.1, 0.3 - 0.2, 0.1], "narrow": [0.1] * 3}
    assert agreed(units, [3, 1], scores) == {"wide": [0, 1, 3], "narrow": [0]}


def test_parts_keep_equally_many():
    units = [unit("blocks", range(8), parts=2), unit("half", [0, 1, 2, 3])]
    # One part has to keep three of its four, so that the other does as well.
    assert agreed(units, [2, 3]) == {"blocks": [0, 1, 2, 4, 5, 6], "half": [0, 1, 2]}


@st.composite
def tied(draw):
    """Some units over a pool of numbers, and how many rows each of them keeps."""
    units, counts = [], []
    for name in "abcd"[: draw(st.integers(1, 4))]:
        parts, rows = draw(st.integers(1, 3)), draw(st.integers(1, 4))
        numbers = st.lists(st.integers(0, 9), min_size=parts * rows, max_size=parts * rows)
        units.append(unit(name, draw(numbers), parts, draw(st.integers(1, 2))))
        counts.append(draw(st.integers(1, rows)))
    return units, counts


@given(tied(), st.integers(0, 2**16))
def test_any_choice_agrees_and_keeps_no_less(case, seed):
    units, counts = case
    kept, generator = first(units, counts), np.random.default_rng(seed)
    found = [
        Agreement(units)(kept, {each.name: generator.permutation(each.blocks) / 7 for each in units}) for _ in range(2)
    ]
    for each, count in zip(units, counts, strict=True):
        left = [chosen[each.name].reshape(each.parts, each.rows).sum(1) for chosen in found]
        # How many stay doesn't depend on the scores, which budgets count on.
        assert left[0].tolist() == left[1].tolist()
        assert len(set(left[0].tolist())) == 1
        assert left[0][0] >= count
    by_number: dict[int, set[bool]] = {}
    for each in units:
        for number, stays in zip(each.ties, found[0][each.name].tolist(), strict=True):
            by_number.setdefault(number, set()).add(stays)
    assert all(len(stays) == 1 for stays in by_number.values())


class Joined(nn.Module):
    """A wide convolution is added to two narrow ones side by side."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.wide, self.head = (nn.Conv2d(*each, 1) for each in ((3, 4), (3, 6), (3, 10), (10, 2)))

    def forward(self, x):
        return self.head(torch.relu(torch.cat([self.one(x), self.two(x)], 1) + self.wide(x)))


def test_layers_that_share_channels_in_part_lose_the_same_ones():
    torch.manual_seed(0)
    model, images = Joined(), torch.rand(2, 3, 4, 4)
    config = [{"op_names": ["one", "two", "wide"], "sparse_ratio": 0.5}]
    pruner = nni_topo.RandomPruner(model, nni_topo.dependency_groups(model, images, config), seed=0)
    _, masks = pruner.compress()
    one, two, wide = (masks[name]["weight"][:, 0, 0, 0] for name in ("one", "two", "wide"))
    assert (int(one.sum()), int(two.sum())) == (2, 3)
    assert torch.equal(wide, torch.cat([one, two]))
