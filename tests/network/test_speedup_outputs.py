"""Modules that give several tensors: NNI's own speedup passes them."""

from __future__ import annotations

import pytest
import torch
from nni.compression.speedup import ModelSpeedup
from speedup_nets import filter_mask, same_output
from torch import nn

from nni_topo.speedup import masked_model


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(10, 10)
        self.other = nn.Linear(10, 10)

    def forward(self, x):
        return self.one(x), (x, torch.relu(self.other(x)))


class AroundAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(10, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)


MODULES = {
    "lstm": lambda: nn.LSTM(10, 10, batch_first=True),
    "attention": AroundAttention,
    "pair": Pair,
}


class Around(nn.Module):
    """A module on sequences between an unrelated pair of layers before it and one behind it."""

    def __init__(self, name):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(4, 8)
        self.before = nn.Linear(8, 10)
        self.module = MODULES[name]()
        self.inner = nn.Linear(10, 12)
        self.outer = nn.Linear(12, 3)

    def forward(self, x):
        x = self.before(torch.relu(self.embed(x)))
        y = self.module(x)
        y = y[1][1] if isinstance(self.module, Pair) else y[0]
        return self.outer(torch.relu(self.inner(x + y)))


@pytest.mark.parametrize("name", MODULES)
def test_nnis_own_speedup_passes_a_module_of_several_tensors(name):
    model, inputs = Around(name).eval(), torch.rand(2, 6, 4, generator=torch.Generator().manual_seed(0))
    mask = filter_mask(model.inner, range(6))["weight"]
    masks = {"inner": {"weight": mask, "bias": mask[:, 0].clone()}}
    reference = masked_model(model, inputs, masks)
    dense = ModelSpeedup(model, inputs, masks).speedup_model()
    assert (dense.inner.out_features, dense.outer.in_features) == (6, 6)
    same_output(dense, reference, inputs)
