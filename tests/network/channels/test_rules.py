"""The rules of operators, on their own: where the channels of layers go, which are coupled and which are kept.

A dry run stands behind the rules, so a network comes out right even if one of them is wrong, and only keeps more than
it has to. Here the rules stand alone.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention as attended

from nni_topo.network.channels.ids import FIXED
from nni_topo.network.graph.nodes import owner_of
from nni_topo.network.runtime.inputs import tensors_of
from nni_topo.network.speedup.analysis import Analysis

WIDTHS = {"a": 4, "b": 4, "c": 8, "d": 2}
IMAGES = torch.randn(3, 2, 6, generator=torch.Generator().manual_seed(0))


class Given:
    """What a function is called with: the images, (3, 2, 6), parameters of the model's own, and outputs of layers.

    The first letter of a layer's name says how many channels it gives, ``n.a`` is (3, 4, 6).
    """

    def __init__(self, owner, x):
        self.owner, self.x, self.count = owner, x, 0

    def __getattr__(self, name):
        return self.owner.part(name, lambda: nn.Conv1d(2, WIDTHS[name[0]], 1))(self.x)

    def p(self, *shape):
        self.count += 1
        return self.owner.part(f"p{self.count}", lambda: nn.Parameter(torch.randn(shape)))


class Called(nn.Module):
    """A function of layers that it names."""

    def __init__(self, function):
        super().__init__()
        self.function, self.two = function, 2
        self(IMAGES)

    def part(self, name, make):
        if not hasattr(self, name):
            setattr(self, name, make())
        return getattr(self, name)

    def forward(self, x):
        return self.function(Given(self, x))


class AllCalled(nn.Module):
    """Functions in one graph, each with layers of its own."""

    def __init__(self, functions):
        super().__init__()
        self.calls = nn.ModuleList(map(Called, functions))

    def forward(self, x):
        return tuple(call(x) for call in self.calls)


def rows(z):
    return z.transpose(1, 2)


def heads(z):
    """Return heads of two channels: (samples, heads, pixels, 2)."""
    return z.unflatten(1, (-1, 2)).transpose(2, 3)


def pairs(z):
    """Return images with neighbouring channels coupled: (samples, heads, 2, pixels)."""
    apart = z.unflatten(1, (-1, 2))
    return apart + apart.flip(2)


def written(z, place, value):
    z[place] = value
    return z


# By what they do: functions of what `Given` holds, and what becomes of the channels. First the shape of each output,
# with 1 where its channels don't differ, and the channels there: ``a0`` is the first of layer ``a``, ``a*`` stands for
# all of its channels in their order, ``0`` for one that stays. Then layers of which channels are coupled or kept, the
# latter with the kinds of reasons; parameters with the dimension of their channels; blocks of which equally many
# channels have to stay; and what is noted of the operations.
CALLS = {
    "what meets place by place": {
        "sum": (lambda n: n.a + n.b, "1x4x1: a*; b: a*"),
        "sum by a method": (lambda n: n.a.add(n.b, alpha=2), "1x4x1: a*; b: a*"),
        "sum by a method in place": (lambda n: n.a.add_(n.b), "1x4x1: a*; b: a*"),
        "sum with constants": (lambda n: n.a + n.x.repeat(1, 2, 1), "1x4x1: 0*; a: 0* joins_constant"),
        "one for each head": (
            lambda n: pairs(n.c) * n.a.unsqueeze(2),
            "1x4x2x1: c0 c0 c2 c2 c4 c4 c6 c6; c: c0 c0 c2 c2 c4 c4 c6 c6; a: c0 c2 c4 c6",
        ),
        "no rule": (lambda n: torch.hypot(n.a, n.b), "1x4x1: a*; b: a*; guessed"),
        "product with a parameter": (lambda n: n.a * n.p(4)[:, None], "1x4x1: a*; p1 in 0: a*"),
        "max of two": (lambda n: torch.max(n.a, n.b), "1x4x1: a*; b: a*"),
        "max": (lambda n: n.a.max(2)[0], "1x4: a*"),
        "where": (lambda n: torch.where(n.a > 0, n.a, n.b), "1x4x1: a*; b: a*"),
        "heads of whose channels one goes": (
            lambda n: pairs(n.c).softmax(2),
            "1x4x2x1: c0 c0 c2 c2 c4 c4 c6 c6; c: c0 c0 c2 c2 c4 c4 c6 c6",
        ),
        "heads": (lambda n: pairs(n.c).softmax(1), "1x4x2x1: 0*; c: 0* result_depends"),
        "gate of a layer with one channel": (
            lambda n: n.a * n.owner.part("e", lambda: nn.Conv1d(2, 1, 1))(n.x),
            "1x4x1: a*",
        ),
    },
    "what is joined": {
        "channels": (lambda n: torch.cat([n.a, n.b], 1), "1x8x1: a* b*"),
        "pixels": (lambda n: torch.cat([n.a, n.b], 2), "1x4x1: a*; b: a*"),
        "with constants": (lambda n: torch.cat([n.a, n.x], 1), "1x6x1: a* 0 0"),
        "stack": (lambda n: torch.stack([n.a, n.b]), "1x1x4x1: a*; b: a*"),
        "whole heads": (
            lambda n: torch.cat([pairs(n.c), pairs(n.a)], 1),
            "1x6x2x1: c0 c0 c2 c2 c4 c4 c6 c6 a0 a0 a2 a2; c: c0 c0 c2 c2 c4 c4 c6 c6; a: a0 a0 a2 a2",
        ),
        "channels of heads": (
            lambda n: torch.cat([n.c.unflatten(1, (2, -1)), n.a.unflatten(1, (2, -1))], 2),
            "1x2x6x1: c0 c1 c2 c3 c0 a1 c4 c5 c6 c7 c4 a3; a: c0 a1 c4 a3; "
            "equal moves: c0 c1 c2 c3 | c4 c5 c6 c7; equal moves: c0 a1 | c4 a3",
        ),
    },
    "what is padded": {
        "pixels": (lambda n: functional.pad(n.a, (1, 2)), "1x4x1: a*"),
        "channels": (lambda n: functional.pad(n.a, (0, 0, 1, 2)), "1x7x1: 0 a* 0 0"),
        "rows": (lambda n: functional.pad(rows(n.a), (2, 0)), "1x1x6: 0 0 a*"),
    },
    "what is viewed": {
        "as another": (lambda n: rows(n.a).view_as(rows(n.b)), "1x1x4: a*"),
        "fixed": (lambda n: n.a.view(3, 4, 6), "1x4x1: 0*; a: 0* fixed_sizes"),
        "flat": (
            lambda n: n.a.reshape(3, -1),
            "1x24: a0 a0 a0 a0 a0 a0 a1 a1 a1 a1 a1 a1 a2 a2 a2 a2 a2 a2 a3 a3 a3 a3 a3 a3",
        ),
        "flat rows": (lambda n: rows(n.a).reshape(-1, 4), "1x4: 0*; a: 0* fixed_sizes"),
        "rows of two": (lambda n: n.a.view(3, -1, 2, 6), "1x2x2x1: a0 a0 a2 a2; a: a0 a0 a2 a2"),
        "two rows of two": (lambda n: n.a.view(3, 2, 2, 6), "1x2x2x1: a*"),
        "rows of two of a sum": (
            lambda n: (n.a + n.b).view(3, -1, 2, 6),
            "1x2x2x1: a0 a0 a2 a2; a: a0 a0 a2 a2; b: a0 a0 a2 a2",
        ),
        "another's number": (lambda n: n.a.view(3, n.b.size(1), 6), "1x4x1: a*; b: a*; takes the width in 1, times 1"),
        "another's number of rows": (
            lambda n: n.c.view(3, n.b.size(1), 2, 6),
            "1x4x2x1: c0 c0 c2 c2 c4 c4 c6 c6; c: c0 c0 c2 c2 c4 c4 c6 c6; takes the width in 1, times 1",
        ),
    },
    "what is viewed as a fixed number of rows": {
        "view": (lambda n: n.a.view(3, 2, -1, 6), "1x2x2x1: a*; equal moves: a0 a1 | a2 a3"),
        "shuffle": (
            lambda n: functional.channel_shuffle(n.a, 2),
            "1x4x1: a0 a2 a1 a3; equal moves: a0 a1 | a2 a3",
        ),
        "unflattened": (lambda n: n.a.unflatten(1, (2, -1)), "1x2x2x1: a*; equal moves: a0 a1 | a2 a3"),
        "chunks of a shuffle": (
            lambda n: n.c.view(3, 2, -1, 6).transpose(1, 2).reshape(3, -1, 6).chunk(2, 1),
            "1x4x1: c0 c4 c1 c5; 1x4x1: c2 c6 c3 c7; equal moves: c0 c1 c2 c3 | c4 c5 c6 c7; "
            "equal moves: c0 c4 c1 c5 | c2 c6 c3 c7",
        ),
        "chunks of two layers": (
            lambda n: torch.cat([n.a, n.b], 1).view(3, 2, -1, 6).transpose(1, 2).reshape(3, -1, 6).chunk(2, 1),
            "1x4x1: a0 b0 a1 b1; 1x4x1: a2 b2 a3 b3; equal moves: a* | b*; equal moves: a0 a1 | a2 a3, b0 b1 | b2 b3",
        ),
        "counted by an attribute": (
            lambda n: n.a.view(3, n.owner.two, -1, 6),
            "1x2x2x1: a*; equal moves counted: a0 a1 | a2 a3",
        ),
        "uneven chunks": (
            lambda n: torch.cat([n.b, n.c], 1).chunk(4, 1),
            "1x3x1: b0 b1 b2; 1x3x1: b3 c0 c1; 1x3x1: c2 c3 c4; 1x3x1: c5 c6 c7; "
            "equal moves is_uneven: b0 b1 b2 | b3 c0 c1 | c2 c3 c4 | c5 c6 c7",
        ),
    },
    "what is split": {
        "channels": (lambda n: n.a.unbind(1)[0], "1x1: 0; a: 0* fixed_channels"),
        "by four": (
            lambda n: n.c.split(4, dim=1),
            "1x4x1: 0*; 1x4x1: 0 c5 c6 c7; c: 0 0 0 0 0 c5 c6 c7 fixed_channels",
        ),
        "pixels": (lambda n: n.c.split(3, 2), "1x8x1: c*; 1x8x1: c*"),
        "by another's number and the rest": (
            lambda n: n.c.split([n.b.size(1), 4], 1),
            "1x4x1: c0 c1 c2 c3; 1x4x1: 0*; c: c0 c1 c2 c3 0 0 0 0 fixed_channels; b: c0 c1 c2 c3",
        ),
        "by those of two": (
            lambda n: n.c.split([n.b.size(1), n.a.size(1)], 1),
            "1x4x1: c0 c1 c2 c3; 1x4x1: c4 c5 c6 c7; b: c0 c1 c2 c3; a: c4 c5 c6 c7",
        ),
        "by another's number": (
            lambda n: n.c.split(n.b.size(1), 1),
            "1x4x1: c0 c1 c2 c3; 1x4x1: c4 c5 c6 c7; takes the width in 1, times 1",
        ),
        "two chunks": (
            lambda n: n.c.chunk(2, 1),
            "1x4x1: c0 c1 c2 c3; 1x4x1: c4 c5 c6 c7; equal moves: c0 c1 c2 c3 | c4 c5 c6 c7",
        ),
        "three chunks": (
            lambda n: n.c.chunk(3, 1),
            "1x3x1: c0 c1 c2; 1x3x1: c3 c4 c5; 1x2x1: c6 c7; equal moves: c0 c1 c2 | c3 c4 c5 | c6 c7 0",
        ),
        "chunks of samples": (lambda n: n.a.chunk(2), "1x4x1: a*; 1x4x1: a*"),
        "chunks of a sum": (
            lambda n: torch.cat([n.a, n.a + n.b], 1).chunk(2, 1),
            "1x4x1: a*; 1x4x1: a*; b: a*; equal moves: a* | a*",
        ),
        "chunks of heads": (
            lambda n: n.c.view(3, -1, 2, 6).chunk(2, 1),
            "1x2x2x1: c0 c0 c2 c2; 1x2x2x1: c4 c4 c6 c6; c: c0 c0 c2 c2 c4 c4 c6 c6; equal moves: c0 c2 | c4 c6",
        ),
        "glu": (lambda n: functional.glu(n.c, 1), "1x4x1: c0 c1 c2 c3; c: c0 c1 c2 c3 c0 c1 c2 c3"),
    },
    "what is picked": {
        "narrow": (lambda n: n.a.narrow(1, 1, 2), "1x2x1: 0*; a: 0 0 0 a3 fixed_channels"),
        "narrow to the end": (lambda n: n.a.narrow(1, 1, 3), "1x3x1: 0*; a: 0* fixed_channels"),
        "narrow before the end": (lambda n: n.a.narrow(1, -3, 2), "1x2x1: 0*; a: 0* fixed_channels"),
        "select": (lambda n: n.a.select(1, 1), "1x1: 0; a: 0 0 a2 a3 fixed_channels"),
        "select from the end": (lambda n: n.a.select(dim=1, index=-1), "1x1: 0; a: a0 a1 a2 0 fixed_channels"),
        "slice": (lambda n: n.a[:, 1:3], "1x2x1: 0*; a: 0 0 0 a3 fixed_channels"),
        "slice to the second last": (lambda n: n.a[:, :-1], "1x3x1: a0 a1 a2; a: a0 a1 a2 0 fixed_channels"),
        "slice with steps": (lambda n: n.a[:, ::2], "1x2x1: 0*; a: 0* fixed_channels"),
        "one": (lambda n: n.a[:, 1], "1x1: 0; a: 0 0 a2 a3 fixed_channels"),
        "the first": (lambda n: n.a[:, 0], "1x1: 0; a: 0 a1 a2 a3 fixed_channels"),
        "rolled on": (lambda n: n.a.roll(1, 1), "1x4x1: 0 a0 a1 a2; a: a0 a1 a2 0 fixed_channels"),
        "rolled back": (lambda n: torch.roll(n.a, (-1, 2), (1, 2)), "1x4x1: a1 a2 a3 0; a: 0 a1 a2 a3 fixed_channels"),
        "rolled pixels": (lambda n: n.a.roll(1, -1), "1x4x1: a*"),
        "rolled flat": (lambda n: n.a.roll(6), "1x4x1: 0*; a: 0* fixed_channels"),
        "list": (lambda n: n.a[:, [0, 1]], "1x2x1: 0*; a: 0* fixed_channels"),
        "mask": (lambda n: n.a[:, torch.tensor([True, False, True, False])], "1x2x1: 0*; a: 0* fixed_channels"),
        "shape of the first": (lambda n: n.a.reshape(3, -1, *n.a[:, 0].shape[1:]), "1x4x1: a*"),
        "samples picked by value": (lambda n: rows(n.a)[n.x[:, 0, 0] > 0], "1x1x4: a*"),
        "pixels picked by value": (lambda n: n.a[:, :, n.x[0, 0].argsort()], "1x4x1: a*"),
        "channels picked by value": (
            lambda n: n.a[:, n.x[0, 0, :4].argsort()],
            "1x1x1: 0; a: 0* call_not_covered; guessed",
        ),
        "index_select": (lambda n: n.a.index_select(1, torch.tensor([1, 0])), "1x2x1: 0*; a: 0* fixed_channels"),
        "index_select by value": (lambda n: n.a.index_select(2, n.x[0, 0].argsort()), "1x4x1: a*"),
        "index_select of channels by value": (
            lambda n: n.a.index_select(1, n.x[0, 0, :4].argsort()),
            "1x1x1: 0; a: 0* call_not_covered",
        ),
        "gather by value": (lambda n: n.a.gather(2, n.a.argsort(2)), "1x4x1: a*"),
        "gather by an index that isn't expanded": (
            lambda n: rows(n.a).gather(1, n.x[:, :1, :4].long().clamp(0, 1)),
            "1x1x4: 0*; a: 0* joins_constant",
        ),
        "gather of some channels": (
            lambda n: rows(n.a).gather(1, n.x[:, :1, :3].long().clamp(0, 1)),
            "1x1x1: 0; a: 0* fixed_channels",
        ),
        "gather of channels by value": (
            lambda n: n.a.gather(1, n.x.long().clamp(0, 1)),
            "1x1x1: 0; a: 0* call_not_covered",
        ),
        "take_along_dim": (lambda n: rows(n.a).take_along_dim(n.x[:, :, :1].argsort(1), 1), "1x1x4: a*"),
        "take_along_dim of channels": (
            lambda n: n.a.take_along_dim(torch.tensor([2, 0])[None, :, None], 1),
            "1x2x1: 0*; a: 0* fixed_channels",
        ),
        "repeated": (lambda n: n.a.repeat_interleave(2, 1), "1x8x1: a0 a0 a1 a1 a2 a2 a3 a3"),
    },
    "what is expanded": {
        "as another": (lambda n: n.x[:, :1].expand_as(n.a), "1x4x1: a*"),
        "to the sizes of another": (lambda n: n.x[:, :1].expand(n.a.size()), "1x4x1: a*"),
        "to the channels of another": (lambda n: n.x[:, :1].expand(-1, n.a.shape[1], -1), "1x4x1: a*"),
        "to heads": (
            lambda n: n.x[:, :1, :, None].expand_as(heads(n.c)),
            "1x4x1x2: c0 c0 c2 c2 c4 c4 c6 c6; c: c0 c0 c2 c2 c4 c4 c6 c6",
        ),
        "to the number of heads": (
            lambda n: n.x[:, :1, :, None].expand(-1, heads(n.c).shape[1], -1, -1),
            "1x4x1x1: c0 c2 c4 c6; c: c0 c0 c2 c2 c4 c4 c6 c6",
        ),
        "to a fixed number": (lambda n: n.a * n.x[:, :1].expand(-1, 4, -1), "1x4x1: 0*; a: 0* joins_constant"),
        "along pixels": (lambda n: n.a[:, :, :1].expand(n.a.shape), "1x4x1: a*"),
        "repeated": (lambda n: n.x[:, :1].repeat(1, n.a.shape[1], 1), "1x4x1: a*"),
        "repeated twice": (lambda n: n.a * n.x.repeat(1, n.d.shape[1], 1), "1x4x1: 0*; a: 0* joins_constant"),
        "a parameter with other channels": (
            lambda n: n.p(6).expand(n.a.shape) + n.a,
            "1x4x1: a*; p1 in 0: 0*",
        ),
        "a parameter with these channels": (lambda n: n.p(4, 1).expand(n.a.shape) + n.a, "1x4x1: a*; p1 in 0: a*"),
        "a layer with one channel": (
            lambda n: n.a * n.owner.part("e", lambda: nn.Conv1d(2, 1, 1))(n.x).expand_as(n.a),
            "1x4x1: a*",
        ),
        "of several": (lambda n: torch.broadcast_tensors(n.x[:, :1], n.a), "1x4x1: a*; 1x4x1: a*"),
    },
    "what is scattered": {
        "rows": (
            lambda n: torch.zeros_like(rows(n.a)).scatter_add(
                1, n.x[:, 0].argsort(1)[..., None].expand_as(rows(n.a)), rows(n.b)
            ),
            "1x1x4: a*; b: a*",
        ),
        "numbers": (
            lambda n: rows(n.a).scatter(1, n.x[:, :1, :1].long().expand_as(rows(n.a)[:, :1]) * 0, 1.0),
            "1x1x4: a*",
        ),
        "some channels": (
            lambda n: rows(n.a).scatter(1, n.x[:, :1, :3].long() * 0, 1.0),
            "1x1x1: 0; a: 0* fixed_channels",
        ),
        "rows by number": (lambda n: rows(n.a).index_fill(1, n.x[0, 0].argsort()[:3], 1.0), "1x1x4: a*"),
        "reduced rows": (
            lambda n: rows(n.a).index_reduce(1, n.x[0, 0].argsort(), rows(n.b), "prod"),
            "1x1x4: a*; b: a*",
        ),
    },
    "what is written": {
        "a constant": (lambda n: written(n.a.clone(), (slice(None), 0), 0.0), "1x1x1: 0; a: 0* overwritten"),
        "a number into pixels": (lambda n: written(n.a.clone(), (..., slice(2, 4)), 0.5), "1x4x1: a*"),
        "a number into samples picked by value": (lambda n: written(n.a.clone(), n.x[:, 0, 0] > 0, 0.5), "1x4x1: a*"),
        "a number into pixels picked by value": (
            lambda n: written(n.a.clone(), (slice(None), slice(None), n.x[0, 0].argsort()[:2]), 0.5),
            "1x4x1: a*",
        ),
        "a number where channels say so": (lambda n: written(n.a.clone(), n.b < 0, 0.5), "1x4x1: a*; b: a*"),
        "a number where constants say so": (
            lambda n: written(n.a.clone(), n.x.repeat(1, 2, 1) < 0, 0.5),
            "1x4x1: 0*; a: 0* joins_constant",
        ),
        "all channels": (
            lambda n: written(n.a.clone(), (slice(None), slice(None), 0), n.b[:, :, 0]),
            "1x4x1: a*; b: a*",
        ),
        "some channels of each head": (
            lambda n: written(heads(n.c).clone(), (..., slice(0, 1)), heads(n.c)[..., 1:]),
            "1x4x1x1: c0 c2 c4 c6; c: c0 c0 c2 c2 c4 c4 c6 c6",
        ),
        "some channels": (
            lambda n: written(n.a.clone(), (slice(None), slice(0, 2)), n.b[:, :2]),
            "1x1x1: 0; a: 0* overwritten; b: 0 0 b2 b3 overwritten",
        ),
        "rows": (
            lambda n: written(rows(n.a).clone(), (n.x[:, 0] > -9,), rows(n.b)[n.x[:, 0] > -9]),
            "1x1x4: a*; b: a*",
        ),
        "by row": (lambda n: rows(n.a)[0].index_add(0, n.x[0, 0].argsort(), rows(n.b)[0]), "1x4: a*; b: a*"),
    },
    "what is multiplied": {
        "sum over channels": (lambda n: rows(n.a) @ n.b, "1x1x1: 0; b: a*"),
        "by pixels": (lambda n: n.a @ rows(n.x), "1x4x1: a*"),
        "by pixels of constants first": (lambda n: n.x @ rows(n.a), "1x1x4: a*"),
        "by pixels of two": (lambda n: n.a @ rows(n.b), "1x4x1: a*; b: 0* call_not_covered"),
        "matrix of ones own": (lambda n: n.p(4, 4) @ n.a, "1x1x1: 0; p1 in 1: a*"),
        "matrix of ones own over pixels": (lambda n: n.a @ n.p(6, 5), "1x4x1: a*; p1 in 1: 0*"),
        "matrices of heads with values": (
            lambda n: (heads(n.c) @ heads(n.c2).transpose(2, 3)) @ heads(n.c3),
            "1x4x1x2: c0 c0 c2 c2 c4 c4 c6 c6; c: c0 c0 c2 c2 c4 c4 c6 c6; c2: c0 c0 c2 c2 c4 c4 c6 c6; "
            "c3: c0 c0 c2 c2 c4 c4 c6 c6",
        ),
        "heads with constants of each": (
            lambda n: heads(n.c) @ n.x.repeat(1, 2, 1).unsqueeze(2).expand(-1, -1, 2, -1),
            "1x1x1x1: 0; c: 0* heads_stay",
        ),
        "added product of rows": (lambda n: torch.baddbmm(n.x[:, :1, :1], n.a, rows(n.x)), "1x4x1: a*"),
        "added to rows": (lambda n: torch.baddbmm(n.b[:, :, :2], n.a, rows(n.x)), "1x4x1: b*; a: b*"),
        "mm": (lambda n: torch.mm(n.a[0].T, n.p(4, 5)), "1x1: 0; p1 in 0: a*"),
        "mm of rows": (lambda n: n.a[0].mm(n.x[0].T), "4x1: a*"),
        "addmm": (lambda n: torch.addmm(n.x[0, 0, :5], n.a[0].T, n.p(4, 5)), "1x1: 0; p1 in 0: a*"),
        "addmm by name": (
            lambda n: torch.addmm(mat2=n.p(4, 5), mat1=n.a[0].T, input=n.x[0, 0, :5]),
            "1x1: 0; p1 in 0: a*",
        ),
        "tensordot": (lambda n: torch.tensordot(rows(n.a), n.p(4, 5), dims=1), "1x1x1: 0; p1 in 0: a*"),
        "tensordot of given dimensions": (
            lambda n: torch.tensordot(n.a, n.b, dims=([0, 1], [0, 1])),
            "1x1: 0; b: a*",
        ),
        "tensordot of pixels": (lambda n: torch.tensordot(n.a, n.x, ([0, 2], [0, 2])), "4x1: a*"),
        "inner": (lambda n: torch.inner(rows(n.a)[0], rows(n.b)[0]), "1x1: 0; b: a*"),
        "outer": (lambda n: torch.outer(n.a[0, :, 0], n.x[0, 0]), "4x1: a*"),
        "linear": (lambda n: functional.linear(rows(n.a), n.p(4, 4)), "1x1x1: 0; p1 in 1: a*; summed"),
        "rows of a matrix of ones own": (
            lambda n: n.p(4, 2) @ n.x + n.a,
            "1x4x1: p1.0 p1.1 p1.2 p1.3; a: p1.0 p1.1 p1.2 p1.3; p1 in 0: p1.0 p1.1 p1.2 p1.3",
        ),
        "columns of a matrix of ones own": (
            lambda n: rows(n.x) @ n.p(2, 4) + rows(n.a),
            "1x1x4: p1.0 p1.1 p1.2 p1.3; a: p1.0 p1.1 p1.2 p1.3; p1 in 1: p1.0 p1.1 p1.2 p1.3",
        ),
    },
    "what attends": {
        "heads": (
            lambda n: attended(heads(n.c), heads(n.c2), heads(n.c3)),
            "1x4x1x2: c0 c0 c2 c2 c4 c4 c6 c6; c: c0 c0 c2 c2 c4 c4 c6 c6; c2: c0 c0 c2 c2 c4 c4 c6 c6; "
            "c3: c0 c0 c2 c2 c4 c4 c6 c6",
        ),
        "heads with a mask": (
            lambda n: attended(heads(n.c), heads(n.c2), heads(n.c3), n.x[:, :1, None] > 0),
            "1x4x1x2: c0 c0 c2 c2 c4 c4 c6 c6; c: c0 c0 c2 c2 c4 c4 c6 c6; c2: c0 c0 c2 c2 c4 c4 c6 c6; "
            "c3: c0 c0 c2 c2 c4 c4 c6 c6",
        ),
        "heads with a bias": (
            lambda n: attended(heads(n.c), heads(n.c2), heads(n.c3), attn_mask=n.a[:, :, None]),
            "1x4x1x2: c0 c0 c2 c2 c4 c4 c6 c6; c: c0 c0 c2 c2 c4 c4 c6 c6; c2: c0 c0 c2 c2 c4 c4 c6 c6; "
            "c3: c0 c0 c2 c2 c4 c4 c6 c6; a: c0 c2 c4 c6",
        ),
        "heads with groups": (
            lambda n: attended(heads(n.c), heads(n.a), heads(n.a2), enable_gqa=True),
            "1x4x1x2: c0 c0 c0 c0 c4 c4 c4 c4; c: c0 c0 c0 c0 c4 c4 c4 c4; a: c0 c0 c4 c4; a2: c0 c0 c4 c4",
        ),
        "one head": (
            lambda n: attended(rows(n.a), rows(n.b), rows(n.c)),
            "1x1x1: 0; a: 0* one_head; b: 0* one_head; c: 0* one_head",
        ),
        "weighs channels": (
            lambda n: attended(n.c.unflatten(1, (4, 2)), n.c2.unflatten(1, (4, 2)), n.c3.unflatten(1, (4, 2))),
            "1x4x1x1: c0 c2 c4 c6; c: c0 c0 c2 c2 c4 c4 c6 c6; c2: c0 c0 c2 c2 c4 c4 c6 c6; "
            "c3: c0 c0 c2 c2 c4 c4 c6 c6",
        ),
        "channels of one head": (
            lambda n: attended(n.a, n.b, n.b2),
            "1x1x1: 0; a: 0* call_not_covered; b: 0* call_not_covered; b2: 0* call_not_covered",
        ),
    },
    "what is summed by letters": {
        "outputs in another order": (lambda n: torch.einsum("bcl->lcb", n.a), "1x4x1: a*"),
        "dots": (lambda n: torch.einsum("b...,b...->b...", n.a, n.b), "1x4x1: a*; b: a*"),
        "constants with the letter": (
            lambda n: torch.einsum("bcl,bck->blk", n.a, n.x.repeat(1, 2, 1)),
            "1x1x1: 0; a: 0* call_not_covered",
        ),
        "summed": (lambda n: torch.einsum("bcl->bl", n.a), "1x1: 0; summed"),
        "heads and values": (
            lambda n: torch.einsum(
                "bhqk,bhkc->bhqc", torch.einsum("bhqc,bhkc->bhqk", heads(n.c), heads(n.c2)), heads(n.c3)
            ),
            "1x4x1x2: c0 c0 c2 c2 c4 c4 c6 c6; c: c0 c0 c2 c2 c4 c4 c6 c6; c2: c0 c0 c2 c2 c4 c4 c6 c6; "
            "c3: c0 c0 c2 c2 c4 c4 c6 c6",
        ),
        "heads with what all share": (
            lambda n: torch.einsum("bhqc,kc->bhqk", heads(n.c), rows(n.b)[0, :, :2]),
            "1x4x1x1: c0 c2 c4 c6; c: c0 c0 c2 c2 c4 c4 c6 c6; b: 0 0 b2 b3 call_not_covered",
        ),
    },
    "windows": {
        "unfold": (
            lambda n: functional.unfold(n.c.unflatten(2, (2, 3)), 2),
            "1x32x1: c0 c0 c0 c0 c1 c1 c1 c1 c2 c2 c2 c2 c3 c3 c3 c3 c4 c4 c4 c4 c5 c5 c5 c5 c6 c6 c6 c6 c7 c7 c7 c7",
        ),
        "windows of pixels": (lambda n: n.a.unfold(2, 2, 2), "1x4x1x1: a*"),
        "fold": (
            lambda n: functional.fold(n.c, (3, 4), 2),
            "1x2x1x1: c0 c4; c: c0 c0 c0 c0 c4 c4 c4 c4",
        ),
        "pool of pixels": (lambda n: functional.max_pool1d(n.a, 2), "1x4x1: a*"),
        "sampled": (
            lambda n: functional.grid_sample(
                n.a.unflatten(2, (2, 3)),
                n.x[:, None, :, None, 0].expand(3, 5, 2, 1).transpose(2, 3),
                align_corners=False,
            ),
            "1x4x1x1: a*",
        ),
        "sampled at places that a layer makes": (
            lambda n: functional.grid_sample(n.a.unflatten(2, (2, 3)), n.b[:, None, None, :2, 0], align_corners=False),
            "1x4x1x1: a*; b: 0 0 b2 b3 call_not_covered",
        ),
        "sampled by heads": (
            lambda n: functional.grid_sample(
                heads(n.c)[0].transpose(1, 2).unflatten(2, (2, 3)), heads(n.c2)[0][:, None], align_corners=False
            ),
            "4x1x1x1: c0 c2 c4 c6; c: c0 c0 c2 c2 c4 c4 c6 c6; c2: c0 c0 c2 c2 c4 c4 c6 c6",
        ),
    },
    "filters of ones own": {
        "by channel with a bias": (
            lambda n: functional.conv1d(n.a, n.p(4, 1, 3), n.p(4), padding=1, groups=n.a.shape[1]),
            "1x4x1: a*; p1 in 0: a*; p2 in 0: a*",
        ),
        "with a fixed number of groups": (
            lambda n: functional.conv1d(n.a, n.p(4, 1, 3), groups=4),
            "1x1x1: 0; a: 0* fixed_channels; p1 in 2: 0*",
        ),
    },
    "what is made": {
        "ones": (lambda n: n.a * torch.ones(1, n.a.size(1), 1), "1x4x1: a*"),
        "new": (lambda n: n.b.new_zeros(n.a.size(1), 2), "4x1: a*"),
        "of two layers": (lambda n: torch.zeros(n.a.size(1), n.b.size(1)), "4x1: a*"),
        "of heads": (lambda n: torch.zeros(heads(n.c).size(1), 3), "4x1: c0 c2 c4 c6; c: c0 c0 c2 c2 c4 c4 c6 c6"),
        "as many as there are": (lambda n: n.a * torch.ones(1, 4, 1), "1x4x1: 0*; a: 0* joins_constant"),
        "values for each channel": (
            lambda n: n.a * torch.arange(n.a.size(1)).view(-1, 1),
            "1x4x1: 0*; a: 0* joins_constant",
        ),
    },
    "what slides along channels": {
        "a convolution": (
            lambda n: n.owner.part("e", lambda: nn.Conv1d(1, 1, 3, padding=1))(n.a.mean(2)[:, None]),
            "1x1x4: a*",
        ),
        "a circular convolution": (
            lambda n: n.owner.part("e", lambda: nn.Conv1d(1, 1, 3, padding=1, padding_mode="circular"))(
                n.a.mean(2)[:, None]
            ),
            "1x1x1: e*; a: a0 a0 a0 a0",
        ),
    },
    "along dimensions": {
        "normalize": (lambda n: functional.normalize(n.a), "1x4x1: a*; summed"),
        "cumsum": (lambda n: n.a.cumsum(1), "1x4x1: a*; summed"),
        "index_fill of a pixel": (lambda n: n.a.index_fill(2, torch.tensor([0]), 1.0), "1x4x1: a*"),
        "rms_norm of pixels": (lambda n: functional.rms_norm(n.a, (6,)), "1x4x1: a*"),
        "pool with the places": (
            lambda n: functional.max_pool1d(n.a, 2, return_indices=True),
            "1x4x1: a*; 1x4x1: a*; guessed",
        ),
    },
    "what is multiplied in two or five dimensions": {
        "rows": (lambda n: n.a[:, None, None] @ rows(n.x)[:, None, None], "1x1x1x4x1: a*"),
        "rows of a weight of ones own": (
            lambda n: n.owner.part("e", lambda: nn.Linear(4, 8)).weight @ n.a + n.c,
            "1x8x1: weight.0 weight.1 weight.2 weight.3 weight.4 weight.5 weight.6 weight.7; "
            "a: 0* call_not_covered; "
            "c: weight.0 weight.1 weight.2 weight.3 weight.4 weight.5 weight.6 weight.7; "
            "weight in 0: weight.0 weight.1 weight.2 weight.3 weight.4 weight.5 weight.6 weight.7",
        ),
    },
    "matrices of heads": {
        "channels by channels": (
            lambda n: heads(n.c).mT @ heads(n.c2),
            "1x4x1x1: c0 c2 c4 c6; c: c0 c0 c2 c2 c4 c4 c6 c6; c2: c0 c0 c2 c2 c4 c4 c6 c6",
        ),
        "rows": (
            lambda n: heads(n.c).mT @ rows(n.x)[:, None],
            "1x4x2x1: c0 c0 c2 c2 c4 c4 c6 c6; c: c0 c0 c2 c2 c4 c4 c6 c6",
        ),
    },
    "what becomes complex": {
        "pairs": (
            lambda n: torch.view_as_complex(rows(n.c).unflatten(2, (4, 2)).contiguous()).real,
            "1x1x4: c0 c2 c4 c6; c: c0 c0 c2 c2 c4 c4 c6 c6",
        ),
        "and back": (
            lambda n: torch.view_as_real(torch.view_as_complex(rows(n.d).contiguous())),
            "1x1x1: d0; d: d0 d0",
        ),
    },
}


def followed(functions):
    """Send the channels of all layers through a graph of functions, and tell what becomes of them, by function."""
    torch.manual_seed(0)
    model = AllCalled(functions.values()).eval()
    flow = Analysis.on(model, IMAGES).flow
    names = {FIXED: "0"}
    for layer in flow.layers:
        for place, channel in enumerate(flow.channel_ids_of(layer).tolist()):
            names[channel] = f"{layer.rpartition('.')[2]}{place}"
    for name in flow.free_parameters:
        for place, channel in enumerate(flow.free_parameters[name].ids.tolist()):
            names[channel] = f"{name.rpartition('.')[2]}.{place}"

    def told(ids):
        text = " ".join(names[group_id] for group_id in flow.group_ids(ids).ravel().tolist())
        if set(text) == {"0", " "}:
            return "0*"
        for layer in flow.layers:
            whole = " ".join(names[channel] for channel in flow.channel_ids_of(layer).tolist())
            text = text.replace(whole, f"{layer.rpartition('.')[2]}*")
        return text

    outputs = iter(tensors_of(flow.ids["output"]))
    found = {}
    for at, (name, call) in enumerate(zip(functions, model.calls, strict=True)):
        owner, parts = f"calls.{at}", []
        for _ in tensors_of([call(IMAGES)]):
            ids = next(outputs).numpy()
            parts.append(f"{'x'.join(map(str, ids.shape))}: {told(ids)}")
        for layer in flow.layers:
            own = flow.channel_ids_of(layer)
            if layer.startswith(f"{owner}.") and (flow.group_ids(own) != own).any():
                kinds = [reason.kind for reason in flow.why_pinned(layer)]
                parts.append(" ".join([f"{layer.rpartition('.')[2]}:", told(own), *kinds]))
        for parameter, free in flow.free_parameters.items():
            if parameter.startswith(f"{owner}."):
                ids = free.ids
                parts.append(f"{parameter.rpartition('.')[2]} in {free.dim}: {told(ids)}")
        for blocks in flow.blocks:
            if blocks.place.endswith(f" in {owner}"):
                kinds = [kind for kind in ("moves", "may_vanish", "is_uneven", "counted") if getattr(blocks, kind)]
                sides = [" | ".join(map(told, side)) for side in blocks.sides]
                parts.append(" ".join(["equal", *kinds]) + ": " + ", ".join(sides))
        nodes = {node.name for node in flow.graph.nodes if owner_of(node) == owner}
        parts += ["summed"] * bool(flow.summed & nodes) + ["guessed"] * bool(flow.guessed & nodes)
        if owner in flow.foreign_widths():
            width = flow.foreign_widths()[owner]
            parts.append(f"takes {'a kept' if width.by_kept else 'the'} width in {width.dim}, times {width.times}")
        found[name] = "; ".join(parts)
    return found


# A few operations in one graph: fast to trace, and a failure says which.
AT_ONCE = 16
PARTS = [(kind, first) for kind, calls in CALLS.items() for first in range(0, len(calls), AT_ONCE)]


@pytest.mark.parametrize(("kind", "first"), PARTS)
def test_channels_go_where_the_operations_put_them(kind, first):
    calls = dict(list(CALLS[kind].items())[first : first + AT_ONCE])
    functions = {name: function for name, (function, _) in calls.items()}
    assert followed(functions) == {name: expected for name, (_, expected) in calls.items()}
