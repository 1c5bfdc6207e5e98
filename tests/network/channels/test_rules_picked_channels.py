"""Channels that a forward picks: of a layer with a single one, and by values that may change."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import nni_topo

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ASKED = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]


class Picks(nn.Module):
    """Reads some of the channels of its first layer."""

    def __init__(self, pick: Callable[[Tensor], Tensor], count: int):
        super().__init__()
        self.first, self.last, self.pick = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(count, 4, 3, padding=1), pick

    def forward(self, x):
        return self.last(self.pick(self.first(x)).relu())


@pytest.mark.parametrize("pick", [lambda z: z[:, 0].unsqueeze(1), lambda z: z.view(-1, 1, 64).view(-1, 1, 8, 8)])
def test_a_layer_of_one_channel_is_not_kept_for_what_picks_that_channel(pick):
    model = nn.Sequential(nn.Conv2d(3, 1, 3, padding=1), Picks(pick, 1)).eval()
    model[1].first = nn.Identity()
    groups = nni_topo.dependency_groups(model, IMAGES, ASKED)
    assert groups.skipped == {"1.last": "it gives the model's output"}
    assert "all but one of 1 channels can be pruned" in str(nni_topo.explain(model, IMAGES, "0"))


def test_values_of_a_buffer_may_change_so_that_it_picks_from_all():
    model = Picks(lambda z: z, 3).eval()
    model.register_buffer("places", torch.tensor([0, 1, 2]))
    model.pick = functools.partial(lambda own, z: z[:, own.places], model)
    skipped = nni_topo.dependency_groups(model, IMAGES, ASKED).skipped
    assert "getitem" in skipped["first"]
