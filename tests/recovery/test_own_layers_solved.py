"""Layers with a forward of their own are solved, and chosen by, what enters their convolution."""

from __future__ import annotations

import pytest
import torch
from every_sample import compensation
from nni.compression.base.setting import PruningSetting
from own_layers import COMPUTED, GOING_ON, KINDS, Alike, Framed, make
from torch import nn

import nni_topo
from nni_topo.network.layers.derived import call_of
from nni_topo.network.layers.kinds import by_output
from nni_topo.recovery.samples import input_rows

HALF = [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.5}]


def images(count=64, side=13, seed=0):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def twins(name):
    """Make two layers of a kind of which the first has each channel twice, once times 2, and masks for one of each."""
    torch.manual_seed(0)
    kind = KINDS[name]
    model = nn.Sequential(kind(3, 8, 3), nn.ReLU(), kind(8, 6, 5, 2), nn.ReLU(), nn.Conv2d(6, 4, 1)).eval()
    first = model[0]
    with torch.no_grad():
        first.weight[4:] = first.weight[:4]
        first.bias[4:] = first.bias[:4]
        if name not in COMPUTED and name not in GOING_ON:
            first.weight[4:] *= 2
            first.bias[4:] *= 2
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.fill_(0.5)
    mask = torch.ones_like(first.weight)
    mask[4:] = 0
    return model, {"0": {"weight": mask}}


@pytest.mark.parametrize("name", sorted(KINDS))
@pytest.mark.quick_every(3)
def test_a_layer_behind_channels_that_others_repeat_makes_up_for_them_all(name):
    model, masks = twins(name)
    found = compensation(model, masks, [images()], ridge=1e-10)
    assert found.report.left_alone == {}
    assert [layer.layer for layer in found.report.layers][:1] == ["2"]
    dense = nni_topo.to_dense(found.model, images(2), masks)
    assert dense[0].weight.shape[0] == 4
    with torch.no_grad():
        for side in (13, 16):
            wanted = model(images(4, side, seed=1))
            assert (dense(images(4, side, seed=1)) - wanted).abs().max() <= 2e-3 * wanted.abs().max()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.quick_every(6)
def test_no_layer_is_left_alone_for_its_class(name):
    model = make(name)
    groups = nni_topo.dependency_groups(model, images(2), HALF)
    pruner = nni_topo.create_pruner("l1", model, groups)
    masks = pruner.compress()[1]
    pruner.unwrap_model()
    found = compensation(model, masks, [images(16)])
    assert found.report.left_alone == {}
    names = {name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    assert {layer.layer for layer in found.report.layers} == names - {"stem"}
    assert all(layer.error_after <= layer.error_before for layer in found.report.layers)


@pytest.mark.parametrize("name", ["alike", "mirrored", "activated", "standardized"])
def test_least_squares_choose_one_of_each_pair(name, monkeypatch):
    model, _ = twins(name)
    # A pruner takes layers of derived classes without dependency groups, which tell NNI of the class as well.
    monkeypatch.delitem(PruningSetting.registry, type(model[0]).__name__, raising=False)
    pruner = nni_topo.create_pruner(
        "reconstruction", model, [{"op_names": ["0"], "sparse_ratio": 0.5}], calibration=[images()]
    )
    mask = pruner.compress()[1]["0"]["weight"].flatten(1).amax(1)
    assert torch.equal(mask[:4] + mask[4:], torch.ones(4))


class Spread(nn.ConvTranspose2d):
    """It puts a border around what it spreads, and more at the end than its attributes say."""

    def forward(self, x):
        x = torch.nn.functional.pad(x, [1] * 4, mode="replicate")
        return torch.nn.functional.conv_transpose2d(x, self.weight, self.bias, self.stride, 2, (1, 0), self.groups)


@pytest.mark.parametrize("kind", [Alike, Framed, Spread])
def test_samples_are_of_what_enters_the_convolution(kind):
    torch.manual_seed(0)
    layer, x = kind(4, 2, 5, 2), torch.randn(3, 4, 9, 9)
    with torch.no_grad():
        call, given = call_of(layer, x), layer(x)
        assert call.output_size == given.shape[2:]
        positions = torch.arange(given[0, 0].numel()).expand(3, -1)
        rows = input_rows(layer, x, torch.arange(4)[None], positions, given.shape)
        found = rows[0] @ by_output(layer.weight, layer).flatten(1).T + layer.bias
        torch.testing.assert_close(found, given.flatten(2).transpose(1, 2).flatten(0, 1))
