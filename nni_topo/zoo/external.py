"""Models from other packages: torchvision's and timm's classification nets, and factories that a user names."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from nni_topo.errors import ConfigError, unknown_name
from nni_topo.registry import imported
from nni_topo.zoo.labelled import Preprocessing

TORCHVISION = "torchvision/"
TIMM = "timm/"

_NO_AUXILIARIES = {"aux_logits": False, "init_weights": True}
_EXTRA_ARGUMENTS: dict[str, dict[str, Any]] = {"googlenet": _NO_AUXILIARIES, "inception_v3": _NO_AUXILIARIES}


def torchvision_names() -> list[str]:
    """Return the names ``torchvision/NAME`` of torchvision's classification models, sorted."""
    from torchvision import models  # slow to import

    return [TORCHVISION + name for name in models.list_models(module=models)]


def pretrained_preprocessing(name: str) -> Preprocessing | None:
    """Return the preprocessing of images for a model's default pretrained weights; None if it has no weights."""
    if name.startswith(TORCHVISION):
        from torchvision import models  # slow to import

        weights = list(models.get_model_weights(name.removeprefix(TORCHVISION)))
        if not weights:
            return None
        transforms = models.get_model_weights(name.removeprefix(TORCHVISION)).DEFAULT.transforms()
        crop = transforms.crop_size[0] / transforms.resize_size[0]
        return Preprocessing(tuple(transforms.mean), tuple(transforms.std), crop, transforms.interpolation.value)
    if name.startswith(TIMM):
        try:
            timm: Any = importlib.import_module("timm")
        except ImportError:  # building the model raises an error about it
            return None
        config = timm.get_pretrained_cfg(name.removeprefix(TIMM))
        return config and Preprocessing(tuple(config.mean), tuple(config.std), config.crop_pct, config.interpolation)
    return None


def build_torchvision(name: str, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """Build ``torchvision/NAME``, untrained and without auxiliary classifiers.

    ConfigError if ``in_channels`` isn't 3 and the model has no first convolution that can be replaced.
    """
    from torchvision import models  # slow to import

    short = name.removeprefix(TORCHVISION)
    arguments = dict(_EXTRA_ARGUMENTS.get(short, {}))
    # Vision transformers need the side of the images, in pixels.
    if short.startswith("vit_"):
        arguments["image_size"] = image_size
    model: nn.Module = models.get_model(short, weights=None, num_classes=num_classes, **arguments)
    if in_channels != 3:
        layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
        first = next((layer for layer in layers if layer.in_channels == 3 and layer.groups == 1), None)
        if first is None:
            raise ConfigError(
                f"in_channels must be 3 if the model has no first convolution to replace, got {in_channels} ({name})"
            )
        first.in_channels = in_channels
        first.weight = nn.Parameter(first.weight.new_empty(first.out_channels, in_channels, *first.kernel_size))
        first.reset_parameters()
    return model


def build_timm(name: str, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """Build ``timm/NAME``, untrained; ConfigError if timm isn't installed or has no such model."""
    try:
        timm: Any = importlib.import_module("timm")
    except ImportError as error:
        raise ConfigError(f"timm must be installed: pip install timm, got none ({name})") from error
    short = name.removeprefix(TIMM)
    if short not in timm.list_models():
        raise unknown_name("model", name, [TIMM + timm_name for timm_name in timm.list_models()], "zoo.create_model")
    model: nn.Module
    try:
        model = timm.create_model(short, num_classes=num_classes, in_chans=in_channels, img_size=image_size)
    except TypeError:  # convolutional networks take any size and no img_size
        model = timm.create_model(short, num_classes=num_classes, in_chans=in_channels)
    return model


def accepted(function: Callable[..., object], arguments: dict[str, Any]) -> dict[str, Any]:
    """Return those of the arguments that a function accepts by name."""
    parameters = inspect.signature(function).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return {key: value for key, value in arguments.items() if takes_all or key in parameters}


def import_factory(name: str) -> Callable[..., nn.Module]:
    """Import ``package.module:factory`` or ``file.py:factory``; ConfigError if it can't be imported or called.

    The name may also be that of a model, which is then returned by the factory.
    """
    factory = imported(name, "a model factory must be a function")
    if isinstance(factory, nn.Module):
        return lambda: factory
    if not callable(factory):
        raise ConfigError(f"a model factory must be callable, got {type(factory).__name__} ({name})")
    return factory  # type: ignore[no-any-return]
