from __future__ import annotations

import pytest
import torch
from torch import nn

from nni_topo import to_dense, zoo
from nni_topo.errors import ConfigError
from nni_topo.network.speedup.analysis import Analysis
from nni_topo.pruners.budget import Budget
from nni_topo.pruners.registry import create_pruner
from nni_topo.runs.choices import Target
from nni_topo.runs.widths import (
    fewest_channels,
    inner_layers,
    layer_ratios,
    planned_ratios,
    proposed_ratios,
    pruning_config,
)

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


@pytest.mark.parametrize(("make", "share"), [(small_cnn, 0.75), (small_cnn, 0.25), (resnet, 0.1)])
def test_a_budget_is_met_within_a_percent_of_the_whole(make, share):
    net = make()
    ratios = layer_ratios(net, IMAGES, Target("flops", share))
    left = zoo.count_macs(dense_of(net, ratios), IMAGES) / zoo.count_macs(net, IMAGES)
    assert left == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize(("make", "share"), [(small_cnn, 0.5), (resnet, 0.05)])
def test_proposals_meet_a_budget(make, share):
    net = make()
    names = inner_layers(net, IMAGES)
    proposed = {name: 0.2 + 0.6 * index / len(names) for index, name in enumerate(names)}
    ratios = proposed_ratios(net, IMAGES, proposed, share)
    assert list(ratios) == list(layer_ratios(net, IMAGES, Target("ratio", 0.5)))
    left = zoo.count_macs(dense_of(net, ratios), IMAGES) / zoo.count_macs(net, IMAGES)
    assert left == pytest.approx(share, abs=0.01)


def test_an_unreachable_budget_is_met_as_nearly_as_the_network_can():
    net = small_cnn()
    names = inner_layers(net, IMAGES)
    assert set(proposed_ratios(net, IMAGES, dict.fromkeys(names, 0.5), 1.0).values()) == {0.0}
    smallest = dense_of(small_cnn(), proposed_ratios(net, IMAGES, dict.fromkeys(names, 0.5), 1e-6))
    assert {smallest.get_submodule(name).weight.shape[0] for name in names} == {1}


def linears(width, count):
    """Linear layers without a bias, whose costs are products of their widths."""
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(count))), torch.zeros(2, width)


@pytest.mark.parametrize(
    ("factor", "kept"),
    [(1.0, (32, 16)), (0.25, (8, 4)), (2.0, (64, 32)), (4.0, (64, 64)), (0.75, (24, 12)), (0.0, (1, 1))],
)
def test_one_factor_scales_the_shares_that_are_kept(factor, kept):
    net, images = linears(64, 3)
    first, second = kept
    share = (64 * first + first * second + second * 64) / (3 * 64 * 64)
    found = proposed_ratios(net, images, {"0": 0.5, "1": 0.75}, share)
    # Half a channel more than asked for, so that rounding loses none.
    assert found == {
        name: (64 - count + 0.5) / 64 if count < 64 else 0.0 for name, count in zip("01", kept, strict=True)
    }


def test_all_layers_are_equally_wide_where_that_is_asked_for():
    net, images = linears(10, 3)
    share = 140 / 300  # 6 and 5 channels: 60 + 30 + 50 products of 300
    assert set(layer_ratios(net, images, Target("flops", share)).values()) == {0.45, 0.55}
    budget = Budget(flops=share, equal_blocks=True)
    assert len(set(planned_ratios(Analysis.on(net, images), budget)[0].values())) == 1


def test_channels_are_kept_in_multiples():
    ratios, outcome = planned_ratios(Analysis.on(small_cnn(), IMAGES), Budget(flops=0.5), round_to=8)
    assert outcome.asked == 0.5
    dense = dense_of(small_cnn(), ratios)
    assert {dense.get_submodule(name).weight.shape[0] % 8 for name in ratios} == {0}
    assert any(ratios.values())


def test_smaller_multiples_are_taken_where_preferred_ones_miss_a_budget_of_time(monkeypatch):
    model = nn.Sequential(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 36, 10)).eval()
    images = torch.zeros(2, 1, 8, 8)

    def as_wide(*_):  # the time is the share of channels, on every machine
        return lambda choices: [float(kept["0"].mean()) if "0" in kept else 1.0 for kept in choices]

    monkeypatch.setattr("nni_topo.pruners.budget.network_time", as_wide)
    analysis = Analysis.on(model, images)
    for share, left in ((0.5, 16), (0.25, 8), (0.19, 4)):
        ratios, outcome = planned_ratios(analysis, Budget(latency=share), prefers_multiples=True)
        assert round(32 * (1.0 - ratios["0"])) == left
        assert outcome.left == left / 32


def test_a_budget_below_half_of_what_the_fewest_channels_leave_is_refused(caplog):
    net, images = linears(4, 2)  # one of four channels leaves a quarter
    with pytest.raises(ConfigError, match=r"got 0.1 where .* leave 0.25 \(target\)"):
        layer_ratios(net, images, Target("flops", 0.1))
    for share in (0.125, 0.15):
        assert layer_ratios(net, images, Target("flops", share)) == {"0": 3.5 / 4}
        assert f"the flops budget of {share} is missed" in caplog.text


@pytest.mark.parametrize(
    ("bounds", "round_to", "kept"),
    [({}, None, 1), ({"max_sparse_ratio": 0.5}, None, 4), ({}, 2, 2), ({"max_sparse_ratio": 0.6}, 3, 6)],
)
def test_the_fewest_channels_are_those_that_bounds_and_multiples_allow(bounds, round_to, kept):
    net, images = linears(8, 2)
    entries = [{"op_names": ["0"], **bounds}]
    found = fewest_channels(Analysis.on(net, images), entries, round_to)
    assert {name: int(each.sum()) for name, each in found.items()} == {"0": kept}
