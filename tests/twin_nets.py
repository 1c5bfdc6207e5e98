"""Networks of which half of the channels are multiples of the other half, so that nothing is lost without them."""

from __future__ import annotations

import pytest
import torch
from torch import nn


def twin_channels(layer, norm=None, factor=2.0):
    """Make channel n/2 + i of a layer (and its batch norm) ``factor`` times channel i, also behind a ReLU."""
    half = len(layer.weight) // 2
    with torch.no_grad():
        if norm is None:
            layer.weight[half:] = factor * layer.weight[:half]
            if layer.bias is not None:
                layer.bias[half:] = factor * layer.bias[:half]
            return
        for tensor in (layer.weight, norm.running_mean, norm.running_var):
            tensor[half:] = tensor[:half]
        if layer.bias is not None:
            layer.bias[half:] = layer.bias[:half]
        norm.weight[half:] = factor * norm.weight[:half]
        norm.bias[half:] = factor * norm.bias[:half]


def second_half(model, *names):
    """Masks that remove the second half of the channels of some layers."""
    masks = {}
    for name in names:
        weight = model.get_submodule(name).weight
        mask = torch.ones_like(weight)
        mask[len(weight) // 2 :] = 0
        masks[name] = {"weight": mask}
    return masks


def lively_norms(model):
    """Give batch norms statistics and parameters that aren't trivial."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.5, generator=generator)
                module.running_mean.normal_(0, 0.3, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
    return model


class ResidualNet(nn.Module):
    """A stem and two blocks, the second with a convolution in its shortcut."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 10, 3, padding=1, stride=2)
        self.conv4 = nn.Conv2d(10, 12, 3, padding=1, bias=False)
        self.norm4 = nn.BatchNorm2d(12)
        self.shortcut = nn.Conv2d(8, 12, 1, stride=2)
        self.head = nn.Linear(12, 5)

    def forward(self, images):
        x = torch.relu(self.norm(self.stem(images)))
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        y += x
        x = torch.relu_(y)
        x = torch.relu(self.norm4(self.conv4(torch.relu(self.conv3(x)))) + self.shortcut(x))
        return self.head(x.mean((2, 3)))


@pytest.fixture
def residual_net():
    """A residual net with lively batch norms, float64, in evaluation mode."""
    torch.manual_seed(0)
    return lively_norms(ResidualNet()).double().eval()


@pytest.fixture
def images():
    """32 images of 3x8x8 in four batches, float64."""
    return list(torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64).split(8))


@pytest.fixture
def twin():
    return twin_channels


@pytest.fixture
def halves():
    return second_half


@pytest.fixture
def lively():
    return lively_norms
