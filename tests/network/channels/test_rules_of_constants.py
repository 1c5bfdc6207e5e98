"""Buffers with a value for each channel."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import nni_topo

IMAGES = torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(0))


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
