"""One cell: what its pruner is given to look at."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch.utils.data import TensorDataset

from nni_topo import zoo
from nni_topo.errors import ConfigError
from nni_topo.runs import run as execute
from nni_topo.runs.choices import DataChoice, DistillationChoice, ModelChoice, PrunerChoice, Target
from nni_topo.runs.run import Start, distillation_knobs, trained
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


def small_start():
    data = zoo.load_data("digits", limit=50)
    net = zoo.create_model("small_cnn", num_classes=10, in_channels=1, image_size=8, seed=0).eval()
    return Start(net, data, zoo.Recipe(epochs=1))


def test_accuracies_are_measured_where_they_arent_known():
    start = small_start()
    assert start.accuracy == zoo.evaluate(start.net, start.data.test)
    assert start.validation_accuracy == zoo.evaluate(start.net, start.data.validation)
    known = replace(start, known_accuracy=2.0, known_validation=3.0)
    assert (known.accuracy, known.validation_accuracy) == (2.0, 3.0)


def test_a_trained_network_is_kept_with_what_is_known_of_it(tmp_path, monkeypatch):
    choices = ModelChoice("small_cnn"), DataChoice("digits", limit=50)
    recipe = zoo.Recipe(epochs=1)
    start = trained(*choices, recipe=recipe, folder=tmp_path, seed=3)
    (path,) = tmp_path.glob("*.pt")
    assert path.name.endswith("-seed3.pt")
    facts = zoo.load_checkpoint(path, small_start().net)
    assert facts.pop("seconds") > 0.0
    assert facts == {"seed": 3, "accuracy": start.accuracy, "validation_accuracy": start.validation_accuracy}
    # the second time it is read: it isn't trained, and its accuracies are those of the file
    monkeypatch.setattr(zoo, "train", None)
    again = trained(*choices, recipe=recipe, folder=tmp_path, seed=3)
    assert (again.known_accuracy, again.known_validation) == (start.accuracy, start.validation_accuracy)
    assert all(torch.equal(one, start.net.state_dict()[name]) for name, one in again.net.state_dict().items())


@pytest.mark.parametrize(("batch_size", "steps"), [(64, 1), (20, 3), (1, 32)])
def test_gradients_are_measured_once_over_the_images_or_in_32_batches(batch_size, steps):
    start = small_start()
    assert len(start.data.train) == 50
    start = replace(start, recipe=zoo.Recipe(epochs=1, batch_size=batch_size))
    found = execute.pruner_knobs("taylor", copy.deepcopy(start.net), start)["training_steps"]
    assert (found, type(found)) == (steps, int)


@pytest.mark.parametrize(("kind", "images"), [("flops", 2), ("memory", 2), ("latency", 64)])
def test_only_a_budget_of_time_is_counted_in_the_batch_that_is_timed(kind, images, pruner_seen, monkeypatch):
    # how near the times are known doesn't matter here
    monkeypatch.setattr("nni_topo.pruners.budget._SECONDS", 0.01)
    monkeypatch.setattr("nni_topo.pruners.solving._TIMINGS", 1)
    start = small_start()
    choice = PrunerChoice("matrix", knobs={"budget": {"allocation": "uniform"}})
    ratios = layer_ratios(start.net, start.example, Target("ratio", 0.5))
    found = execute.prune_to_ratios(start, choice, Target(kind, 0.6), ratios)
    assert len(pruner_seen["knobs"]["example_inputs"]) == images
    assert pruner_seen["knobs"]["budget"] == {kind: 0.6, "allocation": "uniform"}
    assert (found.budget.kind, found.budget.asked) == (kind, 0.6)


def test_a_ratio_is_no_budget_to_be_dealt_out(pruner_seen):
    start = small_start()
    choice = PrunerChoice("matrix", knobs={"budget": {"allocation": "uniform"}})
    ratios = layer_ratios(start.net, start.example, Target("ratio", 0.5))
    with pytest.raises(ConfigError, match=r"a budget must be a share of one of .*, got none"):
        execute.prune_to_ratios(start, choice, Target("ratio", 0.5), ratios)
    # without an allocation a pruner gets the layers' ratios
    execute.prune_to_ratios(start, PrunerChoice("matrix"), Target("flops", 0.5), ratios)
    assert "budget" not in pruner_seen["knobs"]
    assert {float(each["weight"].mean()) for each in pruner_seen["pruner"].get_masks().values()} == {0.5}


def test_images_are_augmented_as_the_plan_says_or_not_at_all():
    start = Start(torch.nn.Linear(1, 1), numbered(8), zoo.Recipe(epochs=1))
    own = {"steps": 5, "blend": False}
    plain = distillation_knobs(start, DistillationChoice(augmentation="none", **own))
    assert own.items() <= plain.items()
    assert not {"augment", "augmentation", "images"} & plain.keys()
    knobs = distillation_knobs(start, DistillationChoice(augmentation="crop", **own))
    images = torch.arange(64.0).reshape(1, 1, 8, 8).repeat(6, 1, 1, 1)
    torch.manual_seed(0)
    found = knobs.pop("augment")(images)
    assert knobs == plain
    assert found.shape == images.shape
    assert not torch.equal(found, images)
