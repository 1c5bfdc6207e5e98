"""One cell: what its pruner is given to look at."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch.utils.data import TensorDataset

from nni_topo import zoo
from nni_topo.errors import ConfigError, DataError
from nni_topo.pruners.budget import BudgetOutcome
from nni_topo.runs import pipeline
from nni_topo.runs import run as execute
from nni_topo.runs.choices import (
    CompensationChoice,
    DataChoice,
    DistillationChoice,
    ModelChoice,
    PrunerChoice,
    Target,
    training_key,
)
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


def small_start():
    data = zoo.load_data("digits", limit=50)
    net = zoo.create_model("small_cnn", num_classes=10, in_channels=1, image_size=8, seed=0).eval()
    return Start(net, data, zoo.Recipe(epochs=1))


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


def halved(start):
    ratios = {"features.conv2": 0.5}
    return execute.prune_to_ratios(start, PrunerChoice("l1"), Target("ratio", 0.5), ratios).masks


def test_costs_are_those_before_and_after():
    start = small_start()
    with torch.no_grad():
        start.net.features.conv1.weight[0, 0, 0, :2] = 0.0
    dense, report = execute.made_dense(start, halved(start))
    assert report is None
    found = execute.costs(start, dense)
    conv = start.net.features.conv2.out_channels
    assert (found["widths_before"]["features.conv2"], found["widths"]["features.conv2"]) == (conv, conv // 2)
    assert found["widths"].keys() == found["widths_before"].keys() == execute.layer_widths(start.net).keys()
    for suffix, net in (("_before", start.net), ("", dense)):
        assert found[f"flops{suffix}"] == zoo.count_macs(net, start.example)
        assert found[f"params{suffix}"] == zoo.count_params(net)
        assert found[f"weights_left{suffix}"] == zoo.count_params(net) - 2
    assert "features.conv2" not in found["whole"]
    assert "features.conv1" in found["whole"]
    times = {"latency_ms": 1.0, "latency_before_ms": 4.0}
    facts = execute.budget_facts(start, dense, Target("latency", 0.5), times, "why")["budget"]
    assert facts == {"kind": "latency", "asked": 0.5, "left": 0.25, "is_met": True, "why": "why"}
    facts = execute.budget_facts(start, dense, Target("params", 0.5), {}, "why")["budget"]
    assert facts["left"] == pytest.approx(zoo.count_params(dense) / zoo.count_params(start.net))
    assert execute.budget_facts(start, dense, BudgetOutcome("params", 0.125, 0.1, True), {}, "")["budget"][
        "asked"
    ] == pytest.approx(0.125)


@pytest.mark.parametrize(("method", "has_refine"), [("reconstruct", True), ("pair", False)])
@pytest.mark.quick_every(2)
def test_compensation_takes_a_method_with_as_many_rounds_as_are_asked_for(method, has_refine, monkeypatch, capsys):
    monkeypatch.setattr("nni_topo.network.runtime.progress._DELAY", 0.0)
    seen = []

    def noting(net, masks, images, *, method, progress):
        seen.append((sum(map(len, images)), getattr(method, "refine", None), progress))
        return compensation(net, masks, images, method=method, progress=progress)

    compensation = pipeline.compensation
    monkeypatch.setattr(pipeline, "compensation", noting)
    start = small_start()
    choice = CompensationChoice(20, method=method, refine=1)
    dense, report = execute.made_dense(start, halved(start), choice, progress=False)
    assert seen == [(20, 1 if has_refine else None, False)]
    assert "compensate" not in capsys.readouterr().err
    assert report.to_frame().layer.tolist()
    plain, _ = execute.made_dense(start, halved(start))
    assert not torch.equal(dense(start.example), plain(start.example))


@pytest.mark.parametrize(("images", "judges"), [(32, [32, 33, 34, 35]), (45, [45, 46, 47, 48, 49]), (50, None)])
def test_images_after_those_that_are_learned_from_judge(images, judges, monkeypatch):
    seen = {}
    monkeypatch.setattr(execute, "distillation", lambda *arguments, **knobs: seen.update(knobs, given=arguments))
    start = replace(small_start(), data=numbered(50), seed=3)
    execute.distilled(start, start.net, DistillationChoice(images, steps=7), progress=False)
    found = seen["held_out"]
    assert (None if found is None else torch.cat(found)[:, 0, 0, 0].tolist()) == judges
    assert sum(map(len, seen["given"][2])) == images
    assert (seen["seed"], seen["progress"], seen["steps"], seen["temperature"]) == (3, False, 7, 2.0)


def test_data_are_as_large_as_the_model_needs_and_as_the_choice_says():
    padded = ModelChoice("cnn12")
    found = execute.load_model_data(padded, DataChoice("digits", limit=20, test_limit=5))
    assert (found.image_size, len(found.train), len(found.test)) == (32, 20, 5)
    whole = execute.load_model_data(ModelChoice("small_cnn"), DataChoice("digits", test_limit=1))
    assert (whole.image_size, len(whole.test)) == (8, 1)
    assert len(whole.train) > 1000
    for limit in (0, -1):
        with pytest.raises(ConfigError, match=rf"test_limit must be at least 1, got {limit} \(data\)"):
            execute.load_model_data(padded, DataChoice("digits", limit=20, test_limit=limit))


def test_a_checkpoint_comes_before_the_folder_and_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "train", None)
    own = small_start().net
    torch.save(own.state_dict(), tmp_path / "own.pt")
    seen = []

    def accept(start):
        seen.append((start.net.training, start.seed, start.recipe.epochs))

    choices = ModelChoice("small_cnn"), DataChoice("digits", limit=50)
    given = trained(*choices, checkpoint=tmp_path / "own.pt", folder=tmp_path / "nets", seed=5, accept=accept)
    assert seen == [(False, 5, zoo.default_recipe("small_cnn", "digits").epochs)]
    assert not (tmp_path / "nets").exists()
    named = trained(ModelChoice("small_cnn", checkpoint=str(tmp_path / "own.pt")), choices[1])
    for start in (given, named):
        assert not start.net.training
        assert (start.known_accuracy, start.known_validation) == (None, None)
        assert torch.equal(start.net.features.conv1.weight, own.features.conv1.weight)
    (tmp_path / "damaged").mkdir()
    recipe = zoo.Recipe(epochs=1)
    path = tmp_path / "damaged" / f"{training_key(*choices, recipe, 0)}.pt"
    path.write_bytes(b"half a file")
    with pytest.raises(DataError, match=rf"{path.name}.*delete it"):
        trained(*choices, recipe=recipe, folder=tmp_path / "damaged")


def test_devices_are_resolved_by_what_is_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert execute.resolve_device("auto") == execute.resolve_device(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(ConfigError, match="or another that PyTorch can use, got 'cuda'"):
        execute.resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert execute.resolve_device("auto") == torch.device("cuda")


def test_a_pruner_that_finds_the_number_itself_keeps_the_widths_of_the_others():
    cell = cell_of(PrunerChoice("l1"))
    data = zoo.load_data("digits", limit=150)
    start = Start(execute.build_model(cell.model, data, seed=0).eval(), data, cell.train)
    target = Target("flops", 0.25)
    ratios = layer_ratios(start.net, start.example, target)
    kept = []
    for pruner in (PrunerChoice("l1"), PrunerChoice("subcluster", knobs={"energy": 0.01}, calibration=150)):
        masks = execute.prune_to_ratios(start, pruner, target, ratios).masks
        kept.append({name: int(found["weight"].flatten(1).amax(1).sum()) for name, found in masks.items()})
    assert kept[0] == kept[1]
