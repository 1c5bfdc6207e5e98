from __future__ import annotations

import pytest
import torch
from every_sample import compensation
from torch import nn

from nni_topo.speedup import to_dense


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(8, bias=False), nn.LayerNorm(8), nn.GroupNorm(2, 8)], ids=["no bias", "layer", "group"]
)
def test_norms_count_removed_channels_as_in_the_dense_model(norm):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), norm, nn.Linear(8, 3)).double().eval()
    inputs = torch.randn(80, 5, dtype=torch.float64)
    masks = {"0": {"weight": torch.tensor([1.0, 1, 1, 0, 1, 1, 0, 1], dtype=torch.float64)[:, None]}}
    found = compensation(net, masks, [inputs])
    expected, dense = net(inputs).detach(), to_dense(found.model, inputs[:2], masks, check=False)(inputs).detach()
    variance = (expected - expected.mean(0)).square().sum()
    last = found.report.layers[-1]
    assert float((dense - expected).square().sum() / variance) == pytest.approx(last.error_after, rel=1e-6)
    assert last.error_after < last.error_before


def test_a_batch_norm_without_parameters_is_solved_through():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4, affine=False), nn.ReLU(),
        nn.Flatten(), nn.Linear(16, 2),
    ).double().eval()  # fmt: skip
    net[2].running_var.uniform_(0.5, 2.0)
    with torch.no_grad():
        net[0].weight[3], net[0].bias[3] = 2.0 * net[0].weight[0], 2.0 * net[0].bias[0]
    images = torch.randn(40, 3, 2, 2, dtype=torch.float64)
    masks = {"0": {"weight": torch.tensor([1.0, 1, 1, 0], dtype=torch.float64)[:, None, None, None]}}
    found = compensation(net, masks, [images])
    assert found.report.layers[0].layer == "1"
    dense = to_dense(found.model, images[:2], masks)
    torch.testing.assert_close(dense(images), net(images), rtol=1e-6, atol=1e-6)
