"""Pruning in rounds with training in between, by NNI's schedules over one of the package's pruners."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import nni
import torch
from nni.compression import TorchEvaluator
from nni.compression.pruning import AGPPruner, LinearPruner, scheduled_pruner
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from nni_topo import zoo
from nni_topo.errors import ConfigError, unknown_name
from nni_topo.network.modes import device_of
from nni_topo.pruners.registry import create_pruner
from nni_topo.network.dense import to_dense

Schedule = Literal["one-shot", "linear", "agp"]
_SCHEDULERS = {"linear": LinearPruner, "agp": AGPPruner}


def prune_on_schedule(
    name: str,
    model: nn.Module,
    config_list: list[dict[str, Any]],
    data: zoo.DataBundle,
    recipe: zoo.Recipe,
    *,
    schedule: Schedule,
    rounds: int = 4,
    finishing: int = 1,
    seed: int = 0,
    **knobs: Any,
) -> nn.Module:
    """Prune a copy of a model and train it, in rounds or at once, for the same number of epochs.

    Parameters
    ----------
    name : str
        Registered pruner; it scores anew in every round.
    model : torch.nn.Module
        The trained model; it isn't changed.
    config_list : list of dict
        NNI's config_list: where the schedule ends.
    data : DataBundle
        What is trained on.
    recipe : Recipe
        How: all of its ``epochs`` are spent, whatever the schedule.
    schedule : {"one-shot", "linear", "agp"}
        All at the beginning; in equal steps; in steps that shrink (NNI's ``LinearPruner`` and ``AGPPruner``).
    rounds : int, default=4
        Steps of the last two, at least 1; the training in between is cut evenly.
    finishing : int, default=1
        Epochs of ``recipe`` that are spent on the dense network after the last round, in [0, epochs - 1].
    seed : int, default=0
        Of the order of the images.
    **knobs
        Of the pruner.

    Returns
    -------
    torch.nn.Module
        The dense network, trained, in evaluation mode.

    Raises
    ------
    ConfigError
        If the schedule is unknown, a number is out of its range, or the pruner refuses the request.

    Notes
    -----
    While masks are in force a removed channel's batch-norm bias is still heard; the dense network lacks it, and the
    finishing epochs make up for that.
    """
    if schedule not in ("one-shot", *_SCHEDULERS):
        raise unknown_name("schedule", schedule, ("one-shot", *_SCHEDULERS))
    if rounds < 1 or not 0 <= finishing < max(recipe.epochs, 1):
        raise ConfigError(
            f"rounds must be at least 1 and finishing in [0, {recipe.epochs - 1}], got {rounds} and {finishing} "
            "(prune_on_schedule)"
        )
    example = data.test.tensors[0][:2]
    wrapped = copy.deepcopy(model)
    if schedule == "one-shot":
        pruner = create_pruner(name, wrapped, config_list, **knobs)
        _, masks = pruner.compress()
        left = recipe
    else:
        steps = (recipe.epochs - finishing) * _batches(data, recipe)
        evaluator = recipe_evaluator(wrapped, data, recipe, seed=seed)
        inner = create_pruner(name, wrapped, config_list, evaluator, **knobs)
        with _untested_types_allowed():
            pruner = _SCHEDULERS[schedule](inner, interval_steps=max(1, steps // (rounds + 1)), total_times=rounds)
        _, masks = pruner.compress(max_steps=steps, max_epochs=None)
        left = recipe.for_retraining(finishing)
    pruner.unwrap_model()
    dense = to_dense(wrapped, example, masks)
    zoo.train(dense, data, left, seed=seed)
    return dense.eval()


def recipe_evaluator(model: nn.Module, data: zoo.DataBundle, recipe: zoo.Recipe, *, seed: int = 0) -> TorchEvaluator:
    """Return an NNI evaluator that trains by a recipe, without augmentation, and evaluates on the test images.

    Parameters
    ----------
    model : torch.nn.Module
        The model, before a pruner wraps it.
    data : DataBundle
        Training and test images.
    recipe : Recipe
        Optimizer, batch size, and the learning rate's course over the steps of a training.
    seed : int, default=0
        Of the order of the images.
    """
    batches = _batches(data, recipe)

    def train(
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        step: Callable[..., Tensor],
        scheduler: Any,
        max_steps: int | None,
        max_epochs: int | None,
    ) -> None:
        del scheduler
        steps = (max_epochs or recipe.epochs) * batches if max_steps is None else max_steps
        generator = torch.Generator().manual_seed(seed)
        images, labels = (tensor.to(device_of(model)) for tensor in data.train.tensors)
        model.train()
        for done in range(steps):
            if done % batches == 0:
                order = torch.randperm(len(labels), generator=generator).tensor_split(batches)
            chosen = order[done % batches]
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(done / steps)
            optimizer.zero_grad()
            step((images[chosen], labels[chosen]), model).backward()
            optimizer.step()

    def training_step(batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
        return cross_entropy(model(batch[0]), batch[1], label_smoothing=recipe.label_smoothing)

    optimizer = nni.trace(torch.optim.SGD)(
        model.parameters(),
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.momentum > 0,
    )
    return TorchEvaluator(train, optimizer, training_step, evaluating_func=lambda net: zoo.evaluate(net, data.test))


@contextmanager
def _untested_types_allowed() -> Iterator[None]:
    """Keep NNI from warning, on standard output, of pruners that aren't its own; the conformance checks test them."""
    logger = logging.getLogger(scheduled_pruner.__name__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _batches(data: zoo.DataBundle, recipe: zoo.Recipe) -> int:
    return math.ceil(len(data.train) / recipe.batch_size)
