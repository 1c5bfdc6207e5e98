"""Modules of full width that run over the channels that are left: against formulas, and against cut modules."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from whole_nets import ChannelsFirst, ResponseNorm, Root

import nni_topo
from nni_topo.network.layers.over_kept import run_over_kept
from nni_topo.network.layers.slicing import cut


def layer(norm: nn.LayerNorm, x: Tensor, kept: list[int]) -> Tensor:
    """Normalize (..., kept channels)."""
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
    return (x - mean) / (variance + norm.eps).sqrt() * norm.weight[kept] + norm.bias[kept]


def root(norm: Root, x: Tensor, kept: list[int]) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * (norm.shift + norm.weight[kept])


def response(norm: ResponseNorm, x: Tensor, kept: list[int]) -> Tensor:
    lengths = x.square().sum((1, 2), keepdim=True).sqrt()
    gamma, beta = norm.gamma.flatten()[kept], norm.beta.flatten()[kept]
    return gamma * x * lengths / (lengths.mean(-1, keepdim=True) + norm.eps) + beta + x


def group(norm: nn.GroupNorm, x: Tensor, kept: list[int]) -> Tensor:
    size, groups = norm.num_channels // norm.num_groups, torch.empty_like(x)
    for at in range(norm.num_groups):
        places = [place for place, channel in enumerate(kept) if channel // size == at]
        if places:
            part = x[..., places]
            mean, variance = part.mean((1, 2, 3), keepdim=True), part.var((1, 2, 3), correction=0, keepdim=True)
            groups[..., places] = (part - mean) / (variance + norm.eps).sqrt()
    return groups * norm.weight[kept] + norm.bias[kept]


# By name: the norm, its formula with the channels last, the dimension of its channels, and the channels that are left.
NORMS = {
    "layer": (nn.LayerNorm(6), layer, -1, [0, 2, 5]),
    "channels first": (ChannelsFirst(6, eps=0.1), layer, 1, [0, 2, 5]),
    "root": (Root(6), root, -1, [1, 4]),
    "shifted root": (Root(6, 1.0), root, -1, [1, 4]),
    "response": (ResponseNorm(6), response, -1, [0, 2, 5]),
    "response, channels first": (ResponseNorm(6, dim=1), response, 1, [0, 2, 5]),
    "group": (nn.GroupNorm(2, 6), group, 1, [0, 2, 4, 5]),
    "group that loses one": (nn.GroupNorm(3, 6), group, 1, [0, 1, 4, 5]),
}


@pytest.mark.parametrize("name", NORMS)
@torch.no_grad()
def test_a_norm_runs_over_the_channels_that_are_left(name: str) -> None:
    norm, formula, dim, kept = NORMS[name]
    torch.manual_seed(0)
    norm = copy.deepcopy(norm).double()
    for parameter in norm.parameters():
        parameter.copy_(torch.randn_like(parameter))
    x = torch.randn(2, 4, 3, 6).double() + 0.5
    wanted = torch.zeros_like(x)
    wanted[..., kept] = formula(norm, x[..., kept], kept)
    whole, small = copy.deepcopy(norm), copy.deepcopy(norm)
    run_over_kept(whole, torch.arange(6))
    run_over_kept(whole, torch.tensor(kept))  # what it is told last counts
    assert isinstance(whole, type(norm))
    torch.testing.assert_close(whole(x.movedim(-1, dim)).movedim(dim, -1), wanted)
    cut("norm", small, torch.tensor(kept), torch.tensor(kept))
    assert type(small) is type(norm)
    torch.testing.assert_close(small(x[..., kept].movedim(-1, dim)).movedim(dim, -1), wanted[..., kept])
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), norm.parameters(), strict=True))


@torch.no_grad()
def test_a_convolution_along_channels_runs_over_those_that_are_left() -> None:
    torch.manual_seed(0)
    conv, x, kept = nn.Conv1d(1, 1, 3, padding=1), torch.randn(2, 1, 7), [0, 2, 3, 6]
    rows, (before, at, after) = functional.pad(x[..., kept], (1, 1)), conv.weight.flatten()
    wanted = torch.zeros_like(x)
    wanted[..., kept] = before * rows[..., :-2] + at * rows[..., 1:-1] + after * rows[..., 2:] + conv.bias
    run_over_kept(conv, torch.tensor(kept))
    torch.testing.assert_close(conv(x), wanted)


@torch.no_grad()
def test_a_norm_on_another_device_runs_there(far: torch.device) -> None:
    norm, x = nn.LayerNorm(6), torch.randn(2, 6)
    away = copy.deepcopy(norm).to(far)
    for each in (norm, away):
        run_over_kept(each, torch.tensor([0, 2, 5]))
    torch.testing.assert_close(away(x.to(far)).cpu(), norm(x))


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(6), nn.GroupNorm(2, 6), nn.RMSNorm(6)], ids=lambda norm: type(norm).__name__
)
def test_a_norm_over_kept_channels_gets_gradients(norm: nn.Module) -> None:
    run_over_kept(norm, torch.tensor([0, 2, 3, 5]))
    norm(torch.randn(3, 6)).square().sum().backward()
    assert norm.weight.grad is not None
    assert norm.weight.grad[[1, 4]].tolist() == [0.0, 0.0]
    assert bool((norm.weight.grad[[0, 2, 3, 5]] != 0).all())


def test_copies_of_masked_models_are_plain_and_other_attributes_stay() -> None:
    model = nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), nn.Linear(6, 2)).eval()
    model[1].whole = "a note"
    mask = torch.ones(6, 3).index_fill(0, torch.tensor([1, 2]), 0.0)
    dense = nni_topo.to_dense(model, torch.randn(2, 3), {"0": {"weight": mask}})
    assert (type(dense[1]), dense[1].whole) == (nn.LayerNorm, "a note")
