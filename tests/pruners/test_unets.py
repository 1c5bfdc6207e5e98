"""Networks that go down and up again, pruned by every kind of pruner at their layers' output channels."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nni.compression.pruning import L1NormPruner
from torch import Tensor, nn
from torch.nn import functional

import nni_topo
from nni_topo.recovery.compensating import compensation

MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


class Block(nn.Sequential):
    """Two convolutions, the first without a bias before its norm."""

    def __init__(self, entering: int, leaving: int, dims: int) -> None:
        convolution, norm = (getattr(nn, f"{kind}{dims}d") for kind in ("Conv", "BatchNorm"))
        super().__init__(
            convolution(entering, leaving, 3, padding=1, bias=False),
            norm(leaving),
            nn.ReLU(),
            convolution(leaving, leaving, 3, padding=1),
            norm(leaving),
            nn.ReLU(),
        )


class Gate(nn.Module):
    """Weighs a skip connection by what comes up and by itself."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.up, self.skip = nn.Conv2d(channels, inner, 1), nn.Conv2d(channels, inner, 1)
        self.map = nn.Conv2d(inner, 1, 1)

    def forward(self, up: Tensor, skip: Tensor) -> Tensor:
        return skip * torch.sigmoid(self.map(functional.relu(self.up(up) + self.skip(skip))))


class UNet(nn.Module):
    """Two steps down and up.

    ``up``: the arguments of the transposed convolutions; None: interpolation and a convolution.
    """

    def __init__(
        self,
        *,
        up: dict[str, Any] | None = {"kernel_size": 2},  # noqa: B006 - it is only read
        is_skip_first: bool = False,
        is_padded: bool = False,
        is_gated: bool = False,
        dims: int = 2,
    ) -> None:
        super().__init__()
        self.is_skip_first, self.is_padded = is_skip_first, is_padded
        convolution, transposed = (getattr(nn, f"{kind}{dims}d") for kind in ("Conv", "ConvTranspose"))
        self.down1, self.down2, self.bottom = Block(1, 8, dims), Block(8, 16, dims), Block(16, 32, dims)
        self.pool = getattr(nn, f"MaxPool{dims}d")(2)
        self.enlarge = nn.Identity() if up else nn.Upsample(scale_factor=2, mode=MODES[dims])
        self.up2 = transposed(32, 16, stride=2, **up) if up else convolution(32, 16, 1)
        self.up1 = transposed(16, 8, stride=2, **up) if up else convolution(16, 8, 1)
        self.join2, self.join1 = Block(32, 16, dims), Block(16, 8, dims)
        self.gate2, self.gate1 = (Gate(16, 8), Gate(8, 4)) if is_gated else (None, None)
        self.head = convolution(8, 2, 1)

    def joined(self, up: Tensor, skip: Tensor, gate: Gate | None) -> Tensor:
        if self.is_padded:
            rest = [have - need for have, need in zip(skip.shape[2:], up.shape[2:], strict=True)]
            up = functional.pad(up, [rest[1] // 2, rest[1] - rest[1] // 2, rest[0] // 2, rest[0] - rest[0] // 2])
        skip = skip if gate is None else gate(up, skip)
        return torch.cat([skip, up] if self.is_skip_first else [up, skip], 1)

    def forward(self, images: Tensor) -> Tensor:
        first = self.down1(images)
        second = self.down2(self.pool(first))
        lowest = self.bottom(self.pool(second))
        middle = self.join2(self.joined(self.up2(self.enlarge(lowest)), second, self.gate2))
        found: Tensor = self.head(self.join1(self.joined(self.up1(self.enlarge(middle)), first, self.gate1)))
        return found


EVEN, ODD = (16, 16), (19, 21)
NETS: dict[str, tuple[Callable[[], UNet], tuple[int, ...]]] = {
    "transposed": (lambda: UNet(), EVEN),
    "interpolation": (lambda: UNet(up=None), EVEN),
    "odd, padded, skip first": (lambda: UNet(is_padded=True, is_skip_first=True), ODD),
    "gates": (lambda: UNet(is_gated=True), EVEN),
    "two groups": (lambda: UNet(up={"kernel_size": 2, "groups": 2}), EVEN),
    "output padding": (lambda: UNet(up={"kernel_size": 3, "padding": 1, "output_padding": 1}), EVEN),
    "one dimension": (lambda: UNet(dims=1), (16,)),
    "three dimensions": (lambda: UNet(dims=3), (8, 8, 8)),
}


def trained(make: Callable[[], UNet]) -> UNet:
    """A network whose norms are those of one that was trained."""
    torch.manual_seed(0)
    model = make().eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for vector, low, high in (
                (module.running_mean, -1.0, 1.0),
                (module.running_var, 0.5, 2.0),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -1.0, 1.0),
            ):
                nn.init.uniform_(vector, low, high)
    return model


def layers_of(model: nn.Module) -> list[str]:
    """Convolutions that can lose channels."""
    found = [name for name, module in model.named_modules() if isinstance(module, nn.modules.conv._ConvNd)]
    return [name for name in found if name != "head" and not name.endswith("map")]


def assert_dense_is_masked(model: UNet, images: Tensor, masks: Any, kept: dict[str, int], whole: list[str]) -> None:
    dense = nni_topo.to_dense(model, images, masks)
    masked = nni_topo.masked_model(model, images, {name: each for name, each in masks.items() if name not in whole})
    for scale in (0.01, 1.0, 100.0):
        expected = masked(scale * images).detach()
        torch.testing.assert_close(
            dense(scale * images).detach(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
        )
    found = {name: module.out_channels for name, module in dense.named_modules() if hasattr(module, "out_channels")}
    assert {name: found[name] for name in kept} == kept
    assert {row.name for row in dense.report.kept} == set(whole)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("net", NETS)
@pytest.mark.quick_every(18)
def test_half_of_all_channels_goes(net: str, every: int) -> None:
    make, size = NETS[net]
    model, images = trained(make), torch.randn(2, 1, *size)
    layers = layers_of(model)[::every]
    config = nni_topo.dependency_groups(model, images, [{"op_names": layers, "sparse_ratio": 0.5}])
    pruner = nni_topo.create_pruner("l1", model, config)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    # The two layers of a gate are added, and of every second layer only one of them is asked for.
    whole = [name for name in layers if name.startswith("gate")] if every == 2 else []
    kept = {name: model.get_submodule(name).out_channels // (1 if name in whole else 2) for name in layers}
    assert_dense_is_masked(model, images, masks, kept, whole)


@pytest.mark.parametrize("net", ["gates", "two groups"])
@pytest.mark.slow
def test_reconstruction_takes_half_of_all_channels(net: str, caplog: pytest.LogCaptureFixture) -> None:
    make, size = NETS[net]
    model, images = trained(make), torch.randn(4, 1, *size)
    layers = layers_of(model)
    groups = nni_topo.dependency_groups(model, images, [{"op_names": layers, "sparse_ratio": 0.5}])
    pruner = nni_topo.create_pruner("reconstruction", model, groups, calibration=[images])
    _, masks = pruner.compress()
    pruner.unwrap_model()
    assert not re.search("stay (whole|unpruned)", caplog.text)
    kept = {name: model.get_submodule(name).out_channels // 2 for name in layers}
    assert_dense_is_masked(model, images, masks, kept, [])
    found = compensation(model, masks, [images]).report
    assert not found.left_alone
    assert {"up2", "up1"} <= {layer.layer for layer in found.layers}


def test_nnis_own_class_needs_one_line() -> None:
    model, images = trained(UNet), torch.randn(8, 1, *EVEN)
    types = ["Conv2d", "ConvTranspose2d"]
    pruner = L1NormPruner(model, [{"op_types": types, "exclude_op_names": ["head"], "sparse_ratio": 0.5}])
    _, masks = pruner.compress()
    pruner.unwrap_model()
    dense = nni_topo.to_dense(nni_topo.compensate(model, masks, [images]), images[:2], masks)
    assert (dense.up1.in_channels, dense.up1.out_channels, dense.head.in_channels) == (8, 4, 4)
