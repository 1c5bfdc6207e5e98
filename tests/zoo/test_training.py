from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from nni_topo.errors import ConfigError, DataError
from nni_topo.zoo import (
    Recipe,
    check_model,
    create_model,
    evaluate,
    load_data,
    loss_and_accuracy,
    train,
)
from nni_topo.zoo.training import shifted

SHORT = Recipe(epochs=2, batch_size=32, lr=0.05)


@pytest.fixture(scope="module")
def data():
    return load_data("digits", limit=200)


def small(seed: int = 0, classes: int = 10) -> nn.Module:
    return create_model("small_cnn", num_classes=classes, in_channels=1, image_size=8, seed=seed)


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([value.double().flatten() for value in model.state_dict().values()])


def test_same_seed_same_weights_and_global_generators_untouched(data) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    results = []
    for seed in (0, 0, 1):
        model = small()
        train(model, data, replace(SHORT, augmentation="crop-flip"), seed=seed)
        results.append(weights(model))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_log_tells_what_happened(data) -> None:
    seen = []
    model = small()
    log = train(model, data, SHORT, seed=4, callback=seen.append)
    assert list(log.epochs) == seen
    assert [epoch.epoch for epoch in seen] == [1, 2]
    assert log.seconds == pytest.approx(sum(epoch.seconds for epoch in seen))
    assert all(0.0 < epoch.training_seconds < epoch.seconds for epoch in seen)
    assert seen[-1].validation_accuracy == evaluate(model, data.validation)
    # Seven batches an epoch, so the last step comes 13/14 of the way through.
    assert seen[-1].lr == pytest.approx(SHORT.rate(13 / 14))
    assert not model.training


def test_a_training_ends_after_the_first_epoch_that_reaches_the_accuracy(data) -> None:
    recipe = replace(SHORT, epochs=6)
    full = train(small(), data, recipe, seed=4)
    reached = [epoch.validation_accuracy for epoch in full.epochs]
    goal = max(reached[:4])
    first = next(count for count, accuracy in enumerate(reached, start=1) if accuracy >= goal)
    model = small()
    log = train(model, data, recipe, seed=4, until=goal)
    assert 1 < first < 6
    assert [epoch.loss for epoch in log.epochs] == [epoch.loss for epoch in full.epochs[:first]]
    assert evaluate(model, data.validation) == reached[first - 1]
    assert len(train(small(), data, SHORT, seed=4, until=1.0).epochs) == SHORT.epochs


def test_an_accuracy_to_reach_is_checked_before_the_training(data) -> None:
    model = small()
    before = weights(model)
    with pytest.raises(ConfigError, match=r"until must be in \(0, 1\] or None, got 0\.0"):
        train(model, data, SHORT, seed=0, until=0.0)
    unwatched = replace(data, validation=TensorDataset(*data.validation[:0]))
    with pytest.raises(ConfigError, match=r"until needs validation images, got 0\.5 without any"):
        train(model, unwatched, SHORT, seed=0, until=0.5)
    assert torch.equal(weights(model), before)


def test_first_step_is_plain_sgd_by_hand(data) -> None:
    recipe = Recipe(epochs=1, batch_size=200, lr=0.1, momentum=0.0, weight_decay=0.01, schedule="cosine")
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    start = model[1].weight.detach().clone()
    images, labels = data.train.tensors
    loss = nn.functional.cross_entropy(model(images), labels)
    (gradient,) = torch.autograd.grad(loss, model[1].weight)
    log = train(model, data, recipe, seed=0)
    torch.testing.assert_close(model[1].weight, start - 0.1 * (gradient + 0.01 * start))
    assert log.epochs[0].loss == pytest.approx(loss.item(), rel=1e-5)


def test_frozen_parameters_and_memory_layout_stay(data) -> None:
    model = small()
    model.features.conv1.weight.requires_grad_(False)
    before = model.features.conv1.weight.clone()
    train(model, data, SHORT, seed=0)
    assert torch.equal(model.features.conv1.weight, before)
    assert all(parameter.is_contiguous() for parameter in model.parameters())


def test_bfloat16_trains_and_leaves_float32_weights(data) -> None:
    model = small()
    log = train(model, data, replace(SHORT, epochs=4, precision="bfloat16"), seed=0)
    assert log.epochs[-1].loss < log.epochs[0].loss
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_diverging_training_is_named(data) -> None:
    with pytest.raises(ConfigError, match=r"lr must keep the loss finite, got (nan|inf) at lr=1e\+20 \(epoch 1\)"):
        train(small(), data, replace(SHORT, lr=1e20), seed=0)


def test_evaluation_by_hand() -> None:
    model = nn.Linear(2, 3)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
        model.bias.zero_()
    images = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 1.0], [-1.0, -1.0]])
    dataset = TensorDataset(images, torch.tensor([0, 1, 1, 2]))
    assert evaluate(model, dataset) == 0.75
    # Log-sum-exp of the three logits less the label's logit.
    rows = [(2, 0, 0, 2), (0, 1, 0, 1), (3, 1, 0, 1), (-1, -1, 0, 0)]
    losses = [math.log(sum(math.exp(logit) for logit in row[:3])) - row[3] for row in rows]
    assert loss_and_accuracy(model, dataset)[0] == pytest.approx(sum(losses) / 4, rel=1e-6)


def test_data_that_do_not_fit_the_model_are_named(data) -> None:
    with pytest.raises(DataError, match="at least one image to be evaluated on, got 0"):
        evaluate(small(), load_data("digits", limit=20, validation=0.0).validation)
    with pytest.raises(DataError, match=r"must have 10 outputs, one per class, got \(12,\) \(digits\)"):
        train(small(classes=12), data, SHORT, seed=0)
    with pytest.raises(DataError, match="labels must be below the model's 7 outputs, got 9"):
        evaluate(small(classes=7), data.test)
    with pytest.raises(DataError, match=r"must take images of shape \(1, 8, 8\), got: .*\(digits\)"):
        check_model(create_model("resnet20", num_classes=10, in_channels=3, image_size=8), data)


def test_shifts_move_every_image_by_itself_and_bring_black_in() -> None:
    images = torch.arange(1.0, 1 + 40 * 2 * 16 * 16).view(40, 2, 16, 16)
    black = torch.tensor([-1.0, -2.0])
    moved = shifted(images, black, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape
    offsets = set()
    for before, after in zip(images, moved, strict=True):
        canvas = black.view(2, 1, 1).expand(2, 20, 20).clone()
        canvas[:, 2:18, 2:18] = before
        matches = [
            (top, left)
            for top in range(5)
            for left in range(5)
            if torch.allclose(canvas[:, top : top + 16, left : left + 16], after)
        ]
        assert len(matches) == 1
        offsets.update(matches)
    assert len(offsets) > 10


@pytest.mark.parametrize(
    ("schedule", "points"),
    [
        ("constant", [(0.0, 1.0), (0.5, 1.0), (1.0, 1.0)]),
        ("cosine", [(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)]),
        ("one-cycle", [(0.0, 0.04), (0.15, 0.52), (0.3, 1.0), (0.65, 0.5), (1.0, 0.0)]),
    ],
)
def test_schedules_by_hand(schedule: str, points: list[tuple[float, float]]) -> None:
    recipe = Recipe(epochs=1, lr=1.0, schedule=schedule)
    for progress, rate in points:
        assert recipe.rate(progress) == pytest.approx(rate, abs=1e-12)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"epochs": -1}, "epochs must be an integer of at least 0, got -1"),
        ({"lr": 0.0}, "lr must be above 0 and finite, got 0.0"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"schedule": "step"}, "schedule must be a known name, got 'step'"),
    ],
)
def test_bad_recipes_are_named(knobs: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(SHORT, **knobs)
