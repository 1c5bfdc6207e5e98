from __future__ import annotations

import pytest
import torch
from partly_tied_nets import Hierarchical

from nni_topo import zoo
from nni_topo.errors import ConfigError
from nni_topo.pruners.registry import create_pruner
from nni_topo.pruners.units import PruningUnit
from nni_topo.runs.choices import Target
from nni_topo.runs.widths import (
    _grouped,
    _units,
    inner_layers,
    layer_ratios,
    nearer,
    proposed_ratios,
    pruning_config,
)
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


@pytest.mark.parametrize(
    ("make", "share"),
    [
        pytest.param(make, share, marks=[pytest.mark.slow] * (make is resnet and share in (0.25, 0.5)))
        for make in (small_cnn, resnet)
        for share in (0.75, 0.5, 0.25, 0.1)
    ],
)
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


@pytest.mark.parametrize(
    ("make", "share"),
    [
        pytest.param(make, share, marks=[pytest.mark.slow] * (make is resnet and share != 0.05))
        for make in (small_cnn, resnet)
        for share in (0.5, 0.2, 0.05)
    ],
)
def test_proposals_meet_a_budget_and_keep_their_proportions(make, share):
    net = make()
    names = inner_layers(net, IMAGES)
    proposed = {name: 0.2 + 0.6 * index / len(names) for index, name in enumerate(names)}
    ratios = proposed_ratios(net, IMAGES, proposed, share)
    assert list(ratios) == list(layer_ratios(net, IMAGES, Target("ratio", 0.5)))
    left = zoo.count_macs(dense_of(net, ratios), IMAGES) / zoo.count_macs(net, IMAGES)
    assert left == pytest.approx(share, abs=0.01)
    if make is small_cnn:
        # one factor for all layers; whole channels, and at least one, of each
        rows = {name: net.get_submodule(name).weight.shape[0] for name in names}
        kept = {name: round(rows[name] * (1 - ratios[name])) for name in names}
        assert any(
            all(
                abs(kept[name] - min(max(rows[name] * (1 - proposed[name]) * factor, 1), rows[name])) <= 1.5
                for name in names
            )
            for factor in torch.linspace(0.01, 5, 2000).tolist()
        )


def test_without_a_budget_proposals_stay_but_groups_agree():
    net = resnet()
    names = inner_layers(net, IMAGES)
    proposed = {name: index / 100 for index, name in enumerate(names)}
    ratios = proposed_ratios(net, IMAGES, proposed)
    entries = pruning_config(net, IMAGES, ratios)
    groups: dict[str, set[float]] = {}
    for entry in entries:
        groups.setdefault(entry.get("dependency_group_id", entry["op_names"][0]), set()).add(entry["sparse_ratio"])
    assert all(len(found) == 1 for found in groups.values())
    assert set(ratios.values()) <= set(proposed.values())
    alone = dict.fromkeys(inner_layers(small_cnn(), IMAGES), 0.25)
    assert proposed_ratios(small_cnn(), IMAGES, alone) == alone


def test_an_unreachable_budget_is_met_as_nearly_as_the_network_can():
    net = small_cnn()
    names = inner_layers(net, IMAGES)
    assert set(proposed_ratios(net, IMAGES, dict.fromkeys(names, 0.5), 1.0).values()) == {0.0}
    smallest = dense_of(small_cnn(), proposed_ratios(net, IMAGES, dict.fromkeys(names, 0.5), 1e-6))
    assert {smallest.get_submodule(name).weight.shape[0] for name in names} == {1}


UNITS = [PruningUnit(name, ((name, "weight"),), 10, 1, 1, 0.0, None, 0.0, 1.0) for name in "ab"]


def rows_cost(first, second):
    """What is left, as a function of the rows gone, where a row costs so many 64ths of the whole: exact in floats."""
    return lambda removed: 1.0 - (first * removed[0] + second * removed[1]) / 64.0


@pytest.mark.parametrize(
    ("start", "share", "nearest"),
    [
        ([2, 2], 43, [3, 2]),  # one row more of the first unit
        ([3, 2], 48, [2, 2]),  # one row less of it
        ([1, 2], 58, [0, 2]),  # and none less
        ([2, 2], 45, [2, 3]),
        ([2, 2], 40, [3, 3]),  # two moves
        ([2, 2], 48, [2, 2]),  # met already
        ([9, 9], -99, [9, 9]),  # a row of each unit stays
        ([0, 0], 99, [0, 0]),  # and none comes that isn't there
    ],
)
def test_rows_move_as_long_as_that_meets_the_budget_more_nearly(start, share, nearest):
    assert nearer(UNITS, start, rows_cost(5, 3), share / 64) == nearest


def test_rows_stay_where_a_move_only_meets_the_budget_equally_nearly():
    assert nearer(UNITS, [2, 2], rows_cost(3, 3), 50.5 / 64) == [2, 2]


def test_a_share_of_the_whole_removes_no_channel_of_a_deep_network():
    # more layers than rows that are moved at the end
    net = torch.nn.Sequential(*(torch.nn.Linear(3, 3) for _ in range(40)))
    images = torch.zeros(2, 3)
    ratios = proposed_ratios(net, images, dict.fromkeys(inner_layers(net, images), 0.5), 1.0)
    assert len(ratios) == 39
    assert set(ratios.values()) == {0.0}


def test_channels_that_only_some_layers_share_are_counted_as_shared():
    # Res2Net: what a convolution makes of one quarter of a layer's channels is added to the next quarter
    net, images = Hierarchical().eval(), torch.zeros(2, 3, 8, 8)
    units = _units(net, images, _grouped(net, images))
    shared = {name: unit.ties for unit in units for name in unit.layers}
    enter = shared["enter.conv"]
    assert len(enter) == len(set(enter)) == 32
    assert shared["convs.0.conv"] == enter[8:16]
    assert shared["convs.1.conv"] == enter[16:24]
    assert shared["stem.conv"] == shared["convs.2.conv"] == ()
