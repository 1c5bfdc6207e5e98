"""Where a pruner isn't given example inputs, its evaluator tells them: drop-in for NNI's own pruners."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import nni
import pytest
import torch
from nni.compression.utils import TorchEvaluator
from torch import Tensor, nn

import nni_topo
from nni_topo.errors import ConfigError
from nni_topo.network.runtime.hooks import example_inputs_of
from nni_topo.pruners.testing import toy_evaluator, toy_images, toy_model

CONFIG = [{"op_names": ["stem", "inner"], "sparse_ratio": 0.5, "dependency_group_id": "sum"}]
WEIGHTS = [{"op_types": ["Conv2d"], "sparse_ratio": 0.1}]
HALF = {"budget": {"flops": 0.5}}
PRUNERS: dict[str, tuple[type, list[dict[str, Any]], dict[str, Any]]] = {
    "energy": (nni_topo.EnergyFilterPruner, CONFIG, {}),
    "matrix": (nni_topo.MatrixPruner, CONFIG, {}),
    "budget": (nni_topo.TopologicalPruner, [{"op_names": ["hidden"]}], HALF),
    "random": (nni_topo.RandomPruner, [{"op_names": ["hidden"]}], HALF),
    "matrix budget": (nni_topo.MatrixPruner, [{"op_names": ["hidden"]}], HALF),
    "cluster": (nni_topo.ClusterPruner, [{"op_names": ["hidden"]}], HALF),
    "energy budget": (nni_topo.EnergyFilterPruner, [{"op_names": ["hidden"]}], HALF),
    "trees": (nni_topo.TopologicalMagnitudePruner, WEIGHTS, {"conv_graph": "toeplitz"}),
}


def evaluator_of(
    model: nn.Module, evaluate: Callable[[nn.Module], float] | None = None, dummy_input: Any = None
) -> TorchEvaluator:
    """Return an evaluator whose training raises: nothing here trains."""

    def train(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("trained")

    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.1)
    return TorchEvaluator(
        train, optimizer, lambda batch, model: batch, dummy_input=dummy_input, evaluating_func=evaluate
    )


def masks_of(name: str, evaluator: Any = None, **knobs: Any) -> dict[str, dict[str, Tensor]]:
    kind, config_list, own = PRUNERS[name]
    model = toy_model()
    made = evaluator(model) if evaluator else None
    _, masks = kind(model, config_list, made, **own, **knobs).compress()
    return masks


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.quick_every(4)
def test_an_evaluator_tells_the_example_inputs(name: str) -> None:
    images = toy_images()
    calibration = {"calibration": [images]} if name == "cluster" else {}
    expected = masks_of(name, example_inputs=images, **calibration)
    by_dummy = masks_of(name, lambda model: evaluator_of(model, dummy_input=images), **calibration)
    by_evaluation = masks_of(name, toy_evaluator, **calibration)
    assert any((mask == 0).any() for mask in expected["stem" if "stem" in expected else "hidden"].values())
    for masks in (by_dummy, by_evaluation):
        assert masks.keys() == expected.keys()
        for layer, targets in expected.items():
            for target, mask in targets.items():
                assert torch.equal(masks[layer][target], mask), (layer, target)


@pytest.mark.parametrize(
    ("kind", "knobs"),
    [
        (nni_topo.ReconstructionPruner, {}),
        (nni_topo.TopologicalPruner, {"cloud": "functional"}),
        (nni_topo.ClusterPruner, {}),
    ],
    ids=["reconstruction", "functional", "cluster"],
)
def test_evaluation_data_serve_as_calibration(kind: type, knobs: dict[str, Any]) -> None:
    """What an evaluation calls the model with, all of it, gives the masks of the same batches as calibration."""
    expected = kind(toy_model(), CONFIG, calibration=[toy_images()], **knobs).compress()[1]
    model = toy_model()
    found = kind(model, CONFIG, toy_evaluator(model), **knobs).compress()[1]
    assert torch.equal(found["inner"]["weight"], expected["inner"]["weight"])
    with pytest.raises(ConfigError, match="calibration data or an evaluator, got neither"):
        kind(toy_model(), CONFIG, **knobs)


def test_order_of_the_sources() -> None:
    model = toy_model()
    given, first, dummy, evaluated = (toy_images(count, seed=count) for count in (1, 2, 3, 4))
    evaluator = evaluator_of(model, lambda each: float(each(evaluated).sum()), dummy_input=dummy)
    assert example_inputs_of(given, model, calibration=[first], evaluator=evaluator) is given
    assert example_inputs_of(None, model, calibration=[(first, torch.zeros(2))], evaluator=evaluator) is first
    assert example_inputs_of(None, model, evaluator=evaluator) is dummy
    evaluator.dummy_input = None
    (found,) = example_inputs_of(None, model, evaluator=evaluator)
    assert torch.equal(found, evaluated)
    assert example_inputs_of(None, model, evaluator=None) is None


def test_an_evaluation_ends_at_its_first_batch() -> None:
    """Also where the user's function catches what it can; the model, its mode and the evaluator stay as they were."""
    model = toy_model().train()
    before = copy.deepcopy(model.state_dict())
    called: list[int] = []

    def evaluate(each: nn.Module) -> float:
        each.eval()
        for index in range(3):
            called.append(index)
            try:
                each(toy_images(2, seed=index))
            except Exception:
                continue
        return 0.0

    evaluator = evaluator_of(model, evaluate)
    (found,) = example_inputs_of(None, model, evaluator=evaluator)
    assert called == [0]
    assert torch.equal(found, toy_images(2, seed=0))
    assert model.training
    assert not model._forward_pre_hooks
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not evaluator._initialization_complete
    assert evaluator.model is None


def test_arguments_by_name_and_evaluations_without_a_call() -> None:
    model = toy_model()
    found = example_inputs_of(
        None, model, evaluator=evaluator_of(model, lambda each: float(each(images=toy_images(2)).sum()))
    )
    assert torch.equal(found["images"], toy_images(2))
    assert example_inputs_of(None, model, evaluator=evaluator_of(model, lambda each: 1.0)) is None
    with pytest.raises(ConfigError, match=r"input size must be known, .* got neither"):
        nni_topo.EnergyFilterPruner(model, CONFIG, evaluator_of(model, lambda each: 1.0))
    assert not hasattr(model.stem, "_nni_wrapper")
