from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import nni_topo
from nni_topo.network.layers.zeros import weights_left


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


def test_afterwards_zeros_learn_again():
    model = net()
    with nni_topo.zeros_held(model):
        pass
    train(model, torch.optim.SGD)
    assert bool(model[0].weight.all())
    assert bool(model[3].weight.all())


def test_copies_and_frozen_weights_are_left_as_they_are():
    model = net()
    model[0].weight.requires_grad_(False)
    with nni_topo.zeros_held(model):
        copied = copy.deepcopy(model)
        train(copied, torch.optim.SGD)
    assert torch.equal(copied[0].weight, model[0].weight)


def test_an_optimizer_of_whole_matrices_moves_no_zero():
    torch.manual_seed(0)
    layer = nn.Linear(8, 8, bias=False)
    with torch.no_grad():
        layer.weight[torch.rand(8, 8) < 0.5] = 0.0
    kept = layer.weight != 0
    steps = torch.optim.Muon(layer.parameters(), lr=0.1)

    def step() -> None:
        steps.zero_grad()
        layer(torch.randn(16, 8)).square().sum().backward()
        steps.step()

    with nni_topo.zeros_held(layer):
        step()
    assert torch.equal(layer.weight != 0, kept)
    step()
    assert not torch.equal(layer.weight != 0, kept)
