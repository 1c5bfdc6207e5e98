"""Channels that a forward picks or counts by fixed numbers: those stay, the others go."""

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


# By name: the pick, how many channels it gives, and which of the eight have to stay for that.
PICKS: dict[str, tuple[Callable[[Tensor], Tensor], int, list[int]]] = {
    "list": (lambda z: z[:, [0, 1, 4]], 3, [0, 1, 2, 3, 4, 5, 6, 7]),
    "mask": (lambda z: z[:, torch.tensor([True, False] * 4)], 4, [0, 1, 2, 3, 4, 5, 6, 7]),
    "slice from the end": (lambda z: z[:, -3:], 3, [5, 6, 7]),
    "slice of all": (lambda z: z[:, 0:8], 8, []),
    "split": (lambda z: torch.cat(z.split(3, 1)[::-1], 1), 8, [0, 1, 2, 3, 4, 5, 6, 7]),
    "sizes of a place": (lambda z: z.reshape(len(z), -1, *z[:, 3].shape[1:]), 8, [0, 1, 2, 3]),
    "sizes of the first": (lambda z: z.reshape(len(z), -1, *z[:, 0].shape[1:]), 8, []),
}


@pytest.mark.parametrize("name", PICKS)
@torch.no_grad()
@pytest.mark.quick_every(4)
def test_channels_that_fixed_numbers_count_stay_and_the_others_go(name):
    pick, count, held = PICKS[name]
    torch.manual_seed(0)
    model = Picks(pick, count).eval()
    groups = nni_topo.dependency_groups(model, IMAGES, ASKED)
    told = groups.skipped.get("first", "")
    assert ("by fixed numbers" in told) is bool(held)
    assert told.startswith(f"{len(held)} of 8 channels are kept") is (0 < len(held) < 8)
    assert [entry["op_names"] for entry in groups] == ([["first"]] if len(held) < 8 else [])
    # Of those that may go, all but two in different halves.
    stays = torch.zeros(8, dtype=torch.bool)
    stays[[*held, 3, 7]] = True
    mask = stays[:, None, None, None].expand(model.first.weight.shape).float()
    masks = {"first": {"weight": mask, "bias": stays.float()}}
    dense, reference = (each(model, IMAGES, masks) for each in (nni_topo.to_dense, nni_topo.masked_model))
    assert dense.first.out_channels == int(stays.sum())
    torch.testing.assert_close(dense(3 * IMAGES + 1), reference(3 * IMAGES + 1))
    if not held:
        return
    # A mask that takes one of the others: it comes back, and the report says why.
    masks["first"]["weight"][held[0]] = masks["first"]["bias"][held[0]] = 0
    report = nni_topo.to_dense(model, IMAGES, masks).report
    assert [(row.name, row.kept) for row in report.kept] == [("first", 1)]
    assert "by fixed numbers" in report.kept[0].reason


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
