from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional

from nni_topo.errors import ConfigError
from nni_topo.studies.analysis.bounds.lipschitz import convolution_constant, operator_constant, pooling_constant
from nni_topo.studies.analysis.bounds.propagation import traced


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
        (nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1, bias=False), (2, 4, 5)),
        (nn.ConvTranspose2d(4, 2, 2, stride=2, groups=2, bias=False), (4, 3, 3)),
        (nn.ConvTranspose1d(2, 3, 3, dilation=2, bias=False), (2, 6)),
    ],
)
def test_constant_of_a_convolution_bounds_its_norm_and_not_by_far(module, shape):
    torch.manual_seed(0)
    module = module.double()
    nn.init.normal_(module.weight)
    norm = float(torch.linalg.matrix_norm(matrix_of(module, shape), 2))
    bound = convolution_constant(module, shape[1:])
    assert norm <= bound * (1 + 1e-12)
    assert bound <= 2.5 * norm


@pytest.mark.parametrize(
    "pool",
    [
        nn.AvgPool2d(3, 2, 1), nn.AvgPool2d((3, 2), (2, 3), ceil_mode=True),
        nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.AdaptiveAvgPool2d((3, 11)), nn.AdaptiveAvgPool2d(1),
    ],
    ids=str,
)  # fmt: skip
def test_constants_of_averages_are_their_norms(pool):
    matrix = matrix_of(pool, (1, 7, 8))
    leaving = pool(torch.zeros(1, 1, 7, 8)).shape[2:]
    assert pooling_constant(pool, (7, 8), leaving) == pytest.approx(float(torch.linalg.matrix_norm(matrix, 2)))


class Functional(nn.Module):
    def forward(self, value):
        value = functional.max_pool2d(value, 3, stride=2, padding=1)
        value = functional.avg_pool2d(value, 2, 1, ceil_mode=True)
        return functional.adaptive_avg_pool2d(value, output_size=3)


def test_poolings_by_functions_count_as_the_modules_of_their_settings():
    graph = traced(Functional(), torch.randn(2, 1, 9, 9))
    constants = [operator_constant(graph, node) for node in graph.graph.nodes if node.op == "call_function"]
    averages = nn.AvgPool2d(2, 1, ceil_mode=True), nn.AdaptiveAvgPool2d(3)
    modules = (nn.MaxPool2d(3, 2, 1), *averages)
    sides = pairwise((9, 5, 4, 3))
    expected = [pooling_constant(module, (a, a), (b, b)) for module, (a, b) in zip(modules, sides, strict=True)]
    assert constants == expected


def test_large_convolutions_fall_back_to_sums():
    torch.manual_seed(0)
    module = nn.Conv2d(2, 4, 3, groups=2, bias=False).double()
    norm = float(torch.linalg.matrix_norm(matrix_of(module, (2, 6, 6)), 2))
    assert norm <= convolution_constant(module, (6, 6), most=1) < math.inf


@pytest.mark.parametrize(
    "module",
    [
        nn.ReLU(), nn.LeakyReLU(-1.5), nn.ELU(2.0), nn.GELU(), nn.SiLU(), nn.Mish(), nn.Hardswish(), nn.Sigmoid(),
        nn.Hardsigmoid(), nn.Softplus(), nn.Softmax(1), nn.MaxPool2d(2), nn.MaxPool2d(3, 1), nn.MaxPool2d(3, 2, 1),
        nn.AvgPool2d(2), nn.AvgPool2d(3, 2, 1), nn.AdaptiveAvgPool2d(3), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.BatchNorm2d(2), nn.CELU(0.5), nn.AdaptiveAvgPool2d(11), nn.AvgPool2d(3, 2, 1, count_include_pad=False),
        nn.AvgPool2d(3, 2, ceil_mode=True), nn.MaxPool2d(2, 1, dilation=3), nn.SELU(), nn.PReLU(2),
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
    graph = traced(nn.Sequential(nn.Conv2d(1, 4, 1), nn.AvgPool2d(2, divisor_override=1)), torch.randn(1, 1, 4, 4))
    with pytest.raises(ConfigError, match="known Lipschitz constant, got 'avgpool2d'"):
        operator_constant(graph, next(node for node in graph.graph.nodes if node.target == "1"))
    with pytest.raises(ConfigError, match="padded by zeros, got 'circular'"):
        convolution_constant(nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular"), (4, 4))
