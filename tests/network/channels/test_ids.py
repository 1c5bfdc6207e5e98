"""Channel ids: which are tied, which stay and for what reason, and how they are carried to tensors of other shapes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.fx import Graph

from nni_topo.network.channels.ids import (
    FIXED,
    ChannelIds,
    carry,
    carry_reduced,
    compressed,
    fixed,
    meet_alike,
    staying,
    varies,
)
from nni_topo.network.channels.reasons import Reason

JOINED, PINNED, READ = (Reason("joins_constant", text=text) for text in ("joined", "pinned", "read"))


@pytest.fixture
def ids() -> ChannelIds:
    """Nine ids: that of what stays, and 1 to 8."""
    found = ChannelIds()
    found.reason = JOINED
    found.node = Graph().placeholder("x")
    assert found.new(8) == 1
    return found


def test_ids_are_given_out_one_after_the_other(ids):
    assert ids.new(3) == 9
    assert ids.new(0) == ids.new(2) == 12
    assert ids.count == 14


def test_a_group_has_the_id_of_its_first_channel(ids):
    ids.tie(np.array([5, 6]), np.array([2, 5]))
    ids.tie(8, np.array([7, 7]))
    before, after, reasons = ids.settled()
    assert before.tolist() == after.tolist() == [0, 1, 2, 3, 4, 2, 2, 7, 7]
    assert reasons == {}


def test_what_is_tied_to_fixed_stays_with_all_that_it_is_tied_to(ids):
    ids.tie(np.array([1, 2, FIXED]), np.array([FIXED, 3, 4]))
    ids.tie(1, 8)
    before, after, reasons = ids.settled()
    assert before.tolist() == [0, 1, 2, 2, 4, 5, 6, 7, 1]
    assert after.tolist() == [0, 0, 2, 2, 0, 5, 6, 7, 0]
    assert reasons == {1: JOINED, 4: JOINED}


def test_fixed_ids_tied_with_one_another_say_nothing(ids):
    ids.tie(np.array([FIXED, FIXED]), np.array([FIXED, FIXED]))
    assert ids.settled()[2] == {}


def test_the_first_reason_counts_and_pins_come_before_columns(ids):
    ids.pin_unless_tied(np.array([[1, 2], [3, 4]]), READ)
    ids.pin(np.array([3]), PINNED)
    ids.pin(np.array([3, 5]), JOINED)
    _, after, reasons = ids.settled()
    assert reasons == {3: PINNED, 5: JOINED, 1: READ, 2: READ, 4: READ}
    assert after.tolist() == [0, 0, 0, 0, 0, 0, 6, 7, 8]


def test_columns_whose_channels_are_all_tied_may_go(ids):
    ids.pin_unless_tied(np.array([[1, 2, 5], [3, 4, 5], [3, 4, 6]]), READ)
    ids.tie(np.array([1, 5]), np.array([3, 6]))
    _, after, reasons = ids.settled()
    assert after.tolist() == [0, 1, 0, 1, 0, 5, 5, 7, 8]
    assert set(reasons) == {2, 4}
    ids.tie(2, 4)  # as soon as the other ones are too
    assert ids.settled()[2] == {}


def test_ties_are_listed_by_operation_without_those_that_stay(ids):
    first = ids.node
    ids.tie(np.array([1, FIXED]), np.array([2, 3]))
    ids.node = second = Graph().placeholder("y")
    ids.tie(4, 5)
    assert [(node, pairs.tolist()) for node, pairs in ids.ties()] == [(first, [[1, 2]]), (second, [[4, 5]])]


def test_tensors_are_coupled_entry_by_entry_where_they_meet(ids):
    one = torch.tensor([1, 2, 3]).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    ids.couple(one, torch.tensor([[5, 6, 7]]).view(1, 3, 1, 1))
    assert ids.settled()[0].tolist() == [0, 1, 2, 3, 4, 1, 2, 3, 8]
    # Along the last dimension the other tensor differs: 4 meets 8 in its second place.
    ids.couple(torch.tensor([[4], [4]]), torch.tensor([[4, 8], [4, 8]]))
    assert ids.settled()[0].tolist() == [0, 1, 2, 3, 4, 1, 2, 3, 4]


def test_entries_that_differ_in_any_dimension_are_coupled(ids):
    for dim in range(3):
        ids = ChannelIds()
        ids.reason, ids.node = JOINED, Graph().placeholder("x")
        ids.new(8)
        one, other = torch.ones(2, 2, 2, dtype=torch.int64), torch.full((2, 2, 2), 3)
        other.select(dim, 1).fill_(6)
        ids.couple(one, other)
        assert ids.settled()[0].tolist() == [0, 1, 2, 1, 4, 5, 1, 7, 8]
    ids.couple(torch.zeros(0, 3, dtype=torch.int64), torch.ones(1, 3, dtype=torch.int64))
    assert len(ids.ties()) == 2


def test_ids_of_one_channel_are_tied_and_the_first_stands_for_all(ids):
    same = torch.tensor([1, 2, 3]).view(1, 3, 1).expand(4, 3, 5)
    assert ids.per_channel(same, 1).tolist() == [1, 2, 3]
    assert ids.ties() == []
    for dim, places in ((1, [[1, 4], [2, 2], [3, 7]]), (0, [[1, 2, 3], [4, 2, 7]])):
        rows = torch.tensor([[1, 2, 3], [4, 2, 7]])
        assert ids.per_channel(rows, dim).tolist() == [row[0] for row in places]
    assert ids.settled()[0].tolist() == [0, 1, 1, 1, 1, 5, 6, 1, 8]


def test_ids_from_outside_stay_and_other_leaves_are_as_they_are():
    found = fixed(torch.randn(2, 3))
    assert (tuple(found.shape), found.dtype, int(found.max())) == ((2, 3), torch.int64, FIXED)
    assert fixed("a") == "a"
    assert compressed(3) == 3
    assert staying((4, 0)).shape == (4, 0)


def test_one_entry_is_kept_of_dimensions_along_which_ids_are_the_same():
    ids = torch.arange(3).view(1, 3, 1).expand(2, 3, 4)
    found = compressed(ids)
    assert found.tolist() == [[[0], [1], [2]]]
    found[0] = 7
    assert ids.unique().tolist() == [0, 1, 2]  # it is a copy
    assert compressed(torch.zeros(0, 5)).shape == (0, 1)
    assert compressed(ids.contiguous()).shape == (1, 3, 1)


def test_ids_vary_along_a_dimension_if_any_entry_differs_from_the_first():
    ids = torch.zeros(2, 3, 4, dtype=torch.int64)
    ids[1, 2, 3] = 1
    assert [varies(ids, d) for d in range(3)] == [True, True, True]
    assert [varies(ids[:1], d) for d in range(3)] == [False] * 3
    assert [varies(torch.arange(3).view(3, 1).expand(3, 2), d) for d in range(2)] == [True, False]
    assert varies(torch.arange(2), 0)
    assert not varies(torch.arange(1), 0)


def channels(*shape: int, dim: int = 1) -> torch.Tensor:
    """Return ids 5, 6, ... along a dimension."""
    view = [1] * len(shape)
    view[dim] = -1
    return torch.arange(5, 5 + shape[dim]).view(view).expand(shape)


def test_ids_are_carried_to_other_sizes_behind_the_same_channels():
    for shape in ((2, 3, 7), (2, 3), (2, 3, 1, 1), (2, 3, 9, 2, 2)):
        assert torch.equal(carry(channels(2, 3, 4, 4), shape), channels(*shape))
    same = channels(2, 3, 4, dim=2)
    assert carry(same, (2, 3, 4)) is same
    assert carry(same, (2, 3, 5)) is None
    assert carry(channels(2, 3), (2, 4)) is None
    assert carry(channels(2, 3), (1, 3, 1)) is None
    assert carry(channels(3, dim=0), (3, 2)) is None
    assert carry(channels(3, 2), (3,)) is None
    assert torch.equal(carry(channels(4, 3), (4, 3, 1)), channels(4, 3, 1))


def test_reductions_leave_the_channels_that_they_do_not_reduce():
    for dims, shape in (((2,), (2, 3, 4)), ((2,), (2, 3, 1, 4)), ((0, 3), (3, 5)), ((), (2, 3, 5, 4))):
        place = shape.index(3)
        assert torch.equal(carry_reduced(channels(2, 3, 5, 4), shape, dims), channels(*shape, dim=place))
    assert carry_reduced(channels(2, 3, 5, 4), (2, 5, 4), (1,)).unique().tolist() == [FIXED]
    assert carry_reduced(channels(2, 3, 5, 4), (7,), (0, 1, 2, 3)).tolist() == [FIXED] * 7
    assert carry_reduced(channels(2, 3, 5), (3,), (2,)) is None
    both = channels(2, 3, 4) + 10 * channels(2, 3, 4, dim=2)
    assert carry_reduced(both, (2, 3), (2,)) is None
    assert carry_reduced(both, (2,), (1, 2)).tolist() == [FIXED] * 2


def test_tensors_meet_if_they_broadcast_to_exactly_the_shape():
    one, other = torch.zeros(2, 3, 1), torch.zeros(1, 4)
    assert meet_alike([one, other], (2, 3, 4))
    assert not meet_alike([one, other], (1, 2, 3, 4))
    assert not meet_alike([one, torch.zeros(2, 1)], (2, 3, 4))
    assert not meet_alike([one, torch.zeros(4, 1)], (2, 3, 4))


def test_ids_are_counted_with_those_that_were_given_out_together():
    ids = ChannelIds()
    assert (ids.new(3), ids.new(1), ids.new(2)) == (1, 4, 5)
    assert [ids.given_with(channel) for channel in range(1, 7)] == [3, 3, 3, 1, 2, 2]
