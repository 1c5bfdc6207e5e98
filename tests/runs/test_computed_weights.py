"""Networks whose weights are computed: the steps say with which call they become plain, and shrink makes them so."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import utils
from torch.nn.utils import parametrizations, prune

import nni_topo


def masked(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", 0.3)


def masked_twice(layer: nn.Module) -> None:
    masked(layer)
    prune.random_unstructured(layer, "weight", 0.2)


WAYS = [
    parametrizations.weight_norm,
    parametrizations.spectral_norm,
    parametrizations.orthogonal,
    utils.weight_norm,
    utils.spectral_norm,
    masked,
    masked_twice,
]
OUTPUT = "it gives the model's output"


def net(way, count):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)]
    for layer in layers[:count]:
        way(layer)
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2]).eval()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way.__module__.rpartition('.')[2]}.{way.__name__}")
@pytest.mark.quick_every(3)
def test_a_network_with_computed_weights_is_shrunk_with_plain_ones(way, tmp_path, caplog):
    model, batches = net(way, 2), [torch.randn(8, 3, 8, 8) for _ in range(2)]
    model(batches[0])  # in which spectral norm of old computes its weight
    expected, state = model(batches[0]), copy.deepcopy(model.state_dict())
    groups = nni_topo.dependency_groups(model, batches[0], [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    if way is not parametrizations.orthogonal:  # of which the class is another one
        assert "model = nni_topo.as_torch_layers(model) makes plain" in groups.skipped["0"]
    shrunk = nni_topo.shrink(model, batches, {"flops": 0.5}, distill=False)
    assert shrunk[0].out_channels < 8
    assert set(dict(shrunk[0].named_parameters())) == {"weight", "bias"}
    assert type(shrunk[0]) is nn.Conv2d
    (told,) = [
        each for each in shrunk.report.warnings if "nni_topo.load(path, nni_topo.as_torch_layers(model))" in each
    ]
    assert "0, 2. In the network that is returned" in told
    assert told in caplog.text
    nni_topo.save(shrunk, tmp_path / "small.pt")
    again = nni_topo.load(tmp_path / "small.pt", nni_topo.as_torch_layers(model))
    torch.testing.assert_close(again(batches[0]), shrunk(batches[0]), rtol=0.0, atol=0.0)
    # The unpruned network is what it was.
    torch.testing.assert_close(model(batches[0]), expected, rtol=0.0, atol=0.0)
    torch.testing.assert_close(model.state_dict(), state, rtol=0.0, atol=0.0)
    assert shrunk.report.stages[0].distance == 0.0
    plain = nni_topo.as_torch_layers(model)
    torch.testing.assert_close(plain(batches[0]), expected)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_every_size_of_a_frontier_has_plain_weights():
    model, batches = net(parametrizations.weight_norm, 2), [torch.randn(16, 3, 8, 8)]
    found = nni_topo.frontier(model, batches, (0.6,), distill=False)
    assert type(found[0.6][0]) is nn.Conv2d
    assert any("as_torch_layers" in each for each in found[0.6].report.warnings)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way.__module__.rpartition('.')[2]}.{way.__name__}")
@pytest.mark.quick_every(3)
def test_the_other_layers_lose_channels(way):
    model, batches = net(way, 1), [torch.randn(8, 3, 8, 8) for _ in range(2)]
    shrunk = nni_topo.shrink(model, batches, {"params": 0.7}, distill=False)
    assert shrunk[4].out_channels == 4
    assert shrunk[0].out_channels < 8 or shrunk[2].out_channels < 8
