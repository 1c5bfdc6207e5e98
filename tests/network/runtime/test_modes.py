from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import nni_topo
from nni_topo.network.runtime import evaluating, evaluation_mode, forget_evaluated, training

ROWS = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
LAYERS = [{"op_names": ["last"]}]


class Adapted(nn.Linear):
    """A layer with an adapter of low rank, merged into its weight for evaluation, as loralib does it."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.down, self.up = nn.Parameter(0.1 * torch.randn(2, inputs)), nn.Parameter(torch.randn(outputs, 2))
        self.is_merged = False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.is_merged:
            self.weight.data += (-1.0 if mode else 1.0) * self.up @ self.down
            self.is_merged = not mode
        return self

    def forward(self, rows):
        found = super().forward(rows)
        return found if self.is_merged else found + rows @ self.down.T @ self.up.T


class Averaged(nn.Module):
    """A model that is evaluated with averages of its weights."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 12)
        self.head = nn.Linear(12, 3)
        self.averages = {name: 0.9 * value.detach() for name, value in self.named_parameters()}

    def train(self, mode=True):
        if mode != self.training:
            for name, value in self.named_parameters():
                own = value.detach().clone()
                value.data.copy_(self.averages[name])
                self.averages[name] = own
        return super().train(mode)

    def forward(self, rows):
        return self.head(torch.relu(self.last(torch.relu(self.first(rows)))))


class WithAdapter(Averaged):
    train = nn.Module.train

    def __init__(self):
        super().__init__()
        self.first, self.averages = Adapted(6, 12), {}


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
@pytest.mark.parametrize("kind", [Averaged, WithAdapter])
@pytest.mark.parametrize(
    "use",
    [
        lambda model: nni_topo.dependency_groups(model, ROWS, LAYERS),
        lambda model: nni_topo.explain(model, ROWS, "last"),
        lambda model: nni_topo.to_dense(model, ROWS, {"last": {"weight": (torch.arange(12) < 5).float()[:, None]}}),
        lambda model: nni_topo.zoo.count_macs(model, ROWS),
        lambda model: nni_topo.recalibrate_batch_norm(model, [ROWS]),
        lambda model: nni_topo.shrink(model, [ROWS], {"flops": 0.8}, layers=LAYERS, distill={"steps": 2, "lr": 1e-3}),
    ],
    ids=["groups", "explain", "dense", "macs", "batch norm", "shrink"],
)
def test_weights_that_train_and_eval_change_are_those_of_before(kind, use, is_training):
    torch.manual_seed(0)
    model = kind().train(is_training)
    attributes = copy.copy(vars(model.first))
    before = state_of(model)
    use(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training is is_training for module in model.modules())
    assert vars(model.first) == attributes


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("kind", [Averaged, WithAdapter])
def test_a_dense_network_computes_what_the_model_did_with_its_weights_as_they_were(kind, is_training):
    torch.manual_seed(0)
    model = kind().train(is_training)
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
    assert "phase" not in vars(noting)
    assert evaluating(noting).phase == "test"


def test_an_eval_that_fails_or_replaces_layers_is_undone():
    class Failing(nn.Linear):
        def eval(self):
            self.weight.data.zero_()
            raise RuntimeError("never evaluated")

    class Switching(nn.Sequential):
        def train(self, mode=True):
            if not mode:
                self[0] = nn.Linear(6, 4)
            return super().train(mode)

    for model in (Failing(6, 4), Switching(nn.Linear(6, 4))):
        before, modules = state_of(model), list(model.modules())
        with evaluation_mode(model):
            assert not any(module.training for module in model.modules())
        assert list(model.modules()) == modules
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_modes_are_those_of_every_module_again():
    model = nn.Sequential(nn.ReLU(), nn.Sequential(nn.ReLU()).eval())
    with evaluation_mode(model), evaluation_mode(model[0]):
        assert not any(each.training for each in model.modules())
    assert [each.training for each in model.modules()] == [True, True, False, False]


def test_modules_may_forget_what_they_have_computed_for_evaluation():
    class Keeping(nn.Module):
        kept = None

        def train(self, mode=True):
            self.kept = None if mode else self.kept
            return super().train(mode)

    model = Keeping().eval()
    model.kept = 3
    forget_evaluated(model)
    assert (model.kept, model.training) == (None, False)


class ForInference(nn.Sequential):
    def train(self, mode=True):
        if mode:
            raise RuntimeError("for inference only")
        return super().train(mode)


def test_a_model_that_refuses_training_mode_is_pruned():
    model = ForInference(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    model.eval()
    modes = [module.training for module in model.modules()]
    forget_evaluated(model)
    assert [module.training for module in model.modules()] == modes
    small = nni_topo.shrink(model, [torch.randn(64, 4)], {"flops": 0.5}, distill={"steps": 2, "lr": 1e-3})
    assert small[0].out_features == 4
