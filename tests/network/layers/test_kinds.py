"""Layers, norms and modules of somebody else's making."""

from __future__ import annotations

import copy

import pytest
import torch
from speedup_nets import filter_mask
from torch import nn
from transformers.pytorch_utils import Conv1D

import nni_topo
from nni_topo.network import register_module
from nni_topo.network.layers import kinds
from nni_topo.network.layers.kinds import RULES, through_norms, weights_left

CONVOLUTIONS = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]


class DividingConv(nn.Conv2d):
    """It divides by a mean over all inputs, removed ones too."""

    def forward(self, x):
        return super().forward(x) / (1 + x.mean(1, keepdim=True).abs())


class Gain(nn.Module):
    """One number a channel, applied in a loop over values that no tracer follows."""

    def __init__(self, channels):
        super().__init__()
        self.gains = nn.Parameter(torch.rand(channels) + 0.5)

    def forward(self, images):
        return torch.stack([image * self.gains[:, None, None] for image in images if float(image.abs().sum()) >= 0])


def zeroed_outputs(model, layer, gone, images):
    def hook(_, __, output):
        return output.index_fill(1, torch.tensor(gone), 0)

    with torch.no_grad(), layer.register_forward_hook(hook):
        return model(images)


def random_images():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_a_layer_that_needs_all_inputs_keeps_those_before_it_whole():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), DividingConv(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1))
    groups = nni_topo.dependency_groups(model, random_images().float(), CONVOLUTIONS)
    assert [entry["op_names"] for entry in groups] == [["2"]]
    assert groups.skipped["0"] == "the result of an operation depends on removed channels (2: DividingConv)"


def test_a_module_with_a_rule_is_cut_by_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Gain(8), nn.Conv2d(8, 2, 1)).double()
    assert not nni_topo.dependency_groups(model, random_images(), CONVOLUTIONS)

    def shorten(module, kept):
        module.gains = nn.Parameter(module.gains.detach()[kept])

    register_module(Gain, shorten)
    try:
        again = nn.Sequential(*model)
        assert nni_topo.dependency_groups(again, random_images(), CONVOLUTIONS).skipped.keys() == {"2"}
        dense = nni_topo.to_dense(again, random_images(), {"0": filter_mask(again[0], [0, 3])})
        assert len(dense[1].gains) == 6
        torch.testing.assert_close(dense(random_images()), zeroed_outputs(again, again[0], [0, 3], random_images()))
    finally:
        del RULES[Gain]


def drawn(channels: int, **knobs: bool) -> nn.BatchNorm2d:
    generator = torch.Generator().manual_seed(channels)
    norm = nn.BatchNorm2d(channels, **knobs).double().eval()
    if norm.running_var is not None:
        norm.running_mean.copy_(torch.randn(channels, generator=generator))
        norm.running_var.copy_(torch.rand(channels, generator=generator))
    for parameter in norm.parameters():
        parameter.data.copy_(torch.randn(channels, generator=generator))
    return norm


@pytest.mark.parametrize("affine", [True, False])
def test_norms_do_to_constants_what_they_do_to_images(affine):
    norms = [drawn(4, affine=affine), drawn(4, affine=True)]
    constants = torch.tensor([0.5, -1.0, 100.0, 0.0])
    with torch.no_grad():
        expected = nn.Sequential(*norms)(constants.double().view(1, -1, 1, 1)).flatten()
        steeper = nn.Sequential(*norms)(constants.double().add(1.0).view(1, -1, 1, 1)).flatten()
    scale, offset = through_norms(norms, constants)
    torch.testing.assert_close(offset, expected)
    torch.testing.assert_close(scale, steeper - expected)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3))
    with torch.no_grad():
        model[0].weight[1:, :, 0] = 0.0
        model[3].weight[0, 1:3] = 0.0
        model[3].bias.zero_()
    return model


def train(model: nn.Module, optimizer: type[torch.optim.Optimizer], **knobs: float) -> None:
    steps = optimizer(model.parameters(), lr=0.1, weight_decay=0.1, **knobs)
    for _ in range(5):
        steps.zero_grad()
        model(torch.randn(8, 1, 3, 3)).square().sum().backward()
        steps.step()


@pytest.mark.parametrize(("optimizer", "knobs"), [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.AdamW, {})])
def test_zeros_stay_and_everything_else_learns(optimizer, knobs):
    model, before = net(), net()
    with nni_topo.zeros_held(model):
        train(model, optimizer, **knobs)
    for index in (0, 3):
        was, now = before[index].weight, model[index].weight
        assert torch.equal(was == 0, now == 0)
        assert not (was == now)[was != 0].any()
    assert model[3].bias.ne(0).all()
    assert weights_left(model) == sum(p.numel() for p in model.parameters()) - 9 - 2


def test_rows_of_a_transposed_convolution_with_groups_are_its_output_channels():
    layer, kept = nn.ConvTranspose1d(6, 4, 1, groups=2), torch.tensor([True, False, False, True])
    mask = kinds.spread(layer, kept)
    rows = kinds.by_output(mask, layer)
    assert rows.flatten(1).ne(0).all(1).tolist() == kept.tolist()
    assert torch.equal(kinds.by_output(rows, layer), mask)


class Own1D(Conv1D):
    """One of somebody else's."""


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = Conv1D(8, 4), nn.LayerNorm(8), Conv1D(3, 8)
        self.other = Own1D(3, 3)
        self.tied, self.again = self.norm, nn.ModuleList([self.last])

    def forward(self, x):
        return self.other(self.again[0](self.tied(self.norm(self.first(x)).relu())))


def test_plain_layers_stand_in_place_of_those_of_transformers():
    model, x = Blocks().eval(), torch.randn(2, 5, 4)
    model.first.weight.requires_grad_(False)
    model.norm.train()
    before, expected = copy.deepcopy(model.state_dict()), model(x)
    assert kinds.is_transposed_linear(model.first)
    assert kinds.has_channels(model.first)
    assert not kinds.is_transposed_linear(model.other)
    plain = nni_topo.as_torch_layers(model)
    kinds_found = {name: type(getattr(plain, name)) for name in ("first", "norm", "last", "other")}
    assert list(kinds_found.values()) == [nn.Linear, nn.LayerNorm, nn.Linear, Own1D]
    assert plain.tied is plain.norm
    assert plain.again[0] is plain.last
    assert sum(each.numel() for each in plain.parameters()) == sum(each.numel() for each in model.parameters())
    assert (plain.first.in_features, plain.first.out_features) == (4, 8)
    assert [each.weight.requires_grad for each in (plain.first, plain.last)] == [False, True]
    assert plain.last.weight.is_contiguous()
    assert [each.training for each in (plain.first, plain.norm, plain.last)] == [False, True, False]
    torch.testing.assert_close(plain(x), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert type(model.first) is Conv1D
