from __future__ import annotations

import numpy as np
import pytest
import torch
from every_sample import compensate, compensation
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nni_topo import to_dense
from nni_topo.errors import ConfigError, DataError
from nni_topo.recovery import Pair, pair_coefficients
from nni_topo.speedup import masked_model

FLOATS = st.lists(st.floats(-10, 10), min_size=3, max_size=20)


@pytest.fixture
def conv_net():
    """Two convolutions without padding and a head behind a flattening layer, float64."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 4)
    ).double().eval()  # fmt: skip


def outputs(model, masks, batches, **knobs):
    whole = torch.cat(batches)
    repaired = compensate(model, masks, batches, **knobs)
    masked = masked_model(repaired, whole[:2], masks)(whole).detach()
    torch.testing.assert_close(to_dense(repaired, whole[:2], masks)(whole).detach(), masked, rtol=1e-9, atol=1e-9)
    return masked


def test_multiples_of_kept_channels_are_replaced_exactly(conv_net, twin, halves, images):
    twin(conv_net[0])
    twin(conv_net[2], factor=0.5)
    found = outputs(conv_net, halves(conv_net, "0", "2"), images, method="pair")
    torch.testing.assert_close(found, conv_net(torch.cat(images)).detach(), rtol=1e-6, atol=1e-6)


def test_residual_groups_with_batch_norms(residual_net, twin, halves, images):
    net = residual_net
    for layer, norm in (("stem", "norm"), ("conv1", "norm1"), ("conv2", "norm2"), ("conv3", None), ("conv4", "norm4")):
        twin(net.get_submodule(layer), norm and net.get_submodule(norm))
    twin(net.shortcut)
    masks = halves(net, "stem", "conv1", "conv2", "conv3", "conv4", "shortcut")
    found = outputs(net, masks, images, method="pair")
    torch.testing.assert_close(found, net(torch.cat(images)).detach(), rtol=1e-6, atol=1e-6)


def test_pair_of_a_linear_layer_is_the_text():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double().eval()
    inputs = torch.randn(50, 3, dtype=torch.float64)
    masks = {"0": {"weight": torch.tensor([1.0, 1, 0, 1])[:, None]}}
    features = net[:2](inputs).detach()
    alpha, beta = pair_coefficients(features[:, 2], features[:, 3])
    for as_printed in (False, True):
        found = compensate(net, masks, [inputs], method=Pair({"0": {2: 3}}, as_printed=as_printed))
        weight, bias = net[2].weight.detach().clone(), net[2].bias.detach().clone()
        bias += beta * (net[0].bias[2].detach() if as_printed else weight[:, 2])
        weight[:, 3] += alpha * weight[:, 2]
        weight[:, 2] = 0
        torch.testing.assert_close(found[2].weight.detach(), weight, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(found[2].bias.detach(), bias, rtol=1e-6, atol=1e-9)


def test_pair_without_a_bias_to_take_the_constant_goes_through_the_origin():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2, bias=False)).double().eval()
    inputs = torch.randn(50, 3, dtype=torch.float64)
    features = net[:2](inputs).detach()
    masks = {"0": {"weight": torch.tensor([1.0, 1, 0, 1])[:, None]}}
    found = compensation(net, masks, [inputs], method=Pair({"0": {2: 3}}))
    alpha = (features[:, 2] @ features[:, 3]) / (features[:, 3] @ features[:, 3])
    expected = net[2].weight[:, 3] + alpha * net[2].weight[:, 2]
    torch.testing.assert_close(found.model[2].weight[:, 3].detach(), expected.detach(), rtol=1e-9, atol=1e-9)
    assert found.model[2].bias is None
    # What is reported as left is what a line through the origin leaves.
    left = (features[:, 2] - alpha * features[:, 3]).square().sum() / (features - features.mean(0)).square().sum()
    assert found.report.layers[0].error_after == pytest.approx(float(left))


def test_border_of_a_padded_convolution_is_where_the_constant_errs(images):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 3, padding=1)).double().eval()
    with torch.no_grad():
        net[0].weight[3], net[0].bias[3] = net[0].weight[0], net[0].bias[0] + 1.0
    masks = {"0": {"weight": torch.tensor([1.0, 1, 1, 0])[:, None, None, None]}}
    error = (outputs(net, masks, images, method="pair") - net(torch.cat(images)).detach()).abs().amax((0, 1))
    assert float(error[1:-1, 1:-1].max()) < 1e-9
    assert float(error[0].min()) > 1e-3


def test_report_measures_at_the_input(conv_net, halves, images):
    report = compensation(conv_net, halves(conv_net, "0", "2"), images, method="pair").report
    assert [(layer.layer, layer.place) for layer in report.layers] == [("2", "_1"), ("5", "_4")]
    assert [layer.unknowns for layer in report.layers] == [1, 1]
    assert report.layers[1].samples == 32 * 4
    assert all(0 < layer.error_after < layer.error_before for layer in report.layers)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ({"9": {4: 0}}, "a layer of pairs must be a known name, got '9'"),
        ({"0": {1: 0}}, r"channels that are removed to channels that are kept, got 1: 0 \(0\)"),
        ({"0": {4: 5}}, r"channels that are removed to channels that are kept, got 4: 5 \(0\)"),
        ({"0": {4: 99}}, r"channels that are removed to channels that are kept, got 4: 99 \(0\)"),
        ({"0": {4: 0}, "2": {}, "5": {0: 1}}, r"got 0: 1 \(5\)"),
    ],
)
def test_pairs_that_can_not_be_used_are_refused(conv_net, halves, images, pairs, message):
    with pytest.raises(ConfigError, match=message):
        compensate(conv_net, halves(conv_net, "0"), images, method=Pair(pairs))


@settings(max_examples=50, deadline=None)
@given(FLOATS, st.integers(0, 1000))
def test_coefficients_are_those_of_polyfit(values, seed):
    survivor = np.array(values)
    removed = np.random.default_rng(seed).normal(size=len(values))
    alpha, beta = pair_coefficients(removed, survivor)
    residual = removed - alpha * survivor - beta
    assert abs(residual.sum()) < 1e-6
    assert abs(residual @ survivor) < 1e-5 * max(1.0, float(survivor @ survivor))


def test_iteration_converges_to_the_closed_form():
    rng = np.random.default_rng(0)
    survivor = rng.normal(size=200) + 1.0
    removed = 0.7 * survivor - 2.0 + 0.1 * rng.normal(size=200)
    closed = pair_coefficients(removed, survivor)
    gaps = [
        np.abs(np.subtract(pair_coefficients(removed, survivor, iterations=iterations), closed)).max()
        for iterations in (1, 3, 10, 300)
    ]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 1e-4
    assert gaps[-1] < 1e-12


@pytest.mark.parametrize("iterations", [None, 1, 50])
@pytest.mark.parametrize("constant", [0.0, 0.1, 0.3, 1 / 3, 2.0])
def test_constant_survivor_gives_the_mean(constant, iterations):
    removed = np.random.default_rng(0).normal(size=1000)
    found = pair_coefficients(removed, np.full(1000, constant), iterations=iterations)
    assert found == (0.0, removed.mean())


@pytest.mark.parametrize(
    ("removed", "survivor", "message"),
    [([], [], "not empty"), ([1.0], [1.0, 2.0], "got 1 and 2"), ([np.nan], [1.0], "must be finite")],
)
def test_bad_activations_are_refused(removed, survivor, message):
    with pytest.raises(DataError, match=message):
        pair_coefficients(removed, survivor)


CONV, GROUPED, LINEAR = nn.Conv2d(4, 2, 3), nn.Conv2d(4, 2, 3, groups=2), nn.Linear(4, 2)


class Passing(nn.Module):
    """The inputs as channels of a layer, and a layer that reads them."""

    def __init__(self, count, *, first_bias=True):
        super().__init__()
        self.first, self.last = nn.Linear(count, count, bias=first_bias), nn.Linear(count, 2)
        with torch.no_grad():
            self.first.weight.copy_(torch.eye(count))
            if first_bias:
                self.first.bias.zero_()

    def forward(self, states):
        return self.last(self.first(states))


def replaced(states, gone, method="pair", **knobs):
    """Remove channels of a network that passes states on; return it before and after."""
    torch.manual_seed(0)
    net = Passing(states.shape[1], **knobs).double().eval()
    is_kept = torch.ones(states.shape[1]).double()
    is_kept[gone] = 0
    masks = {"first": {"weight": is_kept[:, None].expand(-1, states.shape[1]).clone()}}
    return net, compensate(net, masks, [states], method=method)


@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_the_survivor_is_the_most_correlated_channel_and_not_the_largest(mean):
    """Beside a channel of ten times the size, one that never varies, and one that is always zero."""
    small, noise, large = torch.randn(3, 3000, generator=torch.Generator().manual_seed(0)).double()
    large, lost = 10.0 * large, 3.0 * small + 0.3 * noise + 5.0
    states = torch.stack([torch.full_like(small, 0.3), large + 3.0 * lost, lost, torch.zeros_like(small), small], 1)
    states[:, 4] += mean
    net, found = replaced(states, [2])
    alpha, beta = np.polyfit(small.numpy(), lost.numpy(), 1)
    expected = net.last.weight.detach().clone()
    expected[:, 4] += alpha * expected[:, 2]
    shift = (beta - alpha * mean) * expected[:, 2]
    expected[:, 2] = 0
    torch.testing.assert_close(found.last.weight.detach(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.last.bias.detach(), net.last.bias.detach() + shift, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("constant", [0.0, 0.3])
def test_a_survivor_that_never_varies_leaves_the_mean(constant):
    lost = torch.randn(50, generator=torch.Generator().manual_seed(0)).double() + 1.0
    states = torch.stack([lost, torch.full_like(lost, constant), lost**2], 1)
    net, found = replaced(states, [0], Pair({"first": {0: 1}}))
    torch.testing.assert_close(found.last.weight[:, 1:], net.last.weight[:, 1:])
    torch.testing.assert_close(found.last.bias, net.last.bias + lost.mean() * net.last.weight[:, 0])


@pytest.mark.parametrize("size", [1.0, 1e-6, 1e6])
def test_pairs_that_are_given_go_before_those_that_are_found(size):
    """The first removed channel is left to be found, the second has a survivor that is less like it."""
    states = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)).double()
    states[:, 0], states[:, 1] = 2.0 * states[:, 2], 3.0 * states[:, 2] + states[:, 3]
    states *= size
    net, found = replaced(states, [0, 1], Pair({"first": {1: 3}}))
    alpha, beta = pair_coefficients(states[:, 1], states[:, 3])
    weight = net.last.weight.detach()
    torch.testing.assert_close(found.last.weight[:, 2].detach(), weight[:, 2] + 2.0 * weight[:, 0])
    torch.testing.assert_close(found.last.weight[:, 3].detach(), weight[:, 3] + alpha * weight[:, 1])
    torch.testing.assert_close(found.last.bias.detach(), net.last.bias.detach() + beta * weight[:, 1])


@pytest.mark.parametrize("first_bias", [True, False])
def test_the_printed_constant_is_a_multiple_of_the_removed_neurons_bias(first_bias):
    states = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).double()
    states[:, 0] += 2.0
    net, found = replaced(states, [0], Pair({"first": {0: 1}}, as_printed=True), first_bias=first_bias)
    torch.testing.assert_close(found.last.bias.detach(), net.last.bias.detach())  # the bias is 0
    with torch.no_grad():
        if first_bias:
            net.first.bias[0] = 1 / 3
            masks = {"first": {"weight": torch.tensor([0.0, 1.0, 1.0]).double()[:, None].expand(3, 3).clone()}}
            found = compensate(net, masks, [states], method=Pair({"first": {0: 1}}, as_printed=True))
            _, beta = pair_coefficients(states[:, 0] + 1 / 3, states[:, 1])
            torch.testing.assert_close(found.last.bias, net.last.bias + beta / 3, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [np.uint8, np.float16])
@pytest.mark.parametrize("iterations", [None, 2000])
def test_coefficients_are_computed_in_double_precision(kind, iterations):
    """Sums of these would be too large for their own type, and rounded."""
    ones, others = [200.0, 201.0, 205.0, 250.0, 210.0], [100.0, 103.0, 101.0, 250.0, 122.0]
    survivor, removed = np.array(ones, dtype=kind), np.array(others, dtype=kind)
    expected = np.polyfit(ones, others, 1)
    found = pair_coefficients(removed, survivor, iterations=iterations)
    assert found == pytest.approx(tuple(expected), rel=1e-9 if iterations is None else 1e-3)
