"""One cell: what its pruner is given to look at."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch.utils.data import TensorDataset

from nni_topo import zoo
from nni_topo.runs import run as execute
from nni_topo.runs.choices import DataChoice, ModelChoice, PrunerChoice, Target
from nni_topo.runs.run import Start
from nni_topo.runs.widths import layer_ratios
from nni_topo.studies.plan import ComparisonPlan


def cell_of(pruner, **changes):
    factors = {
        "models": (ModelChoice("small_cnn"),),
        "data": (DataChoice("digits", limit=150),),
        "pruners": (pruner,),
        "targets": (Target("ratio", 0.5),),
        "retrain": {"epochs": 1},
    }
    return next(ComparisonPlan(**{**factors, **changes}).cells())


def numbered(images):
    """A bundle whose training image i is i everywhere, and whose test images are negative."""
    data = zoo.load_data("digits", limit=10)
    places = torch.arange(float(images))[:, None, None, None].expand(-1, 1, 8, 8).clone()
    labels = torch.zeros(images, dtype=torch.long)
    return replace(data, train=TensorDataset(places, labels), test=TensorDataset(-1.0 - places, labels))


@pytest.mark.parametrize(("images", "sizes"), [(300, [128, 128, 44]), (128, [128]), (5, [5]), (999, [128, 128, 64])])
def test_calibration_takes_the_first_training_images_and_nothing_else(images, sizes):
    batches = Start(torch.nn.Linear(1, 1), numbered(320), zoo.Recipe(epochs=1)).images(images)
    assert [len(batch) for batch in batches] == sizes
    found = torch.cat(batches)
    assert found.shape[1:] == (1, 8, 8)
    assert torch.equal(found[:, 0, 0, 0], torch.arange(float(min(images, 320))))


@pytest.fixture
def pruner_seen(monkeypatch):
    """Notes the pruner that a cell makes, what it is given, and the network as it was before."""
    seen = {}

    def create(name, victim, config_list, **knobs):
        seen.update(victim=victim, before=copy.deepcopy(victim.state_dict()), knobs=knobs)
        seen["pruner"] = create_pruner(name, victim, config_list, **knobs)
        return seen["pruner"]

    create_pruner = execute.create_pruner
    monkeypatch.setattr(execute, "create_pruner", create)
    return seen


def pruned(cell, data=None):
    data = execute.load_model_data(cell.model, cell.data) if data is None else data
    start = Start(execute.build_model(cell.model, data, seed=0), data, cell.train)
    ratios = layer_ratios(start.net, start.example, cell.target)
    masks = execute.prune_to_ratios(start, cell.pruner, cell.target, ratios).masks
    return start.net, masks


def test_a_pruner_with_calibration_is_given_training_images(pruner_seen):
    data = numbered(200)
    pruned(
        cell_of(
            PrunerChoice("topological", calibration=130, knobs={"criterion": "hausdorff", "solver": {"generations": 1}})
        ),
        data,
    )
    given = pruner_seen["knobs"]["calibration"]
    assert [len(batch) for batch in given] == [128, 2]
    assert min(float(batch.min()) for batch in given) == 0.0


@pytest.mark.parametrize("train", [{"lr": 0.5}, {"lr": 0.5, "weight_decay": 0.1}])
def test_weights_stay_while_taylor_measures_gradients(pruner_seen, train):
    cell = cell_of(PrunerChoice("taylor", knobs={"training_steps": 3}), train=train)
    assert cell.train.lr == 0.5
    model, masks = pruned(cell)
    pruner_seen["pruner"].unwrap_model()
    assert pruner_seen["victim"] is not model
    for name, weight in pruner_seen["victim"].named_parameters():
        assert torch.equal(model.get_parameter(name), pruner_seen["before"][name])
        torch.testing.assert_close(weight.detach(), pruner_seen["before"][name], rtol=0.0, atol=1e-12)
    assert {float(targets["weight"].mean()) for targets in masks.values()} == {0.5}
