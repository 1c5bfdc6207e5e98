"""Forwards that check the widths of their tensors: the check of the dense model passes, or the channels stay."""

from __future__ import annotations

import pytest
import torch
from einops import rearrange
from einops.layers.torch import Rearrange
from speedup_nets import l1_masks, same_output
from torch import nn

import nni_topo


def must(holds: bool, message: object = "") -> None:
    """Raise unless a check holds."""
    if not holds:
        raise ValueError(message)


class Checked(nn.Module):
    """Two convolutions; a function checks the 16 channels of the first before the second reads them."""

    def __init__(self, check):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 4, 1)
        self.check, self.width, self.same, self.heads, self.size, self.groups = check, 16, 16, 4, 4, 4

    def forward(self, images):
        x = self.first(images).relu()
        self.check(self, x)
        return self.last(self.second(x).relu())


def halved(model, inputs, others, kind="Conv2d"):
    """Remove half of the channels of the layers of one class; compare with the masked network on other inputs, too."""
    groups = nni_topo.dependency_groups(model, inputs, [{"op_types": [kind], "sparse_ratio": 0.5}])
    masks = l1_masks(model, groups)
    dense = nni_topo.to_dense(model, inputs, masks)
    for batch in (inputs, others):
        same_output(dense, nni_topo.masked_model(model, inputs, masks), batch)
    return dense, groups


IMAGES, OTHERS = torch.randn(2, 3, 8, 8), torch.randn(3, 3, 10, 12)
WIDTHS = {
    "equal": lambda net, x: must(x.shape[1] == net.width, f"expected {net.width} channels, got {x.shape}"),
    "unequal": lambda net, x: must((x.shape[1] != net.width) is False),
    "assert": lambda net, x: torch._assert(x.shape[1] == net.width, f"{x.shape[1]} channels"),
    "check": lambda net, x: torch._check(net.width == x.size(1), lambda: "width"),
    "shape": lambda net, x: must(x.shape[1:3] == (net.width, x.shape[2])),
    "size": lambda net, x: must(x.size() == torch.Size([x.shape[0], net.width, *x.shape[2:]])),
    "in": lambda net, x: must(x.size(1) in (net.width,)),
    "instance": lambda net, x: must(isinstance(x.shape[1], int) and x.shape[1] == net.width),
    "number of entries": lambda net, x: must(x.numel() == x.shape[0] * x.shape[1] * x.shape[2] * x.shape[3]),
    "length": lambda net, x: must(len(x[0]) == net.width),
    "attribute": lambda net, x: must(net.width == net.same and x.shape[1] == net.same),
    "order": lambda net, x: must(x.shape[1] <= net.width),
    "largest": lambda net, x: must(max(x.shape[1], net.width) == net.width),
    "of a layer": lambda net, x: must(x.shape[1] == net.second.in_channels),
    "of a weight": lambda net, x: must(x.shape[1] == net.second.weight.shape[1]),
    "of two tensors": lambda net, x: must(x.shape == net.second(x).shape),
    "divided": lambda net, x: must(x.shape[1] % net.groups == 0),
    "even": lambda _, x: must(not x.shape[1] % 2),
    "quotient": lambda net, x: must(divmod(x.shape[1], net.groups)[1] == 0),
    "pixels": lambda net, x: must(x.shape[2] % 2 == 0 and x.shape[3] != net.groups),
}


@pytest.mark.parametrize("name", WIDTHS)
def test_a_layer_loses_channels_whose_number_the_forward_checks(name):
    dense, groups = halved(Checked(WIDTHS[name]).eval(), IMAGES, OTHERS)
    assert (dense.first.out_channels, dense.second.out_channels) == (8, 8)
    assert groups.skipped.keys() == {"last"}


NUMBERS = {
    "equal": lambda _, x: must(x.shape[1] == 16),
    "plain": lambda net, x: must(int(x.shape[1]) == net.width),
    "product": lambda net, x: must(net.heads * net.size == net.width and x.shape[1] == net.width),
    "remainder": lambda _, x: must(x.shape[1] % 16 == 0),
    "at least": lambda _, x: must(x.shape[1] > 10),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_channels_stay_if_a_check_allows_no_other_number_and_the_others_go(name):
    dense, groups = halved(Checked(NUMBERS[name]).eval(), IMAGES, OTHERS)
    assert (dense.first.out_channels, dense.second.out_channels) == (16, 8)
    assert {reason.kind for reason in groups.reasons["first"]} == {"number_made"}


class Joined(nn.Module):
    """Checks that the tensors that it concatenates are equally wide."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right, self.last = nn.Conv2d(3, 16, 1), nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(32, 4, 1)

    def forward(self, images):
        left, right = self.left(images), self.right(images)
        must(left.shape[1] == right.shape[1])
        return self.last(torch.cat([left, right], 1))


def test_tensors_of_equal_width_stay_equally_wide():
    model = Joined().eval()
    groups = nni_topo.dependency_groups(model, IMAGES, [{"op_names": ["left", "right"], "sparse_ratio": 0.5}])
    masks = l1_masks(model, groups)
    masks["right"]["weight"][masks["right"]["weight"].flatten(1).amax(1).nonzero()[:2]] = 0  # two channels more
    dense = nni_topo.to_dense(model, IMAGES, masks)
    assert (dense.left.out_channels, dense.right.out_channels) == (8, 8)
    assert dense(OTHERS).shape == (3, 4, 10, 12)


class Attention(nn.Module):
    """Attention that checks the width of its input, as torchaudio's."""

    def __init__(self, width, heads):
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = width, heads, width // heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        if x.shape[2] != self.embed_dim:
            raise ValueError(f"expected {self.embed_dim} features")
        batch, tokens, _ = x.size()
        heads = [layer(x).view(batch, tokens, self.num_heads, -1) for layer in (self.q_proj, self.k_proj, self.v_proj)]
        states = nn.functional.scaled_dot_product_attention(*(each.transpose(1, 2) for each in heads))
        return self.out_proj(states.transpose(1, 2).reshape(batch, tokens, self.num_heads * self.head_dim))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.attention, self.last = nn.Linear(12, 32), Attention(32, 4), nn.Linear(32, 5)

    def forward(self, x):
        return self.last(self.attention(self.first(x)))


@pytest.mark.parametrize(("ratio", "width", "heads"), [(0.5, 16, 2), (0.25, 24, 2), (0.01, 32, 2)])
def test_attention_that_checks_its_width_loses_heads_and_inputs(ratio, width, heads, tmp_path):
    model, tokens = Encoder().eval(), torch.randn(2, 7, 12)
    config_list = [
        {"op_names": ["first"], "sparse_ratio": ratio},
        {"op_names_re": [r"attention\.[qkv]_proj"], "sparse_ratio": 0.5},
    ]
    groups = nni_topo.dependency_groups(model, tokens, config_list)
    masks = l1_masks(model, groups)
    dense = nni_topo.to_dense(model, tokens, masks)
    assert (dense.attention.embed_dim, dense.attention.num_heads) == (width, heads)
    assert dense.attention.q_proj.weight.shape == (8 * heads, width)
    same_output(dense, nni_topo.masked_model(model, tokens, masks), torch.randn(5, 9, 12))
    nni_topo.save(dense, tmp_path / "small.safetensors")
    same_output(nni_topo.load(tmp_path / "small.safetensors", Encoder().eval()), dense, torch.randn(5, 9, 12))


class Tower(nn.Module):
    """Positions are added, and a matrix projects the mean."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.positions = nn.Linear(12, 32), nn.Parameter(torch.randn(7, 32))
        self.projection = nn.Parameter(torch.randn(32, 16) / 6)

    def forward(self, x):
        return (self.first(x) + self.positions[: x.shape[1]]).mean(1) @ self.projection


@pytest.mark.slow
def test_a_projection_matrix_loses_rows_with_the_positions_before_it():
    dense, _ = halved(Tower().eval(), torch.randn(2, 7, 12), torch.randn(5, 6, 12), "Linear")
    assert (dense.first.out_features, dense.positions.shape, dense.projection.shape) == (16, (7, 16), (16, 16))


class Heads(nn.Module):
    """Attention written with views or with einops, whose projections have other names than a known kind's."""

    def __init__(self, uses_einops):
        super().__init__()
        torch.manual_seed(0)
        self.heads, self.uses_einops = 4, uses_einops
        self.first, self.to_all, self.to_out, self.last = (nn.Linear(*sizes) for sizes in _SIZES)

    def forward(self, x):
        parts = self.to_all(self.first(x)).chunk(3, -1)
        if self.uses_einops:
            queries, keys, values = (rearrange(part, "b n (h d) -> b h n d", h=self.heads) for part in parts)
        else:
            queries, keys, values = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        states = (queries @ keys.transpose(-1, -2) / 8**0.5).softmax(-1) @ values
        states = rearrange(states, "b h n d -> b n (h d)") if self.uses_einops else states.transpose(1, 2).flatten(2)
        return self.last(self.to_out(states))


_SIZES = (12, 32), (32, 96), (32, 32), (32, 5)


def test_heads_written_with_einops_go_as_those_written_with_views():
    twins = []
    for uses_einops in (False, True):
        dense, _ = halved(Heads(uses_einops).eval(), torch.randn(2, 7, 12), torch.randn(5, 9, 12), "Linear")
        twins.append((dense.heads, dense.to_all.weight.shape))
    assert twins == [(2, (48, 16))] * 2


class AttentionOfLayers(nn.Module):
    """Attention whose heads are told apart by a layer of einops, which is copied with its first numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.heads = Rearrange("b n (three h d) -> three b h n d", three=3, h=4)
        self.joined = Rearrange("b h n d -> b n (h d)")

    def forward(self, rows):
        queries, keys, values = self.heads(self.qkv(rows))
        return self.out(self.joined((queries @ keys.mT * 0.5).softmax(-1) @ values))


def test_heads_of_a_layer_that_is_copied_with_its_first_numbers_stay():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), AttentionOfLayers(), nn.Linear(16, 3)).eval()
    inputs = torch.randn(2, 5, 8)
    groups = nni_topo.dependency_groups(model, inputs, [{"op_types": ["Linear"], "sparse_ratio": 0.5}])
    masks = l1_masks(model, groups)
    dense = nni_topo.to_dense(model, inputs, masks)
    assert (dense[0].out_features, dense[1].qkv.out_features, dense[1].out.out_features) == (8, 48, 8)
    same_output(dense, nni_topo.masked_model(model, inputs, masks), torch.randn(3, 7, 8))
