from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import nni_topo
from nni_topo.errors import ConfigError
from nni_topo.maths.clustering.subclustering import Growth
from nni_topo.pruners.subcluster import SubclusterPruner
from nni_topo.speedup import masked_model
from nni_topo.testing import toy_images, toy_model

HIDDEN = {"op_names": ["0"]}


def net(nodes: int = 60, seed: int = 0) -> tuple[nn.Sequential, torch.Tensor]:
    """A layer of neurons of very different strength, and data for it."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, nodes), nn.ReLU(), nn.Linear(nodes, 3))
    with torch.no_grad():
        model[0].weight *= torch.linspace(0.02, 3.0, nodes)[:, None]
    return model, torch.randn(100, 6)


def run(pruner, name="0"):
    _, masks = pruner.compress()
    pruner.unwrap_model()
    return masks[name]["weight"].flatten(1)[:, 0].numpy() > 0


def test_it_needs_no_ratio_and_keeps_one_node_of_each_leaf():
    model, data = net()
    pruner = SubclusterPruner(model, [HIDDEN], calibration=[data], energy=0.8, growth=Growth(bins=10))
    kept = run(pruner)
    tree = pruner.trees["0.weight"]
    assert len(tree.initial) == 3
    assert 3 < len(tree.leaves) < 60
    labels = tree.labels(60)
    assert sorted(labels[kept]) == list(range(len(tree.leaves)))


def test_the_survivor_of_a_linear_layer_has_the_largest_weights():
    model, data = net()
    pruner = SubclusterPruner(model, [HIDDEN], calibration=[data], energy=0.8)
    kept = run(pruner)
    strength = (model[0].weight.abs().sum(1) + model[2].weight.abs().sum(0)).detach().numpy()
    labels = pruner.trees["0.weight"].labels(60)
    for label in range(labels.max() + 1):
        members = np.flatnonzero(labels == label)
        assert kept[members[strength[members].argmax()]]


def test_the_survivor_of_a_convolution_has_the_largest_bias():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 12, 3), nn.ReLU(), nn.Conv2d(12, 2, 3))
    pruner = SubclusterPruner(model, [HIDDEN], calibration=[torch.randn(10, 2, 8, 8)], energy=0.9)
    kept = run(pruner)
    tree, bias = pruner.trees["0.weight"], model[0].bias.abs().detach().numpy()
    assert len(tree.initial) == 5
    labels = tree.labels(12)
    assert all(bias[labels == labels[n]].max() == bias[n] for n in np.flatnonzero(kept))


def test_more_energy_keeps_fewer():
    model, data = net()
    knobs = {"calibration": [data], "growth": Growth(bins=10)}
    counts = [run(SubclusterPruner(model, [HIDDEN], energy=p, **knobs)).sum() for p in (0.1, 0.5, 0.9)]
    assert counts[0] > counts[2]
    assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize("cap", ["sparse_ratio", "max_sparse_ratio"])
@pytest.mark.quick_every(2)
def test_ratios_are_caps(cap):
    model, data = net()
    knobs = {"calibration": [data], "energy": 0.9, "growth": Growth(initial_ratio=0.05)}
    free = int(run(SubclusterPruner(model, [HIDDEN], **knobs)).sum())
    assert free < 45
    assert run(SubclusterPruner(model, [{**HIDDEN, cap: 0.25}], **knobs)).sum() == 45
    assert run(SubclusterPruner(model, [{**HIDDEN, cap: 0.99}], **knobs)).sum() == free


def test_a_minimum_ends_the_growth():
    model, data = net()
    config = [{**HIDDEN, "min_sparse_ratio": 0.9}]
    knobs = {"calibration": [data], "energy": 0.01, "growth": Growth(bins=10)}
    assert run(SubclusterPruner(model, config, **knobs)).sum() == 6


def test_a_threshold_takes_the_place_of_the_histograms():
    model, data = net()
    config = [{**HIDDEN, "sparse_threshold": 0.5}]
    pruner = SubclusterPruner(model, config, calibration=[data], growth=Growth("max"))
    kept = run(pruner)
    tree = pruner.trees["0.weight"]
    assert tree.threshold == 0.5
    variances = torch.relu(model[0](data)).var(0, correction=0).detach().numpy()
    assert kept[variances > 0.5 + 1e-6].all()


def test_dead_neurons_all_go_as_far_as_the_cap_lets_them():
    model, data = net()
    with torch.no_grad():
        model[0].bias[:40] = -1e3
    pruner = SubclusterPruner(model, [HIDDEN], calibration=[data], energy=0.1)
    assert not run(pruner)[:40].any()
    assert set(pruner.pairs["0"]) & set(range(40)) == set()
    assert run(SubclusterPruner(model, [{**HIDDEN, "max_sparse_ratio": 0.5}], calibration=[data])).sum() == 30
    with torch.no_grad():
        model[0].bias.fill_(-1e3)
    assert run(SubclusterPruner(model, [HIDDEN], calibration=[data])).sum() == 1


def test_a_ratio_of_one_member_caps_the_group():
    config = [
        {"op_names": ["stem"], "dependency_group_id": "residual", "sparse_ratio": 0.25},
        {"op_names": ["inner"], "dependency_group_id": "residual"},
    ]
    pruner = SubclusterPruner(
        toy_model(), config, calibration=[toy_images()], energy=0.99, growth={"initial_ratio": 0.1}
    )
    assert run(pruner, "inner").sum() == 6


@pytest.mark.parametrize("seed", [0, 2, 7, 31])
@pytest.mark.quick_every(2)
def test_parts_of_a_grouped_convolution_keep_as_many_and_pairs_say_which(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, groups=4), nn.ReLU(), nn.Conv2d(32, 4, 1)
    )
    data = [torch.randn(32, 3, 8, 8) for _ in range(2)]
    config = nni_topo.dependency_groups(model, data[0], [{"op_names": ["2"]}])
    pruner = SubclusterPruner(model, config, calibration=data, energy=0.8, growth=Growth("mean"), seed=seed)
    kept = run(pruner, "2").reshape(4, 8)
    leaves = [len(tree.leaves) for name, tree in pruner.trees.items() if name.startswith("2.weight[")]
    assert leaves == kept.sum(1).tolist() == [kept[0].sum()] * 4
    pairs = pruner.pairs["2"]
    assert sorted(pairs) == np.flatnonzero(~kept.reshape(-1)).tolist() != []
    assert all(kept.reshape(-1)[survivor] for survivor in pairs.values())
    nni_topo.compensate(model, pruner.get_masks(), data, method=nni_topo.recovery.Pair(pruner.pairs))


def test_knobs_by_layer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 20), nn.ReLU(), nn.Linear(20, 3))
    config = [{"op_names": ["0", "2"]}]
    data = [torch.randn(64, 6)]
    pruner = SubclusterPruner(
        model, config, calibration=data, growth=Growth(initial_ratio={"0": 0.25}), energy={"2": 0.9}
    )
    run(pruner)
    assert len(pruner.trees["0.weight"].initial) == 10
    assert len(pruner.trees["2.weight"].initial) == 1
    alone = SubclusterPruner(model, [{"op_names": ["2"]}], calibration=data, energy=0.9)
    run(alone, "2")
    assert alone.trees["2.weight"].threshold == pruner.trees["2.weight"].threshold


def test_bad_requests_are_refused():
    config = [{"op_names": ["hidden"]}]
    for knobs, message in (
        ({"energy": {"hiden": 0.5}}, "energy must name modules of the model, got hiden"),
        ({"growth": {"initial_ratio": {"hiden": 0.5}}}, "initial_ratio must name modules of the model, got hiden"),
        ({"growth": {"statistics": "max"}}, "key of growth must be a known name, got 'statistics'"),
        ({"growth": {"absolute": "no"}}, "absolute must be True or False, got 'no'"),
        ({"growth": {"diagonal": 1}}, "diagonal must be True or False, got 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            SubclusterPruner(toy_model(), config, calibration=[toy_images()], **knobs)


def test_rounding_up_splits_further():
    model, data = net()
    free = SubclusterPruner(model, [HIDDEN], calibration=[data], energy=0.8)
    count = int(run(free).sum())
    pruner = SubclusterPruner(model, [HIDDEN], calibration=[data], energy=0.8, round_to=count + 3)
    assert run(pruner).sum() == count + 3 == len(pruner.trees["0.weight"].leaves)


def test_compensation_takes_the_survivors():
    model, data = net()
    with torch.no_grad():
        model[0].weight[30:] = model[0].weight[:30]
        model[0].bias[30:] = model[0].bias[:30]
    wanted = model(data)
    pruner = SubclusterPruner(model, [{**HIDDEN, "sparse_threshold": 0.0}], calibration=[data])
    _, masks = pruner.compress()
    pruner.unwrap_model()
    assert masks["0"]["bias"].sum() <= 30
    updated = nni_topo.compensate(model, masks, [data], method=nni_topo.recovery.Pair(pruner.pairs))
    torch.testing.assert_close(masked_model(updated, data, masks)(data), wanted, atol=1e-4, rtol=1e-4)
