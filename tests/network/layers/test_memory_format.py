"""Channels come last, but where PyTorch's library would compute a wrong gradient, or die."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from nni_topo.network.layers.memory_format import inputs_laid_out, lay_out


class Shortcut(nn.Module):
    """A block of a ResNet of few channels, with a strided shortcut, as pruning leaves them."""

    def __init__(self, channels):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.body, self.shortcut = nn.Conv2d(channels, 8, 3, 2, 1), nn.Conv2d(channels, 8, 1, 2)
        self.head = nn.Linear(8, 4)

    def forward(self, images):
        images = self.stem(images).relu()
        return self.head((self.body(images) + self.shortcut(images)).relu().mean((2, 3)))


def gradients(net, images):
    net.zero_grad()
    net(images).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in net.named_parameters()}


@pytest.mark.parametrize("channels", [1, 4, 7, 12])
def test_gradients_of_thin_strided_shortcuts_are_right(channels):
    torch.manual_seed(0)
    net, images = Shortcut(channels), torch.randn(61, 3, 14, 14)
    wanted = gradients(copy.deepcopy(net).double(), images.double())
    before = copy.deepcopy(net.state_dict())
    laid_out = lay_out(net, (images,), {})
    seen = []
    handles = [module.register_forward_hook(lambda _, __, out: seen.append(out)) for module in (net.body, net.shortcut)]
    with inputs_laid_out(laid_out):
        for _ in range(20):
            found = gradients(laid_out, images.to(memory_format=torch.channels_last))
    for name, gradient in found.items():
        torch.testing.assert_close(gradient.double(), wanted[name], rtol=1e-3, atol=1e-3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    body, shortcut = seen[:2]
    assert body.is_contiguous(memory_format=torch.channels_last)
    assert shortcut.is_contiguous()
    for handle in handles:
        handle.remove()


def test_wide_shortcuts_and_others_have_their_channels_last():
    net = nn.Sequential(nn.Conv2d(16, 8, 1, 2), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 3, 2))
    lay_out(net, (torch.randn(2, 16, 20, 20),), {})
    with inputs_laid_out(net):
        out = net(torch.randn(2, 16, 20, 20).to(memory_format=torch.channels_last))
    assert out.is_contiguous(memory_format=torch.channels_last)
