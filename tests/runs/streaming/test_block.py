"""What a block gets beside the states: what is the same in all batches, and what comes with each."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nni_topo.errors import ConfigError, DataError
from nni_topo.runs.streaming.block import BlockNet, entering

WIDTH = 2


class Tokens(nn.Module):
    """The inputs of a language model."""

    def forward(self, input_ids, attention_mask=None, lengths=None, scale=None):
        return input_ids


def states_of(ids):
    return ids[..., None].float().expand(*ids.shape, WIDTH)


def skeleton(arguments):
    """A model in front of its block `layers.3`; `arguments` of a call's inputs are those of the block."""
    model = Tokens()

    def entered(call, index):
        assert index == 3
        return arguments(*call[0], **call[1])

    return SimpleNamespace(model=model, entering=entered, name_of=lambda index: f"layers.{index}")


def calls(*sizes, length=4, padded=()):
    found = []
    for number, size in enumerate(sizes):
        ids = torch.arange(size * length).reshape(size, length)
        mask = torch.ones_like(ids)
        if number in padded:
            mask[0, -1] = 0
        found.append(((), {"input_ids": ids, "attention_mask": mask}))
    return found


def by_position(input_ids, attention_mask):
    """States by position, a mask by sample, angles for all, and a flag."""
    length = input_ids.shape[1]
    mask = attention_mask[:, None, None, :].bool()
    return (states_of(input_ids), mask), {"angles": torch.arange(length)[None].float(), "flag": True, "cache": None}


def test_what_is_the_same_is_kept_and_what_has_samples_comes_with_each_batch():
    given = calls(3, 5, 2, padded=(1,))
    frame, batches = entering(skeleton(by_position), given, 3)
    assert [list(batch) for batch in batches] == [["extra0", "attention_mask"]] * 3
    for batch, (_, inputs) in zip(batches, given, strict=True):
        assert torch.equal(batch["extra0"], inputs["attention_mask"][:, None, None, :].bool())
        assert batch["attention_mask"].dtype == torch.int64
        assert torch.equal(batch["attention_mask"], inputs["attention_mask"])
    args, kwargs = frame.arguments("states", ("mask", None, None))
    assert args == ("states", "mask")
    assert torch.equal(kwargs.pop("angles"), torch.arange(4.0)[None])
    assert kwargs == {"flag": True, "cache": None}
    assert copy.deepcopy(frame) is frame


def only_where_padded(input_ids, attention_mask):
    """A mask where a sample has padding, as newer versions of Transformers give it."""
    mask = None if bool(attention_mask.all()) else attention_mask[:, None].bool()
    return (states_of(input_ids),), {"mask": mask}


def test_where_one_batch_has_padding_all_get_a_mask():
    given = calls(3, 2, padded=(1,))
    _, batches = entering(skeleton(only_where_padded), given, 3, adds_padding=True)
    for batch, (_, inputs) in zip(batches, given, strict=True):
        assert torch.equal(batch["extra0"], inputs["attention_mask"][:, None].bool())
    # without padding there is none, unless it is asked for
    assert list(entering(skeleton(only_where_padded), calls(3, 2), 3)[1][0]) == ["attention_mask"]
    wanted = entering(skeleton(only_where_padded), calls(3, 2), 3, adds_padding=True)[1]
    assert [batch["extra0"].shape for batch in wanted] == [(3, 1, 4), (2, 1, 4)]
    assert all(bool(batch["extra0"].all()) for batch in wanted)


def test_other_values_in_each_batch_are_told():
    def pair(input_ids, attention_mask):
        return (states_of(input_ids),), {"two": torch.full((2, 2), float(len(input_ids)))}

    with pytest.raises(ConfigError, match=r"or have an entry for each sample, got something else.*\(layers.3\)"):
        entering(skeleton(pair), calls(3, 4), 3)
    entering(skeleton(pair), calls(3), 3)

    def sometimes(input_ids, attention_mask):
        found = {"more": 1} if len(input_ids) == 4 else {}
        return (states_of(input_ids),), found

    with pytest.raises(ConfigError, match=r"must get the same arguments in all batches, got others \(layers.3\)"):
        entering(skeleton(sometimes), calls(3, 4), 3)


def test_samples_of_other_lengths_and_too_many_tensors_are_told():
    given = [*calls(2, 2), *calls(2, length=5)]
    with pytest.raises(DataError, match=r"one length, got 5 and 4 places: pad or cut them \(batch 2\)"):
        entering(skeleton(by_position), given, 3)

    def many(count):
        def arguments(input_ids, attention_mask):
            return (states_of(input_ids),), {f"extra_{number}": input_ids + number for number in range(count)}

        return skeleton(arguments)

    assert len(entering(many(6), calls(2, 3), 3)[1][0]) == 7
    with pytest.raises(ConfigError, match=r"at most 6 tensors .* got 7 \(layers.3\)"):
        entering(many(7), calls(2, 3), 3)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)
        nn.init.eye_(self.linear.weight)

    def forward(self, states, mask, *, angles, flag, cache):
        return self.linear(states) * mask[:, 0, 0, :, None], angles


def test_a_block_reads_pruned_or_unpruned_states():
    given = calls(3, 2, padded=(0,))
    frame, batches = entering(skeleton(by_position), given, 3)
    states, other = torch.ones(3, 4, WIDTH), torch.full((3, 4, WIDTH), 2.0)
    mask = given[0][1]["attention_mask"][..., None]
    for reads_unpruned, wanted in ((False, states), (True, other)):
        net = BlockNet(Block(), frame, reads_unpruned=reads_unpruned)
        reached = net(hidden_states=states, unpruned_states=other, **batches[0])
        assert torch.equal(reached, wanted * mask)


def test_one_value_for_all_samples_of_a_batch_is_spread_over_them():
    def arguments(input_ids, attention_mask):
        total = input_ids.sum().reshape(1)
        return (states_of(input_ids),), {"bias": total[:, None].expand(1, 3), "total": total}

    _, batches = entering(skeleton(arguments), calls(2, 3), 3)
    assert [batch["extra0"].tolist() for batch in batches] == [[[28] * 3] * 2, [[66] * 3] * 3]
    assert [batch["extra1"].tolist() for batch in batches] == [[28] * 2, [66] * 3]
