"""Scales and offsets of batch norms, against the norms themselves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nni_topo.network.layers.batch_norm import norm_scale, through_norms


def drawn(channels: int, **knobs: bool) -> nn.BatchNorm2d:
    generator = torch.Generator().manual_seed(channels)
    norm = nn.BatchNorm2d(channels, **knobs).double().eval()
    if norm.running_var is not None:
        norm.running_mean.copy_(torch.randn(channels, generator=generator))
        norm.running_var.copy_(torch.rand(channels, generator=generator))
    for parameter in norm.parameters():
        parameter.data.copy_(torch.randn(channels, generator=generator))
    return norm


@pytest.mark.parametrize("affine", [True, False])
def test_norms_do_to_constants_what_they_do_to_images(affine):
    norms = [drawn(4, affine=affine), drawn(4, affine=True)]
    constants = torch.tensor([0.5, -1.0, 100.0, 0.0])
    with torch.no_grad():
        expected = nn.Sequential(*norms)(constants.double().view(1, -1, 1, 1)).flatten()
        steeper = nn.Sequential(*norms)(constants.double().add(1.0).view(1, -1, 1, 1)).flatten()
    scale, offset = through_norms(norms, constants)
    torch.testing.assert_close(offset, expected)
    torch.testing.assert_close(scale, steeper - expected)


def test_norm_without_running_statistics_has_no_scale():
    norm = drawn(3, track_running_stats=False)
    assert norm_scale(norm) is None
    scale, offset = through_norms([norm], torch.arange(3.0))
    assert scale.tolist() == [1.0, 1.0, 1.0]
    assert offset.tolist() == [0.0, 1.0, 2.0]
