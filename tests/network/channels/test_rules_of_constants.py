"""Tensors that a forward makes, channel-wise convolutions and merged patches: where the rules say channels are."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.swin_transformer import PatchMerging

import nni_topo
from nni_topo.network.speedup.analysis import Analysis

IMAGES = torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(0))


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
