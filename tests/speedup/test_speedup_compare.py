from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from nni_topo.speedup.compare import _difference, check_equal


@pytest.mark.parametrize(
    ("expected", "actual", "difference"),
    [
        ([], [], 0.0),
        ([4.0, -8.0], [4.0, -6.0], 0.25),
        ([0.0, 0.0], [0.0, 0.5], 0.5),
        ([math.nan, 2.0], [math.nan, 1.0], 0.5),
        ([math.nan, math.nan], [math.nan, math.nan], 0.0),
        ([math.nan, 1.0], [0.0, 1.0], math.inf),
    ],
)
def test_differences_are_relative_to_the_largest_finite_value(expected, actual, difference):
    assert _difference(torch.tensor(expected), torch.tensor(actual)) == difference


def test_models_are_compared_in_double_precision():
    seen = []

    class Noting(nn.Linear):
        def forward(self, x):
            seen.append(x.dtype)
            return super().forward(x)

    model = Noting(3, 2)
    check_equal(model, model, ((torch.ones(2, 3),), {}), {}, 1e-12)
    assert seen == [torch.float64, torch.float64]
