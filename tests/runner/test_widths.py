from __future__ import annotations

import pytest
import torch

from nni_topo import zoo
from nni_topo.errors import ConfigError
from nni_topo.registry import create_pruner
from nni_topo.runner.widths import bisect_ratio, pruning_config, ratio_for_macs
from nni_topo.speedup import to_dense

IMAGES = torch.zeros(2, 1, 8, 8)


def model():
    return zoo.create_model("small_cnn", num_classes=10, in_channels=1, image_size=8, seed=0)


def test_everything_but_the_output_layer_is_pruned():
    net = model()
    names = [entry["op_names"][0] for entry in pruning_config(net, IMAGES, 0.5)]
    layers = [n for n, m in net.named_modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    assert names == layers[:-1]


@pytest.mark.parametrize("share", [0.6, 0.3, 0.1])
def test_the_ratio_meets_the_budget_as_nearly_as_widths_allow(share):
    net = model()
    ratio = ratio_for_macs(net, IMAGES, share)
    pruner = create_pruner("l1", net, pruning_config(net, IMAGES, ratio))
    _, masks = pruner.compress()
    pruner.unwrap_model()
    left = zoo.count_macs(to_dense(net, IMAGES, masks), IMAGES) / zoo.count_macs(net, IMAGES)
    assert left == pytest.approx(share, abs=0.05)


def test_the_whole_budget_prunes_nothing():
    assert ratio_for_macs(model(), IMAGES, 1.0) == 0.0


def test_a_budget_below_one_channel_per_layer_is_refused():
    with pytest.raises(ConfigError, match="must be reachable, got 1e-06"):
        ratio_for_macs(model(), IMAGES, 1e-6)


def test_the_search_finds_the_nearest_step():
    def steps(ratio):
        return 100 - int(10 * ratio) * 10

    assert steps(bisect_ratio(steps, 37)) == 40
    assert bisect_ratio(steps, 1000) == 0.0
