from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.fx import symbolic_trace

from nni_topo.network.speedup import Network
from nni_topo.recovery import compensation, plan

BETWEEN = {
    "nothing": lambda x: x,
    "contiguous": lambda x: x.contiguous(),
    "clone": lambda x: x.clone(),
    "dropout": nn.Dropout(),
    "function": lambda x: nn.functional.dropout(x, training=False),
    "identity": nn.Identity(),
    "batch norm": nn.BatchNorm1d(3),
    "tanh": torch.tanh,
    "double": lambda x: 2.0 * x,
}


class Branch(nn.Module):
    """A branch of two layers, something between, and a sum."""

    def __init__(self, between):
        super().__init__()
        self.up, self.down, self.between = nn.Linear(3, 4), nn.Linear(4, 3), between

    def forward(self, x):
        return self.between(self.down(torch.relu(self.up(x)))) + x


@pytest.mark.parametrize("between", BETWEEN)
def test_errors_are_measured_at_the_sum_where_all_before_it_hands_on(between):
    torch.manual_seed(0)
    model = Branch(BETWEEN[between]).eval()
    masks = {"up": {"weight": torch.tensor([1.0, 0, 1, 1])[:, None]}}
    report = compensation(model, masks, [torch.randn(40, 3)]).report
    places = [(layer.layer, layer.place) for layer in report.layers]
    assert places == [("down", "down" if between in ("tanh", "double") else "add")]


class Doubling(nn.Linear):
    def forward(self, x):
        return 2.0 * super().forward(x)


class Looking(nn.Linear):
    def forward(self, x):
        return super().forward(x) * x.mean()


def solved_by_class(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), kind(4, 4), nn.Linear(4, 2)).eval()
    masks = {"0": {"weight": torch.tensor([1.0, 0, 1, 1])[:, None]}}
    return compensation(model, masks, [torch.randn(40, 3)]).report


def test_a_layer_whose_forward_looks_at_its_input_twice_is_left_alone():
    report = solved_by_class(Looking)
    assert report.left_alone == {"1": "of type Looking, which does more than a convolution or a product"}


def test_a_layer_whose_forward_goes_on_with_its_product_is_solved():
    report = solved_by_class(Doubling)
    assert report.left_alone == {}
    assert [(each.layer, each.place) for each in report.layers] == [("1", "_1"), ("2", "_2")]


def node_of(model, name):
    graph = symbolic_trace(model)
    return graph, next(node for node in graph.graph.nodes if node.name == name)


class Two(nn.Module):
    """Two values of one input, joined by a function."""

    def __init__(self, join):
        super().__init__()
        self.first, self.second, self.join = nn.Linear(3, 3), nn.Linear(3, 3), join

    def forward(self, values):
        return self.join(self.first(values), self.second(values))


@pytest.mark.parametrize(
    ("join", "name", "is_sum"),
    [
        (lambda one, other: one + other, "add", True),
        (lambda one, other: one.add(other), "add", True),
        (torch.add, "add", True),
        (lambda one, other: torch.add(one, other, alpha=2), "add", False),
        (lambda one, other: one.add(other, alpha=2), "add", False),
        (lambda one, other: one + one, "add", False),
        (lambda one, other: one + 1.0, "add", False),
        (lambda one, other: one - other, "sub", False),
        (lambda one, other: one.mul(other), "mul", False),
        (lambda one, other: one, "first", False),
    ],
)
def test_sums_are_of_two_different_values_and_nothing_else(join, name, is_sum):
    assert plan._is_sum(node_of(Two(join), name)[1]) is is_sum


@pytest.mark.parametrize(
    ("join", "is_rectified"),
    [
        (lambda one, other: one.relu(), True),
        (lambda one, other: torch.relu(one), True),
        (lambda one, other: nn.functional.relu(one), True),
        (lambda one, other: one.relu() + one, False),
        (lambda one, other: one.tanh(), False),
        (nn.ReLU(), True),
        (nn.ReLU6(), False),
        (nn.Tanh(), False),
        (nn.Identity(), False),
    ],
)
def test_a_relu_alone_reads_a_value(join, is_rectified):
    taken = join if not isinstance(join, nn.Module) else None
    model = Two(taken) if taken else nn.Sequential(nn.Linear(3, 3), join)
    assert plan._is_rectified(*node_of(model, "first" if taken else "_0")) is is_rectified


class Normed(nn.Module):
    """A layer before a norm, which may be called twice or give what it gets to others."""

    def __init__(self, norm, *, bias=False, calls=1, is_seen=False):
        super().__init__()
        self.first, self.norm, self.calls, self.is_seen = nn.Linear(3, 3, bias=bias), norm, calls, is_seen

    def forward(self, values):
        made = self.first(values)
        found = self.norm(made)
        for _ in range(self.calls - 1):
            found = self.norm(found)
        return found + made if self.is_seen else found


@pytest.mark.parametrize(
    ("knobs", "mask", "taker"),
    [
        ({"bias": True}, None, "first"),
        ({"bias": True}, [1.0, 1.0, 0.0], "first"),
        ({"bias": True}, [1.0, 0.0, 1.0], None),  # one of the rows that are solved is masked
        ({}, None, "norm"),
        ({"calls": 2}, None, None),
        ({"is_seen": True}, None, None),
        ({"norm": nn.BatchNorm1d(3, track_running_stats=False)}, None, None),
        ({"norm": nn.LayerNorm(3)}, None, None),
        ({"norm": nn.Tanh()}, None, None),
    ],
)
def test_a_constant_goes_into_the_bias_or_the_mean_of_the_norm_after_it(knobs, mask, taker):
    graph, node = node_of(Normed(**{"norm": nn.BatchNorm1d(3), **knobs}), "first")
    masks = {} if mask is None else {"first": {"bias": torch.tensor(mask)}}
    assert plan._intercept(graph, node, torch.tensor([[0, 1]]), masks) == taker


def test_kept_channels_are_listed_group_by_group():
    found = plan._split(np.array([True, False, True, False, False, False, False, True, True]), 3)
    assert [each.tolist() for each in found] == [[0, 2], [], [7, 8]]
    weights = torch.tensor([[[0.0, 0.0], [0.0, 2.0]], [[0.0, 0.0], [0.0, 0.0]]])
    assert plan._any(weights, 1).tolist() == [[False, True], [False, False]]


class Vector(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(3))


def test_modules_that_can_not_be_solved_are_named_by_their_type():
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).eval()
    flow = Network(net, ((torch.zeros(2, 3),), {})).flow
    graph, node = node_of(net, "_1")
    assert "1" in flow.layers
    assert plan._why_not(graph, node, net[1], flow, {}) == "called in an unusual way"  # no shapes are known
    for module in (nn.BatchNorm1d(4), Vector(), nn.Tanh()):
        assert plan._why_not(graph, node, module, flow, {}) == ""
    assert plan._why_not(graph, node, nn.Bilinear(4, 4, 2), flow, {}) == "of type Bilinear"
    node.target = "other"
    assert plan._why_not(graph, node, net[1], flow, {}) == "of type Linear"
