"""Lipschitz constants of pooling layers, from the entries in their windows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn import functional
from torch.nn.modules import pooling

_AVERAGES = (pooling._AvgPoolNd, pooling._AdaptiveAvgPoolNd)
_POOLINGS = (pooling._MaxPoolNd, pooling._AdaptiveMaxPoolNd, *_AVERAGES)

_MAXIMUM_KNOBS = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_AVERAGE_KNOBS = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
_FUNCTIONS: dict[Any, tuple[type[nn.Module], tuple[str, ...]]] = {
    getattr(functional, f"{function}{sides}d"): (getattr(nn, f"{module}{sides}d"), knobs)
    for function, module, knobs in (
        ("max_pool", "MaxPool", _MAXIMUM_KNOBS),
        ("avg_pool", "AvgPool", _AVERAGE_KNOBS),
        ("adaptive_max_pool", "AdaptiveMaxPool", ("output_size", "return_indices")),
        ("adaptive_avg_pool", "AdaptiveAvgPool", ("output_size",)),
    )
    for sides in (1, 2, 3)
}


def pooling_of(module: nn.Module | None, node: Node) -> nn.Module | None:
    """Return the pooling module of a node, for a function the module of equal settings; None if it doesn't pool."""
    if module is not None:
        return module if isinstance(module, _POOLINGS) else None
    if node.op != "call_function" or node.target not in _FUNCTIONS:
        return None
    kind, knobs = _FUNCTIONS[node.target]
    given: dict[str, Any] = dict(zip(knobs, node.args[1:], strict=False))
    return kind(**given, **{knob: value for knob, value in node.kwargs.items() if knob != "input"})


def pooling_constant(pool: Any, entering: Sequence[int], leaving: Sequence[int]) -> float:
    """Return a pooling's Lipschitz constant in the Euclidean norm, from the images' sides before and after it."""
    sides = [
        _windows(pool, axis, before, after) for axis, (before, after) in enumerate(zip(entering, leaving, strict=True))
    ]
    if isinstance(pool, _AVERAGES):
        # An average is the Kronecker product of the averages along the sides; their norms multiply.
        norms = math.prod(float(torch.linalg.matrix_norm(side, 2)) for side in sides)
        return norms / (getattr(pool, "divisor_override", None) or 1)
    # No output changes by more than the entries in its window; an entry counts once per window that contains it.
    return math.sqrt(math.prod(float(side.sum(0).max()) for side in sides))


def _windows(pool: Any, axis: int, entering: int, leaving: int) -> Tensor:
    """Return the weight of each position of one side in each window, shape (leaving, entering), float64."""
    ones = torch.eye(entering, dtype=torch.float64).unsqueeze(1)  # an image for each position, with a one there alone
    if isinstance(pool, pooling._AdaptiveAvgPoolNd):
        pooled = functional.adaptive_avg_pool1d(ones, leaving)
    elif isinstance(pool, pooling._AdaptiveMaxPoolNd):
        pooled = functional.adaptive_max_pool1d(ones, leaving)
    else:
        names = ("kernel_size", "stride", "padding", "dilation")
        knobs = {name: getattr(pool, name) for name in names if getattr(pool, name, None) is not None}
        knobs = {name: value if isinstance(value, int) else value[axis] for name, value in knobs.items()}
        knobs["ceil_mode"] = pool.ceil_mode
        if isinstance(pool, pooling._AvgPoolNd) and not getattr(pool, "divisor_override", None):
            pooled = functional.avg_pool1d(ones, **knobs, count_include_pad=pool.count_include_pad)
        else:  # 1 for each position in a window
            pooled = functional.max_pool1d(ones, **knobs)
    return pooled.squeeze(1).T
