"""Sizes that a forward takes from a tensor's shape and hands on: they follow the channels."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import nni_topo

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ASKED = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]


class Shaped(nn.Module):
    """Puts what a convolution gives into another shape, and back."""

    def __init__(self, shape):
        super().__init__()
        self.first, self.last, self.shape = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1), shape

    def forward(self, x):
        return self.last(self.shape(x, self.first(x).relu()))


USES = {
    "unflatten": lambda x, y: y.flatten(2).unflatten(2, x.shape[2:]),
    "unflatten behind a number": lambda x, y: y.unflatten(dim=1, sizes=(2, -1)).flatten(1, 2),
    "number of entries": lambda x, y: y.view(len(x), -1, y.shape[2:].numel()).unflatten(2, y.shape[2:]),
    "view": lambda x, y: y.flatten(2).view(*y.shape[:2], *x.shape[2:]),
    "interpolate": lambda x, y: functional.interpolate(functional.max_pool2d(y, 2), size=x.shape[2:]),
    "zeros": lambda x, y: y + torch.zeros(y.shape[2:]),
}


@pytest.mark.parametrize("name", USES)
@torch.no_grad()
@pytest.mark.quick_every(3)
def test_slices_of_a_shape_are_followed(name):
    torch.manual_seed(0)
    model = Shaped(USES[name]).eval()
    groups = nni_topo.dependency_groups(model, IMAGES, ASKED)
    assert groups.skipped.keys() == {"last"}
    stays = torch.tensor([True, False, False, True, True, False, False, True])
    masks = {"first": {"weight": stays[:, None, None, None].expand(8, 3, 3, 3).float(), "bias": stays.float()}}
    dense, reference = (each(model, IMAGES, masks) for each in (nni_topo.to_dense, nni_topo.masked_model))
    assert dense.first.out_channels == 4
    torch.testing.assert_close(dense(3 * IMAGES), reference(3 * IMAGES))
