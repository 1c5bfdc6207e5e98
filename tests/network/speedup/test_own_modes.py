"""Dense models of models with a ``train`` or ``eval`` of their own: in which mode they come back, and what breaks."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from own_mode_nets import Adapted, Averaged, ForEvaluation, Scaling
from speedup_nets import filter_mask
from torch import nn

import nni_topo

ROWS = torch.randn(96, 6, generator=torch.Generator().manual_seed(0))


class Fused(nn.Module):
    """Two branches, which ``eval`` fuses into one layer, as RepVGG does."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.one, self.other, self.fused = nn.Linear(inputs, outputs), nn.Linear(inputs, outputs), None

    def train(self, mode=True):
        super().train(mode)
        self.fused = None
        if not mode:
            self.fused = nn.Linear(self.one.in_features, self.one.out_features)
            with torch.no_grad():
                self.fused.weight.copy_(self.one.weight + self.other.weight)
                self.fused.bias.copy_(self.one.bias + self.other.bias)
        return self

    def forward(self, rows):
        return self.one(rows) + self.other(rows) if self.fused is None else self.fused(rows)


class Swapping(nn.Module):
    """A network that a copy of it stands for in evaluation."""

    def __init__(self):
        super().__init__()
        self.fast = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        self.slow = copy.deepcopy(self.fast)
        self.now = self.fast

    def train(self, mode=True):
        super().train(mode)
        self.now = self.fast if mode else self.slow
        return self

    def forward(self, rows):
        return self.now(rows)


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
    first = Fused(6, 8) if kind is Fused else nn.Linear(6, 8)
    last = nn.Linear(8, 3)
    if kind is Adapted:
        # In training mode the layers before an adapter keep their channels.
        last = nn.Sequential(nn.Linear(8, 4), Adapted(4, 3)) if is_training else Adapted(8, 3)
    if kind is Swapping:
        model = Swapping()
    else:
        make = nn.Sequential if kind in (Fused, Adapted) else kind
        model = make(first, nn.BatchNorm1d(8), nn.ReLU(), last)
    return model.train() if is_training else model.eval()


def pruned(model):
    """Make a model dense by a mask of the first layer that runs."""
    running = ["0"]
    if isinstance(model, Swapping):
        running = ["slow.0"]
    elif isinstance(model[0], Fused):
        running = ["0.one", "0.other"] if model[0].fused is None else ["0.fused"]
    masks = {name: filter_mask(model.get_submodule(name), [1, 2, 5]) for name in running}
    return nni_topo.to_dense(model, ROWS, masks)


BREAKING = [
    (Fused, False, "eval", "after it the forward raises RuntimeError"),
    (Adapted, False, "train", "it raises RuntimeError"),
    (Averaged, False, "train", "it raises RuntimeError"),
]


@pytest.mark.parametrize(("kind", "is_training", "method", "failure"), BREAKING)
def test_a_method_of_its_own_that_breaks_the_dense_model_is_told(kind, is_training, method, failure, caplog):
    model = made(kind, is_training)
    with caplog.at_level(logging.WARNING, logger="nni_topo"):
        dense = pruned(model)
    (note,) = [each for each in dense.report.notes if "breaks the dense model" in each]
    assert note.startswith(f"the model's own {method}() breaks the dense model: {failure}")
    assert "merge or fuse for good" in note
    assert note in caplog.messages
    assert dense.training is model.training
    assert dense(ROWS).shape == (96, 3)
    with pytest.raises(RuntimeError):  # the note is true
        getattr(dense, method)()(ROWS)


@pytest.mark.parametrize(
    ("kind", "is_training"),
    [
        (Fused, True),
        (Adapted, True),
        (Scaled, True),
        (Frozen, False),
        (ForEvaluation, False),
    ],
)
def test_nothing_is_told_where_the_dense_model_runs_wherever_the_model_does(kind, is_training):
    model = made(kind, is_training)
    dense = pruned(model)
    assert not any("own" in each for each in dense.report.notes)
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


def test_layers_that_run_after_train_alone_are_told_and_run_where_they_did():
    for is_training in (True, False):
        model = made(Swapping, is_training)
        dense = pruned(model)
        (note,) = [each for each in dense.report.notes if "smaller in evaluation mode" in each]
        assert note.endswith("keep all their channels: fast.0, fast.2")
        assert dense.now is (dense.fast if is_training else dense.slow)
        assert (dense.slow[0].out_features, dense.fast[0].out_features) == (5, 8)


def test_a_layer_frozen_by_hand_stays_so_in_a_model_with_a_train_of_its_own():
    model = made(Scaled, True)
    model[1].eval()
    dense = pruned(model)
    assert [module.training for module in dense] == [True, False, True, True]
    assert (dense.training, dense.scale) == (True, 1.0)


def test_a_job_of_several_processes_returns_the_mode_of_the_model_and_runs_nothing_in_it():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        assert pruned(made(Averaged, True)).report.notes == ()
        assert pruned(made(Scaled, True)).scale == 1.0
    finally:
        torch.distributed.destroy_process_group()


def test_shrink_warns_before_a_function_of_the_users_that_calls_eval_fails(caplog):
    model = made(Fused, False)
    with (
        caplog.at_level(logging.WARNING, logger="nni_topo"),
        pytest.raises(RuntimeError, match="running_mean should contain 8"),
    ):
        nni_topo.shrink(
            model, [ROWS], {"flops": 0.6}, distill=False, evaluate=lambda net: net.eval()(ROWS).mean().item()
        )
    told = [each for each in caplog.messages if "breaks the dense model" in each or "evaluate failed" in each]
    assert [each.split(":")[0] for each in told] == [
        "the model's own eval() breaks the dense model",
        "evaluate failed for the pruned network",
    ]


class Pointing(nn.Sequential):
    """Averages of the first layer's weights, which ``eval`` puts in place of their values."""

    def __init__(self):
        super().__init__(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
        self.averages = {name: parameter.detach() * 0.9 for name, parameter in self[0].named_parameters()}
        self.kept = {}

    def train(self, mode=True):
        super().train(mode)
        if not mode and not self.kept:
            self.kept = {name: parameter.data for name, parameter in self[0].named_parameters()}
            for name, parameter in self[0].named_parameters():
                parameter.data = self.averages[name]
        elif mode and self.kept:
            for name, parameter in self[0].named_parameters():
                parameter.data = self.kept[name]
            self.kept = {}
        return self


@pytest.mark.parametrize("is_training", [False, True])
def test_values_that_are_put_in_place_of_others_are_told_and_the_model_stays(is_training):
    torch.manual_seed(0)
    model = Pointing().train(is_training)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    dense = nni_topo.to_dense(model, ROWS[:4], {"0": filter_mask(model[0], range(8))})
    assert dense[0].out_features == 8
    assert "breaks the dense model" in " ".join(dense.report.notes)
    assert all(map(torch.equal, before, model.parameters()))
