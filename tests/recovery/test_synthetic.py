from __future__ import annotations

import pytest
import torch
from torch import nn

import nni_topo
from nni_topo import zoo
from nni_topo.errors import ConfigError, DataError, SpeedupError
from nni_topo.recovery import synthetic_images
from nni_topo.testing import toy_model


@pytest.fixture
def net(digits_net):
    return digits_net.eval()


def away(model, images):
    """How far the mean and the variance of what enters each batch norm are from the running ones."""
    found = []

    def look(norm, args):
        mean, var = args[0].mean((0, 2, 3)), args[0].var((0, 2, 3))
        found.append(float(((mean - norm.running_mean).square() / norm.running_var).mean()))
        found.append(float((var / norm.running_var).log().square().mean()))

    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    handles = [norm.register_forward_pre_hook(look) for norm in norms]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return sum(found)


@pytest.mark.slow
def test_statistics_are_those_that_batch_norms_remember(net):
    state = {name: value.clone() for name, value in net.state_dict().items()}
    made = synthetic_images(net, torch.zeros(1, 1, 8, 8), count=192, steps=60)
    noise = synthetic_images(net, torch.zeros(1, 1, 8, 8), count=192, steps=1)
    assert [tuple(batch.shape) for batch in made] == [(128, 1, 8, 8), (64, 1, 8, 8)]
    torch.testing.assert_close(net.state_dict(), state, rtol=0, atol=0)
    assert away(net, made[0]) < 0.2 * away(net, noise[0])
    # Each image is one of its class.
    with torch.no_grad():
        assert float((net(made[0]).argmax(1) == torch.arange(128) % 10).float().mean()) > 0.9


@pytest.mark.slow
def test_compensation_without_data_comes_near_to_that_with_data(net, digits):
    real = list(digits.train.tensors[0][:512].split(128))
    layers = ["features.conv1", "features.conv2", "classifier.fc1"]
    config = nni_topo.dependency_groups(net, real[0][:2], [{"op_names": layers, "sparse_ratio": 0.75}])
    pruner = nni_topo.create_pruner("l1", net, config)
    masks = pruner.compress()[1]
    pruner.unwrap_model()

    def accuracy(images):
        dense = nni_topo.to_dense(nni_topo.compensate(net, masks, images), real[0][:2], masks)
        return zoo.evaluate(dense, digits.validation)

    pruned = zoo.evaluate(nni_topo.to_dense(net, real[0][:2], masks), digits.validation)
    made = accuracy(synthetic_images(net, real[0][:2], count=256, steps=60))
    assert made > pruned + 0.5 * (accuracy(real) - pruned)


def test_same_seed_same_images(net):
    def images(seed):
        torch.manual_seed(torch.seed())
        (batch,) = synthetic_images(net, torch.zeros(2, 1, 8, 8), count=4, steps=3, seed=seed)
        return batch

    assert torch.equal(images(1), images(1))
    assert not torch.equal(images(1), images(2))


def test_bad_requests_are_refused(net):
    example = torch.zeros(1, 1, 8, 8)
    for knob, value in (("count", 0), ("steps", 0), ("batch_size", 1), ("seed", -1)):
        with pytest.raises(ConfigError, match=f"{knob} must be"):
            synthetic_images(net, example, **{knob: value})
    with pytest.raises(ConfigError, match=r"must take one floating tensor \(n, channels, height, width\), got 1"):
        synthetic_images(nn.Linear(3, 2), torch.zeros(1, 3))
    with pytest.raises(DataError, match="must fit the model"):
        synthetic_images(net, torch.zeros(1, 3, 8, 8))
    wrapped = toy_model()
    nni_topo.create_pruner("l1", wrapped, [{"op_names": ["inner"], "sparse_ratio": 0.5}])
    with pytest.raises(SpeedupError, match="unwrap_model"):
        synthetic_images(wrapped, example)
    with pytest.raises(ConfigError, match="got None: without data"):
        nni_topo.compensate(net, {}, None)
    with pytest.raises(ConfigError, match="got None: without data"):
        nni_topo.shrink(net, None, {"flops": 0.5})
