"""Functions of ``torch.nn.functional`` that models call can be traced by NNI."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nni.common.concrete_trace_utils import concrete_trace
from torch import Tensor, nn
from torch.nn import functional

GENERATOR = torch.Generator().manual_seed(0)


def drawn(*shape: int) -> Tensor:
    return torch.rand(shape, generator=GENERATOR) * 0.8 + 0.1


ROWS, TEXT, IMAGES = (4, 6), (2, 4, 8), (2, 4, 8, 8)
INDICES = functional.max_pool2d(drawn(*IMAGES), 2, return_indices=True)[1]
CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "gelu": (ROWS, {}),
    "max_pool1d": (TEXT, {"kernel_size": 2}),
    "max_pool2d": (IMAGES, {"kernel_size": 2}),
    "adaptive_max_pool2d": (IMAGES, {"output_size": 2}),
    "max_unpool2d": (tuple(INDICES.shape), {"indices": INDICES, "kernel_size": 2}),
    "conv2d": (IMAGES, {"weight": drawn(3, 4, 3, 3)}),
    "batch_norm": (IMAGES, {"running_mean": drawn(4), "running_var": drawn(4)}),
    "grid_sample": (IMAGES, {"grid": drawn(2, 5, 5, 2), "align_corners": False}),
    "interpolate": (IMAGES, {"scale_factor": 2}),
    "mse_loss": (ROWS, {"target": drawn(4, 6)}),
    "normalize": (ROWS, {}),
    "scaled_dot_product_attention": (TEXT, {"key": drawn(*TEXT), "value": drawn(*TEXT)}),
}


class Calls(nn.Module):
    """Calls a function the way a model does, by its name in ``torch.nn.functional``."""

    def __init__(self, name: str, extra: dict[str, Any]) -> None:
        super().__init__()
        self.name, self.extra = name, extra

    def forward(self, value: Tensor) -> Tensor:
        result: Tensor = getattr(functional, self.name)(value, **self.extra)
        return result


@pytest.mark.parametrize("name", CASES)
def test_a_function_is_traced(name: str) -> None:
    shape, extra = CASES[name]
    model = Calls(name, extra).eval()
    graph_module = concrete_trace(model, (drawn(*shape),))
    other = drawn(*shape)
    torch.testing.assert_close(graph_module(other), model(other))
    output = next(node for node in graph_module.graph.nodes if node.op == "output")
    assert output.args[0].op.startswith("call_")
