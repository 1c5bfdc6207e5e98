"""Networks whose blocks are removed."""

from __future__ import annotations

import torch
from torch import nn

from nni_topo.zoo.resnet import SmallImageResNet


def small_resnet(blocks: int, classes: int) -> nn.Module:
    """Build a ResNet of two stages of so many blocks, whose batch norms aren't those of a new network."""
    torch.manual_seed(0)
    model = SmallImageResNet(blocks, classes, 1, 1.0, channels=(6, 8)).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    return model
