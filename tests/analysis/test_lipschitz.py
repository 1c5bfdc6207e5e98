from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from nni_topo.analysis.lipschitz import convolution_constant, operator_constant
from nni_topo.analysis.stages import traced
from nni_topo.errors import ConfigError


def matrix_of(module: nn.Module, shape: tuple[int, ...]) -> torch.Tensor:
    """The matrix of a linear map on images of a shape."""
    basis = torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)
    with torch.no_grad():
        return module(basis).flatten(1).T


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Conv2d(2, 3, 3, padding=1, bias=False), (2, 6, 5)),
        (nn.Conv2d(2, 4, 3, stride=2, groups=2, bias=False), (2, 7, 7)),
        (nn.Conv2d(1, 2, 3, padding=4, dilation=2, bias=False), (1, 6, 6)),
        (nn.Conv1d(2, 3, 4, bias=False), (2, 9)),
        (nn.Conv3d(1, 2, 2, bias=False), (1, 3, 3, 3)),
        (nn.Conv2d(3, 5, 1, bias=False), (3, 4, 4)),
    ],
)
def test_constant_of_a_convolution_bounds_its_norm_and_not_by_far(module, shape):
    torch.manual_seed(0)
    module = module.double()
    nn.init.normal_(module.weight)
    norm = float(torch.linalg.matrix_norm(matrix_of(module, shape), 2))
    bound = convolution_constant(module, shape[1:])
    assert norm <= bound * (1 + 1e-12)
    assert bound <= 2.0 * norm


def test_large_convolutions_fall_back_to_sums(monkeypatch):
    monkeypatch.setattr("nni_topo.analysis.lipschitz._LARGEST", 1)
    torch.manual_seed(0)
    module = nn.Conv2d(2, 4, 3, groups=2, bias=False).double()
    norm = float(torch.linalg.matrix_norm(matrix_of(module, (2, 6, 6)), 2))
    assert norm <= convolution_constant(module, (6, 6)) < math.inf


@pytest.mark.parametrize(
    "module",
    [
        nn.ReLU(), nn.LeakyReLU(-1.5), nn.ELU(2.0), nn.GELU(), nn.SiLU(), nn.Mish(), nn.Hardswish(), nn.Sigmoid(),
        nn.Hardsigmoid(), nn.Softplus(), nn.Softmax(1), nn.MaxPool2d(2), nn.MaxPool2d(3, 1), nn.MaxPool2d(3, 2, 1),
        nn.AvgPool2d(2), nn.AvgPool2d(3, 2, 1), nn.AdaptiveAvgPool2d(3), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.AdaptiveMaxPool2d(3), nn.BatchNorm2d(2), nn.CELU(0.5),
    ],
    ids=str,
)  # fmt: skip
def test_no_pair_of_inputs_is_driven_further_apart(module):
    torch.manual_seed(0)
    module = module.double().eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    net = nn.Sequential(nn.Identity(), module)
    inputs = torch.randn(2, 2, 8, 8).double()
    graph = traced(net, inputs)
    node = next(node for node in graph.graph.nodes if node.target == "1")
    constant = operator_constant(graph, node)
    largest = 0.0
    for scale in (1e-3, 0.3, 3.0):
        for _ in range(40):
            one = 2.0 * torch.randn(1, 2, 8, 8).double()
            step = scale * torch.randn_like(one) * (torch.rand_like(one) < 0.1)
            ratio = (module(one + step) - module(one)).norm() / step.norm().clamp(min=1e-12)
            largest = max(largest, float(ratio.detach()))
    assert largest <= constant * (1 + 1e-9)


def test_unknown_operations_are_refused():
    graph = traced(nn.Sequential(nn.Conv2d(1, 4, 1), nn.PixelShuffle(2)), torch.randn(1, 1, 4, 4))
    node = next(node for node in graph.graph.nodes if node.target == "1")
    with pytest.raises(ConfigError, match="known Lipschitz constant, got 'pixelshuffle'"):
        operator_constant(graph, node)
    with pytest.raises(ConfigError, match="padded by zeros, got 'circular'"):
        convolution_constant(nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular"), (4, 4))
