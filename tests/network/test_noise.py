"""Forwards that draw random numbers: what they are drawn for stays whole, with the reason; all else goes."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import nni_topo

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ASKED = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
DRAWN = "the forward draws random numbers for them"
OUTPUT = "it gives the model's output"


class Noisy(nn.Module):
    """Three convolutions, with noise in front, within or behind."""

    def __init__(self, *, before=torch.clone, within=torch.clone, behind=torch.clone):
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 4, 1)
        self.noise = before, within, behind

    def forward(self, x):
        before, within, behind = self.noise
        return behind(self.last(self.second(within(self.first(before(x)))).relu()))


def noise(x: Tensor) -> Tensor:
    return x + torch.randn_like(x)


WITHIN: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "dropout": (lambda x: functional.dropout(x, 0.5, training=True), f"{DRAWN} (dropout)"),
    "randn_like": (noise, f"{DRAWN} (randn_like)"),
    "rand": (
        lambda x: x * torch.rand(x.shape),
        "an operation joins them to random numbers that the forward draws (mul)",
    ),
    "normal_": (lambda x: x + torch.empty_like(x).normal_(), f"{DRAWN} (normal)"),
}


@pytest.mark.parametrize("name", WITHIN)
def test_channels_that_noise_is_drawn_for_stay_with_the_reason(name):
    torch.manual_seed(0)
    within, reason = WITHIN[name]
    model = Noisy(within=within).eval()
    groups = nni_topo.dependency_groups(model, IMAGES, ASKED)
    assert groups.skipped == {"first": reason, "last": OUTPUT}
    stays = torch.arange(8) % 2 == 0
    mask = {"first": {"weight": stays[:, None, None, None].expand(8, 3, 1, 1).float(), "bias": stays.float()}}
    (row,) = nni_topo.to_dense(model, IMAGES, mask).report.kept
    assert (row.name, row.kept, row.reason) == ("first", 4, reason)


@pytest.mark.parametrize("place", ["before", "behind"])
@pytest.mark.parametrize("draw", [noise, lambda x: x + random.random(), lambda x: x + np.random.rand()])
def test_noise_in_front_or_behind_or_of_others_keeps_no_channels(place, draw):
    torch.manual_seed(0)
    model = Noisy(**{place: draw}).eval()
    state = torch.get_rng_state()
    groups = nni_topo.dependency_groups(model, IMAGES, ASKED)
    assert groups.skipped.keys() == {"last"}
    masks = nni_topo.create_pruner("l1", nni_topo.as_torch_layers(model), groups).compress()[1]
    torch.set_rng_state(state)
    dense = nni_topo.to_dense(model, IMAGES, masks)
    assert torch.equal(torch.get_rng_state(), state)
    assert (dense.first.out_channels, dense.second.out_channels) == (4, 3)


class Laid(nn.Conv2d):
    """Returns few channels pixel by pixel in the memory, as some of oneDNN's convolutions do."""

    def forward(self, x):
        y = super().forward(x)
        return y.contiguous(memory_format=torch.channels_last) if x.stride(0) < 8 * 64 else y


def test_noise_does_not_depend_on_how_the_memory_holds_the_channels():
    torch.manual_seed(0)
    model = Noisy(behind=noise)
    model.second = Laid(8, 6, 1)
    model.eval()
    groups = nni_topo.dependency_groups(model, IMAGES, ASKED)
    assert groups.skipped.keys() == {"last"}
    masks = nni_topo.RandomPruner(nni_topo.as_torch_layers(model), groups, seed=0).compress()[1]
    dense = nni_topo.to_dense(model, IMAGES, masks)
    assert (dense.first.out_channels, dense.second.out_channels) == (4, 3)
    assert dense.second(torch.randn(1, 4, 8, 8)).is_contiguous(memory_format=torch.channels_last)
