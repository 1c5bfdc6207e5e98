"""ResNets for small images: a 3x3 convolution, then stages of basic blocks, without pooling at the start.

If a block changes the number of channels, its shortcut is a 1x1 convolution with batch norm (option B of the paper).
Option A, strided slicing with zero padding, isn't offered: it pads by a number of channels inside ``forward``, which
neither NNI's ModelSpeedup nor other tools can adapt.

Source: K. He, X. Zhang, S. Ren and J. Sun, "Deep residual learning for image recognition",
https://arxiv.org/abs/1512.03385
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nni_topo.zoo.vgg import scaled


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, added to a shortcut; the first convolution and the shortcut are strided."""

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


class SmallImageResNet(nn.Module):
    """Stages of ``blocks`` basic blocks each; stage ``i`` has ``width * channels[i]`` channels."""

    def __init__(
        self, blocks: int, num_classes: int, in_channels: int, width: float, channels: Sequence[int] = (16, 32, 64)
    ) -> None:
        super().__init__()
        widths = [scaled(count, width) for count in channels]
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(widths[0])
        self.relu1 = nn.ReLU()
        for index in range(len(widths)):
            # The first block of a stage changes channels and resolution.
            first = BasicBlock(widths[max(index - 1, 0)], widths[index], stride=2 if index else 1)
            following = [BasicBlock(widths[index], widths[index], stride=1) for _ in range(blocks - 1)]
            self.add_module(f"stage{index + 1}", nn.Sequential(first, *following))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits ``[n, num_classes]`` of images ``[n, in_channels, h, w]``."""
        features = self.relu1(self.norm1(self.conv1(images)))
        for name, stage in self.named_children():  # NNI's tracer can't use names from a list
            if name.startswith("stage"):
                features = stage(features)
        logits: Tensor = self.fc(torch.flatten(self.pool(features), 1))
        return logits


def resnet20(num_classes: int, in_channels: int, width: float) -> nn.Module:
    """Build the 20-layer ResNet: three blocks a stage."""
    return SmallImageResNet(3, num_classes, in_channels, width)


def resnet56(num_classes: int, in_channels: int, width: float) -> nn.Module:
    """Build the 56-layer ResNet: nine blocks a stage."""
    return SmallImageResNet(9, num_classes, in_channels, width)


def resnet18(num_classes: int, in_channels: int, width: float) -> nn.Module:
    """Build the 18-layer ResNet for small images: a 3x3 first convolution, no pooling after it."""
    return SmallImageResNet(2, num_classes, in_channels, width, (64, 128, 256, 512))
