"""Modes of models whose ``train`` or ``eval`` does more than to set them."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from own_mode_nets import Adapted, Averaged, ForEvaluation
from torch import nn

import nni_topo
from nni_topo.network.runtime.copies import (
    evaluating,
    evaluation_mode,
    forget_evaluated,
    training,
)

ROWS = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))


LAYERS = [{"op_names": ["last"]}]


def network(first):
    layers = {"first": first, "one": nn.ReLU(), "last": nn.Linear(12, 12), "two": nn.ReLU(), "head": nn.Linear(12, 3)}
    return OrderedDict(layers)


def averaged():
    return Averaged(network(nn.Linear(6, 12)))


def adapted():
    return nn.Sequential(network(Adapted(6, 12)))


class Frozen(nn.Sequential):
    """A model whose batch norm is never trained, and whose ``train`` returns nothing."""

    def train(self, mode=True):
        super().train(mode)
        self[1].eval()


class Noting(nn.Linear):
    """A layer that goes by an attribute of its own."""

    phase = "train"

    def train(self, mode=True):
        self.phase = "train" if mode else "test"
        return super().train(mode)


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("make", [averaged, adapted])
@pytest.mark.parametrize(
    "use",
    [
        lambda model: nni_topo.dependency_groups(model, ROWS, LAYERS),
        lambda model: nni_topo.to_dense(model, ROWS, {"last": {"weight": (torch.arange(12) < 5).float()[:, None]}}),
        lambda model: nni_topo.shrink(model, [ROWS], {"flops": 0.8}, layers=LAYERS, distill={"steps": 2, "lr": 1e-3}),
    ],
    ids=["groups", "dense", "shrink"],
)
@pytest.mark.quick_every(3)
def test_weights_that_train_and_eval_change_are_those_of_before(make, use, is_training):
    torch.manual_seed(0)
    model = make().train(is_training)
    attributes = copy.copy(vars(model.first))
    before = state_of(model)
    use(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training is is_training for module in model.modules())
    assert vars(model.first) == attributes


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("make", [averaged, adapted])
def test_a_dense_network_computes_what_the_model_did_with_its_weights_as_they_were(make, is_training):
    torch.manual_seed(0)
    model = make().train(is_training)
    expected = model(ROWS)
    dense = nni_topo.to_dense(model, ROWS, {"last": {"weight": torch.ones(12, 1)}})
    torch.testing.assert_close(dense(ROWS), expected)
    with evaluation_mode(model):
        torch.testing.assert_close(model(ROWS), expected)


def test_a_train_of_its_own_is_called_where_it_changes_no_weight():
    frozen, noting = Frozen(nn.Linear(6, 4), nn.BatchNorm1d(4)), Noting(6, 4)
    frozen.train()
    assert training(evaluating(frozen)) is frozen
    assert [module.training for module in frozen.modules()] == [True, True, False]
    with evaluation_mode(frozen, noting):
        assert noting.phase == "test"
        assert not any(module.training for module in frozen.modules())
    assert noting.training
    assert noting.phase == "train"
    assert evaluating(noting).phase == "test"


def test_training_mode_are_those_of_every_module_again():
    model = nn.Sequential(nn.ReLU(), nn.Sequential(nn.ReLU()).eval())
    with evaluation_mode(model), evaluation_mode(model[0]):
        assert not any(each.training for each in model.modules())
    assert [each.training for each in model.modules()] == [True, True, False, False]


def test_a_model_that_refuses_training_mode_is_pruned():
    model = ForEvaluation(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    model.eval()
    modes = [module.training for module in model.modules()]
    forget_evaluated(model)
    assert [module.training for module in model.modules()] == modes
    small = nni_topo.shrink(model, [torch.randn(64, 4)], {"flops": 0.5}, distill={"steps": 2, "lr": 1e-3})
    assert small[0].out_features == 4
