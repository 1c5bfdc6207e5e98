"""Small transformers: a ViT and a BERT-like encoder on patches of images, and a GPT on bytes.

All have separate linear layers for queries, keys, values and the output projection, as today's decoders do.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class SelfAttention(nn.Module):
    """Attention with heads of size ``width // heads``; groups of ``heads // kv_heads`` heads share keys and values."""

    inv_freq: Tensor

    def __init__(self, width: int, heads: int, kv_heads: int | None = None, *, bias: bool, causal: bool) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = heads, kv_heads or heads, width // heads
        self.causal = causal  # causal attention has rotary positions, which give a decoder the order of tokens
        self.q_proj = nn.Linear(width, width, bias=bias)
        self.k_proj = nn.Linear(width, self.num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, self.num_kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(width, width, bias=bias)
        half = self.head_dim // 2
        frequencies = 10000.0 ** (-torch.arange(half) / half) if causal else None
        self.register_buffer("inv_freq", frequencies, persistent=False)

    def forward(self, states: Tensor) -> Tensor:
        """Compute self-attention of states ``(n, places, width)``; the output has the same shape."""
        query, key, value = (
            layer(states).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.causal:
            query, key = (_rotate(projection, self.inv_freq) for projection in (query, key))
        shared = self.num_heads // self.num_kv_heads
        key, value = (projection.repeat_interleave(shared, 1) for projection in (key, value))
        context = functional.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        mixed: Tensor = self.o_proj(context.transpose(1, 2).flatten(2))
        return mixed


def _rotate(heads: Tensor, frequencies: Tensor) -> Tensor:
    """Apply rotary position embedding to ``(n, heads, places, head_dim)``: https://arxiv.org/abs/2104.09864."""
    half = heads.shape[3] // 2
    angles = torch.outer(torch.arange(heads.shape[2], device=heads.device), frequencies)
    low, high, cos, sin = heads[..., :half], heads[..., half:], angles.cos().to(heads), angles.sin().to(heads)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], 3)


class FeedForward(nn.Module):
    """Two linear layers with a GELU in between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, states: Tensor) -> Tensor:
        """Return a tensor of the shape of ``states``, (n, places, width)."""
        mapped: Tensor = self.fc2(functional.gelu(self.fc1(states)))
        return mapped


class GatedMlp(nn.Module):
    """Two linear layers whose hidden neurons are multiplied by gates: https://arxiv.org/abs/2002.05202."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        """Map ``(n, places, width)``."""
        mapped: Tensor = self.down_proj(functional.silu(self.gate_proj(states)) * self.up_proj(states))
        return mapped


class TransformerBlock(nn.Module):
    """Attention and an MLP, each added to its input; norms before them (``first``), or after the sums."""

    def __init__(
        self, attention: nn.Module, mlp: nn.Module, norms: tuple[nn.Module, nn.Module], *, first: bool
    ) -> None:
        super().__init__()
        self.attention, self.mlp = attention, mlp
        self.norm1, self.norm2 = norms
        self.norm_first = first

    def forward(self, states: Tensor) -> Tensor:
        """Map ``(n, places, width)``."""
        for norm, part in ((self.norm1, self.attention), (self.norm2, self.mlp)):
            states = states + part(norm(states)) if self.norm_first else norm(states + part(states))
        return states


class PatchTransformer(nn.Module):
    """Transformer blocks on image patches of 4x4 pixels, and a linear layer on the mean over the patches."""

    def __init__(self, num_classes: int, in_channels: int, image_size: int, *, norm_first: bool) -> None:
        super().__init__()
        width, heads, hidden, depth = 96, 6, 192, 5
        self.patches = nn.Conv2d(in_channels, width, 4, 4)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (image_size // 4) ** 2, width))
        self.start = nn.Identity() if norm_first else nn.LayerNorm(width)
        self.blocks = nn.Sequential(
            *(
                TransformerBlock(
                    SelfAttention(width, heads, bias=True, causal=False),
                    FeedForward(width, hidden),
                    (nn.LayerNorm(width), nn.LayerNorm(width)),
                    first=norm_first,
                )
                for _ in range(depth)
            )
        )
        self.norm = nn.LayerNorm(width) if norm_first else nn.Identity()
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits ``[n, num_classes]`` of images ``[n, in_channels, h, w]``."""
        states = self.start(self.patches(images).flatten(2).transpose(1, 2) + self.positions)
        logits: Tensor = self.head(self.norm(self.blocks(states)).mean(1))
        return logits


class Gpt(nn.Module):
    """A decoder: rotary positions, shared keys and values, gated MLPs and RMS norms."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        width, heads, kv_heads, hidden, depth = 96, 12, 6, 256, 4
        self.embedding = nn.Embedding(num_classes, width)
        self.blocks = nn.Sequential(
            *(
                TransformerBlock(
                    SelfAttention(width, heads, kv_heads, bias=False, causal=True),
                    GatedMlp(width, hidden),
                    (nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)),
                    first=True,
                )
                for _ in range(depth)
            )
        )
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.head = nn.Linear(width, num_classes, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Compute the logits ``[n, places, num_classes]`` of the token that follows each of ``tokens``, [n, places]."""
        logits: Tensor = self.head(self.norm(self.blocks(self.embedding(tokens))))
        return logits


def vit_small(num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """Build a ViT of width 96 with 5 blocks: 6 heads, 192 neurons, norms first; https://arxiv.org/abs/2010.11929."""
    return PatchTransformer(num_classes, in_channels, image_size, norm_first=True)


def bert_small(num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """Build `vit_small` with norms after the sums, as in BERT: https://arxiv.org/abs/1810.04805."""
    return PatchTransformer(num_classes, in_channels, image_size, norm_first=False)


def gpt_small(num_classes: int) -> nn.Module:
    """Build a decoder of width 96 with 4 blocks: 12 heads, 6 heads of keys and values, 256 gated neurons."""
    return Gpt(num_classes)
