"""Functions that every user calls with wrong values of every argument: they say by name what is wrong.

Those of the other rooms are checked by the same rules; tests of their own hold them.
"""

from __future__ import annotations

import collections.abc
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
from nni_topo.testing import require_unchanged, snapshot

MODULES = (
    "nni_topo",
    "nni_topo.recovery",
    "nni_topo.speedup",
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
DATA = torch.utils.data.TensorDataset(IMAGES, LABELS)
BUNDLE = zoo.DataBundle(DATA, DATA, DATA, 3, 6, 3, (0.0,) * 3, (1.0,) * 3, "here", ("a", "b", "c"))
LAYERS = {"op_names": ["first", "second"]}


def masks() -> dict[str, dict[str, Tensor]]:
    return {"first": {"weight": torch.tensor([1.0, 0.0, 1.0, 0.0])[:, None, None, None].expand(4, 3, 3, 3).clone()}}


def pruned() -> nn.Module:
    return nni_topo.to_dense(net(), IMAGES, masks())


def ratio(**changes: Any) -> dict[str, Any]:
    return {"model": net(), "config_list": [{**LAYERS, "sparse_ratio": 0.5}], **changes}


def whole(**changes: Any) -> dict[str, Any]:
    return ratio(config_list=[dict(LAYERS)], **changes)


def cut(module: Any, kept: Tensor) -> None:
    """Do nothing."""


GENERATIONS = {"population_size": 2, "generations": 1}


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
    "nni_topo.list_pruners": dict,
    "nni_topo.masked_model": lambda: {"model": net(), "example_inputs": IMAGES, "masks": masks()},
    "nni_topo.pruner_info": lambda: {"name": "random"},
    "nni_topo.recalibrate_batch_norm": lambda: {"model": net(), "calibration": [IMAGES]},
    "nni_topo.register_module": lambda: {"kind": Net, "cut": cut},
    "nni_topo.register_operator": lambda: {"operator": lambda images: images, "rule": "keep"},
    "nni_topo.register_width_attribute": lambda: {"kind": Net, "attribute": "width", "module": "first"},
    "nni_topo.RecoveryInfo": lambda: {"name": "mine", "path": "here:Mine", "summary": "mine"},
    "nni_topo.recovery_info": lambda: {"name": "reconstruct"},
    "nni_topo.list_recoveries": lambda: {"pattern": "r*"},
    "nni_topo.register_recovery": lambda: {"info": nni_topo.recovery_info("reconstruct")},
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
    "nni_topo.synthetic_images": lambda: {"model": net(), "example_inputs": IMAGES, "count": 2, "steps": 1},
    "nni_topo.to_dense": lambda: {"model": net(), "example_inputs": IMAGES, "masks": masks()},
    "nni_topo.zeros_held": lambda: {"model": net()},
    "nni_topo.recovery.pair_coefficients": lambda: {"removed": POINTS[:, 0], "survivor": POINTS[:, 1]},
    "nni_topo.speedup.measure_latency": lambda: {"model": net(), "example_inputs": IMAGES},
    "nni_topo.speedup.profile": lambda: {"models": {"one": net()}, "example_inputs": IMAGES, "runs": 1},
    "nni_topo.zoo.augmented": lambda: {"images": IMAGES, "augmentation": "crop-flip", "black": torch.zeros(3, 1, 1)},
    "nni_topo.zoo.check_model": lambda: {"model": net(), "data": BUNDLE},
    "nni_topo.zoo.count_macs": lambda: {"model": net(), "example_inputs": IMAGES},
    "nni_topo.zoo.count_params": lambda: {"model": net()},
    "nni_topo.zoo.create_model": lambda: {"name": "small_cnn", "num_classes": 3, "in_channels": 1, "image_size": 8},
    "nni_topo.zoo.default_recipe": lambda: {"model_name": "small_cnn", "data_name": "digits"},
    "nni_topo.zoo.evaluate": lambda: {"model": net(), "dataset": DATA},
    "nni_topo.zoo.latencies": lambda: {"models": {"one": net()}, "example_inputs": IMAGES, "runs": 1},
    "nni_topo.zoo.list_models": dict,
    "nni_topo.zoo.load_data": lambda: {"name": "digits", "limit": 10},
    "nni_topo.zoo.loss_and_accuracy": lambda: {"model": net(), "dataset": DATA},
    "nni_topo.zoo.train": lambda: {"model": net(), "data": BUNDLE, "recipe": zoo.Recipe(epochs=1), "seed": 0},
    "nni_topo.zoo.Recipe": lambda: {"epochs": 1},
}


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
    "truth": lambda: True,
    "text": lambda: "text",
    "half a pattern": lambda: "[",
    "empty list": list,
    "empty mapping": dict,
    "mapping of numbers": lambda: {"text": 5},
    "texts": lambda: ["text"],
    "numbers": lambda: [5, 0.5],
    "list of None": lambda: [None],
    "batch without images": lambda: [IMAGES[:0]],
    "tensor of another shape": lambda: torch.ones(2, 3, 2, 2, 2),
    "integers": lambda: torch.ones(2, 3, 6, 6, dtype=torch.long),
    "tensor of nan": lambda: IMAGES * math.nan,
    "meta tensor": lambda: IMAGES.to("meta"),
    "sparse tensor": lambda: IMAGES.to_sparse(),
    "batch of nan": lambda: [IMAGES * math.nan],
    "batch of another shape": lambda: [torch.ones(2, 3, 2, 2, 2)],
    "function of text": lambda: lambda *given, **named: "text",
    "another model": blocks,
    "model in parallel": lambda: nn.DataParallel(net()),
    "meta model": lambda: net().to("meta"),
    "lazy model": lambda: nn.Sequential(nn.LazyLinear(3)),
    "model of nan": lambda: with_weight(lambda weight: weight * math.nan),
}

# What can be called and isn't a function fails in its own way when it is.
CALLED = {"another model", "model in parallel", "meta model", "lazy model", "model of nan"}
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
    return "" if fits(value, hints(function)[parameter]) else "takes it"


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
    "nni_topo.recovery": "Compensation CompensationReport Distillation LayerReport",
    "nni_topo.speedup": "DenseReport Explanation Exported LatencyTable LayerChannels LayerLatency Profiled Operation",
    "nni_topo.zoo": "DataBundle EpochLog TrainingLog",
}
SAME = {"nni_topo.compensate", "nni_topo.distill"}  # hand on what they get to compensation and distillation
ON_DISK = {"nni_topo.export", "nni_topo.load", "nni_topo.save", "nni_topo.save_pretrained"}
ON_DISK |= {"nni_topo.shrink_pretrained"}
ON_DISK |= {"nni_topo.zoo.load_checkpoint", "nni_topo.zoo.save_checkpoint"}
WALKED = sorted(VALID.keys() - SAME)


def test_every_public_function_is_walked():
    parts = {f"{module}.{name}" for module, names in PARTS.items() for name in names.split()}
    found = FUNCTIONS.keys() - parts
    without_arguments = {name for name in found if not inspect.signature(function_of(name)).parameters}
    assert found - without_arguments - ON_DISK == set(VALID) - parts


HEAVY = {"distillation", "compensation", "shrink", "frontier", "dependency_groups", "to_dense"}
HEAVY |= {"zoo.train", "synthetic_images", "speedup.profile"}
HEAVY |= {"speedup.measure_latency", "zoo.latencies", "zoo.evaluate", "zoo.loss_and_accuracy"}


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
    run(function_of(name), VALID[name]())  # the arguments that are changed work
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
        ("nni_topo.to_dense", "example_inputs", {}),
    ],
)
def test_inputs_that_require_gradients_are_values(name, argument, changes):
    images = IMAGES.clone().requires_grad_(True)
    given = {**VALID[name](), **changes}
    given[argument] = [images] if isinstance(given[argument], list) else images
    run(function_of(name), given)
    assert images.grad is None


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
