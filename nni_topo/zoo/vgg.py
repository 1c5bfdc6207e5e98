"""VGG-16 and VGG-11 for small images: 3x3 convolutions with batch norm, two variants of each.

References
----------
.. [1] K. Simonyan and A. Zisserman, "Very deep convolutional networks for large-scale image recognition",
   https://arxiv.org/abs/1409.1556
.. [2] S. Liu and W. Deng, "Very deep convolutional neural network based image classification using small
   training sample size", ACPR 2015, https://doi.org/10.1109/ACPR.2015.7486599
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from nni_topo.zoo.small import ConvNet, convolutions, named

_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
_STAGES_11 = ((64,), (128,), (256, 256), (512, 512), (512, 512))


def vgg16(num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    """Build VGG-16 with one linear layer after the convolutions, the usual form for 32x32 images."""
    # No bias: the batch norm after each convolution would cancel it.
    features, channels = convolutions(in_channels, _widths(_STAGES, width), bias=False)
    inputs = channels * (image_size // 32) ** 2
    return ConvNet(features, named(fc1=nn.Linear(inputs, num_classes)))


def vgg16_modified(num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    """Build VGG-16 with one hidden layer of 512 neurons; convolutions keep their biases, as in the source."""
    # Batch norm as in reference [2] of this module; of that source's dropout only the hidden layer's, 0.5, is kept.
    features, channels = convolutions(in_channels, _widths(_STAGES, width), bias=True)
    hidden = scaled(512, width)
    head = named(
        fc1=nn.Linear(channels * (image_size // 32) ** 2, hidden),
        norm1=nn.BatchNorm1d(hidden),
        relu1=nn.ReLU(),
        dropout1=nn.Dropout(0.5),
        fc2=nn.Linear(hidden, num_classes),
    )
    return ConvNet(features, head)


def vgg11(num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    """Build VGG-11 with two hidden layers of 1024 neurons, as for Tiny-ImageNet's 64x64 images."""
    features, channels = convolutions(in_channels, _widths(_STAGES_11, width), bias=False)
    sizes = (channels * (image_size // 32) ** 2, scaled(1024, width), scaled(1024, width), num_classes)
    fc1, fc2, fc3 = (nn.Linear(inputs, outputs) for inputs, outputs in pairwise(sizes))
    return ConvNet(features, named(fc1=fc1, relu1=nn.ReLU(), fc2=fc2, relu2=nn.ReLU(), fc3=fc3))


def vgg11_unpooled(num_classes: int, in_channels: int, width: float) -> nn.Module:
    """Build VGG-11 without pooling except the mean over all positions, before its single linear layer."""
    features, channels = convolutions(in_channels, _widths(_STAGES_11, width), bias=False, pooled=False)
    features.add_module("pool", nn.AdaptiveAvgPool2d(1))
    return ConvNet(features, named(fc1=nn.Linear(channels, num_classes)))


def scaled(channels: int, width: float) -> int:
    """Return ``channels * width``, rounded to the nearest integer and at least 1."""
    return max(1, round(channels * width))


def _widths(stages: Sequence[Sequence[int]], width: float) -> list[list[int]]:
    return [[scaled(channels, width) for channels in stage] for stage in stages]
