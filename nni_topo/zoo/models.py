"""Models by name, and the recipes that train them. To add a net, write a function and add a row to the table."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from nni_topo.errors import ConfigError, unknown_name
from nni_topo.rules import checked, number, whole
from nni_topo.zoo.data import check_data_name, holds_photographs
from nni_topo.zoo.external import (
    TIMM,
    TORCHVISION,
    accepted,
    build_timm,
    build_torchvision,
    import_factory,
    torchvision_names,
)
from nni_topo.zoo.recipes import Optimizer, Recipe
from nni_topo.zoo.resnet import resnet18, resnet20, resnet56
from nni_topo.zoo.small import cnn12, lenet5, lenet5_like, lenet300, mnist_cnn, mnist_fcn, small_cnn
from nni_topo.zoo.transformers import bert_small, gpt_small, vit_small
from nni_topo.zoo.vgg import vgg11, vgg11_unpooled, vgg16, vgg16_modified


@dataclass(frozen=True)
class ModelInfo:
    """Facts about a model before it is built."""

    build: Callable[..., nn.Module]  # gets the arguments that it accepts: num_classes, in_channels, image_size, width
    epochs: int = 10
    lr: float = 0.05  # highest learning rate
    pad_to: int | None = None  # side in pixels to which smaller images should be padded
    min_image_size: int = 1  # smallest side in pixels with at least one position after the last pooling
    optimizer: Optimizer = "sgd"


_MODELS = {
    "lenet300": ModelInfo(lenet300, epochs=8),
    "lenet5": ModelInfo(lenet5, epochs=8, pad_to=32, min_image_size=16),
    "lenet5_like": ModelInfo(lenet5_like, epochs=5, min_image_size=4),
    "mnist_fcn": ModelInfo(mnist_fcn, epochs=8),
    "mnist_cnn": ModelInfo(mnist_cnn, epochs=5),
    "small_cnn": ModelInfo(small_cnn, lr=0.1, min_image_size=4),
    "cnn12": ModelInfo(cnn12, pad_to=32, min_image_size=16),
    "vgg11": ModelInfo(vgg11, pad_to=32, min_image_size=32),
    "vgg11_unpooled": ModelInfo(vgg11_unpooled),
    "vgg16": ModelInfo(vgg16, lr=0.1, pad_to=32, min_image_size=32),
    "vgg16_modified": ModelInfo(vgg16_modified, lr=0.1, pad_to=32, min_image_size=32),
    "resnet18": ModelInfo(resnet18),
    "resnet20": ModelInfo(resnet20, epochs=3, lr=0.2),
    "resnet56": ModelInfo(resnet56, epochs=5, lr=0.2),
    "vit_small": ModelInfo(vit_small, epochs=8, lr=2e-3, pad_to=28, min_image_size=4, optimizer="adamw"),
    "bert_small": ModelInfo(bert_small, epochs=8, lr=2e-3, pad_to=28, min_image_size=4, optimizer="adamw"),
    "gpt_small": ModelInfo(gpt_small, epochs=2, lr=2e-3, optimizer="adamw"),
}


@checked()
def list_models(pattern: str = "*") -> list[str]:
    """Return the names of the models that match a shell pattern, sorted.

    torchvision's models are listed if the pattern begins with ``torchvision/``.

    Examples
    --------
    >>> list_models("lenet*")
    ['lenet300', 'lenet5', 'lenet5_like']
    """
    names = torchvision_names() if pattern.startswith(TORCHVISION) else list(_MODELS)
    return sorted(fnmatch.filter(names, pattern))


def model_info(name: str, place: str = "model") -> ModelInfo:
    """Return the facts about a model; ``place``: the function that got the name, for the error message."""
    if name in _MODELS:
        return _MODELS[name]
    if name.startswith(TORCHVISION):
        if name not in torchvision_names():
            raise unknown_name("model", name, torchvision_names(), place)
        return ModelInfo(partial(build_torchvision, name))
    if name.startswith(TIMM):
        return ModelInfo(partial(build_timm, name))
    if ":" in name:
        return ModelInfo(import_factory(name))
    names = [*_MODELS, "torchvision/NAME", "timm/NAME", "package.module:factory"]
    raise unknown_name("model", name, names, place)


@checked(num_classes=whole(1), in_channels=whole(1), width=number(0, closed="neither"))
def create_model(
    name: str,
    *,
    num_classes: int,
    in_channels: int,
    image_size: int,
    width: float = 1.0,
    seed: int | None = None,
) -> nn.Module:
    """Build an untrained model.

    Parameters
    ----------
    name : str
        One of :func:`list_models`, ``torchvision/NAME`` or ``timm/NAME`` (without weights), or
        ``package.module:factory``, which is called with the keyword arguments below that it accepts.
    num_classes : int
        Number of logits, at least 1.
    in_channels : int
        Channels of the images, at least 1.
    image_size : int
        Side of the images in pixels, at least the model's ``min_image_size``.
    width : float, default=1.0
        Factor on the channels of VGGs and ResNets, positive.
    seed : int or None, default=None
        Seed of the initial weights; torch's global generator isn't changed. None: the global generator is used.

    Returns
    -------
    nn.Module
        In training mode, on the CPU, in float32.

    Raises
    ------
    ConfigError
        If the name is unknown, a number is out of its range, or the model takes no ``width``.

    Examples
    --------
    >>> model = create_model("lenet300", num_classes=10, in_channels=1, image_size=28, seed=0)
    >>> sum(parameter.numel() for parameter in model.parameters())
    266610
    """
    info = model_info(name, "zoo.create_model")
    if image_size < info.min_image_size:
        raise ConfigError(
            f"image_size must be at least {info.min_image_size}, got {image_size} ({name}); "
            "load_data(pad_to=...) pads small images"
        )
    if width != 1.0 and not accepted(info.build, {"width": width}):
        raise ConfigError(f"width must be 1.0 for a model that takes no width, got {width} ({name})")
    arguments = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size, "width": width}
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        model = info.build(**accepted(info.build, arguments))
    if not isinstance(model, nn.Module):
        raise ConfigError(f"a model factory must return an nn.Module, got {type(model).__name__} ({name})")
    return model


@checked()
def default_recipe(model_name: str, data_name: str) -> Recipe:
    """Return the recipe that the benchmarks use for a net on a data set.

    Parameters
    ----------
    model_name : str
        As for :func:`create_model`; nets that aren't in :func:`list_models` get a common recipe.
    data_name : str
        As for :func:`~nni_topo.zoo.load_data`. Digits get 25 epochs of small batches, because the data set is small;
        photographs get crops, flips and four times the epochs.

    Returns
    -------
    Recipe
    """
    model = _MODELS.get(model_name, ModelInfo)
    decay = Recipe.weight_decay if model.optimizer == "sgd" else 0.05
    recipe = Recipe(model.epochs, lr=model.lr, weight_decay=decay, optimizer=model.optimizer)
    check_data_name(data_name, "zoo.default_recipe")
    if data_name == "digits":
        return replace(recipe, epochs=25, batch_size=32, lr=recipe.lr / 2.0)
    if holds_photographs(data_name):
        return replace(recipe, epochs=4 * recipe.epochs, augmentation="crop-flip")
    return recipe
