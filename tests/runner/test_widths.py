from __future__ import annotations

import pytest
import torch

from nni_topo import zoo
from nni_topo.errors import ConfigError
from nni_topo.registry import create_pruner
from nni_topo.runner import Target
from nni_topo.runner.widths import inner_layers, layer_ratios, pruning_config
from nni_topo.speedup import to_dense

IMAGES = torch.zeros(2, 1, 8, 8)


def small_cnn():
    return zoo.create_model("small_cnn", num_classes=10, in_channels=1, image_size=8, seed=0)


def resnet():
    return zoo.create_model("resnet20", num_classes=10, in_channels=1, image_size=8, seed=0)


def dense_of(model, ratios):
    pruner = create_pruner("l1", model, pruning_config(model, IMAGES, ratios))
    _, masks = pruner.compress()
    pruner.unwrap_model()
    return to_dense(model, IMAGES, masks)


def test_everything_but_the_output_layer_is_pruned():
    net = small_cnn()
    layers = [n for n, m in net.named_modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    assert inner_layers(net, IMAGES) == layers[:-1]
    assert layer_ratios(net, IMAGES, Target("ratio", 0.3)) == dict.fromkeys(layers[:-1], 0.3)


@pytest.mark.parametrize("share", [0.75, 0.5, 0.25, 0.1])
@pytest.mark.parametrize("make", [small_cnn, resnet])
def test_a_budget_is_met_within_a_percent_of_the_whole(make, share):
    net = make()
    ratios = layer_ratios(net, IMAGES, Target("flops", share))
    left = zoo.count_macs(dense_of(net, ratios), IMAGES) / zoo.count_macs(net, IMAGES)
    assert left == pytest.approx(share, abs=0.01)


def test_every_layer_loses_about_the_same_share():
    ratios = layer_ratios(resnet(), IMAGES, Target("flops", 0.25))
    assert max(ratios.values()) - min(ratios.values()) < 0.1


def test_the_whole_budget_prunes_nothing():
    assert set(layer_ratios(small_cnn(), IMAGES, Target("flops", 1.0)).values()) == {0.0}


def test_a_budget_below_one_channel_per_layer_is_refused():
    with pytest.raises(ConfigError, match="must be reachable, got 1e-06"):
        layer_ratios(small_cnn(), IMAGES, Target("flops", 1e-6))
