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


def found_bound(place: torch.device) -> Any:
    return analysis.error_bound(chain(place), changed(place), IMAGES[:3].to(place), iterations=2)


def found_retraining(place: torch.device) -> Any:
    nets = (toy_model(1).to(place), toy_model(2).to(place), perturbed(place))
    batches = [(images.to(place), labels.to(place)) for images, labels in LABELLED]
    return analysis.retraining_bound(*nets, cross_entropy, batches, 3)


def found_selection(place: torch.device) -> Any:
    batches = [(images.to(place), labels.to(place)) for images, labels in LABELLED]
    found = analysis.study_selection(
        toy_model().to(place).eval(),
        "stem",
        IMAGES[:1].to(place),
        batches,
        dataset_quality(place),
        keep=5,
        evolution=GeneticSearch(**GENERATIONS),
    )
    return found


def found_replacement(place: torch.device) -> Any:
    model = toy_model().to(place).eval()
    return analysis.study_replacement(
        model,
        "stem",
        IMAGES[:1].to(place),
        dataset_quality(place),
        threshold=0.4,
    )


def found_accumulated(place: torch.device) -> Any:
    model = toy_model().to(place).eval()
    return analysis.accumulate_energy(model, [("stem", "inner")], IMAGES[:1].to(place), dataset_quality(place))


def found_topology(place: torch.device) -> Any:
    found = analysis.study_topology(toy_model().to(place), HALF, **SEARCH)
    # Masks are on the CPU, as the pruner's data are, until they are put into a model.
    return [(layer.kept, layer.deaths, layer.bottleneck, layer.hausdorff) for layer in found.layers], found.masks


def found_connectivity(place: torch.device) -> Any:
    model = chain(place)
    masks = {"4": {"weight": (model[4].weight > 0).float()}, "7": {"weight": (model[7].weight > 0).float()}}
    return analysis.connectivity(model, IMAGES[:1].to(place), masks)


def found_sensitivity(place: torch.device) -> Any:
    judge = dataset_quality(place)
    found = analysis.sensitivity(
        toy_model().to(place), IMAGES[:1].to(place), lambda net: judge(net).accuracy, ratios=(0.5,), layers=["hidden"]
    )
    return found.baseline, found.curves


def found_dropout(place: torch.device) -> Any:
    found = analysis.study_dropout({"net": lambda: chain(place)}, dataset_quality(place), rates=(0.0, 0.5))
    return found["net"][0.5]


def found_persistence(place: torch.device) -> Any:
    model = toy_model().to(place)
    unrolled = analysis.neural_persistence(model, IMAGES[:1].to(place), conv_graph="toeplitz")
    return analysis.neural_persistence(model).layers, unrolled.layers


STUDIES: list[Case] = [
    found_accumulated,
    found_bound,
    found_connectivity,
    found_dropout,
    found_persistence,
    found_replacement,
    found_retraining,
    found_selection,
    found_sensitivity,
    found_topology,
    lambda place: analysis.critical_compression_ratio(toy_model().to(place), IMAGES[:1].to(place)).layers,
]


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: getattr(study, "__name__", "")[6:] or None)
@pytest.mark.quick_every(3)
def test_studies(device, study):
    agree(study, device)


def test_layers_are_timed_where_they_lie(device):
    table = measure_latency(chain(device), IMAGES[:2].to(device))
    assert set(table.layers) == {"0", "4", "7"}
