"""A small ResNet of bottleneck blocks for 28x28 images, to look for the saw-tooth over their three convolutions."""

from __future__ import annotations

from itertools import pairwise

from torch import nn
from torchvision.models.resnet import Bottleneck

_STAGES = (16, 32, 64)
_BLOCKS = 3


def resnet29(num_classes: int, in_channels: int, width: float = 1.0) -> nn.Module:
    """Build 29 layers: a 3x3 convolution, three stages of three bottleneck blocks, a linear layer.

    Parameters
    ----------
    num_classes, in_channels : int
        Width of the output and of the input.
    width : float, default=1.0
        Factor on the 16, 32 and 64 channels inside the stages' blocks; a block puts out four times as many.

    Returns
    -------
    torch.nn.Module
        From images ``(n, in_channels, h, w)`` to logits ``(n, num_classes)``.
    """
    inner = [max(1, round(channels * width)) for channels in _STAGES]
    widths = [inner[0], *(Bottleneck.expansion * channels for channels in inner)]
    stem = nn.Sequential(
        nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
    )
    stages = [
        _stage(inputs, planes, stride=1 if index == 0 else 2)
        for index, ((inputs, _), planes) in enumerate(zip(pairwise(widths), inner, strict=True))
    ]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], num_classes))
    return nn.Sequential(stem, *stages, head)


def _stage(inputs: int, planes: int, stride: int) -> nn.Sequential:
    outputs = Bottleneck.expansion * planes
    shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))
    first = Bottleneck(inputs, planes, stride, shortcut)
    return nn.Sequential(first, *(Bottleneck(outputs, planes) for _ in range(_BLOCKS - 1)))
