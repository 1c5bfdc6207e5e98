"""Models by name: ``create_model("resnet20", num_classes=10, in_channels=1, image_size=28)``.

Three kinds of names: the built-in nets (:func:`list_models`), ``torchvision/NAME`` for torchvision's
classification models, and ``package.module:factory`` for a function of one's own. All built-in nets can be
traced by ``torch.fx``.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from nni_topo.errors import ConfigError, unknown_name
from nni_topo.zoo.external import TORCHVISION, build_from_factory, build_torchvision, torchvision_names
from nni_topo.zoo.resnet import resnet18, resnet20, resnet56
from nni_topo.zoo.small import cnn12, lenet5, lenet5_like, lenet300, mnist_cnn, mnist_fcn, small_cnn
from nni_topo.zoo.vgg import vgg11, vgg11_unpooled, vgg16, vgg16_modified

Builder = Callable[[int, int, int, float], nn.Module]


@dataclass(frozen=True)
class ModelInfo:
    """What is known about a model before it is built.

    Attributes
    ----------
    name : str
        Name that :func:`create_model` takes.
    description : str
        One line about the net.
    image_size : int
        Side in pixels of the images it was designed for.
    pad_to : int or None
        Side to which smaller images should be padded before they are fed to the net; None where any will do.
    min_image_size : int
        Smallest side in pixels that leaves at least one position after the last pooling.
    scalable : bool
        Whether ``width`` may differ from 1.
    paper : str
        Where the net comes from, a link; empty for nets of this package and of the user.
    """

    name: str
    description: str
    image_size: int
    pad_to: int | None = None
    min_image_size: int = 1
    scalable: bool = False
    paper: str = ""


_LENET = "https://doi.org/10.1109/5.726791"
_VGG = "https://arxiv.org/abs/1409.1556"
_VGG_MODIFIED = "https://doi.org/10.1109/ACPR.2015.7486599"
_RESNET = "https://arxiv.org/abs/1512.03385"
_SYNFLOW = "https://arxiv.org/abs/2006.05467"

_INFOS = (
    ModelInfo("lenet300", "MLP with hidden layers of 300 and 100 neurons", image_size=28, paper=_LENET),
    ModelInfo("lenet5", "conv 6, conv 16, hidden 84", image_size=32, pad_to=32, min_image_size=16, paper=_LENET),
    ModelInfo("lenet5_like", "conv 32, conv 64, hidden 1024", image_size=28, min_image_size=4, paper=_LENET),
    ModelInfo("mnist_fcn", "MLP with five hidden layers of 100 neurons", image_size=28, paper=_SYNFLOW),
    ModelInfo("mnist_cnn", "conv 32, conv 32, one linear layer, no pooling", image_size=28, paper=_SYNFLOW),
    ModelInfo("small_cnn", "conv 16, 32, 64, hidden 64, batch norm", image_size=8, min_image_size=4),
    ModelInfo("cnn12", "4 convolutions, 3 hidden layers", image_size=32, pad_to=32, min_image_size=16),
    ModelInfo(
        "vgg11",
        "8 convolutions with batch norm, two hidden layers of 1024",
        image_size=64,
        pad_to=32,
        min_image_size=32,
        scalable=True,
        paper=_VGG,
    ),
    ModelInfo(
        "vgg11_unpooled",
        "8 convolutions with batch norm, all at full resolution",
        image_size=32,
        scalable=True,
        paper=_VGG,
    ),
    ModelInfo(
        "vgg16",
        "13 convolutions with batch norm, one linear layer",
        image_size=32,
        pad_to=32,
        min_image_size=32,
        scalable=True,
        paper=_VGG,
    ),
    ModelInfo(
        "vgg16_modified",
        "13 convolutions with batch norm, hidden 512",
        image_size=32,
        pad_to=32,
        min_image_size=32,
        scalable=True,
        paper=_VGG_MODIFIED,
    ),
    ModelInfo("resnet18", "18 layers, 3x3 stem, 1x1 convolution shortcuts", 64, scalable=True, paper=_RESNET),
    ModelInfo("resnet20", "20 layers, 1x1 convolution shortcuts", image_size=32, scalable=True, paper=_RESNET),
    ModelInfo("resnet56", "56 layers, 1x1 convolution shortcuts", image_size=32, scalable=True, paper=_RESNET),
)
_MODELS = {info.name: info for info in _INFOS}
_BUILDERS: dict[str, Builder] = {
    "lenet300": lenet300,
    "lenet5": lenet5,
    "lenet5_like": lenet5_like,
    "mnist_fcn": mnist_fcn,
    "mnist_cnn": mnist_cnn,
    "small_cnn": small_cnn,
    "cnn12": cnn12,
    "vgg11": vgg11,
    "vgg11_unpooled": vgg11_unpooled,
    "vgg16": vgg16,
    "vgg16_modified": vgg16_modified,
    "resnet18": resnet18,
    "resnet20": resnet20,
    "resnet56": resnet56,
}


def list_models(pattern: str = "*") -> list[str]:
    """Return the names of the models that can be built, sorted.

    Parameters
    ----------
    pattern : str, default="*"
        Shell pattern. torchvision's models are listed where the pattern begins with ``torchvision/``.

    Returns
    -------
    list of str

    Examples
    --------
    >>> list_models("lenet*")
    ['lenet300', 'lenet5', 'lenet5_like']
    """
    names = torchvision_names() if pattern.startswith(TORCHVISION) else list(_MODELS)
    return sorted(fnmatch.filter(names, pattern))


def model_info(name: str) -> ModelInfo:
    """Return the record of a model; for models from outside, one with the little that is known.

    Parameters
    ----------
    name : str
        Built-in name, ``torchvision/NAME`` or ``package.module:factory``.

    Returns
    -------
    ModelInfo

    Raises
    ------
    ConfigError
        If the name is none of these.
    """
    if name in _MODELS:
        return _MODELS[name]
    if name.startswith(TORCHVISION):
        if name not in torchvision_names():
            raise unknown_name("model", name, torchvision_names())
        return ModelInfo(name, "torchvision classification model, untrained", 224)
    if ":" in name:
        return ModelInfo(name, "model factory", 32, scalable=True)
    raise unknown_name("model", name, [*_MODELS, "torchvision/NAME", "package.module:factory"])


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
        One of :func:`list_models`, ``torchvision/NAME`` (built with ``weights=None``), or
        ``package.module:factory``, which is called with those of the keyword arguments below that it accepts.
    num_classes : int
        Number of logits, at least 1.
    in_channels : int
        Channels of the images, at least 1.
    image_size : int
        Side of the images in pixels, at least the model's ``min_image_size``.
    width : float, default=1.0
        Factor on the channels of VGGs and ResNets, positive.
    seed : int or None, default=None
        Seed of the initial weights; torch's global generator stays as it was. None draws from the global
        generator.

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
    info = model_info(name)
    _check_arguments(info, num_classes, in_channels, image_size, width)
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        return _build(name, num_classes, in_channels, image_size, width)


def _build(name: str, num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    if name in _BUILDERS:
        return _BUILDERS[name](num_classes, in_channels, image_size, width)
    if name.startswith(TORCHVISION):
        return build_torchvision(name, num_classes, in_channels, image_size)
    arguments = {
        "num_classes": num_classes,
        "in_channels": in_channels,
        "image_size": image_size,
        "width": width,
    }
    return build_from_factory(name, arguments)


def _check_arguments(info: ModelInfo, num_classes: int, in_channels: int, image_size: int, width: float) -> None:
    for knob, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if value < 1:
            raise ConfigError(f"{knob} must be at least 1, got {value} ({info.name})")
    if image_size < info.min_image_size:
        raise ConfigError(
            f"image_size must be at least {info.min_image_size}, got {image_size} ({info.name}); "
            "load_data(pad_to=...) pads small images"
        )
    if not width > 0:
        raise ConfigError(f"width must be positive, got {width} ({info.name})")
    if width != 1.0 and not info.scalable:
        raise ConfigError(f"width must be 1.0 for a model of fixed width, got {width} ({info.name})")
