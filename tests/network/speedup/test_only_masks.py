"""Values that happen to be zero or constant mask nothing: only masks do."""

from __future__ import annotations

import pytest
import torch
from speedup_nets import filter_mask, same_output
from torch import nn

from nni_topo.speedup import masked_model, to_dense


class Words(nn.Module):
    """Word, position and segment embeddings, a mask of padding, and an inner layer of twelve."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(11, 10, padding_idx=0)
        self.positions = nn.Embedding(7, 10)
        self.segments = nn.Embedding(2, 10)
        self.norm = nn.LayerNorm(10)
        self.inner = nn.Linear(10, 12)
        self.outer = nn.Linear(12, 10)
        self.head = nn.Linear(10, 3)
        self.register_buffer("order", torch.arange(7)[None])

    def forward(self, ids, segments=None, padding=None):
        segments = torch.zeros_like(ids) if segments is None else segments
        x = self.words(ids) + self.positions(self.order[:, : ids.shape[1]]) + self.segments(segments)
        x = self.norm(x)
        if padding is not None:
            x = x * padding.unsqueeze(-1)
        return self.head((x + self.outer(torch.relu(self.inner(x)))).mean(1))


IDS = torch.randint(1, 11, (2, 7), generator=torch.Generator().manual_seed(0))
ZEROS = torch.zeros_like(IDS)
CALLS = {
    "left out": (IDS,),
    "zero": (IDS, ZEROS),
    "padded": (IDS * (torch.arange(7) < 4), ZEROS, (torch.arange(7) < 4).float().repeat(2, 1)),
    "only padding": (ZEROS, ZEROS, torch.zeros(2, 7)),
}


@pytest.mark.parametrize("name", ["left out", "zero", "only padding"])
def test_constant_ids_mask_nothing(name):
    model, inputs = Words().eval(), CALLS[name]
    masks = {"inner": filter_mask(model.inner, range(0, 12, 2))}
    dense = to_dense(model, inputs, masks)
    assert dense.inner.out_features == dense.outer.in_features == 6
    assert dense.segments.weight.shape == (2, 10)
    others = CALLS["padded"][: len(inputs)]
    same_output(dense, masked_model(model, others, masks), *others)


@pytest.mark.parametrize("name", ["left out", "zero"])
def test_masked_embeddings_shrink_with_constant_ids(name):
    model, inputs = Words().eval(), CALLS[name]
    model.norm = nn.Identity()
    masks = {
        layer: filter_mask(model.get_submodule(layer), []) for layer in ("words", "positions", "segments", "outer")
    }
    for layer, targets in masks.items():
        targets["weight"].transpose(0, int(layer != "outer"))[[1, 4]] = 0
    dense = to_dense(model, inputs, masks)
    assert [dense.words.embedding_dim, dense.positions.embedding_dim, dense.segments.embedding_dim] == [8, 8, 8]
    assert dense.inner.in_features == dense.head.in_features == 8
    others = CALLS["padded"][: len(inputs)]
    same_output(dense, masked_model(model, others, masks), *others)


class Scaled(nn.Module):
    """Branches that start at zero: a layer scale, a norm's weight, a whole layer, and a gate that is closed."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.stem = nn.Conv2d(3, 10, 3, padding=1)
        self.inner = nn.Conv2d(10, 8, 1)
        self.outer = nn.Conv2d(8, 10, 1)
        self.norm = nn.BatchNorm2d(10)
        self.scale = nn.Parameter(torch.ones(10, 1, 1))
        self.gate = nn.Parameter(torch.ones(()))
        self.drop = nn.Dropout(1.0)
        self.head = nn.Linear(10, 4)
        for zeroed in {
            "scale": [self.scale],
            "gate": [self.gate],
            "norm": [self.norm.weight, self.norm.bias],
            "layer": [self.outer.weight, self.outer.bias],
        }.get(kind, []):
            nn.init.zeros_(zeroed)
        if kind == "dead":
            nn.init.constant_(self.inner.bias, -1e3)

    def forward(self, x):
        x = self.stem(x)
        y = self.norm(self.outer(torch.relu(self.inner(x)))) * self.scale * self.gate
        if self.kind == "dropout":
            y = y + self.drop(x)
        if self.kind == "full":
            y = y + torch.zeros(x.shape[0], 10, 1, 1)
        return self.head((x + y).mean((2, 3)))


KINDS = ["scale", "gate", "norm", "layer", "dead", "dropout", "full"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.quick_every(3)
def test_zero_branches_mask_nothing(kind):
    model, inputs = Scaled(kind).eval(), (torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)),)
    masks = {"inner": filter_mask(model.inner, [0, 3, 5])}
    dense = to_dense(model, inputs, masks)
    assert dense.inner.out_channels == dense.outer.in_channels == 5
    assert dense.stem.out_channels == dense.outer.out_channels == dense.head.in_features == 10
    same_output(dense, masked_model(model, inputs, masks), *inputs)
    # trained on, the branch counts again: nothing of it may be lost
    for module in (model, dense):
        with torch.no_grad():
            for parameter in (module.scale, module.gate, module.norm.weight):
                parameter.add_(1.0)
    same_output(dense, masked_model(model, inputs, masks), *inputs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.quick_every(3)
def test_channels_over_zero_branches_shrink(kind):
    model, inputs = Scaled(kind).eval(), (torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)),)
    masks = {"stem": filter_mask(model.stem, [1, 2]), "outer": filter_mask(model.outer, [1, 2])}
    if kind == "full":
        # a constant of the forward isn't cut, so that its channels stay
        dense = to_dense(model, inputs, masks)
        assert dense.stem.out_channels == 10
        return
    dense = to_dense(model, inputs, masks)
    assert dense.stem.out_channels == dense.outer.out_channels == dense.head.in_features == 8
    same_output(dense, masked_model(model, inputs, masks), *inputs)
