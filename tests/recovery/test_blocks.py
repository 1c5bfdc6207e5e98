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
from nni_topo.maths.least_squares.normal import Solution
from nni_topo.recovery import blocks
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


class Lists(nn.Module):
    def __init__(self):
        super().__init__()
        self.deep = nn.ModuleList(nn.Identity() for _ in range(6))
        self.other = nn.Sequential(nn.Identity(), nn.Identity())


@pytest.mark.parametrize(
    ("names", "gaps"),
    [
        (["deep.1"], [("deep", 1, 1)]),
        (["deep.3", "deep.1", "deep.2"], [("deep", 1, 3)]),
        (
            ["deep.0", "deep.2", "other.1", "deep.3", "deep.5"],
            [("deep", 0, 0), ("deep", 2, 3), ("deep", 5, 5), ("other", 1, 1)],
        ),
    ],
)
def test_neighbouring_blocks_make_one_gap(names, gaps):
    assert blocks._gaps(Lists(), names) == gaps


def marks(*values):
    return torch.tensor(values, dtype=torch.bool)


def test_rows_of_a_linear_layer_are_the_real_positions_of_some_samples():
    layer, values = nn.Linear(2, 2), torch.arange(12.0).reshape(2, 3, 2)
    real = torch.tensor([[True, False, True], [True, True, False]])
    three = values, 2 * values, 3 * values
    for held, mask, expected in (
        (marks(True, True), None, values.flatten(0, 1)),
        (marks(False, True), None, values[1]),
        (marks(False, True), real, values[1, :2]),
        (marks(True, False), real[:, :2], values[0]),  # not of these positions
    ):
        rows = blocks._rows(layer, three, held, mask)
        assert [each.tolist() for each in rows] == [(factor * expected)[None].tolist() for factor in (1, 2, 3)]
    assert blocks._rows(layer, three, marks(False, False), None) is None
    assert blocks._rows(layer, three, marks(True, True), torch.zeros(2, 3, dtype=torch.bool)) is None
    flat = tuple(each[:, 0] for each in three)
    assert blocks._rows(layer, flat, marks(True, False), None)[0].tolist() == [values[:1, 0].tolist()]


def test_rows_of_a_convolution_are_those_of_64_positions_an_image():
    layer, values = nn.Conv2d(2, 3, 1), torch.randn(3, 2, 9, 9, generator=torch.Generator().manual_seed(0))
    wanted = torch.cat([values, values[:, :1]], 1)
    entering, lacking, meant = blocks._rows(layer, (values, -wanted, wanted), marks(True, False, True), None)
    assert entering.shape == (1, 128, 2)
    torch.testing.assert_close(lacking, -meant)
    torch.testing.assert_close(meant[..., :2], entering)
    torch.testing.assert_close(meant[..., 2], entering[..., 0])
    assert blocks._rows(layer, (values, wanted, wanted), marks(False, False, False), None) is None


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("norm", [None, nn.BatchNorm1d(3), nn.BatchNorm1d(3, affine=False)])
def test_a_writer_adds_a_solution_to_the_stream(has_bias, norm):
    torch.manual_seed(0)
    layer = nn.Linear(2, 3, bias=has_bias)
    layer.weight.requires_grad_(False)
    norm = copy.deepcopy(norm)
    if norm is not None:
        norm.running_var.copy_(torch.tensor([1.0, 4.0, 0.25]))
        norm.eval()
    is_affine = norm is not None and norm.affine
    if is_affine:
        nn.init.normal_(norm.weight)
        with torch.no_grad():
            norm.weight[2] = 0.0  # nothing gets through
    net = nn.Sequential(layer, *([] if norm is None else [norm]))
    inputs, before = torch.randn(5, 2), dict(net.named_parameters())
    writer = blocks.Writer(layer, norm, blocks.Stream(net, None))
    assert writer.has_intercept is (has_bias or is_affine)
    solution = Solution(torch.randn(1, 2, 3).double(), torch.randn(1, 3).double())
    with torch.no_grad():
        expected = net(inputs)
        shift = solution.shift[0] if writer.has_intercept and (norm is None or is_affine or has_bias) else 0.0
        more = (inputs.double() @ solution.weights[0] + shift).float()
        if is_affine:
            more[:, 2] = 0.0
        writer.add(solution)
        torch.testing.assert_close(net(inputs), expected + more, rtol=1e-4, atol=1e-4)
    assert layer.weight is not before["0.weight"]
    assert not layer.weight.requires_grad


def test_values_are_the_same_in_one_place_and_shape():
    values = torch.zeros(4, 2)
    for other, is_same in ((values, True), (values.view(4, 2), True), (values[:2], False), (values + 0, False)):
        assert blocks._is_same(values, other) is is_same
    assert not blocks._is_same(values, (values,))
    assert not blocks._is_same(None, values)
