from __future__ import annotations

import copy

import pytest
import torch
from every_sample import compensate, compensation
from speedup_nets import filter_mask
from tied_nets import LanguageModel, Rotation, TiedConvolutions, TiedNorms
from torch import nn

from nni_topo import to_dense
from nni_topo.recovery.registry import list_recoveries
from nni_topo.sharing import find_ties
from nni_topo.speedup import masked_model


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(8, bias=False), nn.LayerNorm(8), nn.GroupNorm(2, 8)], ids=["no bias", "layer", "group"]
)
def test_norms_count_removed_channels_as_in_the_dense_model(norm):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), norm, nn.Linear(8, 3)).double().eval()
    inputs = torch.randn(80, 5, dtype=torch.float64)
    masks = {"0": {"weight": torch.tensor([1.0, 1, 1, 0, 1, 1, 0, 1], dtype=torch.float64)[:, None]}}
    found = compensation(net, masks, [inputs])
    expected, dense = net(inputs).detach(), to_dense(found.model, inputs[:2], masks, check=False)(inputs).detach()
    variance = (expected - expected.mean(0)).square().sum()
    last = found.report.layers[-1]
    assert float((dense - expected).square().sum() / variance) == pytest.approx(last.error_after, rel=1e-6)
    assert last.error_after < last.error_before


def test_a_batch_norm_without_parameters_is_solved_through():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4, affine=False), nn.ReLU(),
        nn.Flatten(), nn.Linear(16, 2),
    ).double().eval()  # fmt: skip
    net[2].running_var.uniform_(0.5, 2.0)
    with torch.no_grad():
        net[0].weight[3], net[0].bias[3] = 2.0 * net[0].weight[0], 2.0 * net[0].bias[0]
    images = torch.randn(40, 3, 2, 2, dtype=torch.float64)
    masks = {"0": {"weight": torch.tensor([1.0, 1, 1, 0], dtype=torch.float64)[:, None, None, None]}}
    found = compensation(net, masks, [images])
    assert found.report.layers[0].layer == "1"
    dense = to_dense(found.model, images[:2], masks)
    torch.testing.assert_close(dense(images), net(images), rtol=1e-6, atol=1e-6)


IMAGES = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(0, 11, (32, 5), generator=torch.Generator().manual_seed(0))


def distance(model, other, inputs):
    """Squared distance of outputs as a share of the first one's variance."""
    with torch.no_grad():
        expected, found = model.eval()(inputs), other.eval()(inputs)
    return float((expected - found).square().sum() / (expected - expected.mean(0)).square().sum())


class Turned(nn.Module):
    """Two layers around a rotation, a constant of the forward and a mask that is a buffer."""

    def __init__(self, persistent):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.rotation, self.second = nn.Linear(6, 10), Rotation(10), nn.Linear(10, 4)
        self.register_buffer("mask", torch.tensor([1.0, 0.5, 2.0, 1.0]), persistent=persistent)

    def forward(self, x):
        frequencies = self.rotation.frequencies
        return self.second(torch.relu(self.rotation(self.first(x))) * frequencies) * self.mask + torch.tensor(0.5)


@pytest.mark.parametrize("method", list_recoveries())
@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.quick_every(24)
def test_buffers_that_no_state_dict_holds(method, persistent):
    inputs = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
    model = Turned(persistent).eval()
    masks = {"first": filter_mask(model.first, [0, 2, 4, 6])}
    before = copy.deepcopy(model)
    repaired = compensate(model, masks, [inputs], method=method)
    assert torch.equal(repaired.rotation.frequencies, before.rotation.frequencies)
    assert torch.equal(model(inputs), before(inputs))
    dense = to_dense(repaired, inputs[:2], masks)
    shipped = distance(model, masked_model(model, inputs[:2], masks), inputs)
    assert dense.second.in_features == 6
    # Without batch norms there is nothing to recalibrate, and a pair gains little on random weights.
    least = 0.9 if method == "reconstruct" else 1.0 + 1e-6
    assert distance(model, dense, inputs) < least * shipped


@pytest.mark.parametrize("head", ["tied", "functional", "free"])
def test_language_models(head):
    model = LanguageModel(head).eval()
    masks = {"up": filter_mask(model.up, [0, 2, 4, 6, 8])}
    found = compensation(model, masks, TOKENS.split(8))
    shipped = distance(model, masked_model(model, TOKENS[:2], masks), TOKENS)
    assert distance(model, to_dense(found.model, TOKENS[:2], masks), TOKENS) < 0.9 * shipped
    assert find_ties(found.model) == find_ties(model)


@pytest.mark.parametrize("make", [TiedConvolutions, TiedNorms])
@pytest.mark.parametrize("names", [["one"], ["two"], ["one", "two"]])
@pytest.mark.quick_every(2)
def test_layers_of_one_weight(make, names):
    model = make().eval()
    masks = {name: filter_mask(model.get_submodule(name), [1, 4]) for name in names}
    found = compensation(model, masks, IMAGES.split(8))
    assert find_ties(found.model) == find_ties(model)
    shipped = distance(model, masked_model(model, IMAGES[:2], masks), IMAGES)
    assert distance(model, to_dense(found.model, IMAGES[:2], masks), IMAGES) <= shipped
