from __future__ import annotations

import numpy as np
import pytest
import torch
from speedup_nets import l1_masks

from nni_topo import zoo
from nni_topo.runner.widths import inner_layers, pruning_config
from nni_topo.speedup import to_dense
from nni_topo.speedup.cost import Cost, NetworkCost
from nni_topo.speedup.layers import channel_dimension


def kept_of(model, masks):
    kept = {}
    for name, targets in masks.items():
        dim = channel_dimension(model.get_submodule(name))
        kept[name] = targets["weight"].transpose(0, dim).flatten(1).any(1).numpy()
    return kept


def real_cost(model, images):
    return Cost(zoo.count_macs(model, images), zoo.count_params(model))


NETS = {
    "small_cnn": (
        lambda: zoo.create_model("small_cnn", num_classes=10, in_channels=1, image_size=8, seed=0),
        (1, 8, 8),
    ),
    "lenet5": (lambda: zoo.create_model("lenet5", num_classes=10, in_channels=1, image_size=32, seed=0), (1, 32, 32)),
    "resnet20": (
        lambda: zoo.create_model("resnet20", num_classes=10, in_channels=3, image_size=16, seed=0, width=0.5),
        (3, 16, 16),
    ),
    "mobilenet": (
        lambda: zoo.create_model("torchvision/mobilenet_v2", num_classes=10, in_channels=3, image_size=32, seed=0),
        (3, 32, 32),
    ),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5])
def test_the_cost_is_that_of_the_dense_model(name, ratio):
    make, shape = NETS[name]
    model, images = make().eval(), torch.randn(2, *shape)
    config = pruning_config(model, images, dict.fromkeys(inner_layers(model, images), ratio))
    masks = l1_masks(model, config)
    dense = to_dense(model, images, masks, check=False)
    assert NetworkCost(model, images)(kept_of(model, masks)) == real_cost(dense, images)


def test_the_whole_network():
    make, shape = NETS["mobilenet"]
    model, images = make(), torch.randn(2, *shape)
    assert NetworkCost(model, images)({}) == real_cost(model, images)


def test_a_channel_that_another_layer_still_puts_out_stays():
    make, shape = NETS["resnet20"]
    model, images = make(), torch.randn(1, *shape)
    cost = NetworkCost(model, images)
    half = np.arange(8) % 2 == 0
    stem = next(name for name, m in model.named_modules() if isinstance(m, torch.nn.Conv2d))
    assert cost({stem: half}) == cost({})


def test_transposed_convolutions_compute_at_their_inputs():
    model = torch.nn.Sequential(torch.nn.ConvTranspose2d(2, 4, 2, stride=2), torch.nn.Conv2d(4, 3, 1))
    images = torch.randn(1, 2, 5, 5)
    assert NetworkCost(model, images)({}) == real_cost(model, images)
