"""The one comparison of two runs: how far apart their results are, and how far apart those of equals may be."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

# How far apart results may be that ought to be equal, relative to the largest value: by what was computed, since
# rounding adds up over layers.
#
# A channel that is missing or wrong changes some per cent of a result at least. In single precision rounding stays
# below 1e-5 of it even in networks of some hundred layers, and in double precision below 1e-12. Half-precision networks
# are held to the same: where their rounding is larger, two of them count as different, and nothing is cut.
SAME_CHANNELS = 1e-3
# Of two programs that compute the same network: a graph and its model, a file and the network that was written to it.
# `same_program` is the bound for half precision, too.
SAME_PROGRAM = 1e-4
_EPSILONS = 8  # machine epsilons by which programs in half precision may differ: their operations come in another order
# Of one layer, computed in two ways: sums in another order are off by a few units in the last place.
SAME_LAYER = {
    dtype: 64 * torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}


def same_program(tensors: Iterable[torch.Tensor]) -> float:
    """Return how far two programs may be apart that compute with such tensors, the coarsest of which decides."""
    epsilons = [torch.finfo(each.dtype).eps for each in tensors if each.is_floating_point()]
    return max([SAME_PROGRAM, *(_EPSILONS * each for each in epsilons)])


def agree(expected: Sequence[torch.Tensor], actual: Sequence[torch.Tensor], tolerance: float) -> bool:
    """Tell whether two runs gave equally many tensors of the same shapes, each equal to a tolerance as `difference` is.

    NaN and infinite values agree with the same, and with nothing else.
    """
    if [each.shape for each in expected] != [each.shape for each in actual]:
        return False
    return all(difference(wanted, given) <= tolerance for wanted, given in zip(expected, actual, strict=True))


def difference(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """Measure the largest difference relative to the largest absolute value; NaN against a number is infinite."""
    if expected.numel() == 0:
        return 0.0
    if expected.is_complex() or actual.is_complex():
        expected, actual = (torch.view_as_real(each.to(torch.complex128).resolve_conj()) for each in (expected, actual))
    # The usual case in two passes; where it fails, NaN and infinite values are told apart.
    if expected.dtype == actual.dtype and expected.dtype in (torch.float32, torch.float64):
        bounds = [float(end) for each in (expected - actual, expected) for end in each.aminmax()]
        if all(map(math.isfinite, bounds)):
            gap, scale = (max(map(abs, ends)) for ends in (bounds[:2], bounds[2:]))  # zero is never negative
            return gap / scale if scale else gap
    expected, actual = expected.double(), actual.double()
    alike = (expected == actual) | (expected.isnan() & actual.isnan())
    gaps = (expected - actual).abs().nan_to_num(nan=torch.inf, posinf=torch.inf).masked_fill(alike, 0)
    scale = float(expected[expected.isfinite()].abs().amax()) if bool(expected.isfinite().any()) else 0.0
    largest = float(gaps.max())
    return largest / scale if scale else largest
