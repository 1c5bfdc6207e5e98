from __future__ import annotations

import numpy as np
import pytest
import torch
from bench_modules import BENCHMARKS, imported
from scipy.spatial.distance import cdist

from nni_topo.errors import DataError
from nni_topo.topology import h0_deaths

with imported(BENCHMARKS / "topology", "rtd") as _module:
    rtd_lite, rtd_lite_loss = _module.rtd_lite, _module.rtd_lite_loss


def clouds(seed, points=12):
    generator = np.random.default_rng(seed)
    first = generator.normal(size=(points, 3))
    second = first[:, :2] + 0.7 * generator.normal(size=(points, 2))
    return cdist(first, first), cdist(second, second)


def symmetric(distances):
    """cdist's two halves may differ in the last bit."""
    return np.maximum(distances, distances.T)


@pytest.mark.parametrize("seed", range(4))
def test_it_is_the_difference_of_spanning_trees(seed):
    first, second = map(symmetric, clouds(seed, 40))
    lengths = [h0_deaths(matrix).sum() for matrix in (first, second, np.minimum(first, second))]
    found = rtd_lite(first, second, normalise=False)
    assert found == pytest.approx((lengths[0] + lengths[1]) / 2 - lengths[2], rel=1e-12)
    assert rtd_lite(second, first, normalise=False) == pytest.approx(found, rel=1e-12)


def test_units_and_the_order_of_points_do_not_matter():
    first, second = map(symmetric, clouds(0))
    found = rtd_lite(first, second)
    assert found > 0.1
    assert rtd_lite(100.0 * first, second) == pytest.approx(found, rel=1e-12)
    order = np.random.default_rng(1).permutation(len(first))
    turned = [matrix[np.ix_(order, order)] for matrix in (first, second)]
    assert rtd_lite(*turned) == pytest.approx(found, rel=1e-12)
    unit = np.quantile(first[np.triu_indices(len(first), 1)], 0.9)
    other = np.quantile(second[np.triu_indices(len(second), 1)], 0.9)
    assert rtd_lite(first / unit, second / other, normalise=False) == pytest.approx(found, rel=1e-12)


def test_equal_clouds_have_no_difference_and_points_may_lie_on_one_place():
    first = symmetric(clouds(2)[0])
    assert rtd_lite(first, first) == 0.0
    assert rtd_lite([[0.0]], [[0.0]]) == 0.0
    # the first three points are one in the first cloud, the last three in the second
    apart = abs(np.subtract.outer([0, 0, 0, 4, 6], [0, 0, 0, 4, 6])).astype(float)
    other = abs(np.subtract.outer([0, 1, 5, 5, 5], [0, 1, 5, 5, 5])).astype(float)
    assert rtd_lite(apart, other, normalise=False) == 5.5  # trees of 6 and 5, the minimum's of nothing


def test_the_loss_is_the_same_number_and_its_gradient_that_of_small_steps():
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(10, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    second = torch.randn(10, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    loss = rtd_lite_loss(first, second)
    matrices = [symmetric(cdist(points, points)) for points in (first.detach().numpy(), second.detach().numpy())]
    assert loss.item() == pytest.approx(rtd_lite(*matrices), rel=1e-9)
    loss.backward()
    units = [np.quantile(matrix[np.triu_indices(10, 1)], 0.9) for matrix in matrices]
    for points, other, place in ((first, second, 0), (second, first, 1)):
        step = torch.zeros_like(points)
        step[4, 1] = 1e-6
        values = []
        for sign in (1.0, -1.0):
            moved = (points + sign * step).detach().numpy()
            pair = [cdist(moved, moved) / units[place], cdist(other.detach(), other.detach()) / units[1 - place]]
            values.append(rtd_lite(*map(symmetric, pair), normalise=False))
        assert points.grad[4, 1].item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4)


def test_bad_clouds_are_refused():
    first, second = map(symmetric, clouds(3))
    with pytest.raises(DataError, match="both clouds must have the same number of points, got 12 and 11"):
        rtd_lite(first, second[1:, 1:])
    with pytest.raises(DataError, match=r"0.9 quantile of distances must be above 0, got 0.0 \(second\)"):
        rtd_lite(first, np.zeros_like(first))
    with pytest.raises(DataError, match="distances must be finite"):
        rtd_lite(first, np.full_like(first, np.nan))
    points = torch.randn(5, 2)
    with pytest.raises(DataError, match=r"points must have shape \(n, features\) with n >= 2, got \(5,\) \(second\)"):
        rtd_lite_loss(points, points[:, 0])
    with pytest.raises(DataError, match="same number of points, got 5 and 4"):
        rtd_lite_loss(points, points[1:])
    with pytest.raises(DataError, match=r"points must be finite, got NaN or infinity \(first\)"):
        rtd_lite_loss(points / 0.0, points)
