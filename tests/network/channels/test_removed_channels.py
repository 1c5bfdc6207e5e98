"""Networks in the way that people write them: the channels that they lose, and the dense network beside the masked one.

Each network is pruned to half of its channels by their norms. A table says which layers lose channels, and how many
they keep. The dense network and the masked network are compared at a second size and another batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import nni_topo

PRUNED = ["Conv1d", "Conv2d", "Conv3d", "ConvTranspose2d", "Linear"]


class Net(nn.Module):
    """Layers and parameters by name, and a forward that uses them."""

    def __init__(self, forward: Callable[..., Any], parts: dict[str, Any]) -> None:
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


class Case(NamedTuple):
    parts: Callable[[], dict[str, Any]]
    forward: Callable[..., Any]
    inputs: Callable[[int, int], tuple[Tensor, ...]]  # of a batch and a size
    kept: dict[str, int]  # by layer that loses channels, how many stay
    sizes: tuple[tuple[int, int], tuple[int, int]] = ((2, 8), (3, 11))  # batch and size: the example, the comparison


def images(batch: int, size: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, 3, size, size),)


def rows(batch: int, size: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, 10),)


def tokens(batch: int, size: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, size, 10),)


def of_kind(conv: type[nn.Module], *, width: int = 16, **parts: Callable[[], Any]) -> Callable[[], dict[str, Any]]:
    """Make ``a``, of as many channels as ``width``, and ``b``, which reads them, besides other parts."""
    if conv is nn.Linear:
        return lambda: {"a": nn.Linear(10, width), "b": nn.Linear(width, 4), **{k: f() for k, f in parts.items()}}
    return lambda: {
        "a": conv(3, width, 3, padding=1),
        "b": conv(width, 4, 1),
        **{k: f() for k, f in parts.items()},
    }


def in_order(*names: str) -> Callable[..., Any]:
    """Make a forward that calls parts one after the other."""

    def forward(self: Any, x: Tensor) -> Any:
        for name in names:
            x = getattr(self, name)(x)
        return x

    return forward


def check(case: Case) -> None:
    """Prune half of the channels; compare the dense network with the masked one, and count the channels that stay."""
    torch.manual_seed(0)
    model = Net(case.forward, case.parts())
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
    example, other = (case.inputs(*size) for size in case.sizes)
    model.eval()(*example)
    before = copy.deepcopy(model.state_dict())
    groups = nni_topo.dependency_groups(model, example, [{"op_types": PRUNED, "sparse_ratio": 0.5}])
    pruner = nni_topo.create_pruner("l1", model, groups)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    dense = nni_topo.to_dense(model, example, masks)
    kept = {}
    for name, module in dense.named_modules():
        whole = model.get_submodule(name)
        if isinstance(module, nn.Linear) and module.out_features < whole.out_features:
            kept[name] = module.out_features
        elif hasattr(module, "out_channels") and module.out_channels < whole.out_channels:
            kept[name] = module.out_channels
    assert kept == case.kept, dict(groups.skipped)
    with torch.no_grad():
        masked = nni_topo.masked_model(model, example, masks)
        torch.testing.assert_close(dense(*other), masked(*other), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def iresnet_block() -> dict[str, Any]:
    return {
        "stem": nn.Conv2d(3, 16, 3, padding=1, bias=False), "stem_norm": nn.BatchNorm2d(16), "stem_act": nn.PReLU(16),
        "norm1": nn.BatchNorm2d(16), "conv1": nn.Conv2d(16, 24, 3, padding=1, bias=False), "norm2": nn.BatchNorm2d(24),
        "act": nn.PReLU(24), "conv2": nn.Conv2d(24, 16, 3, stride=2, padding=1, bias=False),
        "norm3": nn.BatchNorm2d(16), "down": nn.Conv2d(16, 16, 1, stride=2, bias=False), "last": nn.Conv2d(16, 5, 1),
    }  # fmt: skip


def iresnet(self: Any, x: Tensor) -> Tensor:
    x = self.stem_act(self.stem_norm(self.stem(x)))
    inner = self.norm3(self.conv2(self.act(self.norm2(self.conv1(self.norm1(x))))))
    return self.last(inner + self.down(x)).mean((2, 3))


def fsrcnn() -> dict[str, Any]:
    return {
        "first": nn.Sequential(nn.Conv2d(3, 24, 5, padding=2), nn.PReLU(24)),
        "middle": nn.Sequential(
            nn.Conv2d(24, 12, 1), nn.PReLU(12), nn.Conv2d(12, 12, 3, padding=1), nn.PReLU(12), nn.Conv2d(12, 24, 1),
            nn.PReLU(24),
        ),
        "last": nn.ConvTranspose2d(24, 3, 9, stride=2, padding=4, output_padding=1),
    }  # fmt: skip


def enet_bottleneck() -> dict[str, Any]:
    return {
        "stem": nn.Conv2d(3, 16, 3, padding=1), "reduce": nn.Conv2d(16, 8, 1, bias=False), "norm1": nn.BatchNorm2d(8),
        "act1": nn.PReLU(8), "conv": nn.Conv2d(8, 8, 3, padding=2, dilation=2, bias=False), "norm2": nn.BatchNorm2d(8),
        "act2": nn.PReLU(8), "expand": nn.Conv2d(8, 16, 1, bias=False), "norm3": nn.BatchNorm2d(16),
        "act3": nn.PReLU(16), "last": nn.Conv2d(16, 5, 1),
    }  # fmt: skip


def enet(self: Any, x: Tensor) -> Tensor:
    x = self.stem(x)
    inner = self.act2(self.norm2(self.conv(self.act1(self.norm1(self.reduce(x))))))
    return self.last(self.act3(x + self.norm3(self.expand(inner))))


def mtcnn() -> dict[str, Any]:
    return {
        "conv1": nn.Conv2d(3, 10, 3), "act1": nn.PReLU(10), "pool": nn.MaxPool2d(2, 2, ceil_mode=True),
        "conv2": nn.Conv2d(10, 16, 3), "act2": nn.PReLU(16), "conv3": nn.Conv2d(16, 32, 3), "act3": nn.PReLU(32),
        "dense": nn.Linear(32, 24), "act4": nn.PReLU(24), "scores": nn.Linear(24, 2), "boxes": nn.Linear(24, 4),
    }  # fmt: skip


def mtcnn_forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    x = self.act2(self.conv2(self.pool(self.act1(self.conv1(x)))))
    x = self.act3(self.conv3(x)).amax((2, 3))
    x = self.act4(self.dense(x))
    return self.scores(x).softmax(1), self.boxes(x)


class ClippedPReLU(nn.PReLU):
    """A PReLU with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.prelu(x, self.weight.clamp(0, 1))


def vectors(width: int = 16) -> dict[str, Callable[[], Any]]:
    return {
        "mean": lambda: torch.randn(width),
        "var": lambda: torch.rand(width) + 0.5,
        "slope": lambda: nn.Parameter(torch.rand(width)),
        "shift": lambda: nn.Parameter(torch.randn(width)),
    }


ONE_NUMBER_A_CHANNEL = {
    "iresnet's block": Case(
        iresnet_block, iresnet, images, {"stem": 8, "conv1": 12, "conv2": 8, "down": 8}
    ),
    "FSRCNN": Case(
        fsrcnn, in_order("first", "middle", "last"), images,
        {"first.0": 12, "middle.0": 6, "middle.2": 6, "middle.4": 12},
    ),
    "ENet's bottleneck": Case(enet_bottleneck, enet, images, {"stem": 8, "reduce": 4, "conv": 4, "expand": 8}),
    "MTCNN": Case(
        mtcnn, mtcnn_forward, images, {"conv1": 5, "conv2": 8, "conv3": 16, "dense": 12}, ((2, 12), (3, 17))
    ),
    "after conv1d": Case(
        of_kind(nn.Conv1d, act=lambda: nn.PReLU(16)), in_order("a", "act", "b"),
        lambda batch, size: (torch.randn(batch, 3, size),), {"a": 8},
    ),
    "after conv3d": Case(
        of_kind(nn.Conv3d, act=lambda: nn.PReLU(16)), in_order("a", "act", "b"),
        lambda batch, size: (torch.randn(batch, 3, size, 4, 4),), {"a": 8},
    ),
    "after linear": Case(of_kind(nn.Linear, act=lambda: nn.PReLU(16)), in_order("a", "act", "b"), rows, {"a": 8}),
    "one slope": Case(of_kind(nn.Conv2d, act=nn.PReLU), in_order("a", "act", "b"), images, {"a": 8}),
    "a slope for each token": Case(
        of_kind(nn.Linear, act=lambda: nn.PReLU(7)), in_order("a", "act", "b"), tokens, {"a": 8}, ((2, 7), (3, 7))
    ),
    "a derived class": Case(
        of_kind(nn.Conv2d, act=lambda: ClippedPReLU(16)), in_order("a", "act", "b"), images, {"a": 8}
    ),
    "F.prelu": Case(
        of_kind(nn.Conv2d, **vectors()), lambda self, x: self.b(functional.prelu(self.a(x), self.slope)), images,
        {"a": 8},
    ),
    "F.batch_norm with buffers": Case(
        of_kind(nn.Conv2d, **vectors()),
        lambda self, x: self.b(functional.batch_norm(self.a(x), self.mean, self.var, self.slope, self.shift)),
        images, {"a": 8},
    ),
    "F.batch_norm by name": Case(
        of_kind(nn.Linear, **vectors()),
        lambda self, x: self.b(functional.batch_norm(running_mean=self.mean, running_var=self.var, input=self.a(x))),
        rows, {"a": 8},
    ),
    "F.instance_norm": Case(
        of_kind(nn.Conv2d, **vectors()),
        lambda self, x: self.b(functional.instance_norm(self.a(x), weight=self.slope, bias=self.shift)),
        images, {"a": 8},
    ),
    "torch.prelu": Case(
        of_kind(nn.Conv2d, **vectors()), lambda self, x: self.b(self.a(x).prelu(self.slope)), images, {"a": 8}
    ),
}  # fmt: skip

TABLES = {"one number a channel": ONE_NUMBER_A_CHANNEL}
ALL = {f"{title}: {name}": case for title, table in TABLES.items() for name, case in table.items()}


@pytest.mark.parametrize("name", ALL)
def test_networks_lose_the_channels_that_nothing_needs(name: str) -> None:
    check(ALL[name])
