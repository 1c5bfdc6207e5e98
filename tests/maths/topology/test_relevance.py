from __future__ import annotations

import numpy as np
import pytest

from nni_topo.errors import DataError
from nni_topo.maths.topology import relevance_distances, rips_diagram


def test_the_strongest_path_by_hand():
    found = relevance_distances([[[4.0, -2.0], [1.0, 3.0]], [[5.0, -10.0]]])
    # inputs 0 and 1, hidden 2 and 3, output 4; scaled: 1, 1/2, 1/4, 3/4, then 1/2 and 1
    relevance = {(0, 2): 1, (1, 2): 1 / 2, (0, 3): 1 / 4, (1, 3): 3 / 4, (2, 4): 1 / 2, (3, 4): 1}
    relevance |= {(0, 4): max(1 * 1 / 2, 1 / 4 * 1), (1, 4): max(1 / 2 * 1 / 2, 3 / 4 * 1), (0, 1): 0, (2, 3): 0}
    for (i, j), value in relevance.items():
        assert found[i, j] == found[j, i] == pytest.approx(1 - value)
    assert not found.diagonal().any()


def test_paths_over_many_layers_against_brute_force():
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=(m, n)) for n, m in ((3, 4), (4, 2), (2, 3))]
    first, second, third = (np.abs(weight) / np.abs(weight).max() for weight in weights)
    found = relevance_distances(weights)
    for i in range(3):
        for k in range(3):
            paths = [first[a, i] * second[b, a] * third[k, b] for a in range(4) for b in range(2)]
            assert found[i, 9 + k] == pytest.approx(1 - max(paths))


def test_no_loop_of_a_single_layer_is_ever_filled():
    weight = np.random.default_rng(1).random((4, 6)) + 0.1
    bars = rips_diagram(distances=relevance_distances([weight]), dimension=1)
    # a loop for each weight outside of the tree, born with it; at distance 1 all neurons meet
    outside = np.sort((weight / weight.max()).ravel())[: 4 * 6 - (4 + 6 - 1)]
    assert len(bars) <= len(outside)
    assert (bars[:, 1] == 1.0).all()
    assert np.isin(bars[:, 0].round(12), (1 - weight / weight.max()).ravel().round(12)).all()


@pytest.mark.parametrize("engine", ["exact", "gudhi"])
def test_an_output_that_reads_all_of_a_loop_fills_it(engine):
    # both inputs and both hidden neurons are a loop from 0.8 on; the output fills it by reading the second with 0.5
    bars = rips_diagram(
        distances=relevance_distances([[[1.0, 0.9], [0.9, 0.8]], [[1.0, 0.5]]]), dimension=1, engine=engine
    )
    bars = bars[bars[:, 1] > bars[:, 0]]
    np.testing.assert_allclose(bars, [[0.2, 0.5]])


def test_a_layer_of_zeros_is_refused_by_its_place():
    with pytest.raises(DataError, match=r"other than 0 to be scaled, got none \(weights\[1\]\)"):
        relevance_distances([np.ones((2, 2)), np.zeros((1, 2))])
