from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from nni_topo.errors import ConfigError, DataError
from nni_topo.hooks import ActivationCollector, WeightCollector
from nni_topo.pruners.clouds import preprocess_points
from nni_topo.pruners.random import RandomPruner
from nni_topo.testing import toy_images, toy_model
from nni_topo.topology import pairwise_distances


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


def test_activation_cloud_has_the_distances_of_the_activations():
    model, images = toy_model(), toy_images(16)
    outputs = {}
    with torch.no_grad():
        handle = model.inner.register_forward_hook(lambda module, inputs, output: outputs.update(inner=output))
        model.eval()(images)
        handle.remove()
    rows = outputs["inner"].movedim(1, 0).flatten(1).double().numpy()
    rows = rows - rows.mean(1, keepdims=True)
    expected = pairwise_distances(rows) / np.sqrt(rows.shape[1])
    cloud = ActivationCollector(list(images.split(5))).collect(context_of(model, CONVS))["inner"]["weight"]
    np.testing.assert_allclose(pairwise_distances(cloud.numpy()), expected, atol=1e-7)


def test_activations_of_linear_layers_count_tokens_as_samples():
    layer = nn.Linear(4, 6)
    context = context_of(nn.Sequential(layer), [{"op_types": ["Linear"], "sparse_ratio": 0.5}])
    cloud = ActivationCollector([torch.randn(3, 7, 4)]).collect(context)["0"]["weight"]
    assert cloud.shape == (6, 6)


def test_collecting_leaves_modes_hooks_and_statistics_alone():
    model = toy_model().train()
    context = context_of(model, CONVS)
    before = model.norm.running_mean.clone()
    ActivationCollector([toy_images()]).collect(context)
    assert model.training
    assert model.norm.training
    assert torch.equal(model.norm.running_mean, before)
    assert not model.stem._forward_hooks


class Skipping(nn.Sequential):
    """Runs its first layer only."""

    def forward(self, x):
        return self[0](x)


def test_a_layer_that_never_ran_is_refused():
    context = context_of(Skipping(nn.Linear(4, 4), nn.Linear(4, 4)), [{"op_types": ["Linear"], "sparse_ratio": 0.5}])
    with pytest.raises(DataError, match=r"got no activation \(1\)"):
        ActivationCollector([torch.randn(2, 4)]).collect(context)


def test_pruning_by_input_channel_is_refused():
    config = [{"op_types": ["Linear"], "sparse_ratio": 0.5, "granularity": "in_channel"}]
    context = context_of(nn.Sequential(nn.Linear(4, 4)), config)
    with pytest.raises(ConfigError, match="by output channel"):
        ActivationCollector([torch.randn(2, 4)]).collect(context)
