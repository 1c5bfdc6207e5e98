"""Tensors that a forward makes, channel-wise convolutions and merged patches: where the rules say channels are."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.swin_transformer import PatchMerging

import nni_topo
from nni_topo.network.channels.ids import FIXED
from nni_topo.network.speedup.analysis import Analysis

IMAGES = torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(0))


class Between(nn.Module):
    """What a function makes of one layer's eight channels goes into the next."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.between = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), between

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x)))


FREE = {
    "of the shape": lambda z: z * torch.ones(z.shape[1], 1, 1),
    "new ones": lambda z: z * z.new_ones(1, z.size(1), 1, 1),
    "like it": lambda z: z * torch.ones_like(z),
    "one number": lambda z: z * torch.ones(()),
    "one for each pixel": lambda z: z * torch.ones(6, 5),
}
KEPT = {
    "eight ones": lambda z: z * torch.ones(1, 8, 1, 1),
    "new ones": lambda z: z * z.new_ones(8, 1, 1),
    "values as many as channels": lambda z: z * torch.arange(z.size(1)).view(-1, 1, 1),
}


@pytest.mark.parametrize("name", FREE)
def test_a_constant_as_wide_as_the_channels_lets_them_go(name: str) -> None:
    flow = Analysis.on(Between(FREE[name]).eval(), IMAGES).flow
    assert flow.why_pinned("first") == ()
    assert (flow.group_ids_of("first") > FIXED).all()
    assert flow.entering_group_ids("last").tolist() == flow.group_ids_of("first").tolist()


@pytest.mark.parametrize("name", KEPT)
def test_a_constant_of_so_many_values_keeps_the_channels(name: str) -> None:
    flow = Analysis.on(Between(KEPT[name]).eval(), IMAGES).flow
    assert [reason.kind for reason in flow.why_pinned("first")] == ["joins_constant"]
    assert flow.entering_group_ids("last").tolist() == [FIXED] * 8


class Gate(nn.Module):
    """A convolution over the channels, as in ECA nets."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.first, self.conv, self.last = nn.Conv2d(3, 8, 1), conv, nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x)
        weights = self.conv(z.mean((2, 3))[:, None]).sigmoid()
        return self.last(z * weights.transpose(1, 2)[..., None])


@pytest.mark.parametrize("kernel", [1, 3])
def test_channels_that_a_convolution_slides_along_may_go(kernel: int) -> None:
    flow = Analysis.on(Gate(nn.Conv1d(1, 1, kernel, padding=kernel // 2)).eval(), IMAGES).flow
    assert flow.channel_wise == {"conv"}
    assert list(flow.layers) == ["first", "last"]
    assert flow.why_pinned("first") == ()
    assert flow.entering_group_ids("conv").tolist() == flow.group_ids_of("first").tolist()


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv1d(1, 1, 3, padding=1, padding_mode="circular"),
        type("Own", (nn.Conv1d,), {})(1, 1, 3, padding=1),
    ],
)
def test_other_convolutions_along_channels_keep_them(conv: nn.Module) -> None:
    flow = Analysis.on(Gate(conv).eval(), IMAGES).flow
    assert flow.channel_wise == set()
    assert len(set(flow.group_ids_of("first").tolist())) == 1  # all are coupled with one another


class Merging(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.merge, self.last = nn.Conv2d(3, 8, 1), PatchMerging(8), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.merge(self.first(x).permute(0, 2, 3, 1)))


@torch.no_grad()
def test_the_channels_of_merged_patches_stand_four_times_behind_one_another() -> None:
    torch.manual_seed(0)
    model, images = Merging().eval(), torch.randn(2, 3, 8, 6)
    flow = Analysis.on(model, images).flow
    wanted = flow.group_ids_of("first").tolist()
    assert flow.why_pinned("first") == ()
    assert flow.entering_group_ids("merge.norm").tolist() == wanted * 4
    assert flow.entering_group_ids("merge.reduction").tolist() == wanted * 4
    mask = torch.tensor([1.0, 0, 1, 1, 0, 0, 1, 1])
    masks = {"first": {"weight": mask.view(-1, 1, 1, 1).expand(8, 3, 1, 1), "bias": mask}}
    dense = nni_topo.to_dense(model, images, masks)
    assert (dense.first.out_channels, dense.merge.reduction.in_features) == (5, 20)
    torch.testing.assert_close(dense(images), nni_topo.masked_model(model, images, masks)(images))


class Multiplied(nn.Module):
    """Two layers, and between them a product with a matrix that is a parameter or a buffer."""

    def __init__(self, side: str, kind: str) -> None:
        super().__init__()
        self.first, self.last, self.side = nn.Linear(3, 8), nn.Linear(8, 4), side
        matrix = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
        if kind == "parameter":
            self.matrix = nn.Parameter(matrix)
        else:
            self.register_buffer("matrix", matrix, persistent=kind == "buffer")

    def forward(self, x: Tensor) -> Tensor:  # (n, 6, 3)
        channels = self.first(x)
        if self.side == "left":
            mixed = self.matrix @ channels
        else:
            mixed = (channels.transpose(1, 2) @ self.matrix.T).transpose(1, 2)
        return self.last(torch.relu(mixed))


@pytest.mark.parametrize(("side", "kind"), [("left", "parameter"), ("right", "buffer that isn't saved")])
def test_channels_pass_a_matrix_that_mixes_positions(side: str, kind: str) -> None:
    torch.manual_seed(0)
    model, inputs = Multiplied(side, kind).eval(), torch.randn(2, 6, 3)
    config_list = [{"op_names": ["first"], "sparse_ratio": 0.5}]
    _, masks = nni_topo.create_pruner("l1", copy.deepcopy(model), config_list).compress()
    dense = nni_topo.to_dense(model, inputs, masks)
    assert dense.first.out_features == dense.last.in_features == 4
    assert dense.matrix.shape == (5, 6)
    torch.testing.assert_close(dense(inputs), nni_topo.masked_model(model, inputs, masks)(inputs))


class Centred(nn.Module):
    """Two layers, and between them a buffer with a value for each channel."""

    def __init__(self, is_saved: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        means = torch.randn(8, 1, 1, generator=torch.Generator().manual_seed(0))
        self.register_buffer("means", means, persistent=is_saved)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x) - self.means))


@pytest.mark.parametrize("is_saved", [True, False])
def test_a_buffer_with_a_value_for_each_channel_is_cut_with_them(is_saved: bool) -> None:
    torch.manual_seed(0)
    model = Centred(is_saved).eval()
    config_list = [{"op_names": ["first"], "sparse_ratio": 0.5}]
    _, masks = nni_topo.create_pruner("l1", copy.deepcopy(model), config_list).compress()
    dense = nni_topo.to_dense(model, IMAGES, masks)
    assert dense.first.out_channels == dense.last.in_channels == 4
    assert dense.means.shape == (4, 1, 1)
    assert ("means" in dense.state_dict()) == is_saved
    torch.testing.assert_close(dense(IMAGES), nni_topo.masked_model(model, IMAGES, masks)(IMAGES))
