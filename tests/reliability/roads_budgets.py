"""Budgets that can be met and budgets that can't, on published architectures with layers that mustn't lose channels.

Multiply-accumulates are counted by hand. A budget out of reach leaves every pruned layer an eighth of its channels, or
of a small budget as few as the budget allows, and of sixteen never one. The report says which budget can be met.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from functools import partial

import torch
from reliability.networks import BasicBlock
from reliability.oracle import WrongError
from reliability.roads import Road
from reliability.serving import UnsaidError, unchanged
from torch import Tensor, nn

import nni_topo


def vgg() -> nn.Module:
    """VGG of five convolutions; of these the first three are 128, 64 and 64 wide."""
    widths, layers = [3, 128, 64, 64, 128, 128], list[nn.Module]()
    for entered, left in itertools.pairwise(widths):
        layers += [nn.Conv2d(entered, left, 3, padding=1), nn.BatchNorm2d(left), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


def resnet() -> nn.Module:
    """ResNet-8 of CIFAR, 16, 32 and 64 wide."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        BasicBlock(16, 16, 1),
        BasicBlock(16, 32, 2),
        BasicBlock(32, 64, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def macs(net: nn.Module, image: Tensor) -> int:
    """Count by hand the multiply-accumulates of the convolutions and linear layers for one image."""
    found = 0

    def count(layer: nn.Module, entered: tuple[Tensor, ...], left: Tensor) -> None:
        nonlocal found
        weight = layer.get_parameter("weight")
        if isinstance(layer, nn.Linear):
            found += left.numel() * weight.shape[1]
        else:
            found += weight.numel() * left[0, 0].numel()

    layers = [layer for layer in net.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    handles = [layer.register_forward_hook(count) for layer in layers]
    with torch.no_grad():
        net.eval()(image)
    for handle in handles:
        handle.remove()
    return found


def width(layer: nn.Module) -> int:
    """Return the number of a layer's output channels."""
    return layer.get_parameter("weight").shape[0]


def smaller(
    make: Callable[[], nn.Module], pruner: str, budget: dict[str, float | str], layers: list[str] | None
) -> tuple[nn.Module, float]:
    """Make a network smaller; return it with the share of its multiply-accumulates that is left, counted by hand."""
    torch.manual_seed(0)
    model, images = make().eval(), torch.randn(16, 3, 16, 16)
    with unchanged(model, "shrink"):
        small = nni_topo.shrink(
            model, [images], budget, pruner=pruner, layers=layers, compensate=None, distill=False, progress=False
        )
    left = macs(small, images[:1]) / macs(model, images[:1])
    if abs(left - small.report.budget.left) > 1e-6:
        raise WrongError(f"{left:.4g} of the MACs are left, the report says {small.report.budget.left:.4g}")
    for row in small.report.layers.rows:
        if row.after != width(small.get_submodule(row.name)):
            raise WrongError(f"{row.name} has {width(small.get_submodule(row.name))} channels, said {row.after}")
    if len(small(torch.randn(3, 3, 16, 16))) != 3:
        raise WrongError("another number of images isn't taken")
    return small, left


def require_widths(small: nn.Module, least: float) -> None:
    """Raise unless every layer keeps a share of its channels, and of sixteen at least two."""
    for row in small.report.layers.rows:
        if row.after < max(math.ceil(least * row.before), 2 if row.before >= 16 else 1):
            raise WrongError(f"{row.name} keeps {row.after} of {row.before} channels")


def check(
    make: Callable[[], nn.Module],
    pruner: str,
    allocation: str,
    share: float,
    least: float,
    layers: list[str] | None = None,
    *,
    is_met: bool = True,
) -> None:
    """Ask for a share of the multiply-accumulates; if it is out of reach, then for the one that can be met."""
    small, left = smaller(make, pruner, {"flops": share, "allocation": allocation}, layers)
    if is_met:
        if not small.report.budget.is_met or abs(left - share) > min(0.01, 0.1 * share):
            raise WrongError(f"{left:.4g} is left of the MACs instead of {share:g}: {small.report.budget}")
    else:
        require_widths(small, least)
        told = re.search(r"a budget of (\S+) can be met", str(small.report.budget))
        if small.report.budget.is_met or told is None:
            raise UnsaidError(f"{left:.4g} is left of the MACs instead of {share:g}: {small.report.budget}")
        check(make, pruner, allocation, float(told[1]), least, layers)
    if allocation == "uniform":
        require_widths(small, least)


FIRST = ["0", "3", "6"]  # of VGG: 128, 64 and 64 channels
EIGHTH = 1 / 8
ROADS = [
    Road("budgets", f"{name}: {'within' if is_met else 'out of'} reach", partial(check, *rest, is_met=is_met))
    for is_met, name, *rest in (
        (True, "VGG, three layers", vgg, "l1", "uniform", 0.75, EIGHTH, FIRST),
        (True, "ResNet-8", resnet, "l1", "uniform", 0.05, EIGHTH),
        (True, "ResNet-8 by error", resnet, "reconstruction", "error", 0.1, 0.0),
        (False, "VGG, three layers", vgg, "l1", "uniform", 0.4, EIGHTH, FIRST),
        (False, "VGG, three layers, by error", vgg, "reconstruction", "error", 0.4, EIGHTH, FIRST),
        (False, "ResNet-8", resnet, "random", "uniform", 0.005, 0.0),
    )
]
