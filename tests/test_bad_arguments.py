"""Every public function with wrong values of every argument: it works as documented, or says by name what is wrong."""

from __future__ import annotations

import collections.abc
import functools
import importlib
import inspect
import math
import types
import typing
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from nni.compression.base.compressor import Pruner
from torch import Tensor, nn

import nni_topo
from nni_topo import zoo
from nni_topo.errors import NniTopoError
from nni_topo.rules import is_class
from nni_topo.studies.plan import load_plan
from nni_topo.testing import require_unchanged, snapshot

MODULES = (
    "nni_topo",
    "nni_topo.analysis",
    "nni_topo.clustering",
    "nni_topo.hooks",
    "nni_topo.recovery",
    "nni_topo.signals",
    "nni_topo.speedup",
    "nni_topo.testing",
    "nni_topo.topology",
    "nni_topo.zoo",
)


class Net(nn.Module):
    """Two convolutions and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)
        self.third, self.drop, self.last = nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (images, 3)."""
        x = torch.relu(self.second(torch.relu(self.norm(self.first(x)))))
        return self.last(self.drop(torch.relu(self.third(x.mean((2, 3))))))


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(seed)  # the others take longer than the network
        return make().eval()


def net() -> nn.Module:
    return seeded(Net)


def blocks(seed: int = 0) -> nn.Module:
    """A network whose middle can go."""
    return seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)), seed)


IMAGES = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 3
ROWS = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
POINTS = np.random.default_rng(0).normal(size=(6, 3))
DISTANCES = np.linalg.norm(POINTS[:, None] - POINTS[None], axis=2)
DATA = torch.utils.data.TensorDataset(IMAGES, LABELS)
BUNDLE = zoo.DataBundle(DATA, DATA, DATA, 3, 6, 3, (0.0,) * 3, (1.0,) * 3, "here", ("a", "b", "c"))
LAYERS = {"op_names": ["first", "second"]}


def masks() -> dict[str, dict[str, Tensor]]:
    return {"first": {"weight": torch.tensor([1.0, 0.0, 1.0, 0.0])[:, None, None, None].expand(4, 3, 3, 3).clone()}}


def pruned() -> nn.Module:
    return nni_topo.to_dense(net(), IMAGES, masks())


def quality(model: nn.Module) -> nni_topo.analysis.Quality:
    return nni_topo.analysis.Quality(1.0, 0.5)


def criterion(outputs: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, labels)


def ratio(**changes: Any) -> dict[str, Any]:
    return {"model": net(), "config_list": [{**LAYERS, "sparse_ratio": 0.5}], **changes}


def whole(**changes: Any) -> dict[str, Any]:
    return ratio(config_list=[dict(LAYERS)], **changes)


def cut(module: Any, kept: Tensor) -> None:
    """Do nothing."""


GENERATIONS = {"population_size": 2, "generations": 1}


def bound() -> Any:
    return nni_topo.analysis.error_bound(blocks(), blocks(), ROWS)


def curves() -> Any:
    curve = nni_topo.analysis.SensitivityCurve(("first",), {0.5: 0.4})
    return nni_topo.analysis.Sensitivity("l1", {}, 0.5, [curve], 0.01)


def evolved() -> Any:
    pruner = nni_topo.GeneticWeightPruner(**VALID["nni_topo.GeneticWeightPruner"]())
    pruner.compress()
    return nni_topo.analysis.EvolutionTrial.of(pruner)


def tree() -> Any:
    return nni_topo.clustering.grow(POINTS, np.cov(POINTS), 2, nni_topo.Growth())


# For each public function, arguments with which it works.
VALID: dict[str, Callable[[], dict[str, Any]]] = {
    "nni_topo.Budget": lambda: {"flops": 0.5},
    "nni_topo.Chirp": dict,
    "nni_topo.ClusterPruner": lambda: ratio(calibration=[IMAGES]),
    "nni_topo.DependencyGroups": lambda: {"entries": [dict(LAYERS)]},
    "nni_topo.EnergyFilterPruner": lambda: ratio(example_inputs=IMAGES),
    "nni_topo.GeneticSearch": dict,
    "nni_topo.GeneticWeightPruner": lambda: whole(evaluate=lambda model: 0.5, search=GENERATIONS),
    "nni_topo.Growth": dict,
    "nni_topo.MatrixPruner": ratio,
    "nni_topo.PointCloud": dict,
    "nni_topo.PrunerInfo": lambda: {"name": "mine", "path": "here:Mine", "summary": "mine"},
    "nni_topo.RandomPruner": ratio,
    "nni_topo.ReconstructionPruner": lambda: ratio(calibration=[IMAGES]),
    "nni_topo.StructuredPruner": lambda: ratio(
        collector=nni_topo.hooks.WeightCollector(), calculator=nni_topo.pruners.random.RandomMetric(0)
    ),
    "nni_topo.SubclusterPruner": lambda: whole(calibration=[IMAGES]),
    "nni_topo.TopologicalMagnitudePruner": ratio,
    "nni_topo.TopologicalPruner": lambda: ratio(solver="greedy"),
    "nni_topo.WeightSearch": dict,
    "nni_topo.as_torch_layers": lambda: {"model": net()},
    "nni_topo.compensate": lambda: {"model": net(), "masks": masks(), "calibration": [IMAGES]},
    "nni_topo.compensation": lambda: {"model": net(), "masks": masks(), "calibration": [IMAGES]},
    "nni_topo.create_pruner": lambda: ratio(name="random"),
    "nni_topo.dependency_groups": lambda: whole(example_inputs=IMAGES),
    "nni_topo.explain": lambda: {"model": net(), "example_inputs": IMAGES, "layer": "first"},
    "nni_topo.distill": lambda: {"dense": pruned(), "original": net(), "images": [IMAGES], "steps": 1, "lr": 0.1},
    "nni_topo.distillation": lambda: {"dense": pruned(), "original": net(), "images": [IMAGES], "steps": 1, "lr": 0.1},
    "nni_topo.enable_strict": dict,
    "nni_topo.list_pruners": dict,
    "nni_topo.masked_model": lambda: {"model": net(), "example_inputs": IMAGES, "masks": masks()},
    "nni_topo.narrow_heads": lambda: {"model": net(), "calibration": [IMAGES], "sparse_ratio": 0.5},
    "nni_topo.pruner_info": lambda: {"name": "random"},
    "nni_topo.recalibrate_batch_norm": lambda: {"model": net(), "calibration": [IMAGES]},
    "nni_topo.register_module": lambda: {"kind": Net, "cut": cut},
    "nni_topo.register_operator": lambda: {"operator": lambda images: images, "rule": "keep"},
    "nni_topo.register_width_attribute": lambda: {"kind": Net, "attribute": "width", "module": "first"},
    "nni_topo.RecoveryInfo": lambda: {"name": "mine", "path": "here:Mine", "summary": "mine"},
    "nni_topo.recovery_info": lambda: {"name": "reconstruct"},
    "nni_topo.list_recoveries": lambda: {"pattern": "r*"},
    "nni_topo.register_recovery": lambda: {"info": nni_topo.recovery_info("reconstruct")},
    "nni_topo.recovery.Block": lambda: {"steps": 10, "lr": 1e-3, "layers": 2, "batch_size": 8},
    "nni_topo.recovery.Pair": lambda: {"pairs": {"first": {0: 1}}, "as_printed": False},
    "nni_topo.recovery.Reconstruct": lambda: {"refine": 1},
    "nni_topo.register_pruner": lambda: {"info": nni_topo.pruner_info("random")},
    "nni_topo.remove_blocks": lambda: {"model": blocks(), "names": ["1"], "calibration": [ROWS]},
    "nni_topo.shrink": lambda: {
        "model": net(),
        "images": [IMAGES],
        "budget": {"flops": 0.5},
        "pruner": "random",
        "distill": False,
    },
    "nni_topo.frontier": lambda: {
        "model": net(),
        "images": [IMAGES],
        "shares": (0.6,),
        "pruner": "random",
        "distill": False,
    },
    "nni_topo.choose_images": lambda: {"pool": [IMAGES], "model": net(), "count": 1},
    "nni_topo.synthetic_images": lambda: {"model": net(), "example_inputs": IMAGES, "count": 2, "steps": 1},
    "nni_topo.to_dense": lambda: {"model": net(), "example_inputs": IMAGES, "masks": masks()},
    "nni_topo.zeros_held": lambda: {"model": net()},
    "nni_topo.analysis.PersistenceTracker": lambda: {"model": net(), "example_inputs": IMAGES},
    "nni_topo.analysis.accumulate_energy": lambda: {
        "model": net(),
        "layers": [("first",)],
        "example_inputs": IMAGES,
        "evaluate": quality,
    },
    "nni_topo.analysis.connectivity": lambda: {"model": net(), "example_inputs": IMAGES, "masks": masks()},
    "nni_topo.analysis.critical_compression_ratio": lambda: {"model": net(), "example_inputs": IMAGES},
    "nni_topo.analysis.critical_config_list": lambda: {"model": net(), "sparse_ratio": 0.5},
    "nni_topo.analysis.deviation_of": lambda: {"found": bound()},
    "nni_topo.analysis.draw_splits": lambda: {"trees": {"first": tree()}},
    "nni_topo.analysis.error_bound": lambda: {"original": blocks(), "pruned": blocks(), "inputs": ROWS},
    "nni_topo.analysis.net_deviation": lambda: {"original": blocks(), "pruned": blocks(), "inputs": ROWS},
    "nni_topo.analysis.neural_persistence": lambda: {"model": net()},
    "nni_topo.analysis.overlap_bound": lambda: {"m": 3, "n": 4},
    "nni_topo.analysis.random_overlap_log10": lambda: {"m": 3, "n": 4, "share": 0.5},
    "nni_topo.analysis.plot_evolution": lambda: {"trials": {"one": evolved()}},
    "nni_topo.analysis.plot_sensitivity": lambda: {"found": curves()},
    "nni_topo.analysis.retraining_bound": lambda: {
        "initial": blocks(1),
        "trained": blocks(),
        "sparse": blocks(2),
        "loss": criterion,
        "batches": [(ROWS, LABELS)],
        "epochs": 1.0,
    },
    "nni_topo.analysis.sensitivity": lambda: {
        "model": net(),
        "example_inputs": IMAGES,
        "evaluate": lambda model: 0.5,
        "ratios": (0.5,),
        "layers": ["first"],
    },
    "nni_topo.analysis.study_dropout": lambda: {"models": {"one": net}, "evaluate": quality, "rates": (0.0, 0.5)},
    "nni_topo.analysis.study_energy": lambda: {
        "model": net(),
        "layers": ["first"],
        "example_inputs": IMAGES,
        "thresholds": (0.5,),
        "evaluate": quality,
    },
    "nni_topo.analysis.study_replacement": lambda: {
        "model": net(),
        "layer": "first",
        "example_inputs": IMAGES,
        "evaluate": quality,
        "threshold": 0.5,
        "kinds": ("kept", "random"),
    },
    "nni_topo.analysis.study_selection": lambda: {
        "model": net(),
        "layer": "first",
        "example_inputs": IMAGES,
        "batches": [(IMAGES, LABELS)],
        "evaluate": quality,
        "keep": 2,
        "methods": ("random", "energy"),
    },
    "nni_topo.analysis.study_topology": lambda: ratio(solver="greedy"),
    "nni_topo.analysis.network_overlap_bound": lambda: {"widths": [3, 2]},
    "nni_topo.analysis.network_tree_overlap": lambda: {"weights": [POINTS]},
    "nni_topo.analysis.tree_overlap": lambda: {"weight": POINTS},
    "nni_topo.analysis.with_dropout": lambda: {"model": net(), "rate": 0.5},
    "nni_topo.clustering.grow": lambda: {
        "points": POINTS,
        "covariance": np.cov(POINTS),
        "initial": 2,
        "growth": nni_topo.Growth(),
    },
    "nni_topo.clustering.hoh_threshold": lambda: {"values": [POINTS[:, 0]], "energy": 0.5},
    "nni_topo.clustering.initial_clusters": lambda: {"share": 0.5, "nodes": 4},
    "nni_topo.clustering.partition": lambda: {"points": POINTS, "count": 2},
    "nni_topo.hooks.ActivationCollector": lambda: {"calibration": [IMAGES]},
    "nni_topo.hooks.CoupledWeightCollector": lambda: {"example_inputs": IMAGES},
    "nni_topo.hooks.FeatureCollector": lambda: {"calibration": [IMAGES]},
    "nni_topo.hooks.FoldedWeightCollector": lambda: {"example_inputs": IMAGES},
    "nni_topo.hooks.FunctionalCollector": lambda: {"calibration": [IMAGES]},
    "nni_topo.hooks.GradientCollector": lambda: {"calibration": [(IMAGES, LABELS)]},
    "nni_topo.hooks.Planner": dict,
    "nni_topo.hooks.WeightCollector": dict,
    "nni_topo.hooks.make_collector": lambda: {"cloud": "weight"},
    "nni_topo.recovery.greedy_least_squares": lambda: {"gram": np.eye(4), "cross": np.ones((4, 2)), "keep": 2},
    "nni_topo.recovery.pair_coefficients": lambda: {"removed": POINTS[:, 0], "survivor": POINTS[:, 1]},
    "nni_topo.signals.chirp": lambda: {"shape": (4, 4)},
    "nni_topo.signals.chirp_2d": lambda: {"height": 4, "width": 4},
    "nni_topo.signals.signal_energy": lambda: {"signal": POINTS},
    "nni_topo.signals.sweep_range": lambda: {"shape": (4, 4)},
    "nni_topo.speedup.measure_latency": lambda: {
        "model": net(),
        "example_inputs": IMAGES,
        "shares": (1.0,),
        "repeats": 1,
    },
    "nni_topo.speedup.profile": lambda: {"models": {"one": net()}, "example_inputs": IMAGES, "runs": 1},
    "nni_topo.testing.require_unchanged": lambda: {"before": nni_topo.testing.snapshot(net()), "model": net()},
    "nni_topo.testing.snapshot": lambda: {"model": net()},
    "nni_topo.testing.toy_evaluator": lambda: {"model": net()},
    "nni_topo.testing.toy_images": dict,
    "nni_topo.testing.toy_knobs": lambda: {"knobs": ["energy"]},
    "nni_topo.testing.toy_model": dict,
    "nni_topo.topology.SubsetFitness": lambda: {"distances": DISTANCES},
    "nni_topo.topology.bottleneck_distance": lambda: {"a": [[0.0, 1.0]], "b": [[0.0, 2.0]]},
    "nni_topo.topology.channel_tree": lambda: {"weight": np.ones((2, 2, 3, 3))},
    "nni_topo.topology.convolution_graph": lambda: {"weight_shape": (2, 2, 3, 3), "padded_size": (4, 4)},
    "nni_topo.topology.farthest_point_order": lambda: {"distances": DISTANCES},
    "nni_topo.topology.distinct_points": lambda: {"points": DISTANCES},
    "nni_topo.topology.farthest_points": lambda: {"points": DISTANCES, "count": 2},
    "nni_topo.topology.h0_bottleneck": lambda: {"deaths_a": [1.0], "deaths_b": [2.0]},
    "nni_topo.topology.h0_deaths": lambda: {"distances": DISTANCES},
    "nni_topo.topology.h0_wasserstein": lambda: {"deaths_a": [1.0], "deaths_b": [2.0]},
    "nni_topo.topology.hausdorff_to_subset": lambda: {"distances": DISTANCES, "subsets": [[True] * 3 + [False] * 3]},
    "nni_topo.topology.linear_graph": lambda: {"outputs": 2, "inputs": 3},
    "nni_topo.topology.magnitude_subset": lambda: {"distances": DISTANCES, "keep": 2},
    "nni_topo.topology.maximum_spanning_tree": lambda: {"weight": POINTS},
    "nni_topo.topology.metric_magnitude": lambda: {"distances": DISTANCES},
    "nni_topo.topology.network_tree": lambda: {"weights": [POINTS]},
    "nni_topo.topology.relevance_distances": lambda: {"weights": [POINTS]},
    "nni_topo.topology.mean_cover": lambda: {"distances": DISTANCES, "subsets": [[True] * 3 + [False] * 3]},
    "nni_topo.topology.pairwise_distances": lambda: {"points": POINTS},
    "nni_topo.topology.plane_trees": lambda: {
        "weight": np.ones((2, 2, 3, 3)),
        "graph": nni_topo.topology.convolution_graph((2, 2, 3, 3), (4, 4)),
    },
    "nni_topo.topology.projected_features": lambda: {"points": 10, "error": 0.5},
    "nni_topo.topology.projection_error": lambda: {"points": 10, "features": 100},
    "nni_topo.topology.random_projection": lambda: {"columns": [POINTS], "features": 2, "seed": 0},
    "nni_topo.topology.rips_diagram": lambda: {"points": POINTS},
    "nni_topo.topology.rtd_lite": lambda: {"first": DISTANCES, "second": DISTANCES},
    "nni_topo.topology.rtd_lite_bars": lambda: {"first": DISTANCES, "second": DISTANCES},
    "nni_topo.topology.rtd_lite_loss": lambda: {"first": torch.randn(4, 2), "second": torch.randn(4, 3)},
    "nni_topo.topology.spanning_forest": lambda: {
        "weight": POINTS,
        "graph": nni_topo.topology.linear_graph(6, 3),
    },
    "nni_topo.topology.wasserstein_distance": lambda: {"a": [[0.0, 1.0]], "b": [[0.0, 2.0]]},
    "nni_topo.topology.with_origin": lambda: {"points": POINTS},
    "nni_topo.zoo.augmented": lambda: {"images": IMAGES, "augmentation": "crop-flip", "black": torch.zeros(3, 1, 1)},
    "nni_topo.zoo.check_model": lambda: {"model": net(), "data": BUNDLE},
    "nni_topo.zoo.count_macs": lambda: {"model": net(), "example_inputs": IMAGES},
    "nni_topo.zoo.count_params": lambda: {"model": net()},
    "nni_topo.zoo.create_model": lambda: {"name": "small_cnn", "num_classes": 3, "in_channels": 1, "image_size": 8},
    "nni_topo.zoo.data_info": lambda: {"name": "digits"},
    "nni_topo.zoo.default_recipe": lambda: {"model_name": "small_cnn", "data_name": "digits"},
    "nni_topo.zoo.evaluate": lambda: {"model": net(), "dataset": DATA},
    "nni_topo.zoo.evaluate_loss": lambda: {"model": net(), "dataset": DATA},
    "nni_topo.zoo.latencies": lambda: {"models": {"one": net()}, "example_inputs": IMAGES, "runs": 1},
    "nni_topo.zoo.latency_ms": lambda: {"model": net(), "example_inputs": IMAGES, "runs": 1},
    "nni_topo.zoo.list_models": dict,
    "nni_topo.zoo.load_data": lambda: {"name": "digits", "limit": 10},
    "nni_topo.zoo.loss_and_accuracy": lambda: {"model": net(), "dataset": DATA},
    "nni_topo.zoo.model_info": lambda: {"name": "small_cnn"},
    "nni_topo.zoo.train": lambda: {"model": net(), "data": BUNDLE, "recipe": zoo.Recipe(epochs=1), "seed": 0},
    "nni_topo.zoo.Recipe": lambda: {"epochs": 1},
}


class Same(nn.Module):
    """Gives back what it gets."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the input."""
        return x


@functools.cache
def scripted() -> Any:
    """Return one scripted model for all, for they can't be changed from Python."""
    return torch.jit.script(Same())


def with_weight(make: Callable[[Tensor], Tensor]) -> nn.Module:
    model: Any = net()
    model.third.weight = nn.Parameter(make(model.third.weight.detach()))
    return model


WRONG: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "five": lambda: 5,
    "minus one": lambda: -1,
    "zero": lambda: 0,
    "half": lambda: 0.5,
    "nan": lambda: math.nan,
    "infinity": lambda: math.inf,
    "huge": lambda: 10**400,
    "truth": lambda: True,
    "text": lambda: "text",
    "empty text": lambda: "",
    "half a pattern": lambda: "[",
    "empty list": list,
    "empty tuple": tuple,
    "empty mapping": dict,
    "mapping of numbers": lambda: {"text": 5},
    "mapping by numbers": lambda: {5: "text"},
    "texts": lambda: ["text"],
    "numbers": lambda: [5, 0.5],
    "list of None": lambda: [None],
    "list of nan": lambda: [math.nan],
    "batch without inputs": lambda: [()],
    "batch without images": lambda: [IMAGES[:0]],
    "tensor without values": lambda: torch.empty(0),
    "tensor of one number": lambda: torch.tensor(1.0),
    "tensor of another shape": lambda: torch.ones(2, 3, 2, 2, 2),
    "integers": lambda: torch.ones(2, 3, 6, 6, dtype=torch.long),
    "complex numbers": lambda: torch.ones(2, 3, 6, 6, dtype=torch.complex64),
    "tensor of nan": lambda: IMAGES * math.nan,
    "meta tensor": lambda: IMAGES.to("meta"),
    "sparse tensor": lambda: IMAGES.to_sparse(),
    "meta batch": lambda: [IMAGES.to("meta")],
    "sparse batch": lambda: [IMAGES.to_sparse()],
    "batch of nan": lambda: [IMAGES * math.nan],
    "batch of another shape": lambda: [torch.ones(2, 3, 2, 2, 2)],
    "array of objects": lambda: np.array([None, "text"], dtype=object),
    "function of nothing": lambda: lambda *given, **named: None,
    "function of text": lambda: lambda *given, **named: "text",
    "function of a tensor": lambda: lambda *given, **named: torch.ones(3),
    "class": lambda: nn.Linear,
    "object": object,
    "another model": blocks,
    "state of a model": lambda: net().state_dict(),
    "scripted model": scripted,
    "model in parallel": lambda: nn.DataParallel(net()),
    "meta model": lambda: net().to("meta"),
    "lazy model": lambda: nn.Sequential(nn.LazyLinear(3)),
    "sparse model": lambda: with_weight(Tensor.to_sparse),
    "model of nan": lambda: with_weight(lambda weight: weight * math.nan),
}

# What can be called and isn't a function fails in its own way when it is.
CALLED = {"class", "another model", "scripted model", "model in parallel", "meta model", "lazy model", "sparse model"}
CALLED |= {"model of nan"}
TAKEN = {("nni_topo.clustering.grow", "threshold", "infinity")}  # documented as it is
# What is right and takes its time: processes of their own, or as many steps as there are by default.
LONG = {
    ("n_jobs", "five"),
    ("n_jobs", "minus one"),
    ("steps", "None"),
    ("distill", "truth"),
    ("distill", "empty mapping"),
    ("solver", "empty mapping"),
}
FILES = {"path", "folder", "state", "data_dir"}  # what isn't there is told when it is opened


def function_of(name: str) -> Any:
    return FUNCTIONS[name]


def hints(function: Any) -> dict[str, Any]:
    """Return the annotations of what a function is given, by name."""
    inner = inspect.unwrap(function.__init__ if isinstance(function, type) else function)
    scope = {**getattr(inner, "__globals__", {}), **vars(importlib.import_module(function.__module__))}
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) and name not in FILES:
            hint = parameter.annotation
            found[name] = eval(hint, scope) if isinstance(hint, str) else hint
    return found


def fits(value: Any, hint: Any) -> bool:
    """Say whether a value may be what an annotation says."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or hint is np.ndarray:
        return True
    if hint is None or hint is type(None):
        return value is None
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, each) for each in inner)
    if origin is typing.Literal:
        return any(value is each or (isinstance(value, str) and value == each) for each in inner)
    if hint in (int, float):
        known = (int,) if hint is int else (int, float)
        return isinstance(value, known) and not isinstance(value, bool) and -(2**63) < value < 2**63
    if origin is collections.abc.Callable:
        return callable(value)
    if isinstance(origin, type) and issubclass(origin, collections.abc.Iterable) and origin is not np.ndarray:
        is_mapping = issubclass(origin, collections.abc.Mapping)
        if isinstance(value, (str, bytes)) or is_mapping is not isinstance(value, collections.abc.Mapping):
            return False
        if is_mapping:
            return all(fits(key, inner[0]) and fits(each, inner[1]) for key, each in value.items())
        if not isinstance(value, (list, tuple)):
            return isinstance(value, collections.abc.Iterable)
        if origin is tuple and inner[-1] is not ...:
            return len(value) == len(inner) and all(map(fits, value, inner))
        return all(fits(each, inner[0]) for each in value)
    return isinstance(value, hint) if isinstance(hint, type) and origin is None else True


def takes_functions(hint: Any) -> bool:
    """Say whether an annotation allows a function."""
    return typing.get_origin(hint) is collections.abc.Callable or any(map(takes_functions, typing.get_args(hint)))


def run(function: Any, given: dict[str, Any]) -> None:
    """Call a function, enter what is a context, and let a pruner choose."""
    made = function(**given)
    if hasattr(made, "__enter__"):
        with made:
            pass
    if isinstance(made, Pruner):
        made.compress()


def wrong(name: str, parameter: str, label: str) -> str:
    """Say what is wrong about what a function does with a wrong value; nothing if nothing is."""
    function, given = function_of(name), VALID[name]()
    before = {key: snapshot(each) for key, each in given.items() if isinstance(each, Net)}
    value = given[parameter] = WRONG[label]()
    try:
        with torch.random.fork_rng([]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run(function, given)
    except NniTopoError as error:
        for key, model in given.items():
            if key in before and key != parameter:
                require_unchanged(before[key], model)
        return "" if str(error) else "says nothing"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        nni_topo.disable_strict()
    return "" if fits(value, hints(function)[parameter]) or (name, parameter, label) in TAKEN else "takes it"


def public_functions() -> dict[str, Any]:
    """Return what can be called among the public names, each once: functions, and classes but for exceptions."""
    found: dict[int, tuple[str, Any]] = {}
    for module in MODULES:
        room = importlib.import_module(module)
        for name in room.__all__:
            value = getattr(room, name)
            is_made = is_class(value) and not issubclass(value, BaseException)
            if is_made or isinstance(value, types.FunctionType):
                found.setdefault(id(value), (f"{module}.{name}", value))
    return dict(found.values())


FUNCTIONS = public_functions()  # before a test puts another in the place of one


# What the package gives and nobody makes, and what a pruner or a collector of one's own is built of.
PARTS = {
    "nni_topo": "Calibration",
    "nni_topo.analysis": "Connectivity CriticalCompression EnergyStudy ErrorBound EvolutionTrial LayerCount "
    "LayerEnergy LayerErrorBound LayerTopology NetDeviation NeuralPersistence Quality RetrainingBound Sensitivity "
    "SensitivityCurve TopologyStudy",
    "nni_topo.clustering": "Cluster SplitTree",
    "nni_topo.hooks": "ConfigAllocator DataCollector KeptSet MetricCalculator NNIAllocator PruningContext PruningUnit "
    "SparsityAllocator keep_highest pruning_units unit_scores",
    "nni_topo.recovery": "Compensation CompensationReport Distillation LayerReport",
    "nni_topo.speedup": "DenseReport Explanation Exported LatencyTable LayerChannels LayerLatency ModeCost Operation",
    "nni_topo.topology": "Forest LayerGraph",
    "nni_topo.zoo": "DataBundle DataInfo EpochLog ModelInfo TrainingLog",
}
SAME = {"nni_topo.compensate", "nni_topo.distill"}  # hand on what they get to compensation and distillation
ON_DISK = {"nni_topo.export", "nni_topo.load", "nni_topo.save", "nni_topo.save_pretrained"}
ON_DISK |= {"nni_topo.shrink_pretrained"}
ON_DISK |= {"nni_topo.zoo.load_checkpoint", "nni_topo.zoo.save_checkpoint"}
PROMISES = {"nni_topo.testing.require_unchanged"}  # raises AssertionError, which is what it is for
WALKED = sorted(VALID.keys() - SAME - PROMISES)


def test_every_public_function_is_walked():
    parts = {f"{module}.{name}" for module, names in PARTS.items() for name in names.split()}
    found = FUNCTIONS.keys() - parts
    without_arguments = {name for name in found if not inspect.signature(function_of(name)).parameters}
    assert found - without_arguments - ON_DISK == set(VALID) - parts


@pytest.mark.parametrize("name", sorted(VALID))
@pytest.mark.quick_every(3)
def test_the_arguments_that_are_changed_work(name):
    run(function_of(name), VALID[name]())


HEAVY = {"distillation", "compensation", "shrink", "frontier", "dependency_groups", "to_dense"}
HEAVY |= {"analysis.sensitivity"}
HEAVY |= {"analysis.deviation_of", "analysis.study_selection", "analysis.study_replacement", "analysis.study_energy"}
HEAVY |= {"zoo.latency_ms", "zoo.train", "analysis.accumulate_energy", "analysis.neural_persistence"}
HEAVY |= {"synthetic_images", "choose_images", "speedup.profile", "speedup.measure_latency", "testing.toy_evaluator"}
HEAVY |= {"zoo.latencies", "zoo.evaluate", "zoo.evaluate_loss", "zoo.loss_and_accuracy", "clustering.grow"}
HEAVY |= {"analysis.retraining_bound", "analysis.with_dropout", "analysis.study_topology", "analysis.net_deviation"}
HEAVY |= {"analysis.error_bound", "analysis.plot_evolution"}


def is_heavy(name: str) -> bool:
    return name.removeprefix("nni_topo.") in HEAVY or name.endswith("Pruner")


@pytest.fixture
def _few_values_shown():
    """Print three values of a tensor, not up to a thousand: an error shows no more than the first hundred letters."""
    torch.set_printoptions(threshold=3, edgeitems=1)
    yield
    torch.set_printoptions(profile="default")


@pytest.mark.usefixtures("_few_values_shown")
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * is_heavy(name)) for name in WALKED])
@pytest.mark.quick_every(3)
def test_wrong_values_are_told_by_name(name):
    found = {}
    for parameter, hint in hints(function_of(name)).items():
        for label in WRONG:
            if (parameter, label) in LONG or (label in CALLED and takes_functions(hint)):
                continue
            if what := wrong(name, parameter, label):
                found[parameter, label] = what
    assert found == {}


@pytest.mark.parametrize(
    ("name", "argument", "changes"),
    [
        ("nni_topo.shrink", "images", {"pruner": "reconstruction", "distill": {"steps": 2, "lr": 0.1}}),
        ("nni_topo.distillation", "images", {"steps": 2}),
        ("nni_topo.compensation", "calibration", {}),
        ("nni_topo.ReconstructionPruner", "calibration", {}),
        ("nni_topo.dependency_groups", "example_inputs", {}),
        ("nni_topo.to_dense", "example_inputs", {}),
        ("nni_topo.analysis.study_energy", "example_inputs", {}),
    ],
)
@pytest.mark.parametrize("is_leaf", [True, False])
@pytest.mark.quick_every(4)
def test_inputs_that_require_gradients_are_values(name, argument, changes, is_leaf):
    source = IMAGES.clone().requires_grad_(True)
    images = source if is_leaf else source * 1.0
    given = {**VALID[name](), **changes}
    given[argument] = [images] if isinstance(given[argument], list) else images
    run(function_of(name), given)
    assert source.grad is None


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ("seeds: [2]", r"seeds must be an integer of at least 1, got \[2\] \(plan\)"),
        ("models: [{name: small_cnn, width: wide}]", r"width must be a finite number, got 'wide' \(models\)"),
        ("data: [{name: digits, limit: half}]", r"limit must be an integer.*, got 'half' \(data\)"),
        ("pruners: [{name: l1, calibration: true}]", r"calibration must be an integer of at least 0, got True"),
        ("pruners: [{name: l1, knobs: 5}]", r"knobs must be a mapping, got 5 \(pruners\)"),
        ("compensate: {images: few}", r"images must be an integer of at least 1, got 'few' \(compensate\)"),
        ("train: 5", r"train must be a mapping, got 5 \(plan\)"),
    ],
)
def test_values_of_a_plan_are_told_by_key(keys, words, tmp_path):
    plan = {"models": "[small_cnn]", "data": "[digits]", "pruners": "[l1]", "targets": "[{ratio: 0.5}]"}
    key, _, value = keys.partition(": ")
    path = tmp_path / "plan.yaml"
    path.write_text("".join(f"{name}: {text}\n" for name, text in {**plan, key: value}.items()))
    with pytest.raises(NniTopoError, match=words):
        load_plan(path)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"op_names_re": ["["]}, r"op_names_re must be .*a regular expression.*\(config_list\[0\]\)"),
        ({"op_names": "first"}, r"op_names must be a list"),
        ({"op_names": ["first"], "sparse_ratio": math.nan}, r"sparse_ratio must be in \[0, 1\), got nan"),
        (None, r"a config_list entry must be a dict, got NoneType \(config_list\[0\]\)"),
    ],
)
def test_entries_are_told_by_dependency_groups_too(entry, words):
    with pytest.raises(NniTopoError, match=words):
        nni_topo.dependency_groups(net(), IMAGES, [entry])
