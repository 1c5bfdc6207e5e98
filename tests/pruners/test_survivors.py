from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from nni_topo.errors import ConfigError
from nni_topo.pruners.clouds.features import FeatureCollector
from nni_topo.pruners.cluster import best_of, survivor_scores
from nni_topo.pruners.random import RandomPruner
from nni_topo.testing import toy_images, toy_model


def scored(rules, model=None, names=("hidden",), closeness=None, seed=0, group=None):
    model = toy_model() if model is None else model
    config = [{"op_names": list(names), "sparse_ratio": 0.5}]
    if group is not None:
        config[0]["dependency_group_id"] = group
    context = RandomPruner(model, config).context
    collector = FeatureCollector([toy_images(4)])
    collector.collect(context)
    (unit,) = context.units
    closeness = np.zeros(unit.blocks) if closeness is None else closeness
    generator = np.random.default_rng(seed)
    return survivor_scores(rules, unit, context, collector.network, closeness, generator)


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


def test_random_follows_the_seed():
    np.testing.assert_array_equal(scored(("random",), seed=1), scored(("random",), seed=1))
    assert not np.array_equal(scored(("random",), seed=1), scored(("random",), seed=2))


def test_several_rules_average_ranks():
    closeness = -np.arange(16.0)
    found = scored(("center", "bias"), closeness=closeness)
    ranks = [np.argsort(np.argsort(each)) + 1 for each in (closeness, toy_model().hidden.bias.detach().numpy())]
    np.testing.assert_allclose(found, np.mean(ranks, axis=0))


def test_the_best_of_each_cluster_and_the_first_of_equals():
    labels, scores = np.array([0, 1, 0, 1, -1, 2]), np.array([1.0, 5.0, 3.0, 5.0, 9.0, 0.0])
    assert best_of(labels, scores).tolist() == [2, 1, 2, 1, -1, 5]


def test_a_bias_that_is_not_there():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 6, bias=False), nn.ReLU(), nn.Linear(6, 2))
    with pytest.raises(ConfigError, match=r"survivor 'bias' needs a bias or a batch norm, got neither \(1.weight\)"):
        scored(("bias",), model, ("1",))
