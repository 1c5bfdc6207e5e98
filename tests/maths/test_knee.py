from __future__ import annotations

import math

import pytest

from nni_topo.maths.knee import knee


def test_the_knee_is_farthest_below_the_line_between_the_ends():
    # The line falls from 1 to 0; the points lie 0, 0.4, 0.25 and 0 below it.
    assert knee([0.0, 0.5, 0.75, 1.0], [1.0, 0.1, 0.0, 0.0]) == 1
    assert knee([1.0, 0.75, 0.5, 0.0], [0.0, 0.0, 0.1, 1.0]) == 2
    # Scales don't matter.
    assert knee([10, 510, 760, 1010], [7.0, 6.1, 6.0, 6.0]) == 1


@pytest.mark.parametrize(
    ("costs", "losses"),
    [
        ([0.0, 0.5, 1.0], [1.0, 0.5, 0.0]),  # a straight line
        ([0.0, 0.5, 1.0], [1.0, 0.9, 0.0]),  # above it
        ([0.0, 0.5, 1.0], [0.2, 0.2, 0.2]),
        ([0.5, 0.5, 0.5], [0.3, 0.2, 0.1]),
        ([0.0, 1.0], [1.0, 0.0]),
        ([], []),
        ([10.0, 510.0, 1010.0], [0.0, 0.5, 1.0]),  # a straight line that rises and doesn't begin at 0
        ([0.0, 0.5, 1.0], [math.nan, 0.1, 0.0]),
    ],
)
def test_a_curve_without_a_knee_has_none(costs, losses):
    assert knee(costs, losses) is None
