"""The second device of the tests: what it refuses, as a GPU does, and that it computes what the CPU does."""

from __future__ import annotations

import far_device
import numpy as np
import pytest
import torch
from torch import nn

pytestmark = pytest.mark.skipif(not far_device.is_possible(), reason="this PyTorch takes no device written in Python")


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


IMAGES = torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "mix",
    [
        lambda far: far + torch.ones(3),
        lambda far: far.add_(torch.ones(3)),
        lambda far: torch.cat([far, torch.ones(3)]),
        lambda far: torch.ones(3)[far.long()],
    ],
)
def test_tensors_of_two_places_do_not_mix(far, mix):
    with pytest.raises(RuntimeError, match=r"on the same device, got far and a cpu tensor of shape"):
        mix(torch.zeros(3, device=far))


@pytest.mark.parametrize("convert", [lambda x: x.numpy(), np.asarray, lambda x: np.add(x, 1), torch.from_numpy])
def test_nothing_on_it_is_an_array(far, convert):
    with pytest.raises(TypeError, match=r"Tensor\.cpu\(\)|expected np\.ndarray"):
        convert(torch.zeros(3, device=far))


def test_a_network_trains_as_on_the_cpu(far):
    nets = [layers(), layers().to(far)]
    for net, images in zip(nets, (IMAGES, IMAGES.to(far)), strict=True):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            net(images).square().mean().backward()
            optimizer.step()
    assert all(value.device == far for value in nets[1].state_dict().values())
    assert all(isinstance(value, nn.Parameter) and value.grad.device == far for value in nets[1].parameters())
    pairs = zip(nets[0].state_dict().values(), nets[1].state_dict().values(), strict=True)
    assert all(torch.equal(near, there.cpu()) for near, there in pairs)
