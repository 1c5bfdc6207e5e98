"""Comparison of the results of two runs, and tolerances for the results of equal networks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

# Largest difference, relative to the largest value, between results that should be equal. It depends on what was
# computed, because rounding adds up over layers.
#
# A missing or wrong channel changes a result by at least some per cent. Rounding stays below 1e-5 in single precision,
# even in networks of some hundred layers, and below 1e-12 in double precision. Half-precision networks have the same
# tolerance: if their rounding is larger, equal networks count as different, and nothing is cut.
SAME_CHANNELS = 1e-3
# For two programs of the same network: a graph and its model, or an exported file and its network. `same_program` is
# the tolerance for half precision, too.
SAME_PROGRAM = 1e-4
_EPSILONS = 8  # machine epsilons by which half-precision programs may differ, because the order of operations differs
# For one layer, computed in two ways: sums in another order differ by a few units in the last place.
SAME_LAYER = {
    dtype: 64 * torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}


def same_program(tensors: Iterable[torch.Tensor]) -> float:
    """Return the tolerance for two programs that compute with these tensors; the coarsest type decides."""
    epsilons = [torch.finfo(tensor.dtype).eps for tensor in tensors if tensor.is_floating_point()]
    return max([SAME_PROGRAM, *(_EPSILONS * epsilon for epsilon in epsilons)])


def agree(expected: Sequence[torch.Tensor], actual: Sequence[torch.Tensor], tolerance: float) -> bool:
    """Tell whether two runs returned tensors of the same shapes, each with a `difference` within a tolerance.

    NaN and infinite values agree only with the same value.
    """
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in actual]:
        return False
    return all(
        difference(expected_tensor, actual_tensor) <= tolerance
        for expected_tensor, actual_tensor in zip(expected, actual, strict=True)
    )


def difference(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """Return the largest difference relative to the largest expected value; NaN against a number is infinite."""
    if expected.layout != torch.strided:
        expected, actual = expected.to_dense(), actual.to_dense()
    if expected.numel() == 0:
        return 0.0
    if expected.is_complex() or actual.is_complex():
        expected, actual = (
            torch.view_as_real(tensor.to(torch.complex128).resolve_conj()) for tensor in (expected, actual)
        )
    # The usual case takes two passes; NaN and infinite values need the code below.
    if expected.dtype == actual.dtype and expected.dtype in (torch.float32, torch.float64):
        bounds = [float(end) for tensor in (expected - actual, expected) for end in tensor.aminmax()]
        if all(map(math.isfinite, bounds)):
            gap, scale = (max(map(abs, ends)) for ends in (bounds[:2], bounds[2:]))  # zero is never negative
            if scale:
                return gap / scale
            return gap
    expected, actual = expected.double(), actual.double()
    alike = (expected == actual) | (expected.isnan() & actual.isnan())
    gaps = (expected - actual).abs().nan_to_num(nan=torch.inf, posinf=torch.inf).masked_fill(alike, 0)
    scale = float(expected[expected.isfinite()].abs().amax()) if bool(expected.isfinite().any()) else 0.0
    largest = float(gaps.max())
    if scale:
        return largest / scale
    return largest
