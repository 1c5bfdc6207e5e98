"""Deformable attention: heads go as a whole, with the places at which they read and the weights of these."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional

import nni_topo

WIDTH, HEADS, POINTS, SIDE = 12, 4, 3, 4
TEXTS = torch.randn(2, SIDE * SIDE, 5, generator=torch.Generator().manual_seed(1))
ASKED = [{"op_types": ["Linear"], "sparse_ratio": 0.5}]


class Deformable(nn.Module):
    """Each place reads some others of a feature map, head by head, which its features name."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.heads, self.points = WIDTH, HEADS, POINTS
        self.values, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.offsets, self.shares = nn.Linear(WIDTH, HEADS * POINTS * 2), nn.Linear(WIDTH, HEADS * POINTS)

    def forward(self, x: Tensor) -> Tensor:
        samples, places, _ = x.shape
        values = self.values(x).view(samples, places, self.heads, self.width // self.heads)
        images = values.permute(0, 2, 3, 1).reshape(samples * values.shape[2], values.shape[3], SIDE, SIDE)
        offsets = self.offsets(x).view(samples, places, self.heads, self.points, 2)
        grids = (self.reference() + offsets).transpose(1, 2).flatten(0, 1)
        shares = self.shares(x).view(samples, places, self.heads, self.points).softmax(-1)
        shares = shares.transpose(1, 2).flatten(0, 1).unsqueeze(1)
        seen = functional.grid_sample(images, grids, align_corners=False)  # (samples * heads, channels, places, points)
        mixed = (seen * shares).sum(-1).view(samples, values.shape[2] * values.shape[3], places)
        return self.out(mixed.transpose(1, 2))

    def reference(self) -> Tensor:
        """The place itself, between -1 and 1."""
        steps = torch.linspace(-1, 1, SIDE)
        return torch.cartesian_prod(steps, steps)[:, None, None]


class Stream(nn.Module):
    """Attention added to a stream."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.enter, self.attention, self.head = nn.Linear(5, WIDTH), attention, nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return self.head(x + self.attention(x))


@torch.no_grad()
def test_heads_go_with_their_places_and_the_numbers_of_both_attributes(tmp_path):
    torch.manual_seed(0)
    model = Stream(Deformable()).eval()
    groups = nni_topo.dependency_groups(model, TEXTS, ASKED)
    assert groups.skipped == {"head": "it gives the model's output"}
    _, masks = nni_topo.create_pruner("l1", copy.deepcopy(model), groups).compress()
    dense = nni_topo.to_dense(model, TEXTS, masks)
    inner = dense.attention
    assert (inner.heads, inner.width, inner.points) == (HEADS // 2, WIDTH // 2, POINTS)
    widths = [inner.values.out_features, inner.offsets.out_features, inner.shares.out_features, inner.out.in_features]
    assert widths == [WIDTH // 2, HEADS * POINTS, HEADS * POINTS // 2, WIDTH // 2]
    assert inner.values.in_features == inner.out.out_features == WIDTH // 2  # the stream
    assert (model.attention.heads, model.attention.width) == (HEADS, WIDTH)
    # By hand: a head without values adds nothing, wherever it reads them.
    kept = masks["attention.values"]["weight"].amax(1)
    assert sorted(kept.view(HEADS, -1).sum(1).tolist()) == [0, 0, WIDTH // HEADS, WIDTH // HEADS]
    expected = copy.deepcopy(model)
    for name in ("enter", "attention.out", "attention.values"):
        layer, rows = expected.get_submodule(name), masks[name]["weight"].amax(1)
        layer.weight.mul_(rows[:, None])
        layer.bias.mul_(rows)
    torch.testing.assert_close(dense(TEXTS), expected(TEXTS), rtol=1e-5, atol=1e-6)
    nni_topo.save(dense, tmp_path / "dense.pt")
    assert torch.equal(nni_topo.load(tmp_path / "dense.pt", model)(TEXTS), dense(TEXTS))
