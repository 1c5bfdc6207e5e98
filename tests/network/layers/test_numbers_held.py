"""Integers that attributes of a model hold: which are found, by which keys, and how others are put in their places."""

from __future__ import annotations

from collections import OrderedDict, namedtuple

import pytest
import torch
from torch import nn

from nni_topo.network.layers.constructors import (
    number_at,
    numbers_in,
    places_of,
    put_sizes,
    sizes_of,
    stale_numbers,
    whole_numbers,
    with_numbers,
)

FOUND = {
    "a number": (7, {(): 7}),
    "a list": ([3, 4], {(0,): 3, (1,): 4}),
    "a tuple of more": ((3, "a", None, 1.5), {(0,): 3}),
    "a dict": ({"a": 3, 5: 4}, {("a",): 3, (5,): 4}),
    "lists in a dict": ({"a": [3, [4]]}, {("a", 0): 3, ("a", 1, 0): 4}),
    "five levels": ([[[[9]]]], {(0, 0, 0, 0): 9}),
    "a thousand": ([1] * 1000, {(at,): 1 for at in range(1000)}),
}
NOT_FOUND = {
    "six levels": [[[[[9]]]]],
    "more than a thousand": [1] * 1001,
    "more than a thousand in parts": [[1] * 600, [1] * 600],
    "no number": ["a", 1.5],
    "nothing": [],
    "a float": 1.5,
    "none": None,
    "a tensor beside": [3, torch.ones(1)],
    "a set": {3},
    "another dict": OrderedDict(a=3),
    "another tuple": namedtuple("Pair", "a")(3),
    "other keys": {1.5: 3},
    "truth values": True,
}


@pytest.mark.parametrize("name", FOUND)
def test_integers_are_found_by_the_keys_that_lead_to_them(name):
    value, found = FOUND[name]
    assert numbers_in(value) == found
    assert with_numbers(value, {}) == value
    doubled = with_numbers(value, {path: 2 * number for path, number in found.items()})
    assert numbers_in(doubled) == {path: 2 * number for path, number in found.items()}
    assert type(doubled) is type(value)


@pytest.mark.parametrize("name", NOT_FOUND)
def test_what_holds_anything_else_or_too_much_has_none(name):
    assert numbers_in(NOT_FOUND[name]) is None


class Holding(nn.Module):
    def __init__(self):
        super().__init__()
        self.width, self.sizes, self.table, self.name, self.on = 8, [3, 4], {"a": [5, "b"]}, "eight", True
        self.mixed = [3, "a"]
        self.layer = nn.Linear(8, 8)


def test_numbers_of_a_models_own_modules_have_full_names():
    model = nn.ModuleDict({"inner": Holding()})
    assert [(name, key) for _, name, key, _ in whole_numbers(model)] == [
        ("inner", "width"), ("inner", "sizes"), ("inner", "table"), ("inner", "mixed"),
    ]  # fmt: skip
    assert sizes_of(model) == {
        "inner.width": 8, "inner.sizes": [3, 4], "inner.table": {"a/0": 5}, "inner.mixed": {"0": 3},
    }  # fmt: skip
    assert places_of(model) == {
        "inner.width": {"": ("inner", "width", ())},
        "inner.sizes": {"0": ("inner", "sizes", (0,)), "1": ("inner", "sizes", (1,))},
        "inner.table": {"a/0": ("inner", "table", ("a", 0))},
        "inner.mixed": {"0": ("inner", "mixed", (0,))},
    }
    assert sizes_of(Holding()).keys() == {"width", "sizes", "table", "mixed"}
    assert [number_at(model, ("inner", *place)) for place in (("width", ()), ("table", ("a", 0)), ("name", ()))] == [
        8, 5, None,
    ]  # fmt: skip
    assert number_at(model, ("inner", "absent", ())) is None
    sizes = model["inner"].sizes
    put_sizes(model, {("inner", "width", ()): 6, ("inner", "sizes", (1,)): 2, ("inner", "table", ("a", 0)): 1})
    assert sizes_of(model)["inner.width"] == 6
    assert (model["inner"].sizes, model["inner"].table) == ([3, 2], {"a": [1, "b"]})
    assert sizes == [3, 4]


class Net(nn.Module):
    """A layer, and numbers that may be its width."""

    def __init__(self, width: int = 8, **attributes):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, width, 1), nn.Conv2d(width, 4, 1)
        vars(self).update(attributes)

    def forward(self, images):
        return self.last(self.first(images))


STALE = {
    "a width": ({"dim": 8}, {"dim": 8}),
    "in a list": ({"dims": [8, 16]}, {"dims[0]": 8}),
    "in a dict": ({"config": {"dim": 8}}, {"config['dim']": 8}),
    "another number": ({"dim": 16}, {}),
    "of a width that stays": ({"dim": 4}, {}),
    "a kernel": ({"kernel_size": 8}, {}),
    "camel case": ({"numHeads": 8}, {}),
    "several words": ({"max_window": 8}, {}),
    "an image's": ({"image_size": 8}, {}),
    "a resolution": ({"input_resolution": 8}, {}),
    "a size in several numbers": ({"input_size": (3, 8, 8)}, {}),
    "a size in one": ({"input_size": 8}, {"input_size": 8}),
    "within what describes weights": ({"pretrained_cfg": {"dim": 8}}, {}),
    "of weights under two names": ((lambda held: {"pretrained_cfg": held, "cfg": held})({"dim": 8}), {}),
    "several": ({"a": 8, "b": [1, 8]}, {"a": 8, "b[1]": 8}),
}


@pytest.mark.parametrize("name", STALE)
def test_old_widths_that_attributes_still_hold_are_told_unless_they_count_something_else(name):
    attributes, stale = STALE[name]
    assert stale_numbers(Net(8, **attributes), Net(6, **attributes)) == stale
    assert stale_numbers(Net(8, **attributes), Net(8, **attributes)) == {}
    outer = [nn.Sequential(Net(width, **attributes)) for width in (8, 6)]
    assert stale_numbers(*outer) == {f"0.{key}": number for key, number in stale.items()}


def test_a_number_that_was_changed_or_is_read_is_not_stale():
    assert stale_numbers(Net(8, dim=8), Net(6, dim=6)) == {}

    class Reading(Net):
        def forward(self, images):
            return self.last(self.first(images)[:, : self.dim])

    assert stale_numbers(Reading(8, dim=8), Reading(6, dim=8)) == {}
    one = Net(1, dim=1)
    assert stale_numbers(one, Net(1, dim=1)) == {}
