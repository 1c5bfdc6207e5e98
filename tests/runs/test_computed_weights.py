"""Networks whose weights are computed: what can't be removed is said, with the call that changes it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import utils
from torch.nn.utils import parametrizations

import nni_topo
from nni_topo.errors import ConfigError

WAYS = [parametrizations.weight_norm, parametrizations.spectral_norm, utils.weight_norm, utils.spectral_norm]
OUTPUT = "it gives the model's output"


def net(way, count):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)]
    for layer in layers[:count]:
        way(layer)
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2]).eval()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way.__module__.rpartition('.')[2]}.{way.__name__}")
def test_a_network_with_computed_weights_is_shrunk_once_they_are_plain(way):
    model, batches = net(way, 2), [torch.randn(8, 3, 8, 8) for _ in range(2)]
    with pytest.raises(ConfigError, match=r"got none: 0, 2: its weight is.*as_torch_layers.*; 4: it gives"):
        nni_topo.shrink(model, batches, {"flops": 0.5}, distill=False)
    groups = nni_topo.dependency_groups(model, batches[0], [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    assert "as_torch_layers" in groups.skipped["0"]
    assert (list(groups), groups.skipped.keys(), groups.skipped["4"]) == ([], {"0", "2", "4"}, OUTPUT)
    with pytest.raises(ConfigError, match=r"at least one entry, got none.*0, 2: its weight.*as_torch_layers"):
        nni_topo.create_pruner("l1", model, groups)
    shrunk = nni_topo.shrink(nni_topo.as_torch_layers(model), batches, {"flops": 0.5}, distill=False)
    assert shrunk[0].out_channels < 8


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way.__module__.rpartition('.')[2]}.{way.__name__}")
def test_the_other_layers_lose_channels(way):
    model, batches = net(way, 1), [torch.randn(8, 3, 8, 8) for _ in range(2)]
    shrunk = nni_topo.shrink(model, batches, {"params": 0.7}, distill=False)
    assert (shrunk[0].out_channels, shrunk[4].out_channels) == (8, 4)
    assert shrunk[2].out_channels < 8
