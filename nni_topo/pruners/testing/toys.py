"""A small network with a residual connection, data for it, and an NNI evaluator that trains it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import nni
import torch
from nni.compression import TorchEvaluator
from torch import Tensor, nn

from nni_topo.network.runtime.arguments import MODEL
from nni_topo.rules import checked, whole


class ToyModel(nn.Module):
    """Two convolutions coupled by a residual addition, then a linear layer and a head; 3x8x8 images, four classes."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.inner = nn.Conv2d(channels, channels, 3, padding=1)
        self.hidden = nn.Linear(channels, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(n, 3, 8, 8)`` to logits ``(n, 4)``."""
        features = torch.relu(self.norm(self.stem(images)))
        features = torch.relu(self.inner(features) + features)
        logits: Tensor = self.head(torch.relu(self.hidden(features.mean((2, 3)))))
        return logits


@checked()
def toy_model(seed: int = 0) -> ToyModel:
    """Return the toy network with seeded weights, the global generator left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return ToyModel()


@checked(count=whole(0))
def toy_images(count: int = 32, seed: int = 0) -> Tensor:
    """Return seeded normal images, shape ``(count, 3, 8, 8)``."""
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@checked(model=MODEL, batch_size=whole(1))
def toy_evaluator(model: nn.Module, *, batch_size: int = 4) -> TorchEvaluator:
    """Return an NNI evaluator that trains an unwrapped toy network on 32 random images, with labels 0 to 3 in turn.

    It trains on the network's device, on ``batch_size`` images a step, and evaluates on the same images.
    """
    device = next(model.parameters()).device
    images = toy_images().to(device)
    labels = torch.arange(len(images), device=device) % 4

    def train(
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        step: Callable[..., Tensor],
        scheduler: Any,
        max_steps: int | None,
        max_epochs: int | None,
    ) -> None:
        batches = len(images) // batch_size
        model.train()
        for index in range(max_steps if max_steps is not None else (max_epochs or 1) * batches):
            rows = slice(index % batches * batch_size, (index % batches + 1) * batch_size)
            optimizer.zero_grad()
            step((images[rows], labels[rows]), model).backward()
            optimizer.step()

    def training_step(batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def evaluate(model: nn.Module) -> float:
        return float((model(images).argmax(1) == labels).float().mean())

    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.01)
    return TorchEvaluator(train, optimizer, training_step, evaluating_func=evaluate)


@checked()
def toy_knobs(knobs: Iterable[str], needs: Iterable[str] = ()) -> dict[str, Any]:
    """Return values that fit the toy network, for a pruner's knobs that depend on the model.

    ``knobs`` and ``needs`` come from its :class:`nni_topo.PrunerInfo`; calibration data are given only if needed.
    """
    # With one initial cluster and a high threshold, the ratio, which is a cap, says how many neurons are kept.
    values: dict[str, Any] = {"energy": 0.99, "growth": {"initial_ratio": 0.1}}
    values |= {"example_inputs": toy_images(2)}
    if any("calibration" in need for need in needs):
        values["calibration"] = [toy_images()]
    return {knob: values[knob] for knob in knobs if knob in values}
