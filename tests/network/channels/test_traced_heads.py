"""Attention that only its products show: whole heads are removed, and attributes that count them follow."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import nni_topo

WIDTH, HEADS, SIZE = 16, 4, 3
ASKED = [{"op_types": ["Linear", "Conv2d"], "sparse_ratio": 0.5}]


def turned(x: Tensor) -> Tensor:
    """Write the channels of each head in two parts, as rotary positions do."""
    angle = torch.arange(x.shape[-2])[:, None]
    out = torch.empty_like(x)
    out[..., :1] = x[..., :1] * angle.cos() - x[..., 1:2] * angle.sin()
    out[..., 1:] = x[..., 1:] * angle.cos() + x[..., :1] * angle.sin()
    return out


class Attending(nn.Module):
    """Attention whose layers have names of their own; ``kind`` says how it multiplies and counts."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.count, self.size = kind, HEADS, SIZE
        self.enter, self.leave = nn.Linear(5, WIDTH), nn.Linear(HEADS * SIZE, 2)
        self.norm = nn.LayerNorm(SIZE)
        nn.init.normal_(self.norm.weight)
        self.ask, self.match, self.give = (nn.Linear(WIDTH, HEADS * SIZE) for _ in range(3))

    def heads(self, x: Tensor) -> Tensor:
        if self.kind == "by length":
            return x.view(*x.shape[:2], -1, SIZE).transpose(1, 2)
        if self.kind == "by quotient":
            return x.view(*x.shape[:2], self.count, x.shape[-1] // self.count).transpose(1, 2)
        x = x.view(*x.shape[:2], self.count, SIZE).transpose(1, 2)
        # As BLOOM: the heads of all samples, one after the other.
        return x.reshape(x.shape[0] * self.count, -1, SIZE) if self.kind == "added" else x

    def forward(self, x: Tensor) -> Tensor:
        first, x = x[:, None, :, 0], self.enter(x)
        q, k, v = self.heads(self.ask(x)), self.heads(self.match(x)), self.heads(self.give(x))
        if self.kind == "added":
            scores = torch.zeros(1, 1, x.shape[1]).baddbmm(q, k.transpose(1, 2), alpha=SIZE**-0.5)
            found = scores.softmax(-1) @ v
            found = found.view(found.shape[0] // self.count, self.count, -1, SIZE).transpose(1, 2)
            return self.leave(found.reshape(*x.shape[:2], self.count * self.size))
        if self.kind == "normed":
            q, k = self.norm(q), self.norm(k)
        if self.kind == "turned":
            q, k = turned(q), turned(k)
        if self.kind == "masked":  # one mask for all heads of a sample
            mask = first.repeat_interleave(self.count, dim=0).view(x.shape[0], self.count, -1, x.shape[1])
            found = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        elif self.kind in ("fused", "turned", "normed"):
            found = functional.scaled_dot_product_attention(q, k, v)
        else:
            scores = q @ k.transpose(-1, -2) / math.sqrt(SIZE)
            if self.kind == "gathered":  # as DeBERTa reads its scores of relative positions
                place = torch.arange(q.size(2)).flip(0).expand(q.size(0), q.size(1), q.size(2), q.size(2))
                scores = scores + scores.gather(-1, place)
            if self.kind == "constant by head":
                scores = scores + torch.arange(HEADS).view(-1, 1, 1)
            found = scores.softmax(-1) @ v
        return self.leave(found.transpose(1, 2).flatten(2))


def silenced(model: nn.Module, masks: dict[str, dict[str, Tensor]]) -> nn.Module:
    """Return a copy with the masked rows at zero."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for name, targets in masks.items():
            for target, mask in targets.items():
                copied.get_submodule(name).get_parameter(target).mul_(mask)
    return copied


@pytest.mark.parametrize(
    "kind", ["by count", "by length", "by quotient", "fused", "added", "turned", "masked", "normed", "gathered"]
)
@pytest.mark.quick_every(2)
def test_heads_go_as_a_whole_with_queries_keys_and_values(kind: str) -> None:
    model, x = Attending(kind).eval(), torch.randn(2, 6, 5)
    groups = nni_topo.dependency_groups(model, x, ASKED)
    by_name = {entry["op_names"][0]: entry for entry in groups}
    assert by_name.keys() == {"enter", "ask", "match", "give"}
    assert len({by_name[name]["dependency_group_id"] for name in ("ask", "match", "give")}) == 1
    assert by_name["ask"]["granularity"] == [SIZE, -1]
    masks = nni_topo.create_pruner("random", copy.deepcopy(model), groups).compress()[1]
    kept = masks["ask"]["bias"].view(HEADS, SIZE)
    assert kept.sum(1).sort().values.tolist() == [0, 0, SIZE, SIZE]
    dense = nni_topo.to_dense(model, x, masks)
    assert (dense.ask.out_features, dense.leave.in_features, dense.enter.out_features) == (2 * SIZE, 2 * SIZE, 8)
    assert dense.count == (HEADS if kind == "by length" else 2)
    masked, other = silenced(model, masks), torch.randn(3, 9, 5)
    torch.testing.assert_close(dense(x), masked(x))
    torch.testing.assert_close(dense(other), masked(other))


def test_heads_that_a_constant_tells_apart_stay() -> None:
    groups = nni_topo.dependency_groups(Attending("constant by head").eval(), torch.randn(2, 6, 5), ASKED)
    assert groups.skipped.keys() == {"ask", "match", "give", "leave"}
    assert "an operation joins them to the network's input, a constant or a parameter (add)" in groups.skipped["ask"]


class Checked(nn.Module):
    """Checks how many channels it gets, as patch embeddings and samplers do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.channels = 8
        self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x).relu()
        if x.shape[1] != self.channels:
            raise ValueError("channels")
        assert x.shape[1] == self.channels
        return self.two(x)


def test_a_number_that_a_forward_checks_gets_smaller() -> None:
    model, images = Checked().eval(), torch.rand(2, 3, 6, 6)
    groups = nni_topo.dependency_groups(model, images, ASKED)
    masks = nni_topo.create_pruner("l1", copy.deepcopy(model), groups).compress()[1]
    dense = nni_topo.to_dense(model, images, masks)
    assert (dense.channels, dense.one.out_channels, model.channels) == (4, 4, 8)
    torch.testing.assert_close(dense(images), silenced(model, masks)(images))


class Captioner(nn.Module):
    """The model repeats a mask for each head of its blocks, as CoCa does; nothing else reads its number of heads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads = HEADS
        self.blocks = nn.ModuleList(nn.MultiheadAttention(8, HEADS, batch_first=True) for _ in range(2))
        self.mlp, self.leave = nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.zeros(len(x), x.shape[1], x.shape[1], dtype=x.dtype)
        mask = mask.masked_fill(x[:, None, :, 0] > 1.0, -10.0).repeat_interleave(self.heads, 0)
        for block in self.blocks:
            x = x + block(x, x, x, need_weights=False, attn_mask=mask)[0]
        return self.leave(self.mlp(x).relu())


def test_a_mask_that_is_repeated_by_an_attribute_loses_heads_with_all_blocks() -> None:
    model, x, other = Captioner().eval(), torch.randn(2, 6, 8), torch.randn(3, 9, 8)
    groups = nni_topo.dependency_groups(model, x, [{"op_types": ["MultiheadAttention", "Linear"], "sparse_ratio": 0.5}])
    assert [entry["op_names"] for entry in groups if entry["op_names"] == ["mlp"]] == [["mlp"]]
    masks = nni_topo.create_pruner("random", copy.deepcopy(model), groups).compress()[1]
    dense, masked = nni_topo.to_dense(model, x, masks), nni_topo.masked_model(model, x, masks)
    assert (dense.heads, *(block.num_heads for block in dense.blocks)) == (2, 2, 2)
    assert (dense.mlp.out_features, model.heads) == (6, HEADS)
    for inputs in (x, other):
        torch.testing.assert_close(dense(inputs), masked(inputs))
