"""What is written down of models, and put back, whatever they hold it in."""

from __future__ import annotations

import logging
import random
import threading
from collections import OrderedDict

import joblib
import numpy as np
import pytest
import torch
from torch import nn

import nni_topo
from nni_topo.network.runtime.untouched import (
    drawn_since,
    has_compiled,
    leaves_models_alone,
    left_alone,
    one_call,
    random_state_kept,
    random_states,
)
from nni_topo.studies.analysis.sensitivity import sensitivity
from nni_topo.testing import toy_images, toy_model

# What a module holds, what a forward does to it, and what is looked at before and after.
HELD = {
    "dict": ({"a": 1}, lambda held: held.update(a=2), dict),
    "order": (OrderedDict(a=1, b=2), lambda held: held.move_to_end("a"), list),
    "list": ([1, 2], lambda held: held.append(3), list),
    "set": ({1, 2}, lambda held: held.add(3), set),
}


class Holding(nn.Module):
    """Holds something in an attribute."""

    def __init__(self, held: object) -> None:
        super().__init__()
        self.held = held


@pytest.mark.parametrize("name", HELD)
def test_what_a_module_holds_is_put_back(name):
    held, change, look = HELD[name]
    model, before = nn.Sequential(Holding(held)), look(held)
    with left_alone(model):
        change(held)
        assert look(held) != before
    assert look(held) == before
    assert model[0].held is held


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


def test_a_buffer_of_inference_mode_is_put_back():
    model = nn.Module()
    with torch.inference_mode():
        model.register_buffer("sizes", torch.zeros(2))
    with left_alone(model), torch.inference_mode():
        model.sizes += 1.0
    assert model.sizes.tolist() == [0.0, 0.0]


def test_a_scripted_part_keeps_its_mode_and_its_buffers():
    model = nn.Sequential(torch.jit.script(nn.BatchNorm1d(2)))
    model[0].weight.grad = torch.ones(2)
    with left_alone(model):
        assert model[0].weight.grad is None
        model(torch.randn(4, 2))
        model.eval()
    assert model[0].training
    assert int(model[0].num_batches_tracked) == 0


@pytest.mark.parametrize("has_room", [True, False])
def test_parameters_that_a_forward_writes_to_stay_or_are_named_where_memory_is_short(has_room, monkeypatch, caplog):
    if not has_room:
        monkeypatch.setattr("nni_topo.network.runtime.untouched._SHARE", 0.0)
    model = nn.Sequential(nn.Linear(2, 2))
    before = model[0].weight.detach().clone()
    with torch.no_grad():
        leaves_models_alone(lambda given: given[0].weight.mul_(2.0))(model)
    assert torch.equal(model[0].weight, before) == has_room
    assert ("0.weight" in caplog.text) != has_room


def test_autocast_of_the_caller_is_off_and_a_models_own_works():
    layer, rows = nn.Linear(2, 2), torch.ones(1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        with left_alone(layer):
            assert layer(rows).dtype == torch.float32
            with torch.autocast("cpu", torch.bfloat16):
                assert layer(rows).dtype == torch.bfloat16
        with left_alone(layer, as_compiled=True):
            assert torch.is_autocast_enabled("cpu")


def test_what_is_made_within_a_callers_inference_mode_takes_gradients():
    with torch.inference_mode():
        with left_alone(nn.ReLU()):
            assert not torch.zeros(1).is_inference()
        assert torch.zeros(1).is_inference()


def test_random_states_are_those_before_and_tell_of_draws():
    states = random_states()
    before = random.random(), float(np.random.rand()), float(torch.rand(1))
    assert drawn_since(states)
    assert not drawn_since(random_states())
    with random_state_kept():
        within = random.random(), float(np.random.rand()), float(torch.rand(1))
    assert (random.random(), float(np.random.rand()), float(torch.rand(1))) == within != before


@pytest.mark.skipif(torch.cuda.is_initialized(), reason="CUDA is started, so that no seed waits for it")
def test_a_dense_network_is_made_without_a_seed_for_a_gpu_that_is_not_in_use():
    def waiting():
        return torch.cuda._lazy_seed_tracker.get_calls()

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        seeds = waiting()
        assert seeds
        model, images = toy_model().eval(), toy_images(4)
        groups = nni_topo.dependency_groups(model, images, [{"op_names": ["hidden"], "sparse_ratio": 0.5}])
        masks = nni_topo.create_pruner("l1", toy_model().eval(), groups).compress()[1]
        nni_topo.to_dense(model, images, masks)
        nni_topo.distill(model, toy_model(1).eval(), [images], steps=1, lr=1e-4, augment=lambda given: given + 0.1)
        assert waiting() == seeds
        torch.manual_seed(6)
        assert waiting() != seeds


def test_the_compiler_is_off_for_models_that_are_compiled_alone():
    compiled = nn.Sequential(nn.Linear(2, 2))
    compiled.compile(backend="eager")
    for models, as_compiled, stance in (
        ([nn.ReLU(), None], False, "default"),
        ([nn.ReLU(), compiled], False, "force_eager"),
        ([compiled], True, "default"),
    ):
        with left_alone(*models, as_compiled=as_compiled):
            assert torch._dynamo.eval_frame._stance.stance == stance
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_compiled_parts_are_found_wherever_they_are():
    plain, inside, as_forward = (nn.Sequential(nn.Linear(2, 2)) for _ in range(3))
    assert not has_compiled(plain)
    inside[0].compile(backend="eager")
    assert has_compiled(inside)
    as_forward[0].forward = torch.compile(as_forward[0].forward, backend="eager")
    assert has_compiled(as_forward)
    assert has_compiled(nn.Sequential(torch.compile(nn.Linear(2, 2), backend="eager")))


def test_threads_that_prune_one_model_get_what_each_gets_alone():
    torch.manual_seed(0)
    model, batches = toy_model(), [toy_images(16)]
    model(batches[0]).sum().backward()
    before = [parameter.grad.clone() for parameter in model.parameters()]

    def pruned(share: float) -> nn.Module:
        small: nn.Module = nni_topo.shrink(model, batches, {"flops": share}, distill=False, progress=False)
        return small

    shares = (0.4, 0.8)
    alone, found = [pruned(share)(batches[0]) for share in shares], {}
    threads = [
        threading.Thread(target=lambda share=share: found.update({share: pruned(share)(batches[0])}))  # type: ignore[misc]
        for share in shares
    ]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert all(torch.equal(found[share], wanted) for share, wanted in zip(shares, alone, strict=True))
    assert all(torch.equal(parameter.grad, known) for parameter, known in zip(model.parameters(), before, strict=True))


def test_a_thread_that_waits_for_its_turn_says_so(monkeypatch, caplog):
    monkeypatch.setattr("nni_topo.network.runtime.untouched._PATIENCE", 0.01)
    thread = threading.Thread(target=one_call()(lambda: None))
    with caplog.at_level(logging.WARNING), one_call():
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
    thread.join()
    waits = "calls in several threads run one after another: this one waits for that of another thread"
    assert [record.getMessage() for record in caplog.records] == [waits]


@pytest.mark.slow
def test_a_users_function_may_wait_for_a_call_of_another_thread():
    model, found = toy_model(), []
    model(toy_images(4)).sum().backward()
    before = [parameter.grad.clone() for parameter in model.parameters()]
    request = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]

    def evaluate(net: nn.Module) -> float:
        def look() -> None:
            found.append(nni_topo.dependency_groups(model, toy_images(4), request))

        thread = threading.Thread(target=look)
        thread.start()
        found.append(nni_topo.dependency_groups(net, toy_images(4), request))  # at the same time
        thread.join()
        return 1.0

    nni_topo.shrink(model, [toy_images(16)], tolerance=0.5, evaluate=evaluate, distill=False, progress=False)
    assert len(found) > 2
    assert all(torch.equal(parameter.grad, known) for parameter, known in zip(model.parameters(), before, strict=True))


def test_jobs_of_a_study_may_be_threads():
    torch.manual_seed(0)
    model, images = toy_model(), toy_images(8)

    def evaluate(net: nn.Module) -> float:
        with torch.no_grad():
            return float(net(images).mean().sigmoid())

    alone = sensitivity(model, images, evaluate, (0.5,))
    with joblib.parallel_config("threading"):
        found = sensitivity(model, images, evaluate, (0.5,), n_jobs=2)
    assert [curve.accuracy for curve in found.curves] == [curve.accuracy for curve in alone.curves]


class Emptying(nn.Module):
    """Takes the last entry out of a table, or puts a first one in."""

    def __init__(self, change):
        super().__init__()
        self.register_buffer("only", torch.ones(2))
        self.layer, self.change = nn.ReLU(), change

    def forward(self, rows):
        self.change(self)
        return rows


@pytest.mark.parametrize(
    "change",
    [
        lambda model: delattr(model, "only"),
        lambda model: model.register_parameter("first", nn.Parameter(torch.ones(1))),
    ],
    ids=["buffer", "parameter"],
)
def test_tables_that_become_empty_or_were_so_are_put_back(change):
    model = Emptying(change)
    tables = (model._buffers, model._modules, model._parameters, model._forward_hooks)
    before = [dict(table) for table in tables]
    with left_alone(model):
        model(torch.ones(1))
        assert [dict(table) for table in tables] != before
    assert [dict(table) for table in tables] == before
