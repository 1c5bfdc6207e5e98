"""The package on another device: what it makes lies there, and equals what it makes on the CPU.

Each case works on a device and returns what can be compared. Choices have to be the same, figures within rounding:
`far` computes by the CPU's own kernels, a GPU by others.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from device_cases import (
    BATCHES,
    CPU,
    FREE,
    GENERATIONS,
    HALF,
    IMAGES,
    LABELLED,
    LINEAR,
    SEARCH,
    agree,
    prune,
    states,
)
from torch import nn

import nni_topo
from nni_topo import zoo
from nni_topo.errors import ConfigError
from nni_topo.pruners.registry import list_pruners
from nni_topo.recovery import distillation
from nni_topo.recovery.registry import list_recoveries
from nni_topo.runs.run import resolve_device
from nni_topo.testing import toy_images, toy_model

KNOBS: dict[str, dict[str, Any]] = {
    "genetic_weight": {"validation": LABELLED, "search": GENERATIONS},
    "slim": {"evaluator": "toy", "training_steps": 3, "config": [{"op_types": ["BatchNorm2d"], "sparse_ratio": 0.5}]},
    "taylor": {"evaluator": "toy", "training_steps": 3},
    "perera2022": {"search": GENERATIONS},
}
"""What a pruner needs here beyond the toy network's knobs."""


@pytest.mark.parametrize("name", list_pruners("*"))
@pytest.mark.quick_every(4)
def test_every_pruner(device, name):
    agree(lambda place: prune(name, place, **KNOBS.get(name, {}))[1], device)


CHOICES: dict[str, tuple[str, dict[str, Any]]] = {
    "functional": ("topological", {"cloud": "functional", "calibration": BATCHES}),
    "reconstruction": ("reconstruction", {"calibration": BATCHES}),
    "cover": ("topological", {"criterion": "cover"}),
    "bottleneck": (
        "topological",
        {"config": LINEAR, "criterion": "bottleneck", "homology_dimensions": (0, 1), **SEARCH},
    ),
    "flops": ("topological", {"config": FREE, "budget": {"flops": 0.5, "allocation": "topological"}}),
    "group": (
        "topological",
        {"config": [{"op_names": ["stem", "inner"], "sparse_ratio": 0.5, "dependency_group_id": 1}]},
    ),
    "spectral": ("cluster", {"algorithm": "spectral"}),
    "subcluster mean": ("subcluster", {"growth": {"statistic": "mean"}}),
}
"""Clouds, criteria and other ways of the pruners."""


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.quick_every(3)
def test_clouds_and_criteria(device, choice):
    name, knobs = CHOICES[choice]
    agree(lambda place: prune(name, place, **knobs)[1], device)


@pytest.mark.parametrize(
    "knobs",
    [
        {"method": "reconstruct"},
        {"method": nni_topo.recovery.Reconstruct(refine=0), "ridge": 1e-3, "cache_bytes": 1},
        *({"method": method} for method in list_recoveries() if method != "reconstruct"),
        {"method": nni_topo.recovery.Pair({"hidden": {0: 1}}, as_printed=True)},
    ],
)
@pytest.mark.quick_every(4)
def test_compensation(device, knobs):
    def run(place: torch.device) -> Any:
        model, masks = toy_model().to(place).eval(), {"hidden": {"weight": torch.ones(16, 8, device=place)}}
        masks["hidden"]["weight"][[0, 3, 7]] = 0.0
        return states(nni_topo.compensate(model, masks, BATCHES, **knobs), place)

    agree(run, device)


@pytest.mark.slow
def test_distillation(device):
    def run(place: torch.device) -> Any:
        dense, original = toy_model().to(place).eval(), toy_model(1).to(place).eval()
        images = [toy_images(300, seed=1)]
        knobs = {"objective": "squares", "augment": lambda images: images + 0.1}
        found = distillation(dense, original, images, steps=60, lr=1e-3, **knobs)
        assert found.is_kept
        # Not the weights: a change in the last bit of one grows in sixty steps, while the loss comes out the same.
        assert all(tensor.device == place for tensor in states(found.model, place).values())
        return found.loss_before, found.loss_after

    agree(run, device)


def grouped(place: torch.device, name: str = "l1", **more: Any) -> tuple[nn.Module, Any]:
    """Prune the toy network by groups, so that it can be made dense."""
    example = IMAGES[:2].to(place)
    config = nni_topo.dependency_groups(toy_model().to(place), example, [{**HALF[0], **more}])
    return prune(name, place, config)


def test_dense_and_masked_models_also_by_masks_of_the_cpu(device):
    def run(place: torch.device) -> Any:
        model, masks = grouped(place)
        example = IMAGES[:2].to(place)
        dense = nni_topo.to_dense(model, example, masks)
        assert dense.stem.out_channels == dense.inner.in_channels == 4
        rounded = nni_topo.to_dense(model, example, grouped(CPU)[1], round_to=3)
        masked = nni_topo.masked_model(model, example, masks)
        inputs = IMAGES.to(place)
        return [states(net, place) for net in (dense, rounded, masked)], [net.eval()(inputs) for net in (dense, masked)]

    agree(run, device)


def test_saved_and_loaded(device, tmp_path):
    model, masks = grouped(device)
    dense = nni_topo.to_dense(model, IMAGES[:2].to(device), masks)
    nni_topo.save(dense, tmp_path / "dense.pt")
    zoo.save_checkpoint(tmp_path / "net.pt", dense, {"seed": 1})
    for place in (device, CPU):
        loaded = states(nni_topo.load(tmp_path / "dense.pt", toy_model().to(place)), place)
        assert all(torch.equal(value.cpu(), loaded[name].cpu()) for name, value in dense.state_dict().items())
    read = copy.deepcopy(dense).cpu()
    with torch.no_grad():
        read.stem.weight.zero_()
    assert zoo.load_checkpoint(tmp_path / "net.pt", read)["seed"] == 1
    assert all(torch.equal(value.cpu(), read.state_dict()[name]) for name, value in dense.state_dict().items())


def digits() -> zoo.DataBundle:
    return zoo.load_data("digits", limit=96)


def small(place: torch.device) -> nn.Module:
    return zoo.create_model("small_cnn", num_classes=10, in_channels=1, image_size=8, seed=0).to(place)


def test_training_is_the_cpus(device):
    recipe = zoo.Recipe(epochs=2, batch_size=32, augmentation="crop-flip")

    def run(place: torch.device) -> Any:
        model = small(CPU)
        log = zoo.train(model, digits(), recipe, seed=1, device=place)
        trained = copy.deepcopy(states(model, place))
        # without a device's name, where the model lies
        accuracy = zoo.evaluate(model, digits().test)
        zoo.train(model, digits(), dataclasses.replace(recipe, epochs=1), seed=2)
        return [epoch.loss for epoch in log.epochs], accuracy, trained, states(model, place)

    agree(run, device)


def test_batch_norms_measured_anew(device):
    agree(lambda place: states(nni_topo.recalibrate_batch_norm(toy_model().to(place), BATCHES), place), device)


def test_a_device_is_found_by_its_name_and_what_cannot_compute_here_is_none(device):
    assert resolve_device(str(device)) == device
    for name in ("tpu", "meta", "cuda:99"):
        with pytest.raises(ConfigError, match=rf"device must be cpu, cuda or auto, .* got '{name}'"):
            resolve_device(name)


class _Positions(nn.Module):
    """Makes a tensor without saying where, as models do that rely on PyTorch's default device."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 16), nn.Linear(16, 12), nn.Linear(12, 3)

    def forward(self, x):
        return self.head(self.second(self.first(x + torch.arange(6) / 6).relu()).relu())


@pytest.fixture
def default(device):
    torch.set_default_device(device)
    yield device
    assert torch.get_default_device() == device
    torch.set_default_device(None)


def test_default_device(default):
    with torch.device(CPU):
        torch.manual_seed(0)
        model = _Positions().eval()
        images = torch.randn(48, 6, generator=torch.Generator().manual_seed(1))
        expected = nni_topo.shrink(model, images.split(16), {"params": 0.5}, round_to=1, distill=False).state_dict()
    batches = images.to(default).split(16)
    model = model.to(default)
    # On a GPU multiples of eight channels would be kept.
    found = states(nni_topo.shrink(model, batches, {"params": 0.5}, round_to=1, distill=False), default)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.cpu(), expected[name], rtol=1e-3, atol=1e-4)
    states(nni_topo.distill(copy.deepcopy(model), model, batches, steps=20), default)
