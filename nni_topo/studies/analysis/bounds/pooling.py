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

_ADAPTIVE = (pooling._AdaptiveMaxPoolNd, pooling._AdaptiveAvgPoolNd)
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
    weights = torch.zeros(leaving, entering, dtype=torch.float64)
    for window in range(leaving):
        places, size = _window(pool, axis, window, entering, leaving)
        weights[window, places] = 1.0 / size if isinstance(pool, _AVERAGES) else 1.0
    return weights


def _window(pool: Any, axis: int, window: int, entering: int, leaving: int) -> tuple[list[int], int]:
    """Return a window's positions and the divisor of its sum."""
    if isinstance(pool, _ADAPTIVE):
        begin, end = window * entering // leaving, -(-(window + 1) * entering // leaving)
        return list(range(begin, end)), end - begin
    kernel, padding = _on_axis(pool.kernel_size, axis), _on_axis(pool.padding, axis)
    spacing = _on_axis(getattr(pool, "dilation", 1), axis)
    begin = window * _on_axis(pool.stride or pool.kernel_size, axis) - padding
    places = [place for place in range(begin, begin + kernel * spacing, spacing) if 0 <= place < entering]
    if getattr(pool, "divisor_override", None):
        return places, 1
    # With ceil_mode the last window may exceed the padding; its divisor counts only positions inside.
    padded = getattr(pool, "count_include_pad", True)
    return places, min(begin + kernel, entering + padding) - begin if padded else len(places)


def _on_axis(value: int | Sequence[int], axis: int) -> int:
    return value if isinstance(value, int) else value[axis]
