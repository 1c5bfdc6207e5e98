"""How far two results are apart."""

from __future__ import annotations

import math

import torch


def difference(expected: torch.Tensor, actual: torch.Tensor, *, if_finite: bool = False) -> float:
    """Measure the largest difference relative to the largest absolute value; NaN against a number is infinite.

    ``if_finite``: zero where any of what is expected isn't.
    """
    if expected.numel() == 0:
        return 0.0
    # The usual case in two passes; where it fails, NaN and infinite values are told apart.
    if expected.dtype == actual.dtype and expected.dtype in (torch.float32, torch.float64):
        bounds = [float(end) for each in (expected - actual, expected) for end in each.aminmax()]
        if all(map(math.isfinite, bounds)):
            gap, scale = max(-bounds[0], bounds[1]), max(-bounds[2], bounds[3])
            return gap / scale if scale else gap
    if if_finite and not bool(expected.isfinite().all()):
        return 0.0
    expected, actual = expected.double(), actual.double()
    alike = (expected == actual) | (expected.isnan() & actual.isnan())
    gaps = (expected - actual).abs().nan_to_num(nan=torch.inf, posinf=torch.inf).masked_fill(alike, 0)
    scale = float(expected[expected.isfinite()].abs().amax()) if bool(expected.isfinite().any()) else 0.0
    largest = float(gaps.max())
    return largest / scale if scale else largest
