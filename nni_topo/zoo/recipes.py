"""How a net is trained: frozen recipes, and which one goes with which net and data."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

from nni_topo.errors import ConfigError

Schedule = Literal["cosine", "one-cycle"]
Augmentation = Literal["none", "crop", "crop-flip"]
Precision = Literal["float32", "bfloat16"]

_WARMUP = 0.3


@dataclass(frozen=True)
class Recipe:
    """Stochastic gradient descent with Nesterov momentum, and everything that shapes it.

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
    schedule : {"cosine", "one-cycle"}, default="one-cycle"
        ``cosine``: from ``lr`` to 0 along half a cosine. ``one-cycle``: linearly from ``lr / 25`` up to
        ``lr`` over the first 30 % of the steps, then down to 0 along half a cosine [1]_.
    augmentation : {"none", "crop", "crop-flip"}, default="none"
        ``crop``: shifts by up to an eighth of the side, black (stored value 0) behind. ``flip``: mirrors left
        and right at random.
    label_smoothing : float, default=0.0
        In [0, 1).
    precision : {"float32", "bfloat16"}, default="float32"
        ``bfloat16`` computes convolutions and linear layers of the training steps in bfloat16; parameters
        stay float32. Twice as fast on processors with bfloat16 instructions, many times slower on others.

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
    schedule: Schedule = "one-cycle"
    augmentation: Augmentation = "none"
    label_smoothing: float = 0.0
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        for knob, least in (("epochs", 0), ("batch_size", 1), ("weight_decay", 0)):
            if not getattr(self, knob) >= least:
                raise ConfigError(f"{knob} must be at least {least}, got {getattr(self, knob)} (Recipe)")
        for knob in ("momentum", "label_smoothing"):
            if not 0.0 <= getattr(self, knob) < 1.0:
                raise ConfigError(f"{knob} must be in [0, 1), got {getattr(self, knob)} (Recipe)")
        if not 0.0 < self.lr < math.inf:
            raise ConfigError(f"lr must be positive and finite, got {self.lr} (Recipe)")
        for knob, kind in (("schedule", Schedule), ("augmentation", Augmentation), ("precision", Precision)):
            if getattr(self, knob) not in get_args(kind):
                known = ", ".join(get_args(kind))
                raise ConfigError(f"{knob} must be one of {known}, got {getattr(self, knob)!r} (Recipe)")

    def rate(self, progress: float) -> float:
        """Return the learning rate after a fraction ``progress`` in [0, 1] of all steps."""
        if self.schedule == "cosine":
            return self.lr * (1.0 + math.cos(math.pi * progress)) / 2.0
        if progress < _WARMUP:
            return self.lr * (1.0 + 24.0 * progress / _WARMUP) / 25.0
        return self.lr * (1.0 + math.cos(math.pi * (progress - _WARMUP) / (1.0 - _WARMUP))) / 2.0

    def for_retraining(self, epochs: int) -> Recipe:
        """Return the recipe for a net already trained: ``epochs`` epochs, a fifth of ``lr``, cosine."""
        return replace(self, epochs=epochs, lr=self.lr / 5.0, schedule="cosine")


_DEFAULT = Recipe(epochs=10)
_RECIPES: dict[str, Recipe] = {
    "lenet300": Recipe(epochs=8),
    "lenet5": Recipe(epochs=8),
    "lenet5_like": Recipe(epochs=5),
    "mnist_fcn": Recipe(epochs=8),
    "mnist_cnn": Recipe(epochs=5),
    "small_cnn": Recipe(epochs=10, lr=0.1),
    "vgg16": Recipe(epochs=10, lr=0.1),
    "vgg16_modified": Recipe(epochs=10, lr=0.1),
    "cnn12": Recipe(epochs=10),
    "resnet20": Recipe(epochs=3, lr=0.2),
    "resnet56": Recipe(epochs=5, lr=0.2),
}


def default_recipe(model_name: str, data_name: str) -> Recipe:
    """Return the recipe that the benchmarks use for a net on a data set.

    Parameters
    ----------
    model_name : str
        As :func:`~nni_topo.zoo.models.create_model` takes it; nets without a recipe of their own get a common
        one.
    data_name : str
        As :func:`~nni_topo.zoo.data.load_data` takes it. Digits are few, so they get 25 epochs of small
        batches; CIFAR gets crops, flips and four times the epochs.

    Returns
    -------
    Recipe

    Notes
    -----
    Measured with seed 0 on one core of a processor with AVX-512 and bfloat16 instructions, test accuracy:
    ``lenet5_like`` on Fashion-MNIST 92.0 % after 261 s; ``resnet20`` there 92.4 % after 412 s, in bfloat16
    92.0 % after 247 s; ``small_cnn`` on digits 98.9 % after 4 s.
    """
    recipe = _RECIPES.get(model_name, _DEFAULT)
    if data_name == "digits":
        return replace(recipe, epochs=25, batch_size=32, lr=recipe.lr / 2.0)
    if data_name in ("cifar10", "cifar100"):
        return replace(recipe, epochs=4 * recipe.epochs, augmentation="crop-flip")
    return recipe
