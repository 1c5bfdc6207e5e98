"""How a net is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from nni_topo.network.runtime.precision import Precision
from nni_topo.rules import check_fields, number, whole

LearningRateSchedule = Literal["constant", "cosine", "one-cycle"]
Augmentation = Literal["none", "crop", "crop-flip"]
Optimizer = Literal["sgd", "adamw"]

_WARMUP = 0.3


@dataclass(frozen=True)
class Recipe:
    """Stochastic gradient descent with Nesterov momentum, or AdamW, with its schedule and augmentation.

    Attributes
    ----------
    epochs : int
        Passes over the training images, at least 0.
    batch_size : int, default=128
        At least 1. An epoch is cut into equal batches of at most this size.
    lr : float, default=0.05
        Highest learning rate, positive.
    momentum : float, default=0.9
        In [0, 1).
    weight_decay : float, default=5e-4
        L2 penalty on all parameters, at least 0.
    schedule : {"constant", "cosine", "one-cycle"}, default="one-cycle"
        ``constant``: always ``lr``. ``cosine``: from ``lr`` to 0 along half a cosine. ``one-cycle``: linearly from
        ``lr / 25`` up to ``lr`` over the first 30 % of the steps, then down to 0 along half a cosine [1]_.
    augmentation : {"none", "crop", "crop-flip"}, default="none"
        ``crop``: shifts by up to an eighth of the side, filled with black (stored value 0). ``flip``: mirrors left
        and right at random.
    precision : {"float32", "bfloat16"}, default="float32"
        ``bfloat16`` computes the training steps under :class:`torch.autocast`; parameters stay float32. On a CPU only
        linear layers use it: convolutions stay in float32. Faster for transformers on processors with bfloat16
        instructions, slower on others.
    optimizer : {"sgd", "adamw"}, default="sgd"
        ``adamw``, for transformers, uses ``momentum`` as its first beta and 0.99 as the second; its ``weight_decay`` is
        decoupled from the loss.

    Raises
    ------
    ConfigError
        If a value is out of its range.

    References
    ----------
    .. [1] L. N. Smith and N. Topin, "Super-convergence: very fast training of neural networks using large
       learning rates", https://arxiv.org/abs/1708.07120
    """

    epochs: int
    batch_size: int = 128
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: LearningRateSchedule = "one-cycle"
    augmentation: Augmentation = "none"
    precision: Precision = "float32"
    optimizer: Optimizer = "sgd"

    def __post_init__(self) -> None:
        check_fields(
            self,
            epochs=whole(0),
            batch_size=whole(1),
            lr=number(0, closed="neither"),
            momentum=number(0, 1, "left"),
            weight_decay=number(0),
        )

    def optimizing(self) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        """Return the optimizer's class and its arguments besides the parameters."""
        knobs: dict[str, Any] = {"lr": self.lr, "weight_decay": self.weight_decay}
        if self.optimizer == "adamw":
            return torch.optim.AdamW, {**knobs, "betas": (self.momentum, 0.99)}
        return torch.optim.SGD, {**knobs, "momentum": self.momentum, "nesterov": self.momentum > 0}

    def rate(self, progress: float) -> float:
        """Return the learning rate after a fraction of all steps; ``progress`` in [0, 1]."""
        if self.schedule == "constant":
            return self.lr
        if self.schedule == "cosine":
            return self.lr * (1.0 + math.cos(math.pi * progress)) / 2.0
        if progress < _WARMUP:
            return self.lr * (1.0 + 24.0 * progress / _WARMUP) / 25.0
        return self.lr * (1.0 + math.cos(math.pi * (progress - _WARMUP) / (1.0 - _WARMUP))) / 2.0

    def for_retraining(self, epochs: int) -> Recipe:
        """Return the recipe for fine-tuning a trained net: ``epochs`` epochs, a fifth of ``lr``, cosine."""
        return replace(self, epochs=epochs, lr=self.lr / 5.0, schedule="cosine")
