from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nni_topo.maths.least_squares import greedy
from nni_topo.maths.least_squares.greedy import Products, SampleMatrix, forward_selection


def residual(inputs, targets, channels, block):
    """Squared error of the least-squares prediction from some channels."""
    columns = [channel * block + i for channel in channels for i in range(block)]
    solution = np.linalg.lstsq(inputs[:, columns], targets, rcond=None)[0]
    return float(((targets - inputs[:, columns] @ solution) ** 2).sum())


def chosen(gram, cross, keep, block=1):
    """The channels that one layer's products choose."""
    return forward_selection([Products(gram, cross, block)], keep)[0]


def draw(seed, samples, channels, block, outputs):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(samples, channels * block)), rng.normal(size=(samples, outputs))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), channels=st.integers(2, 7), block=st.integers(1, 3), outputs=st.integers(1, 40))
def test_each_choice_is_the_best_next_one(seed, channels, block, outputs):
    inputs, targets = draw(seed, 30, channels, block, outputs)
    order = chosen(inputs.T @ inputs, inputs.T @ targets, channels, block=block).tolist()
    assert sorted(order) == list(range(channels))
    for step, taken in enumerate(order):
        errors = {
            c: residual(inputs, targets, [*order[:step], c], block) for c in set(range(channels)) - {*order[:step]}
        }
        assert errors[taken] <= min(errors.values()) * (1 + 1e-6) + 1e-9


def test_a_copy_of_a_chosen_channel_comes_last():
    inputs, _ = draw(2, 100, 5, 1, 1)
    inputs[:, 3] = 2.0 * inputs[:, 1]
    targets = inputs @ np.array([[1.0], [5.0], [0.5], [5.0], [2.0]])
    order = chosen(inputs.T @ inputs, inputs.T @ targets, 5).tolist()
    assert order[0] == 1
    assert order[-1] == 3


def test_where_the_targets_are_met_the_others_follow_by_the_gains_they_had():
    inputs, _ = draw(7, 200, 6, 1, 1)
    rest = inputs[:, :4] @ np.diag([0.0, 1e-4, 0.0, 3e-4])
    inputs[:, 4:] = 0.0
    targets = np.hstack([inputs[:, :1], inputs[:, 2:3], rest])
    order, taken = forward_selection([Products(inputs.T @ inputs, inputs.T @ targets, 1)], 6)
    assert set(order[:2].tolist()) == {0, 2}
    # Channel 1 goes into the targets at less than 1e-5 of them, and so behind channel 3, and before what is silent.
    assert order[2:].tolist() == [3, 1, 4, 5]
    assert (taken[2:] <= 1e-5 * taken[:2].sum()).all()


def test_silent_channels_are_chosen_last_and_do_no_harm():
    inputs, targets = draw(3, 100, 4, 1, 2)
    inputs[:, 0] = 0.0
    order = chosen(inputs.T @ inputs, inputs.T @ targets, 4).tolist()
    assert order[-1] == 0


def test_two_readers_count_together():
    first, one = draw(4, 100, 4, 1, 2)
    second, other = draw(5, 100, 4, 1, 2)
    grams, crosses = [first.T @ first, second.T @ second], [first.T @ one, second.T @ other]
    order, _ = forward_selection([Products(*pair, 1) for pair in zip(grams, crosses, strict=True)], 1)
    gains = [sum((c[j] ** 2).sum() / g[j, j] for g, c in zip(grams, crosses, strict=True)) for j in range(4)]
    assert order[0] == int(np.argmax(gains))


def test_readers_may_have_blocks_of_different_sizes():
    given = [draw(4, 100, 4, 1, 2), draw(5, 100, 4, 3, 2)]
    grams, crosses = [x.T @ x for x, _ in given], [x.T @ y for x, y in given]
    order, _ = forward_selection([Products(*layer) for layer in zip(grams, crosses, (1, 3), strict=True)], 1)
    left = [sum(residual(*pair, [j], block) for pair, block in zip(given, (1, 3), strict=True)) for j in range(4)]
    assert order[0] == int(np.argmin(left))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), block=st.integers(1, 4), outputs=st.integers(1, 20), samples=st.integers(2, 12))
def test_few_samples_choose_as_their_products_do(seed, block, outputs, samples):
    inputs, targets = draw(seed, samples, 9, block, outputs)
    few = SampleMatrix(inputs.T, targets, 1e-4 * np.square(inputs).sum(0), block)
    order, taken = forward_selection([few], 9)
    by_products, taken_by_products = forward_selection([Products(few.gram, few.cross, block)], 9)
    np.testing.assert_allclose(taken, taken_by_products, rtol=1e-6, atol=1e-9 * taken[0])
    telling = taken > 1e-6 * taken[0]
    np.testing.assert_array_equal(order[telling], by_products[telling])


@pytest.mark.parametrize("outputs", [1, 3, 40])
@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("kind", [Products, SampleMatrix])
@pytest.mark.quick_every(3)
def test_a_device_chooses_as_the_cpu_does(device, kind, parts, block, outputs, monkeypatch):
    monkeypatch.setattr(greedy, "_MANY", 1)
    layers = []
    for seed in (1, 2):
        inputs, targets = draw(seed, 8 if kind is SampleMatrix else 60, 12, block, outputs)
        if kind is SampleMatrix:
            layers.append(SampleMatrix(inputs.T.copy(), targets, 1e-4 * np.square(inputs).sum(0), block))
        else:
            # the last channel repeats the first
            inputs[:, -block:] = inputs[:, :block]
            layers.append(Products(inputs.T @ inputs, inputs.T @ targets, block))
    order, taken = forward_selection(layers, 9, parts)
    elsewhere = [dataclasses.replace(one, device=device) for one in layers]
    assert greedy._device(elsewhere) == device
    found, found_taken = forward_selection(elsewhere, 9, parts)
    np.testing.assert_allclose(found_taken, taken, rtol=1e-7, atol=1e-9 * taken[0])
    telling = taken > 1e-6 * taken[0]
    np.testing.assert_array_equal(found[telling], order[telling])


def test_few_numbers_stay_on_the_cpu(device, monkeypatch):
    inputs, targets = draw(3, 60, 12, 1, 3)
    layer = Products(inputs.T @ inputs, inputs.T @ targets, 1, device)
    assert greedy._device([layer]).type == "cpu"
    monkeypatch.setattr(greedy, "_MANY", layer.gram.size)
    assert greedy._device([layer]) == device


def test_what_is_chosen_from_is_left_as_it_was():
    inputs, targets = draw(6, 5, 4, 2, 3)
    products, few = (inputs.T @ inputs + np.eye(8), inputs.T @ targets), (inputs.T.copy(), targets.copy())
    layers = [Products(*products, 2), SampleMatrix(*few, np.ones(8), 2)]
    before = [values.copy() for values in (*products, *few)]
    forward_selection(layers, 3)
    for values, old in zip((*products, *few), before, strict=True):
        np.testing.assert_array_equal(values, old)
