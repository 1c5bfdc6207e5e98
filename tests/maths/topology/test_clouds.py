from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial.distance import cdist
from topology_clouds import make_cloud

from nni_topo.errors import DataError
from nni_topo.topology import (
    pairwise_distances,
    projected_features,
    projection_error,
    random_projection,
    with_origin,
)

clouds = arrays(
    np.float64,
    st.tuples(st.integers(1, 8), st.integers(1, 5)),
    elements=st.floats(-1e6, 1e6, allow_subnormal=False).map(lambda x: 0.0 if abs(x) < 1e-100 else x),
)


def assert_within_stated_error(points: np.ndarray) -> None:
    np.testing.assert_allclose(pairwise_distances(points), cdist(points, points), rtol=1e-9, atol=0)


@pytest.mark.parametrize("seed", range(20))
def test_equals_direct_differences(seed):
    assert_within_stated_error(make_cloud(seed))


@given(clouds)
@settings(max_examples=100, deadline=None)
def test_stated_error_on_any_cloud(points):
    assert_within_stated_error(points)


@pytest.mark.parametrize("gap", [1e-3, 1e-6, 1e-9, 1e-12])
def test_near_duplicates_keep_their_distance(gap):
    rng = np.random.default_rng(0)
    points = rng.normal(size=(40, 300)) + 5.0
    points[1::2] = points[::2] + gap * rng.normal(size=(20, 300))
    assert_within_stated_error(points)


def test_near_duplicates_beside_an_outlier_and_across_blocks():
    rng = np.random.default_rng(1)
    points = rng.normal(size=(600, 3))
    points[0] = 1e7
    points[599] = points[1] + 1e-10
    assert_within_stated_error(points)


def test_identical_rows_are_at_exactly_zero_and_the_matrix_is_symmetric():
    points = np.random.default_rng(2).normal(size=(300, 7)).astype(np.float32)
    points[150:] = points[:150]
    distances = pairwise_distances(points)
    assert (distances[np.arange(150), np.arange(150, 300)] == 0).all()
    assert (distances.diagonal() == 0).all()
    assert (distances == distances.T).all()


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_extreme_scales_neither_vanish_nor_overflow(scale):
    points = np.array([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]])
    np.testing.assert_allclose(pairwise_distances(scale * points) / scale, pairwise_distances(points), rtol=1e-12)


def test_one_point_and_all_zero_points():
    np.testing.assert_array_equal(pairwise_distances([[3.0, 1.0]]), [[0.0]])
    np.testing.assert_array_equal(pairwise_distances(np.zeros((3, 2))), np.zeros((3, 3)))


def test_origin_comes_last_and_its_distances_are_norms():
    points = np.random.default_rng(3).normal(size=(5, 4))
    cloud = with_origin(points)
    np.testing.assert_array_equal(cloud[:5], points)
    np.testing.assert_allclose(pairwise_distances(cloud)[5, :5], np.linalg.norm(points, axis=1), rtol=1e-12)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([[0.0, np.nan]], r"finite, got nan at index \(0, 1\)"),
        ([[np.inf], [0.0]], "finite, got inf"),
        (np.empty((0, 3)), r"got shape \(0, 3\)"),
        (np.empty((3, 0)), r"got shape \(3, 0\)"),
        ([1.0, 2.0], r"got shape \(2,\)"),
        ([["a"]], "real numbers"),
    ],
)
def test_malformed_points_are_refused(points, message):
    with pytest.raises(DataError, match=message):
        pairwise_distances(points)
    with pytest.raises(DataError, match=message):
        with_origin(points)


@pytest.mark.parametrize(
    ("points", "features", "kept"),
    [(40, 2000, 100), (15, 300, 20), pytest.param(120, 5000, 400, marks=pytest.mark.slow)],
)
def test_distances_stay_within_the_stated_error(points, features, kept):
    stated = projection_error(points, kept)
    upper = np.triu_indices(points, 1)
    found = []
    for seed in range(20):
        cloud = np.random.default_rng(seed).normal(size=(points, features)) ** 3
        projected = random_projection(np.array_split(cloud, 3, axis=1), kept, seed)
        ratios = pairwise_distances(projected)[upper] / pairwise_distances(cloud)[upper]
        found.append(np.abs(ratios - 1).max())
    assert max(found) <= stated
    assert max(found) > 0.5 * stated  # the bound isn't an empty one


def test_a_chance_to_miss_is_met_as_often_as_stated():
    # Two points: one distance, so that the bound is exact.
    stated = projection_error(2, 10, failure=0.2)
    cloud = np.random.default_rng(0).normal(size=(2, 50))
    length = np.linalg.norm(cloud[0] - cloud[1])
    projected = [random_projection([cloud], 10, seed) for seed in range(2000)]
    missed = [abs(np.linalg.norm(x[0] - x[1]) / length - 1) > stated for x in projected]
    assert np.mean(missed) == pytest.approx(0.2, abs=0.03)


@pytest.mark.parametrize(
    ("points", "error", "failure"),
    [(points, error, 1e-3) for points in (2, 64, 4096) for error in (0.05, 0.1, 0.3, 0.9)]
    + [(2, 0.9, 0.9), (2, 0.9, 0.7), (2, 0.9, 0.5), (2, 0.5, 0.5)],
)
def test_features_and_error_belong_together(points, error, failure):
    features = projected_features(points, error, failure=failure)
    assert projection_error(points, features, failure=failure) <= error
    assert features == 1 or projection_error(points, features - 1, failure=failure) > error


def test_more_points_need_more_features_and_more_features_err_less():
    assert projected_features(10, 0.2) < projected_features(1000, 0.2)
    assert projection_error(100, 50) > projection_error(100, 500)
    assert projection_error(1, 1) == pytest.approx(0.0, abs=1e-12)


def test_a_cloud_may_be_projected_onto_one_feature():
    cloud = np.random.default_rng(0).normal(size=(50, 300))
    projected = random_projection([cloud[:, :100], cloud[:, 100:]], 1, seed=1)
    assert projected.shape == (50, 1)
    # the squares of single distances vary much, their mean less
    ratio = np.square(projected[:25] - projected[25:].T).mean() / np.square(cdist(cloud[:25], cloud[25:])).mean()
    assert 0.3 < ratio < 3.0


def test_duplicates_and_the_origin_stay_exact():
    cloud = np.zeros((3, 500))
    cloud[1:] = np.random.default_rng(0).normal(size=500)
    projected = random_projection([cloud], 20, seed=1)
    assert not projected[0].any()
    assert np.array_equal(projected[1], projected[2])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: projection_error(0, 5), "at least one point, got 0"),
        (lambda: projection_error(5, 0), "at least one feature, got 0"),
        (lambda: projection_error(5, 5, failure=1.0), r"in \(0, 1\), got 1.0"),
        (lambda: projected_features(5, 1.0), r"in \(0, 1\), got 1.0"),
        (lambda: projected_features(5, 0.0), r"in \(0, 1\), got 0.0"),
        (lambda: random_projection([], 5, 0), "at least one chunk"),
        (lambda: random_projection([np.ones((2, 2))], 0, 0), "at least one feature"),
    ],
)
def test_bad_numbers_are_refused(call, words):
    with pytest.raises(DataError, match=words):
        call()


def test_equal_points_are_found_also_where_others_begin_alike():
    cloud = np.random.default_rng(0).normal(size=(9, 301))
    cloud[3:] = cloud[2]
    cloud[5, 200] += 1.0
    cloud[6, 4], cloud[7, 4] = 0.0, -0.0
    projected = random_projection([cloud[:, :150], cloud[:, 150:]], 17, seed=1)
    for twins in ([2, 3, 4, 8], [6, 7]):
        assert len(np.unique(projected[twins], axis=0)) == 1
    assert len(np.unique(projected, axis=0)) == 5
    draws = np.random.default_rng(1)
    matrix = np.concatenate([draws.standard_normal((150, 17)), draws.standard_normal((151, 17))])
    np.testing.assert_allclose(projected, cloud @ matrix / np.sqrt(17), atol=1e-12)
