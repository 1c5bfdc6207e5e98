from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial.distance import cdist

from nni_topo.errors import DataError
from nni_topo.topology import pairwise_distances, with_origin

clouds = arrays(
    np.float64,
    st.tuples(st.integers(1, 8), st.integers(1, 5)),
    elements=st.floats(-1e6, 1e6, allow_subnormal=False).map(lambda x: 0.0 if abs(x) < 1e-100 else x),
)


def assert_within_stated_error(points: np.ndarray) -> None:
    np.testing.assert_allclose(pairwise_distances(points), cdist(points, points), rtol=1e-9, atol=0)


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
