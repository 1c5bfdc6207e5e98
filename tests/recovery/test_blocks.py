"""Whole blocks taken out: what is constant or linear in them comes back exactly, bad requests are refused."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from block_nets import small_resnet
from torch import nn

from nni_topo import remove_blocks
from nni_topo.errors import ConfigError
from nni_topo.zoo.transformers import bert_small, vit_small


def images(count=40, seed=0):
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def make(build=vit_small):
    torch.manual_seed(0)
    return build(3, 1, 8).eval()


def lost(model, other):
    with torch.no_grad():
        return float((model(images(seed=1)) - other(images(seed=1))).square().sum())


def test_blocks_that_add_a_constant_go_into_the_layer_before_them():
    model = make()
    for block in model.blocks[2:4]:
        for layer in (block.attention.o_proj, block.mlp.fc2):
            nn.init.zeros_(layer.weight)
            nn.init.normal_(layer.bias)
    before = copy.deepcopy(model.state_dict())
    small = remove_blocks(model, ["blocks.2", "blocks.3"], [images()])
    assert len(small.blocks) == 3
    assert lost(model, small) < 1e-6
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("names", [["blocks.3"], ["blocks.1", "blocks.3"], ["blocks.4"]])
def test_other_blocks_are_made_up_for_in_part(names):
    model = make()
    plain = copy.deepcopy(model)
    for name in sorted(names, reverse=True):
        del plain.blocks[int(name[-1])]
    assert lost(model, remove_blocks(model, names, images(200).split(50))) < 0.8 * lost(model, plain)


def test_at_the_beginning_nothing_makes_up_for_a_block(caplog):
    model = make()
    with caplog.at_level(logging.WARNING):
        small = remove_blocks(model, ["blocks.0"], [images()])
    assert "nothing makes up" in caplog.text
    assert len(small.blocks) == 4
    assert torch.equal(small.blocks[1].mlp.fc2.weight, model.blocks[2].mlp.fc2.weight)


def test_a_norm_after_the_sum_becomes_that_of_the_removed_block():
    model = make(bert_small)
    for block in model.blocks:
        nn.init.normal_(block.norm2.weight, 1.0, 0.3)
    plain = copy.deepcopy(model)
    del plain.blocks[2]
    small = remove_blocks(model, ["blocks.2"], images(200).split(50))
    assert torch.equal(small.blocks[1].norm2.weight, model.blocks[2].norm2.weight)
    assert lost(model, small) < 0.8 * lost(model, plain)


def test_a_residual_block_that_adds_nothing_leaves_no_trace():
    model = small_resnet(3, 3)
    nn.init.zeros_(model.stage1[1].norm2.weight)
    nn.init.zeros_(model.stage1[1].norm2.bias)
    small = remove_blocks(model, ["stage1.1"], [images()])
    assert len(small.stage1) == 2
    assert lost(model, small) == 0.0


def test_the_convolution_before_the_gap_makes_up_for_a_residual_block():
    model = small_resnet(3, 3)
    plain = copy.deepcopy(model)
    del plain.stage2[1]
    small = remove_blocks(model, ["stage2.1"], images(200).split(50))
    # The largest layer that writes into the stream: not the shortcut.
    assert not torch.equal(small.stage2[0].conv2.weight, model.stage2[0].conv2.weight)
    assert torch.equal(small.stage2[0].shortcut[0].weight, model.stage2[0].shortcut[0].weight)
    assert lost(model, small) < 0.8 * lost(model, plain)


@pytest.mark.parametrize(
    ("names", "knobs", "message"),
    [
        ([], {}, "at least one block's name, got"),
        ("blocks.1", {}, "names must be a sequence, each value a str, got 'blocks.1'"),
        (["blocks.9"], {}, r"blocks\.9"),
        (["head"], {}, "a block must lie in a ModuleList or Sequential, got one of PatchTransformer"),
        ([f"blocks.{number}" for number in range(5)], {}, r"at least one block must stay, got all 5 \(blocks\)"),
        (["blocks.1"], {"ridge": -1.0}, "ridge must be 'auto' or a finite number of at least 0, got -1"),
    ],
)
def test_bad_requests_are_refused(names, knobs, message):
    with pytest.raises(ConfigError, match=message):
        remove_blocks(make(), names, [images()], **knobs)


def test_a_block_that_changes_the_shape_is_refused():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    with pytest.raises(ConfigError, match=r"a block must put out what enters it, changed, got shapes .*4.* and .*5"):
        remove_blocks(model, ["0"], [torch.randn(8, 4)])
