"""Gradient steps under autocast to bfloat16."""

from __future__ import annotations

import copy

import pytest
import torch
from distill_nets import batches, pair
from torch import nn

import nni_topo
from nni_topo.errors import ConfigError
from nni_topo.network.runtime.precision import check_precision, computing_in


class Attends(nn.Module):
    """Two blocks of attention over five places."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.read, self.write = nn.Linear(8, 24), nn.Linear(8, 8)
            self.seen = []

        def forward(self, states):
            heads = self.read(states).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            found = nn.functional.scaled_dot_product_attention(*heads)
            self.seen.append((heads.dtype, found.dtype))
            return states + self.write(found.transpose(1, 2).flatten(2))

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([self.Block(), self.Block()])
        self.head = nn.Linear(8, 4)

    def forward(self, states):
        for block in self.blocks:
            states = block(states)
        return self.head(states.mean(1))


def shifted(net):
    """Return a copy with other weights, which has something to learn."""
    other = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return other


def test_steps_round_and_what_judges_does_not():
    original = Attends().eval()
    dense = shifted(original)
    images = list(torch.randn(256, 5, 8, generator=torch.Generator().manual_seed(2)).split(64))
    known = {"steps": 30, "lr": 2e-3, "blend": False, "held_out": images[:1]}
    exact, rounded = (
        nni_topo.distillation(dense, original, images[1:], precision=each, **known) for each in ("float32", "bfloat16")
    )
    assert rounded.loss_before == exact.loss_before
    assert rounded.is_kept
    assert rounded.loss_after == pytest.approx(exact.loss_after, rel=0.1)
    assert not torch.equal(rounded.model.head.weight, exact.model.head.weight)
    assert {each.dtype for each in rounded.model.parameters()} == {torch.float32}
    assert {each.grad for each in rounded.model.parameters()} == {None}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.quick_every(2)
def test_networks_in_other_precisions_learn_in_bfloat16(dtype):
    torch.manual_seed(0)
    parts = [nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 8)) for _ in range(2)]
    original = nn.Sequential(*parts, nn.LayerNorm(8), nn.Linear(8, 4)).to(dtype).eval()
    images = list(torch.randn(256, 8, generator=torch.Generator().manual_seed(2)).to(dtype).split(64))
    found = nni_topo.distillation(
        shifted(original.double()).to(dtype), original.to(dtype), images, steps=30, precision="bfloat16"
    )
    assert found.is_kept
    assert {each.dtype for each in found.model.parameters()} == {dtype}


def test_other_precisions_and_devices_without_autocast_are_refused():
    dense, original = pair()
    with pytest.raises(
        ConfigError, match="precision must be a known name, got 'float16'; did you mean bfloat16, float32"
    ):
        nni_topo.distill(dense, original, batches(), precision="float16")
    with pytest.raises(ConfigError, match="without autocast, got 'bfloat16' on meta"):
        check_precision("bfloat16", torch.device("meta"), "distill")
    check_precision("float32", torch.device("meta"), "distill")
    with computing_in("float32", torch.device("meta")):
        assert not torch.is_autocast_enabled("cpu")
    with pytest.raises(ConfigError, match="precision must be"):
        nni_topo.shrink(original, batches(), {"flops": 0.5}, distill={"precision": "half"})
