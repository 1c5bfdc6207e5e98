from __future__ import annotations

import pytest
import torch
from torch import nn

import nni_topo
from nni_topo import Calibration
from nni_topo.network.graph.tracing import trace
from nni_topo.network.runtime.inputs import calls
from nni_topo.recovery import replay
from nni_topo.recovery.replay import without_side_effects


def test_the_memory_for_values_changes_no_solution_but_how_often_inputs_are_taken(
    residual_net, images, halves, monkeypatch
):
    """All of a batch is kept, or what lies before the larger values, or nothing."""
    masks, taken, found = halves(residual_net, "conv1", "conv3"), [], []
    plain = nni_topo.recovery.Reconstruct(refine=0)
    monkeypatch.setattr(replay, "calls", lambda *given: taken.append(given) or calls(*given))
    for cache_bytes, passes in ((2**30, 1), (100_000, None), (0, 6)):  # one for each equation
        taken.clear()
        found.append(nni_topo.compensate(residual_net, masks, images, method=plain, cache_bytes=cache_bytes))
        assert passes is None or len(taken) == passes
    for other in found[1:]:
        torch.testing.assert_close(other.state_dict(), found[0].state_dict(), rtol=0, atol=0)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x, factor=2.0):
        return self.last(factor * self.first(x).relu())


def test_arguments_that_a_batch_leaves_out_have_their_defaults():
    model, rows = Scaled(), torch.randn(32, 3, generator=torch.Generator().manual_seed(0))
    masks = {"first": {"weight": torch.tensor([1.0, 1, 0, 1])[:, None]}}
    found = [nni_topo.compensate(model, masks, [{"x": rows, **more}]) for more in ({}, {"factor": 2.0})]
    assert torch.equal(found[0].last.weight, found[1].last.weight)


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
