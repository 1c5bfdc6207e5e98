"""Convolutions that go along the channels of another layer, as in ECA nets, of which channels are gone.

There the next channel isn't the next one any more. Each tap of the kernel looks up its channel instead; those that are
gone were zeros, and so is what lies beyond the border.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class AlongChannels(nn.Conv1d):
    """A convolution along ``counted`` channels, of which some are left."""

    counted: int
    taps: Tensor  # int64, (left, kernel): where among the channels left what each tap sees is; one further for a zero

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``(batch, inputs, left)`` to ``(batch, outputs, left)``."""
        windows = functional.pad(x, (0, 1))[..., self.taps]
        found = torch.einsum("bilk,oik->bol", windows, self.weight)
        return found if self.bias is None else found + self.bias[:, None]

    def extra_repr(self) -> str:
        """Show the channels counted too."""
        return f"{super().extra_repr()}, counted={self.counted}"  # type: ignore[no-untyped-call]


def count_channels(module: Any, channels: int) -> None:
    """Let a convolution look its channels up; one that does keeps its own."""
    if isinstance(module, AlongChannels):
        return
    before = module._reversed_padding_repeated_twice[0]
    steps = torch.arange(module.kernel_size[0]) * module.dilation[0] - before
    taps = torch.arange(channels)[:, None] + steps
    module.__class__ = AlongChannels
    module.counted = channels
    taps = taps.masked_fill((taps < 0) | (taps >= channels), channels)
    module.register_buffer("taps", taps.to(module.weight.device), persistent=False)


def cut_along(module: Any, kept: Tensor, channels: int) -> None:
    """Keep some of the channels that a convolution goes along, by their places among those there are, in place."""
    count_channels(module, channels)
    places = torch.full((channels + 1,), len(kept), device=kept.device).index_copy(
        0, kept, torch.arange(len(kept), device=kept.device)
    )
    module.taps = places[module.taps[kept]]
