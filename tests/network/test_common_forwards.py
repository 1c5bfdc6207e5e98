"""What forwards of other packages do beside computing: mask by minus infinity."""

from __future__ import annotations

import math

import pytest
import torch
from speedup_nets import same_output
from torch import nn

import nni_topo

IDS = torch.randint(0, 50, (64, 12), generator=torch.Generator().manual_seed(0))


class Language(nn.Module):
    """A causal language model, whose mask is a buffer, a plain attribute, or an input with the padding."""

    def __init__(self, place, value):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.place, self.value = nn.Embedding(50, 32), place, value
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True) for _ in range(2))
        self.head = nn.Linear(32, 50)
        mask = torch.full((12, 12), value).triu(1)
        if place == "buffer":
            self.register_buffer("mask", mask, persistent=False)
        elif place == "attribute":
            self.mask = mask

    def forward(self, ids, padding=None):
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=padding) if self.place == "input" else layer(x, src_mask=self.mask)
        return self.head(x)

    def inputs(self):
        if self.place != "input":
            return {"ids": IDS}
        padding = torch.zeros(64, 12)
        padding[::3, 9:] = self.value
        return {"ids": IDS, "padding": padding}


@pytest.mark.parametrize("place", ["buffer", "attribute", "input"])
def test_a_mask_of_minus_infinity_gives_the_network_that_a_large_negative_one_gives(place):
    shrunk = {}
    for value in (-math.inf, -1e9):
        model = Language(place, value).eval()
        inputs = model.inputs()
        batches = [{name: part[at : at + 16] for name, part in inputs.items()} for at in range(0, 64, 16)]
        shrunk[value] = nni_topo.shrink(model, batches, {"flops": 0.7}, distill=False, progress=False)
    hidden = [layer.linear1.out_features for layer in shrunk[-math.inf].layers]
    assert max(hidden) < 64
    assert hidden == [layer.linear1.out_features for layer in shrunk[-1e9].layers]
    few = {name: part[:3] for name, part in model.inputs().items()}
    same_output(shrunk[-math.inf], shrunk[-1e9], *few.values())


def test_an_infinite_input_of_a_layer_is_an_error_that_names_the_layer():
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)).eval()
    images = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    images[20, 0] = -math.inf
    with pytest.raises(nni_topo.errors.DataError, match=r"must be finite, .*\(0\.weight\)"):
        nni_topo.shrink(model, images.split(16), {"flops": 0.5}, distill=False, progress=False)
