from __future__ import annotations

import pytest
import torch
from torch import nn

from nni_topo import dependency_groups
from nni_topo.errors import ConfigError
from nni_topo.pruners.clouds.coupled import CoupledWeightCollector
from nni_topo.pruners.random import RandomPruner
from nni_topo.pruners.topological import TopologicalPruner
from nni_topo.testing import toy_images, toy_model


def clouds_of(model, config_list, images):
    pruner = RandomPruner(model, config_list)
    data = CoupledWeightCollector(images).collect(pruner.context)
    pruner.unwrap_model()
    return data


def test_weights_times_norm_scale_times_how_they_are_read():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3)).eval()
    with torch.no_grad():
        model[1].weight.uniform_(-2, 2)
        model[1].running_var.uniform_(0.5, 2)
    found = clouds_of(model, [{"op_names": ["0"], "sparse_ratio": 0.5}], toy_images(2))["0"]["weight"]
    scale = model[1].weight.detach().double().abs() / (model[1].running_var.double() + model[1].eps).sqrt()
    read = model[3].weight.detach().double().pow(2).sum((0, 2, 3)).sqrt()
    expected = model[0].weight.detach().double().flatten(1) * (scale * read)[:, None]
    torch.testing.assert_close(found, expected)


def test_in_a_group_each_member_has_its_own_norm_and_all_readers_count():
    model = toy_model()
    with torch.no_grad():
        model.norm.weight.uniform_(1, 3)
    config = dependency_groups(model, toy_images(2), [{"op_names": ["stem", "inner"], "sparse_ratio": 0.5}])
    data = clouds_of(model, config, toy_images(2))
    inner, hidden = model.inner.weight.detach().double(), model.hidden.weight.detach().double()
    read = (inner.pow(2).sum((0, 2, 3)) + hidden.pow(2).sum(0)).sqrt()
    scale = model.norm.weight.detach().double() / (model.norm.running_var.double() + model.norm.eps).sqrt()
    stem = model.stem.weight.detach().double().flatten(1) * (scale * read)[:, None]
    torch.testing.assert_close(data["stem"]["weight"], stem)
    torch.testing.assert_close(data["inner"]["weight"], inner.flatten(1) * read[:, None])


def test_a_neuron_that_nobody_reads_goes_first():
    model = toy_model()
    with torch.no_grad():
        model.head.weight[:, 3] = 0.0
        model.hidden.weight[3] *= 100.0
    config = [{"op_names": ["hidden"], "sparse_ratio": 0.1}]
    pruner = TopologicalPruner(model, config, cloud="coupled", example_inputs=toy_images(2))
    _, masks = pruner.compress()
    assert masks["hidden"]["bias"].tolist() == [float(index != 3) for index in range(16)]


def test_it_needs_example_inputs():
    with pytest.raises(ConfigError, match="'coupled' needs example_inputs"):
        TopologicalPruner(toy_model(), [{"op_names": ["hidden"], "sparse_ratio": 0.5}], cloud="coupled")
