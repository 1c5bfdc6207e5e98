"""VGG-16 and VGG-11 for small images: 3x3 convolutions with batch norm, in two forms each.

References
----------
.. [1] K. Simonyan and A. Zisserman, "Very deep convolutional networks for large-scale image recognition",
   https://arxiv.org/abs/1409.1556
.. [2] S. Liu and W. Deng, "Very deep convolutional neural network based image classification using small
   training sample size", ACPR 2015, https://doi.org/10.1109/ACPR.2015.7486599
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from nni_topo.zoo.small import ConvNet

_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
_STAGES_11 = ((64,), (128,), (256, 256), (512, 512), (512, 512))


def vgg16(num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    """Build VGG-16 with one linear layer behind the convolutions, the usual form for 32x32 images."""
    # No bias: the batch norm behind each convolution would cancel it.
    features, channels = _features(in_channels, width, bias=False)
    inputs = channels * (image_size // 32) ** 2
    return ConvNet(features, nn.Sequential(OrderedDict(fc1=nn.Linear(inputs, num_classes))))


def vgg16_modified(num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    """Build VGG-16 with one hidden layer of 512 neurons; convolutions keep their biases, as in the source."""
    # Batch norm follows the module's reference [2]; the dropout of that source is left to the hidden layer, at 0.5.
    features, channels = _features(in_channels, width, bias=True)
    hidden = scaled(512, width)
    head = OrderedDict[str, nn.Module](
        fc1=nn.Linear(channels * (image_size // 32) ** 2, hidden),
        norm1=nn.BatchNorm1d(hidden),
        relu1=nn.ReLU(),
        dropout1=nn.Dropout(0.5),
        fc2=nn.Linear(hidden, num_classes),
    )
    return ConvNet(features, nn.Sequential(head))


def vgg11(num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    """Build VGG-11 with two hidden layers of 1024 neurons, as for Tiny-ImageNet's 64x64 images."""
    features, channels = _features(in_channels, width, _STAGES_11, bias=False)
    sizes = (channels * (image_size // 32) ** 2, scaled(1024, width), scaled(1024, width), num_classes)
    head: OrderedDict[str, nn.Module] = OrderedDict(fc1=nn.Linear(*sizes[:2]), relu1=nn.ReLU())
    head |= OrderedDict(fc2=nn.Linear(*sizes[1:3]), relu2=nn.ReLU(), fc3=nn.Linear(*sizes[2:]))
    return ConvNet(features, nn.Sequential(head))


def vgg11_unpooled(num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    """Build VGG-11 with no pooling but the mean over all positions, in front of its one linear layer."""
    del image_size
    features, channels = _features(in_channels, width, _STAGES_11, bias=False, pooled=False)
    features.add_module("pool", nn.AdaptiveAvgPool2d(1))
    return ConvNet(features, nn.Sequential(OrderedDict(fc1=nn.Linear(channels, num_classes))))


def scaled(channels: int, width: float) -> int:
    """Return ``channels * width``, rounded to the nearest integer and at least 1."""
    return max(1, round(channels * width))


def _features(
    in_channels: int, width: float, stages: Sequence[Sequence[int]] = _STAGES, *, bias: bool, pooled: bool = True
) -> tuple[nn.Sequential, int]:
    """Chain convolutions in stages, each ended by 2x2 max pooling; the channels they end with."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    inputs, index = in_channels, 0
    for stage, widths in enumerate(stages, start=1):
        for channels in widths:
            index, outputs = index + 1, scaled(channels, width)
            layers[f"conv{index}"] = nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)
            layers[f"norm{index}"] = nn.BatchNorm2d(outputs)
            layers[f"relu{index}"] = nn.ReLU()
            inputs = outputs
        if pooled:
            layers[f"pool{stage}"] = nn.MaxPool2d(2)
    return nn.Sequential(layers), inputs
