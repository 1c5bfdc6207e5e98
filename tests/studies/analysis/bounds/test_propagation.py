from __future__ import annotations

import copy
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd.functional import jacobian

from nni_topo.analysis import error_bound, net_deviation
from nni_topo.errors import ConfigError, DataError
from nni_topo.testing import toy_images, toy_model

ACTIVATIONS = (nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.LeakyReLU)


def mlp(sizes=(4, 6, 5, 3), activation=nn.Tanh, seed=0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1]).double()


def convnet(seed=0) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(3, 4, 3, stride=2, groups=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    net[4].running_var.uniform_(0.3, 3.0)
    return net.double()


def moved(model: nn.Module, amount: float, seed: int = 0) -> nn.Module:
    """A copy whose parameters are moved at random."""
    changed, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter += amount * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return changed


def cut(model: nn.Module, share: float, seed: int = 0) -> nn.Module:
    """A copy of which random weights are zero."""
    changed, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter *= torch.rand(parameter.shape, generator=generator) >= share
    return changed


def test_the_printed_bound_is_of_first_order_only():
    # w = (-2, 1), x = (1, 1): the ReLU is off, its derivative 0; without w_1 it is on, and the output 1.
    net = nn.Sequential(nn.Linear(2, 1, bias=False), nn.ReLU())
    net[0].weight.data.copy_(torch.tensor([[-2.0, 1.0]]))
    pruned = copy.deepcopy(net)
    pruned[0].weight.data[0, 0] = 0.0
    found = error_bound(net, pruned, torch.ones(1, 2))
    assert found.error == pytest.approx(1.0)
    assert found.first_order == 0.0
    assert found.lipschitz >= 1.0
    assert net_deviation(net, pruned, torch.ones(1, 2)).relative == math.inf


def test_terms_are_those_of_exact_jacobians():
    net, inputs = mlp(), torch.randn(5, 4, dtype=torch.float64)
    pruned = cut(net, 0.5)
    found = error_bound(net, pruned, inputs)
    values = [inputs, torch.tanh(net[0](inputs)), torch.tanh(net[2](torch.tanh(net[0](inputs))))]
    forwards = [lambda v: torch.tanh(net[0](v)), lambda v: torch.tanh(net[2](v)), net[4]]
    layers = [net[0], net[2], net[4]]
    downstream = [
        max(np.linalg.norm(jacobian(forward, sample), 2) for sample in value)
        for forward, value in zip(forwards[1:], values[1:], strict=True)
    ]
    for index, (layer, other) in enumerate(zip(layers, (pruned[0], pruned[2], pruned[4]), strict=True)):
        activation = torch.tanh if index < 2 else (lambda v: v)

        def forward(weight, bias, value=values[index], activation=activation):
            return activation(nn.functional.linear(value, weight, bias))

        parts = jacobian(forward, (layer.weight, layer.bias))
        whole = torch.cat([part.flatten(2).flatten(0, 1) for part in parts], dim=1)
        delta = torch.cat([(other.weight - layer.weight).flatten(), other.bias - layer.bias])
        term = found.layers[index]
        assert term.weight_jacobian == pytest.approx(float(torch.linalg.matrix_norm(whole, 2)), rel=1e-3)
        assert term.change == pytest.approx(delta.norm().item())
        assert term.downstream == pytest.approx(float(np.prod(downstream[index:])), rel=1e-3)
        step = float((whole @ delta).norm())
        assert term.directional == pytest.approx(step * float(np.prod(downstream[index:])), rel=1e-3)
        assert term.first_order == pytest.approx(term.change * term.weight_jacobian * term.downstream)


@pytest.mark.parametrize("build", [mlp, convnet])
@pytest.mark.quick_every(2)
def test_the_printed_bound_holds_as_the_change_goes_to_zero(build):
    net = build()
    inputs = torch.randn(4, 4) if build is mlp else torch.randn(4, 1, 14, 14)
    inputs = inputs.double()
    for seed in range(5):
        found = error_bound(net, moved(net, 1e-6, seed), inputs)
        assert found.error <= found.directional * (1 + 1e-3) <= found.first_order * (1 + 2e-3)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=2, max_size=5),
    st.sampled_from(ACTIVATIONS),
    st.floats(0.0, 1.0),
    st.integers(0, 1000),
)
@pytest.mark.slow
def test_the_lipschitz_bound_holds_for_any_change(sizes, activation, share, seed):
    net = mlp((3, *sizes), activation, seed)
    inputs = 3.0 * torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)).double()
    for pruned in (cut(net, share, seed), moved(net, 2.0, seed)):
        found = error_bound(net, pruned, inputs, iterations=1)
        assert found.error <= found.lipschitz * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.quick_every(3)
def test_the_lipschitz_bound_holds_with_convolutions_batch_norms_and_pooling(seed):
    net, inputs = convnet(seed), torch.randn(3, 1, 14, 14).double()
    for pruned in (cut(net, 0.5, seed), moved(net, 0.5, seed)):
        found = error_bound(net, pruned, inputs, iterations=2)
        assert found.error <= found.lipschitz * (1 + 1e-9)


class Reads(nn.Module):
    """A layer whose output is read by a function."""

    def __init__(self, read, **layers):
        super().__init__()
        self.read = read
        self.layer = nn.Linear(4, 6)
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, value):
        return self.read(self, self.layer(value))


@pytest.mark.parametrize(
    "read",
    [
        lambda net, h: h + h,
        lambda net, h: h.sub(h.neg()),
        lambda net, h: torch.cat([h, h, h], 1),
        lambda net, h: h.unsqueeze(1) + h.unsqueeze(2),
        lambda net, h: h[:, :, None, None] + torch.zeros(3, 5),
    ],
    ids=["sum", "difference", "cat", "outer", "broadcast"],
)
def test_the_lipschitz_bound_counts_operands_as_often_as_they_are_read(read):
    torch.manual_seed(0)
    net = Reads(read)
    found = error_bound(net, cut(net, 0.7), torch.randn(8, 4))
    assert 0.0 < found.error <= found.lipschitz * (1 + 1e-6)


def test_residual_blocks_are_one_stage_and_are_bounded():
    net = toy_model().double().eval()
    inputs = toy_images(4).double()
    found = error_bound(net, cut(net, 0.3), inputs, iterations=5)
    assert [layer.name for layer in found.layers] == ["stem", "inner", "hidden", "head"]
    assert found.error <= found.lipschitz


def test_budgets_add_up():
    net, inputs = mlp(), torch.randn(5, 4).double()
    found = error_bound(net, cut(net, 0.5), inputs)
    table = found.budgets(2.0)
    assert table["epsilon"].sum() == pytest.approx(2.0)
    assert table["share"].sum() == pytest.approx(1.0)
    scale = 2.0 / found.first_order
    np.testing.assert_allclose(table["largest_change"], scale * table["change"])
    np.testing.assert_allclose(found.budgets()["epsilon"], [layer.first_order for layer in found.layers])
    assert list(found.to_frame()["name"]) == ["0", "2", "4"]
    for wrong in (-1, "a"):
        with pytest.raises(ConfigError, match=f"an allowed error must be finite and at least 0, got {wrong!r}"):
            found.budgets(wrong)


def test_net_deviation_is_the_difference_and_its_share_of_the_bound():
    net, inputs = mlp(), torch.randn(5, 4).double()
    pruned = cut(net, 0.5)
    bound = error_bound(net, pruned, inputs)
    for form in ("first_order", "directional", "lipschitz"):
        found = net_deviation(net, pruned, inputs, form=form)
        assert found.dev == pytest.approx(bound.error - getattr(bound, form))
        assert found.sign == np.sign(found.dev)
        assert found.relative == pytest.approx(bound.error / getattr(bound, form) - 1.0)
    same = net_deviation(net, copy.deepcopy(net), inputs)
    assert (same.dev, same.sign, same.relative) == (0.0, 0.0, 0.0)


def test_bad_requests_are_refused():
    net, inputs = mlp(), torch.randn(5, 4).double()
    with pytest.raises(ConfigError, match="parameters of the same shapes"):
        error_bound(net, mlp((4, 5, 5, 3)), inputs)
    with pytest.raises(ConfigError, match="iterations must be an integer of at least 1, got 0"):
        error_bound(net, net, inputs, iterations=0)
    with pytest.raises(ConfigError, match="did you mean lipschitz"):
        net_deviation(net, net, inputs, form="lipshitz")
    with pytest.raises(DataError, match="at least one sample"):
        error_bound(net, net, inputs[:0])
    with pytest.raises(DataError, match="must be finite"):
        error_bound(net, net, inputs * torch.nan)
    other = convnet()
    changed = copy.deepcopy(other)
    changed[4].running_mean += 1.0
    with pytest.raises(ConfigError, match="share their buffers, got others"):
        error_bound(other, changed, torch.randn(2, 1, 14, 14).double())
    unknown = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).double()
    with pytest.raises(ConfigError, match="known Lipschitz constant, got 'layernorm'"):
        error_bound(unknown, cut(unknown, 0.5), inputs)
    twice = Reads(lambda net, h: h[:, [0, 0]])  # such an index may read an entry twice
    with pytest.raises(ConfigError, match="known Lipschitz constant, got 'getitem'"):
        error_bound(twice, cut(twice, 0.5), torch.randn(3, 4))
    held = Reads(lambda net, h: {"logits": h})
    with pytest.raises(ConfigError, match="needs a tensor as output, got a "):
        error_bound(held, cut(held, 0.5), torch.randn(3, 4))
    shifted = Reads(lambda net, h: h + net.offset)
    shifted.offset = nn.Parameter(torch.ones(6))
    with pytest.raises(ConfigError, match=r"belong to layers, got some that the model uses directly \(model\)"):
        error_bound(shifted, cut(shifted, 1.0), torch.randn(3, 4))


@pytest.mark.parametrize("other", [nn.Tanh(), nn.Sequential(nn.ReLU(), nn.ReLU())])
def test_networks_that_do_something_else_are_refused(other):
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    changed = copy.deepcopy(net)
    changed[1] = other
    with pytest.raises(ConfigError, match="must differ in the values of parameters only, got"):
        error_bound(net, changed, torch.randn(3, 4))


def test_tied_weights_are_bounded():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    net[2].weight = net[0].weight
    changed, inputs = moved(net, 1e-4), torch.randn(7, 6).double()
    assert changed[2].weight is changed[0].weight
    found = error_bound(net, changed, inputs)
    assert 0 < found.error <= found.lipschitz
    assert found.error <= 1.01 * found.directional <= 1.02 * found.first_order
