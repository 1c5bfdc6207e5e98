from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nni_topo.errors import ConfigError, DataError
from nni_topo.recovery import greedy_least_squares


def residual(inputs, targets, channels, block):
    """Squared error of the least-squares prediction from some channels."""
    columns = [channel * block + i for channel in channels for i in range(block)]
    solution = np.linalg.lstsq(inputs[:, columns], targets, rcond=None)[0]
    return float(((targets - inputs[:, columns] @ solution) ** 2).sum())


def draw(seed, samples, channels, block, outputs):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(samples, channels * block)), rng.normal(size=(samples, outputs))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), channels=st.integers(2, 7), block=st.integers(1, 3), outputs=st.integers(1, 40))
def test_each_choice_is_the_best_next_one(seed, channels, block, outputs):
    inputs, targets = draw(seed, 30, channels, block, outputs)
    order = greedy_least_squares(inputs.T @ inputs, inputs.T @ targets, channels, block=block).tolist()
    assert sorted(order) == list(range(channels))
    for step, chosen in enumerate(order):
        errors = {
            c: residual(inputs, targets, [*order[:step], c], block) for c in set(range(channels)) - {*order[:step]}
        }
        assert errors[chosen] <= min(errors.values()) * (1 + 1e-6) + 1e-9


def test_a_prefix_is_the_choice_for_fewer():
    inputs, targets = draw(0, 50, 8, 2, 4)
    gram, cross = inputs.T @ inputs, inputs.T @ targets
    whole = greedy_least_squares(gram, cross, 8, block=2)
    np.testing.assert_array_equal(greedy_least_squares(gram, cross, 3, block=2), whole[:3])


def test_channels_that_make_the_target_are_found():
    inputs, _ = draw(1, 200, 10, 1, 1)
    targets = inputs[:, [2, 5, 7]] @ np.array([[3.0, 1.0], [2.0, -2.0], [1.0, 1.0]])
    assert set(greedy_least_squares(inputs.T @ inputs, inputs.T @ targets, 3).tolist()) == {2, 5, 7}


def test_a_copy_of_a_chosen_channel_comes_last():
    inputs, _ = draw(2, 100, 5, 1, 1)
    inputs[:, 3] = 2.0 * inputs[:, 1]
    targets = inputs @ np.array([[1.0], [5.0], [0.5], [5.0], [2.0]])
    order = greedy_least_squares(inputs.T @ inputs, inputs.T @ targets, 5).tolist()
    assert order[0] == 1
    assert order[-1] == 3


def test_silent_channels_are_chosen_last_and_do_no_harm():
    inputs, targets = draw(3, 100, 4, 1, 2)
    inputs[:, 0] = 0.0
    order = greedy_least_squares(inputs.T @ inputs, inputs.T @ targets, 4).tolist()
    assert order[-1] == 0


def test_two_readers_count_together():
    first, one = draw(4, 100, 4, 1, 2)
    second, other = draw(5, 100, 4, 1, 2)
    grams, crosses = [first.T @ first, second.T @ second], [first.T @ one, second.T @ other]
    order = greedy_least_squares(grams, crosses, 1)
    gains = [sum((c[j] ** 2).sum() / g[j, j] for g, c in zip(grams, crosses, strict=True)) for j in range(4)]
    assert order[0] == int(np.argmax(gains))


@pytest.mark.parametrize(("channels", "block", "samples"), [(160, 1, 400), (120, 2, 150), (96, 4, 1000)])
def test_many_channels_are_chosen_as_well_as_by_looking_at_all_in_each_step(channels, block, samples):
    """Between the looks at all channels only the foremost are compared, which mustn't cost what they explain."""
    rng = np.random.default_rng(channels)
    hidden = rng.normal(size=(samples, 20))
    inputs = np.maximum(hidden @ rng.normal(size=(20, channels * block)) + rng.normal(size=(samples, 1)), 0.0)
    inputs += 0.3 * rng.normal(size=inputs.shape)
    targets = inputs @ rng.normal(size=(channels * block, 10))
    gram, cross = inputs.T @ inputs + 1e-4 * samples * np.eye(channels * block), inputs.T @ targets
    keep = channels // 4
    slow: list[int] = []
    for _ in range(keep):
        gains = {c: explained(gram, cross, [*slow, c], block) for c in sorted(set(range(channels)) - {*slow})}
        slow.append(max(gains, key=gains.__getitem__))
    fast = greedy_least_squares(gram, cross, keep, block=block).tolist()
    assert len(set(fast)) == keep
    left = [float((targets**2).sum()) - explained(gram, cross, chosen, block) for chosen in (slow, fast)]
    assert left[1] <= 1.01 * left[0]


def explained(gram, cross, channels, block):
    """Squared sum of the targets that some channels explain."""
    columns = [channel * block + i for channel in channels for i in range(block)]
    return float((cross[columns] * np.linalg.solve(gram[np.ix_(columns, columns)], cross[columns])).sum())


def test_copies_of_the_foremost_channels_are_not_taken_for_want_of_a_look_at_the_others():
    """80 near copies of one channel lead at first; once one of them is there, the others explain nothing."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(500, 100))
    inputs[:, :80] = 3.0 * inputs[:, :1] + 1e-3 * rng.normal(size=(500, 80))
    targets = np.column_stack([inputs[:, 0], inputs[:, 80:]])
    chosen = greedy_least_squares(inputs.T @ inputs, inputs.T @ targets, 21).tolist()
    assert set(range(80, 100)) <= set(chosen)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"keep": 0}, ConfigError, r"keep must be in \[1, 4\], got 0"),
        ({"keep": 5}, ConfigError, r"keep must be in \[1, 4\], got 5"),
        ({"block": 3}, ConfigError, "block must divide the number of columns, got 3 for 4"),
        ({"cross": np.ones((3, 1))}, DataError, "cross have as many rows"),
        ({"gram": np.full((4, 4), np.nan)}, DataError, "must be finite"),
        ({"gram": [np.eye(4)] * 2}, DataError, "must belong together, got 2, 1 and 2"),
    ],
)
def test_bad_input_is_refused(change, error, message):
    arguments = {"gram": np.eye(4), "cross": np.ones((4, 1)), "keep": 2, "block": 1} | change
    with pytest.raises(error, match=message):
        greedy_least_squares(arguments["gram"], arguments["cross"], arguments["keep"], block=arguments["block"])
