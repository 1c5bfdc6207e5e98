"""A pruned network and its original, images and tokens for distillation."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import softmax


class Narrow(nn.Module):
    """Gives logits, a tuple, a dict or features, with a hidden layer of any width."""

    def __init__(self, width, form="logits", *, norm=False):
        super().__init__()
        torch.manual_seed(width)
        self.first = nn.Linear(6, width)
        self.norm = nn.BatchNorm1d(width) if norm else nn.Identity()
        self.head = nn.Linear(width, 4)
        self.drop = nn.Dropout(0.5)
        self.form = form

    def forward(self, inputs):
        hidden = torch.relu(self.norm(self.first(inputs)))
        found = self.head(self.drop(hidden))
        if self.form == "tokens":
            return found.unflatten(1, (2, 2))
        kinds = {"tuple": (found, hidden[:, :2]), "dict": {"boxes": found, "count": 3}, "named": {"logits": found}}
        return kinds.get(self.form, found)


def inputs(count=96, seed=0):
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


def batches(count=96):
    return list(inputs(count).split(32))


def pair(form="logits", **traits):
    return Narrow(4, form, **traits).eval(), Narrow(16, form, **traits).eval()


def divergence(model, original, images, temperature=2.0):
    """Kullback-Leibler divergence, written out."""
    with torch.no_grad():
        mine = softmax(model.eval()(images).double() / temperature, 1)
        theirs = softmax(original.eval()(images).double() / temperature, 1)
    return float((theirs * (theirs.log() - mine.log())).sum(1).mean()) * temperature**2
