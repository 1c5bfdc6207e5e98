"""Whole blocks taken out: what is constant or linear in them comes back exactly, bad requests are refused."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
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


@pytest.mark.parametrize(("build", "name"), [(bert_small, "blocks.2"), (vit_small, "blocks.0")])
def test_behind_a_norm_and_at_the_beginning_nothing_makes_up_for_them(build, name, caplog):
    model = make(build)
    with caplog.at_level(logging.WARNING):
        small = remove_blocks(model, [name], [images()])
    assert "nothing makes up" in caplog.text
    assert len(small.blocks) == 4
    assert torch.equal(small.blocks[1].mlp.fc2.weight, model.blocks[1 + (name[-1] == "0")].mlp.fc2.weight)


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
