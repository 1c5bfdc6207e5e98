"""Small nets of the pruning literature: LeNets, a net for 8x8 digits, a 12-layer CNN.

All are plain chains of named layers, without batch sizes or image sizes in ``forward``, so that ``torch.fx``
can trace them. ReLUs are not in place, so that hooks see a layer's unchanged output.

References
----------
.. [1] Y. LeCun et al., "Gradient-based learning applied to document recognition", https://doi.org/10.1109/5.726791
.. [2] H. Tanaka et al., "Pruning neural networks without any data by iteratively conserving synaptic flow",
   https://arxiv.org/abs/2006.05467
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


def named(**layers: nn.Module) -> nn.Sequential:
    """Chain layers under their names."""
    return nn.Sequential(OrderedDict(layers))


class ConvNet(nn.Module):
    """Convolutional features ``[n, c, h', w']``, flattened, then a classifier."""

    def __init__(self, features: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.features = features
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits ``[n, num_classes]`` of images ``[n, in_channels, h, w]``."""
        logits: Tensor = self.classifier(torch.flatten(self.features(images), 1))
        return logits


class Mlp(nn.Sequential):
    """Fully connected layers with ReLUs in between, on flattened images; ``sizes``: input, hidden layers, output."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(OrderedDict(flatten=nn.Flatten(), **_linear_layers(sizes)))


def lenet300(num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """Build LeNet-300-100 [1]_: two hidden layers of 300 and 100 neurons."""
    return Mlp(in_channels * image_size**2, 300, 100, num_classes)


def mnist_fcn(num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """Build the fully connected net of the pruning literature [2]_: five hidden layers of 100 neurons."""
    return Mlp(in_channels * image_size**2, 100, 100, 100, 100, 100, num_classes)


def mnist_cnn(num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """Build the convolutional counterpart of `mnist_fcn`: two padded 3x3 convolutions of 32 filters, no pooling."""
    first, second = nn.Conv2d(in_channels, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
    features = named(conv1=first, relu1=nn.ReLU(), conv2=second, relu2=nn.ReLU())
    return ConvNet(features, named(fc1=nn.Linear(32 * image_size**2, num_classes)))


def lenet5(num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """Build LeNet-5 [1]_: unpadded 5x5 convolutions of 6 and 16 filters, average pooling, 120 and 84 hidden neurons."""
    side = ((image_size - 4) // 2 - 4) // 2
    features = _lenet(in_channels, (6, 16), nn.AvgPool2d, padding=0)
    return ConvNet(features, _classifier(16 * side**2, 120, 84, num_classes))


def lenet5_like(num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """Build the wider LeNet-5: padded 5x5 convolutions of 32 and 64 filters, 1024 hidden neurons."""
    features = _lenet(in_channels, (32, 64), nn.MaxPool2d, padding=2)
    return ConvNet(features, _classifier(64 * (image_size // 4) ** 2, 1024, num_classes))


def small_cnn(num_classes: int, in_channels: int) -> nn.Module:
    """Build three 3x3 convolutions of 16, 32 and 64 filters with batch norm, and 64 hidden neurons."""
    features, channels = convolutions(in_channels, ((16,), (32,), (64,)), bias=False)
    # Average pooling to 2x2, so that the number of parameters doesn't depend on the image size.
    features.pool3 = nn.AdaptiveAvgPool2d(2)
    return ConvNet(features, _classifier(4 * channels, 64, num_classes))


def cnn12(num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """Build the 12-layer CNN: convolution, ReLU, pooling, batch norm four times, then three hidden layers."""
    # Kernels are 3x3, 3x3, 5x5 and 5x5; every hidden layer goes through ReLU, dropout and batch norm. The dropout rate
    # isn't stated in the source; it is 0.25 here.
    features: dict[str, nn.Module] = {}
    widths = (in_channels, 64, 128, 256, 512)
    for index, ((inputs, outputs), kernel) in enumerate(zip(pairwise(widths), (3, 3, 5, 5), strict=True), start=1):
        features[f"conv{index}"] = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
        features[f"relu{index}"] = nn.ReLU()
        features[f"pool{index}"] = nn.MaxPool2d(2)
        features[f"norm{index}"] = nn.BatchNorm2d(outputs)
    head: dict[str, nn.Module] = {}
    hidden = (512 * (image_size // 16) ** 2, 128, 256, 512)
    for index, (inputs, outputs) in enumerate(pairwise(hidden), start=1):
        head[f"fc{index}"] = nn.Linear(inputs, outputs)
        head[f"relu{index}"] = nn.ReLU()
        head[f"dropout{index}"] = nn.Dropout(0.25)
        head[f"norm{index}"] = nn.BatchNorm1d(outputs)
    head["fc4"] = nn.Linear(512, num_classes)
    return ConvNet(named(**features), named(**head))


def convolutions(
    in_channels: int, stages: Sequence[Sequence[int]], *, bias: bool, pooled: bool = True
) -> tuple[nn.Sequential, int]:
    """Chain 3x3 convolutions with batch norm in stages, by default each with 2x2 max pooling at its end.

    ``stages`` holds the widths of each stage's convolutions. The second result is the last width.
    """
    layers: dict[str, nn.Module] = {}
    inputs, index = in_channels, 0
    for stage, widths in enumerate(stages, start=1):
        for outputs in widths:
            index += 1
            layers[f"conv{index}"] = nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)
            layers[f"norm{index}"] = nn.BatchNorm2d(outputs)
            layers[f"relu{index}"] = nn.ReLU()
            inputs = outputs
        if pooled:
            layers[f"pool{stage}"] = nn.MaxPool2d(2)
    return named(**layers), inputs


def _lenet(in_channels: int, widths: Sequence[int], pool: type[nn.Module], padding: int) -> nn.Sequential:
    """Chain 5x5 convolutions, each with a ReLU and 2x2 pooling."""
    layers: dict[str, nn.Module] = {}
    for index, (inputs, outputs) in enumerate(pairwise((in_channels, *widths)), start=1):
        layers[f"conv{index}"] = nn.Conv2d(inputs, outputs, 5, padding=padding)
        layers |= {f"relu{index}": nn.ReLU(), f"pool{index}": pool(2)}
    return named(**layers)


def _classifier(*sizes: int) -> nn.Sequential:
    """Chain linear layers with ReLUs in between; ``sizes``: input, hidden layers, logits."""
    return named(**_linear_layers(sizes))


def _linear_layers(sizes: Sequence[int]) -> dict[str, nn.Module]:
    """Return linear layers with ReLUs in between, by name."""
    layers: dict[str, nn.Module] = {}
    for index, (inputs, outputs) in enumerate(pairwise(sizes), start=1):
        layers[f"fc{index}"] = nn.Linear(inputs, outputs)
        layers[f"relu{index}"] = nn.ReLU()
    del layers[f"relu{len(sizes) - 1}"]
    return layers
