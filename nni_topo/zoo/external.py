"""Models from outside: torchvision's classification nets and factories that a user names."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import nn

from nni_topo.errors import ConfigError, unknown_name

TORCHVISION = "torchvision/"

_EXTRA_ARGUMENTS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}


def torchvision_names() -> list[str]:
    """Return the names ``torchvision/NAME`` of torchvision's classification models, sorted."""
    models = _torchvision()
    return [TORCHVISION + name for name in models.list_models(module=models)]


def build_torchvision(name: str, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """Build ``torchvision/NAME``, untrained and without auxiliary classifiers; ConfigError if that can't be."""
    if name not in torchvision_names():
        raise unknown_name("model", name, torchvision_names())
    short = name.removeprefix(TORCHVISION)
    arguments = dict(_EXTRA_ARGUMENTS.get(short, {}))
    # Vision transformers have to know the side of the images, in pixels.
    if short.startswith("vit_"):
        arguments["image_size"] = image_size
    model: nn.Module = _torchvision().get_model(short, weights=None, num_classes=num_classes, **arguments)
    if in_channels != 3:
        _replace_first_conv(model, in_channels, name)
    return model


def build_from_factory(name: str, arguments: dict[str, Any]) -> nn.Module:
    """Import ``package.module:factory`` and call it with those of ``arguments`` that it accepts; else ConfigError."""
    factory = _import_factory(name)
    parameters = inspect.signature(factory).parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    # Offered are num_classes, in_channels, image_size and width; a width other than 1 has to be taken.
    accepted = {key: value for key, value in arguments.items() if takes_all or key in parameters}
    if arguments.get("width", 1.0) != 1.0 and "width" not in accepted:
        raise ConfigError(f"width must be 1.0 where the factory takes no width, got {arguments['width']} ({name})")
    model = factory(**accepted)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"a model factory must return an nn.Module, got {type(model).__name__} ({name})")
    return model


def _torchvision() -> ModuleType:
    """torchvision.models, imported when it is first asked for: it is optional and slow to import."""
    try:
        return importlib.import_module("torchvision.models")
    except ImportError as error:
        raise ConfigError(f"torchvision must be installed for models under {TORCHVISION!r}, got: {error}") from error


def _replace_first_conv(model: nn.Module, in_channels: int, name: str) -> None:
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d) and layer.in_channels == 3 and layer.groups == 1:
            parent, _, attribute = path.rpartition(".")
            setattr(model.get_submodule(parent), attribute, _with_inputs(layer, in_channels))
            return
    raise ConfigError(f"in_channels must be 3 where no first convolution can be replaced, got {in_channels} ({name})")


def _with_inputs(layer: nn.Conv2d, in_channels: int) -> nn.Conv2d:
    """Make a fresh convolution like ``layer``, for another number of input channels."""
    return nn.Conv2d(
        in_channels,
        layer.out_channels,
        layer.kernel_size,  # type: ignore[arg-type]
        stride=layer.stride,  # type: ignore[arg-type]
        padding=layer.padding,  # type: ignore[arg-type]
        dilation=layer.dilation,  # type: ignore[arg-type]
        bias=layer.bias is not None,
    )


def _import_factory(name: str) -> Callable[..., object]:
    module_name, _, path = name.partition(":")
    try:
        found: object = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"a model factory's module must be importable, got {error} ({name})") from error
    for part in path.split("."):
        try:
            found = getattr(found, part)
        except AttributeError as error:
            raise ConfigError(f"a model factory must exist in its module, got {error} ({name})") from error
    if not callable(found):
        raise ConfigError(f"a model factory must be callable, got {type(found).__name__} ({name})")
    return found
