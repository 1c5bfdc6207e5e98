"""ResNets for small images: three stages of basic blocks of 16, 32 and 64 channels.

Where a block changes the number of channels its shortcut is a 1x1 convolution with batch norm (option B of
the paper). Option A, strided slicing with zero padding, has no parameters, but slices and pads by channel
count inside ``forward``, which neither NNI's ModelSpeedup nor another tool can narrow; it is therefore not
offered.

References
----------
.. [1] K. He, X. Zhang, S. Ren and J. Sun, "Deep residual learning for image recognition",
   https://arxiv.org/abs/1512.03385
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nni_topo.zoo.vgg import scaled


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, added to a shortcut; the stride is that of the first and the shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )
        self.relu2 = nn.ReLU()

    def forward(self, inputs: Tensor) -> Tensor:
        """Compute ``[n, outputs, h / stride, w / stride]`` from ``[n, inputs, h, w]``."""
        residual = self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(inputs)))))
        shortcut = inputs if self.shortcut is None else self.shortcut(inputs)
        output: Tensor = self.relu2(residual + shortcut)
        return output


class CifarResNet(nn.Module):
    """ResNet of depth ``6 * blocks + 2`` for images of about 32x32, with ``width`` times 16, 32 and 64 channels."""

    def __init__(self, blocks: int, num_classes: int, in_channels: int, width: float) -> None:
        super().__init__()
        channels = scaled(16, width)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.stage1 = _stage(channels, channels, blocks, stride=1)
        self.stage2 = _stage(channels, scaled(32, width), blocks, stride=2)
        self.stage3 = _stage(scaled(32, width), scaled(64, width), blocks, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(scaled(64, width), num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits ``[n, num_classes]`` of images ``[n, in_channels, h, w]``."""
        features = self.relu1(self.norm1(self.conv1(images)))
        features = self.stage3(self.stage2(self.stage1(features)))
        logits: Tensor = self.fc(torch.flatten(self.pool(features), 1))
        return logits


def resnet20(num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    """Build the 20-layer ResNet: three blocks a stage."""
    del image_size
    return CifarResNet(3, num_classes, in_channels, width)


def resnet56(num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    """Build the 56-layer ResNet: nine blocks a stage."""
    del image_size
    return CifarResNet(9, num_classes, in_channels, width)


def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    """Chain basic blocks, the first of which changes channels and resolution."""
    first = BasicBlock(inputs, outputs, stride)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)))
