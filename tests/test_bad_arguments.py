"""Functions that every user calls with wrong values of every argument: they say by name what is wrong.

Those of the other rooms are checked by the same rules; tests of their own hold them.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
import types
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


def text_model() -> dict[str, Any]:
    """A model of Transformers with its tokenizer, and a text that needs few of the tokens."""
    import tokenizers
    import transformers

    vocab = {token: place for place, token in enumerate(["[UNK]", "a", "b", "aa", "bb"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="[UNK]"))
    config = transformers.BertConfig(
        vocab_size=5, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4
    )
    model = seeded(lambda: transformers.BertModel(config))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    return {"model": model, "tokenizer": tokenizer, "texts": ["aa"]}


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
    "nni_topo.from_file": lambda: {"model": torch.export.export(net(), (IMAGES,)), "inputs": IMAGES},
    "nni_topo.frontier": lambda: {
        "model": net(),
        "images": [IMAGES],
        "shares": (0.6,),
        "pruner": "random",
        "distill": False,
    },
    "nni_topo.synthetic_images": lambda: {"model": net(), "example_inputs": IMAGES, "count": 2, "steps": 1},
    "nni_topo.to_dense": lambda: {"model": net(), "example_inputs": IMAGES, "masks": masks()},
    "nni_topo.trim_vocabulary": text_model,
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


class Odd:
    """What no argument may be."""


def run(function: Any, given: dict[str, Any]) -> None:
    """Call a function, and let a pruner choose."""
    made = function(**given)
    if isinstance(made, Pruner):
        made.compress()


def refused(name: str, argument: str, value: Any) -> str:
    """Return what a function says of a wrong value, or what else it does; the models that it got stay as they were."""
    given = VALID[name]()
    before = {key: snapshot(each) for key, each in given.items() if isinstance(each, Net)}
    given[argument] = value
    try:
        run(FUNCTIONS[name], given)
    except NniTopoError as error:
        for key in before.keys() - {argument}:
            require_unchanged(before[key], given[key])
        return str(error)
    except Exception as error:
        return f"{type(error).__name__} of another library: {error}"
    return "taken"


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
    "nni_topo.speedup": "DenseReport Explanation Exported LatencyTable LayerChannels LayerLatency Profiled Operation "
    "TrimmedVocabulary VocabularyReport",
    "nni_topo.zoo": "DataBundle EpochLog TrainingLog",
}
SAME = {"nni_topo.compensate", "nni_topo.distill"}  # hand on what they get to compensation and distillation
ON_DISK = {"nni_topo.export", "nni_topo.load", "nni_topo.save", "nni_topo.save_pretrained"}
ON_DISK |= {"nni_topo.shrink_pretrained"}
ON_DISK |= {"nni_topo.zoo.load_checkpoint", "nni_topo.zoo.save_checkpoint"}


def test_every_public_function_is_walked():
    parts = {f"{module}.{name}" for module, names in PARTS.items() for name in names.split()}
    found = FUNCTIONS.keys() - parts
    without_arguments = {name for name in found if not inspect.signature(FUNCTIONS[name]).parameters}
    assert found - without_arguments - ON_DISK == set(VALID) - parts


@pytest.mark.parametrize("name", sorted(VALID.keys() - SAME))
@pytest.mark.quick_every(3)
def test_an_argument_of_another_class_is_told_by_name_value_and_place(name):
    run(FUNCTIONS[name], VALID[name]())  # the arguments that are changed work
    for argument, parameter in inspect.signature(FUNCTIONS[name]).parameters.items():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        said = refused(name, argument, Odd())
        if str(parameter.annotation) != "Any" or said != "taken":
            assert re.search(r" must .*, got .*\(.+\)", said, re.S), (argument, said)
            assert argument in said


def with_nan() -> nn.Module:
    model: Any = net()
    model.third.weight = nn.Parameter(model.third.weight.detach() * math.nan)
    return model


PRUNER = "nni_topo.RandomPruner"
SHRINK = "nni_topo.shrink"


@pytest.mark.parametrize(
    ("name", "argument", "value", "words"),
    [
        (PRUNER, "seed", True, r"seed must be .*, got True \(RandomPruner\)"),
        (PRUNER, "round_to", -1, r"round_to must be an integer of at least 1.*, got -1 \(RandomPruner\)"),
        (PRUNER, "model", nn.DataParallel(net()), "pass the inner module"),
        (PRUNER, "model", net().to("meta"), "model"),
        (PRUNER, "model", nn.Sequential(nn.LazyLinear(3)), "model"),
        (SHRINK, "model", with_nan(), r"weights must be finite|third.weight"),
        (SHRINK, "images", [], "at least one batch, got none"),
        (SHRINK, "images", [IMAGES[:0]], "images"),
        (SHRINK, "images", [IMAGES * math.nan], r"images must be finite|finite"),
        (SHRINK, "images", [torch.ones(2, 3, 2, 2, 2)], r"images must fit the model"),
        (SHRINK, "pruner", "randm", "did you mean random"),
        ("nni_topo.to_dense", "example_inputs", IMAGES.to("meta"), "example_inputs"),
        ("nni_topo.to_dense", "masks", {"first": 5}, "masks"),
    ],
)
def test_values_out_of_their_range_are_told(name, argument, value, words):
    said = refused(name, argument, value)
    assert re.search(words, said), said


@pytest.mark.parametrize(
    ("name", "argument", "changes"),
    [
        (SHRINK, "images", {"pruner": "reconstruction", "distill": {"steps": 2, "lr": 0.1}}),
        ("nni_topo.to_dense", "example_inputs", {}),
    ],
)
def test_inputs_that_require_gradients_are_values(name, argument, changes):
    images = IMAGES.clone().requires_grad_(True)
    given = {**VALID[name](), **changes}
    given[argument] = [images] if isinstance(given[argument], list) else images
    run(FUNCTIONS[name], given)
    assert images.grad is None
