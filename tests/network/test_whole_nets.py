"""Networks with modules that read all channels at once, and with computed weights, that lose half of their channels."""

from __future__ import annotations

import copy

import pytest
import torch
import whole_nets
from speedup_nets import filter_mask, masks_of
from torch import nn
from whole_nets import NETS, Gate, Standardized, make

import nni_topo
from nni_topo.network.layers.derived import PaddedAlike
from nni_topo.network.speedup.equivalence import masked_model

IMAGES = torch.rand(2, 3, 13, 13, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
HALF = [{"op_types": ["Conv1d", "Conv2d", "Linear"], "sparse_ratio": 0.5}]


def pruned(model, ratio=0.5):
    groups = nni_topo.dependency_groups(model, IMAGES, [{**HALF[0], "sparse_ratio": ratio}])
    masks = masks_of(nni_topo.RandomPruner(model, groups, seed=1))
    return groups, masks, nni_topo.to_dense(model, IMAGES, masks)


def widths(model):
    """Output channels of all layers but the head and what goes along channels."""
    layers = [each for each in model.modules() if isinstance(each, (nn.Conv2d, nn.Linear))][:-1]
    return [len(each.weight) for each in layers]


@pytest.mark.parametrize("name", NETS)
@pytest.mark.quick_every(4)
def test_half_of_the_channels_go_and_the_dense_model_computes_what_is_left(name):
    model = make(name)
    groups, masks, dense = pruned(model)
    assert [2 * width for width in widths(dense)] == widths(model)
    assert not dense.report.kept
    assert {why for why in groups.skipped.values() if "output" not in why} <= {
        "it is a convolution along the channels of another layer"
    }
    for before, after in zip(model.modules(), dense.modules(), strict=True):
        assert type(after) is type(before) or isinstance(before, Standardized)
    with torch.no_grad():
        found, whole = dense(IMAGES), model(IMAGES)
        torch.testing.assert_close(found, masked_model(model, IMAGES, masks)(IMAGES), rtol=1e-12, atol=1e-12)
    assert (found - whole).abs().max() > 1e-3


@pytest.mark.parametrize("name", NETS)
@pytest.mark.quick_every(7)
def test_a_dense_model_is_pruned_again_saved_loaded_and_trained(name, tmp_path):
    model = make(name)
    once = pruned(model, ratio=0.25)[2]
    dense = pruned(once)[2]
    assert all(width < first for width, first in zip(widths(dense), widths(once), strict=True))
    with torch.no_grad():
        expected = dense(IMAGES)
        for path in (tmp_path / "dense.pt", tmp_path / "dense.safetensors"):
            nni_topo.save(dense, path)
            again = nni_topo.load(path, lambda: make(name))
            assert torch.equal(again(IMAGES), expected)
            assert [type(each) for each in again.modules()] == [type(each) for each in dense.modules()]
    dense.train()(IMAGES).square().sum().backward()
    assert all(each.grad is not None and bool(each.grad.isfinite().all()) for each in dense.parameters())


def test_a_convolution_along_channels_joins_those_that_are_left():
    model = nn.Sequential(nn.Conv2d(3, 6, 1), Gate(3), nn.Conv2d(6, 2, 1)).double().eval()
    dense = nni_topo.to_dense(model, IMAGES, {"0": filter_mask(model[0], [1, 2, 5])})
    assert type(dense[1].conv) is nn.Conv1d
    assert torch.equal(dense[1].conv.weight, model[1].conv.weight)
    # Channel 3 has had neighbours 2 and 4. It has 0 and 4 now.
    x = model[0](IMAGES)[:, [0, 3, 4]]
    (left, at, right), means = model[1].conv.weight.flatten(), x.mean((2, 3))
    gate = (left * means[:, 0] + at * means[:, 1] + right * means[:, 2]).sigmoid()
    torch.testing.assert_close(dense[1](dense[0](IMAGES))[:, 1], x[:, 1] * gate[:, None, None])


def test_layers_lose_channels_before_a_gate_with_a_hidden_layer():
    model = whole_nets._eca(Gate(3, bias=True, hidden=3)).eval()
    model[2].body[3].last = nn.Conv1d(3, 1, 3, padding=1)
    groups = nni_topo.dependency_groups(model.double(), IMAGES, HALF)
    assert not {"0", "2.body.0"} & groups.skipped.keys()
    masks = {"2.body.0": filter_mask(model[2].body[0], range(0, 16, 3))}
    dense = nni_topo.to_dense(model, IMAGES, masks)
    assert dense[2].body[0].out_channels == 10
    with torch.no_grad():
        torch.testing.assert_close(dense(IMAGES), masked_model(model, IMAGES, masks)(IMAGES), rtol=1e-12, atol=1e-12)


def test_computed_weights_become_the_layers_own():
    model = make("standardized")
    dense = pruned(model)[2]
    assert not any(isinstance(each, Standardized) for each in dense.modules())
    assert {name for name, _ in dense.named_parameters() if name.startswith("0.")} == {"0.weight", "0.bias"}
    alike = pruned(make("standardized_alike"))[2]
    assert {type(each) for each in alike.modules() if isinstance(each, nn.Conv2d)} == {nn.Conv2d, PaddedAlike}


class Normed(nn.Module):
    """Layers whose weights norms of both kinds compute, by hooks and by parametrizations."""

    def __init__(self):
        super().__init__()
        make = (
            nn.utils.weight_norm, nn.utils.spectral_norm,
            nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm,
        )  # fmt: skip
        self.layers = nn.ModuleList(
            norm(nn.Conv2d(3 if at == 0 else 8, 8, 3, padding=1)) for at, norm in enumerate(make)
        )
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).relu()
        return self.head(x.mean((2, 3)))


def test_layers_with_norms_of_weights_are_plain_ones_that_lose_channels():
    torch.manual_seed(0)
    model = Normed().double()
    model(IMAGES[:, :3]).sum().backward()  # weights have a history now, and copies of them none
    before = copy.deepcopy({name: value.detach() for name, value in model.state_dict().items()})
    plain = nni_topo.as_torch_layers(model)
    assert plain.training
    assert {type(layer) for layer in plain.layers} == {nn.Conv2d}
    assert [name for name, _ in plain.layers[0].named_parameters()] == ["bias", "weight"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model, plain = model.eval(), plain.eval()
    torch.testing.assert_close(plain(IMAGES), model(IMAGES))
    groups = nni_topo.dependency_groups(plain, IMAGES, HALF)
    assert groups.skipped.keys() == {"head"}
    masks = nni_topo.create_pruner("l1", copy.deepcopy(plain), list(groups)).compress()[1]
    dense = nni_topo.to_dense(plain, IMAGES, masks)
    assert [layer.out_channels for layer in dense.layers] == [4, 4, 4, 4]
    skipped = nni_topo.dependency_groups(model, IMAGES, HALF).skipped
    assert "nni_topo.as_torch_layers(model) makes plain layers that compute the same" in skipped["layers.0"]
