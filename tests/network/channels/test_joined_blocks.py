"""Group norms and grouped convolutions over a concatenation, whose blocks hold channels of several layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nni_topo
from nni_topo import zoo

CONVOLUTIONS = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]


class UNet(nn.Module):
    """The group norm of the decoder reads the upsampled channels and those of the skip connection."""

    def __init__(self, groups: int, outer: int, inner: int) -> None:
        super().__init__()
        self.enter, self.outer = nn.Conv2d(3, outer, 3, padding=1), nn.Conv2d(outer, outer, 3, padding=1)
        self.outer_norm, self.inner_norm = nn.GroupNorm(groups, outer), nn.GroupNorm(groups, inner)
        self.down, self.inner = nn.Conv2d(outer, inner, 3, 2, 1), nn.Conv2d(inner, inner, 3, padding=1)
        self.norm, self.join = nn.GroupNorm(groups, outer + inner), nn.Conv2d(outer + inner, outer, 3, padding=1)
        self.leave = nn.Conv2d(outer, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        x = x + self.outer(self.outer_norm(x).relu())
        small = self.down(x)
        small = small + self.inner(self.inner_norm(small).relu())
        joined = torch.cat([nn.functional.interpolate(small, scale_factor=2), x], 1)
        return self.leave(self.join(self.norm(joined).relu()).relu())


class Dense(nn.Module):
    """Each group norm reads all earlier layers, in groups of 4, 6 and 8 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(ins, 16, 3, padding=1) for ins in (3, 16, 32, 48))
        self.norms = nn.ModuleList([nn.GroupNorm(4, 16), nn.GroupNorm(4, 32), nn.GroupNorm(8, 48), nn.GroupNorm(8, 64)])
        self.leave = nn.Conv2d(64, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        joined = self.norms[0](self.layers[0](x))
        for layer, norm in zip(list(self.layers)[1:], list(self.norms)[1:], strict=True):
            joined = norm(torch.cat([layer(joined.relu()), joined], 1))
        return self.leave(joined)


class GroupedJoin(nn.Module):
    """A grouped convolution reads two layers, whose border lies within its third group."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(3, 20, 3, padding=1), nn.Conv2d(3, 12, 3, padding=1)
        self.join, self.leave = nn.Conv2d(32, 16, 3, padding=1, groups=4), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.join(torch.cat([self.wide(x), self.narrow(x)], 1).relu()).relu())


def made(make: Any, *sizes: int) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = make(*sizes).double().eval()
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return model


def images(count: int, size: int) -> Tensor:
    return torch.rand(count, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def widths(model: nn.Module) -> dict[str, int]:
    return {name: module.out_channels for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}


@pytest.mark.parametrize(
    ("make", "sizes", "kept"),
    [
        (UNet, (8, 32, 64), {"enter": 16, "outer": 16, "down": 32, "inner": 32, "join": 16, "leave": 3}),
        (UNet, (8, 32, 32), {"enter": 16, "outer": 16, "down": 16, "inner": 16, "join": 16, "leave": 3}),
        (UNet, (6, 24, 36), {"enter": 12, "outer": 12, "down": 18, "inner": 18, "join": 12, "leave": 3}),
        (Dense, (), {"layers.0": 8, "layers.1": 8, "layers.2": 8, "layers.3": 8, "leave": 2}),
        (GroupedJoin, (), {"wide": 10, "narrow": 6, "join": 8, "leave": 2}),
    ],
)
@pytest.mark.parametrize("pruner", ["random", "topological", "l1"])
def test_half_of_the_channels_go_and_none_come_back(
    make: Any, sizes: tuple[int, ...], kept: dict[str, int], pruner: str
) -> None:
    model = made(make, *sizes)
    groups = nni_topo.dependency_groups(model, images(2, 8), CONVOLUTIONS)
    masks = nni_topo.create_pruner(pruner, copy.deepcopy(model), groups).compress()[1]
    dense = nni_topo.to_dense(model, images(2, 8), masks)
    assert widths(dense) == kept
    assert not dense.report.kept
    masked = nni_topo.masked_model(model, images(2, 8), masks)
    torch.testing.assert_close(dense(images(3, 12)), masked(images(3, 12)), rtol=1e-9, atol=1e-9)


def test_one_pattern_repeats_in_all_blocks_of_the_layers_that_are_read_together() -> None:
    ties = nni_topo.dependency_groups(made(UNet, 8, 32, 64), images(2, 8), CONVOLUTIONS).ties
    # Groups of 4, 8 and 12 channels: the pattern repeats every 4.
    assert ties.keys() == {"enter", "outer", "down", "inner"}
    pattern = ties["enter"][:4]
    assert len(set(pattern)) == 4
    assert ties["enter"] == ties["outer"] == pattern * 8
    assert ties["down"] == ties["inner"] == pattern * 16


def test_a_norm_of_one_layer_alone_needs_no_pattern() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.Conv2d(8, 2, 1)).double()
    assert nni_topo.dependency_groups(model, images(2, 8), CONVOLUTIONS).ties == {}


class WithInput(nn.Module):
    """The first of eight groups of four holds the three channels of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.norm, self.leave = nn.Conv2d(3, 29, 1), nn.GroupNorm(8, 32), nn.Conv2d(32, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.norm(torch.cat([x, self.enter(x)], 1)).relu())


def test_kept_channels_in_one_block_keep_their_places_in_all_blocks() -> None:
    model = made(WithInput)
    groups = nni_topo.dependency_groups(model, images(2, 8), CONVOLUTIONS)
    assert "21 of 29 channels are kept: all blocks keep the same number of channels" in groups.skipped["enter"]
    masks = nni_topo.create_pruner("random", copy.deepcopy(model), groups.with_entries(
        [{"op_names": ["enter"], "sparse_ratio": 0.9}]
    )).compress()[1]  # fmt: skip
    dense = nni_topo.to_dense(model, images(2, 8), masks)
    assert dense.enter.out_channels == 21  # the eight others go together
    explanation = nni_topo.explain(model, images(2, 8), "enter")
    assert explanation.kept == 21
    assert [reason.kind for reason in explanation.reasons] == ["blocks_equal"]


def test_a_layer_keeps_its_channels_if_the_layers_beside_it_are_not_selected() -> None:
    config = [{"op_names": ["enter", "outer", "join"], "sparse_ratio": 0.5}]
    groups = nni_topo.dependency_groups(made(UNet, 8, 32, 64), images(2, 8), config)
    assert groups.skipped.keys() == set()
    types = [{"op_types": ["Conv2d"], "exclude_op_names": ["down", "inner"], "sparse_ratio": 0.5}]
    skipped = nni_topo.dependency_groups(made(UNet, 8, 32, 64), images(2, 8), types).skipped
    assert skipped["enter"] == skipped["outer"] == "shared with down, inner, which aren't among the layers to prune"


@pytest.mark.parametrize("pruner", ["reconstruction", pytest.param("random", marks=pytest.mark.slow), "l2"])
@pytest.mark.parametrize(
    ("sizes", "left"),
    [((8, 32, 64), 0.5), pytest.param((32, 64, 128), 0.526, marks=pytest.mark.slow), ((8, 32, 32), 0.5)],
)
def test_a_budget_is_met_as_nearly_as_whole_positions_allow(sizes: tuple[int, ...], left: float, pruner: str) -> None:
    model = made(UNet, *sizes).float()
    batches = images(32, 16).float().split(8)
    small = nni_topo.shrink(model, batches, {"flops": 0.5}, pruner=pruner, distill=False)
    share = zoo.count_macs(small, batches[0]) / zoo.count_macs(model, batches[0])
    assert share == pytest.approx(left, abs=0.01)
    assert not small.report.layers.kept
    assert small.report.budget.is_met is (left == 0.5)
