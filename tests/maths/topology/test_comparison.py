from functools import partial

import numpy as np
import pytest
from gudhi import hera
from scipy.optimize import linear_sum_assignment

from nni_topo.errors import ConfigError, DataError
from nni_topo.topology import bottleneck_distance, wasserstein_distance


def make_diagram(seed: int, longest: int = 20) -> np.ndarray:
    """Return finite bars; every third seed on a grid, so that many tie."""
    rng = np.random.default_rng(seed)
    size = int(rng.integers(0, longest))
    births, lengths = rng.random(size), rng.random(size) ** 2
    if seed % 3 == 0:
        births, lengths = np.round(4 * births) / 4, np.round(4 * lengths) / 4
    return np.stack([births, births + lengths], axis=1)


def augmented(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Costs between n bars and m diagonal points on one side, m bars and n diagonal points on the other."""
    n, m = len(a), len(b)
    costs = np.zeros((n + m, n + m))
    costs[:n, :m] = np.abs(a[:, None] - b[None]).max(axis=2)
    costs[:n, m:] = (a[:, 1:] - a[:, :1]) / 2
    costs[n:, :m] = ((b[:, 1] - b[:, 0]) / 2)[None]
    return costs


def exhaustive_bottleneck(a: np.ndarray, b: np.ndarray) -> float:
    """Return the least cost within which all rows can be assigned, trying every cost in turn."""
    costs = augmented(a, b)
    for threshold in np.unique(np.append(costs, 0.0)):
        beyond = (costs > threshold).astype(float)
        if beyond[linear_sum_assignment(beyond)].sum() == 0:
            return float(threshold)
    raise AssertionError("the largest cost always suffices")


@pytest.mark.parametrize("seed", range(150))
def test_bottleneck_is_the_least_feasible_threshold(seed):
    a, b = make_diagram(seed, 9), make_diagram(seed + 3000, 9)
    exact = exhaustive_bottleneck(a, b)
    assert bottleneck_distance(a, b) == pytest.approx(exact, rel=1e-12, abs=1e-15)
    assert bottleneck_distance(a, b, engine="gudhi") >= exact - 1e-9


@pytest.mark.parametrize("has_ties", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_bottleneck_of_many_bars_equals_heras(seed, has_ties):
    generator = np.random.default_rng(seed)
    sizes = generator.integers(20, 120, 2)
    a, b = (generator.integers(0, 9, (n, 2)) if has_ties else generator.random((n, 2)) for n in sizes)
    a, b = (np.sort(bars.astype(float), axis=1) for bars in (a, b))
    a, b = (bars[bars[:, 1] > bars[:, 0]] for bars in (a, b))
    assert bottleneck_distance(a, b) == pytest.approx(hera.bottleneck_distance(a, b, delta=0.0), rel=1e-12)


def test_bottleneck_equals_gudhi_except_where_gudhi_stops_early():
    pairs = [(make_diagram(seed, 40), make_diagram(seed + 5000, 40)) for seed in range(400)]
    differences = np.array([bottleneck_distance(a, b, engine="gudhi") - bottleneck_distance(a, b) for a, b in pairs])
    assert (differences > -1e-9).all()
    assert (np.abs(differences) > 1e-9).sum() <= 4


def test_bottleneck_where_gudhi_through_3_13_errs():
    """Seven bars can match seven, so that the eighth is dropped; GUDHI 3.13 drops the seventh: 1.917 / 2."""
    kept = [2.132, 1.952, 1.929, 1.811, 1.801, 1.778, 1.262]
    whole = [2.172, 2.156, 2.132, 2.091, 2.018, 1.952, 1.917, 1.905, 1.786, 1.708, 1.458, 1.433, 1.377, 1.335]
    whole += [1.325, 1.262, 1.211, 1.140]
    a, b = (np.stack([np.zeros(len(deaths)), deaths], axis=1) for deaths in (kept, whole))
    assert exhaustive_bottleneck(a, b) == 1.905 / 2
    assert bottleneck_distance(a, b) == 1.905 / 2
    assert bottleneck_distance(a + 1.0, b + 1.0) == pytest.approx(1.905 / 2, rel=1e-12)
    assert bottleneck_distance(a, b, engine="gudhi") >= 1.905 / 2


@pytest.mark.parametrize("seed", range(100))
@pytest.mark.quick_every(4)
def test_wasserstein_is_the_cheapest_assignment(seed):
    a, b = make_diagram(seed), make_diagram(seed + 7000)
    for order in (1.0, 2.0, 3.0):
        costs = augmented(a, b) ** order
        expected = costs[linear_sum_assignment(costs)].sum() ** (1 / order)
        assert wasserstein_distance(a, b, order) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("seed", range(100))
@pytest.mark.quick_every(4)
def test_closed_forms_equal_the_general_matching(seed):
    a, b = make_diagram(seed), make_diagram(seed + 9000)
    a[:, 1] -= a[:, 0]
    b[:, 1] -= b[:, 0]
    a[:, 0] = b[:, 0] = 0.0
    # A shift along the diagonal changes no distance, but takes the general path.
    for distance in (bottleneck_distance, wasserstein_distance):
        assert distance(a, b) == pytest.approx(distance(a + 1.0, b + 1.0), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("engine", ["exact", "gudhi"])
@pytest.mark.parametrize("start", [0.0, 1.0])
@pytest.mark.parametrize(
    ("length", "gaps", "expected"), [(1.0, (2.0, 0.1), 2.0), (3.0, (0.2, 0.1), 1.5), (1.0, (), 0.5)]
)
def test_the_bottleneck_is_the_larger_one_of_finite_and_infinite_bars(engine, start, length, gaps, expected):
    a = [[start, start + length], *([10.0 * rank, np.inf] for rank in range(len(gaps)))]
    b = [[10.0 * rank + gap, np.inf] for rank, gap in enumerate(gaps)]
    assert bottleneck_distance(a, b, engine=engine) == pytest.approx(expected)
    assert bottleneck_distance(b, a, engine=engine) == pytest.approx(expected)


DISTANCES = (bottleneck_distance, partial(bottleneck_distance, engine="gudhi"), wasserstein_distance)


@pytest.mark.parametrize(("distance", "expected"), list(zip(DISTANCES, (0.5, 0.5, 0.75), strict=True)))
def test_infinite_bars_match_among_themselves(distance, expected):
    a = [[0.0, np.inf], [1.0, np.inf], [0.0, 1.0]]
    b = [[1.5, np.inf], [0.25, np.inf]]
    assert distance(a, b) == pytest.approx(expected)  # 0.25 and 0.5 between infinite bars, 0.5 for the finite one
    for fewer in (b[:1], []):
        assert distance(a, fewer) == distance(fewer, a) == np.inf


@pytest.mark.parametrize("distance", DISTANCES)
def test_empty_diagrams_and_bars_of_length_zero(distance):
    assert distance([], np.empty((0, 2))) == 0
    assert distance([[1.0, 3.0]], []) == pytest.approx(1.0)
    assert distance([[1.0, 3.0], [2.0, 2.0]], [[5.0, 5.0]]) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("bars", "message"),
    [
        ([[2.0, 1.0]], r"deaths >= births, got \[2. 1.\] in row 0"),
        ([[0.0, 1.0], [np.nan, 1.0]], "in row 1"),
        ([[0.0, np.nan]], "in row 0"),
        ([[-np.inf, 1.0]], "finite births"),
        ([[0.0, 1.0, 2.0]], r"shape \(n, 2\), got \(1, 3\)"),
    ],
)
def test_malformed_diagrams_are_refused(bars, message):
    for distance in (bottleneck_distance, wasserstein_distance):
        with pytest.raises(DataError, match=message):
            distance([[0.0, 1.0]], bars)


def test_orders_and_engines_are_checked():
    with pytest.raises(ConfigError, match="order must be at least 1"):
        wasserstein_distance([], [], 0.9)
    with pytest.raises(ConfigError, match="engine must be a known name"):
        bottleneck_distance([], [], engine="hera")
