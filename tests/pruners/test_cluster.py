from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import nni_topo
from nni_topo.clustering import ALGORITHMS
from nni_topo.errors import ConfigError, DataError
from nni_topo.pruners.clouds.features import FeatureCollector
from nni_topo.pruners.cluster import ClusterPruner, best_of, survivor_scores
from nni_topo.pruners.random import RandomPruner
from nni_topo.testing import toy_images, toy_model

HIDDEN = {"op_names": ["0"]}


def families(copies: int = 3, kinds: int = 4) -> tuple[nn.Sequential, torch.Tensor]:
    """A layer whose neurons are ``kinds`` families of ``copies`` near copies, and data for it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, kinds * copies), nn.ReLU(), nn.Linear(kinds * copies, 3))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(kinds, 5).repeat(copies, 1))
        model[0].weight.add_(1e-3 * torch.randn_like(model[0].weight))
        model[0].bias.copy_(0.1 * torch.arange(kinds * copies))
    return model, torch.randn(64, 5)


def kept(pruner, name="0"):
    _, masks = pruner.compress()
    pruner.unwrap_model()
    return masks[name]["weight"].flatten(1)[:, 0].numpy() > 0


# The graphs of spectral clustering join these families: they are smaller than k, and unequally far apart.
@pytest.mark.parametrize("algorithm", [each for each in ALGORITHMS if each != "spectral"])
def test_one_of_each_family_stays(algorithm):
    model, data = families()
    with torch.no_grad():
        model[0].bias.zero_()
    config = [{**HIDDEN, "sparse_ratio": 2 / 3}]
    found = kept(ClusterPruner(model, config, calibration=[data], algorithm=algorithm))
    assert sorted(np.flatnonzero(found) % 4) == [0, 1, 2, 3]


def test_the_survivor_is_the_one_asked_for():
    model, data = families()
    config = [{**HIDDEN, "sparse_ratio": 2 / 3}]
    with torch.no_grad():
        model[0].bias.copy_(1e-4 * torch.arange(12))

    def survivors(rule):
        return np.flatnonzero(kept(ClusterPruner(model, config, calibration=[data], survivor=rule))).tolist()

    assert survivors("bias") == [8, 9, 10, 11]
    with torch.no_grad():
        model[0].bias.mul_(-1)
    assert survivors("bias") == [0, 1, 2, 3]
    assert survivors("bias_norm") == [8, 9, 10, 11]
    with torch.no_grad():
        model[2].weight[:, 4:8] *= 10
    assert survivors("weight") == [4, 5, 6, 7]


def test_pairs_name_a_survivor_of_the_same_family():
    model, data = families()
    with torch.no_grad():
        model[0].bias.zero_()
    pruner = ClusterPruner(model, [{**HIDDEN, "sparse_ratio": 2 / 3}], calibration=[data])
    stays = kept(pruner)
    assert sorted(pruner.pairs["0"]) == np.flatnonzero(~stays).tolist()
    assert all(stays[survivor] and survivor % 4 == gone % 4 for gone, survivor in pruner.pairs["0"].items())


def test_dead_neurons_go_beyond_the_ratio_and_stop_at_the_maximum():
    model, data = families()
    with torch.no_grad():
        model[0].bias[:9] = -1e3
    pruner = ClusterPruner(model, [{**HIDDEN, "sparse_ratio": 0.25}], calibration=[data])
    assert np.flatnonzero(kept(pruner)).tolist() == [9, 10, 11]
    capped = [{**HIDDEN, "sparse_ratio": 0.25, "max_sparse_ratio": 0.5}]
    found = kept(ClusterPruner(model, capped, calibration=[data]))
    assert found.sum() == 6
    assert found[9:].all()
    assert kept(ClusterPruner(model, [{**HIDDEN, "sparse_ratio": 0.0}], calibration=[data])).all()


def test_a_layer_that_is_all_dead_keeps_one():
    model, data = families()
    with torch.no_grad():
        model[0].bias.fill_(-1e3)
    assert kept(ClusterPruner(model, [{**HIDDEN, "sparse_ratio": 0.5}], calibration=[data])).sum() == 1


def test_of_every_cluster_the_neuron_nearest_to_its_mean_survives():
    model = nn.Sequential(nn.Linear(1, 6), nn.ReLU(), nn.Linear(6, 2))
    with torch.no_grad():
        model[0].weight[:, 0] = torch.tensor([1.0, 1.1, 1.5, 5.0, 5.1, 5.6])  # means 1.2 and 5.23
        model[0].bias.zero_()
    data = torch.linspace(0.1, 1, 32)[:, None]
    pruner = ClusterPruner(model, [{**HIDDEN, "sparse_ratio": 0.67}], calibration=[data], survivor="center")
    assert kept(pruner).tolist() == [False, True, False, False, True, False]


def test_a_threshold_on_merging_distances():
    model, data = families()
    with torch.no_grad():
        model[0].bias.zero_()
    counts = [
        int(kept(ClusterPruner(model, [{**HIDDEN, "sparse_threshold": t}], calibration=[data], algorithm="ward")).sum())
        for t in (0.0, 0.1, 1e9)
    ]
    assert counts == [12, 4, 1]


def test_groups_of_convolutions_lose_equal_shares():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 1, groups=2), nn.ReLU(), nn.Conv2d(16, 2, 1))
    config = [{"op_names": ["2"], "sparse_ratio": 0.5, "internal_metric_block": 2}]
    found = kept(ClusterPruner(model, config, calibration=[torch.randn(8, 4, 6, 6)]), "2")
    assert found[:8].sum() == found[8:].sum() == 4


def test_constant_features_are_refused():
    model, data = families()
    pruner = ClusterPruner(model, [{**HIDDEN, "sparse_ratio": 0.5}], calibration=[torch.ones(8, 5)])
    with pytest.raises(DataError, match=r"features must vary over the calibration samples.*\(0.weight\)"):
        pruner.compress()
    with pytest.raises(DataError, match="at least two samples"):
        ClusterPruner(families()[0], [{**HIDDEN, "sparse_ratio": 0.5}], calibration=[data[:1]]).compress()


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions_lose_output_channels(groups):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ConvTranspose2d(4, 6, 2, groups=groups), nn.Conv2d(6, 2, 1)).eval()
    images = torch.randn(8, 1, 6, 6)
    weight = model[1].weight.detach()
    strength = weight.unflatten(0, (groups, -1)).abs().sum((1, 3, 4)).flatten() + model[2].weight.abs().sum((0, 2, 3))
    config = [{"op_names": ["1"], "sparse_ratio": 0.34 if groups == 1 else 0.67}]
    pruner = ClusterPruner(model, config, calibration=[images], survivor="weight")
    _, masks = pruner.compress()
    pruner.unwrap_model()
    model = nni_topo.compensate(model, masks, [images], method=nni_topo.recovery.Pair(pruner.pairs))
    kept = masks["1"]["bias"] > 0
    assert kept.sum() == (4 if groups == 1 else 2)
    pairs = pruner.pairs["1"]
    assert all(strength[stays] >= strength[gone] for gone, stays in pairs.items())
    assert set(pairs) == set((~kept).nonzero().flatten().tolist())
    nni_topo.to_dense(model, images[:2], masks)


def test_both_calls_of_a_shared_layer_count():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.out = nn.Linear(4, 8), nn.Linear(16, 2)

        def forward(self, inputs):
            return self.out(torch.cat([self.fc(inputs).relu(), self.fc(-inputs).relu()], 1))

    torch.manual_seed(0)
    model = Twice()
    with torch.no_grad():
        model.fc.weight.copy_(torch.randn(8, 4).abs())
        model.fc.bias.zero_()
        model.fc.weight[:3] *= -1
        model.fc.weight[7] = 0
    config = [{"op_names": ["fc"], "sparse_ratio": 0.125}]
    found = kept(ClusterPruner(model, config, calibration=[torch.rand(100, 4)]), "fc")
    assert found.tolist() == [True] * 7 + [False]


def test_the_nearest_to_the_centre_of_a_pair_is_no_matter_of_rounding():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 18), nn.ReLU(), nn.Linear(18, 2))
    data = torch.randn(200, 6)
    config = [{**HIDDEN, "sparse_ratio": 0.5}]
    found = [
        kept(ClusterPruner(copy.deepcopy(model), config, calibration=data.split(size), survivor="center")).tolist()
        for size in (200, 100, 50, 7)
    ]
    assert found[1:] == found[:1] * 3


def scored(rules, model=None, names=("hidden",), group=None):
    model = toy_model() if model is None else model
    config = [{"op_names": list(names), "sparse_ratio": 0.5}]
    if group is not None:
        config[0]["dependency_group_id"] = group
    context = RandomPruner(model, config).context
    collector = FeatureCollector([toy_images(4)])
    collector.collect(context)
    (unit,) = context.units
    # one cluster of points on a line
    points, labels = np.arange(float(unit.blocks))[:, None] ** 2, np.zeros(unit.blocks, dtype=np.intp)
    return survivor_scores(rules, unit, context, collector.network, points, labels, np.random.default_rng(0))


def test_weight_is_the_sum_of_absolute_weights_on_both_sides():
    model = toy_model()
    expected = model.hidden.weight.abs().sum(1) + model.head.weight.abs().sum(0)
    np.testing.assert_allclose(scored(("weight",)), expected.detach().numpy(), rtol=1e-6)


def test_weights_of_a_group_are_summed_over_members_and_readers():
    model = toy_model()
    incoming = model.stem.weight.abs().sum((1, 2, 3)) + model.inner.weight.abs().sum((1, 2, 3))
    outgoing = model.inner.weight.abs().sum((0, 2, 3)) + model.hidden.weight.abs().sum(0)
    found = scored(("weight",), names=("stem", "inner"), group="residual")
    np.testing.assert_allclose(found, (incoming + outgoing).detach().numpy(), rtol=1e-6)


def test_bias_keeps_its_sign_and_its_norm_does_not():
    bias = toy_model().hidden.bias.detach().numpy()
    np.testing.assert_allclose(scored(("bias",)), bias)
    np.testing.assert_allclose(scored(("bias_norm",)), np.abs(bias))


def test_a_batch_norm_is_part_of_the_bias():
    model = toy_model().eval()
    with torch.no_grad():
        model.norm.running_mean.uniform_(-1, 1)
        model.norm.running_var.uniform_(0.5, 2)
        model.norm.weight.uniform_(0.5, 2)
        model.norm.bias.uniform_(-1, 1)
        model.stem.weight.zero_()
        constant = model.norm(model.stem(torch.zeros(1, 3, 8, 8)))[0, :, 0, 0]
    # A constant is the difference of numbers up to 2, and may be far smaller than what they are rounded by.
    np.testing.assert_allclose(scored(("bias",), model, ("stem",)), constant.numpy(), rtol=0, atol=1e-6)


def test_several_rules_average_ranks():
    points = np.arange(16.0) ** 2
    closeness, bias = -np.abs(points - points.mean()), toy_model().hidden.bias.detach().numpy()
    np.testing.assert_allclose(scored(("center",)), closeness)
    ranks = [np.argsort(np.argsort(each)) + 1 for each in (closeness, bias)]
    np.testing.assert_allclose(scored(("center", "bias")), np.mean(ranks, axis=0))


def test_the_best_of_each_cluster_and_the_first_of_equals():
    labels, scores = np.array([0, 1, 0, 1, -1, 2]), np.array([1.0, 5.0, 3.0, 5.0, 9.0, 0.0])
    assert best_of(labels, scores).tolist() == [2, 1, 2, 1, -1, 5]


def test_a_bias_that_is_not_there():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 6, bias=False), nn.ReLU(), nn.Linear(6, 2))
    with pytest.raises(ConfigError, match=r"survivor 'bias' needs a bias or a batch norm, got neither \(1.weight\)"):
        scored(("bias",), model, ("1",))
