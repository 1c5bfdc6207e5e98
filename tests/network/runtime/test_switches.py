"""What the whole process has: random states, switches of PyTorch, turns of threads."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest
import torch
from torch import nn

import nni_topo
from nni_topo.network.runtime.copies import left_alone
from nni_topo.network.runtime.switches import drawn_since, random_state_kept, random_states
from nni_topo.testing import toy_images, toy_model


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
