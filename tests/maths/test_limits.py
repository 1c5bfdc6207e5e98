from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from nni_topo.maths.limits import limit_of_bounded, limit_of_mean, limit_of_share, observations_needed


@pytest.mark.parametrize(("changed", "count"), [(0, 125), (1, 125), (7, 300), (299, 300), (1, 1)])
def test_the_limit_of_a_share_is_scipys_exact_one(changed, count):
    exact = stats.binomtest(changed, count, alternative="less").proportion_ci(0.95, method="exact").high
    assert limit_of_share(changed / count, count) == pytest.approx(exact, abs=1e-12)


def test_125_images_without_a_change_still_allow_two_point_four_percent():
    assert limit_of_share(0.0, 125) == pytest.approx(0.02368, abs=1e-5)


def test_the_limit_of_bounded_numbers_holds_and_is_the_exact_one_where_all_are_zero():
    assert limit_of_bounded(0.0, 125) == pytest.approx(limit_of_share(0.0, 125), rel=1e-12)
    for mean in (0.004, 0.1, 0.7, 0.999):
        limit = limit_of_bounded(mean, 200)
        # Hoeffding's bound of the chance of so small a mean is the risk, just there.
        divergence = mean * math.log(mean / limit) + (1 - mean) * math.log((1 - mean) / (1 - limit))
        assert math.exp(-200 * divergence) == pytest.approx(0.05, rel=1e-6)
        # No distribution of these means is wider than that of yes and no.
        assert limit > limit_of_share(mean, 200)
    assert limit_of_bounded(1.0, 9) == 1.0


def test_limits_lie_above_the_truth_in_19_of_20_samples():
    generator = np.random.default_rng(0)
    for truth in (0.01, 0.05):
        drawn = generator.binomial(400, truth, 4000) / 400
        missed = np.mean([limit_of_share(share, 400) < truth for share in drawn])
        assert 0.01 < missed <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 4000)
    values = generator.beta(0.05, 0.95, (1000, 300))  # shares of words, of mean 0.05
    assert np.mean([limit_of_bounded(mean, 300) < 0.05 for mean in values.mean(1)]) <= 0.05


def test_the_limit_of_a_mean_is_students():
    values = np.random.default_rng(1).normal(2.0, 0.5, 40)
    limit = limit_of_mean(float(values.mean()), float(values.std(ddof=1)), 40)
    assert limit == pytest.approx(stats.t.interval(0.9, 39, values.mean(), stats.sem(values))[1])
    assert limit_of_mean(1.0, 0.0, 1) == math.inf
    assert limit_of_mean(math.nan, 1.0, 9) == math.inf


@pytest.mark.parametrize(("tolerance", "count"), [(0.01, 299), (0.05, 59), (0.02, 149), (0.005, 598), (0.95, 1)])
def test_so_many_observations_are_needed(tolerance, count):
    assert observations_needed(tolerance) == count
    assert limit_of_share(0.0, count) <= tolerance
    assert count == 1 or limit_of_share(0.0, count - 1) > tolerance


@pytest.mark.parametrize("risk", [0.05, 0.01])
def test_no_fewer_observations_are_enough(risk):
    """Also where the tolerance is the limit of just so many, and rounding decides on which side of it."""
    for count in range(1, 400):
        tolerance = limit_of_share(0.0, count, risk)
        for near in (tolerance, math.nextafter(tolerance, 0.0), math.nextafter(tolerance, 1.0)):
            needed = observations_needed(near, risk)
            assert limit_of_share(0.0, needed, risk) <= near
            assert needed == 1 or limit_of_share(0.0, needed - 1, risk) > near
