"""Integers that know where they come from: their arithmetic is that of integers, and says what no graph shows."""

from __future__ import annotations

import copy
import math
import operator

import numpy as np
import pytest
import torch
from torch import nn
from torch.fx import Graph
from torch.fx.passes.shape_prop import TensorMetadata

import nni_topo
from nni_topo.network.graph.traced_int import (
    TracedInt,
    UnclearPlaces,
    attribute_channels,
    attributes_traced,
)

PLACE, HEADS = ("inner", "width", ()), ("inner", "heads", ())


def held(value: int = 12, parts: int = 1, place=PLACE) -> TracedInt:
    return TracedInt.of_attribute(value, place, parts, UnclearPlaces())


@pytest.mark.parametrize(
    ("use", "is_shown", "noted"),
    [
        (None, True, False), (None, False, True),
        (lambda number, heads: (number // heads) ** -0.5, True, False),
        (lambda number, heads: math.sqrt(number // heads), False, True),
        (lambda number, heads: number**-0.5, True, True),  # of which the quotient stays as it is, and so do the heads
        (lambda number, heads: heads == 5, True, True),
    ],
)  # fmt: skip
def test_what_is_made_of_a_quotient_is_no_matter_if_a_graph_shows_the_quotient(use, is_shown, noted) -> None:
    unclear = UnclearPlaces()
    number, heads = (TracedInt.of_attribute(n, at, 1, unclear) for n, at in ((12, PLACE), (3, HEADS)))
    graph, part = Graph(), number // heads
    if is_shown:
        graph.call_method("view", (graph.placeholder("x"), 2, heads, part))
    part.written = is_shown
    if use is not None:
        use(number, heads)
    unclear.note_unwritten()
    unclear.note_divided(graph)
    assert unclear == ({PLACE, HEADS} if noted else set())


@pytest.mark.parametrize(
    "use",
    [
        lambda n: n == 3, lambda n: n < 3, lambda n: -n, lambda n: n / 5, lambda n: 5 / n, lambda n: 50 % n,
        lambda n: divmod(n, 5), lambda n: n**2, lambda n: 20 - n, lambda n: n + 0.5, lambda n: 50 // n,
    ],
)  # fmt: skip
def test_a_use_that_no_graph_shows_is_noted(use) -> None:
    number = held(12)
    use(number)
    number.unclear.note_unwritten()
    assert number.unclear == {PLACE}


class Sized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.width, self.sizes, self.one, self.name = 8, [3, {"a": 5}], 1, "eight"
        self.layer = nn.Linear(8, 8)


def test_attributes_are_traced_within_the_block_and_put_back() -> None:
    model = nn.Sequential(Sized())
    inner = model[0]
    with attributes_traced(model) as unclear:
        assert (inner.width.place, inner.width.parts) == (("0", "width", ()), 1)
        assert inner.sizes[0].place == ("0", "sizes", (0,))
        assert inner.sizes[1]["a"].place == ("0", "sizes", (1, "a"))
        assert copy.deepcopy(inner.width).place == inner.width.place
        assert type(inner.one) is int  # the number of so much else
        assert inner.layer.in_features.place == ("0.layer", "in_features", ())  # a width of PyTorch's own layers
        assert unclear == set()
        assert inner.width % 3 == 2
        assert unclear == {("0", "width", ())}
    assert (type(inner.width), inner.width, inner.sizes) == (int, 8, [3, {"a": 5}])
    assert [type(inner.sizes[0]), type(inner.sizes[1]["a"]), type(inner.layer.in_features)] == [int, int, int]
    with pytest.raises(RuntimeError, match="inside"), attributes_traced(model):
        raise RuntimeError("inside")
    assert type(inner.width) is int


def graph_of(method: str, *args) -> tuple[Graph, dict]:
    """One call on a tensor of eight channels; the ids by node."""
    graph = Graph()
    images = graph.placeholder("images")
    images.meta["tensor_meta"] = TensorMetadata(torch.Size((1, 8, 1)), torch.float32, False, (), None, False, {})
    called = graph.call_method(method, (images, *args)) if method != "getitem" else graph.call_function(
        operator.getitem, (images, *args)
    )  # fmt: skip
    graph.output(called)
    return graph, {"images": torch.arange(10, 18).view(1, 8, 1), called.name: torch.arange(10, 18).view(1, 8, 1)}


def found_in(method: str, *args) -> list[tuple[int, list[int]]] | None:
    found = attribute_channels(*graph_of(method, *args), np.arange(100))
    assert found.keys() <= {PLACE}
    return [(parts, ids.tolist()) for parts, ids in found[PLACE]] if found else None


ALL = list(range(10, 18))


def test_views_splits_and_slices_show_which_channels_an_attribute_counts() -> None:
    assert found_in("view", 1, held(8), 1) == [(1, ALL)]
    assert found_in("reshape", (1, held(8, parts=2), 1)) == [(2, ALL)]
    assert found_in("view", 1, held(4), 2) is None  # not the number of channels
    assert found_in("view", held(8), 1, 1) is None  # another dimension
    assert found_in("split", held(4), 1) == [(1, ALL[:4]), (1, ALL[4:])]
    assert found_in("split", held(3), 1) is None  # pieces of several sizes
    assert found_in("split", held(4)) is None  # along samples
    assert found_in("split", [held(5), 3], 1) == [(1, ALL[:5])]
    assert found_in("split_with_sizes", [3, held(5)], 1) == [(1, ALL[3:])]
    assert found_in("getitem", (slice(None), slice(None, held(3)))) == [(1, ALL[:3])]
    assert found_in("getitem", (slice(None), slice(held(3), None))) == [(1, ALL[:3])]
    assert found_in("getitem", (slice(None, held(3)), slice(None))) is None
    assert found_in("getitem", (slice(None), held(3))) is None  # it picks one
    assert found_in("relu", held(8)) is None  # nothing is known of it


class Blurred(nn.Module):
    """An anti-aliased network: a filter for each channel, in a buffer, with an attribute that counts them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.channels = 8
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)
        self.register_buffer("filter", torch.tensor([[[[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]]]).repeat(8, 1, 1, 1) / 16)

    def forward(self, x):
        x = self.first(x).relu()
        x = nn.functional.conv2d(x, self.filter, stride=2, groups=self.channels)
        return self.last(nn.functional.conv2d(x, self.filter, None, 1, 0, 1, self.channels))


def test_an_attribute_counts_the_groups_of_a_filter_for_each_channel():
    model, images = Blurred().eval(), torch.randn(2, 3, 12, 12)
    groups = nni_topo.dependency_groups(model, images, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    assert [entry["op_names"] for entry in groups] == [["first"]]
    mask = torch.ones(8, 3, 3, 3)
    mask[[0, 5, 6]] = 0
    dense = nni_topo.to_dense(model, images, {"first": {"weight": mask}})
    assert (dense.channels, len(dense.filter)) == (5, 5)
    with torch.no_grad():
        model.first.weight *= mask
        model.first.bias *= mask[:, 0, 0, 0]
        other = torch.randn(3, 3, 15, 17)
        torch.testing.assert_close(dense(other), model(other))


class Scaled(nn.Module):
    """Splits channels by a number of its own, and multiplies by twice that number."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.width, self.first, self.last = 4, nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        one, other = self.first(x).split(self.width, 1)
        return self.last(torch.cat([other, one], 1) * (2 * self.width))


def test_a_number_by_which_a_forward_multiplies_stays():
    model, images = Scaled().eval(), torch.randn(2, 3, 4, 4)
    groups = nni_topo.dependency_groups(model, images, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    # The first piece keeps its 4 channels, and the second one doesn't vanish.
    assert "5 of 8 channels are kept" in groups.skipped["first"]
    mask = torch.ones(8, 3, 1, 1)
    mask[5:] = 0
    dense = nni_topo.to_dense(model, images, {"first": {"weight": mask}})
    assert (dense.width, dense.first.out_channels, model.width) == (4, 5, 4)
    with torch.no_grad():
        model.first.weight *= mask
        model.first.bias *= mask[:, 0, 0, 0]
        other = torch.randn(3, 3, 15, 17)
        torch.testing.assert_close(dense(other), model(other))
