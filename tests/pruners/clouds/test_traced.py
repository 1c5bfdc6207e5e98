from __future__ import annotations

import pytest
import torch
from torch import nn

from nni_topo import dependency_groups
from nni_topo.errors import ConfigError, DataError
from nni_topo.hooks import FoldedWeightCollector
from nni_topo.pruners.clouds.traced import CoupledWeightCollector
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


def folded_clouds(model, config_list, images):
    pruner = RandomPruner(model, config_list)
    try:
        return FoldedWeightCollector(images).collect(pruner.context)
    finally:
        pruner.unwrap_model()


def normed(bias=True):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, bias=bias), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3))
    with torch.no_grad():
        model[1].weight.uniform_(-2, 2)
        model[1].bias.normal_()
        model[1].running_mean.normal_()
        model[1].running_var.uniform_(0.5, 2)
    return model.eval().double()


CONV = [{"op_names": ["0"], "sparse_ratio": 0.5}]


@pytest.mark.parametrize("bias", [True, False])
def test_a_point_is_the_affine_map_of_filter_and_norm(bias):
    model, images = normed(bias), toy_images(2).double()
    cloud = folded_clouds(model, CONV, images)["0"]["weight"]
    folded = nn.functional.conv2d(images, cloud[:, :-1].reshape(6, 3, 3, 3), cloud[:, -1])
    torch.testing.assert_close(folded, model[1](model[0](images)))


def test_without_a_norm_it_is_weight_and_bias():
    model = toy_model()
    cloud = folded_clouds(model, [{"op_names": ["hidden"], "sparse_ratio": 0.5}], toy_images(2))["hidden"]["weight"]
    expected = torch.cat([model.hidden.weight, model.hidden.bias[:, None]], 1).detach().double()
    assert torch.equal(cloud, expected)


def test_a_bias_counts_also_where_only_the_weight_is_pruned():
    model, images = normed(), toy_images(2).double()
    alone = folded_clouds(model, [{**CONV[0], "target_names": ["weight"]}], images)["0"]["weight"]
    assert torch.equal(alone, folded_clouds(model, CONV, images)["0"]["weight"])
    assert alone[:, -1].any()


def test_a_norm_without_affine_parameters_is_folded_and_one_without_statistics_is_not():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, affine=False), nn.ReLU(), nn.Conv2d(6, 4, 3)).eval()
    model[1].running_var.fill_(4.0)
    cloud = folded_clouds(model, CONV, toy_images(2))["0"]["weight"]
    half = model[0].weight.detach().double().flatten(1) * (4.0 + model[1].eps) ** -0.5
    torch.testing.assert_close(cloud[:, :-1], half)
    model[1] = nn.BatchNorm2d(6, track_running_stats=False)
    cloud = folded_clouds(model, CONV, toy_images(2))["0"]["weight"]
    assert torch.equal(cloud[:, :-1], model[0].weight.detach().double().flatten(1))


def test_each_member_of_a_group_has_its_own_norm():
    model = toy_model()
    with torch.no_grad():
        model.norm.weight.uniform_(1, 3)
    config = dependency_groups(model, toy_images(2), [{"op_names": ["stem", "inner"], "sparse_ratio": 0.5}])
    data = folded_clouds(model, config, toy_images(2))
    scale = model.norm.weight.detach().double() / (model.norm.running_var.double() + model.norm.eps).sqrt()
    stem = torch.cat([model.stem.weight.flatten(1), model.stem.bias[:, None]], 1).detach().double() * scale[:, None]
    torch.testing.assert_close(data["stem"]["weight"], stem)
    inner = torch.cat([model.inner.weight.flatten(1), model.inner.bias[:, None]], 1).detach().double()
    torch.testing.assert_close(data["inner"]["weight"], inner)


def test_the_pruner_drops_what_the_norm_silences():
    model = normed().float()
    with torch.no_grad():
        model[1].weight[2] = model[1].bias[2] = 0.0
        model[0].weight[2] *= 100.0
    pruner = TopologicalPruner(
        model, [{"op_names": ["0"], "sparse_ratio": 0.2}], cloud="folded", example_inputs=toy_images(2)
    )
    _, masks = pruner.compress()
    assert masks["0"]["bias"].tolist() == [1.0, 1.0, 0.0, 1.0, 1.0, 1.0]


def test_bad_statistics_and_other_granularities_are_refused():
    for attribute in ("running_var", "running_mean"):  # of which the scale, and the offset alone, is made
        model = normed().float()
        getattr(model[1], attribute)[0] = float("nan")
        with pytest.raises(DataError, match=r"batch norms must be finite.*\(0\)"):
            folded_clouds(model, CONV, toy_images(2))
    config = [{"op_names": ["0"], "sparse_ratio": 0.5, "granularity": "in_channel"}]
    with pytest.raises(ConfigError, match=r"by output channel.*\(0\.weight\)"):
        folded_clouds(normed().float(), config, toy_images(2))
