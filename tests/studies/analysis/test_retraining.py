from __future__ import annotations

import dataclasses
import functools
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

import nni_topo
from nni_topo.analysis import retraining_bound
from nni_topo.errors import ConfigError, DataError, SpeedupError


class Quadratic(nn.Module):
    """Predicts a vector whatever the input: with mean squared error the loss is a square, its gradient linear."""

    def __init__(self, *weights: float) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor(weights, dtype=torch.float64))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.weights.expand(len(inputs), -1)


BATCHES = [(torch.zeros(4, 1), torch.zeros(4, 2, dtype=torch.float64))]


def bound(initial, trained, sparse, kind, **knobs):
    return retraining_bound(initial, trained, sparse, mse_loss, BATCHES, 10, kind=kind, **knobs)


def test_node_form_by_hand():
    # L(w) = |w|^2 / 2, gradient w: losses 50, 2 and 0, squared gradients 100 and 4, so mu = 2 both times.
    found = bound(Quadratic(6, 8), Quadratic(0, 0), Quadratic(0, 2), "node")
    assert (found.mu_initial, found.mu_sparse) == pytest.approx((2.0, 2.0))
    assert (found.loss_initial, found.loss_trained, found.loss_sparse) == pytest.approx((50.0, 0.0, 2.0))
    assert found.epochs == pytest.approx(100 / 4 * 10)
    assert found.derived_epochs == pytest.approx(2 / 50 * 10)
    assert float(found) == found.epochs


def test_connection_form_by_hand():
    # Gradients are the weights themselves: mu = 1 both times.
    found = bound(Quadratic(6, 8), Quadratic(0, 1), Quadratic(0, 2), "connection", gamma=0.5)
    assert (found.mu_initial, found.mu_sparse) == pytest.approx((1.0, 1.0))
    assert found.epochs == pytest.approx(0.5 * 100 / 4 * 10)
    assert found.derived_epochs == pytest.approx(0.5 * 4 / 100 * 10)


def test_gradients_and_losses_are_means_over_all_samples():
    torch.manual_seed(0)
    nets = [nn.Linear(4, 3) for _ in range(3)]
    inputs, targets = torch.randn(10, 4), torch.randint(3, (10,))
    whole = retraining_bound(*nets, cross_entropy, [(inputs, targets)], 5)
    parts = [(inputs[:3], targets[:3]), (inputs[3:], targets[3:])]
    assert retraining_bound(*nets, cross_entropy, parts, 5).epochs == pytest.approx(whole.epochs, rel=1e-4)
    loss = cross_entropy(nets[0](inputs), targets)
    gradients = torch.autograd.grad(loss, list(nets[0].parameters()))
    assert whole.gradient_initial == pytest.approx(sum(float((g**2).sum()) for g in gradients), rel=1e-5)


def test_the_node_form_takes_a_dense_network_and_the_connection_form_does_not():
    torch.manual_seed(0)
    wide = [nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(2)]
    small = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 3))
    batches = [(torch.randn(16, 4), torch.randint(3, (16,)))]
    assert retraining_bound(*wide, small, cross_entropy, batches, 5).epochs > 0
    with pytest.raises(ConfigError, match="parameters of the same shapes"):
        retraining_bound(*wide, small, cross_entropy, batches, 5, kind="connection")


def test_gamma_scales_the_bound_and_is_fitted_to_what_was_seen():
    nets = (Quadratic(6, 8), Quadratic(0, 0), Quadratic(0, 2))
    found = bound(*nets, "node", gamma=0.01)
    fitted = found.fitted_gamma(4)
    assert bound(*nets, "node", gamma=fitted).epochs == pytest.approx(4)
    assert math.isinf(dataclasses.replace(found, epochs=0.0).fitted_gamma(1))


def test_the_bound_of_nodes_is_the_same_for_zeros_and_for_a_dense_network():
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 3)) for _ in range(2)]
    inputs, targets = torch.randn(40, 4), torch.randint(3, (40,))
    pruner = nni_topo.create_pruner("l1", nets[1], [{"op_names": ["0", "2"], "sparse_ratio": 0.5}])
    _, masks = pruner.compress()
    with pytest.raises(SpeedupError, match="wrapped"):
        retraining_bound(*nets, nets[1], cross_entropy, [(inputs, targets)], 5)
    pruner.unwrap_model()
    sparse = nni_topo.masked_model(nets[1], inputs, masks), nni_topo.to_dense(nets[1], inputs, masks)
    found = [retraining_bound(*nets, each, cross_entropy, [(inputs, targets)], 5) for each in sparse]
    assert found[0].epochs == pytest.approx(found[1].epochs, rel=1e-5)
    assert found[0].gradient_sparse == pytest.approx(found[1].gradient_sparse, rel=1e-5)


def test_bad_requests_are_refused():
    nets = (Quadratic(6, 8), Quadratic(0, 0), Quadratic(0, 2))
    with pytest.raises(ConfigError, match="gamma must be above 0 and finite, got 0"):
        bound(*nets, "node", gamma=0)
    with pytest.raises(ConfigError, match="epochs must be above 0 and finite, got -1"):
        retraining_bound(*nets, mse_loss, BATCHES, -1)
    with pytest.raises(ConfigError, match="epochs must be above 0 and finite, got 'a'"):
        retraining_bound(*nets, mse_loss, BATCHES, "a")
    with pytest.raises(ConfigError, match=r"pair of inputs and targets, got a Tensor \(batch 0\)"):
        retraining_bound(*nets, mse_loss, [torch.zeros(4, 1)], 5)
    with pytest.raises(ConfigError, match=r"mean over a batch, got one of shape \(4, 2\)"):
        retraining_bound(*nets, functools.partial(mse_loss, reduction="none"), BATCHES, 5)
    with pytest.raises(ConfigError, match="did you mean node"):
        bound(*nets, "nodes")
    with pytest.raises(DataError, match="at least one batch, got none"):
        retraining_bound(*nets, mse_loss, [], 5)
    with pytest.raises(DataError, match="gradients before training and after pruning must not be zero"):
        bound(Quadratic(6, 8), Quadratic(0, 1), Quadratic(0, 0), "node")
    with pytest.raises(DataError, match="must differ from the trained network"):
        bound(Quadratic(6, 8), Quadratic(0, 2), Quadratic(0, 2), "connection")
