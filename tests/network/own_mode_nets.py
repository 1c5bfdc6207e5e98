"""Networks whose ``train`` or ``eval`` is their own, and does more than to set the mode."""

from __future__ import annotations

import torch
from torch import nn


class Adapted(nn.Linear):
    """A layer with an adapter of low rank, merged into its weight for evaluation, as loralib does it."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.down, self.up = nn.Parameter(0.1 * torch.randn(2, inputs)), nn.Parameter(torch.randn(outputs, 2))
        self.is_merged = False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.is_merged:
            self.weight.data += (-1.0 if mode else 1.0) * self.up @ self.down
            self.is_merged = not mode
        return self

    def forward(self, rows):
        found = super().forward(rows)
        return found if self.is_merged else found + rows @ self.down.T @ self.up.T


class Averaged(nn.Sequential):
    """A network whose averages of weights, in a dict, are swapped in for evaluation."""

    def __init__(self, *layers):
        super().__init__(*layers)
        self.averages = {name: 0.9 * value.detach() for name, value in self.named_parameters()}

    def train(self, mode=True):
        if mode != self.training:
            for name, value in self.named_parameters():
                own = value.detach().clone()
                value.data.copy_(self.averages[name])
                self.averages[name] = own
        return super().train(mode)


class Scaling(nn.Module):
    """What makes a layer's or a network's ``train`` note a factor of its outputs."""

    def train(self, mode=True):
        self.scale = 1.0 if mode else 2.0
        return super().train(mode)

    def forward(self, rows):
        return super().forward(rows) * self.scale


class ForEvaluation(nn.Sequential):
    """A network whose ``train`` fails."""

    def train(self, mode=True):
        if mode:
            raise RuntimeError("for inference only")
        return super().train(mode)
