"""Small networks with attention of every kind, and masks of their heads."""

from __future__ import annotations

import torch
from torch import nn

from nni_topo.network.attention.heads import find_attention
from nni_topo.network.layers.kinds import weight_name, weight_of
from nni_topo.zoo.transformers import FeedForward, GatedMlp, SelfAttention, TransformerBlock

WIDTH, HEADS, SIZE = 12, 4, 3


def _states(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


class Stream(nn.Module):
    """Attention added to a stream, from another one where ``cross`` says so."""

    def __init__(self, attention, *, cross=False, **knobs):
        super().__init__()
        self.enter, self.attention, self.head = nn.Linear(5, WIDTH), attention, nn.Linear(WIDTH, 2)
        self.cross, self.knobs = cross, knobs

    def forward(self, x):
        x = self.enter(x)
        other = x.flip(1) if self.cross else x
        many = isinstance(self.attention, nn.MultiheadAttention)
        y = self.attention(x, other, other, **self.knobs)[0] if many else self.attention(x)
        return self.head(x + y)


def _block(attention, mlp, norm):
    return nn.Sequential(
        nn.Linear(5, WIDTH),
        TransformerBlock(attention, mlp, (norm(WIDTH), norm(WIDTH)), first=True),
        nn.Linear(WIDTH, 2),
    )


NETS = {
    "multihead": lambda: Stream(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)),
    "batch second": lambda: Stream(nn.MultiheadAttention(WIDTH, HEADS, bias=False), need_weights=False),
    "cross": lambda: Stream(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), cross=True),
    "encoder layer": lambda: nn.Sequential(
        nn.Linear(5, WIDTH), nn.TransformerEncoderLayer(WIDTH, HEADS, 8, batch_first=True)
    ),
    "fused": lambda: Stream(Fused()),
    "apart": lambda: _block(SelfAttention(WIDTH, HEADS, bias=True, causal=False), FeedForward(WIDTH, 8), nn.LayerNorm),
    # Rotary positions turn pairs of channels, so heads are of two here.
    "shared keys": lambda: _block(SelfAttention(WIDTH, 6, 3, bias=False, causal=True), GatedMlp(WIDTH, 8), nn.RMSNorm),
    "one key": lambda: _block(SelfAttention(WIDTH, 6, 1, bias=True, causal=True), GatedMlp(WIDTH, 8), nn.RMSNorm),
    "one key fused": lambda: Stream(FusedOneKey()),
}  # fmt: skip


def make(name):
    torch.manual_seed(0)
    net = NETS[name]().eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.4)
    return net


def head_masks(model, kept):
    """Masks that keep some heads of every attention."""
    masks = {}
    for attention in find_attention(model).values():
        for layer, channels in attention.channels.items():
            module = model.get_submodule(layer)
            mask = torch.zeros_like(weight_of(module))
            mask[torch.from_numpy(channels[kept].ravel())] = 1
            for rows in attention.shared.get(layer, ()):
                mask[torch.from_numpy(rows.ravel())] = 1
            masks[layer] = {weight_name(module): mask}
    return masks


def same(one, other, *inputs):
    with torch.no_grad():
        torch.testing.assert_close(one(*inputs), other(*inputs), rtol=1e-5, atol=1e-5)


class Fused(nn.Module):
    """Attention that makes queries, keys and values in one layer."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.head_dim, self.qkv, self.proj = (
            HEADS,
            SIZE,
            nn.Linear(WIDTH, 3 * WIDTH),
            nn.Linear(WIDTH, WIDTH),
        )

    def forward(self, x):
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.proj(mixed.reshape(*x.shape[:2], -1))


class FusedOneKey(nn.Module):
    """Attention of which one layer makes the queries of all heads, then one key and one value for all of them."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.head_dim = HEADS, SIZE
        self.qkv, self.proj = nn.Linear(WIDTH, WIDTH + 2 * SIZE), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        made = self.qkv(x).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = made.split((self.num_heads, 1, 1), 1)
        mixed = (q @ k.transpose(2, 3) * SIZE**-0.5).softmax(-1) @ v
        return self.proj(mixed.transpose(1, 2).flatten(2))
