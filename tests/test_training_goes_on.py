"""Training goes on after pruning: with what trains networks elsewhere, a pruned one trains as any other does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from training_nets import PROCESSES, Net, labelled, pruned_net, step, train_shared

import nni_topo

IMAGES, LABELS = labelled()


@pytest.fixture(scope="module")
def made() -> Any:
    return pruned_net()


@pytest.fixture
def dense(made: Any) -> Any:
    return copy.deepcopy(made)


def gradients(model: nn.Module) -> list[torch.Tensor]:
    found = []
    for parameter in model.parameters():
        assert parameter.grad is not None
        found.append(parameter.grad.clone())
    return found


def test_an_optimizer_made_after_pruning_trains_every_parameter(dense: Any) -> None:
    kinds = {type(module).__name__ for module in dense.modules()}
    assert {"LayerNorm", "RMSNorm", "GroupNorm", "ResponseNorm", "PrunedMultiheadAttention"} <= kinds
    before = {name: parameter.detach().clone() for name, parameter in dense.named_parameters()}
    optimizer = torch.optim.AdamW(dense.train().parameters(), 0.01)
    losses = [step(dense, optimizer, IMAGES, LABELS) for _ in range(8)]
    assert losses[-1] < losses[0] - 0.03
    for name, parameter in dense.named_parameters():
        # The batch norm after it takes the mean away: the gradient of that bias is rounding alone.
        assert name == "stem.0.bias" or not torch.equal(before[name], parameter)


def test_what_was_frozen_stays_frozen() -> None:
    torch.manual_seed(0)
    model = Net().eval()
    model.stem.requires_grad_(False)
    groups = nni_topo.dependency_groups(model, IMAGES, [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.5}])
    masks = nni_topo.create_pruner("l1", copy.deepcopy(model), groups).compress()[1]
    dense = nni_topo.to_dense(model, IMAGES, masks)
    assert dense.stem[0].out_channels < 16
    trained = {name for name, parameter in dense.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_mixed_precision_trains_as_single_precision_does(dense: Any) -> None:
    plain = copy.deepcopy(dense)
    losses = []
    optimizer = torch.optim.AdamW(dense.train().parameters(), 0.01)
    for _ in range(6):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = dense(IMAGES)
            loss = nn.functional.cross_entropy(logits.float(), LABELS)
        assert logits.dtype == torch.bfloat16
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    optimizer = torch.optim.AdamW(plain.train().parameters(), 0.01)
    expected = [step(plain, optimizer, IMAGES, LABELS) for _ in range(6)]
    assert losses == pytest.approx(expected, abs=0.02)
    assert losses[-1] < losses[0]
    assert {parameter.dtype for parameter in dense.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_it_computes_in_half_precision(dense: Any, kind: torch.dtype) -> None:
    with torch.no_grad():
        wanted = dense(IMAGES)
        found = dense.to(kind)(IMAGES.to(kind))
    assert found.dtype == kind
    assert (found - wanted).abs().max() < 16 * torch.finfo(kind).eps * wanted.abs().max()


@pytest.mark.slow
def test_it_is_compiled_once_for_training_and_once_for_evaluation(dense: Any) -> None:
    torch._dynamo.reset()
    plain, counter = copy.deepcopy(dense).train(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(dense.train(), backend=counter, fullgraph=True)
    for model in (plain, compiled):
        nn.functional.cross_entropy(model(IMAGES), LABELS).backward()
    torch.testing.assert_close(gradients(dense), gradients(plain))
    optimizer = torch.optim.SGD(dense.parameters(), 0.1)
    for _ in range(3):
        step(compiled, optimizer, IMAGES, LABELS)
    assert counter.frame_count == 1
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled.eval()(IMAGES), dense.eval()(IMAGES))
    assert counter.frame_count == 2


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this build of PyTorch has no torch.distributed")
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_processes_train_as_one_does(dense: Any, how: str, tmp_path: Path) -> None:
    nni_topo.save(dense, tmp_path / "dense.pt")
    torch.multiprocessing.spawn(train_shared, (how, tmp_path / "dense.pt", tmp_path), PROCESSES)
    found = torch.load(tmp_path / f"{how}.pt", weights_only=True)
    optimizer = torch.optim.SGD(dense.parameters(), 0.1)
    start = copy.deepcopy(dense.state_dict())
    for _ in range(2):
        step(dense, optimizer, IMAGES, LABELS)
    wanted = dense.state_dict()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
    assert any(not torch.equal(start[name], value) for name, value in wanted.items())
