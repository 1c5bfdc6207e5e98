from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from bench_modules import BENCHMARKS, imported
from scipy.spatial.distance import cdist

from nni_topo.errors import DataError

with imported(BENCHMARKS / "topology", "metric_magnitude") as _module:
    magnitude_subset, metric_magnitude = _module.magnitude_subset, _module.metric_magnitude


def cloud(seed=0, points=9):
    place = np.random.default_rng(seed).normal(size=(points, 3))
    distances = cdist(place, place)
    return np.maximum(distances, distances.T)


@pytest.mark.parametrize("scale", [0.1, 1.0, 7.0])
def test_points_at_equal_distances_have_the_known_magnitude(scale):
    distances = 0.8 * (1.0 - np.eye(5))
    assert metric_magnitude(distances, scale) == pytest.approx(5 / (1 + 4 * np.exp(-0.8 * scale)), rel=1e-12)


def test_points_on_a_line_have_the_known_magnitude():
    # Leinster 2013, corollary 2.3.4: one and the sum of tanh of half the gaps
    line = np.array([0.0, 0.3, 1.1, 4.0])
    distances = abs(np.subtract.outer(line, line))
    assert metric_magnitude(distances) == pytest.approx(1.0 + np.tanh(np.diff(line) / 2.0).sum(), rel=1e-12)


def test_it_runs_from_one_to_the_number_of_points_and_grows_with_the_scale():
    distances = cloud()
    values = [metric_magnitude(distances, scale) for scale in (1e-6, 0.1, 1.0, 10.0, 1e3)]
    assert values == sorted(values)
    assert values[0] == pytest.approx(1.0, abs=1e-4)
    assert values[-1] == pytest.approx(9.0, abs=1e-9)


def test_points_on_one_place_count_as_one():
    distances = cloud()
    twice = np.ix_([0, 1, 2, 2, 3, 3, 3], [0, 1, 2, 2, 3, 3, 3])
    assert metric_magnitude(distances[twice]) == pytest.approx(metric_magnitude(distances[:4, :4]), rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_each_removal_costs_the_least(seed):
    distances = cloud(seed)
    kept = np.arange(9)
    for keep in range(8, 0, -1):
        values = {}
        for subset in combinations(kept.tolist(), keep):
            values[subset] = metric_magnitude(distances[np.ix_(subset, subset)])
        kept = magnitude_subset(distances, keep)
        assert values[tuple(kept.tolist())] == pytest.approx(max(values.values()), rel=1e-9)


def test_copies_go_before_other_points():
    line = np.array([0.0, 1.0, 1.0, 1.0, 1.1, 0.0])
    distances = abs(np.subtract.outer(line, line))
    assert magnitude_subset(distances, 5).tolist() == [0, 1, 2, 3, 4]
    assert magnitude_subset(distances, 3).tolist() == [0, 1, 4]
    assert magnitude_subset(distances, 2).tolist() == [0, 4]
    assert magnitude_subset(distances, 6).tolist() == list(range(6))


def test_the_base_stays():
    distances = cloud(2)
    for base in range(9):
        for keep in (1, 4, 8):
            kept = magnitude_subset(distances, keep, base=base)
            assert base in kept
            assert len(set(kept.tolist())) == keep
    line = np.array([0.0, 5.0, 5.0, 5.0, 9.0])
    distances = abs(np.subtract.outer(line, line))
    assert magnitude_subset(distances, 3, base=2).tolist() == [0, 2, 4]
    assert magnitude_subset(distances, 4, base=3).tolist() == [0, 1, 3, 4]
    free = magnitude_subset(cloud(3), 4)
    assert magnitude_subset(cloud(3), 4, base=int(free[0])).tolist() == free.tolist()
    with pytest.raises(DataError, match=r"base must be a point's index in \[0, 5\), got 5"):
        magnitude_subset(distances, 3, base=5)
