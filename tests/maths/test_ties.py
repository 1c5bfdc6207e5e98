from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nni_topo.maths.ties import Levels, descending, first_largest, first_smallest, leveled, within


def a_few_ulps(values, seed, most=8):
    """Move every value by up to so many of its last bits."""
    steps = np.random.default_rng(seed).integers(-most, most + 1, np.shape(values))
    values = np.asarray(values, dtype=np.float64)
    return values + steps * np.where(values == 0.0, 0.0, np.spacing(np.abs(values)))


few = st.lists(st.integers(-6, 6).map(float), min_size=1, max_size=30)


@given(few, st.integers(0, 1000))
def test_rounding_changes_no_choice(values, seed):
    moved = a_few_ulps(values, seed)
    assert first_largest(moved) == int(np.argmax(values))
    assert first_smallest(moved) == int(np.argmin(values))
    np.testing.assert_array_equal(descending(moved), np.argsort(-np.array(values), kind="stable"))


@given(few, st.integers(0, 1000))
def test_leveled_values_are_equal_where_they_were_and_nearly_what_they_were(values, seed):
    moved = a_few_ulps(values, seed)
    level = leveled(moved)
    np.testing.assert_array_equal(np.equal.outer(level, level), np.equal.outer(values, values))
    np.testing.assert_allclose(level, values, rtol=1e-14)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30))
def test_any_values_move_by_no_more_than_the_tolerance(values):
    level = leveled(values)
    assert (level >= values).all()
    assert (level - values <= 1e-6 * np.abs(level) + 1e-12 * np.abs(values).max()).all()
    assert level.max() == max(values)


def test_values_that_differ_stay_as_they_are_and_in_order():
    values = np.random.default_rng(0).normal(size=500)
    np.testing.assert_array_equal(leveled(values), values)
    np.testing.assert_array_equal(descending(values), np.argsort(-values))


def test_a_chain_of_near_values_is_cut_at_the_tolerance():
    chain = 1.0 + 4e-7 * np.arange(6)
    assert leveled(chain).tolist() == [chain[2]] * 3 + [chain[5]] * 3


def test_small_values_keep_their_order_unless_they_are_rounding():
    assert descending([1.0, 1e-9, 2e-9]).tolist() == [0, 2, 1]
    assert descending([1.0, 1e-13, 2e-13]).tolist() == [0, 1, 2]
    assert first_largest([1e-13, 2e-13]) == 1
    assert first_largest([1e-13, 2e-13], scale=1.0) == 0


def test_rows_have_an_order_of_their_own():
    values = np.array([[1.0, 1.0 + 1e-15, 2.0], [3.0, 0.0, 3.0 + 1e-15]])
    assert descending(values).tolist() == [[2, 0, 1], [0, 2, 1]]
    assert leveled(np.empty((0, 3))).shape == (0, 3)
    assert leveled([]).shape == (0,)


def test_nothing_is_chosen_before_a_finite_value():
    assert first_largest([-np.inf, -3.0, -np.inf]) == 1


@pytest.mark.parametrize(("value", "equal"), [(0.5, True), (0.5 - 1e-13, True), (0.5 + 1e-9, False)])
def test_values_at_a_bound(value, equal):
    assert bool(within([value], 0.5)[0]) is equal


def test_levels_remember_what_came_before():
    levels = Levels()
    assert levels([3.0, 1.0]) == [3.0, 1.0]
    assert levels([1.0 + 1e-14, 3.0 - 1e-14, 2.0, 0.0]) == [1.0, 3.0, 2.0, 0.0]
