"""Copies of models, and what is put back in the models that run themselves."""

from __future__ import annotations

import functools
import queue
import threading
import warnings
import weakref

import pytest
import torch
from speedup_nets import masks_of
from torch import nn
from torch.utils.checkpoint import checkpoint

import nni_topo
from nni_topo import RandomPruner, dependency_groups, to_dense
from nni_topo.errors import ConfigError
from nni_topo.network.runtime.copies import detached_copy, left_alone

CONFIG = [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.5}]


class Unlike(nn.Module):
    """Attributes that are more than what they hold: shared, or looking at one another."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleList([nn.Linear(2, 2), nn.LSTM(2, 3)])
        self.same = self.inner[0]
        self.settings = {"widths": [2, 2], "layer": self.inner[0]}
        self.inner[0].settings = self.settings
        self.register_buffer("table", torch.arange(6.0).view(2, 3))
        self.register_buffer("row", self.table[1])
        self.register_buffer("flat", self.table.view(-1))
        self.register_buffer("number", torch.tensor(3.0))
        self.register_buffer("wide", torch.ones(1).expand(4))
        self.computed = self.inner[0].weight * 2
        self.empty, self.nothing = {}, None
        self.inner[0].register_forward_hook(lambda module, args, output: output + 1)

    def forward(self, x):
        return self.inner[1](self.inner[0](x))[0] + self.number


@pytest.mark.parametrize("light", [True, False])
def test_a_copy_shares_within_itself_what_the_model_does_and_nothing_with_the_model(light):
    model = Unlike()
    copied = detached_copy(model, light=light)
    assert copied.same is copied.inner[0] is copied.settings["layer"] is not model.same
    assert copied.settings is copied.inner[0].settings is not model.settings
    copied.settings["widths"].append(3)
    assert model.settings["widths"] == [2, 2]
    assert (copied.inner[0].weight.data_ptr() == model.inner[0].weight.data_ptr()) == light
    assert torch.equal(copied.computed, model.computed)
    assert copied.computed.is_leaf
    copied.table.zero_()
    assert not bool(copied.row.any())
    assert not bool(copied.flat.any())
    assert bool(model.row.any())
    copied.number.fill_(7.0)
    copied.empty["new"] = 1
    assert float(model.number) == 3.0
    assert model.empty == {}
    assert copied.wide.stride() == (0,)
    x = torch.randn(3, 2)
    assert torch.allclose(copied(x) - 7.0, model(x) - 3.0, atol=1e-6)
    assert list(map(type, copied.modules())) == list(map(type, model.modules()))


def test_public_functions_copy_models_whose_weights_are_computed_with_gradients(tmp_path):
    # After a forward in training the weight of PyTorch's old weight norm is no leaf, which deepcopy refuses.
    torch.manual_seed(0)
    inner = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()]
    model = nn.Sequential(*inner, nn.Flatten(), nn.Linear(8 * 16, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.nn.utils.weight_norm(model[0])
    images = torch.randn(16, 3, 8, 8)
    model(images).sum().backward()
    nni_topo.recalibrate_batch_norm(model, [images])
    nni_topo.analysis.sensitivity(model, images[:2], lambda net: 0.0, [0.5], pruner="l1")
    nni_topo.speedup.profile({"net": model}, images[:2], runs=1)
    dense = nni_topo.shrink(model, [images], {"params": 0.7}, distill={"steps": 2})
    assert dense(images).shape == (16, 4)


class Block(nn.Module):
    """A residual block that computes with a function or with what else ``how`` says."""

    def __init__(self, how):
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.act, self.steps = functools.partial(_scaled, self), []
        if how in ATTRIBUTES:
            setattr(self, *ATTRIBUTES[how](self))
        elif how in FORWARDS:
            self.forward = FORWARDS[how](self.forward)
        elif how == "hook":
            self.second.register_forward_hook(lambda module, args, output: output * self.scale)

    def forward(self, x):
        return x + self.second(self.act(self.first(x)))


def _scaled(block, x):
    return torch.relu(x) * block.scale


def _wrapper(forward):
    @functools.wraps(forward)
    def run(x):
        return forward(x)

    return run


ATTRIBUTES = {
    "list": lambda block: ("steps", [lambda x: torch.relu(x) * block.scale]),
    "weak reference": lambda block: ("held", weakref.ref(block.first)),
    "lock": lambda block: ("held", threading.Lock()),
    "device": lambda block: ("to", functools.wraps(block.to)(lambda *given: block.to(*given))),  # as accelerate does
}


FORWARDS = {
    "closure": lambda forward: lambda x: checkpoint(forward, x, use_reentrant=False),
    "wrapper": _wrapper,
    "decorators": lambda forward: torch.no_grad()(torch.autocast("cpu", enabled=False)(forward)),
    "default": lambda forward: lambda x, own=forward: own(x),
    "compiled": lambda forward: torch.compile(forward, backend="eager"),
}


def _network(how):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), Block(how), nn.ReLU(), nn.Conv2d(4, 6, 1)).eval()


HELD = [*FORWARDS, *(how for how in ATTRIBUTES if how != "weak reference"), "hook", "partial"]


@pytest.mark.parametrize("how", HELD)
def test_a_smaller_network_computes_without_the_one_it_was_made_of(how):
    images = torch.randn(64, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    model = _network(how)
    held = {name: value for name, value in vars(model[1]).items() if name in ("forward", "act", "steps", "held", "to")}
    groups = dependency_groups(model, images[:2], CONFIG)
    masks = masks_of(RandomPruner(model, groups, seed=0))
    small = to_dense(model, images[:2], masks)
    assert len(small[1].first.weight) == 4
    with torch.no_grad():
        before = small(images)
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
        torch.testing.assert_close(small(images), before)
    assert all(vars(model[1])[name] is value for name, value in held.items() if how not in FORWARDS)


def test_a_forward_that_calls_the_old_one_by_a_global_name_runs_the_copys():
    # as in a notebook: `old = model.forward`, then `model.forward = lambda x: old(x) * 2`
    model, images = _network("partial"), torch.randn(1, 3, 6, 6)
    names = {"old": model[1].forward}
    model[1].forward = eval("lambda x: old(x) * 2", names)
    expected, copied = model(images), detached_copy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    torch.testing.assert_close(copied(images), expected)
    assert names["old"].__self__ is model[1]


def test_a_function_keeps_what_is_not_of_the_model():
    model, seen = _network("hook"), []
    model[0].register_forward_hook(lambda module, args, output: seen.append((module, model[1].scale)))
    copied = detached_copy(model)
    copied(torch.randn(1, 3, 6, 6))
    assert seen == [(copied[0], copied[1].scale)]


def test_a_weak_reference_to_a_module_is_refused():
    with pytest.raises(ConfigError, match=r"weak references, got one; .* \(Conv2d\)$"):
        dependency_groups(_network("weak reference"), torch.randn(1, 3, 6, 6), CONFIG)


@pytest.mark.parametrize("make", [lambda: (n for n in range(3)), threading.Event, queue.Queue, threading.Condition])
def test_a_model_that_cannot_be_copied_is_refused_with_the_attribute(make):
    model = _network("partial")
    model[1].before, model[1].refused = [1], {"inner": make()}
    with pytest.raises(ConfigError, match=r"able to copy a model, got: .* \(1\.refused\)$"):
        dependency_groups(model, torch.randn(1, 3, 6, 6), CONFIG)


def test_attributes_are_put_back_in_their_order_and_new_ones_go():
    layer = nn.Linear(2, 2)
    layer.one, layer.two = 1, 2
    names = list(vars(layer))
    with left_alone(layer):
        del layer.one
        layer.one, layer.two, layer.three = 1, 3, 3
        layer.register_buffer("new", torch.zeros(1))
        layer.requires_grad_(False)
        layer.weight = nn.Parameter(torch.zeros(2, 2))
    assert list(vars(layer)) == names
    assert (layer.one, layer.two, list(layer._buffers)) == (1, 2, [])
    assert bool(layer.weight.any())
    assert layer.weight.requires_grad


def test_gradients_are_away_within_the_block_and_back_after_it():
    layer = nn.Linear(2, 2)
    layer.weight.grad = gradient = torch.ones(2, 2)
    with left_alone(layer):
        assert layer.weight.grad is None
        layer(torch.ones(1, 2)).sum().backward()
    assert layer.weight.grad is gradient
    assert gradient.tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert layer.bias.grad is None


class Shared(nn.Linear):
    """A layer that all copies of a model share, such as a frozen encoder."""

    def __deepcopy__(self, memo):
        return self


class SharedWeight(nn.Linear):
    """A layer whose copies share its weight."""

    def __deepcopy__(self, memo):
        new = SharedWeight(self.in_features, self.out_features)
        new.weight = self.weight
        return new


@pytest.mark.parametrize("kind", [Shared, SharedWeight])
def test_a_model_whose_copies_share_what_it_holds_is_refused_and_keeps_its_weights(kind):
    model = nn.Sequential(kind(4, 8), nn.Linear(8, 3))
    weight = model[0].weight.detach().clone()
    with pytest.raises(ConfigError, match=r"of its own, .* \(0\)$"):
        dependency_groups(model, torch.randn(2, 4), [{"op_types": ["Linear"], "sparse_ratio": 0.5}])
    assert torch.equal(model[0].weight, weight)


class Remembering(nn.Module):
    """Bounds its weights and lets a memory grow in each forward, by giving both other tensors' memory."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)
        self.register_buffer("memory", torch.zeros(3, 4))

    def forward(self, rows):
        self.first.weight.data = self.first.weight.data.renorm(2, 0, 0.1)  # as EEGNet does
        self.memory.data = torch.cat([self.memory, rows])
        return self.second(torch.relu(self.first(rows)))


def test_memory_that_a_forward_replaces_is_put_back():
    model, rows = Remembering(), torch.randn(8, 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pruner = RandomPruner(model, dependency_groups(model, rows, [{"op_types": ["Linear"], "sparse_ratio": 0.5}]))
    pruner.compress()
    pruner.unwrap_model()
    with left_alone(model):
        model(rows)
        assert len(model.memory) > 3
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
