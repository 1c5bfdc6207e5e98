import itertools

import numpy as np
import pytest
from topology_clouds import make_cloud

from nni_topo.errors import ConfigError, DataError
from nni_topo.topology import pairwise_distances, rips_diagram


def positive(bars: np.ndarray) -> np.ndarray:
    """Bars of positive length in a canonical order: GUDHI's simplex tree leaves the others out."""
    bars = bars[bars[:, 1] > bars[:, 0]]
    return bars[np.lexsort(bars.T)]


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("dimension", [0, 1, 2])
@pytest.mark.quick_every(4)
def test_exact_diagrams_equal_the_simplex_tree(seed, dimension):
    distances = pairwise_distances(make_cloud(seed))
    exact = rips_diagram(distances=distances, dimension=dimension)
    reference = rips_diagram(distances=distances, dimension=dimension, engine="gudhi")
    np.testing.assert_allclose(positive(exact), positive(reference), rtol=1e-12, atol=1e-12)


def test_circle_has_one_long_loop():
    angles = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    bars = rips_diagram(np.stack([np.cos(angles), np.sin(angles)], axis=1), dimension=1)
    assert bars.shape == (1, 2)
    np.testing.assert_allclose(bars[0], [2 * np.sin(np.pi / 12), 2 * np.sin(4 * np.pi / 12)])


def test_octahedron_has_one_void():
    bars = rips_diagram(np.vstack([np.eye(3), -np.eye(3)]), dimension=2)
    np.testing.assert_allclose(bars, [[np.sqrt(2), 2.0]])


@pytest.mark.parametrize("engine", ["exact", "gudhi"])
def test_coefficients_are_those_of_two_elements(engine):
    """The projective plane has a loop and a void over Z/2, and neither over a field of another characteristic."""
    # half an icosahedron; its corners, edges and faces are points, at distance 1 where one lies in the other
    rim = [1, 2, 3, 4, 5]
    faces = [{0, rim[k], rim[(k + 1) % 5]} for k in range(5)] + [
        {rim[k], rim[(k + 1) % 5], rim[(k + 3) % 5]} for k in range(5)
    ]
    cells = {frozenset(cell) for face in faces for size in (1, 2, 3) for cell in itertools.combinations(face, size)}
    assert len(cells) == 6 + 15 + 10
    distances = np.array([[0.0 if a == b else 1.0 if a < b or b < a else 2.0 for a in cells] for b in cells])
    for dimension in (1, 2):
        bars = rips_diagram(distances=distances, dimension=dimension, engine=engine)
        np.testing.assert_array_equal(positive(bars), [[1.0, 2.0]])


@pytest.mark.parametrize("engine", ["exact", "gudhi"])
def test_few_points(engine):
    def bars_of(points, dimension):
        return rips_diagram(points, dimension=dimension, engine=engine)

    np.testing.assert_array_equal(bars_of([[7.0]], 0), [[0.0, np.inf]])
    np.testing.assert_array_equal(bars_of([[0.0], [2.0]], 0), [[0.0, np.inf], [0.0, 2.0]])
    for points in ([[7.0]], [[0.0], [2.0]], [[0.0], [2.0], [3.0]]):
        for dimension in (1, 2):
            assert bars_of(points, dimension).shape == (0, 2)


def test_duplicates_are_bars_of_length_zero_and_the_infinite_bar_can_go():
    bars = rips_diagram([[1.0], [1.0], [4.0]])
    np.testing.assert_array_equal(bars, [[0.0, np.inf], [0.0, 3.0], [0.0, 0.0]])
    np.testing.assert_array_equal(rips_diagram([[1.0], [1.0], [4.0]], keep_infinite=False), bars[1:])


def test_one_kind_of_input_and_a_known_engine():
    with pytest.raises(DataError, match="either points or distances"):
        rips_diagram()
    with pytest.raises(DataError, match="either points or distances"):
        rips_diagram([[0.0]], distances=[[0.0]])
    with pytest.raises(ConfigError, match="engine must be a known name, got 'exat'; did you mean exact"):
        rips_diagram([[0.0]], engine="exat")
