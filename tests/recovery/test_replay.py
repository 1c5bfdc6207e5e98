from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.fx import symbolic_trace

import nni_topo
from nni_topo import Calibration
from nni_topo.errors import DataError
from nni_topo.network.graph.tracing import trace
from nni_topo.recovery.replay import (
    Replay,
    touched_nodes,
    without_side_effects,
)


@pytest.fixture
def pair(residual_net):
    """The residual net and one in which a layer differs."""
    original = without_side_effects(symbolic_trace(residual_net))
    changed = copy.deepcopy(original)
    changed.get_submodule("conv2").weight.data.mul_(0.5)
    return original, changed


def node_of(graph_module, name):
    return next(node for node in graph_module.graph.nodes if node.name == name)


def values(replay, original, name, after):
    """Values of a node in both networks over all batches, with everything before node ``after`` settled."""
    node = node_of(original, name)
    runs = list(replay.run(replay.order[node_of(original, after)], [node]))
    return torch.cat([run[0][node] for run in runs]), torch.cat([run[1][node] for run in runs])


@pytest.mark.parametrize("cache_bytes", [0, 100_000, 2**30])
def test_values_are_those_of_the_networks(residual_net, pair, images, cache_bytes):
    original, changed = pair
    replay = Replay(residual_net, original, changed, images, cache_bytes)
    whole = torch.cat(images)
    for after in ("conv1", "conv2", "conv3", "conv4", "head"):
        one, other = values(replay, original, "head", after)
        torch.testing.assert_close(one, residual_net(whole).detach())
        torch.testing.assert_close(other, changed(whole).detach())


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x, factor=2.0):
        return self.last(factor * self.first(x).relu())


@pytest.mark.parametrize("factor", [{}, {"factor": 3.0}])
def test_arguments_that_a_batch_leaves_out_have_their_defaults(factor):
    torch.manual_seed(0)
    model = Scaled()
    original = symbolic_trace(model)
    changed = copy.deepcopy(original)
    changed.get_submodule("first").weight.data.mul_(0.5)
    inputs = torch.randn(5, 3)
    replay = Replay(model, original, changed, [{"x": inputs, **factor}], 0)
    one, other = values(replay, original, "last", "first")
    torch.testing.assert_close(one, model(inputs, **factor).detach())
    torch.testing.assert_close(other, changed(inputs, **factor).detach())


def test_a_later_change_shows_behind_what_is_settled(residual_net, pair, images):
    original, changed = pair
    replay = Replay(residual_net, original, changed, images, 2**30)
    values(replay, original, "head", "conv3")
    changed.get_submodule("head").bias.data.add_(1.0)
    one, other = values(replay, original, "head", "head")
    torch.testing.assert_close(one, residual_net(torch.cat(images)).detach())
    torch.testing.assert_close(other, changed(torch.cat(images)).detach())


def test_only_nodes_behind_a_difference_are_touched(pair):
    original, changed = pair
    touched = {node.name for node in touched_nodes(original, changed)}
    assert {"conv2", "norm2", "conv3", "shortcut", "head"} <= touched
    assert not {"stem", "norm", "conv1", "norm1"} & touched


class InPlace(nn.Module):
    """Every way of working in place."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.relu = nn.ReLU(inplace=True)
        self.second = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.relu(self.first(x))
        y = self.second(x)
        y += x
        y.mul_(2.0)
        torch.relu_(y)
        x = nn.functional.relu(y, inplace=True)
        x -= 1.0
        return x.add_(y)


def test_nothing_works_in_place_any_more():
    torch.manual_seed(0)
    net = InPlace().eval()
    inputs = torch.randn(2, 3, 4, 4)
    plain = without_side_effects(trace(net, ((inputs,), {})).graph_module)
    steps = {}

    class Watcher(torch.fx.Interpreter):
        def run_node(self, n):
            value = super().run_node(n)
            steps[n] = (value, value.clone())
            return value

    Watcher(plain, garbage_collect_values=False).run(inputs)
    assert all(torch.equal(value, before) for value, before in steps.values())


def test_a_batch_of_a_wrong_shape_is_named(residual_net, pair, images):
    replay = Replay(residual_net, *pair, [images[0], torch.ones(2, 5, 8, 8, dtype=torch.float64)], 2**30)
    with pytest.raises(DataError, match=r"calibration must fit the model, got RuntimeError: .* \(batch 1\)"):
        values(replay, pair[0], "head", "conv3")


class Shown(nn.Module):
    """Reads one of its inputs; the others are there for whoever looks at the call."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, states, other=None, attention_mask=None):
        return self.second(self.first(states).relu())


class ByParts(nn.Module):
    """Its own code can't be followed, for a graph has no arguments of any name; its part can."""

    def __init__(self):
        super().__init__()
        self.part = Shown()

    def forward(self, states, attention_mask=None, **others):
        return self.part(states * others["factor"])


def test_the_unpruned_network_may_get_other_inputs():
    torch.manual_seed(0)
    model, states = Shown(), torch.randn(64, 3)
    calibration = Calibration([{"states": 2.0 * states, "other": states}])
    assert torch.equal(nni_topo.compensate(model, {}, calibration).first.weight, model.first.weight)
    calibration.instead = {"states": "other"}
    for data in (calibration, calibration.split()[0]):
        solved = nni_topo.compensate(model, {}, data)
        assert torch.allclose(solved.first.weight, 0.5 * model.first.weight, atol=1e-5)
        assert torch.allclose(solved(2.0 * states), model(states), atol=1e-4)


@pytest.mark.parametrize(("kind", "prefix"), [(Shown, ""), (ByParts, "part.")])
def test_padding_is_left_out_whether_a_network_is_followed_as_a_whole_or_by_parts(kind, prefix):
    torch.manual_seed(0)
    model, states = kind(), torch.randn(16, 4, 3)
    real = torch.ones(16, 4, dtype=torch.int64)
    real[:, -1] = 0
    masks = {f"{prefix}first": {"weight": torch.ones(6, 3), "bias": torch.ones(6)}}
    for mask in masks[f"{prefix}first"].values():
        mask[:3] = 0.0
    found = []
    for filler in (1.0, 50.0):
        filled = torch.where(real.unsqueeze(2) == 0, filler, states)
        batch = {"states": filled, "attention_mask": real}
        if prefix:
            batch["factor"] = torch.ones(16, 4, 1)
        solved = nni_topo.compensate(model, masks, [batch])
        found.append(solved.get_submodule(f"{prefix}second").weight)
    assert not torch.equal(found[0], model.get_submodule(f"{prefix}second").weight)
    assert torch.allclose(*found, atol=1e-6)


def stack(*sizes):
    """Return linear layers, their graph, and one in which the first layer differs."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(*each) for each in itertools.pairwise(sizes)))
    original = without_side_effects(symbolic_trace(model))
    changed = copy.deepcopy(original)
    changed.get_submodule("0").weight.data.mul_(0.5)
    return model, original, changed


def test_what_was_kept_serves_again_where_later_values_are_too_large():
    model, original, changed = stack(4, 2, 64, 64, 2)
    batches = list(torch.randn(12, 4).split(6))
    replay = Replay(model, original, changed, batches, 1000)
    for after in ("_1", "_2", "_3", "_3", "_1"):
        one, other = values(replay, original, "output", after)
        torch.testing.assert_close(one, model(torch.cat(batches)).detach())
        torch.testing.assert_close(other, changed(torch.cat(batches)).detach())
