from __future__ import annotations

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nni.compression.pruning import LevelPruner
from torch import nn

from nni_topo.analysis import neural_persistence
from nni_topo.errors import ConfigError, DataError
from nni_topo.maths import topology


def linear(weight: np.ndarray) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float64)
    layer.weight.data.copy_(torch.from_numpy(weight))
    return layer


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))


@given(st.integers(0, 10_000), st.sampled_from([1.0, 2.0, 3.5]), st.floats(1e-3, 1e3))
@settings(max_examples=50, deadline=None)
def test_a_dense_layer_against_networkx(seed, p, scale):
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=rng.integers(2, 9, size=2))
    graph = nx.Graph()
    sizes = np.abs(weight) / np.abs(weight).max()
    graph.add_weighted_edges_from((("o", i), ("i", j), size) for (i, j), size in np.ndenumerate(sizes))
    tree = nx.maximum_spanning_tree(graph)
    persistences = np.array([1 - data["weight"] for *_, data in tree.edges(data=True)])
    found = neural_persistence(linear(scale * weight), p=p)
    assert found.total == pytest.approx((persistences**p).sum() ** (1 / p), rel=1e-9)
    share = neural_persistence(linear(weight), p=p, normalized=True).total
    bound = (1 - sizes.min()) * (sum(weight.shape) - 1) ** (1 / p)
    assert share == pytest.approx(found.total / bound, rel=1e-9)
    assert 0.0 <= share <= 1.0


def test_convolutions_by_channels_and_by_their_toeplitz_graph():
    model, images = small_net(), torch.zeros(1, 1, 6, 6)
    weight = model[0].weight.detach().double().numpy()
    channel = neural_persistence(model)
    strongest = np.abs(weight).max(axis=(1, 2, 3))
    np.testing.assert_allclose(channel.deaths["0"], np.sort(strongest)[::-1] / strongest.max())
    unrolled = neural_persistence(model, images, conv_graph="toeplitz", normalized=True)
    assert len(unrolled.deaths["0"]) == 8 * 8 + 4 * 36 - 1
    graph = topology.convolution_graph(weight.shape, (8, 8))
    lengths = topology.spanning_forest(weight, graph).lengths
    np.testing.assert_allclose(unrolled.deaths["0"], lengths / np.abs(weight).max())
    assert 0.0 < unrolled.layers["0"] < 1.0
    assert unrolled.layers["3"] == neural_persistence(model, normalized=True).layers["3"]


def test_the_models_largest_weight_can_be_the_unit():
    model = nn.Sequential(linear(np.array([[4.0, 2.0]])), linear(np.array([[8.0], [2.0]])))
    assert neural_persistence(model).layers == pytest.approx({"0": 0.5, "1": 0.75})
    by_model = neural_persistence(model, scale="model")
    assert by_model.layers == pytest.approx({"0": np.hypot(0.5, 0.75), "1": 0.75})
    assert by_model.total == pytest.approx(0.75 + np.hypot(0.5, 0.75))


def test_equal_weights_have_none_and_one_node_sides_work():
    for normalized in (False, True):
        assert neural_persistence(linear(np.full((3, 4), -2.0)), normalized=normalized).total == 0.0
    assert neural_persistence(linear(np.array([[4.0, 1.0]])), normalized=True).total == pytest.approx(0.5**0.5)


def test_masked_weights_count_as_zero():
    model = nn.Sequential(linear(np.array([[4.0, 3.0], [2.0, 1.0]])))
    pruner = LevelPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.75}])
    pruner.compress()
    np.testing.assert_array_equal(neural_persistence(model).deaths["0"], [1.0, 0.0, 0.0])


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_layers_without_usable_weights_are_named(value):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight.data.fill_(value)
    with pytest.raises(DataError, match=r"\(1\)"):
        neural_persistence(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": 0.5}, "p must be at least 1 and finite, got 0.5"),
        ({"conv_graph": "toeplits"}, "did you mean toeplitz"),
        ({"conv_graph": "toeplitz"}, "needs example_inputs"),
        ({"scale": "net"}, "scale must be a known name"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        neural_persistence(nn.Linear(2, 2), **options)


def test_large_orders_do_not_underflow():
    torch.manual_seed(0)
    layer = nn.Linear(20, 20)
    largest = 1 - min(neural_persistence(layer).deaths[""])
    assert neural_persistence(layer, p=5000).total == pytest.approx(largest, rel=1e-2)
