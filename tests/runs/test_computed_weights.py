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


def net(way):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)]
    for layer in layers[:2]:
        way(layer)
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2]).eval()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way.__module__.rpartition('.')[2]}.{way.__name__}")
@pytest.mark.quick_every(3)
def test_a_network_with_computed_weights_is_shrunk_with_plain_ones(way, tmp_path, caplog):
    model, batches = net(way), [torch.randn(8, 3, 8, 8) for _ in range(2)]
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
