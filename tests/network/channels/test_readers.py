from __future__ import annotations

import torch
from torch import nn

from nni_topo.network.channels.readers import norms_after
from nni_topo.network.speedup.network import Network


class Joined(nn.Module):
    """Two convolutions whose channels meet in one batch norm, and one with a norm of its own."""

    def __init__(self):
        super().__init__()
        self.left = nn.Conv2d(1, 4, 1)
        self.right = nn.Conv2d(1, 6, 1)
        self.common = nn.BatchNorm2d(10)
        self.behind = nn.Conv2d(10, 3, 1)
        self.own = nn.BatchNorm2d(3)

    def forward(self, images):
        return self.own(self.behind(self.common(torch.cat([self.left(images), self.right(images)], 1))))


def test_a_norm_behind_a_concatenation_is_no_single_layers():
    model = Joined().eval()
    assert norms_after(model, Network.on(model, torch.ones(2, 1, 4, 4)).flow) == {"behind": "own"}
