from __future__ import annotations

import pytest
import torch
from torch import nn

from nni_topo.errors import DataError
from nni_topo.hooks import WeightCollector
from nni_topo.pruners.clouds import preprocess_points
from nni_topo.pruners.random import RandomPruner
from nni_topo.testing import toy_model


def context_of(model, config_list):
    return RandomPruner(model, config_list).context


CONVS = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]


def test_weight_cloud_has_one_point_per_filter():
    model = toy_model()
    weight = model.inner.weight.detach().clone()
    cloud = WeightCollector().collect(context_of(model, CONVS))["inner"]["weight"]
    assert cloud.dtype == torch.float64
    assert torch.equal(cloud, weight.flatten(1).double())


def test_weight_cloud_follows_granularity():
    layer = nn.Linear(4, 6)
    config = [{"op_types": ["Linear"], "sparse_ratio": 0.5, "granularity": [2, 4]}]
    weight = layer.weight.detach().clone()
    cloud = WeightCollector().collect(context_of(nn.Sequential(layer), config))["0"]["weight"]
    assert torch.equal(cloud[1], weight[2:4].flatten().double())


@pytest.mark.parametrize(
    ("preprocess", "expected"),
    [
        ("none", [[3.0, 4.0], [0.0, 0.0]]),
        ("center", [[1.5, 2.0], [-1.5, -2.0]]),
        ("standardize", [[1.0, 1.0], [-1.0, -1.0]]),
        ("unit", [[0.6, 0.8], [0.0, 0.0]]),
    ],
)
def test_preprocessing(preprocess, expected):
    found = preprocess_points(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), preprocess)
    torch.testing.assert_close(found, torch.tensor(expected))


def test_weights_that_became_nan_are_refused():
    model = toy_model()
    context = context_of(model, CONVS)
    with torch.no_grad():
        model.inner._nni_wrapper.weight[0] = float("nan")
    with pytest.raises(DataError, match=r"inner\.weight"):
        WeightCollector().collect(context)
