"""The rules of operators, on their own: where the channels of layers go, which are coupled and which are kept.

A dry run stands behind the rules, so a network comes out right even if one of them is wrong, and only keeps more than
it has to. Here the rules stand alone.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention as attended

from nni_topo.network.channels.ids import FIXED, carry, carry_reduced, staying
from nni_topo.network.channels.rules import _from_zero, picked_along_others
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
        "where of a condition": (lambda n: torch.where(n.a > 0)[0], "1: 0; a: 0* picked_by_value"),
        "sum": (lambda n: n.a + n.b, "1x4x1: a*; b: a*"),
        "sum with the input's first channel": (lambda n: n.a + n.x[:, :1], "1x4x1: a*"),
        "sum with constants": (lambda n: n.a + n.x.repeat(1, 2, 1), "1x4x1: 0*; a: 0* joins_constant"),
        "outer product": (lambda n: n.a.unsqueeze(2) * n.b.unsqueeze(1), "1x4x1x1: a*; b: 0* call_not_covered"),
        "outer product, the other way round": (
            lambda n: n.a.unsqueeze(1) * n.b.unsqueeze(2),
            "1x1x4x1: a*; b: 0* call_not_covered",
        ),
        "fewer dimensions": (lambda n: rows(n.a) + rows(n.b)[0], "1x1x4: a*; b: a*"),
        "fewer dimensions first": (lambda n: rows(n.a)[0] + rows(n.b), "1x1x4: a*; b: a*"),
        "one for each head": (
            lambda n: pairs(n.c) * n.a.unsqueeze(2),
            "1x4x2x1: c0 c0 c2 c2 c4 c4 c6 c6; c: c0 c0 c2 c2 c4 c4 c6 c6; a: c0 c2 c4 c6",
        ),
        "one for each head, first": (
            lambda n: n.a.unsqueeze(2) * pairs(n.c),
            "1x4x2x1: a0 a0 a1 a1 a2 a2 a3 a3; c: a0 a0 a1 a1 a2 a2 a3 a3",
        ),
        "no rule": (lambda n: torch.hypot(n.a, n.b), "1x4x1: a*; b: a*; guessed"),
        "no rule, parameter": (lambda n: torch.hypot(n.a, n.p(4)[:, None]), "1x4x1: a*; p1 in 0: a*; guessed"),
        "no rule, parameter as large": (
            lambda n: torch.hypot(n.a[0, :, 0], n.p(4)),
            "1: 0; a: 0* no_rule; p1 in 0: 0*; guessed",
        ),
        "product with a parameter": (lambda n: n.a * n.p(4)[:, None], "1x4x1: a*; p1 in 0: a*"),
        "two results": (lambda n: torch.frexp(n.a), "1x4x1: a*; 1x4x1: a*; guessed"),
        "max of two": (lambda n: torch.max(n.a, n.b), "1x4x1: a*; b: a*"),
        "min of two": (lambda n: n.a.min(n.b), "1x4x1: a*; b: a*"),
        "max": (lambda n: n.a.max(2)[0], "1x4: a*"),
        "where": (lambda n: torch.where(n.a > 0, n.a, n.b), "1x4x1: a*; b: a*"),
        "type of another": (lambda n: n.a.type_as(n.b), "1x4x1: a*"),
        "to": (lambda n: n.a.to(n.b), "1x4x1: a*"),
        "lerp": (lambda n: torch.lerp(n.a, n.b, 0.5), "1x4x1: a*; b: a*"),
        "nonzero": (lambda n: n.a.nonzero(), "1x1: 0; a: 0* picked_by_value"),
        "heads of whose channels one goes": (
            lambda n: pairs(n.c).softmax(2),
            "1x4x2x1: c0 c0 c2 c2 c4 c4 c6 c6; c: c0 c0 c2 c2 c4 c4 c6 c6",
        ),
        "heads": (lambda n: pairs(n.c).softmax(1), "1x4x2x1: 0*; c: 0* result_depends"),
        "trapezoids": (lambda n: torch.trapezoid(n.a, n.b), "1x1: 0; a: 0* call_not_covered; b: 0* call_not_covered"),
        "one for each head of the same channels": (
            lambda n: n.c.unflatten(1, (4, 2))[:, :1].expand(-1, 4, -1, -1) * n.a.unsqueeze(2),
            "1x1x2x1: c0 c1; a: 0* call_not_covered",
        ),
        "differences of rows": (lambda n: rows(n.a).diff(dim=1), "1x1x1: 0; a: 0* call_not_covered"),
        "product with a parameter as large": (lambda n: n.a[0, :, 0] * n.p(4), "4: a*; p1 in 0: a*"),
        "where, with a parameter": (
            lambda n: torch.where(n.x[0, 0, :1] > 0, n.p(4), n.a[0, :, 0]),
            "4: a*; p1 in 0: a*",
        ),
        "max, with a parameter": (lambda n: torch.max(n.p(4), n.a[0, :, 0]), "4: a*; p1 in 0: a*"),
        "gate of a layer with one channel": (
            lambda n: n.a * n.owner.part("e", lambda: nn.Conv1d(2, 1, 1))(n.x),
            "1x4x1: a*",
        ),
        "gate of one channel of a layer": (lambda n: n.a * n.b[:, :1], "1x4x1: a*; b: 0 b1 b2 b3 fixed_channels"),
        "gate of a constant": (lambda n: n.a * n.x[:, :1], "1x4x1: a*"),
        "stack at the second last": (lambda n: torch.stack([n.a, n.b], -2), "1x4x1x1: a*; b: a*"),
        "stack at the third last": (lambda n: torch.stack([n.a, n.b], -3), "1x1x4x1: a*; b: a*"),
    },
    "what is joined": {
        "channels": (lambda n: torch.cat([n.a, n.b], 1), "1x8x1: a* b*"),
        "pixels": (lambda n: torch.cat([n.a, n.b], 2), "1x4x1: a*; b: a*"),
        "pixels from the end": (lambda n: torch.cat([n.a, n.b], dim=-1), "1x4x1: a*; b: a*"),
        "samples": (lambda n: torch.cat([n.a, n.b]), "1x4x1: a*; b: a*"),
        "channels from the end": (lambda n: torch.cat([n.c, n.a], -2), "1x12x1: c* a*"),
        "rows": (lambda n: torch.cat([rows(n.a), rows(n.b)], 1), "1x1x4: a*; b: a*"),
        "with constants": (lambda n: torch.cat([n.a, n.x], 1), "1x6x1: a* 0 0"),
        "stack": (lambda n: torch.stack([n.a, n.b]), "1x1x4x1: a*; b: a*"),
        "stack before channels": (lambda n: torch.stack([n.a, n.b], 1), "1x1x4x1: a*; b: a*"),
        "stack at the end": (lambda n: torch.stack([n.a, n.b], dim=-1), "1x4x1x1: a*; b: a*"),
        "whole heads": (
            lambda n: torch.cat([pairs(n.c), pairs(n.a)], 1),
            "1x6x2x1: c0 c0 c2 c2 c4 c4 c6 c6 a0 a0 a2 a2; c: c0 c0 c2 c2 c4 c4 c6 c6; a: a0 a0 a2 a2",
        ),
        "channels of heads": (
            lambda n: torch.cat([n.c.unflatten(1, (2, -1)), n.a.unflatten(1, (2, -1))], 2),
            "1x2x6x1: c0 c1 c2 c3 c0 a1 c4 c5 c6 c7 c4 a3; a: c0 a1 c4 a3; "
            "equal moves: c0 c1 c2 c3 | c4 c5 c6 c7; equal moves: c0 a1 | c4 a3",
        ),
        "nothing": (lambda n: torch.cat([n.a, n.b[:, :0]], 1), "1x4x1: a*"),
        "coupled channels": (
            lambda n: torch.cat([torch.cat([n.a, n.a.flip(1)], 1), n.c], 2),
            "1x8x1: a* a3 a2 a1 a0; c: a* a3 a2 a1 a0",
        ),
        "pixels of one head each": (
            lambda n: torch.cat(
                [
                    pairs(n.a).flatten(1, 2) + pairs(n.a).flip(1).flatten(1, 2),
                    pairs(n.b).flatten(1, 2) + pairs(n.b).flip(1).flatten(1, 2),
                ],
                2,
            ),
            "1x4x1: a0 a0 a0 a0; a: a0 a0 a0 a0; b: a0 a0 a0 a0",
        ),
        "one alone": (lambda n: torch.cat([n.a], 2), "1x4x1: a*"),
    },
    "what is padded": {
        "pixels": (lambda n: functional.pad(n.a, (1, 2)), "1x4x1: a*"),
        "channels": (lambda n: functional.pad(n.a, (0, 0, 1, 2)), "1x7x1: 0 a* 0 0"),
        "both, with ones": (lambda n: functional.pad(n.a, (1, 0, 1, 2), "constant", 1.0), "1x7x1: 0 a* 0 0"),
        "samples": (lambda n: functional.pad(n.a, (0, 0, 0, 0, 1, 0)), "1x4x1: a*"),
        "rows": (lambda n: functional.pad(rows(n.a), (2, 0)), "1x1x6: 0 0 a*"),
        "channels by copies": (
            lambda n: functional.pad(n.a, (0, 0, 1, 1), mode="replicate"),
            "1x1x1: 0; a: 0* call_not_covered",
        ),
        "pixels by copies": (lambda n: functional.pad(n.a, (1, 1), mode="replicate"), "1x4x1: a*"),
        "pixels by copies, by position": (lambda n: functional.pad(n.a, (1, 1), "replicate"), "1x4x1: a*"),
        "without the first channel": (lambda n: functional.pad(n.a, (0, 0, -1, 0)), "1x1x1: 0; a: 0* call_not_covered"),
        "without the last channel": (lambda n: functional.pad(n.a, (0, 0, 1, -1)), "1x1x1: 0; a: 0* call_not_covered"),
        "without a pixel": (lambda n: functional.pad(n.a, (-1, 0)), "1x4x1: a*"),
        "by another layer's number": (lambda n: functional.pad(n.a, (0, 0, 0, 1), value=n.b.shape[1]), "1x5x1: a* 0"),
        "channels by copies, by position": (
            lambda n: functional.pad(n.a, (0, 0, 1, 1), "replicate"),
            "1x1x1: 0; a: 0* call_not_covered",
        ),
        "one pixel": (lambda n: functional.pad(n.a[:, :, :1], (1, 1)), "1x4x1: a*"),
        "pixels in a circle": (lambda n: functional.pad(n.a, (1, 1), mode="circular"), "1x4x1: a*"),
        "pixels by another's number": (lambda n: functional.pad(n.a, (0, n.b.shape[2])), "1x4x1: a*"),
        "nothing by copies": (lambda n: functional.pad(n.a, (0, 0, 0, 0), mode="replicate"), "1x4x1: a*"),
        "pixels and no channels by copies": (lambda n: functional.pad(n.a, (1, 1, 0, 0), mode="reflect"), "1x4x1: a*"),
    },
    "what is viewed": {
        "as another": (lambda n: rows(n.a).view_as(rows(n.b)), "1x1x4: a*"),
        "fixed": (lambda n: n.a.view(3, 4, 6), "1x4x1: 0*; a: 0* fixed_sizes"),
        "fixed tuple": (lambda n: n.a.view((3, 4, 6)), "1x4x1: 0*; a: 0* fixed_sizes"),
        "fixed by name": (lambda n: torch.reshape(n.a, shape=(3, 4, 6)), "1x4x1: 0*; a: 0* fixed_sizes"),
        "fixed pixels": (lambda n: n.a.view(3, -1, 6), "1x4x1: a*"),
        "own shape": (lambda n: n.a.reshape(n.a.shape), "1x4x1: a*"),
        "own sizes": (lambda n: n.a.reshape(n.a.size(0), n.a.size(1), 3, 2), "1x4x1x1: a*"),
        "flat": (
            lambda n: n.a.reshape(3, -1),
            "1x24: a0 a0 a0 a0 a0 a0 a1 a1 a1 a1 a1 a1 a2 a2 a2 a2 a2 a2 a3 a3 a3 a3 a3 a3",
        ),
        "flat rows": (lambda n: rows(n.a).reshape(-1, 4), "1x4: 0*; a: 0* fixed_sizes"),
        "rows of two": (lambda n: n.a.view(3, -1, 2, 6), "1x2x2x1: a0 a0 a2 a2; a: a0 a0 a2 a2"),
        "rows of two at the end": (lambda n: rows(n.a).reshape(3, 6, -1, 2), "1x1x2x2: a0 a0 a2 a2; a: a0 a0 a2 a2"),
        "two rows of two": (lambda n: n.a.view(3, 2, 2, 6), "1x2x2x1: a*"),
        "rows of two of a sum": (
            lambda n: (n.a + n.b).view(3, -1, 2, 6),
            "1x2x2x1: a0 a0 a2 a2; a: a0 a0 a2 a2; b: a0 a0 a2 a2",
        ),
        "another's number": (lambda n: n.a.view(3, n.b.size(1), 6), "1x4x1: a*; b: a*; takes the width in 1, times 1"),
        "another's number at the end": (
            lambda n: rows(n.a).reshape(3, 6, n.b.size(1)),
            "1x1x4: a*; b: a*; takes the width in 1, times 1",
        ),
        "another's number of rows": (
            lambda n: n.c.view(3, n.b.size(1), 2, 6),
            "1x4x2x1: c0 c0 c2 c2 c4 c4 c6 c6; c: c0 c0 c2 c2 c4 c4 c6 c6; takes the width in 1, times 1",
        ),
        "own number of what was turned round": (
            lambda n: rows(n.a).flip(2).reshape(3, 6, n.a.size(1)),
            "1x1x4: a3 a2 a1 a0",
        ),
        "unflattened to rows of two": (lambda n: n.a.unflatten(-2, (-1, 2)), "1x2x2x1: a0 a0 a2 a2; a: a0 a0 a2 a2"),
        "unflattened by name": (lambda n: n.a.unflatten(dim=1, sizes=(-1, 2)), "1x2x2x1: a0 a0 a2 a2; a: a0 a0 a2 a2"),
        "unflattened pixels": (lambda n: n.a.unflatten(2, (2, 3)), "1x4x1x1: a*"),
        "unflattened by a shape": (
            lambda n: n.a.unflatten(1, n.b[:, :, :1].shape[1:]),
            "1x4x1x1: a*; b: a*; takes the width in 1, times 1",
        ),
        "twice another's number": (
            lambda n: n.c.view(3, n.b.size(1) * 2, 6),
            "1x8x1: c*; takes the width in 1, times 1",
        ),
        "another's number of samples": (lambda n: n.a.view(n.b.size(0), -1, 6), "1x4x1: a*"),
        "another's number of columns": (
            lambda n: n.a.view(3, rows(n.b).size(-1), 6),
            "1x4x1: a*; b: a*; takes the width in -1, times 1",
        ),
        "the number of two channels, of what stays": (
            lambda n: n.x.view(3, n.d.size(1), 6),
            "1x1x1: 0; takes a kept width in 1, times 1",
        ),
        "another's size": (lambda n: n.a.view(n.b.size()), "1x4x1: a*; b: a*; takes the width in 1, times 1"),
        "a line": (lambda n: n.a[0, :, 0].view(-1), "4: a*"),
        "flat, by a view": (
            lambda n: n.a.view(3, -1),
            "1x24: a0 a0 a0 a0 a0 a0 a1 a1 a1 a1 a1 a1 a2 a2 a2 a2 a2 a2 a3 a3 a3 a3 a3 a3",
        ),
        "as other numbers": (lambda n: torch.fft.fft(n.a).imag, "1x1x1: 0; a: 0* call_not_covered"),
    },
    "what is viewed as a fixed number of rows": {
        "view": (lambda n: n.a.view(3, 2, -1, 6), "1x2x2x1: a*; equal moves: a0 a1 | a2 a3"),
        "shuffle": (
            lambda n: functional.channel_shuffle(n.a, 2),
            "1x4x1: a0 a2 a1 a3; equal moves: a0 a1 | a2 a3",
        ),
        "at the end": (lambda n: rows(n.a).reshape(3, 6, 2, -1), "1x1x2x2: a*; equal moves: a0 a1 | a2 a3"),
        "of another's number": (
            lambda n: n.c.view(3, 2, n.b.size(1), 6),
            "1x2x4x1: c*; equal moves: c0 c1 c2 c3 | c4 c5 c6 c7; takes the width in 1, times 1",
        ),
        "unflattened": (lambda n: n.a.unflatten(1, (2, -1)), "1x2x2x1: a*; equal moves: a0 a1 | a2 a3"),
        "unflattened at the end": (
            lambda n: rows(n.a).unflatten(2, (2, -1)),
            "1x1x2x2: a*; equal moves: a0 a1 | a2 a3",
        ),
        "three": (lambda n: n.c.view(3, 2, 2, -1, 6), "1x2x2x2x1: c*"),
        "chunks of a shuffle": (
            lambda n: n.c.view(3, 2, -1, 6).transpose(1, 2).reshape(3, -1, 6).chunk(2, 1),
            "1x4x1: c0 c4 c1 c5; 1x4x1: c2 c6 c3 c7; equal moves: c0 c1 c2 c3 | c4 c5 c6 c7; "
            "equal moves: c0 c4 c1 c5 | c2 c6 c3 c7",
        ),
        "three chunks of a shuffle": (
            lambda n: n.c.view(3, 2, -1, 6).transpose(1, 2).reshape(3, -1, 6).chunk(3, 1),
            "1x3x1: 0*; 1x3x1: 0*; 1x2x1: 0*; c: 0* fixed_channels; equal moves: 0* | 0*",
        ),
        "chunks of two layers": (
            lambda n: torch.cat([n.a, n.b], 1).view(3, 2, -1, 6).transpose(1, 2).reshape(3, -1, 6).chunk(2, 1),
            "1x4x1: a0 b0 a1 b1; 1x4x1: a2 b2 a3 b3; equal moves: a* | b*; equal moves: a0 a1 | a2 a3, b0 b1 | b2 b3",
        ),
        "uneven chunks of two layers": (
            lambda n: torch.cat([n.a, n.b], 1).chunk(2, 1)[0],
            "1x4x1: a*; equal moves is_uneven: a* | b*",
        ),
        "uneven chunks": (
            lambda n: torch.cat([n.b, n.c], 1).chunk(4, 1),
            "1x3x1: b0 b1 b2; 1x3x1: b3 c0 c1; 1x3x1: c2 c3 c4; 1x3x1: c5 c6 c7; "
            "equal moves is_uneven: b0 b1 b2 | b3 c0 c1 | c2 c3 c4 | c5 c6 c7",
        ),
        "uneven chunks of unequal layers": (
            lambda n: torch.cat([n.a, n.c], 1).chunk(2, 1),
            "1x6x1: a* c0 c1; 1x6x1: c2 c3 c4 c5 c6 c7; equal moves is_uneven: a* c0 c1 | c2 c3 c4 c5 c6 c7",
        ),
        "of one pixel": (lambda n: n.a[:1, :, :1].view(1, 2, -1, 1), "1x2x2x1: a*; equal moves: a0 a1 | a2 a3"),
        "counted by an attribute": (
            lambda n: n.a.view(3, n.owner.two, -1, 6),
            "1x2x2x1: a*; equal moves counted: a0 a1 | a2 a3",
        ),
        "unequal rows of a number of samples": (
            lambda n: n.c.view(n.x.size(0), 2, -1, 6),
            "1x2x4x1: c*; equal moves: c0 c1 c2 c3 | c4 c5 c6 c7",
        ),
    },
    "what is split": {
        "places of pixels": (lambda n: n.a.unbind(2)[0], "1x4: a*"),
        "channels": (lambda n: n.a.unbind(1)[0], "1x1: 0; a: 0* fixed_channels"),
        "samples": (lambda n: n.a.unbind()[0], "1x4x1: a*"),
        "by three": (
            lambda n: n.c.split(3, 1),
            "1x3x1: 0*; 1x3x1: 0*; 1x2x1: 0 c7; c: 0 0 0 0 0 0 0 c7 fixed_channels",
        ),
        "by four": (
            lambda n: n.c.split(4, dim=1),
            "1x4x1: 0*; 1x4x1: 0 c5 c6 c7; c: 0 0 0 0 0 c5 c6 c7 fixed_channels",
        ),
        "by one": (lambda n: n.c.split(1, dim=1)[2], "1x1x1: 0; c: 0* fixed_channels"),
        "by all": (
            lambda n: n.c.split(8, dim=1),
            "1x8x1: 0 c1 c2 c3 c4 c5 c6 c7; c: 0 c1 c2 c3 c4 c5 c6 c7 fixed_channels",
        ),
        "by name": (
            lambda n: torch.split(n.c, split_size_or_sections=3, dim=1),
            "1x3x1: 0*; 1x3x1: 0*; 1x2x1: 0 c7; c: 0 0 0 0 0 0 0 c7 fixed_channels",
        ),
        "pixels": (lambda n: n.c.split(3, 2), "1x8x1: c*; 1x8x1: c*"),
        "given sizes": (lambda n: n.c.split([3, 5], 1), "1x3x1: 0*; 1x5x1: 0*; c: 0* fixed_channels"),
        "given sizes by name": (
            lambda n: torch.split(n.c, [3, 5], dim=-2),
            "1x3x1: 0*; 1x5x1: 0*; c: 0* fixed_channels",
        ),
        "by another's number and the rest": (
            lambda n: n.c.split([n.b.size(1), 4], 1),
            "1x4x1: c0 c1 c2 c3; 1x4x1: 0*; c: c0 c1 c2 c3 0 0 0 0 fixed_channels; b: c0 c1 c2 c3",
        ),
        "by those of two": (
            lambda n: n.c.split([n.b.size(1), n.a.size(1)], 1),
            "1x4x1: c0 c1 c2 c3; 1x4x1: c4 c5 c6 c7; b: c0 c1 c2 c3; a: c4 c5 c6 c7",
        ),
        "by another's and a computed number": (
            lambda n: n.c.split([n.b.size(1), n.c.size(1) - n.b.size(1)], 1),
            "1x4x1: c0 c1 c2 c3; 1x4x1: 0*; c: c0 c1 c2 c3 0 0 0 0 call_not_covered; b: c0 c1 c2 c3",
        ),
        "with sizes": (lambda n: n.c.split_with_sizes([2, 6], 1), "1x2x1: 0*; 1x6x1: 0*; c: 0* fixed_channels"),
        "by the input's number": (
            lambda n: n.c.split([n.x.size(1), 6], 1),
            "1x2x1: 0*; 1x6x1: 0*; c: 0* call_not_covered fixed_channels; takes a kept width in 1, times 1",
        ),
        "by another's number": (
            lambda n: n.c.split(n.b.size(1), 1),
            "1x4x1: c0 c1 c2 c3; 1x4x1: c4 c5 c6 c7; takes the width in 1, times 1",
        ),
        "rows by another's number": (
            lambda n: rows(n.c).split([n.b.size(1), 4], -1),
            "1x1x4: c0 c1 c2 c3; 1x1x4: 0*; c: c0 c1 c2 c3 0 0 0 0 fixed_channels; b: c0 c1 c2 c3",
        ),
        "tensor_split": (lambda n: n.c.tensor_split(3, 1), "1x3x1: 0*; 1x3x1: 0*; 1x2x1: 0*; c: 0* fixed_channels"),
        "tensor_split in two": (lambda n: n.c.tensor_split(2, 1), "1x4x1: c0 c1 c2 c3; 1x4x1: c4 c5 c6 c7"),
        "tensor_split at places": (
            lambda n: n.c.tensor_split([2, -1], 1),
            "1x2x1: 0*; 1x5x1: c2 c3 c4 c5 c6; 1x1x1: 0; c: 0 0 c2 c3 c4 c5 c6 0 fixed_channels",
        ),
        "tensor_split at both ends": (lambda n: n.c.tensor_split([0, 8], dim=1), "1x0x1: ; 1x8x1: c*; 1x0x1: "),
        "two chunks": (
            lambda n: n.c.chunk(2, 1),
            "1x4x1: c0 c1 c2 c3; 1x4x1: c4 c5 c6 c7; equal moves: c0 c1 c2 c3 | c4 c5 c6 c7",
        ),
        "three chunks": (
            lambda n: n.c.chunk(3, 1),
            "1x3x1: c0 c1 c2; 1x3x1: c3 c4 c5; 1x2x1: c6 c7; equal moves is_filled: c0 c1 c2 | c3 c4 c5 | c6 c7 0",
        ),
        "five chunks": (lambda n: n.c.chunk(5, 1), "1x2x1: 0*; 1x2x1: 0*; 1x2x1: 0*; 1x2x1: 0*; c: 0* fixed_channels"),
        "three chunks of rows": (
            lambda n: rows(n.c).chunk(3, -1),
            "1x1x3: c0 c1 c2; 1x1x3: c3 c4 c5; 1x1x2: c6 c7; equal moves is_filled: c0 c1 c2 | c3 c4 c5 | c6 c7 0",
        ),
        "two chunks of rows": (
            lambda n: rows(n.c).chunk(2, dim=-1),
            "1x1x4: c0 c1 c2 c3; 1x1x4: c4 c5 c6 c7; equal moves: c0 c1 c2 c3 | c4 c5 c6 c7",
        ),
        "four chunks of pixels": (
            lambda n: n.a.chunk(4, 2),
            "1x4x1: a*; 1x4x1: a*; 1x4x1: a*; equal moves: a* | a* | a*",
        ),
        "chunks by name": (
            lambda n: torch.chunk(n.c, chunks=2, dim=-2),
            "1x4x1: c0 c1 c2 c3; 1x4x1: c4 c5 c6 c7; equal moves: c0 c1 c2 c3 | c4 c5 c6 c7",
        ),
        "chunks of samples": (lambda n: n.a.chunk(2), "1x4x1: a*; 1x4x1: a*"),
        "chunks of two layers": (
            lambda n: torch.cat([n.a, n.b], 1).chunk(2, 1),
            "1x4x1: a*; 1x4x1: b*; equal moves: a* | b*",
        ),
        "chunks of a sum": (
            lambda n: torch.cat([n.a, n.a + n.b], 1).chunk(2, 1),
            "1x4x1: a*; 1x4x1: a*; b: a*; equal moves: a* | a*",
        ),
        "chunks of heads": (
            lambda n: n.c.view(3, -1, 2, 6).chunk(2, 1),
            "1x2x2x1: c0 c0 c2 c2; 1x2x2x1: c4 c4 c6 c6; c: c0 c0 c2 c2 c4 c4 c6 c6; equal moves: c0 c2 | c4 c6",
        ),
        "chunks of channels of heads": (
            lambda n: n.c.view(3, -1, 2, 6).chunk(2, 2),
            "1x4x1x1: c0 c2 c4 c6; 1x4x1x1: c0 c2 c4 c6; c: c0 c0 c2 c2 c4 c4 c6 c6; "
            "equal moves: c0 c2 c4 c6 | c0 c2 c4 c6",
        ),
        "three chunks of four heads": (lambda n: n.c.view(3, -1, 2, 6).chunk(3, 1)[0], "1x8x1: c*"),
        "chunks of one dimension": (lambda n: n.c[0, :, 0].chunk(2), "4: c0 c1 c2 c3; 4: c4 c5 c6 c7"),
        "glu": (lambda n: functional.glu(n.c, 1), "1x4x1: c0 c1 c2 c3; c: c0 c1 c2 c3 c0 c1 c2 c3"),
        "glu at the end": (lambda n: functional.glu(rows(n.c)), "1x1x4: c0 c1 c2 c3; c: c0 c1 c2 c3 c0 c1 c2 c3"),
        "glu by name": (lambda n: functional.glu(n.c, dim=-2), "1x4x1: c0 c1 c2 c3; c: c0 c1 c2 c3 c0 c1 c2 c3"),
        "glu of pixels": (lambda n: functional.glu(n.a), "1x4x1: a*"),
        "glu of a sum": (lambda n: functional.glu(torch.cat([n.a + n.b, n.a], 1), 1), "1x4x1: a*; b: a*"),
        "samples by two": (lambda n: n.a.split(2)[0], "1x4x1: a*"),
        "by another's number and two fixed ones": (
            lambda n: n.c.split([n.b.size(1), 2, 2], 1),
            "1x4x1: c0 c1 c2 c3; 1x2x1: 0*; 1x2x1: 0*; c: c0 c1 c2 c3 0 0 0 0 fixed_channels; b: c0 c1 c2 c3",
        ),
        "by another's number between fixed ones": (
            lambda n: n.c.split([2, n.b.size(1), 2], 1),
            "1x2x1: 0*; 1x4x1: c2 c3 c4 c5; 1x2x1: 0*; c: 0 0 c2 c3 c4 c5 0 0 fixed_channels; b: c2 c3 c4 c5",
        ),
        "by those of two, by name": (
            lambda n: torch.split(n.c, split_size_or_sections=[n.b.size(1), n.a.size(1)], dim=1),
            "1x4x1: c0 c1 c2 c3; 1x4x1: c4 c5 c6 c7; b: c0 c1 c2 c3; a: c4 c5 c6 c7",
        ),
        "by those of two, the method by name": (
            lambda n: n.c.split(split_size=[n.b.size(1), n.a.size(1)], dim=1),
            "1x4x1: c0 c1 c2 c3; 1x4x1: c4 c5 c6 c7; b: c0 c1 c2 c3; a: c4 c5 c6 c7",
        ),
        "with sizes of two, by name": (
            lambda n: n.c.split_with_sizes(split_sizes=[n.b.size(1), n.a.size(1)], dim=1),
            "1x4x1: c0 c1 c2 c3; 1x4x1: c4 c5 c6 c7; b: c0 c1 c2 c3; a: c4 c5 c6 c7",
        ),
        "pixels by another's number": (lambda n: n.c.split(n.b.size(1), 2), "1x8x1: c*; 1x8x1: c*"),
        "tensor_split in one": (lambda n: torch.cat([n.a, n.x[:, :1]], 1).tensor_split(1, 1)[0], "1x5x1: a* 0"),
        "chunks of two dimensions": (
            lambda n: n.a[:, :, 0].chunk(2, 1),
            "1x2: a0 a1; 1x2: a2 a3; equal moves: a0 a1 | a2 a3",
        ),
        "one chunk": (lambda n: n.c.chunk(1, 1)[0], "1x8x1: c*; equal moves: c*"),
        "module of glu": (
            lambda n: n.owner.part("glu", lambda: nn.GLU(1))(n.c),
            "1x4x1: c0 c1 c2 c3; c: c0 c1 c2 c3 c0 c1 c2 c3",
        ),
        "rows by those of two": (
            lambda n: rows(n.c).split([n.b.size(1), n.a.size(1)], dim=2),
            "1x1x4: c0 c1 c2 c3; 1x1x4: c4 c5 c6 c7; b: c0 c1 c2 c3; a: c4 c5 c6 c7",
        ),
        "a tuple of the numbers of two": (
            lambda n: n.c.split((n.b.size(1), n.a.size(1)), 1),
            "1x4x1: c0 c1 c2 c3; 1x4x1: c4 c5 c6 c7; b: c0 c1 c2 c3; a: c4 c5 c6 c7",
        ),
        "by another's number and the fixed rest": (
            lambda n: n.c.split([n.d.size(1), 6], 1),
            "1x2x1: c0 c1; 1x6x1: 0*; c: c0 c1 0 0 0 0 0 0 fixed_channels; d: c0 c1",
        ),
        "tensor_split in three of nine": (
            lambda n: torch.cat([n.c, n.x[:, :1]], 1).tensor_split(3, 1)[0],
            "1x3x1: c0 c1 c2",
        ),
        "tensor_split by name": (
            lambda n: torch.tensor_split(n.c, sections=3, dim=1)[0],
            "1x3x1: 0*; c: 0* fixed_channels",
        ),
        "tensor_split at places by name": (
            lambda n: torch.tensor_split(n.c, indices=(2,), dim=1)[0],
            "1x2x1: 0*; c: 0 0 c2 c3 c4 c5 c6 c7 fixed_channels",
        ),
        "module of glu at the end": (
            lambda n: n.owner.part("glu", lambda: nn.GLU())(rows(n.c)),
            "1x1x4: c0 c1 c2 c3; c: c0 c1 c2 c3 c0 c1 c2 c3",
        ),
        "with the input's number as a size": (
            lambda n: n.c.split_with_sizes([n.x.size(1), 6], 1),
            "1x2x1: 0*; 1x6x1: 0*; c: 0* call_not_covered fixed_channels; takes a kept width in 1, times 1",
        ),
    },
    "what is picked": {
        "narrow": (lambda n: n.a.narrow(1, 1, 2), "1x2x1: 0*; a: 0 0 0 a3 fixed_channels"),
        "narrow from the end": (lambda n: n.a.narrow(1, -3, 2), "1x2x1: 0*; a: 0* fixed_channels"),
        "narrow of the first": (lambda n: n.a.narrow(1, 0, 1), "1x1x1: 0; a: 0 a1 a2 a3 fixed_channels"),
        "narrow of all": (lambda n: n.a.narrow(1, 0, 4), "1x4x1: 0*; a: 0* fixed_channels"),
        "narrow to a computed end": (
            lambda n: n.c.narrow(1, 2, n.c.size(1) - 2),
            "1x6x1: c2 c3 c4 c5 c6 c7; c: 0 0 c2 c3 c4 c5 c6 c7 fixed_channels",
        ),
        "narrow by name": (
            lambda n: torch.narrow(n.a, dim=1, start=1, length=2),
            "1x2x1: 0*; a: 0 0 0 a3 fixed_channels",
        ),
        "select": (lambda n: n.a.select(1, 2), "1x1: 0; a: 0 0 0 a3 fixed_channels"),
        "select the last": (lambda n: n.a.select(1, -1), "1x1: 0; a: a0 a1 a2 0 fixed_channels"),
        "select for its shape": (lambda n: n.a.reshape(3, -1, *n.a.select(1, 0).shape[1:]), "1x4x1: a*"),
        "roll": (lambda n: n.a.roll(1, 1), "1x4x1: 0 a0 a1 a2; a: a0 a1 a2 0 fixed_channels"),
        "roll back": (lambda n: n.a.roll(-1, 1), "1x4x1: a1 a2 a3 0; a: 0 a1 a2 a3 fixed_channels"),
        "roll by nothing": (lambda n: n.a.roll(0, 1), "1x4x1: a*"),
        "roll of all": (lambda n: n.a.roll(1), "1x4x6: 0*; a: 0* fixed_channels"),
        "roll of none": (lambda n: n.a.roll(1, ()), "1x4x6: 0*; a: 0* fixed_channels"),
        "roll of pixels and channels": (
            lambda n: n.a.roll((2, -3), (2, -2)),
            "1x4x1: a3 0 0 0; a: 0 0 0 a3 fixed_channels",
        ),
        "roll by name": (
            lambda n: torch.roll(n.a, dims=1, shifts=1),
            "1x4x1: 0 a0 a1 a2; a: a0 a1 a2 0 fixed_channels",
        ),
        "slice": (lambda n: n.a[:, 1:3], "1x2x1: 0*; a: 0 0 0 a3 fixed_channels"),
        "slice from the first": (lambda n: n.a[:, 0:2], "1x2x1: 0*; a: 0 0 a2 a3 fixed_channels"),
        "slice from the second": (lambda n: n.a[:, 1:], "1x3x1: a1 a2 a3; a: 0 a1 a2 a3 fixed_channels"),
        "slice to the second last": (lambda n: n.a[:, :-1], "1x3x1: a0 a1 a2; a: a0 a1 a2 0 fixed_channels"),
        "slice beyond": (lambda n: n.a[:, -9:9], "1x4x1: a*"),
        "slice of all": (lambda n: n.a[:, -4:4], "1x4x1: a*"),
        "slice with steps": (lambda n: n.a[:, ::2], "1x2x1: 0*; a: 0* fixed_channels"),
        "slice with steps of one": (lambda n: n.a[:, 0:2:1], "1x2x1: 0*; a: 0 0 a2 a3 fixed_channels"),
        "one": (lambda n: n.a[:, 1], "1x1: 0; a: 0 0 a2 a3 fixed_channels"),
        "the last": (lambda n: n.a[:, -1], "1x1: 0; a: a0 a1 a2 0 fixed_channels"),
        "behind dots": (lambda n: n.a[..., 1, :], "1x1: 0; a: 0 0 a2 a3 fixed_channels"),
        "behind dots at the end": (lambda n: rows(n.a)[..., 1], "1x1: 0; a: 0 0 a2 a3 fixed_channels"),
        "before dots": (lambda n: n.a[0, 1, ...], "1: 0; a: 0 0 a2 a3 fixed_channels"),
        "behind a new dimension": (lambda n: n.a[:, None, 1], "1x1x1: 0; a: 0 0 a2 a3 fixed_channels"),
        "list": (lambda n: n.a[:, [0, 1]], "1x2x1: 0*; a: 0 0 a2 a3 fixed_channels"),
        "list from the end": (lambda n: n.a[:, [-2]], "1x1x1: 0; a: a0 a1 0 0 fixed_channels"),
        "list of truths": (lambda n: n.a[:, [True, False, True, False]], "1x2x1: 0*; a: 0* fixed_channels"),
        "places of two dimensions": (lambda n: n.a[[0, 1], [0, 1]], "2x1: 0*; a: 0 0 a2 a3 fixed_channels"),
        "tensor": (lambda n: n.a[:, torch.tensor([0, 1])], "1x2x1: 0*; a: 0 0 a2 a3 fixed_channels"),
        "mask": (lambda n: n.a[:, torch.tensor([True, False, True, False])], "1x2x1: 0*; a: 0* fixed_channels"),
        "mask before channels": (
            lambda n: n.a[torch.tensor([True, False, True]), 1],
            "1x1: 0; a: 0 0 a2 a3 fixed_channels",
        ),
        "mask over two dimensions": (
            lambda n: rows(n.a)[torch.ones(3, 6, dtype=torch.bool), 1],
            "1: 0; a: 0 0 a2 a3 fixed_channels",
        ),
        "mask over samples and channels": (
            lambda n: n.a[torch.ones(3, 4, dtype=torch.bool)],
            "12x1: 0*; a: 0* fixed_channels",
        ),
        "shape of the first": (lambda n: n.a.reshape(3, -1, *n.a[:, 0].shape[1:]), "1x4x1: a*"),
        "size of the last": (lambda n: n.a.reshape(n.a[:, -1].size(0), -1, 6), "1x4x1: a*"),
        "shape of the second": (
            lambda n: n.a.reshape(3, -1, *n.a[:, 1].shape[1:]),
            "1x4x1: 0 0 a2 a3; a: 0 0 a2 a3 fixed_channels",
        ),
        "type of the first": (lambda n: n.b.to(n.a[:, 0].dtype), "1x4x1: b*"),
        "samples picked by value": (lambda n: rows(n.a)[n.x[:, 0, 0] > 0], "1x1x4: a*"),
        "pixels picked by value": (lambda n: n.a[:, :, n.x[0, 0].argsort()], "1x4x1: a*"),
        "samples and pixels picked by value": (lambda n: rows(n.a)[n.x[:, 0] > 0], "1x4: a*"),
        "channels picked by value": (
            lambda n: n.a[:, n.x[0, 0, :4].argsort()],
            "1x1x1: 0; a: 0* call_not_covered; guessed",
        ),
        "pixels picked by a layer": (
            lambda n: n.a[:, :, n.b[0, :, 0].argsort()],
            "1x1x1: 0; a: 0* call_not_covered; b: 0* call_not_covered; guessed",
        ),
        "heads and pixels picked by value": (lambda n: n.a[:, None, ..., n.x[0, 0].argsort()], "1x1x4x1: a*"),
        "a pixel and samples picked by value": (lambda n: n.a[n.x[:, 0, 0].argsort(), :, 1], "1x4: a*"),
        "index_select": (lambda n: n.a.index_select(1, torch.tensor([1, 0])), "1x2x1: 0*; a: 0 0 a2 a3 fixed_channels"),
        "index_select of pixels": (lambda n: n.a.index_select(2, torch.tensor([1, 0])), "1x4x1: a*"),
        "index_select of nothing": (lambda n: n.a.index_select(1, torch.zeros(0, dtype=torch.int64)), "1x0x1: "),
        "index_select by value": (lambda n: n.a.index_select(2, n.x[0, 0].argsort()), "1x4x1: a*"),
        "index_select of channels by value": (
            lambda n: n.a.index_select(1, n.x[0, 0, :4].argsort()),
            "1x1x1: 0; a: 0* call_not_covered",
        ),
        "index_select of a table": (
            lambda n: torch.arange(9.0).view(3, 3).index_select(1, n.a[0, :, 0].relu().long()),
            "1x4: a*",
        ),
        "index_select of a table's rows": (
            lambda n: torch.arange(9.0).view(3, 3).index_select(-2, n.a[0, :, 0].relu().long()),
            "4x1: a*",
        ),
        "index_select of a parameter": (
            lambda n: n.p(4).index_select(0, n.a[0, :, 0].relu().long()),
            "1: 0; a: 0* call_not_covered; p1 in 0: 0*",
        ),
        "take by value": (lambda n: n.a.take(n.x[0, 0].argsort()), "1: 0; a: 0* call_not_covered; guessed"),
        "gather": (
            lambda n: n.a.gather(1, torch.zeros(3, 1, 6, dtype=torch.int64)),
            "1x1x1: 0; a: 0 a1 a2 a3 fixed_channels",
        ),
        "gather of pixels": (lambda n: n.a.gather(2, torch.zeros(3, 4, 2, dtype=torch.int64)), "1x4x1: a*"),
        "gather by value": (lambda n: n.a.gather(2, n.a.argsort(2)), "1x4x1: a*"),
        "gather of channels by value": (lambda n: n.a.gather(1, n.x.argsort(1)), "1x1x1: 0; a: 0* call_not_covered"),
        "take_along_dim": (
            lambda n: torch.take_along_dim(n.a, torch.ones(3, 1, 6, dtype=torch.int64), 1),
            "1x1x1: 0; a: 0 0 a2 a3 fixed_channels",
        ),
        "take_along_dim of pixels by value": (lambda n: torch.take_along_dim(n.a, n.a.argsort(2), dim=2), "1x4x1: a*"),
        "repeated": (lambda n: n.a.repeat_interleave(2, 1), "1x8x1: a0 a0 a1 a1 a2 a2 a3 a3"),
        "narrow from a computed start": (lambda n: n.c.narrow(1, n.b.size(1), 2), "1x2x1: c4 c5"),
        "select of pixels": (lambda n: n.a.select(2, 1), "1x4: a*"),
        "slice between": (lambda n: n.a[:, 1:-1], "1x2x1: a1 a2; a: 0 a1 a2 0 fixed_channels"),
        "one of samples picked by a matrix": (
            lambda n: n.a[torch.zeros(2, 2, dtype=torch.int64), 1],
            "1x1x1: 0; a: 0 0 a2 a3 fixed_channels",
        ),
        "one of samples by truths": (lambda n: n.a[[True, False, True], 1], "1x1: 0; a: 0 0 a2 a3 fixed_channels"),
        "index_select of one pixel by value": (
            lambda n: n.a[:, :, :1].index_select(2, n.x[0, 0].argsort() * 0),
            "1x4x1: a*",
        ),
        "take_along_dim of pixels": (
            lambda n: torch.take_along_dim(n.a, torch.ones(3, 4, 1, dtype=torch.int64), 2),
            "1x4x1: a*",
        ),
        "take_along_dim of channels by value": (
            lambda n: torch.take_along_dim(n.a, n.a.argsort(1), dim=1),
            "1x4x1: 0*; a: 0* result_depends",
        ),
        "one of pixels and channels between": (lambda n: n.a[:, 1:3, 2], "1x2: 0*; a: 0 0 0 a3 fixed_channels"),
        "channels between dots and pixels": (lambda n: n.a[..., 1:3, :], "1x2x1: 0*; a: 0 0 0 a3 fixed_channels"),
        "a pixel behind a new dimension": (lambda n: n.a[:, :, None, 1], "1x4x1: a*"),
        "places in a tuple": (lambda n: n.a[:, (0, 2)], "1x2x1: 0*; a: 0 0 0 a3 fixed_channels"),
        "places in nested lists": (
            lambda n: n.a[[[0, 1], [1, 0]], [[0, 1], [2, 0]]],
            "2x2x1: 0*; a: 0 0 0 a3 fixed_channels",
        ),
        "all but the first, from the end": (lambda n: n.a[:, -3:], "1x3x1: 0*; a: a0 0 0 0 fixed_channels"),
        "all but the last": (lambda n: n.a[:, :3], "1x3x1: 0*; a: 0 0 0 a3 fixed_channels"),
        "the first": (lambda n: n.a[:, 0], "1x1: 0; a: 0 a1 a2 a3 fixed_channels"),
        "narrow to the end": (lambda n: n.a.narrow(1, 2, 2), "1x2x1: 0*; a: 0* fixed_channels"),
        "narrow of pixels": (lambda n: n.a.narrow(2, 1, 2), "1x4x1: a*"),
        "select the second last": (lambda n: n.a.select(1, -2), "1x1: 0; a: a0 a1 0 0 fixed_channels"),
        "roll of channels and pixels": (
            lambda n: n.a.roll((1, 1), (1, 2)),
            "1x4x1: 0 a0 a1 a2; a: a0 a1 a2 0 fixed_channels",
        ),
        "roll from the end": (lambda n: n.a.roll(2, -2), "1x4x1: 0 0 a0 a1; a: a0 a1 0 0 fixed_channels"),
        "roll back by two": (lambda n: n.a.roll(-2, 1), "1x4x1: a2 a3 0 0; a: 0 0 a2 a3 fixed_channels"),
        "truths over two dimensions": (lambda n: n.a[[[True] * 4] * 3, 1], "12: 0*; a: 0* fixed_channels"),
        "one behind truths over two dimensions": (
            lambda n: rows(n.a)[[[True] * 6] * 3, 1],
            "1: 0; a: 0 0 a2 a3 fixed_channels",
        ),
    },
    "what is written": {
        "a constant": (lambda n: written(n.a.clone(), (slice(None), 0), 0.0), "1x1x1: 0; a: 0* overwritten"),
        "all channels": (
            lambda n: written(n.a.clone(), (slice(None), slice(None), 0), n.b[:, :, 0]),
            "1x4x1: a*; b: a*",
        ),
        "all channels, dots": (lambda n: written(n.a.clone(), (Ellipsis, 0), n.b[..., 0]), "1x4x1: a*; b: a*"),
        "all channels, one index": (lambda n: written(n.a.clone(), 0, n.b[0]), "1x4x1: a*; b: a*"),
        "some channels": (
            lambda n: written(n.a.clone(), (slice(None), slice(0, 2)), n.b[:, :2]),
            "1x1x1: 0; a: 0* overwritten; b: 0 0 b2 b3 overwritten",
        ),
        "some channels behind dots": (
            lambda n: written(rows(n.a).clone(), (Ellipsis, slice(0, 2)), rows(n.b)[..., :2]),
            "1x1x1: 0; a: 0* overwritten; b: 0 0 b2 b3 overwritten",
        ),
        "one channel": (
            lambda n: written(n.a.clone(), (slice(None), 0), n.b[:, 0]),
            "1x1x1: 0; a: 0* overwritten; b: 0 b1 b2 b3 overwritten",
        ),
        "rows": (
            lambda n: written(rows(n.a).clone(), (n.x[:, 0] > -9,), rows(n.b)[n.x[:, 0] > -9]),
            "1x1x4: a*; b: a*",
        ),
        "rows of one channel": (
            lambda n: written(rows(n.a).clone(), (n.x[:, 0] > -9, 0), rows(n.b)[n.x[:, 0] > -9][:, 0]),
            "1x1x1: 0; a: 0* overwritten; b: 0 b1 b2 b3 overwritten",
        ),
        "rows of all channels": (
            lambda n: written(rows(n.a).clone(), (n.x[:, 0] > -9, slice(None)), rows(n.b)[n.x[:, 0] > -9]),
            "1x1x4: a*; b: a*",
        ),
        "rows of fewer": (
            lambda n: written(rows(n.a).clone(), (n.x[:, 0] > -9,), rows(n.b)[n.x[:, 0] > -9][:, :1]),
            "1x1x1: 0; a: 0* overwritten; b: 0 b1 b2 b3 overwritten",
        ),
        "pixels picked by value": (
            lambda n: written(n.a.clone(), (slice(None), slice(None), n.x[0, 0].argsort()), n.b),
            "1x1x1: 0; a: 0* overwritten; b: 0* overwritten",
        ),
        "rows picked by channels": (
            lambda n: written(rows(n.a)[:, :4].clone(), (m := n.a2[:, :, 0] > -9,), rows(n.b)[:, :4][m]),
            "1x1x1: 0; a: 0* overwritten; a2: 0* call_not_covered; b: 0* call_not_covered; guessed",
        ),
        "by row": (lambda n: rows(n.a)[0].index_add(0, n.x[0, 0].argsort(), rows(n.b)[0]), "1x4: a*; b: a*"),
        "by row from the end": (
            lambda n: rows(n.a)[0].index_copy(-2, n.x[0, 0].argsort(), rows(n.b)[0]),
            "1x4: a*; b: a*",
        ),
        "by row by name": (
            lambda n: torch.index_add(rows(n.a)[0], dim=0, index=n.x[0, 0].argsort(), source=rows(n.b)[0]),
            "1x4: a*; b: a*",
        ),
        "by row, one of constants": (
            lambda n: rows(n.a)[0].index_add(0, n.x[0, 0].argsort(), n.x[0].t().repeat(1, 2)),
            "1x4: 0*; a: 0* joins_constant",
        ),
        "by column": (
            lambda n: rows(n.a)[0].index_add(1, n.x[0, 0, :4].argsort(), rows(n.b)[0]),
            "1x4: 0*; a: 0* joins_constant; b: 0* joins_constant",
        ),
        "by row with a factor": (
            lambda n: rows(n.a)[0].index_add(0, n.x[0, 0].argsort(), rows(n.b)[0], alpha=2),
            "1x4: a*; b: a*",
        ),
        "scattered": (
            lambda n: n.a.scatter(2, n.x.argsort(2).repeat(1, 2, 1), n.b),
            "1x4x1: 0*; a: 0* joins_constant; b: 0* joins_constant",
        ),
        "samples of rows": (
            lambda n: written(rows(n.a).clone(), (n.x[:, 0, 0] > -9,), rows(n.b)[n.x[:, 0, 0] > -9]),
            "1x1x4: a*; b: a*",
        ),
        "samples by a list": (
            lambda n: written(n.a.clone(), ([0, 1],), n.b[[0, 1]]),
            "1x1x1: 0; a: 0* overwritten; b: 0* overwritten",
        ),
        "around dots": (lambda n: written(n.a.clone(), (0, Ellipsis, 0), n.b[0, :, 0]), "1x4x1: a*; b: a*"),
    },
    "what is multiplied": {
        "sum over channels": (lambda n: rows(n.a) @ n.b, "1x1x1: 0; b: a*"),
        "sum over channels of one": (lambda n: rows(n.a) @ n.x.repeat(1, 2, 1), "1x1x1: 0; a: 0* joins_constant"),
        "constants first": (lambda n: rows(n.x.repeat(1, 2, 1)) @ n.a, "1x1x1: 0; a: 0* joins_constant"),
        "by pixels": (lambda n: n.a @ rows(n.x), "1x4x1: a*"),
        "by pixels of constants first": (lambda n: n.x @ rows(n.a), "1x1x4: a*"),
        "by pixels of two": (lambda n: n.a @ rows(n.b), "1x4x1: a*; b: 0* call_not_covered"),
        "by pixels of one with channels over": (lambda n: n.a @ n.x.transpose(1, 2).repeat(1, 1, 2), "1x4x1: a*"),
        "vector": (lambda n: rows(n.a) @ n.p(4), "1x1: 0; a: 0* call_not_covered; p1 in 0: 0*"),
        "vector of channels": (lambda n: n.a[0] @ n.x[0, 0], "1: 0; a: 0* call_not_covered"),
        "bmm": (lambda n: torch.bmm(rows(n.a), n.b), "1x1x1: 0; b: a*"),
        "matrix of ones own": (lambda n: n.p(4, 4) @ n.a, "1x1x1: 0; p1 in 1: a*"),
        "matrix of ones own behind": (lambda n: rows(n.a) @ n.p(4, 4), "1x1x1: 0; p1 in 0: a*"),
        "matrix of ones own over pixels": (lambda n: n.a @ n.p(6, 5), "1x4x1: a*; p1 in 1: 0*"),
        "matrices of heads": (
            lambda n: heads(n.c) @ heads(n.c2).transpose(2, 3),
            "1x4x1x1: c0 c2 c4 c6; c: c0 c0 c2 c2 c4 c4 c6 c6; c2: c0 c0 c2 c2 c4 c4 c6 c6",
        ),
        "matrices of heads with values": (
            lambda n: (heads(n.c) @ heads(n.c2).transpose(2, 3)) @ heads(n.c3),
            "1x4x1x2: c0 c0 c2 c2 c4 c4 c6 c6; c: c0 c0 c2 c2 c4 c4 c6 c6; c2: c0 c0 c2 c2 c4 c4 c6 c6; "
            "c3: c0 c0 c2 c2 c4 c4 c6 c6",
        ),
        "heads with constants": (
            lambda n: heads(n.c) @ n.x[:, None, :, :],
            "1x4x1x1: c0 c2 c4 c6; c: c0 c0 c2 c2 c4 c4 c6 c6",
        ),
        "heads with constants of each": (
            lambda n: heads(n.c) @ n.x.repeat(1, 2, 1).unsqueeze(2).expand(-1, -1, 2, -1),
            "1x1x1x1: 0; c: 0* heads_stay",
        ),
        "added product": (lambda n: torch.baddbmm(n.x[:, :1, :1], rows(n.a), n.b), "1x1x1: 0; b: a*"),
        "added product of rows": (lambda n: torch.baddbmm(n.x[:, :1, :1], n.a, rows(n.x)), "1x4x1: a*"),
        "added to rows": (lambda n: torch.baddbmm(n.b[:, :, :2], n.a, rows(n.x)), "1x4x1: b*; a: b*"),
        "added constants by row": (
            lambda n: torch.baddbmm(n.x.repeat(1, 2, 1)[:, :, :2], n.a, rows(n.x)),
            "1x1x1: 0; a: 0* joins_constant",
        ),
        "linear": (lambda n: functional.linear(rows(n.a), n.p(4, 4)), "1x1x1: 0; p1 in 1: a*; summed"),
        "linear, bias": (
            lambda n: functional.linear(rows(n.a), n.p(4, 4), n.p(4)),
            "1x1x1: 0; p1 in 1: a*; p2 in 0: 0*; summed",
        ),
        "linear of constants": (
            lambda n: functional.linear(rows(n.x), n.p(4, 2)) + rows(n.a),
            "1x1x4: p1.0 p1.1 p1.2 p1.3; a: p1.0 p1.1 p1.2 p1.3; p1 in 0: p1.0 p1.1 p1.2 p1.3",
        ),
        "linear of pixels": (
            lambda n: functional.linear(n.a, n.p(5, 6)),
            "1x1x1: 0; a: 0* call_not_covered; p1 in 1: 0*",
        ),
        "linear by name": (
            lambda n: functional.linear(rows(n.x), weight=n.p(4, 2), bias=n.p(4)) + rows(n.a),
            "1x1x4: p1.0 p1.1 p1.2 p1.3; a: p1.0 p1.1 p1.2 p1.3; p1 in 0: p1.0 p1.1 p1.2 p1.3; "
            "p2 in 0: p1.0 p1.1 p1.2 p1.3",
        ),
        "rows of a matrix of ones own": (
            lambda n: n.p(4, 2) @ n.x + n.a,
            "1x4x1: p1.0 p1.1 p1.2 p1.3; a: p1.0 p1.1 p1.2 p1.3; p1 in 0: p1.0 p1.1 p1.2 p1.3",
        ),
        "columns of a matrix of ones own": (
            lambda n: rows(n.x) @ n.p(2, 4) + rows(n.a),
            "1x1x4: p1.0 p1.1 p1.2 p1.3; a: p1.0 p1.1 p1.2 p1.3; p1 in 1: p1.0 p1.1 p1.2 p1.3",
        ),
        "linear of one constant": (
            lambda n: functional.linear(rows(n.x[:, :1]), n.p(4, 1), n.p(4)) + rows(n.a),
            "1x1x4: p1.0 p1.1 p1.2 p1.3; a: p1.0 p1.1 p1.2 p1.3; p1 in 0: p1.0 p1.1 p1.2 p1.3; "
            "p2 in 0: p1.0 p1.1 p1.2 p1.3",
        ),
        "linear of one sample": (lambda n: functional.linear(n.a[:1, :, 0], n.p(1, 4)), "1x1: 0; p1 in 1: a*; summed"),
    },
    "what attends": {
        "heads": (
            lambda n: attended(heads(n.c), heads(n.c2), heads(n.c3)),
            "1x4x1x2: c0 c0 c2 c2 c4 c4 c6 c6; c: c0 c0 c2 c2 c4 c4 c6 c6; c2: c0 c0 c2 c2 c4 c4 c6 c6; "
            "c3: c0 c0 c2 c2 c4 c4 c6 c6",
        ),
        "heads, by name": (
            lambda n: attended(query=heads(n.c), key=heads(n.c2), value=heads(n.c3)),
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
        "heads with constants of each": (
            lambda n: attended(heads(n.c), heads(n.c2), heads(n.c3), n.x.repeat(1, 2, 1)[:, :, None]),
            "1x1x1x1: 0; c: 0* call_not_covered; c2: 0* call_not_covered; c3: 0* call_not_covered",
        ),
        "heads with groups": (
            lambda n: attended(heads(n.c), heads(n.a), heads(n.a2), enable_gqa=True),
            "1x4x1x2: c0 c0 c0 c0 c4 c4 c4 c4; c: c0 c0 c0 c0 c4 c4 c4 c4; a: c0 c0 c4 c4; a2: c0 c0 c4 c4",
        ),
        "one head": (lambda n: attended(rows(n.a), rows(n.b), rows(n.c)), "1x1x8: c*; a: 0* one_head; b: 0* one_head"),
        "one head with its scale": (lambda n: attended(rows(n.a), rows(n.b), rows(n.c), scale=0.5), "1x1x8: c*; b: a*"),
        "one head of one layer": (
            lambda n: attended(rows(n.a), *rows(n.c).chunk(2, -1)),
            "1x1x1: 0; a: 0* one_head; c: 0* one_head; equal moves: 0* | 0*",
        ),
        "one head with a bias by channel": (
            lambda n: attended(rows(n.a), rows(n.b), rows(n.c), n.c2[:, None, 0, :6] + n.c2[:, :6, :1]),
            "1x1x1: 0; a: 0* call_not_covered; b: 0* call_not_covered; c: 0* call_not_covered; "
            "c2: 0 0 0 0 0 0 c26 c27 fixed_channels call_not_covered",
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
        "constant queries": (lambda n: attended(rows(n.x), rows(n.x), rows(n.a)), "1x1x4: a*"),
        "constant queries of heads": (
            lambda n: attended(n.x.repeat(1, 2, 1).unsqueeze(-1), heads(n.c)[..., :1], heads(n.c2)),
            "1x1x1x1: 0; c: 0* call_not_covered; c2: 0* call_not_covered",
        ),
    },
    "what is summed by letters": {
        "spaces": (lambda n: torch.einsum("b c l , b c k -> b l k", n.a, n.b), "1x1x1: 0; b: a*"),
        "outputs in another order": (lambda n: torch.einsum("bcl->lcb", n.a), "1x4x1: a*"),
        "lists": (lambda n: torch.einsum(n.a, [0, 1, 2], [0, 2, 1]), "1x1x4: a*"),
        "no arrow": (lambda n: torch.einsum("bcl", n.a), "1x4x1: a*"),
        "no arrow, capitals": (lambda n: torch.einsum("bCl,bl", n.a, n.x[:, 0]), "4: a*"),
        "no arrow, dots": (lambda n: torch.einsum("...l,l", n.a, n.x[0, 0]), "1x4: a*"),
        "dots": (lambda n: torch.einsum("b...,b...->b...", n.a, n.b), "1x4x1: a*; b: a*"),
        "dots of fewer": (lambda n: torch.einsum("...l,...l->...l", n.a, n.b[0]), "1x4x1: a*; b: a*"),
        "dots of fewer first": (lambda n: torch.einsum("...l,...l->...l", n.b[0], n.a), "1x4x1: b*; a: b*"),
        "dots of nothing": (lambda n: torch.einsum("bcl...,bcl->bcl...", n.a, n.b), "1x4x1: a*; b: a*"),
        "diagonal": (lambda n: torch.einsum("bcc->bc", n.a[:, :, :4]), "1x1: 0; a: 0* call_not_covered"),
        "constants with the letter": (
            lambda n: torch.einsum("bcl,bck->blk", n.a, n.x.repeat(1, 2, 1)),
            "1x1x1: 0; a: 0* call_not_covered",
        ),
        "constants of one entry with the letter": (
            lambda n: torch.einsum("bcl,bck->bck", n.a, n.x[:, :1]),
            "1x4x1: a*",
        ),
        "a constant over pixels": (lambda n: torch.einsum("bcl,bl->bc", n.a, n.x[:, 0]), "1x4: a*"),
        "summed": (lambda n: torch.einsum("bcl->bl", n.a), "1x1: 0; summed"),
        "outer product": (
            lambda n: torch.einsum("bcl,bdl->bcdl", n.a, n.b),
            "1x1x1x1: 0; a: 0* call_not_covered; b: 0* call_not_covered",
        ),
        "heads": (
            lambda n: torch.einsum("bhqc,bhkc->bhqk", heads(n.c), heads(n.c2)),
            "1x4x1x1: c0 c2 c4 c6; c: c0 c0 c2 c2 c4 c4 c6 c6; c2: c0 c0 c2 c2 c4 c4 c6 c6",
        ),
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
        "heads in another order": (
            lambda n: torch.einsum("bhqc->bqch", heads(n.c)),
            "1x1x2x4: c0 c2 c4 c6 c0 c2 c4 c6; c: c0 c0 c2 c2 c4 c4 c6 c6",
        ),
        "heads of which one letter is put out": (
            lambda n: torch.einsum("bhqc->bhq", heads(n.c)),
            "1x4x1: c0 c2 c4 c6; c: c0 c0 c2 c2 c4 c4 c6 c6",
        ),
        "heads and others": (
            lambda n: torch.einsum("bhqc,bh->bqch", heads(n.c), n.a[:, :, 0]),
            "1x1x2x4: c0 c2 c4 c6 c0 c2 c4 c6; c: c0 c0 c2 c2 c4 c4 c6 c6; a: c0 c2 c4 c6",
        ),
        "three": (lambda n: torch.einsum("bcl,bcl,cl->cb", n.a, n.b, n.a2[0]), "4x1: a*; b: a*; a2: a*"),
    },
    "windows": {
        "unfold": (
            lambda n: functional.unfold(n.c.unflatten(2, (2, 3)), 2),
            "1x32x1: c0 c0 c0 c0 c1 c1 c1 c1 c2 c2 c2 c2 c3 c3 c3 c3 c4 c4 c4 c4 c5 c5 c5 c5 c6 c6 c6 c6 c7 c7 c7 c7",
        ),
        "unfold without samples": (
            lambda n: functional.unfold(n.a[0].unflatten(1, (2, 3)), (1, 2)),
            "8x1: a0 a0 a1 a1 a2 a2 a3 a3",
        ),
        "windows of pixels": (lambda n: n.a.unfold(2, 2, 2), "1x4x1x1: a*"),
        "windows of pixels from the end": (lambda n: n.a.unfold(-1, 2, 2), "1x4x1x1: a*"),
        "windows of pixels by name": (lambda n: n.a.unfold(dimension=2, size=2, step=1), "1x4x1x1: a*"),
        "windows of channels": (lambda n: n.a.unfold(1, 2, 2), "1x1x1x1: 0; a: 0* call_not_covered"),
        "windows by the function": (lambda n: torch.Tensor.unfold(n.a, 2, 3, 3), "1x4x1x1: a*"),
        "fold": (lambda n: functional.fold(n.c, (3, 4), 2), "1x2x1x1: c0 c4; c: c0 c0 c0 c0 c4 c4 c4 c4"),
        "fold without samples": (
            lambda n: functional.fold(n.c[0], (3, 4), 2),
            "2x1x1: c0 c4; c: c0 c0 c0 c0 c4 c4 c4 c4",
        ),
        "fold of single places": (lambda n: functional.fold(n.a, (2, 3), 1), "1x4x1x1: a*"),
        "pool of pixels": (lambda n: functional.max_pool1d(n.a, 2), "1x4x1: a*"),
        "pool of single channels": (lambda n: functional.avg_pool2d(n.a, (1, 2)), "1x4x1: a*"),
        "pool of channels": (lambda n: functional.avg_pool2d(n.a, (2, 1)), "1x1x1: 0; a: 0* result_depends"),
        "pool with a stride over channels": (
            lambda n: functional.max_pool2d(n.a, 1, stride=(2, 1)),
            "1x1x1: 0; a: 0* result_depends",
        ),
        "pool with padding over channels": (lambda n: functional.avg_pool2d(n.a, (1, 3), (1, 1), (0, 1)), "1x4x1: a*"),
        "pool of padded channels": (
            lambda n: functional.max_pool2d(n.a, 3, (1, 1), padding=1),
            "1x4x1: 0*; a: 0* result_depends",
        ),
        "pool of single places": (lambda n: functional.max_pool2d(n.a, 1), "1x4x1: a*"),
        "pool of rows": (lambda n: functional.avg_pool2d(rows(n.a)[:, None], (2, 1)), "1x1x1x4: a*"),
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
        "sampled rows": (
            lambda n: functional.grid_sample(rows(n.a)[:, :, None], n.x[:, None, None, :, 0], align_corners=False),
            "1x1x1x1: 0; a: 0* call_not_covered",
        ),
        "sampled planes": (
            lambda n: functional.grid_sample(n.a[:, None], n.x[:, None, None, :, 0], align_corners=False),
            "1x1x1x1: 0; a: 0* call_not_covered",
        ),
        "sampled by heads": (
            lambda n: functional.grid_sample(
                heads(n.c)[0].transpose(1, 2).unflatten(2, (2, 3)), heads(n.c2)[0][:, None], align_corners=False
            ),
            "4x1x1x1: c0 c2 c4 c6; c: c0 c0 c2 c2 c4 c4 c6 c6; c2: c0 c0 c2 c2 c4 c4 c6 c6",
        ),
        "sampled by heads of constants": (
            lambda n: functional.grid_sample(
                n.x[:1, :, :4, None].expand(4, 2, 4, 1), heads(n.c2)[0][:, None], align_corners=False
            ),
            "1x1x1x1: 0; c2: 0* call_not_covered",
        ),
        "sampled by name": (
            lambda n: functional.grid_sample(
                input=n.a.unflatten(2, (2, 3)), grid=n.x[:, None, None, :, 0], align_corners=False
            ),
            "1x4x1x1: a*",
        ),
        "pool of channels at the end": (
            lambda n: functional.max_pool2d(rows(n.a), (1, 2)),
            "1x1x1: 0; a: 0* result_depends",
        ),
        "sampled volumes": (
            lambda n: functional.grid_sample(
                n.a.unflatten(2, (2, 3))[:, :, None],
                n.x[:, None, None, None, 0, :3].expand(3, 1, 2, 2, 3),
                align_corners=False,
            ),
            "1x4x1x1x1: a*",
        ),
        "unfold with a stride": (
            lambda n: functional.unfold(n.a.unflatten(2, (2, 3)), (2, 1), stride=2),
            "1x8x1: a0 a0 a1 a1 a2 a2 a3 a3",
        ),
        "module of unfold": (
            lambda n: n.owner.part("u", lambda: nn.Unfold((1, 3)))(n.a.unflatten(2, (2, 3))),
            "1x12x1: a0 a0 a0 a1 a1 a1 a2 a2 a2 a3 a3 a3",
        ),
        "unfold of rows": (lambda n: functional.unfold(rows(n.a)[:, None], 2), "1x1x1: 0; a: 0* call_not_covered"),
        "unfold of single places": (lambda n: functional.unfold(n.d.unflatten(2, (2, 3)), 1), "1x2x1: d*"),
        "windows of samples": (lambda n: n.a.unfold(0, 2, 1), "1x4x1x1: a*"),
        "windows of channels at the end": (lambda n: rows(n.a).unfold(-1, 2, 2), "1x1x1x1: 0; a: 0* call_not_covered"),
        "module of fold": (
            lambda n: n.owner.part("u", lambda: nn.Fold((3, 4), 2))(n.c),
            "1x2x1x1: c0 c4; c: c0 c0 c0 c0 c4 c4 c4 c4",
        ),
        "fold to one channel": (lambda n: functional.fold(n.a, (3, 4), 2), "1x1x1x1: a0; a: a0 a0 a0 a0"),
    },
    "filters of ones own": {
        "by channel": (lambda n: functional.conv1d(n.a, n.p(4, 1, 3), groups=n.a.shape[1]), "1x4x1: a*; p1 in 0: a*"),
        "by channel with a bias": (
            lambda n: functional.conv1d(n.a, n.p(4, 1, 3), n.p(4), padding=1, groups=n.a.shape[1]),
            "1x4x1: a*; p1 in 0: a*; p2 in 0: a*",
        ),
        "by channel, all by position": (
            lambda n: functional.conv1d(n.a, n.p(4, 1, 1), None, 1, 0, 1, n.a.shape[1]),
            "1x4x1: a*; p1 in 0: a*",
        ),
        "by channel of images": (
            lambda n: functional.conv2d(n.a.unflatten(2, (2, 3)), n.p(4, 1, 1, 2), n.p(4), groups=n.a.shape[1]),
            "1x4x1x1: a*; p1 in 0: a*; p2 in 0: a*",
        ),
        "with a fixed number of groups": (
            lambda n: functional.conv1d(n.a, n.p(4, 1, 3), groups=4),
            "1x1x1: 0; a: 0* call_not_covered; p1 in 2: 0*",
        ),
        "all channels": (
            lambda n: functional.conv1d(n.a, n.p(4, 4, 3)),
            "1x1x1: 0; a: 0* call_not_covered; p1 in 2: 0*",
        ),
        "several of each": (
            lambda n: functional.conv1d(n.a, n.p(8, 1, 3), groups=n.a.shape[1]),
            "1x1x1: 0; a: 0* call_not_covered; p1 in 2: 0*",
        ),
        "by the number of another": (
            lambda n: functional.conv1d(n.x.repeat(1, 2, 1), n.p(4, 1, 3), groups=n.a.shape[1]) + n.a[:, :, :4],
            "1x1x1: 0; a: 0* joins_constant; p1 in 2: 0*",
        ),
        "of rows": (
            lambda n: functional.conv1d(rows(n.a), n.p(6, 1, 3), groups=n.x.shape[2]),
            "1x1x1: 0; a: 0* call_not_covered; p1 in 2: 0*",
        ),
        "without samples": (
            lambda n: functional.conv1d(n.a[0], n.p(4, 1, 3), groups=n.a.shape[1]),
            "1x1: 0; a: 0* call_not_covered; p1 in 2: 0*",
        ),
        "by channel, two of them": (
            lambda n: functional.conv1d(n.d, n.p(2, 1, 3), groups=n.d.shape[1]),
            "1x2x1: d*; p1 in 0: d*",
        ),
        "a constant by channel": (
            lambda n: functional.conv1d(n.a, n.x[0, :1, :3].expand(4, 1, 3), groups=n.a.shape[1]),
            "1x1x1: 0; a: 0* call_not_covered",
        ),
        "by channel of volumes": (
            lambda n: functional.conv3d(n.a[..., None, None], n.p(4, 1, 2, 1, 1), groups=n.a.shape[1]),
            "1x4x1x1x1: a*; p1 in 0: a*",
        ),
        "by channel of one row": (
            lambda n: functional.conv2d(n.a[:, :, None], n.p(4, 1, 1, 2), groups=n.a.shape[1]),
            "1x4x1x1: a*; p1 in 0: a*",
        ),
        "by channel of one sample": (
            lambda n: functional.conv1d(n.a[:1], n.p(4, 1, 3), groups=n.a.shape[1]),
            "1x4x1: a*; p1 in 0: a*",
        ),
        "by the number of fewer channels": (
            lambda n: functional.conv1d(n.a, n.p(4, 2, 3), groups=n.d.shape[1]),
            "1x1x1: 0; a: 0* call_not_covered; p1 in 2: 0*",
        ),
    },
    "what is made": {
        "ones": (lambda n: n.a * torch.ones(1, n.a.size(1), 1), "1x4x1: a*"),
        "ones from a shape": (lambda n: torch.ones(n.a.shape), "1x4x1: a*"),
        "full": (lambda n: torch.full((n.a.size(1), 2), 2.0), "4x1: a*"),
        "new": (lambda n: n.b.new_zeros(n.a.size(1), 2), "4x1: a*"),
        "new full": (lambda n: n.b.new_full((2, n.a.size(1)), 2.0), "1x4: a*"),
        "of pixels": (lambda n: n.a * torch.ones(n.a.size(2)), "1x4x1: a*"),
        "of a computed size": (lambda n: torch.ones(n.a.size(1) * 2) * n.x[0, 0, 0], "1: 0"),
        "of rows": (lambda n: torch.ones(6, rows(n.a).size(-1)) * rows(n.a), "1x1x4: a*"),
        "of two layers": (lambda n: torch.zeros(n.a.size(1), n.b.size(1)), "4x1: a*"),
        "of one place": (
            lambda n: torch.zeros(n.a[:, :1].size(1), 3) + n.a[0, 0, 0],
            "1x1: 0; a: 0 a1 a2 a3 joins_constant",
        ),
        "of heads": (lambda n: torch.zeros(heads(n.c).size(1), 3), "1x1: 0; c: c0 c0 c2 c2 c4 c4 c6 c6"),
        "of as many values": (lambda n: torch.arange(n.a.size(1)), "1: 0"),
        "of two channels": (lambda n: torch.ones(n.d.size(1), 3), "2x1: d*"),
    },
    "what is summed up along a dimension": {
        "sum of pixels": (lambda n: rows(n.a).sum(1), "1x4: a*"),
        "sum of channels": (lambda n: n.a.sum(1), "1x1: 0; summed"),
        "largest of sums": (lambda n: n.a.abs()[..., None].sum(3).amax(1), "1x1: 0; summed"),
        "nansum of pixels": (lambda n: rows(n.a).nansum(1), "1x4: a*"),
        "nansum of channels": (lambda n: n.a.nansum(1), "1x1: 0; summed"),
        "norm of pixels": (lambda n: rows(n.a).norm(2, 1), "1x4: a*"),
        "norm of channels": (lambda n: n.a.norm(2, 1), "1x1: 0; summed"),
        "largest of norms": (lambda n: n.a[..., None].norm(2, 3).amax(1), "1x1: 0; summed"),
        "linalg.norm of pixels": (lambda n: torch.linalg.norm(rows(n.a), 2, 1), "1x4: a*"),
        "linalg.norm of channels": (lambda n: torch.linalg.norm(n.a, 2, 1), "1x1: 0; summed"),
        "norm of matrices with channels in rows": (lambda n: torch.linalg.matrix_norm(n.a), "1: 0; summed"),
        "norm of matrices with channels in columns": (lambda n: torch.linalg.matrix_norm(rows(n.a)), "1: 0; summed"),
        "norm of matrices for each channel": (
            lambda n: torch.linalg.matrix_norm(n.a.permute(2, 0, 1), "fro", (0, 1)),
            "4: a*",
        ),
        "normalize": (lambda n: functional.normalize(n.a), "1x4x1: a*; summed"),
        "normalize of pixels": (lambda n: functional.normalize(rows(n.a)), "1x1x4: a*"),
        "normalize at the end": (lambda n: functional.normalize(rows(n.a), 2.0, 2), "1x1x4: a*; summed"),
        "cumsum": (lambda n: n.a.cumsum(1), "1x4x1: a*; summed"),
    },
    "what is reduced along a dimension": {
        "amax of pixels": (lambda n: rows(n.a).amax(1), "1x4: a*"),
        "amax of what is positive": (lambda n: n.a.relu().amax(1), "1x1: 0; summed"),
        "amax in another shape": (lambda n: n.a.relu().amax(1)[:, None], "1x1x1: 0; summed"),
        "amax turned": (lambda n: n.a.relu().amax(1, keepdim=True).mT, "1x1x1: 0; summed"),
        "amax of amax": (lambda n: n.a.relu()[..., None].amax(3).amax(1), "1x1: 0; summed"),
        "amax of means": (lambda n: n.a.relu()[..., None].mean(3).amax(1), "1x1: 0; summed"),
        "mean of pixels": (lambda n: rows(n.a).mean(1), "1x4: a*"),
        "std of pixels": (lambda n: rows(n.a).std(1), "1x4: a*"),
        "logsumexp of pixels": (lambda n: rows(n.a).logsumexp(1), "1x4: a*"),
        "mode of pixels": (lambda n: rows(n.a).mode(1)[0], "1x4: a*"),
        "mode of the last dimension": (lambda n: n.a.mode()[0], "1x4: a*"),
        "quantile of pixels": (lambda n: torch.quantile(rows(n.a), 0.5, 1), "1x4: a*"),
        "kthvalue of pixels": (lambda n: rows(n.a).kthvalue(2, 1)[0], "1x4: a*"),
        "kthvalue of the last dimension": (lambda n: n.a.kthvalue(2)[0], "1x4: a*"),
        "trapezoids of pixels": (lambda n: torch.trapezoid(rows(n.a), dim=1), "1x4: a*"),
        "trapezoids of the last dimension": (lambda n: torch.trapezoid(n.a), "1x4: a*"),
        "softmax of one dimension": (lambda n: n.a[0, :, 0].softmax(0), "4: 0*; a: 0* result_depends"),
        "amax of softmax": (lambda n: n.a.softmax(2).amax(1), "1x1: 0; summed"),
        "amax of squares": (lambda n: n.a.pow(2).amax(1), "1x1: 0; summed"),
        "amax of squares by name": (lambda n: torch.pow(n.a, exponent=2).amax(1), "1x1: 0; a: 0* result_depends"),
        "amax of cubes": (lambda n: n.a.pow(3).amax(1), "1x1: 0; a: 0* result_depends"),
    },
    "what is computed along a dimension": {
        "sort of pixels": (lambda n: rows(n.a).sort(1)[0], "1x1x4: a*"),
        "sort of the last dimension": (lambda n: n.a.sort()[0], "1x4x1: a*"),
        "softmax": (lambda n: n.a.softmax(1), "1x4x1: 0*; a: 0* result_depends"),
        "log_softmax": (lambda n: n.a.log_softmax(1), "1x4x1: 0*; a: 0* result_depends"),
        "index_fill of a pixel": (lambda n: n.a.index_fill(2, torch.tensor([0]), 1.0), "1x4x1: a*"),
        "all pixels in order": (lambda n: rows(n.a).topk(6, 1)[0], "1x1x4: a*"),
        "all of the last dimension in order": (lambda n: n.a.topk(6)[0], "1x4x1: a*"),
        "cumulative trapezoids of the last dimension": (lambda n: torch.cumulative_trapezoid(n.a), "1x4x1: a*"),
        "cross product": (
            lambda n: torch.linalg.cross(n.a.unflatten(2, (2, 3)), n.b.unflatten(2, (2, 3))),
            "1x4x1x1: a*; b: a*",
        ),
        "unique pixels": (lambda n: torch.unique(n.a, True, False, False, 2), "1x4x1: a*"),
        "msort of samples": (lambda n: torch.msort(n.a), "1x4x1: a*"),
        "local_response_norm": (
            lambda n: functional.local_response_norm(n.a, 3),
            "1x4x1: 0*; a: 0* result_depends",
        ),
        "fftshift of pixels": (lambda n: torch.fft.fftshift(n.a, 2), "1x4x1: a*"),
        "fft of the last dimension": (lambda n: torch.fft.fft(n.a).real, "1x4x1: a*"),
        "fft of channels": (lambda n: torch.fft.fft(n.a, None, 1).real, "1x4x1: 0*; a: 0* result_depends"),
        "fft2 of rows": (lambda n: torch.fft.fft2(n.a).real, "1x4x1: 0*; a: 0* result_depends"),
        "fft2 of columns": (lambda n: torch.fft.fft2(rows(n.a)).real, "1x1x4: 0*; a: 0* result_depends"),
        "fft2 of other dimensions": (lambda n: torch.fft.fft2(n.a, None, (0, 2)).real, "1x4x1: a*"),
        "fftn of other dimensions": (lambda n: torch.fft.fftn(n.a, None, (0, 2)).real, "1x4x1: a*"),
    },
    "windows of the last dimensions": {
        "one": (lambda n: functional.adaptive_avg_pool1d(n.a, 3), "1x4x1: a*"),
        "one, the largest": (lambda n: functional.adaptive_avg_pool1d(n.a.relu(), 3).amax(1), "1x1: 0; summed"),
        "one, norms": (lambda n: functional.lp_pool1d(n.a, 2.0, 1), "1x4x1: a*"),
        "two, rows": (lambda n: functional.adaptive_avg_pool2d(n.a, (4, 6)), "1x4x1: 0*; a: 0* result_depends"),
        "two, columns": (
            lambda n: functional.adaptive_avg_pool2d(rows(n.a), (6, 4)),
            "1x1x4: 0*; a: 0* result_depends",
        ),
        "two, the largest": (
            lambda n: functional.adaptive_max_pool2d(n.a.relu().unflatten(2, (2, 3)), 1).amax(1),
            "1x1x1: 0; summed",
        ),
        "two, norms of rows": (lambda n: functional.lp_pool2d(n.a, 2.0, 1), "1x4x1: 0*; a: 0* result_depends"),
        "two, norms of columns": (
            lambda n: functional.lp_pool2d(rows(n.a), 2.0, 1),
            "1x1x4: 0*; a: 0* result_depends",
        ),
        "three, planes": (
            lambda n: functional.adaptive_avg_pool3d(n.a[:, None, :, :, None], (4, 6, 1)),
            "1x1x4x1x1: 0*; a: 0* result_depends",
        ),
        "three, rows": (
            lambda n: functional.adaptive_avg_pool3d(n.a[:, None, None], (1, 4, 6)),
            "1x1x1x4x1: 0*; a: 0* result_depends",
        ),
        "three, columns": (
            lambda n: functional.adaptive_avg_pool3d(rows(n.a)[:, None, None], (1, 6, 4)),
            "1x1x1x1x4: 0*; a: 0* result_depends",
        ),
        "three, the largest": (
            lambda n: functional.adaptive_avg_pool3d(n.a.relu()[..., None, None], 1).amax(1),
            "1x1x1x1: 0; summed",
        ),
        "three, norms of planes": (
            lambda n: functional.lp_pool3d(n.a[:, None, :, :, None], 2.0, 1),
            "1x1x4x1x1: 0*; a: 0* result_depends",
        ),
        "three, norms of rows": (
            lambda n: functional.lp_pool3d(n.a[:, None, None], 2.0, 1),
            "1x1x1x4x1: 0*; a: 0* result_depends",
        ),
        "three, norms of columns": (
            lambda n: functional.lp_pool3d(rows(n.a)[:, None, None], 2.0, 1),
            "1x1x1x1x4: 0*; a: 0* result_depends",
        ),
    },
    "what is multiplied in two or five dimensions": {
        "sum over channels of a matrix": (lambda n: rows(n.a)[0] @ n.b[0], "1x1: 0; b: a*"),
        "rows of a matrix": (lambda n: n.a[0] @ rows(n.x)[0], "4x1: a*"),
        "columns of a matrix": (lambda n: n.x[0] @ rows(n.a)[0], "1x4: a*"),
        "sum over channels": (lambda n: rows(n.a)[:, None, None] @ n.b[:, None, None], "1x1x1x1x1: 0; b: a*"),
        "rows": (lambda n: n.a[:, None, None] @ rows(n.x)[:, None, None], "1x1x1x4x1: a*"),
        "columns": (lambda n: n.x[:, None, None] @ rows(n.a)[:, None, None], "1x1x1x1x4: a*"),
        "rows of a weight of ones own": (
            lambda n: n.owner.part("e", lambda: nn.Linear(4, 8)).weight @ n.a + n.c,
            "1x8x1: weight.0 weight.1 weight.2 weight.3 weight.4 weight.5 weight.6 weight.7; "
            "a: 0* call_not_covered; "
            "c: weight.0 weight.1 weight.2 weight.3 weight.4 weight.5 weight.6 weight.7; "
            "weight in 0: weight.0 weight.1 weight.2 weight.3 weight.4 weight.5 weight.6 weight.7",
        ),
        "a weight of ones own over pixels": (
            lambda n: n.owner.part("e", lambda: nn.Linear(6, 5)).weight @ rows(n.a),
            "1x1x4: a*; weight in 0: 0*",
        ),
        "rows by a weight of ones own": (
            lambda n: n.a @ n.owner.part("e", lambda: nn.Linear(5, 6)).weight,
            "1x4x1: a*; weight in 0: 0*",
        ),
        "added constants, columns": (lambda n: torch.baddbmm(n.x[:, :1, :1], n.x, rows(n.a)), "1x1x4: a*"),
        "added columns": (lambda n: torch.baddbmm(rows(n.b)[:, :2], n.x, rows(n.a)), "1x1x4: b*; a: b*"),
        "added by name": (lambda n: torch.baddbmm(input=n.x[:, :1, :1], batch1=n.a, batch2=rows(n.x)), "1x4x1: a*"),
        "added one for each row": (lambda n: torch.baddbmm(n.b[:, :, :1], n.a, rows(n.x)), "1x4x1: b*; a: b*"),
    },
    "matrices of heads": {
        "three dimensions": (
            lambda n: (heads(n.c)[0] @ heads(n.c2)[0].mT) @ heads(n.c3)[0],
            "4x1x2: c0 c0 c2 c2 c4 c4 c6 c6; c: c0 c0 c2 c2 c4 c4 c6 c6; c2: c0 c0 c2 c2 c4 c4 c6 c6; "
            "c3: c0 c0 c2 c2 c4 c4 c6 c6",
        ),
        "five dimensions": (
            lambda n: (heads(n.c)[:, :, None] @ heads(n.c2)[:, :, None].mT) @ heads(n.c3)[:, :, None],
            "1x4x1x1x2: c0 c0 c2 c2 c4 c4 c6 c6; c: c0 c0 c2 c2 c4 c4 c6 c6; c2: c0 c0 c2 c2 c4 c4 c6 c6; "
            "c3: c0 c0 c2 c2 c4 c4 c6 c6",
        ),
        "scores in three dimensions": (
            lambda n: heads(n.c)[0] @ heads(n.c2)[0].mT,
            "4x1x1: c0 c2 c4 c6; c: c0 c0 c2 c2 c4 c4 c6 c6; c2: c0 c0 c2 c2 c4 c4 c6 c6",
        ),
        "scores in five dimensions": (
            lambda n: heads(n.c)[:, :, None] @ heads(n.c2)[:, :, None].mT,
            "1x4x1x1x1: c0 c2 c4 c6; c: c0 c0 c2 c2 c4 c4 c6 c6; c2: c0 c0 c2 c2 c4 c4 c6 c6",
        ),
        "channels by channels": (
            lambda n: heads(n.c).mT @ heads(n.c2),
            "1x4x1x1: c0 c2 c4 c6; c: c0 c0 c2 c2 c4 c4 c6 c6; c2: c0 c0 c2 c2 c4 c4 c6 c6",
        ),
        "channels by channels in three dimensions": (
            lambda n: heads(n.c)[0].mT @ heads(n.c2)[0],
            "4x1x1: c0 c2 c4 c6; c: c0 c0 c2 c2 c4 c4 c6 c6; c2: c0 c0 c2 c2 c4 c4 c6 c6",
        ),
        "channels by channels in five dimensions": (
            lambda n: heads(n.c)[:, :, None].mT @ heads(n.c2)[:, :, None],
            "1x4x1x1x1: c0 c2 c4 c6; c: c0 c0 c2 c2 c4 c4 c6 c6; c2: c0 c0 c2 c2 c4 c4 c6 c6",
        ),
        "rows": (
            lambda n: heads(n.c).mT @ rows(n.x)[:, None],
            "1x4x2x1: c0 c0 c2 c2 c4 c4 c6 c6; c: c0 c0 c2 c2 c4 c4 c6 c6",
        ),
        "rows in three dimensions": (
            lambda n: heads(n.c)[0].mT @ rows(n.x)[:1],
            "4x2x1: c0 c0 c2 c2 c4 c4 c6 c6; c: c0 c0 c2 c2 c4 c4 c6 c6",
        ),
        "rows in five dimensions": (
            lambda n: heads(n.c)[:, :, None].mT @ rows(n.x)[:, None, None],
            "1x4x1x2x1: c0 c0 c2 c2 c4 c4 c6 c6; c: c0 c0 c2 c2 c4 c4 c6 c6",
        ),
        "columns": (
            lambda n: n.x[:, None] @ heads(n.c),
            "1x4x1x2: c0 c0 c2 c2 c4 c4 c6 c6; c: c0 c0 c2 c2 c4 c4 c6 c6",
        ),
        "columns in three dimensions": (
            lambda n: n.x[:1] @ heads(n.c)[0],
            "4x1x2: c0 c0 c2 c2 c4 c4 c6 c6; c: c0 c0 c2 c2 c4 c4 c6 c6",
        ),
        "columns in five dimensions": (
            lambda n: n.x[:, None, None] @ heads(n.c)[:, :, None],
            "1x4x1x1x2: c0 c0 c2 c2 c4 c4 c6 c6; c: c0 c0 c2 c2 c4 c4 c6 c6",
        ),
        "rows with columns that all heads share": (
            lambda n: heads(n.c).mT @ rows(n.a)[:, None],
            "1x1x1x1: 0; c: 0* call_not_covered; a: 0* call_not_covered",
        ),
        "columns with rows that all heads share": (
            lambda n: n.a[:, None] @ heads(n.c),
            "1x1x1x1: 0; a: 0* call_not_covered; c: 0* call_not_covered",
        ),
        "with a matrix": (lambda n: heads(n.c) @ n.x[0], "1x1x1x1: 0; c: 0* call_not_covered"),
        "behind a matrix": (lambda n: n.x[0] @ heads(n.c), "1x1x1x1: 0; c: 0* call_not_covered"),
        "in two dimensions": (
            lambda n: n.a.unflatten(1, (2, 2))[..., None] @ n.x[:, :1, None, None],
            "1x1x1x1x1: 0; a: 0* call_not_covered",
        ),
        "rows with columns that all heads share, in five dimensions": (
            lambda n: heads(n.c)[:, :, None].mT @ rows(n.a)[:, None, None],
            "1x1x1x1x1: 0; c: 0* call_not_covered; a: 0* call_not_covered",
        ),
        "columns with rows that all heads share, in five dimensions": (
            lambda n: n.a[:, None, None] @ heads(n.c)[:, :, None],
            "1x1x1x1x1: 0; a: 0* call_not_covered; c: 0* call_not_covered",
        ),
        "constants of each head in three dimensions": (
            lambda n: heads(n.c)[0] @ n.x.repeat(2, 1, 1)[:4],
            "1x1x1: 0; c: 0* heads_stay",
        ),
        "behind constants of each head in three dimensions": (
            lambda n: rows(n.x).repeat(2, 1, 1)[:4] @ heads(n.c)[0].mT,
            "1x1x1: 0; c: 0* heads_stay",
        ),
    },
    "what attends in other dimensions": {
        "heads of one sample": (
            lambda n: attended(heads(n.c)[0], heads(n.c2)[0], heads(n.c3)[0]),
            "4x1x2: c0 c0 c2 c2 c4 c4 c6 c6; c: c0 c0 c2 c2 c4 c4 c6 c6; c2: c0 c0 c2 c2 c4 c4 c6 c6; "
            "c3: c0 c0 c2 c2 c4 c4 c6 c6",
        ),
        "heads in five dimensions": (
            lambda n: attended(heads(n.c)[None], heads(n.c2)[None], heads(n.c3)[None]),
            "1x1x4x1x2: c0 c0 c2 c2 c4 c4 c6 c6; c: c0 c0 c2 c2 c4 c4 c6 c6; c2: c0 c0 c2 c2 c4 c4 c6 c6; "
            "c3: c0 c0 c2 c2 c4 c4 c6 c6",
        ),
        "a bias in five dimensions": (
            lambda n: attended(heads(n.c)[None], heads(n.c2)[None], heads(n.c3)[None], n.a[None, :, :, None]),
            "1x1x4x1x2: c0 c0 c2 c2 c4 c4 c6 c6; c: c0 c0 c2 c2 c4 c4 c6 c6; c2: c0 c0 c2 c2 c4 c4 c6 c6; "
            "c3: c0 c0 c2 c2 c4 c4 c6 c6; a: c0 c2 c4 c6",
        ),
        "a bias of one sample": (
            lambda n: attended(heads(n.c)[0], heads(n.c2)[0], heads(n.c3)[0], n.a[0, :, None]),
            "4x1x2: c0 c0 c2 c2 c4 c4 c6 c6; c: c0 c0 c2 c2 c4 c4 c6 c6; c2: c0 c0 c2 c2 c4 c4 c6 c6; "
            "c3: c0 c0 c2 c2 c4 c4 c6 c6; a: c0 c2 c4 c6",
        ),
        "a mask of one row": (
            lambda n: attended(heads(n.c), heads(n.c2), heads(n.c3), n.x[0, :1] > 0),
            "1x4x1x2: c0 c0 c2 c2 c4 c4 c6 c6; c: c0 c0 c2 c2 c4 c4 c6 c6; c2: c0 c0 c2 c2 c4 c4 c6 c6; "
            "c3: c0 c0 c2 c2 c4 c4 c6 c6",
        ),
        "one head in four dimensions": (
            lambda n: attended(rows(n.a)[:, None], rows(n.b)[:, None], rows(n.c)[:, None]),
            "1x1x1x8: c*; a: 0* one_head; b: 0* one_head",
        ),
        "one head of one sample": (
            lambda n: attended(rows(n.a)[0], rows(n.b)[0], rows(n.c)[0]),
            "1x8: c*; a: 0* one_head; b: 0* one_head",
        ),
        "one head with a constant bias": (
            lambda n: attended(rows(n.a), rows(n.b), rows(n.c), n.x[:, :1]),
            "1x1x8: c*; a: 0* one_head; b: 0* one_head",
        ),
        "weighs channels of queries and keys alone": (
            lambda n: attended(n.c.unflatten(1, (4, 2)), n.c2.unflatten(1, (4, 2)), heads(n.c3)[:, :, :2]),
            "1x4x1x1: c0 c2 c4 c6; c: c0 c0 c2 c2 c4 c4 c6 c6; c2: c0 c0 c2 c2 c4 c4 c6 c6; "
            "c3: c0 c0 c2 c2 c4 c4 c6 c6",
        ),
        "weighs channels in five dimensions": (
            lambda n: attended(
                n.c.unflatten(1, (4, 2))[None], n.c2.unflatten(1, (4, 2))[None], n.c3.unflatten(1, (4, 2))[None]
            ),
            "1x1x4x1x1: c0 c2 c4 c6; c: c0 c0 c2 c2 c4 c4 c6 c6; c2: c0 c0 c2 c2 c4 c4 c6 c6; "
            "c3: c0 c0 c2 c2 c4 c4 c6 c6",
        ),
    },
    "what is written in parts": {
        "one place": (
            lambda n: written(n.a.clone(), (0, 0, 0), n.b[0, 0, 0]),
            "1x1x1: 0; a: 0* overwritten; b: 0 b1 b2 b3 overwritten",
        ),
        "constants for some rows": (
            lambda n: written(rows(n.a).clone(), (n.x[:, 0] > -9,), rows(n.x.repeat(1, 2, 1))[n.x[:, 0] > -9]),
            "1x1x4: 0*; a: 0* joins_constant",
        ),
        "no rows": (
            lambda n: written(rows(n.a).clone(), (n.x[:, 0] > 99,), rows(n.b)[n.x[:, 0] > 99]),
            "1x1x1: 0; a: 0* overwritten",
        ),
        "the same for some rows": (
            lambda n: written(rows(n.a).clone(), (n.x[:, 0] > -9,), rows(n.b)[0, 0]),
            "1x1x4: a*; b: a*",
        ),
        "constants for all channels": (
            lambda n: written(n.a.clone(), (slice(None), slice(None), 0), n.x.repeat(1, 2, 1)[:, :, 0]),
            "1x4x1: 0*; a: 0* joins_constant",
        ),
        "a sample before dots": (lambda n: written(rows(n.a).clone(), (0, Ellipsis), rows(n.b)[0]), "1x1x4: a*; b: a*"),
        "pixels behind dots": (
            lambda n: written(n.a.clone(), (Ellipsis, slice(0, 2)), n.b[..., :2]),
            "1x4x1: a*; b: a*",
        ),
        "channels of a pixel behind dots": (
            lambda n: written(n.a.clone(), (Ellipsis, slice(0, 2), 0), n.b[:, :2, 0]),
            "1x1x1: 0; a: 0* overwritten; b: 0 0 b2 b3 overwritten",
        ),
        "samples": (lambda n: written(n.a.clone(), (slice(0, 2),), n.b[:2]), "1x4x1: a*; b: a*"),
        "all by a truth": (
            lambda n: written(n.a.clone(), (True,), n.b),
            "1x1x1: 0; a: 0* overwritten; b: 0* overwritten",
        ),
        "rows by a tensor": (
            lambda n: written(rows(n.a).clone(), (torch.tensor([0, 1]),), rows(n.b)[:2]),
            "1x1x4: a*; b: a*",
        ),
        "heads": (
            lambda n: written(heads(n.c).clone(), (n.x[:, 0, :4] > -9,), heads(n.c2)[n.x[:, 0, :4] > -9]),
            "1x1x1x1: 0; c: 0* overwritten; c2: 0* call_not_covered; guessed",
        ),
    },
    "what becomes complex": {
        "two channels": (lambda n: torch.view_as_complex(rows(n.d).contiguous()).real, "1x1: d0; d: d0 d0"),
        "pairs": (
            lambda n: torch.view_as_complex(rows(n.c).unflatten(2, (4, 2)).contiguous()).real,
            "1x1x4: c0 c2 c4 c6; c: c0 c0 c2 c2 c4 c4 c6 c6",
        ),
        "and back": (
            lambda n: torch.view_as_real(torch.view_as_complex(rows(n.d).contiguous())),
            "1x1x1: d0; d: d0 d0",
        ),
    },
    "what is summed by letters, written otherwise": {
        "dots for nothing": (lambda n: torch.einsum("...bcl->...lcb", n.a), "1x4x1: a*"),
        "dots at the front": (lambda n: torch.einsum("...cl->...lc", n.a), "1x1x4: a*"),
        "dots in the middle": (lambda n: torch.einsum("b...l,l->b...", n.a, n.x[0, 0]), "1x4: a*"),
        "dots at either end": (lambda n: torch.einsum("...l,l...->...l", n.a, n.x[0].t()[:, :1]), "1x4x1: a*"),
        "dots alone": (lambda n: torch.einsum("...,...->...", n.a, n.b[0]), "1x4x1: a*; b: a*"),
        "no arrow, a sum": (lambda n: torch.einsum("bcl,c", n.a, n.p(4)), "1x1: 0; p1 in 0: a*"),
        "no arrow, channels to the end": (lambda n: torch.einsum("bzl", n.a), "1x1x4: a*"),
        "no arrow, turned round": (lambda n: torch.einsum("zca", n.a), "1x4x1: a*"),
        "capitals": (lambda n: torch.einsum("BcL,BcK->BLK", n.a, n.b), "1x1x1: 0; b: a*"),
        "all channels of heads": (
            lambda n: torch.einsum("bhqc->bq", heads(n.c)),
            "1x1: 0; c: c0 c0 c2 c2 c4 c4 c6 c6; summed",
        ),
        "heads place by place": (
            lambda n: torch.einsum("bhqc,bhqc->bhqc", heads(n.c), heads(n.c2)),
            "1x4x1x2: c0 c0 c2 c2 c4 c4 c6 c6; c: c0 c0 c2 c2 c4 c4 c6 c6; c2: c0 c0 c2 c2 c4 c4 c6 c6",
        ),
        "heads summed with their channels": (
            lambda n: torch.einsum("bhqc,bhkc->bqk", heads(n.c), heads(n.c2)),
            "1x1x1: 0; c: c0 c0 c2 c2 c4 c4 c6 c6; c2: c0 c0 c2 c2 c4 c4 c6 c6",
        ),
        "constants with the letter that is put out": (
            lambda n: torch.einsum("bcl,bcl->bcl", n.a, n.x.repeat(1, 2, 1)),
            "1x1x1: 0; a: 0* call_not_covered",
        ),
        "outer product with constants": (lambda n: torch.einsum("bcl,d->bcld", n.a, n.x[0, 0]), "1x4x1x1: a*"),
        "two sums": (lambda n: torch.einsum("bcl,bdl->bl", n.a, n.b), "1x1: 0; summed"),
        "a sum beside channels": (lambda n: torch.einsum("bcl,bdl->bcl", n.a, n.b), "1x4x1: a*; summed"),
        "values by scores": (lambda n: torch.einsum("bqk,bck->bcq", rows(n.x) @ n.x, n.a), "1x4x1: a*"),
    },
    "what has one place": {
        "filter by channel": (
            lambda n: functional.conv1d(n.a[:1, :, :1], n.p(4, 1, 1), n.p(4), groups=n.a.shape[1]),
            "1x4x1: a*; p1 in 0: a*; p2 in 0: a*",
        ),
        "unfold": (lambda n: functional.unfold(n.a.unflatten(2, (2, 3))[:1, :, :1, :1], 1), "1x4x1: a*"),
        "fold": (lambda n: functional.fold(n.c[:1, :, :1], (2, 2), 2), "1x2x1x1: c0 c4; c: c0 c0 c0 c0 c4 c4 c4 c4"),
        "one head": (
            lambda n: attended(rows(n.a)[:1, :1], rows(n.b)[:1, :1], rows(n.c)[:1, :1]),
            "1x1x8: c*; a: 0* one_head; b: 0* one_head",
        ),
        "one head with its scale": (
            lambda n: attended(rows(n.a)[:1, :1], rows(n.b)[:1, :1], rows(n.c)[:1, :1], scale=0.5),
            "1x1x8: c*; b: a*",
        ),
        "sum of products": (lambda n: rows(n.a)[:1, :1] @ n.b[:1, :, :1], "1x1x1: 0; b: a*"),
        "row of a product": (lambda n: n.a[:1] @ rows(n.x)[:1, :, :1], "1x4x1: a*"),
        "sum by letters": (lambda n: torch.einsum("bcl,bck->blk", n.a[:1, :, :1], n.b[:1, :, :1]), "1x1x1: 0; b: a*"),
    },
    "norms, bounds and windows": {
        "place of the largest": (lambda n: n.a.relu().max(1)[1], "1x1: 0; a: 0* result_depends"),
        "norm of order -1": (lambda n: n.a.norm(-1, 1), "1x1: 0; a: 0* result_depends"),
        "nuclear norm": (lambda n: torch.linalg.matrix_norm(n.a, "nuc"), "1: 0; summed"),
        "largest absolute value": (lambda n: n.a.norm(float("inf"), 1), "1x1: 0; summed"),
        "number of what isn't zero": (lambda n: n.a.norm(0, 1), "1x1: 0; summed"),
        "group_norm": (lambda n: functional.group_norm(n.a, 2), "1x4x1: 0*; a: 0* result_depends"),
        "layer_norm of pixels": (lambda n: functional.layer_norm(n.a, (6,)), "1x4x1: a*"),
        "layer_norm of channels": (lambda n: functional.layer_norm(rows(n.a), (4,)), "1x1x4: 0*; a: 0* result_depends"),
        "layer_norm of both": (lambda n: functional.layer_norm(n.a, (4, 6)), "1x4x1: 0*; a: 0* result_depends"),
        "rms_norm of pixels": (lambda n: functional.rms_norm(n.a, (6,)), "1x4x1: a*"),
        "largest above a bound": (lambda n: n.a.clamp(min=0.0).amax(1), "1x1: 0; summed"),
        "largest above a negative bound": (lambda n: n.a.clamp(-1.0).amax(1), "1x1: 0; a: 0* result_depends"),
        "largest with a summand": (lambda n: (functional.relu6(n.a) + 1).amax(1), "1x1: 0; summed"),
        "largest with a negative summand": (
            lambda n: (functional.relu6(n.a) + -1).amax(1),
            "1x1: 0; a: 0* result_depends",
        ),
        "pool of pixels with a stride": (lambda n: functional.max_pool2d(n.a, (1, 2), (1, 1)), "1x4x1: a*"),
        "pool of single channels in one dimension": (lambda n: functional.avg_pool1d(rows(n.a), 1), "1x1x4: a*"),
        "pool of channels in one dimension": (
            lambda n: functional.avg_pool1d(rows(n.a), 2),
            "1x1x1: 0; a: 0* result_depends",
        ),
        "pool of pixels in three dimensions": (lambda n: functional.max_pool3d(n.a[:, None], (1, 1, 2)), "1x1x4x1: a*"),
        "pool of channels in three dimensions": (
            lambda n: functional.max_pool3d(n.a[:, None], (1, 2, 1)),
            "1x1x1x1: 0; a: 0* result_depends",
        ),
        "pool with the places": (
            lambda n: functional.max_pool1d(n.a, 2, return_indices=True),
            "1x4x1: a*; 1x4x1: a*; guessed",
        ),
        "rows added at places": (lambda n: n.a.index_add(2, torch.tensor([0, 1]), n.b[:, :, :2]), "1x4x1: a*; b: a*"),
        "channels added at places": (
            lambda n: n.a.index_add(1, torch.tensor([0, 1, 2, 3]), n.b),
            "1x1x1: 0; a: 0* call_not_covered; b: 0* call_not_covered",
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
        for place, channel in enumerate(flow.free_parameter_ids(name).tolist()):
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
                ids = flow.free_parameter_ids(parameter)
                parts.append(f"{parameter.rpartition('.')[2]} in {free.dim}: {told(ids)}")
        for blocks in flow.blocks:
            if blocks.place.endswith(f" in {owner}"):
                kinds = [
                    kind
                    for kind in ("moves", "may_vanish", "is_uneven", "is_filled", "counted")
                    if getattr(blocks, kind)
                ]
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
AT_ONCE = 8
PARTS = [(kind, first) for kind, calls in CALLS.items() for first in range(0, len(calls), AT_ONCE)]


@pytest.mark.parametrize(("kind", "first"), PARTS)
def test_channels_go_where_the_operations_put_them(kind, first):
    calls = dict(list(CALLS[kind].items())[first : first + AT_ONCE])
    functions = {name: function for name, (function, _) in calls.items()}
    assert followed(functions) == {name: expected for name, (_, expected) in calls.items()}


@pytest.mark.parametrize(
    ("function", "reorders", "chunks"),
    [
        (lambda n: n.a.relu(), False, False),
        (lambda n: n.a.view(3, 2, -1, 6), True, False),
        (lambda n: n.c.chunk(2, 1), False, True),
        (lambda n: n.c.chunk(3, 1), False, True),
        (lambda n: n.c.chunk(5, 1), False, False),
    ],
)
def test_only_rows_of_a_fixed_number_and_equal_pieces_make_a_shuffle(function, reorders, chunks):
    flow = Analysis.on(Called(function).eval(), IMAGES).flow
    assert (flow.reorders, flow.chunks, flow.shuffles) == (reorders, chunks, False)


def test_rows_of_a_fixed_number_that_are_cut_into_pieces_are_shuffled():
    flow = Analysis.on(Called(lambda n: n.c.view(3, 2, -1, 6).flatten(1, 2).chunk(2, 1)).eval(), IMAGES).flow
    assert flow.shuffles


def channel_labels(*shape):
    """Labels 5, 6, ... of the channels, the same at every place."""
    labels = torch.arange(5, 5 + shape[1]).view(1, -1, *[1] * (len(shape) - 2))
    return labels.expand(shape).contiguous()


def test_labels_go_through_what_leaves_channels_in_place():
    carried = carry(channel_labels(2, 3, 4, 4), (2, 3, 2, 2))
    assert torch.equal(carried, channel_labels(2, 3, 2, 2))
    assert carry(channel_labels(2, 3, 4, 4), (2, 4, 2, 2)) is None


def test_labels_that_differ_from_place_to_place_do_not():
    for dim in (2, 3):
        labels = channel_labels(1, 3, 2, 2)
        labels.select(dim, 1).add_(10)
        assert carry(labels, (1, 3, 4, 4)) is None


def test_reductions_over_places_keep_channels_and_those_over_channels_make_numbers_anew():
    labels = channel_labels(2, 3, 4, 4)
    assert torch.equal(carry_reduced(labels, (2, 3), (2, 3)), channel_labels(2, 3))
    assert torch.equal(carry_reduced(labels, (2, 3, 1, 1), (3, 2)), channel_labels(2, 3, 1, 1))
    assert torch.equal(carry_reduced(labels, (2, 3, 4), (3,)), channel_labels(2, 3, 4))
    for shape, dims in {(2, 4, 4): (1,), (2,): (1, 2, 3), (): (0, 1, 2, 3)}.items():
        assert (carry_reduced(labels, shape, dims) == FIXED).all()


def test_reductions_over_some_of_the_places_of_channels_cannot_be_followed():
    heads = torch.arange(6).view(1, 2, 3, 1).expand(2, 2, 3, 5)
    assert carry_reduced(heads, (2, 2, 5), (2,)) is None


def test_channels_of_the_last_dimension_go_with_what_is_picked_along_others():
    picks = {
        "mask of rows": lambda x, at, mask: x[mask],
        "mask and all channels": lambda x, at, mask: x[mask, :],
        "rows": lambda x, at, mask: x[at],
        "places": lambda x, at, mask: x[:, at],
        "behind the others": lambda x, at, mask: x[..., at, :],
        "before dots": lambda x, at, mask: x[at, :, ...],
        "places and all channels": lambda x, at, mask: x[:, at, :],
        "mask of channels": lambda x, at, mask: x[:, mask],
        "channels": lambda x, at, mask: x[..., at],
        "channels at places": lambda x, at, mask: x[:, 0, at],
        "both": lambda x, at, mask: x[:, at, at],
    }
    x, at = torch.zeros(5, 5, 5), torch.tensor([4, 0, 1, 2, 3])
    mask, labels = torch.eye(5, dtype=torch.bool), torch.arange(3, 8).expand(5, 5, 5)
    carried = {}
    for name, pick in picks.items():
        traced = torch.fx.symbolic_trace(pick)
        ShapeProp(traced).propagate(x, at, mask)
        node = next(node for node in traced.graph.nodes if node.op == "call_function")
        shape = tuple(node.meta["tensor_meta"].shape)
        found = picked_along_others(node, [labels, staying((5,))], shape)
        carried[name] = found is not None
        assert found is None or torch.equal(found, torch.arange(3, 8).expand(shape))
        assert picked_along_others(node, [labels.mT, staying((5,))], shape) is None
        assert picked_along_others(node, [labels, torch.arange(5)], shape) is None
    assert [name for name, is_carried in carried.items() if not is_carried] == [
        "mask of channels",
        "channels",
        "channels at places",
        "both",
    ]


@pytest.mark.parametrize(
    ("given", "rank", "dims"),
    [
        (None, 3, (0, 1, 2)),
        ([], 2, (0, 1)),
        (-1, 3, (2,)),
        ((0, -2), 3, (0, 1)),
        (0, 1, (0,)),
        (-1, 0, ()),  # as PyTorch takes it of a single number
        ("channels", 3, None),
    ],
)
def test_dimensions_are_counted_from_0(given, rank, dims):
    assert _from_zero(given, rank) == dims
