"""Dense models of models with a ``train`` or ``eval`` of their own."""

from __future__ import annotations

import copy

import pytest
import torch
from own_mode_nets import Adapted, ForEvaluation, Scaling
from speedup_nets import filter_mask
from torch import nn

import nni_topo

ROWS = torch.randn(96, 6, generator=torch.Generator().manual_seed(0))


class Scaled(Scaling, nn.Sequential):
    pass


class Frozen(nn.Sequential):
    """A network whose batch norm is never trained."""

    def train(self, mode=True):
        super().train(mode)
        self[1].eval()
        return self


def made(kind, is_training):
    torch.manual_seed(0)
    first, last = nn.Linear(6, 8), nn.Linear(8, 3)
    if kind is Adapted:
        # In training mode the layers before an adapter keep their channels.
        last = nn.Sequential(nn.Linear(8, 4), Adapted(4, 3)) if is_training else Adapted(8, 3)
    make = nn.Sequential if kind is Adapted else kind
    model = make(first, nn.BatchNorm1d(8), nn.ReLU(), last)
    return model.train() if is_training else model.eval()


def pruned(model):
    """Make a model dense by a mask of the first layer."""
    return nni_topo.to_dense(model, ROWS, {"0": filter_mask(model[0], [1, 2, 5])})


@pytest.mark.parametrize(
    ("kind", "is_training"),
    [
        (Adapted, True),
        (Scaled, True),
        (Frozen, False),
        (ForEvaluation, False),
    ],
)
def test_the_dense_model_runs_in_every_mode_and_comes_back_in_that_of_the_model(kind, is_training):
    model = made(kind, is_training)
    dense = pruned(model)
    assert [module.training for module in dense.modules()] == [module.training for module in model.modules()]
    if kind is not ForEvaluation:
        for method in ("eval", "train", "eval"):
            getattr(dense, method)()
            assert dense(ROWS).shape == (96, 3)


@pytest.mark.parametrize("is_training", [True, False])
def test_what_the_mode_decides_is_that_of_the_model(is_training, tmp_path):
    model = made(Scaled, is_training)
    before = copy.copy(vars(model))
    small = nni_topo.shrink(model, [ROWS], {"flops": 0.6}, distill={"steps": 2, "lr": 1e-3})
    assert (small.training, small.scale) == (is_training, model.scale) == (is_training, 1.0 if is_training else 2.0)
    assert vars(model) == before
    nni_topo.save(small, tmp_path / "small.pt")
    loaded = nni_topo.load(tmp_path / "small.pt", model)
    assert (loaded.training, loaded.scale) == (small.training, small.scale)
    assert torch.equal(loaded.eval()(ROWS), small.eval()(ROWS))
