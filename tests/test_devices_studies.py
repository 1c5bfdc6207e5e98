"""Studies on another device find what they find on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from device_cases import (
    CPU,
    GENERATIONS,
    HALF,
    IMAGES,
    LABELLED,
    LABELS,
    SEARCH,
    Case,
    agree,
)
from torch import nn
from torch.nn.functional import cross_entropy

from nni_topo import analysis
from nni_topo.maths.search.subsets import GeneticSearch
from nni_topo.speedup import measure_latency
from nni_topo.studies.analysis.energy.study import Quality
from nni_topo.testing import toy_model


def dataset_quality(place: torch.device) -> Callable[[nn.Module], Quality]:
    """Judge a network by its loss and accuracy on the toy images."""

    def judge(model: nn.Module) -> Quality:
        with torch.no_grad():
            logits = copy.deepcopy(model).eval()(IMAGES.to(place)).cpu()
        return Quality(float(cross_entropy(logits, LABELS)), float((logits.argmax(1) == LABELS).double().mean()))

    return judge


def perturbed(place: torch.device) -> nn.Module:
    model = toy_model().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    return model.to(place)


def chain(place: torch.device) -> nn.Module:
    """A plain stack with a dropout in it, small enough for bounds."""
    torch.manual_seed(1)
    layers = [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, 8), nn.ReLU(), nn.Dropout()]
    return nn.Sequential(*layers, nn.Linear(8, 4)).to(place).eval()


def changed(place: torch.device) -> nn.Module:
    model = chain(CPU)
    with torch.no_grad():
        model[4].weight[:2] = 0.0
    return model.to(place)


def labelled(place: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(images.to(place), labels.to(place)) for images, labels in LABELLED]


def example(place: torch.device) -> torch.Tensor:
    return IMAGES[:1].to(place)


def toy(place: torch.device, seed: int = 0) -> nn.Module:
    return toy_model(seed).to(place).eval()


def connectivity(place: torch.device) -> Any:
    model = chain(place)
    masks = {name: {"weight": (model[int(name)].weight > 0).float()} for name in ("4", "7")}
    return analysis.connectivity(model, example(place), masks)


def selection(place: torch.device) -> Any:
    knobs = {"keep": 5, "evolution": GeneticSearch(**GENERATIONS)}
    return analysis.study_selection(
        toy(place), "stem", example(place), labelled(place), dataset_quality(place), **knobs
    )


def topology(place: torch.device) -> Any:
    found = analysis.study_topology(toy(place), HALF, **SEARCH)
    # Masks are on the CPU, as the pruner's data are, until they are put into a model.
    return [(layer.kept, layer.deaths, layer.bottleneck, layer.hausdorff) for layer in found.layers], found.masks


def persistence(place: torch.device) -> Any:
    unrolled = analysis.neural_persistence(toy(place), example(place), conv_graph="toeplitz")
    return analysis.neural_persistence(toy(place)).layers, unrolled.layers


STUDIES: dict[str, Case] = {
    "bound": lambda place: analysis.error_bound(chain(place), changed(place), IMAGES[:3].to(place), iterations=2),
    "connectivity": connectivity,
    "persistence": persistence,
    "retraining": lambda place: analysis.retraining_bound(
        toy(place, 1), toy(place, 2), perturbed(place), cross_entropy, labelled(place), 3
    ),
    "selection": selection,
    "topology": topology,
    "compression": lambda place: analysis.critical_compression_ratio(toy(place), example(place)).layers,
}


@pytest.mark.parametrize("study", STUDIES)
@pytest.mark.quick_every(3)
def test_studies(device, study):
    agree(STUDIES[study], device)


def test_layers_are_timed_where_they_lie(device):
    table = measure_latency(chain(device), IMAGES[:2].to(device))
    assert set(table.layers) == {"0", "4", "7"}
