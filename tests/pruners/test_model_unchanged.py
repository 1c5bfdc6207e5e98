"""A user's model is byte-equal after pruning and unwrapping, and after an error: all of it, and what lies beside it."""

from __future__ import annotations

import copy
import random

import nni
import numpy as np
import pytest
import torch
from nni.compression import TorchEvaluator
from torch import nn

import nni_topo
from nni_topo.errors import DataError
from nni_topo.pruners.registry import list_pruners, pruner_info
from nni_topo.testing import require_unchanged, snapshot, toy_images, toy_knobs

OWN = [name for name in list_pruners() if pruner_info(name).origin == "nni_topo"]
CONFIG = [{"op_names": ["fourth", "fifth"], "sparse_ratio": 0.5}]


class Awkward(nn.Module):
    """Spectral norms old and new, batch norms, dropout, ties, hooks, frozen weights; half of it in training mode."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first = nn.Conv2d(3, 8, 3, padding=1)
            self.norm = nn.BatchNorm2d(8)
            self.second = nn.utils.spectral_norm(nn.Conv2d(8, 8, 3, padding=1))
            self.third = nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 3, padding=1))
            self.fourth = nn.Conv2d(8, 8, 3, padding=1)
            self.fifth = nn.Conv2d(8, 8, 3, padding=1)
            self.head, self.drop = nn.Linear(8, 4), nn.Dropout(0.5)
            self.twin = nn.Linear(8, 4)
            self.twin.weight = self.head.weight
        self.register_buffer("calls", torch.zeros(()))
        self.fourth.weight.requires_grad_(False)
        self.head.register_forward_hook(lambda module, args, output: output * 2)
        self.norm.train()
        self.drop.eval()
        self.fourth.eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images ``(n, 3, 8, 8)`` to ``(n, 4)``, and count."""
        self.calls += 1
        features = torch.relu(self.second(torch.relu(self.norm(self.first(images)))))
        features = torch.relu(self.fifth(torch.relu(self.fourth(torch.relu(self.third(features))))))
        features = self.drop(features.mean((2, 3)))
        return self.head(features) + self.twin(features)


def careless_evaluator(model):
    """An evaluator that trains nothing, draws from all generators, and leaves the model in training mode."""

    def evaluate(model):
        model.train()
        order = torch.randperm(16)
        random.random()
        np.random.rand()
        with torch.no_grad():
            return float(model(toy_images(16)[order]).std())

    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.1)
    return TorchEvaluator(lambda *args, **kwargs: None, optimizer, lambda batch, model: None, evaluating_func=evaluate)


def knobs_of(name, way):
    info = pruner_info(name)
    knobs = toy_knobs(info.knobs(), info.needs)
    if way == "evaluator":
        knobs.pop("calibration", None)
    elif "calibration" in info.knobs():
        knobs["calibration"] = [toy_images(16)]
    if name == "genetic_weight":
        knobs["search"] = {"generations": 1, "population_size": 3}
    if name == "genetic_weight" and way == "calibration":
        knobs["validation"] = [(toy_images(16), torch.arange(16) % 4)]
    return knobs


@pytest.mark.parametrize(
    ("name", "way"),
    # What needs images doesn't take an evaluator in their place.
    [(name, "calibration") for name in OWN]
    + [(name, "evaluator") for name in OWN if "calibration" not in pruner_info(name).needs],
)
@pytest.mark.quick_every(4)
def test_all_of_a_model_is_as_it_was_after_pruning_and_after_an_error(name, way):
    model, config = Awkward(), copy.deepcopy(CONFIG)
    knobs = knobs_of(name, way)
    evaluator = careless_evaluator(model) if way == "evaluator" else None
    before = snapshot(model)
    pruner = nni_topo.create_pruner(name, model, config, evaluator=evaluator, **knobs)
    pruner.compress()
    pruner.unwrap_model()
    require_unchanged(before, model)
    assert config == CONFIG


READERS = [name for name in OWN if pruner_info(name).needs]


@pytest.mark.parametrize("name", READERS)
def test_all_of_a_model_is_as_it_was_where_a_batch_does_not_fit(name):
    model, bad = Awkward(), toy_images(2)[:, :1]
    knobs = knobs_of(name, "calibration")
    knob = "validation" if name == "genetic_weight" else "calibration"
    knobs[knob] = [*knobs[knob], (bad, torch.zeros(2, dtype=torch.long))]
    before = snapshot(model)
    with pytest.raises(DataError, match=rf"{knob} must fit the model, got RuntimeError.*\(batch 1\)"):
        nni_topo.create_pruner(name, model, CONFIG, **knobs).compress()
    require_unchanged(before, model)
