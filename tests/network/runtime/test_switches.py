"""What the whole process has: random states, switches of PyTorch, turns of threads."""

from __future__ import annotations

import random
import threading

import numpy as np
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
