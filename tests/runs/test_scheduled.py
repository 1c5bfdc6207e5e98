"""Pruning in rounds by NNI's schedules."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from nni.compression.pruning import LinearPruner

from nni_topo import zoo
from nni_topo.errors import ConfigError
from nni_topo.runs.choices import PrunerChoice
from nni_topo.runs.evaluators import batches_of, recipe_evaluator
from nni_topo.runs.run import Start
from nni_topo.runs.scheduled import prune_on_schedule

ENERGY = PrunerChoice("energy")
RECIPE = zoo.Recipe(epochs=3, batch_size=32, lr=0.02)


@pytest.fixture(scope="module")
def trained():
    data = zoo.load_data("digits", limit=400)
    model = zoo.create_model("small_cnn", num_classes=10, in_channels=1, image_size=8, seed=0)
    zoo.train(model, data, zoo.Recipe(epochs=5, batch_size=32), seed=0)
    return Start(model.eval(), data, RECIPE)


@pytest.mark.parametrize("schedule", ["one-shot", "linear", "agp"])
@pytest.mark.quick_every(2)
def test_every_schedule_ends_at_the_ratio_and_can_still_classify(trained, schedule):
    model, data = trained.net, trained.data
    before = copy.deepcopy(model.state_dict())
    config = [{"op_names": ["features.conv2"], "sparse_ratio": 0.5}]
    start = replace(trained, seed=1)
    dense = prune_on_schedule(start, ENERGY, config, RECIPE, schedule=schedule, rounds=2)
    assert dense.features.conv2.out_channels == model.features.conv2.out_channels // 2
    assert zoo.evaluate(dense, data.test) > 0.8
    assert not dense.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(("finishing", "in_rounds"), [(0, 3), (2, 1)])
def test_all_epochs_are_spent_the_last_ones_on_the_dense_network(trained, finishing, in_rounds, monkeypatch):
    steps, epochs = [], []
    compress, train = LinearPruner.compress, zoo.train

    def compressed(self, max_steps, max_epochs):
        steps.append((max_steps, self.interval_steps, self.total_times))
        return compress(self, max_steps, max_epochs)

    def dense_trained(net, data, recipe, **knobs):
        epochs.append(recipe.epochs)
        return train(net, data, recipe, **knobs)

    monkeypatch.setattr(LinearPruner, "compress", compressed)
    monkeypatch.setattr(zoo, "train", dense_trained)
    config = [{"op_names": ["features.conv2"], "sparse_ratio": 0.5}]
    prune_on_schedule(trained, ENERGY, config, RECIPE, schedule="linear", rounds=1, finishing=finishing)
    in_an_epoch = -(-len(trained.data.train) // RECIPE.batch_size)
    in_all = in_rounds * in_an_epoch
    # One round in the middle of the training.
    assert (steps, epochs) == ([(in_all, in_all // 2, 1)], [finishing])


def test_same_seed_same_network_and_a_silent_output(trained, capsys):
    config = [{"op_names": ["features.conv2"], "sparse_ratio": 0.5}]
    start = replace(trained, seed=3)
    first, second = (prune_on_schedule(start, ENERGY, config, RECIPE, schedule="agp", rounds=2) for _ in range(2))
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert capsys.readouterr().out == ""


def test_the_evaluator_trains_for_the_steps_it_is_given(trained):
    model, data = trained.net, trained.data
    net = copy.deepcopy(model)
    evaluator = recipe_evaluator(net, data, RECIPE)
    taken = []
    evaluator._init_optimizer_helpers(net)
    evaluator.bind_model(net, {name: name for name, _ in net.named_parameters()})
    evaluator.patch_optimizer_step(before_step_tasks=[], after_step_tasks=[lambda: taken.append(1)])
    evaluator.train(max_steps=7)
    assert len(taken) == 7
    assert evaluator.evaluate() > 0.8
    evaluator.unbind_model()


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"schedule": "liner"}, "did you mean linear"),
        ({"schedule": "linear", "rounds": 0}, "got 0 and 1"),
        ({"schedule": "agp", "finishing": 3}, "in \\[0, 2\\], got 4 and 3"),
        ({"schedule": "agp", "finishing": -1}, "got 4 and -1"),
        ({"schedule": "one-shot", "recipe": zoo.Recipe(epochs=1)}, "in \\[0, 0\\], got 4 and 1"),
        ({"schedule": "linear", "rounds": 27}, "training steps before the last epochs, 26, got 27"),
    ],
)
def test_bad_requests(trained, knobs, words):
    config = [{"op_names": ["features.conv2"], "sparse_ratio": 0.5}]
    with pytest.raises(ConfigError, match=words):
        prune_on_schedule(trained, ENERGY, config, **{"recipe": RECIPE, **knobs})


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_all_rounds_take_place_in_a_few_steps(trained, rounds):
    start = replace(trained, data=zoo.load_data("digits", limit=50))
    config = [{"op_names": ["features.conv2"], "sparse_ratio": 0.5}]
    recipe = zoo.Recipe(epochs=1, batch_size=20)  # three steps
    dense = prune_on_schedule(start, ENERGY, config, recipe, schedule="linear", rounds=rounds, finishing=0)
    assert dense.features.conv2.out_channels == trained.net.features.conv2.out_channels // 2


@pytest.mark.parametrize("knobs", [{"schedule": "one-shot"}, {"schedule": "linear", "rounds": 1}])
def test_the_seed_draws_the_order_of_the_images(trained, knobs):
    data = zoo.load_data("digits", limit=50)
    config = [{"op_names": ["features.conv2"], "sparse_ratio": 0.5}]
    recipe = zoo.Recipe(epochs=1, batch_size=20)
    weights = [
        prune_on_schedule(replace(trained, data=data, seed=seed), ENERGY, config, recipe, finishing=0, **knobs)
        .features.conv1.weight.detach()
        .clone()
        for seed in (1, 1, 2)
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("knobs", "steps"),
    [
        ({"max_epochs": 2}, 6),
        ({"max_steps": 4}, 4),
        ({}, 9),
        ({"max_steps": 0, "max_epochs": 2}, 0),
    ],
)
def test_an_evaluator_follows_the_recipe_step_by_step(knobs, steps):
    data = zoo.load_data("digits", limit=50)
    recipe = zoo.Recipe(epochs=3, batch_size=20, lr=0.5)
    assert batches_of(data, recipe) == 3
    net = zoo.create_model("small_cnn", num_classes=10, in_channels=1, image_size=8, seed=0).eval()
    evaluator = recipe_evaluator(net, data, recipe, seed=4)
    rates, labels = [], []

    class Noting(torch.optim.SGD):
        def step(self):
            assert net.training
            rates.append([group["lr"] for group in self.param_groups])

    def step(batch, model):
        labels.append(batch[1])
        return model(batch[0]).sum()

    groups = [{"params": [net.features.conv1.weight]}, {"params": [net.features.conv2.weight]}]
    given = {"max_steps": None, "max_epochs": None, **knobs}
    evaluator.training_func(net, Noting(groups, lr=9.0), step, None, given["max_steps"], given["max_epochs"])
    assert rates == [[recipe.rate(number / steps)] * 2 for number in range(steps)]
    assert [len(each) for each in labels] == ([17, 17, 16] * 3)[:steps]
    if steps > 3:
        # each epoch goes through all images in an order of its own
        first, second = torch.cat(labels[:3]), torch.cat(labels[3:6])
        assert first.bincount().tolist() == data.train.tensors[1].bincount().tolist()
        assert not torch.equal(first[: len(second)], second)
