"""Attention of PyTorch and torchvision step by step, whatever number of heads and channels is left.

Their own computes with the weights of its layers, which it never calls, and takes the width of its heads for what
enters divided by their number. Here the layers are called, so that hooks and wrappers see them, but for the one weight
of ``nn.MultiheadAttention``.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.maxvit import RelativePositionalMultiHeadAttention
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2
from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d

_APART = -100.0  # what torchvision adds between places that are no neighbours


def multihead(
    self: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    mix: Any = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute what ``nn.MultiheadAttention`` does, step by step, whatever the number of heads that are left."""
    del is_causal  # a hint that the mask makes unnecessary
    is_single, states = query.dim() == 2, [query, key, value]
    if is_single or not self.batch_first:
        states = [each.unsqueeze(0) if is_single else each.transpose(0, 1) for each in states]
    heads = [each.unflatten(2, (-1, self.head_dim)).transpose(1, 2) for each in projected(self, *states)]
    scores = heads[0] @ heads[1].transpose(2, 3) / self.head_dim**0.5
    if attn_mask is not None:
        # Masks by head know those that were there at first.
        mask = attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (scores.shape[0], -1))
        scores = scores + _additive(mask, scores)
    if key_padding_mask is not None:
        scores = scores + _additive(key_padding_mask, scores).reshape(scores.shape[0], 1, 1, -1)
    shares = functional.dropout(scores.softmax(3), self.dropout, self.training)
    mixed = (mix or self.out_proj)((shares @ heads[2]).transpose(1, 2).flatten(2))
    if is_single or not self.batch_first:
        mixed = mixed.squeeze(0) if is_single else mixed.transpose(0, 1)
    if not need_weights:
        return mixed, None
    shares = shares.mean(1) if average_attn_weights else shares
    return mixed, shares.squeeze(0) if is_single else shares


def read_by(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """List what ``nn.MultiheadAttention`` reads by its columns, which are for one width: queries, keys and values."""
    given = inspect.signature(multihead).bind(None, *args, **kwargs).arguments
    return [given[name] for name in ("query", "key", "value")]


def projected(self: Any, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """Return the queries, keys and values that ``nn.MultiheadAttention`` makes of what enters: (..., width)."""
    biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
    entering = zip((query, key, value), self.in_proj_weight.chunk(3), biases, strict=True)
    return [functional.linear(*each) for each in entering]


def _additive(mask: Tensor, scores: Tensor) -> Tensor:
    return (
        torch.zeros_like(mask, dtype=scores.dtype).masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else mask
    )


def windowed(self: Any, x: Tensor, mix: Any = None) -> Tensor:
    """Compute what torchvision's attention in shifted windows does, over images or videos: (batch, places, width)."""
    sizes, windows, shifts = x.shape[1:-1], list(self.window_size), list(self.shift_size)
    dims = tuple(range(1, x.dim() - 1))
    for d, size in enumerate(sizes):
        if size <= windows[d]:
            shifts[d] = 0
            # Of a video's size windows are made, to a window's size images are padded.
            windows[d] = size if len(sizes) == 3 else windows[d]
    ends = [-size % window for size, window in zip(sizes, windows, strict=True)]
    padded = functional.pad(x, (0, 0, *(each for end in reversed(ends) for each in (0, end))))
    tokens = _parted(torch.roll(padded, [-shift for shift in shifts], dims), windows)
    # (queries, keys, values; batch, windows, heads, places, channels)
    heads = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1)).permute(3, 0, 1, 4, 2, 5)
    scores = _products(self, *heads[:2])
    scores = scores + self.get_relative_position_bias(*([windows] if len(sizes) == 3 else []))
    if any(shifts):
        areas = _parted(_areas(padded.shape[1:-1], windows, shifts, x.device), windows)[0, ..., 0]
        scores = scores + _APART * (areas[:, None, :, None] != areas[:, None, None, :])
    shares = functional.dropout(scores.softmax(-1), self.attention_dropout, self.training)
    mixed = (mix or self.proj)((shares @ heads[2]).transpose(2, 3).flatten(3))
    mixed = functional.dropout(mixed, self.dropout, self.training)
    joined = torch.roll(_joined(mixed, list(padded.shape[1:-1]), windows), shifts, dims)
    for d, size in zip(dims, sizes, strict=True):
        joined = joined.narrow(d, 0, size)
    return joined.contiguous()


def _products(self: Any, queries: Tensor, keys: Tensor) -> Tensor:
    """Multiply queries and keys; the second version of Swin takes their cosines, and keys without a bias."""
    scale: Tensor | None = getattr(self, "logit_scale", None)
    if scale is None:
        scaled: Tensor = queries * queries.shape[-1] ** -0.5
        return scaled @ keys.transpose(-2, -1)
    if self.qkv.bias is not None:
        keys = keys - self.qkv.bias.chunk(3)[1].view(self.num_heads, 1, -1)
    cosines: Tensor = functional.normalize(queries, dim=-1) @ functional.normalize(keys, dim=-1).transpose(-2, -1)
    return cosines * scale.clamp(max=math.log(100.0)).exp()


def _parted(x: Tensor, windows: list[int]) -> Tensor:
    """Take places apart into windows: (batch, windows, places, channels)."""
    pairs = [each for size, window in zip(x.shape[1:-1], windows, strict=True) for each in (size // window, window)]
    across = range(1, 2 * len(windows), 2)
    parts = x.reshape(x.shape[0], *pairs, x.shape[-1]).permute(
        0, *across, *(d + 1 for d in across), 2 * len(windows) + 1
    )
    return parts.flatten(len(windows) + 1, -2).flatten(1, len(windows))


def _joined(x: Tensor, sizes: list[int], windows: list[int]) -> Tensor:
    """Put windows together again: (batch, places, channels)."""
    counts = [size // window for size, window in zip(sizes, windows, strict=True)]
    order = [each for d in range(len(windows)) for each in (1 + d, 1 + len(windows) + d)]
    parts = x.reshape(x.shape[0], *counts, *windows, x.shape[-1]).permute(0, *order, 2 * len(windows) + 1)
    return parts.reshape(x.shape[0], *sizes, x.shape[-1])


def _areas(sizes: tuple[int, ...], windows: list[int], shifts: list[int], device: torch.device) -> Tensor:
    """Number the areas that were neighbours before a shift: (1, places, 1)."""
    areas = torch.zeros((), dtype=torch.int64, device=device)
    for size, window, shift in zip(sizes, windows, shifts, strict=True):
        at = torch.arange(size, device=device)
        own = (at >= size - window).long() + (at >= size - shift).long() if shift else torch.zeros_like(at)
        areas = 3 * areas[..., None] + own
    return areas[None, ..., None]


def relative(self: Any, x: Tensor, mix: Any = None) -> Tensor:
    """Compute what attention of torchvision's MaxViT does: (batch, groups, places, width)."""
    heads = self.to_qkv(x).unflatten(-1, (3, self.n_heads, self.head_dim)).permute(3, 0, 1, 4, 2, 5)
    scores = heads[0] @ (heads[1] * self.scale_factor).transpose(-2, -1) + self.get_relative_positional_bias()
    mixed: Tensor = (mix or self.merge)((scores.softmax(-1) @ heads[2]).transpose(2, 3).flatten(3))
    return mixed


class PrunedMultiheadAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` of another width than its heads have together."""

    forward = multihead


class PrunedWindowAttention(ShiftedWindowAttention):
    """Swin's attention of another width than its heads have together."""

    forward = windowed


class PrunedWindowAttentionV2(ShiftedWindowAttentionV2):
    """The same of Swin's second version."""

    forward = windowed


class PrunedWindowAttention3d(ShiftedWindowAttention3d):
    """The same of Swin for videos."""

    forward = windowed


class PrunedRelativeAttention(RelativePositionalMultiHeadAttention):
    """MaxViT's attention of another width than its heads have together."""

    forward = relative


STEPWISE: dict[type[nn.Module], type[nn.Module]] = {
    nn.MultiheadAttention: PrunedMultiheadAttention,
    ShiftedWindowAttention: PrunedWindowAttention,
    ShiftedWindowAttentionV2: PrunedWindowAttentionV2,
    ShiftedWindowAttention3d: PrunedWindowAttention3d,
    RelativePositionalMultiHeadAttention: PrunedRelativeAttention,
}
"""By class of attention, one that computes the same step by step."""


def is_stepwise(module: nn.Module) -> bool:
    """Tell whether a module is such attention, whole or pruned: only its layers read what enters it."""
    return type(module) in STEPWISE or type(module) in STEPWISE.values()


def is_whole(module: nn.Module) -> bool:
    """Tell whether a module is attention that computes with the weights of layers which it doesn't call."""
    return type(module) in STEPWISE and getattr(module, "_qkv_same_embed_dim", True)


def set_stepwise(module: Any, stepwise: bool = True) -> None:
    """Let attention compute step by step, or as its own class does."""
    kinds = STEPWISE if stepwise else {made: kind for kind, made in STEPWISE.items()}
    module.__class__ = kinds.get(type(module), type(module))
    if isinstance(module, nn.MultiheadAttention):
        module._qkv_same_embed_dim = (
            not stepwise
        )  # layers of PyTorch's then don't compute with its weights by themselves
