from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from nni_topo.errors import ConfigError, DataError
from nni_topo.hooks import GradientCollector
from nni_topo.pruners.random import RandomPruner
from nni_topo.pruners.topological import TopologicalPruner
from nni_topo.testing import toy_images, toy_model
from nni_topo.topology import pairwise_distances

HIDDEN = [{"op_names": ["hidden"], "sparse_ratio": 0.5}]
GROUP = [{"op_names": ["stem", "inner"], "sparse_ratio": 0.5, "dependency_group_id": "residual"}]


def labelled(count=12, size=5):
    images, labels = toy_images(count), torch.arange(count) % 4
    return list(zip(images.split(size), labels.split(size), strict=True))


def collected(model, config, calibration, **knobs):
    pruner = RandomPruner(model, config)
    try:
        return GradientCollector(calibration, **knobs).collect(pruner.context)
    finally:
        pruner.unwrap_model()


def gated_losses(model, images, labels, gates):
    """The toy network's loss per sample, with gates on the residual stream wherever it is read."""
    stream = torch.relu(model.norm(model.stem(images)))
    features = torch.relu(model.inner(stream * gates[:, None, None]) + stream)
    hidden = model.hidden(features.mean((2, 3)) * gates)
    return cross_entropy(model.head(torch.relu(hidden)), labels, reduction="none")


def test_coordinates_are_derivatives_by_a_gate_wherever_a_group_is_read():
    model, images, labels = toy_model().double().eval(), toy_images(12).double(), torch.arange(12) % 4
    derivatives = torch.autograd.functional.jacobian(
        lambda gates: gated_losses(model, images, labels, gates), torch.ones(8, dtype=torch.float64)
    ).T
    data = collected(model, GROUP, [(images[:5], labels[:5]), (images[5:], labels[5:])])
    assert data["inner"]["weight"].shape == (8, 0)
    found = data["stem"]["weight"]
    torch.testing.assert_close(found @ found.T, derivatives @ derivatives.T / 12, atol=1e-12, rtol=1e-6)


def test_it_foretells_what_the_loss_falls_by_to_first_order():
    model, (images, labels) = toy_model().double().eval(), (toy_images(12).double(), torch.arange(12) % 4)
    cloud = collected(model, HIDDEN, [(images, labels)])["hidden"]["weight"]

    def loss(gates):
        features = torch.relu(model.norm(model.stem(images)))
        features = torch.relu(model.inner(features) + features)
        logits = model.head(torch.relu(model.hidden(features.mean((2, 3)))) * gates)
        return cross_entropy(logits, labels, reduction="none")

    whole, ones, step = loss(torch.ones(16)), torch.ones(16, dtype=torch.float64), 1e-6
    falls = torch.stack([(whole - loss(ones - step * torch.eye(16)[unit])) / step for unit in range(16)]).detach()
    np.testing.assert_allclose(
        pairwise_distances(cloud.numpy()), pairwise_distances(falls.numpy()) / np.sqrt(12), atol=1e-6
    )


def test_batches_of_any_size_give_the_same_cloud():
    whole, parts = (collected(toy_model(), HIDDEN, labelled(size=size))["hidden"]["weight"] for size in (12, 5))
    np.testing.assert_allclose(pairwise_distances(whole.numpy()), pairwise_distances(parts.numpy()), atol=1e-6)


@pytest.mark.parametrize("frozen", [True, False])
def test_nothing_stays_on_the_model(frozen):
    model = toy_model().train()
    model.requires_grad_(not frozen)
    before = copy.deepcopy(model.state_dict())
    pruner = RandomPruner(model, GROUP)
    GradientCollector(labelled()).collect(pruner.context)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    pruner.unwrap_model()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class Weighted(nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, outputs, targets):
        return self.weight * nn.functional.mse_loss(outputs, nn.functional.one_hot(targets, 4).float())


def test_a_loss_of_ones_own_gathers_no_gradients():
    loss = Weighted()
    weighted = collected(toy_model(), HIDDEN, labelled(), loss=loss)["hidden"]["weight"]
    assert loss.weight.grad is None
    plain = collected(toy_model(), HIDDEN, labelled())["hidden"]["weight"]
    assert not torch.allclose(weighted @ weighted.T, plain @ plain.T)


def test_a_neuron_that_no_loss_depends_on_goes_first():
    model = toy_model()
    with torch.no_grad():
        model.hidden.bias += 2.0  # all others speak up
        model.head.weight[:, 3] = 0.0
        model.hidden.weight[3] *= 100.0
    pruner = TopologicalPruner(
        model, [{"op_names": ["hidden"], "sparse_ratio": 0.1}], cloud="gradient", calibration=labelled()
    )
    _, masks = pruner.compress()
    assert masks["hidden"]["bias"].tolist() == [float(index != 3) for index in range(16)]


@pytest.mark.parametrize(
    ("calibration", "words"),
    [
        ([], "at least one batch"),
        ([toy_images(4)], r"got no targets \(calibration batch 0\)"),
        ([*labelled(4), (toy_images(4),)], r"got no targets \(calibration batch 1\)"),
        ([(toy_images(4), None)], "got no targets"),
    ],
)
def test_missing_targets_are_refused_before_the_model_is_wrapped(calibration, words):
    model = toy_model()
    with pytest.raises(DataError, match=words):
        TopologicalPruner(model, HIDDEN, cloud="gradient", calibration=calibration)
    assert not hasattr(model.hidden, "_nni_wrapper")
    with pytest.raises(DataError, match=words):
        collected(toy_model(), HIDDEN, iter(calibration))


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (
            (toy_images(4) * float("nan"), torch.zeros(4, dtype=torch.long)),
            r"inputs must be finite.*batch 0",
        ),
        ((toy_images(4), torch.zeros(3, dtype=torch.long)), "targets must fit the loss"),
        ((toy_images(4), torch.full((4,), 9)), "targets must fit the loss"),
    ],
)
def test_bad_batches_are_refused_and_leave_nothing(batch, words):
    model = toy_model().train()
    with pytest.raises(DataError, match=words):
        collected(model, HIDDEN, [batch])
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training


@pytest.mark.parametrize(
    ("knobs", "error", "words"),
    [
        ({"loss": "mse"}, ConfigError, "loss must be a function, got .mse."),
        ({"loss": lambda outputs, targets: outputs}, ConfigError, r"scalar tensor, got \(5, 4\)"),
        ({"loss": lambda outputs, targets: targets.float().mean()}, DataError, "got a constant"),
    ],
)
def test_bad_knobs_are_refused(knobs, error, words):
    with pytest.raises(error, match=words):
        collected(toy_model(), HIDDEN, **{"calibration": labelled(), **knobs})
