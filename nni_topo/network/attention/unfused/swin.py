"""Attention of torchvision's Swin and MaxViT layer by layer; see `unfused`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.maxvit import RelativePositionalMultiHeadAttention
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2
from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d

_APART = -100.0  # torchvision adds this to scores of positions that aren't neighbours


def windowed(self: Any, x: Tensor, mix: Any = None) -> Tensor:
    """Compute torchvision's attention in shifted windows, over images or videos: (batch, *positions, width)."""
    sizes, windows, shifts = x.shape[1:-1], list(self.window_size), list(self.shift_size)
    dims = tuple(range(1, x.dim() - 1))
    for d, size in enumerate(sizes):
        if size <= windows[d]:
            shifts[d] = 0
            # Windows shrink to a video's size; images are padded to the window's size.
            if len(sizes) == 3:
                windows[d] = size
    ends = [-size % window for size, window in zip(sizes, windows, strict=True)]
    padded = functional.pad(x, (0, 0, *(amount for end in reversed(ends) for amount in (0, end))))
    tokens = _parted(torch.roll(padded, [-shift for shift in shifts], dims), windows)
    # (queries, keys, values; batch, windows, heads, positions, channels)
    heads = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1)).permute(3, 0, 1, 4, 2, 5)
    scores = _products(self, *heads[:2])
    scores = scores + self.get_relative_position_bias(*([windows] if len(sizes) == 3 else []))
    if any(shifts):
        areas = _parted(_areas(padded.shape[1:-1], windows, shifts, x.device), windows)[0, ..., 0]
        apart = areas[:, None, :, None] != areas[:, None, None, :]
        scores = scores + _APART * apart.to(scores.dtype)
    shares = functional.dropout(scores.softmax(-1), self.attention_dropout, self.training)
    mixed = (mix or self.proj)((shares @ heads[2]).transpose(2, 3).flatten(3))
    mixed = functional.dropout(mixed, self.dropout, self.training)
    joined = torch.roll(_join_windows(mixed, list(padded.shape[1:-1]), windows), shifts, dims)
    for d, size in zip(dims, sizes, strict=True):
        joined = joined.narrow(d, 0, size)
    return joined.contiguous()


def _products(self: Any, queries: Tensor, keys: Tensor) -> Tensor:
    """Multiply queries and keys; the second version of Swin uses their cosines, and keys without a bias."""
    scale: Tensor | None = getattr(self, "logit_scale", None)
    if scale is None:
        scaled: Tensor = queries * queries.shape[-1] ** -0.5
        return scaled @ keys.transpose(-2, -1)
    if self.qkv.bias is not None:
        keys = keys - self.qkv.bias.chunk(3)[1].view(self.num_heads, 1, -1)
    cosines: Tensor = functional.normalize(queries, dim=-1) @ functional.normalize(keys, dim=-1).transpose(-2, -1)
    return cosines * scale.clamp(max=math.log(100.0)).exp()


def _parted(x: Tensor, windows: list[int]) -> Tensor:
    """Split a feature map into windows: (batch, windows, positions in a window, channels)."""
    pairs = [length for size, window in zip(x.shape[1:-1], windows, strict=True) for length in (size // window, window)]
    across = range(1, 2 * len(windows), 2)
    parts = x.reshape(x.shape[0], *pairs, x.shape[-1]).permute(
        0, *across, *(d + 1 for d in across), 2 * len(windows) + 1
    )
    return parts.flatten(len(windows) + 1, -2).flatten(1, len(windows))


def _join_windows(x: Tensor, sizes: list[int], windows: list[int]) -> Tensor:
    """Join windows again: (batch, *positions, channels)."""
    counts = [size // window for size, window in zip(sizes, windows, strict=True)]
    order = [axis for d in range(len(windows)) for axis in (1 + d, 1 + len(windows) + d)]
    parts = x.reshape(x.shape[0], *counts, *windows, x.shape[-1]).permute(0, *order, 2 * len(windows) + 1)
    return parts.reshape(x.shape[0], *sizes, x.shape[-1])


def _areas(sizes: tuple[int, ...], windows: list[int], shifts: list[int], device: torch.device) -> Tensor:
    """Number the areas of positions that were neighbours before a shift: (1, *positions, 1)."""
    areas = torch.zeros((), dtype=torch.int64, device=device)
    for size, window, shift in zip(sizes, windows, shifts, strict=True):
        at = torch.arange(size, device=device)
        area = (at >= size - window).long() + (at >= size - shift).long() if shift else torch.zeros_like(at)
        areas = 3 * areas[..., None] + area
    return areas[None, ..., None]


def relative(self: Any, x: Tensor, mix: Any = None) -> Tensor:
    """Compute the attention of torchvision's MaxViT: (batch, groups, positions, width)."""
    heads = self.to_qkv(x).unflatten(-1, (3, self.n_heads, self.head_dim)).permute(3, 0, 1, 4, 2, 5)
    scores = heads[0] @ (heads[1] * self.scale_factor).transpose(-2, -1) + self.get_relative_positional_bias()
    mixed: Tensor = (mix or self.merge)((scores.softmax(-1) @ heads[2]).transpose(2, 3).flatten(3))
    return mixed


class PrunedWindowAttention(ShiftedWindowAttention):
    """Swin's attention whose input may have another width than its heads together."""

    forward = windowed


class PrunedWindowAttentionV2(ShiftedWindowAttentionV2):
    """The same for Swin's second version."""

    forward = windowed


class PrunedWindowAttention3d(ShiftedWindowAttention3d):
    """The same for video Swin."""

    forward = windowed


class PrunedRelativeAttention(RelativePositionalMultiHeadAttention):
    """MaxViT's attention whose input may have another width than its heads together."""

    forward = relative


UNFUSED: dict[type[nn.Module], type[nn.Module]] = {
    ShiftedWindowAttention: PrunedWindowAttention,
    ShiftedWindowAttentionV2: PrunedWindowAttentionV2,
    ShiftedWindowAttention3d: PrunedWindowAttention3d,
    RelativePositionalMultiHeadAttention: PrunedRelativeAttention,
}
"""By class of attention, its unfused class."""
