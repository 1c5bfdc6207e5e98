"""NNI's evaluators, made from a recipe."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import nni
import torch
from nni.compression import TorchEvaluator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from nni_topo import zoo
from nni_topo.network.runtime.modules import device_of
from nni_topo.zoo.evaluation import by_label
from nni_topo.zoo.labelled import batches as batches_of_rows
from nni_topo.zoo.labelled import held_on


def recipe_evaluator(model: nn.Module, data: zoo.DataBundle, recipe: zoo.Recipe, *, seed: int = 0) -> TorchEvaluator:
    """Return an NNI evaluator that trains by a recipe, without augmentation, and evaluates on the test images."""
    batches = math.ceil(len(data.train) / recipe.batch_size)

    def train(
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        step: Callable[..., Tensor],
        scheduler: Any,
        max_steps: int | None,
        max_epochs: int | None,
    ) -> None:
        # the recipe sets the rate of every step
        del scheduler
        steps = (max_epochs or recipe.epochs) * batches if max_steps is None else max_steps
        generator = torch.Generator().manual_seed(seed)
        device = device_of(model)
        held = held_on(data.train, device)

        def epochs() -> Iterator[tuple[Tensor, Tensor]]:
            while True:
                order = torch.randperm(len(held), generator=generator).tensor_split(batches)
                yield from batches_of_rows(held, order, device)

        model.train()
        for done, batch in zip(range(steps), epochs(), strict=False):
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(done / steps)
            optimizer.zero_grad()
            step(batch, model).backward()
            optimizer.step()

    def training_step(batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
        return cross_entropy(*by_label(model(batch[0]), batch[1]))

    # the model before a pruner wraps it, because NNI makes the optimizer anew for the wrapped model
    kind, knobs = recipe.optimizing()
    optimizer = nni.trace(kind)(model.parameters(), **knobs)
    return TorchEvaluator(train, optimizer, training_step, evaluating_func=lambda net: zoo.evaluate(net, data.test))
