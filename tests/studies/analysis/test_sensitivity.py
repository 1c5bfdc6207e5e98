from __future__ import annotations

import json

import pytest
import torch
import yaml
from torch import nn

from nni_topo.errors import ConfigError, DataError
from nni_topo.studies.analysis.sensitivity import sensitivity
from nni_topo.testing import toy_evaluator, toy_images, toy_model

IMAGES = toy_images(64, seed=1)


def nearness(net):
    """Scores a model by how near its logits are to the toy network's: 1 for the same, 1/2 for an error as large."""
    with torch.no_grad():
        wanted = toy_model().eval()(IMAGES)
        return float(1.0 / (1.0 + (net(IMAGES) - wanted).norm() / wanted.norm()))


@pytest.fixture(scope="module")
def found():
    model = toy_model().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = []
    study = sensitivity(
        model, IMAGES[:2], nearness, (0.25, 0.5, 0.75), budget=0.3, on_progress=lambda *row: seen.append(row)
    )
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    return study, seen


def test_coupled_layers_have_one_curve_and_the_head_none(found):
    study, seen = found
    assert [curve.layers for curve in study.curves] == [("stem", "inner"), ("hidden",)]
    assert study.baseline == 1.0
    assert [(name, ratio) for name, ratio, _ in seen] == [
        (name, ratio) for name in ("stem+inner", "hidden") for ratio in (0.25, 0.5, 0.75)
    ]
    assert all(0.0 < accuracy <= 1.0 for *_, accuracy in seen)


def test_the_suggestion_was_measured_and_meets_the_budget(found):
    study, _ = found
    assert study.suggested
    assert study.suggested_accuracy >= 1.0 - 0.3
    for entry in study.suggested:
        curve = next(curve for curve in study.curves if list(curve.layers) == entry["op_names"])
        assert curve.accuracy[entry["sparse_ratio"]] >= 0.7


def test_files(found, tmp_path, drawn):
    study, _ = found
    document, picture, config = study.save(tmp_path / "study")
    assert json.loads(document.read_text())["curves"][1]["layers"] == ["hidden"]
    curves = drawn.lines(picture.name)
    assert {height for _, height in curves.pop("budget")} == {study.baseline - study.budget}
    assert curves == {
        "+".join(curve.layers): [(0.0, study.baseline), *curve.accuracy.items()] for curve in study.curves
    }
    assert yaml.safe_load(config.read_text()) == {"pruner": "l1", "knobs": {}, "config_list": study.suggested}


def test_a_layer_that_does_not_matter_is_given_its_highest_ratio():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        model[2].weight[2:] = 0.0
        model[2].bias[2:] = 0.0
    inputs = torch.randn(100, 6)
    labels = model(inputs).argmax(1)
    study = sensitivity(
        model, inputs[:2], lambda net: float((net(inputs).argmax(1) == labels).double().mean()), (0.25, 0.5, 0.75),
        budget=0.0, layers=["2"],
    )  # fmt: skip
    assert study.suggested == [{"op_names": ["2"], "sparse_ratio": 0.75}]
    assert study.suggested_accuracy == 1.0


def test_what_all_layers_at_once_leave_of_the_budget_goes_to_one():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))

    def score(net):  # the first layer's rows are dearer, and what both lose at their first step is above the budget
        gone = [int((net[index].weight.abs().sum(1) == 0).sum()) for index in (0, 2)]
        return 1.0 - 0.01 * gone[0] - 0.008 * gone[1]

    study = sensitivity(model, torch.randn(2, 6), score, (0.25, 0.5), budget=0.02, layers=["0", "2"])
    assert study.suggested == [{"op_names": ["2"], "sparse_ratio": 0.25}]
    assert study.suggested_accuracy == pytest.approx(1.0 - 0.016)


def test_single_weights_have_a_curve_per_layer():
    study = sensitivity(toy_model().eval(), IMAGES[:2], nearness, (0.5,), "level")
    assert [curve.layers for curve in study.curves] == [("stem",), ("inner",), ("hidden",), ("head",)]


def test_pruners_that_train_get_an_evaluator_for_each_copy(tmp_path):
    victims = []

    def knobs(victim):
        victims.append(victim)
        return {"evaluator": toy_evaluator(victim), "training_steps": 2}

    model = toy_model()
    found = sensitivity(
        model, IMAGES[:2], lambda net: 1.0, (0.25, 0.5), "taylor", layers=["inner", "hidden"], knobs=knobs
    )
    assert [sorted(curve.accuracy) for curve in found.curves] == [[0.25, 0.5]] * len(found.curves)
    assert all(victim is not model for victim in victims)
    assert "training_steps: 2" in found.save(tmp_path)[2].read_text()


@pytest.mark.parametrize(
    ("knobs", "error", "message"),
    [
        ({"ratios": ()}, ConfigError, "ratios must be a sequence of at least 1, each value in \\(0, 1\\)"),
        ({"ratios": (0.5, 1.0)}, ConfigError, "ratios must be"),
        ({"pruner": "l3"}, ConfigError, "did you mean l"),
        ({"knobs": {"nrm": 1}, "pruner": "matrix"}, ConfigError, "did you mean norm"),
        ({"layers": ["hiden"]}, ConfigError, "a layer must be a known name, got 'hiden'; did you mean hidden"),
        ({"budget": -1.0}, ConfigError, "budget must be at least 0 and finite, got -1.0"),
        ({"evaluate": lambda net: float("nan")}, DataError, "finite number, got nan"),
    ],
)
def test_bad_requests_are_refused(knobs, error, message):
    with pytest.raises(error, match=message):
        sensitivity(**{"model": toy_model(), "example_inputs": IMAGES[:2], "evaluate": lambda net: 1.0, **knobs})
