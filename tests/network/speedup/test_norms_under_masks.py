"""Networks that were trained with removed channels as zeros in their norms."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import nni_topo

ROWS = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("norm", [lambda: nn.LayerNorm(512), lambda: nn.GroupNorm(2, 512), lambda: nn.RMSNorm(512)])
def test_kept_constants_bring_norms_near_those_that_see_zeros(norm) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 512), norm(), nn.Tanh(), nn.Linear(512, 5)).eval()
    with torch.no_grad():
        for parameter in model[1].parameters():
            parameter.uniform_(0.5, 1.5)
    before = copy.deepcopy(model.state_dict())
    mask = torch.ones(512, 8)
    mask[torch.arange(512) % 8 < 5] = 0
    masks = {"0": {"weight": mask, "bias": mask[:, 0]}}
    wrapped = copy.deepcopy(model)
    with torch.no_grad():  # as NNI's pruner masks: the norm sees zeros
        wrapped[0].weight.mul_(mask)
        wrapped[0].bias.mul_(mask[:, 0])
        kept = mask[:, 0].bool()
        hidden = wrapped[2](wrapped[1](wrapped[0](ROWS)))[:, kept]
        wanted = hidden @ wrapped[3].weight[:, kept].T + wrapped[3].bias
        plain = nni_topo.to_dense(model, ROWS, masks)
        near = nni_topo.to_dense(model, ROWS, masks, constants="keep")
        lost = [
            float((dense[3](dense[2](dense[1](dense[0](ROWS)))) - wanted).square().mean()) for dense in (plain, near)
        ]
    assert type(near[1]) is type(model[1])
    assert lost[1] < 0.1 * lost[0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
