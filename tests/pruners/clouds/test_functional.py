from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from nni_topo.errors import ConfigError
from nni_topo.pruners.clouds.functional import FunctionalCollector
from nni_topo.pruners.random import RandomPruner
from nni_topo.speedup import dependency_groups
from nni_topo.testing import toy_images, toy_model
from nni_topo.topology import pairwise_distances


def cloud_of(model, config_list, batches, name, **knobs):
    pruner = RandomPruner(model, config_list)
    data = FunctionalCollector(batches, **knobs).collect(pruner.context)
    pruner.unwrap_model()
    return data[name]["weight"].numpy(), data


def config(*names):
    return [{"op_names": list(names), "sparse_ratio": 0.5}]


def assert_same_cloud(found, rows):
    np.testing.assert_allclose(pairwise_distances(found), pairwise_distances(rows.numpy()), atol=1e-6)


def centred(rows, samples):
    rows = rows - rows.mean(-1, keepdim=True)
    return rows.flatten(1) / np.sqrt(samples)


def test_outputs_are_taken_behind_norm_activation_and_pooling():
    torch.manual_seed(0)
    front = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*front, nn.Conv2d(6, 4, 3, padding=1))
    model[1].running_mean.normal_()
    images = toy_images(10)
    found, _ = cloud_of(model, config("0"), list(images.split(4)), "0")
    with torch.no_grad():
        features = model.eval()[:4](images).movedim(1, 0).flatten(1).double()
    strength = model[4].weight.detach().double().pow(2).sum((0, 2, 3)).sqrt()
    assert_same_cloud(found, centred((features * strength[:, None])[:, None], features.shape[1]))


def test_a_linear_layer_behind_flattening_reads_every_place_by_weights_of_its_own():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, 7))
    images = toy_images(12)
    found, _ = cloud_of(model, config("0"), [images], "0")
    with torch.no_grad():
        features = model[:4](images).double()  # (n, 20), channel by channel
    strength = model[4].weight.detach().double().norm(dim=0)
    rows = (features * strength).T.reshape(5, 4, 12)
    assert_same_cloud(found, centred(rows, 12))


def test_all_readers_count_and_a_group_is_one_cloud():
    model = toy_model()
    images = toy_images(6)
    wanted = dependency_groups(model, images[:2], config("stem", "inner"))
    found, data = cloud_of(model, wanted, [images], "stem")
    assert data["inner"]["weight"].shape == (8, 0)
    with torch.no_grad():
        stem = torch.relu(model.norm.eval()(model.stem(images)))
        total = torch.relu(model.inner(stem) + stem).mean((2, 3))
    strength = model.inner.weight.double().pow(2).sum((0, 2, 3)).sqrt()
    by_inner = stem.movedim(1, 0).flatten(1).double() * strength[:, None]
    by_hidden = total.T.double() * model.hidden.weight.double().norm(dim=0)[:, None]
    rows = torch.cat(
        [centred(by_inner[:, None], by_inner.shape[1]), centred(by_hidden[:, None], by_hidden.shape[1])], dim=1
    )
    assert_same_cloud(found, rows.detach())


def test_a_silent_neuron_and_one_nobody_reads_lie_at_the_origin():
    model = toy_model()
    with torch.no_grad():
        model.hidden.weight[0] = 0.0
        model.hidden.bias[0] = 3.0
        model.head.weight[:, 5] = 0.0
    found, _ = cloud_of(model, config("hidden"), [toy_images(16)], "hidden")
    norms = np.linalg.norm(found, axis=1)
    assert norms[[0, 5]] == pytest.approx([0.0, 0.0], abs=1e-7)
    assert (np.delete(norms, [0, 5]) > 1e-4).sum() > 5


def test_grouped_and_transposed_readers():
    torch.manual_seed(2)
    for reader in (nn.Conv2d(6, 4, 3, groups=2), nn.ConvTranspose2d(6, 4, 3), nn.ConvTranspose2d(6, 4, 3, groups=2)):
        model = nn.Sequential(nn.Conv2d(3, 6, 1), reader)
        found, _ = cloud_of(model, config("0"), [toy_images(5)], "0")
        with torch.no_grad():
            features = model[0](toy_images(5))
            for channel in (0, 4):
                alone = torch.zeros_like(features)
                alone[:, channel] = features[:, channel]
                impulse = torch.zeros(1, 6, 3, 3)
                impulse[:, channel, 1, 1] = 1.0
                response = nn.functional.pad(impulse, (2, 2, 2, 2))
                bare = model[1](response) - model[1](torch.zeros_like(response))
                strength = float(bare.pow(2).sum().sqrt())
                expected = float(features[:, channel].double().std(correction=0)) * strength
                assert np.linalg.norm(found[channel]) == pytest.approx(expected, rel=1e-4)


def test_a_depthwise_convolution_passes_on_and_is_no_reader():
    torch.manual_seed(4)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 4, 1))
    images = toy_images(8)
    found, _ = cloud_of(model, config("0"), [images], "0")
    with torch.no_grad():
        features = model[:2](images).movedim(1, 0).flatten(1).double()
    strength = model[2].weight.detach().double().flatten(2).norm(dim=(0, 2))
    assert_same_cloud(found, centred((features * strength[:, None])[:, None], features.shape[1]))


def test_the_output_layer_has_no_reader():
    with pytest.raises(ConfigError, match=r"got none.*exclude.*\(head.weight\)"):
        cloud_of(toy_model(), config("head"), [toy_images(4)], "head")


class Halves(nn.Module):
    """One reader takes the first half of the channels, another one the second half, in two places."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.one, self.two = nn.Linear(3, 4), nn.Linear(2, 3), nn.Linear(4, 3)

    def forward(self, x):
        one, two = self.first(x).chunk(2, 1)
        return self.one(one) + self.two(torch.cat([two, two.relu()], 1))


def test_channels_that_go_different_ways_are_scored_by_the_layers_that_read_them():
    model, x = Halves().double().eval(), torch.randn(20, 3, dtype=torch.float64)
    found, _ = cloud_of(model, config("first"), [x[:8], x[8:]], "first")
    one, two = model.one.weight.detach().norm(dim=0), model.two.weight.detach().norm(dim=0)
    values = model.first(x).detach().T
    rows = torch.zeros(4, 3, 20, dtype=torch.float64)
    rows[:2, 0] = values[:2] * one[:, None]
    rows[2:, 1] = values[2:] * two[:2, None]
    rows[2:, 2] = values[2:].relu() * two[2:, None]
    assert_same_cloud(found, centred(rows, 20))


@pytest.mark.parametrize("part", [0, 1])
def test_a_layer_of_which_no_layer_reads_a_part_is_refused(part):
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(2, 3)

        def forward(self, x):
            halves = self.first(x).chunk(2, 1)
            return self.last(halves[part]) + halves[1 - part].abs().sum(1, keepdim=True)

    with pytest.raises(ConfigError, match=r"linear layers and convolutions that read all of them.*\(first"):
        cloud_of(Half(), config("first"), [torch.randn(6, 3)], "first")
