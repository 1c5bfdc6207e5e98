"""PyTorch's layers, added to a graph with the tensors of a file; functions where a weight depends on the inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.fx import Node
from torch.nn import functional

from nni_topo.network.io.importing.building import Building, Constant


def convolution(
    b: Building, x: Any, weight: Any, bias: Any, *, stride: Any, padding: Any, dilation: Any, groups: int,
    transposed: bool = False, output_padding: Any = 0,
) -> Any:  # fmt: skip
    """Add a convolution: a layer, or a function if its weight depends on the inputs."""
    dims = len(b.shape(weight)) - 2

    def each_dim(value: Any) -> Any:
        return value if isinstance(value, (int, str)) else tuple(value) if len(value) == dims else tuple(value) * dims

    knobs = {"stride": each_dim(stride), "padding": each_dim(padding), "dilation": each_dim(dilation), "groups": groups}
    if transposed:
        knobs["output_padding"] = each_dim(output_padding)
    if not isinstance(x, Node) or not isinstance(weight, Constant) or not isinstance(bias, (Constant, type(None))):
        function: Any = getattr(functional, f"conv{'_transpose' * transposed}{dims}d")
        return b.call(function, x, weight, bias, **knobs)
    kind = getattr(nn, f"Conv{'Transpose' * transposed}{dims}d")
    first, second, *kernel = weight.tensor.shape
    entering, leaving = (first, second * groups) if transposed else (second * groups, first)
    return b.layer(
        lambda: kind(entering, leaving, tuple(kernel), bias=bias is not None, **knobs), [x], weight=weight, bias=bias
    )


def linear(b: Building, x: Any, weight: Any, bias: Any) -> Any:
    """Add a linear layer: a module, or a function if its weight depends on the inputs."""
    if not isinstance(x, Node) or not isinstance(weight, Constant) or not isinstance(bias, (Constant, type(None))):
        return b.call(functional.linear, x, weight, bias)
    leaving, entering = weight.tensor.shape
    return b.layer(lambda: nn.Linear(entering, leaving, bias=bias is not None), [x], weight=weight, bias=bias)


def matmul(b: Building, x: Any, matrix: Any) -> Any:
    """Add a matrix product: a linear layer if the second matrix is constant."""
    if isinstance(x, Node) and isinstance(matrix, Constant) and matrix.tensor.dim() == 2 and matrix.trains:
        return linear(b, x, transposed(matrix), None)
    return b.call(torch.matmul, x, matrix)


def transposed(matrix: Constant) -> Constant:
    """Return the transpose of a matrix; twice gives the matrix itself."""
    if matrix.transposed is None:
        other = Constant(matrix.tensor.t(), matrix.name, trains=matrix.trains, transposed=matrix)
        matrix.transposed = other
    result: Constant = matrix.transposed
    return result


def batch_norm(b: Building, x: Any, weight: Any, bias: Any, mean: Any, variance: Any, eps: float) -> Any:
    """Add a batch norm in evaluation mode."""
    if mean is None or not all(isinstance(each, (Constant, type(None))) for each in (weight, bias, mean, variance)):
        return b.call(functional.batch_norm, x, mean, variance, weight, bias, training=mean is None, eps=eps)
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(b.shape(x))]
    width = len(mean.tensor)
    if (weight is None) != (bias is None):
        ones = torch.ones_like(mean.tensor)
        weight = weight or Constant(ones, trains=True)
        bias = bias or Constant(torch.zeros_like(ones), trains=True)
    return b.layer(
        lambda: kind(width, eps=eps, affine=weight is not None), [x], weight=weight, bias=bias, running_mean=mean,
        running_var=variance,
    )  # fmt: skip


def layer_norm(b: Building, x: Any, shape: Any, weight: Any, bias: Any, eps: float) -> Any:
    """Add a norm over the last dimensions."""
    sizes = tuple(b.values(list(shape), 0))
    return b.layer(
        lambda: nn.LayerNorm(sizes, eps=eps, elementwise_affine=weight is not None, bias=bias is not None), [x],
        weight=weight, bias=bias,
    )  # fmt: skip


def group_norm(b: Building, x: Any, groups: int, weight: Any, bias: Any, eps: float) -> Any:
    """Add a group norm."""
    width = b.shape(x)[1]
    return b.layer(
        lambda: nn.GroupNorm(groups, width, eps=eps, affine=weight is not None), [x], weight=weight, bias=bias
    )


def instance_norm(b: Building, x: Any, weight: Any, bias: Any, eps: float) -> Any:
    """Add an instance norm that takes its statistics from the sample."""
    shape = b.shape(x)
    kind = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}[len(shape)]
    return b.layer(lambda: kind(shape[1], eps=eps, affine=weight is not None), [x], weight=weight, bias=bias)


def embedding(b: Building, weight: Any, indices: Any) -> Any:
    """Add an embedding."""
    if not isinstance(weight, Constant) or not isinstance(indices, Node):
        return b.call(functional.embedding, indices, weight)
    rows, width = weight.tensor.shape
    return b.layer(lambda: nn.Embedding(rows, width), [indices], weight=weight)


def prelu(b: Building, x: Any, weight: Any) -> Any:
    """Add a PReLU."""
    if not isinstance(weight, Constant):
        return b.call(functional.prelu, x, weight)
    flat = weight if weight.tensor.dim() == 1 else Constant(weight.tensor.flatten(), weight.name, trains=weight.trains)
    return b.layer(lambda: nn.PReLU(len(flat.tensor)), [x], weight=flat)


def recurrent(
    b: Building, kind: str, x: Any, states: list[Any], units: int, tensors: dict[str, Constant], **knobs: Any
) -> tuple[Any, ...]:
    """Add a recurrent layer; return its outputs and its last states. Initial states of zeros are left out."""
    entering = b.shape(x)[-1]
    inputs = [x]
    if not all(not b.values(state, call).any() for state in states for call in range(b.calls)) or any(
        b.depends_on_inputs(state) for state in states
    ):
        inputs.append(tuple(states) if kind == "LSTM" else states[0])
    layer = b.layer(lambda: getattr(nn, kind)(entering, units, **knobs), inputs, **tensors)
    outputs, last = b.parts(layer)
    return (outputs, *b.parts(last)) if kind == "LSTM" else (outputs, last)
