"""Attention that weighs channels by channels of its head, and attention of a single head."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import nni_topo

WIDTH, HEADS = 24, 4
ASKED = [{"op_types": ["Linear", "Conv1d"], "sparse_ratio": 0.5}]
TEXTS = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Crossing(nn.Module):
    """Cross-covariance attention: the softmax weighs the channels of a head; ``kind`` says how it counts and sums."""

    def __init__(self, kind: str, width: int = WIDTH) -> None:
        super().__init__()
        self.kind, self.num_heads = kind, HEADS
        self.temperature = nn.Parameter(torch.rand(HEADS, 1, 1) + 0.5)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        samples, places, width = x.shape
        if self.kind == "of the width":
            made = self.qkv(x).reshape(samples, places, 3, self.num_heads, width // self.num_heads)
        else:
            made = self.qkv(x).reshape(samples, places, 3, self.num_heads, -1)
        made = made.permute(2, 0, 3, 4, 1)
        q, k, v = made.unbind(0)
        q, k = functional.normalize(q, dim=-1) * self.temperature, functional.normalize(k, dim=-1)
        if self.kind == "fused":
            found = functional.scaled_dot_product_attention(q, k, v, scale=1.0)
        else:
            found = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(found.permute(0, 3, 1, 2).reshape(samples, places, width))


class Around(nn.Module):
    """A stream of channels to which attention and a feed-forward part add something."""

    def __init__(self, attention: nn.Module, width: int = WIDTH) -> None:
        super().__init__()
        self.enter, self.norm, self.attention = nn.Linear(5, width), nn.LayerNorm(width), attention
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.leave = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        x = x + self.attention(self.norm(x))
        x = x + self.narrow(functional.gelu(self.wide(x)))
        return self.leave(x[:, 0])


def pruned(model: nn.Module) -> tuple[nn.Module, nn.Module, dict[str, str]]:
    """Return the dense model, the masked one, and why layers are skipped, for half of the channels of all layers."""
    groups = nni_topo.dependency_groups(model, TEXTS, ASKED)
    masks = nni_topo.create_pruner("random", copy.deepcopy(model), groups).compress()[1]
    dense, masked = (each(model, TEXTS, masks) for each in (nni_topo.to_dense, nni_topo.masked_model))
    with torch.no_grad():
        torch.testing.assert_close(dense(3 * TEXTS), masked(3 * TEXTS), rtol=1e-12, atol=1e-12)
        assert (dense(TEXTS) - model(TEXTS)).abs().max() > 1e-3
    return dense, masked, {name: why for name, why in groups.skipped.items() if name != "leave"}


def made(attention: nn.Module) -> nn.Module:
    return Around(attention, attention.proj.out_features).double().eval()


@pytest.mark.parametrize("kind", ["by minus one", "of the width", "fused"])
@pytest.mark.quick_every(3)
def test_heads_that_weigh_channels_go_as_a_whole_and_the_stream_by_itself(kind: str) -> None:
    torch.manual_seed(0)
    width = HEADS**2  # as many heads as channels in each
    model = made(Crossing(kind, width))
    dense, _, skipped = pruned(model)
    assert skipped == {}
    attention = dense.attention
    assert (attention.num_heads, attention.temperature.shape) == (HEADS // 2, (HEADS // 2, 1, 1))
    assert (attention.qkv.in_features, attention.qkv.out_features) == (width // 2, 3 * width // 2)
    assert (attention.proj.in_features, attention.proj.out_features) == (width // 2, width // 2)
    assert dense.wide.out_features == width
