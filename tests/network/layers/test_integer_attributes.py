"""Integers that attributes of a model hold: which are found, by which keys, and how others are put in their places."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nni_topo.network.layers.integer_attributes import (
    number_at,
    numbers_in,
    numbers_of,
    numbers_read,
    put_sizes,
    with_numbers,
)

FOUND = {
    "a number": (7, {(): 7}),
    "a list": ([3, 4], {(0,): 3, (1,): 4}),
    "a tuple of more": ((3, "a", None, 1.5), {(0,): 3}),
    "lists in a dict": ({"a": [3, [4]]}, {("a", 0): 3, ("a", 1, 0): 4}),
}


@pytest.mark.parametrize("name", FOUND)
def test_integers_are_found_by_the_keys_that_lead_to_them(name):
    value, found = FOUND[name]
    assert numbers_in(value) == found
    assert with_numbers(value, {}) == value
    doubled = with_numbers(value, {path: 2 * number for path, number in found.items()})
    assert numbers_in(doubled) == {path: 2 * number for path, number in found.items()}
    assert type(doubled) is type(value)


@pytest.mark.parametrize("value", [[1] * 1001, [3, torch.ones(1)], True], ids=["too many", "a tensor beside", "truth"])
def test_what_holds_anything_else_or_too_much_has_none(value):
    assert numbers_in(value) is None


class Holding(nn.Module):
    def __init__(self):
        super().__init__()
        self.width, self.sizes, self.table, self.name, self.on = 8, [3, 4], {"a": [5, "b"]}, "eight", True
        self.mixed = [3, "a"]
        self.layer = nn.Linear(8, 8)


def test_numbers_of_a_models_own_modules_have_full_names():
    model = nn.ModuleDict({"inner": Holding()})
    assert [(name, key) for _, name, key, _ in numbers_read(model)] == [
        ("inner", "width"), ("inner", "sizes"), ("inner", "table"), ("inner", "mixed"),
    ]  # fmt: skip
    assert numbers_of(model) == {
        ("inner", "width", ()): 8,
        ("inner", "sizes", (0,)): 3,
        ("inner", "sizes", (1,)): 4,
        ("inner", "table", ("a", 0)): 5,
        ("inner", "mixed", (0,)): 3,
    }
    assert {key for _, key, _ in numbers_of(Holding())} == {"width", "sizes", "table", "mixed"}
    assert [number_at(model, ("inner", *place)) for place in (("width", ()), ("table", ("a", 0)), ("name", ()))] == [
        8, 5, None,
    ]  # fmt: skip
    assert number_at(model, ("inner", "absent", ())) is None
    sizes = model["inner"].sizes
    put_sizes(model, {("inner", "width", ()): 6, ("inner", "sizes", (1,)): 2, ("inner", "table", ("a", 0)): 1})
    assert model["inner"].width == 6
    assert (model["inner"].sizes, model["inner"].table) == ([3, 2], {"a": [1, "b"]})
    assert sizes == [3, 4]


class Config:
    """Numbers as a config of Transformers holds them."""

    of_class = (3, 4)

    def __init__(self, **held):
        vars(self).update(held)

    def to_dict(self=None):
        return {}


class Holder(nn.Module):
    def __init__(self, config, **parts):
        super().__init__()
        self.config = config
        for name, part in parts.items():
            self.add_module(name, part)


INNER, OUTER = Config(sizes=[1, 2]), Config(sizes=(3,), width=8, names=["a"], depths=[4, 5])
CONFIGS = {
    "of a module": (Holder(OUTER), [("", "config.sizes"), ("", "config.depths")]),
    "of a module within": (nn.Sequential(Holder(INNER)), [("0", "config.sizes")]),
    "of modules within one another": (Holder(INNER, a=Holder(INNER, b=Holder(INNER))), [("", "config.sizes")]),
    "of modules beside each other": (nn.Sequential(Holder(INNER), Holder(INNER), Holder(OUTER)), [
        ("2", "config.sizes"), ("2", "config.depths"),
    ]),
    "of a module and one within": (nn.ModuleDict({"a": Holder(INNER, b=Holder(INNER))}), [("a", "config.sizes")]),
    "in another one": (Holder(Config(text=INNER, dims=[6]), a=Holder(INNER)), [("", "config.dims")]),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_lists_of_a_config_are_those_of_the_module_that_holds_all_the_others(name):
    model, found = CONFIGS[name]
    assert [(name, key) for _, name, key, _ in numbers_read(model)] == found


class Info:
    """Holds numbers under the name of the list in which timm describes features."""

    def __init__(self, info, **more):
        self.info = info
        vars(self).update(more)


def test_numbers_of_what_describes_features_have_names_and_of_other_objects_none():
    model = nn.Sequential(nn.Conv2d(3, 8, 1))
    model.features = Info([{"num_chs": 8}, {"num_chs": 16}], out_indices=(0, 1))
    model[0].features = model.features
    model.plain, model.words = Info([{"num_chs": 8}]), Info(["a"], out_indices=(0,))
    model.single = Info(8, out_indices=(0,))
    places = [(name, "features.info", (at, "num_chs")) for name in ("", "0") for at in (0, 1)]
    assert numbers_of(model) == dict(zip(places, (8, 16, 8, 16), strict=True))
    assert number_at(model, places[1]) == 16
    assert number_at(model, ("", "features.info", (2, "num_chs"))) is None
    assert number_at(model, ("0", "nothing", ())) is None
    shared = model.features
    put_sizes(model, {("", "features.info", (0, "num_chs")): 4})
    assert model.features.info == [{"num_chs": 4}, {"num_chs": 16}]
    assert model[0].features is model.features
    assert shared.info[0]["num_chs"] == 8


def test_the_line_numbers_of_a_traced_module_are_no_sizes():
    model = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
    model.width = 8
    assert numbers_of(model) == {("", "width", ()): 8}
