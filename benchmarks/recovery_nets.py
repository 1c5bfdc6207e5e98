"""Small networks of four more kinds for 28x28 images: depth-wise, densely connected, grouped and 1-D convolutions."""

from __future__ import annotations

from torch import nn
from torchvision.models.densenet import DenseNet
from torchvision.models.mobilenetv2 import MobileNetV2
from torchvision.models.regnet import BlockParams, RegNet, SimpleStemIN

_BLOCKS = [[1, 16, 1, 1], [4, 24, 2, 1], [4, 32, 2, 2], [4, 64, 2, 1]]  # expansion, channels, blocks, stride


def mobilenet_like(num_classes: int, in_channels: int) -> nn.Module:
    """Build MobileNetV2 with seven inverted residual blocks, from images (n, in_channels, h, w) to logits."""
    model = MobileNetV2(num_classes, inverted_residual_setting=_BLOCKS, dropout=0.0)
    model.features[0][0] = nn.Conv2d(in_channels, 32, 3, 2, 1, bias=False)
    model.features[-1] = nn.Sequential(nn.Conv2d(64, 256, 1, bias=False), nn.BatchNorm2d(256), nn.ReLU6(inplace=True))
    model.classifier = nn.Linear(256, num_classes)
    return model


def densenet_like(num_classes: int, in_channels: int) -> nn.Module:
    """Build DenseNet-BC with three blocks of four layers, from images (n, in_channels, h, w) to logits."""
    model = DenseNet(16, (4, 4, 4), num_init_features=32, num_classes=num_classes)
    model.features.conv0 = nn.Conv2d(in_channels, 32, 3, 2, 1, bias=False)
    model.features.pool0 = nn.Identity()
    return model


def regnet_like(num_classes: int, in_channels: int) -> nn.Module:
    """Build RegNetX with five blocks in groups of eight channels, from images (n, in_channels, h, w) to logits."""
    params = BlockParams([1, 2, 2], [24, 48, 96], [8, 8, 8], [1.0, 1.0, 1.0], [1, 2, 2])
    model = RegNet(params, num_classes, stem_width=24, stem_type=SimpleStemIN)
    model.stem[0] = nn.Conv2d(in_channels, 24, 3, 2, 1, bias=False)
    return model


def sequence_like(num_classes: int, in_channels: int) -> nn.Module:
    """Build four 1-D convolutions over an image's pixels, row after row, from (n, in_channels, h, w) to logits."""
    layers: list[nn.Module] = [nn.Flatten(2)]
    for before, after in zip((in_channels, 16, 32, 64), (16, 32, 64, 64), strict=True):
        layers += [nn.Conv1d(before, after, 7, 2, 3, bias=False), nn.BatchNorm1d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(7), nn.Flatten(), nn.Linear(7 * 64, num_classes))
