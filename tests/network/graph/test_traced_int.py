"""Integers that know where they come from: what their arithmetic keeps of that, and what it notes as unclear."""

from __future__ import annotations

import copy
import math
import operator
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.fx import Graph

import nni_topo
from nni_topo.network.graph.nodes import COMPARED
from nni_topo.network.graph.traced_int import (
    TracedInt,
    UnclearPlaces,
    attribute_channels,
    attributes_traced,
    fold_numbers,
    forget_places,
    is_computed_of_attributes,
    resized,
)

PLACE, HEADS = ("inner", "width", ()), ("inner", "heads", ())


def held(value: int = 12, parts: int = 1, place=PLACE) -> TracedInt:
    return TracedInt.of_attribute(value, place, parts, UnclearPlaces())


def size(value: int = 12) -> TracedInt:
    return TracedInt.of_tensor(value, torch.zeros(value), 0)


@pytest.mark.parametrize("name", ["add", "sub", "mul", "floordiv", "truediv", "mod", "pow"])
def test_arithmetic_gives_the_integers_results_on_both_sides(name: str) -> None:
    function = getattr(operator, name)
    for traced in (held(12), size(12)):
        assert function(traced, 5) == function(12, 5)
        assert function(5, traced) == function(5, 12)
        assert function(traced, held(5)) == function(12, 5)
    assert divmod(held(12), 5) == (2, 2)
    assert divmod(50, held(12)) == (4, 2)
    assert -held(12) == -12


def test_comparisons_are_the_integers_and_hashes_too() -> None:
    traced = held(12)
    assert (traced == 12, traced != 12, traced < 12, traced <= 12, traced > 12, traced >= 12) == (
        True, False, False, True, False, True,
    )  # fmt: skip
    assert hash(traced) == hash(12)
    assert {12: "a"}[traced] == "a"


def test_equal_parts_of_an_attributes_number_are_known() -> None:
    number = held(12, parts=2)
    part = number // 3
    assert isinstance(part, TracedInt)
    assert (int(part), part.place, part.parts, part.unclear) == (4, PLACE, 6, set())
    assert part.unclear is number.unclear
    again = part // 2
    assert (int(again), again.parts) == (2, 12)
    whole = number // 1
    assert (int(whole), whole.parts, whole.unclear) == (12, 2, set())


@pytest.mark.parametrize("divisor", [5, 24, -3])
def test_other_quotients_are_computed_again(divisor: int) -> None:
    number = held(12)
    found = number // divisor
    assert (int(found), found.place, found.source) == (12 // divisor, None, (operator.floordiv, (number, divisor)))
    assert number.unclear == set()


def test_what_is_computed_of_attributes_is_noted_unless_a_graph_computes_it() -> None:
    for written, noted in ((True, set()), (False, {PLACE})):
        number = held(12)
        found = 2 * number + 1
        assert (int(found), found.factors) == (25, (number,))
        product, _ = found.source[1]
        product.written = found.written = written
        number.unclear.note_unwritten()
        assert number.unclear == noted
        assert number.unclear.computed == []


def test_a_quotient_by_another_attributes_number_is_known_with_that_number() -> None:
    number, heads = held(12), held(3, place=HEADS)
    part = number // heads
    assert (int(part), part.place, part.parts, part.per) == (4, PLACE, 3, heads)
    assert part.places == [PLACE, HEADS]
    assert (number.unclear, heads.unclear) == (set(), set())


@pytest.mark.parametrize(
    ("use", "is_shown", "noted"),
    [
        (None, True, False), (None, False, True),
        (lambda number, heads: (number // heads) ** -0.5, True, False),
        (lambda number, heads: (number // heads) ** -0.5, False, True),
        (lambda number, heads: 1 / (number // heads), False, True),
        (lambda number, heads: math.sqrt(number // heads), True, False),
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


def test_a_quotient_of_a_quotient_has_a_place_and_the_number_of_parts_is_noted() -> None:
    number, heads = held(24), held(3, place=HEADS)
    part = number // heads // 2
    assert (int(part), part.place, part.parts, part.per) == (4, PLACE, 6, None)
    assert heads.unclear == {HEADS}


def test_a_quotient_stays_itself_where_it_is_copied_or_held_further_out() -> None:
    part = held(12) // held(3, place=HEADS)
    copied, outer = copy.copy(part), part.within("net")
    assert (int(copied), copied.places) == (4, part.places)
    assert outer.places == [("net.inner", "width", ()), ("net.inner", "heads", ())]


def test_a_quotient_by_a_size_belongs_to_the_size() -> None:
    number, tensor_size = held(12), size(3)
    found = number // tensor_size
    assert (int(found), found.place, found.source) == (4, None, (operator.floordiv, (number, tensor_size)))
    assert number.unclear == set()  # the graph shows what is made of it


def test_a_product_of_attributes_is_computed_again_and_noted_with_both() -> None:
    heads, channels = held(4, place=("inner", "heads", ())), held(8, place=("inner", "size", ()))
    width = heads * channels
    assert (int(width), width.place, width.source) == (32, None, (operator.mul, (heads, channels)))
    assert (heads.unclear, channels.unclear) == (set(), set())
    assert width + 1 == 33  # no graph shows this
    assert width.source[0] is operator.mul
    for use in (lambda n: n == 3, lambda n: n / 2, lambda n: n.note_other_use()):
        heads, channels = held(4, place=("inner", "heads", ())), held(8, place=("inner", "size", ()))
        use(heads * channels)
        assert heads.unclear == {("inner", "heads", ())}
        assert channels.unclear == {("inner", "size", ())}


@pytest.mark.parametrize("function", [operator.add, operator.sub, operator.mul, operator.floordiv])
def test_what_is_computed_of_sizes_keeps_the_function_and_the_operands(function) -> None:
    tensor = torch.zeros(2, 12)
    one = TracedInt.of_tensor(12, tensor, 1)
    assert one.source[0] is tensor
    assert one.source[1] == 1
    found = function(one, 5)
    assert found.source == (function, (one, 5))
    reflected = function(50, one)
    assert reflected.source[0] is function
    assert [int(each) for each in reflected.source[1]] == [50, 12]
    assert function(one, held(5)).source[0] is function
    assert type(function(5, 12)) is int


@pytest.mark.parametrize(
    "use",
    [
        lambda n: n == 3, lambda n: n != 3, lambda n: n < 3, lambda n: n <= 3, lambda n: n > 3, lambda n: n >= 3,
        lambda n: -n, lambda n: n / 5, lambda n: 5 / n, lambda n: n % 5, lambda n: 50 % n, lambda n: divmod(n, 5),
        lambda n: divmod(50, n), lambda n: n**2, lambda n: 2**n, lambda n: n + 1, lambda n: 1 + n, lambda n: n - 1,
        lambda n: 20 - n, lambda n: n * 2, lambda n: 2 * n, lambda n: n + 0.5, lambda n: 50 // n,
    ],
)  # fmt: skip
def test_a_use_that_no_graph_shows_is_noted(use) -> None:
    number = held(12)
    use(number)
    number.unclear.note_unwritten()
    assert number.unclear == {PLACE}
    other = held(12)
    if use(7) is not None:
        assert other.unclear == set()


def test_with_a_float_it_is_a_float() -> None:
    assert held(12) * 0.5 == 6.0
    assert 0.5 * held(12) == 6.0
    assert type(held(12) + 0.5) is float


def test_a_number_within_another_model_has_the_longer_name() -> None:
    number = held(12, parts=3)
    inner = number.within("block")
    assert (int(inner), inner.place, inner.parts) == (12, ("block.inner", "width", ()), 3)
    assert inner.unclear is number.unclear
    top = held(12, place=("", "width", (1,))).within("block")
    assert top.place == ("block", "width", (1,))
    assert held(12).within("").place == PLACE
    tensor_size = size(5)
    assert tensor_size.within("block") is tensor_size


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda each: pickle.loads(pickle.dumps(each))])
def test_copies_keep_the_attribute_and_drop_the_tensor(copied) -> None:
    number = copied(held(12, parts=3))
    assert (type(number), int(number), number.place, number.parts) == (TracedInt, 12, PLACE, 3)
    assert type(copied(size(5))) is int


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
        assert type(inner.one) is int  # the number of so much else
        assert type(inner.layer.in_features) is int  # PyTorch's own
        assert unclear == set()
        assert inner.width % 3 == 2
        assert unclear == {("0", "width", ())}
    assert (type(inner.width), inner.width, inner.sizes) == (int, 8, [3, {"a": 5}])
    assert [type(inner.sizes[0]), type(inner.sizes[1]["a"])] == [int, int]
    with pytest.raises(RuntimeError, match="inside"), attributes_traced(model):
        raise RuntimeError("inside")
    assert type(inner.width) is int


def graph_of(method: str, *args) -> tuple[Graph, dict]:
    """One call on a tensor of eight channels; the ids by node."""
    graph = Graph()
    images = graph.placeholder("images")
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


@pytest.mark.parametrize(
    ("method", "args", "found"),
    [
        ("new_zeros", (1, held(8), 1), [(1, ALL)]),
        ("new_full", ((1, held(8), 1), 2.0), [(1, ALL)]),
        ("new_ones", ((1, held(8), 1),), [(1, ALL)]),
        ("new_ones", ((1, 8, held(4)),), None),  # another dimension
        ("getitem", ((slice(None), slice(held(2), held(6, place=HEADS))),), [(1, ALL[:2])]),
        ("split", (held(4, parts=2), 1), [(2, ALL[:4]), (2, ALL[4:])]),
        ("split", ((held(3), held(5, place=HEADS)), 1), [(1, ALL[:3])]),
    ],
)  # fmt: skip
def test_a_number_counts_the_channels_of_its_own_place(method, args, found) -> None:
    uses = attribute_channels(*graph_of(method, *args), np.arange(100)).get(PLACE)
    assert (None if uses is None else [(parts, ids.tolist()) for parts, ids in uses]) == found


def test_a_number_of_which_another_is_computed_is_known_where_that_is_a_size() -> None:
    for method, is_known in (("view", True), ("repeat", True), ("roll", False)):
        graph, ids = graph_of("view", 1, held(8), 1)
        images = next(iter(graph.nodes))
        twice = graph.call_function(operator.mul, (graph.call_function(operator.mul, (held(8), 1)), 2))
        graph.call_method(method, (images, 1, twice, 1))
        for node in graph.nodes:
            ids.setdefault(node.name, None)
        assert (PLACE in attribute_channels(graph, ids, np.arange(100))) == is_known
    assert size(3).places == []


def test_numbers_of_what_stays_are_folded_and_others_computed() -> None:
    graph = Graph()
    images = graph.placeholder("images")
    stays = graph.call_function(operator.mul, (held(4, place=HEADS), 3))
    twice = graph.call_function(operator.add, (stays, 1))
    goes = graph.call_function(operator.mul, (held(4), 3))
    view = graph.call_method("view", (images, twice), {"dim": goes})
    fold_numbers(graph, {PLACE})
    assert view.args == (images, 13)
    assert view.kwargs == {"dim": goes}
    assert [node for node in graph.nodes if node.op == "call_function"] == [goes]
    assert is_computed_of_attributes(goes)
    assert not is_computed_of_attributes(view)
    assert not is_computed_of_attributes(graph.call_function(operator.mul, (images, 3)))


def test_a_split_by_name_and_a_second_use_that_isnt_understood() -> None:
    graph = Graph()
    images = graph.placeholder("images")
    number = held(4)
    graph.call_method("split", (images, number), {"dim": 1})
    ids = {"images": torch.arange(10, 18).view(1, 8, 1)}
    assert [ids.tolist() for _, ids in attribute_channels(graph, ids, np.arange(100))[PLACE]] == [ALL[:4], ALL[4:]]
    graph.call_method("split", (images,), {"split_size": number, "dim": 1})
    assert attribute_channels(graph, ids, np.arange(100)) == {}


def test_a_split_by_a_number_and_what_a_graph_computes_says_nothing_of_the_number() -> None:
    graph = Graph()
    images = graph.placeholder("images")
    rest = graph.call_function(operator.sub, (graph.call_method("size", (images, 1)), 3))
    graph.call_method("split", (images, [held(3), rest], 1))
    graph.call_method("split", (images, 4, held(1)))
    ids = {"images": torch.arange(10, 18).view(1, 8, 1)}
    assert attribute_channels(graph, ids, np.arange(100)) == {}


def test_a_second_use_that_isnt_understood_hides_the_first() -> None:
    graph, ids = graph_of("split", held(4), 1)
    images = next(iter(graph.nodes))
    assert PLACE in attribute_channels(graph, ids, np.arange(100))
    graph.call_method("narrow", (images, 1, 0, held(4)))
    assert attribute_channels(graph, ids, np.arange(100)) == {}


def test_a_number_of_which_nothing_is_known_leaves_the_others_of_its_call() -> None:
    other = ("inner", "other", ())
    graph, ids = graph_of("view", 1, held(8), held(3, place=other))
    assert attribute_channels(graph, ids, np.arange(100)).keys() == {PLACE}


def quotient_graph(width: int, heads: int, *, is_joined: bool = False) -> tuple[Graph, dict, np.ndarray]:
    """Channels that are viewed as heads, by a quotient of two attributes, and the groups in which these are tied."""
    unclear = UnclearPlaces()
    whole, count = (TracedInt.of_attribute(n, at, 1, unclear) for n, at in ((width, PLACE), (heads, HEADS)))
    graph = Graph()
    states = graph.placeholder("states")
    view = graph.call_method("view", (states, 1, count, whole // count))
    channels = torch.arange(10, 10 + width)
    ids = {"states": channels.view(1, 1, -1), view.name: channels.view(1, heads, -1)}
    if is_joined:
        ids[graph.call_method("view", (view, 1, whole)).name] = channels.view(1, -1)
    groups = np.arange(100)
    groups[10 : 10 + width] = np.repeat(groups[10 : 10 + width : width // heads], width // heads)
    return graph, ids, groups


def test_a_width_follows_the_number_of_heads_that_it_is_divided_by() -> None:
    found = attribute_channels(*quotient_graph(12, 3))
    assert {at: [(parts, ids.tolist()) for parts, ids in uses] for at, uses in found.items()} == {
        HEADS: [(1, [10, 14, 18])], PLACE: [(4, [10, 14, 18])],
    }  # fmt: skip
    # The width of what the heads put out is as many.
    found = attribute_channels(*quotient_graph(12, 3, is_joined=True))
    assert [(parts, len(ids)) for parts, ids in found[PLACE]] == [(1, 12)]
    assert HEADS in found
    # That of other channels may be another number.
    graph, ids, groups = quotient_graph(12, 3, is_joined=True)
    ids["view_1"] = ids["view_1"] + 40
    assert attribute_channels(graph, ids, groups) == {}
    # And so may be what nothing is known of.
    graph, ids, groups = quotient_graph(12, 3)
    size_of_all = next(node for node in graph.nodes if node.op == "call_method").args[3]
    graph.call_method("roll", (next(iter(graph.nodes)), size_of_all))
    assert attribute_channels(graph, ids, groups) == {}
    part = TracedInt.of_attribute(4, PLACE, 3, UnclearPlaces(), held(3, place=HEADS))
    assert resized((part,), {PLACE: 8, HEADS: 2}) == (4,)
    assert resized((part,), {}) == (4,)


def test_numbers_of_places_are_forgotten_and_replaced() -> None:
    graph = Graph()
    images = graph.placeholder("images")
    other = ("inner", "other", ())
    node = graph.call_method("view", (images, 1, held(8, parts=2), held(3, place=other)))
    args, kwargs = resized((node.args, {"a": held(5)}), {PLACE: 6})
    assert args[1:] == (1, 3, 3)
    assert kwargs == {"a": 6}
    assert resized((1, 2), {PLACE: 6}) == (1, 2)
    given = torch.Size([2, 3])
    assert resized(given, {PLACE: 6}) is given
    assert int(resized([size(7)], {PLACE: 6})[0]) == 7
    assert resized([held(8, parts=2)], {}) == [8]
    forget_places(graph, {PLACE})
    assert [type(each) for each in node.args[1:]] == [int, int, TracedInt]
    assert node.args[1:] == (1, 8, 3)


def test_ids_are_arrays_of_the_channels() -> None:
    ((_, ids),) = attribute_channels(*graph_of("view", 1, held(8), 1), np.arange(100))[PLACE]
    assert isinstance(ids, np.ndarray)


@pytest.mark.parametrize(("width", "found"), [(1, None), (2, [(1, [10, 11])]), (3, [(1, [10, 11, 12])])])
def test_a_number_that_a_forward_compares_with_a_size_counts_its_channels(width, found) -> None:
    graph = Graph()
    images = graph.placeholder("images")
    images.meta[COMPARED] = [(PLACE, 1)]
    ids = {"images": torch.arange(10, 10 + width).view(1, width, 1)}
    uses = attribute_channels(graph, ids, np.arange(100)).get(PLACE)
    assert (None if uses is None else [(parts, row.tolist()) for parts, row in uses]) == found


def test_only_a_quotient_is_an_equal_part() -> None:
    for compute, value in (
        (lambda number: number - 2, 2),  # two times two is four, too
        (lambda number: number * 1, 4),
        (lambda number: number**1, 4),
        (lambda number: 4 + number, 8),
        (lambda number: number % 3, 1),
        (lambda number: 8 // number, 2),
        (lambda number: 9 // number, 2),
        (lambda number: number // 3, 1),
    ):
        number = held(4)
        found = compute(number)
        assert (int(found), getattr(found, "place", None)) == (value, None)
    assert (held(4) // 2).place == PLACE


@pytest.mark.parametrize("is_turned", [False, True])
@pytest.mark.parametrize(
    ("compare", "number", "other", "value", "is_noted"),
    [
        (operator.eq, held(8), lambda: size(8), True, False),
        (operator.ne, held(8), lambda: size(8), False, False),
        (operator.eq, held(8), lambda: size(9), False, True),
        (operator.ne, held(8), lambda: size(9), True, True),
        (operator.eq, held(8), lambda: size(4) + 4, True, True),
        (operator.eq, held(8), lambda: 8, True, True),
        (operator.eq, held(8), lambda: held(8, place=HEADS), True, True),
        (operator.eq, held(8, parts=2), lambda: size(8), True, True),
        (operator.le, held(8), lambda: size(8), True, True),
        (operator.ge, held(8), lambda: size(8), True, True),
    ],
)
def test_a_number_found_equal_to_the_size_of_a_tensor_is_no_other_use(
    compare, number, other, value, is_noted, is_turned
) -> None:
    number, other = held(int(number), parts=number.parts), other()
    found = compare(other, number) if is_turned else compare(number, other)
    assert bool(found) is value
    assert number.unclear == ({PLACE} if is_noted else set())
    compared = [(place, dim) for place, _, dim in number.unclear.compared]
    assert compared == ([] if is_noted else [(PLACE, 0)])
    if isinstance(other, TracedInt) and other.place is not None:
        assert other.unclear == {HEADS}


class Blurred(nn.Module):
    """An anti-aliased network: a filter for each channel, in a buffer, with an attribute that counts them."""

    def __init__(self, by_keyword):
        super().__init__()
        torch.manual_seed(0)
        self.by_keyword, self.channels = by_keyword, 8
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 3)
        self.register_buffer("filter", torch.tensor([[[[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]]]).repeat(8, 1, 1, 1) / 16)

    def forward(self, x):
        x = self.first(x).relu()
        if self.by_keyword:
            return self.last(nn.functional.conv2d(x, self.filter, stride=2, groups=self.channels))
        return self.last(nn.functional.conv2d(x, self.filter, None, 2, 0, 1, self.channels))


@pytest.mark.parametrize("by_keyword", [True, False])
def test_an_attribute_counts_the_groups_of_a_filter_for_each_channel(by_keyword):
    model, images = Blurred(by_keyword).eval(), torch.randn(2, 3, 12, 12)
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
