import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from nni_topo.topology import bottleneck_distance, wasserstein_distance

lists = st.lists(st.one_of(st.floats(0, 10), st.integers(0, 4).map(float)), max_size=7).map(
    lambda values: sorted(values, reverse=True)
)


def diagram(deaths):
    """Return the diagram of H0, but for its infinite bar, of death times."""
    return np.stack([np.zeros(len(deaths)), deaths], axis=1)


def h0_bottleneck(a, b) -> float:
    return bottleneck_distance(diagram(a), diagram(b))


def h0_wasserstein(a, b, order=2.0) -> float:
    return wasserstein_distance(diagram(a), diagram(b), order)


def partial_matchings(rows: int, columns: int):
    for size in range(min(rows, columns) + 1):
        for chosen in itertools.combinations(range(rows), size):
            for partners in itertools.permutations(range(columns), size):
                yield chosen, partners


def costs_of(a, b, chosen, partners) -> list[float]:
    """Bar lengths moved by a partial matching: |a - b| where matched, half of the rest."""
    dropped = [a[i] / 2 for i in range(len(a)) if i not in chosen]
    dropped += [b[j] / 2 for j in range(len(b)) if j not in partners]
    return [abs(a[i] - b[j]) for i, j in zip(chosen, partners, strict=True)] + dropped + [0.0]


def augmented(a, b, order: float) -> float:
    """Solve the assignment of n + m bars and diagonal points to each other."""
    n, m = len(a), len(b)
    costs = np.zeros((n + m, n + m))
    costs[:n, :m] = np.abs(np.subtract.outer(a, b)) ** order
    costs[:n, m:] = (np.asarray(a)[:, None] / 2) ** order
    costs[n:, :m] = (np.asarray(b)[None] / 2) ** order
    return costs[linear_sum_assignment(costs)].sum() ** (1 / order)


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.quick_every(4)
def test_both_distances_are_minimal_over_all_matchings(seed):
    rng = np.random.default_rng(seed)
    n, m = rng.integers(0, 5, 2)
    draw = rng.integers(0, 6, n + m).astype(float) if seed % 2 else rng.pareto(1.0, n + m)
    a, b = np.sort(draw[:n])[::-1], np.sort(draw[n:])[::-1]
    options = [costs_of(a, b, *matching) for matching in partial_matchings(n, m)]
    assert h0_bottleneck(a, b) == pytest.approx(min(map(max, options)), rel=1e-12)
    for order in (1.0, 2.0, 3.5):
        expected = min(sum(c**order for c in costs) for costs in options) ** (1 / order)
        assert h0_wasserstein(a, b, order) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("seed", range(200))
@pytest.mark.quick_every(4)
def test_wasserstein_equals_the_assignment(seed):
    rng = np.random.default_rng(1000 + seed)
    n, m = rng.integers(0, 40, 2)
    spread = (0.01, 1.0, 3.0)[seed % 3]
    a, b = (np.sort(np.exp(spread * rng.normal(size=size)))[::-1] for size in (n, m))
    for order in (1.0, 2.0):
        expected = augmented(a, b, order)
        assert h0_wasserstein(a, b, order) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_the_longest_bars_are_not_always_matched():
    assert h0_wasserstein([100.0, 1.0], [1.0]) == pytest.approx(50.0)
    assert h0_bottleneck([100.0, 1.0], [1.0]) == 50.0


@given(lists, lists, lists, st.floats(1e-3, 1e3))
@settings(max_examples=100, deadline=None)
def test_metric_axioms_and_scale(a, b, c, scale):
    for distance in (h0_bottleneck, h0_wasserstein):
        assert distance(a, a) == 0
        assert distance(a, b) == pytest.approx(distance(b, a), rel=1e-12, abs=1e-12)
        assert distance(a, c) <= distance(a, b) + distance(b, c) + 1e-9
        scaled = distance(np.multiply(a, scale), np.multiply(b, scale))
        assert scaled == pytest.approx(scale * distance(a, b), rel=1e-9, abs=1e-12)


def test_tiny_distances_keep_their_digits():
    a = np.linspace(2.0, 1.0, 50)
    b = a + 1e-9 * np.cos(np.arange(50))
    expected = np.linalg.norm(a - b)
    assert h0_wasserstein(a, b) == pytest.approx(expected, rel=1e-6, abs=0)
