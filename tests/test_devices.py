"""The package on another device: what it makes lies there, and equals what it makes on the CPU.

Each case works on a device and returns what can be compared. Choices have to be the same, figures within rounding:
`far` computes by the CPU's own kernels, a GPU by others.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from nni.compression.pruning import AGPPruner, LinearPruner
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_leaves

import nni_topo
from nni_topo import analysis, zoo
from nni_topo.analysis.energy.replacement import FilterEvolution
from nni_topo.analysis.energy.study import Quality
from nni_topo.errors import ConfigError
from nni_topo.maths.search.subsets import EvolutionSettings
from nni_topo.pruners.registry import create_pruner, list_pruners, pruner_info
from nni_topo.recovery import distillation
from nni_topo.recovery.compensating import METHODS
from nni_topo.runs.cells import run_cell
from nni_topo.runs.plan import (
    Cell,
    CompensationChoice,
    DataChoice,
    DistillationChoice,
    ModelChoice,
    PrunerChoice,
    Target,
)
from nni_topo.runs.processes import masks_digest
from nni_topo.runs.run import Start, resolve_device
from nni_topo.runs.scheduled import prune_on_schedule
from nni_topo.speedup import measure_latency
from nni_topo.testing import toy_evaluator, toy_images, toy_knobs, toy_model

HALF = [{"op_types": ["Conv2d", "Linear"], "exclude_op_names": ["head"], "sparse_ratio": 0.5}]
FREE = [{"op_types": ["Conv2d", "Linear"], "exclude_op_names": ["head"]}]
LINEAR = [{"op_names": ["hidden"], "sparse_ratio": 0.5}]
IMAGES = toy_images(12, seed=1)
LABELS = torch.arange(12) % 4
# Calibration data lie on the CPU, where a loader leaves them.
BATCHES = list(IMAGES.split(6))
LABELLED = [(IMAGES[:6], LABELS[:6]), (IMAGES[6:], LABELS[6:])]
GENERATIONS = {"population_size": 6, "generations": 2}
SEARCH = {"solver": GENERATIONS}

Case = Callable[[torch.device], Any]
CPU = torch.device("cpu")


def agree(case: Case, device: torch.device) -> None:
    """Run a case on the CPU and on a device, and compare: tensors, arrays, numbers and words, whatever holds them."""
    expected, found = tree_leaves(plain(case(CPU))), tree_leaves(plain(case(device)))
    assert len(expected) == len(found) > 0
    rtol, atol = (1e-5, 1e-7) if device.type == "far" else (1e-3, 1e-4)
    for one, other in zip(expected, found, strict=True):
        if np.asarray(one).dtype.kind == "f":
            np.testing.assert_allclose(other, one, rtol=rtol, atol=atol)
        else:
            np.testing.assert_array_equal(other, one)


def plain(value: Any) -> Any:
    """Return results as arrays, numbers and words."""
    if isinstance(value, Tensor):
        return value.detach().cpu().numpy()
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value) if "seconds" not in f.name}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items() if item is not None}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def states(model: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """Return a model's state, which has to lie on a device."""
    found = model.state_dict()
    assert {value.device for value in found.values()} == {device}
    return found


def prune(name: str, device: torch.device, config: Any = HALF, steps: Any = (), **knobs: Any) -> tuple[nn.Module, Any]:
    """Prune the toy network by name; return it unwrapped, and its masks, which have to lie where it lies."""
    model = toy_model().to(device)
    info = pruner_info(name)
    given = {**toy_knobs(info.knobs(), info.needs), **knobs}
    if given.get("evaluator") == "toy":
        given["evaluator"] = toy_evaluator(model)
    pruner = create_pruner(name, model, config, **given)
    _, masks = pruner.compress(*steps)
    pruner.unwrap_model()
    held = [mask for targets in masks.values() for mask in targets.values() if mask is not None]
    assert {mask.device for mask in held} == {device}
    assert all(set(mask.unique().tolist()) <= {0.0, 1.0} for mask in held)
    return model, masks


KNOBS: dict[str, dict[str, Any]] = {
    "genetic_weight": {"validation": LABELLED, "search": GENERATIONS},
    "slim": {"evaluator": "toy", "training_steps": 3, "config": [{"op_types": ["BatchNorm2d"], "sparse_ratio": 0.5}]},
    "taylor": {"evaluator": "toy", "training_steps": 3},
    "perera2022": {"search": GENERATIONS},
}
"""What a pruner needs here beyond the toy network's knobs."""


@pytest.mark.parametrize("name", list_pruners("*"))
def test_every_pruner(device, name):
    agree(lambda place: prune(name, place, **KNOBS.get(name, {}))[1], device)


CHOICES: dict[str, tuple[str, dict[str, Any]]] = {
    "folded": ("topological", {"cloud": "folded", "example_inputs": IMAGES[:2]}),
    "coupled": ("topological", {"cloud": "coupled", "example_inputs": IMAGES[:2]}),
    "activation": ("topological", {"cloud": "activation", "calibration": BATCHES}),
    "activation, evaluator": ("topological", {"cloud": "activation", "evaluator": "toy"}),
    "functional": ("topological", {"cloud": "functional", "calibration": BATCHES}),
    "gradient": ("topological", {"cloud": "gradient", "calibration": LABELLED}),
    "gradient, evaluator": ("topological", {"cloud": "gradient", "evaluator": "toy"}),
    "reconstruction": ("reconstruction", {"calibration": BATCHES}),
    "sequential": ("reconstruction", {"calibration": BATCHES, "sequential": True}),
    "cover": ("topological", {"criterion": "cover"}),
    "bottleneck": (
        "topological",
        {"config": LINEAR, "criterion": "bottleneck", "homology_dimensions": (0, 1), **SEARCH},
    ),
    "wasserstein": ("topological", {"criterion": "wasserstein", **SEARCH}),
    "gudhi": ("topological", {"criterion": "bottleneck", "solver": {**GENERATIONS, "engine": "gudhi"}}),
    "searched": ("topological", SEARCH),
    "standardize": ("topological", {"cloud": {"preprocess": "standardize"}}),
    "unit": ("topological", {"cloud": {"preprocess": "unit"}}),
    "narrow": ("topological", {"cloud": nni_topo.hooks.WeightCollector(max_features=4, preprocess="unit")}),
    "large": ("topological", {"cloud": nni_topo.hooks.WeightCollector(max_bytes=64)}),
    "flops": ("topological", {"config": FREE, "budget": {"flops": 0.5, "allocation": "topological"}}),
    "round_to": ("topological", {"round_to": 3}),
    "global": ("topological", {"config": [{**HALF[0], "global_group_id": 1}]}),
    "group": (
        "topological",
        {"config": [{"op_names": ["stem", "inner"], "sparse_ratio": 0.5, "dependency_group_id": 1}]},
    ),
    "spectral": ("cluster", {"algorithm": "spectral"}),
    "ward": ("cluster", {"algorithm": "ward", "pool": "mean"}),
    "survivor weight": ("cluster", {"survivor": "weight"}),
    "survivor bias": ("cluster", {"survivor": "bias"}),
    "survivor center": ("cluster", {"survivor": "center"}),
    "subcluster mean": ("subcluster", {"growth": {"statistic": "mean"}, "pool": 2}),
    "energy of data": ("energy", {"signal": "data", "calibration": BATCHES}),
    "energy behind norms": ("energy", {"batch_norm": True}),
    "matrix": ("matrix", {"norm": 1}),
    "trees of images": ("topological_magnitude", {"conv_graph": "toeplitz", "on_subcritical": "clip"}),
    "rounds": ("topological_magnitude", {"evaluator": "toy", "rounds": 2, "rewind": "initial", "steps": (2, None)}),
    "genes, evaluate": (
        "genetic_weight",
        {"evaluate": lambda model: float(model.head.weight.sum()), "search": GENERATIONS},
    ),
    "genes, evaluator": ("genetic_weight", {"evaluator": "toy", "search": GENERATIONS}),
    "level, global": ("level", {"config": [{"op_types": ["Linear"], "sparse_ratio": 0.5, "global_group_id": 1}]}),
    "l1, global": ("l1", {"config": [{**HALF[0], "global_group_id": 1}]}),
}
"""Clouds, criteria and other ways of the pruners."""


@pytest.mark.parametrize("choice", CHOICES)
def test_clouds_and_criteria(device, choice):
    name, knobs = CHOICES[choice]
    agree(lambda place: prune(name, place, **knobs)[1], device)


@pytest.mark.parametrize("scheduler", [LinearPruner, AGPPruner])
def test_schedules(device, scheduler):
    def run(place: torch.device) -> Any:
        model = toy_model().to(place)
        pruner = create_pruner("topological", model, HALF, toy_evaluator(model), **SEARCH)
        scheduled = scheduler(pruner, interval_steps=1, total_times=2)
        _, masks = scheduled.compress(max_steps=3, max_epochs=None)
        scheduled.unwrap_model()
        return masks, states(model, place)

    agree(run, device)


@pytest.mark.parametrize(
    "knobs",
    [
        {"method": "reconstruct"},
        {"method": "reconstruct", "ridge": 1e-3, "refine": 0, "recalibrate": True, "cache_bytes": 1},
        *({"method": method} for method in METHODS if method != "reconstruct"),
        {"method": "pair", "pairs": {"hidden": {0: 1}}, "as_printed": True},
    ],
)
def test_compensation(device, knobs):
    def run(place: torch.device) -> Any:
        model, masks = toy_model().to(place).eval(), {"hidden": {"weight": torch.ones(16, 8, device=place)}}
        masks["hidden"]["weight"][[0, 3, 7]] = 0.0
        return states(nni_topo.compensate(model, masks, BATCHES, **knobs), place)

    agree(run, device)


@pytest.mark.parametrize("knobs", [{}, {"objective": "squares", "augment": lambda images: images + 0.1}])
def test_distillation(device, knobs):
    def run(place: torch.device) -> Any:
        dense, original = toy_model().to(place).eval(), toy_model(1).to(place).eval()
        images = [toy_images(300, seed=1)]
        found = distillation(dense, original, images, steps=60, lr=1e-3, **knobs)
        assert found.is_kept
        return found.loss_before, found.loss_after, states(found.model, place)

    agree(run, device)


def grouped(place: torch.device, name: str = "l1", **more: Any) -> tuple[nn.Module, Any]:
    """Prune the toy network by groups, so that it can be made dense."""
    example = IMAGES[:2].to(place)
    config = nni_topo.dependency_groups(toy_model().to(place), example, [{**HALF[0], **more}])
    return prune(name, place, config)


def test_dense_and_masked_models(device):
    def run(place: torch.device) -> Any:
        model, masks = grouped(place)
        dense = nni_topo.to_dense(model, IMAGES[:2].to(place), masks)
        assert dense.stem.out_channels == dense.inner.in_channels == 4
        rounded = nni_topo.to_dense(model, IMAGES[:2].to(place), masks, round_to=3)
        masked = nni_topo.masked_model(model, IMAGES[:2].to(place), masks)
        inputs = IMAGES.to(place)
        return [states(net, place) for net in (dense, rounded, masked)], [net.eval()(inputs) for net in (dense, masked)]

    agree(run, device)


def test_masks_of_the_cpu_fit_a_model_elsewhere(device):
    def run(place: torch.device) -> Any:
        _, masks = grouped(CPU)
        return states(nni_topo.to_dense(toy_model().to(place), IMAGES[:2].to(place), masks), place)

    agree(run, device)


def test_norms_and_groups_made_dense(device):
    def run(place: torch.device) -> Any:
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.PReLU(8), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten()]
        model = nn.Sequential(*layers, nn.LayerNorm(128), nn.Linear(128, 4)).to(place).eval()
        mask = torch.ones(8, 3, 3, 3, device=place)
        mask[[1, 5]] = 0.0
        masks = {"0": {"weight": mask}}
        done = nni_topo.compensate(model, masks, BATCHES)
        return states(nni_topo.to_dense(done, IMAGES[:2].to(place), masks, check=False), place)

    agree(run, device)


def test_saved_and_loaded(device, tmp_path):
    model, masks = grouped(device)
    dense = nni_topo.to_dense(model, IMAGES[:2].to(device), masks)
    nni_topo.save(dense, tmp_path / "dense.pt")
    for place in (device, CPU):
        loaded = states(nni_topo.load(tmp_path / "dense.pt", toy_model().to(place)), place)
        assert all(torch.equal(value.cpu(), loaded[name].cpu()) for name, value in dense.state_dict().items())


def test_checkpoints_are_read_on_any_device(device, tmp_path):
    zoo.save_checkpoint(tmp_path / "net.pt", toy_model().to(device), {"seed": 1})
    model = toy_model(seed=1)
    assert zoo.load_checkpoint(tmp_path / "net.pt", model)["seed"] == 1
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in toy_model().state_dict().items())


def digits() -> zoo.DataBundle:
    return zoo.load_data("digits", limit=96)


def small(place: torch.device) -> nn.Module:
    return zoo.create_model("small_cnn", num_classes=10, in_channels=1, image_size=8, seed=0).to(place)


def test_training_is_the_cpus_and_goes_on_from_a_file(device, tmp_path):
    recipe = zoo.Recipe(epochs=2, batch_size=32, augmentation="crop-flip", label_smoothing=0.1)

    def run(place: torch.device) -> Any:
        model, state = small(CPU), tmp_path / f"{place.type}.pt"
        log = zoo.train(model, digits(), recipe, seed=1, device=place, state=state)
        again = small(CPU)
        zoo.train(again, digits(), recipe, seed=1, device=place, state=state)
        for key, value in states(again, place).items():
            assert torch.equal(value, model.state_dict()[key])
        # without a device's name, where the model lies
        accuracy = zoo.evaluate(again, digits().test)
        zoo.train(again, digits(), dataclasses.replace(recipe, epochs=1), seed=2)
        return [epoch.loss for epoch in log.epochs], accuracy, states(model, place), states(again, place)

    agree(run, device)


def test_batch_norms_measured_anew(device):
    agree(lambda place: states(nni_topo.recalibrate_batch_norm(toy_model().to(place), BATCHES), place), device)


def test_zeros_stay_zeros_in_training(device):
    model, masks = prune("level", device)
    dense = nni_topo.to_dense(model, IMAGES[:2].to(device), masks)
    zeros = dense.hidden.weight == 0
    with nni_topo.zeros_held(dense):
        optimizer = torch.optim.SGD(dense.parameters(), lr=0.1)
        dense(IMAGES.to(device)).square().sum().backward()
        optimizer.step()
    assert zeros.any()
    assert bool((dense.hidden.weight[zeros] == 0).all())


TIMES = ("seconds", "latency", "peak_memory", "_ms", "time", "date", "key")


@pytest.mark.parametrize(
    "choice",
    [
        PrunerChoice("topological", knobs=SEARCH, calibration=32),
        pytest.param(PrunerChoice("taylor", knobs={"training_steps": 2}), marks=pytest.mark.slow),
        pytest.param(PrunerChoice("scratch"), marks=pytest.mark.slow),
        pytest.param(PrunerChoice("torch-pruning"), marks=pytest.mark.slow),
    ],
    ids=["topological", "taylor", "scratch", "torch-pruning"],
)
def test_compares_cell(device, choice, tmp_path):
    recipe = zoo.Recipe(epochs=1, batch_size=64)

    def run(place: torch.device) -> Any:
        cell = Cell(
            ModelChoice("small_cnn"),
            DataChoice("digits", limit=96, test_limit=16),
            choice,
            Target("ratio", 0.5),
            seed=0,
            train=recipe,
            retrain=recipe,
            device=str(place),
            compensate=CompensationChoice(images=32),
            distill=DistillationChoice(images=32, steps=2, lr=1e-4),
        )
        (tmp_path / place.type).mkdir()
        record = run_cell(cell, tmp_path / place.type)
        return {name: value for name, value in record.items() if not any(word in name for word in TIMES)}

    agree(run, device)


def test_schedules_of_the_runner(device):
    def run(place: torch.device) -> Any:
        data = digits()
        config = [{"op_names": ["features.conv2"], "sparse_ratio": 0.5}]
        recipe = zoo.Recipe(epochs=2, batch_size=64)
        start = Start(small(place), data, recipe, seed=1)
        dense = prune_on_schedule(start, PrunerChoice("energy"), config, recipe, schedule="linear", rounds=2)
        return states(dense, place)

    agree(run, device)


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
        evolution=EvolutionSettings(**GENERATIONS),
    )
    return found


def found_replacement(place: torch.device, *, bias: bool = True) -> Any:
    model = toy_model().to(place).eval()
    if not bias:
        model.stem.bias = None
    return analysis.study_replacement(
        model,
        "stem",
        IMAGES[:1].to(place),
        dataset_quality(place),
        threshold=0.4,
        evolution=FilterEvolution(4, 2),
    )


def found_energy(place: torch.device) -> Any:
    layers = ["stem", "inner"]
    model = toy_model().to(place).eval()
    found = analysis.study_energy(model, layers, IMAGES[:1].to(place), dataset_quality(place), thresholds=(0.1, 0.3))
    return found.layers, found.together


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
    tracker = analysis.PersistenceTracker(model)
    tracker()
    unrolled = analysis.neural_persistence(model, IMAGES[:1].to(place), conv_graph="toeplitz")
    return analysis.neural_persistence(model).layers, unrolled.layers, tracker.totals


STUDIES: list[Case] = [
    found_accumulated,
    found_bound,
    found_connectivity,
    found_dropout,
    found_energy,
    found_persistence,
    found_replacement,
    found_retraining,
    found_selection,
    found_sensitivity,
    found_topology,
    functools.partial(found_replacement, bias=False),
    lambda place: analysis.critical_compression_ratio(toy_model().to(place), IMAGES[:1].to(place)).layers,
]


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: getattr(study, "__name__", "")[6:] or None)
def test_studies(device, study):
    agree(study, device)


def test_layers_are_timed_where_they_lie(device):
    table = measure_latency(chain(device), IMAGES[:2].to(device), shares=(0.5, 1.0), repeats=1)
    assert set(table.layers) == {"0", "4", "7"}


def test_masks_are_digested_alike(device):
    masks = prune("random", CPU)[1]
    moved = {name: {target: mask.to(device) for target, mask in found.items()} for name, found in masks.items()}
    assert masks_digest(moved) == masks_digest(masks)


def test_a_device_is_found_by_its_name(device):
    assert resolve_device(str(device)) == device


@pytest.mark.parametrize("name", ["tpu", "meta", "cuda:99", ""])
def test_what_cannot_compute_here_is_no_device(name):
    with pytest.raises(ConfigError, match=rf"device must be cpu, cuda or auto, .* got '{name}'"):
        resolve_device(name)
