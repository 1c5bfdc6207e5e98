from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import nni_topo
from nni_topo.errors import ConfigError, DataError, SpeedupError
from nni_topo.recovery import synthetic, synthetic_images
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


@pytest.mark.parametrize("shape", [(2, 12, 6, 9), (3, 1, 8, 4)])
def test_noise_is_white_noise_whose_amplitudes_are_divided_by_their_frequency(shape):
    """A frequency of less than a period in the longer side counts as one period."""
    made = synthetic._noise(shape, torch.Generator().manual_seed(3))
    white = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    assert float(made.std()) == pytest.approx(1.0)
    rows, columns = np.fft.fftfreq(shape[2])[:, None], np.fft.fftfreq(shape[3])
    frequency = np.maximum(np.hypot(rows, columns), 1.0 / max(shape[2:]))
    factors = np.fft.fft2(made.double().numpy()) * frequency / np.fft.fft2(white.double().numpy())
    np.testing.assert_allclose(factors, factors.flat[0].real, rtol=1e-3)


def test_distances_are_those_of_means_and_of_logarithms_of_variances():
    norm = nn.BatchNorm2d(3)
    norm.running_mean.copy_(torch.tensor([0.5, 5.0, 7.0]))
    norm.running_var.copy_(torch.tensor([4.0, 1.0, 0.0]))
    rows = torch.tensor([[1.0, 5.0, 7.0], [3.0, 5.0, 7.0]])  # means 2, 5 and 7, variances 1, 0 and 0
    expected = (1.5**2 / 4 + math.log(1 / 4) ** 2 + math.log(1e-6) ** 2) / 3
    for entering in (rows, rows.T.reshape(1, 3, 2), rows.T.reshape(1, 3, 1, 2)):
        assert float(synthetic._distance(norm, entering)) == pytest.approx(expected, rel=1e-4)


class Read(nn.Module):
    """What is read of images, as scores or not."""

    def __init__(self, read):
        super().__init__()
        self.read = read

    def forward(self, images):
        return self.read(images)


def moved(net, images):
    """Return the first step, in which each pixel goes down its slope by the learning rate."""
    images = torch.as_tensor(images)
    with synthetic.bar("images", False) as shown:
        return (synthetic._shaped(net, images, 1, shown) - images).round(decimals=4)


def test_neighbours_come_nearer():
    """Of a single bright pixel and the four beside it, with no other aim."""
    image = torch.zeros(1, 1, 5, 5)
    image[..., 2, 2] = 1.0
    beside = torch.tensor([[0.0, 1, 0], [1, -1, 1], [0, 1, 0]])
    found = moved(Read(lambda images: torch.cat([images, images], 1)), image)
    torch.testing.assert_close(found, 0.1 * nn.functional.pad(beside, (1, 1, 1, 1))[None, None])


@pytest.mark.parametrize(("slope", "step"), [(1.0, 0.1), (0.3, -0.1), (-0.3, -0.1)])
def test_classes_weigh_a_tenth_and_differences_of_neighbours_a_hundredth(slope, step):
    """For a score that grows with a bright pixel: 0.1 s / (1 + exp(s)) against 0.01 * 2, with slopes of 1 and 0.3."""
    net = Read(lambda images: torch.stack([slope * images[:, 0, 0, 0], 0.0 * images[:, 0, 0, 0]], 1))
    assert float(moved(net, [[[[1.0, 0.0], [0.0, 0.0]]]])[0, 0, 0, 0]) == pytest.approx(step)


@pytest.mark.parametrize(("mean", "step"), [(5.0, 0.1), (-5.0, -0.1)])
def test_what_enters_norms_comes_nearer_to_what_they_remember(mean, step):
    """A norm without statistics remembers nothing, and outputs of other shapes are of no class."""
    norm = nn.BatchNorm2d(3)
    norm.running_mean.fill_(mean)
    net = nn.Sequential(norm, nn.BatchNorm2d(3, track_running_stats=False)).eval()
    images = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(moved(net, images), torch.full_like(images, step))


def test_images_are_made_alike_on_another_device(device):
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 3)).eval()
    expected, found = (
        synthetic_images(net.to(place), torch.zeros(1, 1, 4, 4, device=place), count=3, steps=2)[0]
        for place in (torch.device("cpu"), device)
    )
    assert found.device.type == device.type
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)
