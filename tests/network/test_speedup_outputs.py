"""Modules that give several tensors: recurrent ones, attention, custom ones; they stay whole, the rest shrinks."""

from __future__ import annotations

import pytest
import torch
from nni.compression.speedup import ModelSpeedup
from speedup_nets import filter_mask, same_output
from torch import nn

from nni_topo.speedup import masked_model, to_dense


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


class Cells(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(10, 10)

    def forward(self, x):
        return self.cell(x[:, 1], self.cell(x[:, 0]))


MODULES = {
    "lstm": lambda: nn.LSTM(10, 10, batch_first=True),
    "attention": AroundAttention,
    "gru cell": Cells,
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
        if isinstance(self.module, Pair):
            y = y[1][1]
        elif isinstance(self.module, Cells):
            y = y.unsqueeze(1)
        else:
            y = y[0]
        return self.outer(torch.relu(self.inner(x + y)))


@pytest.mark.parametrize("name", MODULES)
def test_layers_around_a_module_of_several_tensors_shrink(name):
    model, inputs = Around(name).eval(), torch.rand(2, 6, 4, generator=torch.Generator().manual_seed(0))
    masks = {"embed": filter_mask(model.embed, [0, 3, 5]), "inner": filter_mask(model.inner, range(6))}
    dense = to_dense(model, inputs, masks)
    assert (dense.embed.out_features, dense.before.in_features) == (5, 5)
    assert (dense.inner.out_features, dense.outer.in_features) == (6, 6)
    same_output(dense, masked_model(model, inputs, masks), inputs)


@pytest.mark.parametrize("name", ["lstm", "attention", "pair"])
def test_nnis_own_speedup_passes_a_module_of_several_tensors(name):
    model, inputs = Around(name).eval(), torch.rand(2, 6, 4, generator=torch.Generator().manual_seed(0))
    mask = filter_mask(model.inner, range(6))["weight"]
    masks = {"inner": {"weight": mask, "bias": mask[:, 0].clone()}}
    reference = masked_model(model, inputs, masks)
    dense = ModelSpeedup(model, inputs, masks).speedup_model()
    assert (dense.inner.out_features, dense.outer.in_features) == (6, 6)
    same_output(dense, reference, inputs)


class Pooled(nn.Module):
    """Pooling with indices, and its inverse."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.pool = nn.MaxPool2d(2, return_indices=True)
        self.inner = nn.Conv2d(8, 6, 1)
        self.tail = nn.Conv2d(6, 2, 1)

    def forward(self, x):
        x, _ = self.pool(torch.relu(self.first(x)))
        return self.tail(torch.relu(self.inner(x))).mean((2, 3))


def test_pooling_with_indices_passes_masks_on():
    model, inputs = Pooled().eval(), torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    masks = {"first": filter_mask(model.first, [1, 2]), "inner": filter_mask(model.inner, [0])}
    dense = to_dense(model, inputs, masks)
    assert (dense.first.out_channels, dense.inner.in_channels, dense.inner.out_channels) == (6, 6, 5)
    same_output(dense, masked_model(model, inputs, masks), inputs)
