"""Attributes that count channels: counted anew where the constructors show it, else named."""

from __future__ import annotations

import ast
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nni_topo
from nni_topo.network.layers.constructors import Place, _method_of, sizes_shown, stale_numbers


def conv3x3(entering: int, leaving: int) -> nn.Conv2d:
    return nn.Conv2d(entering, leaving, 3, padding=1)


class Block(nn.Sequential):
    """Made of what its base class is given."""

    def __init__(self, entering: int, leaving: int) -> None:
        super().__init__(conv3x3(entering, leaving), nn.BatchNorm2d(leaving), nn.ReLU())
        self.out_channels = leaving


class Listed(nn.Module):
    """Puts its layers into a list, one of them perhaps."""

    def __init__(self, entering: int, inner: int, leaving: int, *, is_wider: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        if is_wider:
            layers.append(Block(entering, inner))
        layers.extend([nn.ReLU(), conv3x3(inner if is_wider else entering, leaving)])
        self.layers = nn.Sequential(*layers)
        self.in_channels, self.leaving = entering, leaving

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layers(x)
        return found


class Net(nn.Module):
    """Says in many ways how many channels it has."""

    def __init__(self, width: int = 8, widths: tuple[int, ...] = (12, 10), **more: int) -> None:
        super().__init__()
        literal = 6
        self.width, self.double = width, 2 * width
        self.same = self.width
        self.widths = widths
        self.named = {"one": width, "two": {"last": widths[1]}, "name": "net"}
        self.listed = [width, 2 * width]
        self.literal = literal
        self.one = conv3x3(3, width)
        self.two = nn.Conv2d(self.same, width * 2, 1)
        self.two_too = nn.Conv2d(2 * width, literal, 1)
        self.three = Block(literal, widths[0])
        self.four = Listed(widths[0], 14, self.widths[-1], is_wider=True)
        self.head = nn.Linear(widths[1], 4)
        self.num_features = self.three.out_channels
        self.in_features = self.head.in_features
        self.classes = 4
        for key, value in more.items():
            setattr(self, key, value)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.two_too(torch.relu(self.two(torch.relu(self.one(x))))))
        found: Tensor = self.head(self.four(self.three(x)).mean((2, 3)))
        return found


def dense_of(model: nn.Module, config: list[dict[str, Any]] | None = None) -> Any:
    images = torch.randn(2, 3, 6, 6)
    asked = config or [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
    pruner = nni_topo.create_pruner("l1", model, nni_topo.dependency_groups(model, images, asked))
    _, masks = pruner.compress()
    pruner.unwrap_model()
    return nni_topo.to_dense(model, images, masks)


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING, "nni_topo")
    return caplog


def test_what_the_constructors_show_is_counted_anew(told: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = Net().eval()
    dense = dense_of(model)
    assert (dense.width, dense.same, dense.literal, dense.num_features) == (4, 4, 3, 6)
    assert (dense.in_features, dense.classes) == (5, 4)
    assert (dense.listed, dense.named) == ([4, 8], {"one": 4, "two": {"last": 5}, "name": "net"})
    assert (dense.three.out_channels, dense.four.in_channels, dense.four.leaving) == (6, 6, 5)
    assert dense.widths == (6, 5)
    # ``2 * width`` isn't written as ``width * 2`` is, but as the layer that reads it.
    assert dense.double == 8
    assert dense.report.stale == {}
    assert "attributes" not in told.text
    assert (model.width, model.widths, model.listed, model.three.out_channels) == (8, (12, 10), [8, 16], 12)


@pytest.mark.parametrize("name", ["dense.pt", "dense.safetensors"])
def test_files_hold_what_is_counted_anew(tmp_path: Any, name: str) -> None:
    dense = dense_of(Net().eval())
    nni_topo.save(dense, tmp_path / name)
    loaded: Any = nni_topo.load(tmp_path / name, Net)
    for key in ("width", "same", "literal", "num_features", "in_features", "listed", "named", "widths", "classes"):
        assert getattr(loaded, key) == getattr(dense, key)
    assert loaded.three.out_channels == dense.three.out_channels
    images = torch.randn(2, 3, 6, 6)
    assert torch.equal(loaded.eval()(images), dense(images))


class Numbers(nn.Module):
    """Holds numbers that nothing ties to its layers, and does something with them perhaps."""

    def __init__(self) -> None:
        super().__init__()
        self.feature_info = [8, 16]
        self.info = [{"num_chs": 8, "reduction": 16, "module": "one"}, {"num_chs": 16, "reduction": 8, "module": "two"}]
        self.out_channels, self.kernel_size, self.head_count, self.other = 16, 8, 8, 9
        self.one, self.two, self.head = conv3x3(3, 8), conv3x3(8, 16), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(torch.relu(self.two(torch.relu(self.one(x)))))
        return found


def test_what_nothing_shows_is_named_once(told: pytest.LogCaptureFixture) -> None:
    dense = dense_of(Numbers().eval())
    assert dense.feature_info == [8, 16]
    expected = {
        "feature_info[0]": 8,
        "feature_info[1]": 16,
        "info[0]['num_chs']": 8,
        "info[1]['num_chs']": 16,
        "out_channels": 16,
    }
    assert dense.report.stale == expected
    lines = [record.getMessage() for record in told.records if "attributes" in record.getMessage()]
    assert len(lines) == 1
    assert "feature_info[0] 8, feature_info[1] 16, info[0]['num_chs'] 8" in lines[0]
    assert "\n" not in lines[0]
    assert "as before: feature_info[0] 8" in repr(dense.report)


class Described(nn.Module):
    """Holds what describes its downloaded weights, as timm's networks do, and sizes of images that are its widths."""

    def __init__(self) -> None:
        super().__init__()
        self.pretrained_cfg = {"input_size": (3, 16, 16), "width": 8, "first_conv": "one"}
        self.default_cfg = self.pretrained_cfg
        self.input_size, self.grid_size, self.input_resolution = (3, 16, 16), (8, 8), [16, 16]
        self.settings = {"test_input_size": [3, 8, 8], "pretrained": {"dim": 8}, "hidden_sizes": [8, 16], "dim": 8}
        self.hidden_size = 16
        self.one, self.two, self.head = conv3x3(3, 8), conv3x3(8, 16), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(torch.relu(self.two(torch.relu(self.one(x)))))
        return found


def test_what_describes_images_or_downloaded_weights_is_not_named() -> None:
    assert dense_of(Described().eval()).report.stale == {
        "settings['hidden_sizes'][0]": 8,
        "settings['hidden_sizes'][1]": 16,
        "settings['dim']": 8,
        "hidden_size": 16,
    }


def test_a_warning_names_the_first_few_numbers(told: pytest.LogCaptureFixture) -> None:
    model: Any = Numbers().eval()
    model.more = [8] * 20
    dense = dense_of(model)
    assert len(dense.report.stale) == 25
    line = next(record.getMessage() for record in told.records if "attributes" in record.getMessage())
    assert "feature_info[0] 8" in line
    assert "and 21 more (all are in dense.report.stale)" in line
    assert len(line) < 300


def test_nothing_is_named_where_no_width_goes() -> None:
    assert dense_of(Numbers().eval(), [{"op_names": ["one"], "sparse_ratio": 0.0}]).report.stale == {}


class Scaled(nn.Module):
    """Computes with its width, which counts channels by its constructor."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.width, self.inner = width, width
        self.one, self.head = conv3x3(3, width), nn.Conv2d(width, 2, 1)

    @property
    def scale(self) -> float:
        return float(self.inner) ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(torch.relu(self.one(x)) * self.scale)
        return found


def test_what_the_forward_computes_with_stays() -> None:
    dense = dense_of(Scaled().eval())
    assert (dense.width, dense.inner, dense.one.out_channels) == (4, 8, 4)
    assert dense.report.stale == {}


class Ambiguous(nn.Module):
    """One number for two layers, an attribute that is set anew, names that are assigned twice, and a loop."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.width = width
        self.one, self.two = conv3x3(3, width), conv3x3(width, width)
        entering = width
        entering = 2 * entering
        self.twice = entering
        self.three = conv3x3(width, entering)
        self.rest = nn.Sequential(*[conv3x3(entering, entering) for _ in range(2)])
        self.later = 8
        self.set_later(16)
        self.head = nn.Conv2d(entering, 2, 1)

    def set_later(self, number: int) -> None:
        self.later = number

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.three(torch.relu(self.two(torch.relu(self.one(x))))))
        found: Tensor = self.head(self.rest(x))
        return found


def test_what_layers_differ_in_is_left_and_named() -> None:
    layers = [{"op_names": ["one"], "sparse_ratio": 0.5}, {"op_names": ["two"], "sparse_ratio": 0.25}]
    dense = dense_of(Ambiguous().eval(), layers)
    assert (dense.width, dense.twice, dense.later) == (8, 16, 16)
    assert dense.report.stale == {"width": 8}
    every = dense_of(Ambiguous().eval())
    assert (every.width, every.twice, every.later) == (4, 16, 16)
    assert every.report.stale == {"twice": 16, "later": 16}


class Looped(nn.Module):
    """Makes layers of its width one by one and in a loop."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.width = width
        self.one = conv3x3(3, width)
        self.rest = nn.ModuleList([conv3x3(width, width) for _ in range(2)])
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.one(x))
        for each in self.rest:
            x = torch.relu(each(x))
        found: Tensor = self.head(x)
        return found


def test_what_a_loop_makes_of_a_number_counts_too() -> None:
    layers = [{"op_names": ["one"], "sparse_ratio": 0.5}, {"op_names": ["rest.1"], "sparse_ratio": 0.25}]
    dense = dense_of(Looped().eval(), layers)
    assert dense.width == 8
    assert dense.report.stale == {"width": 8}
    assert dense_of(Looped().eval()).width == 4


def test_numbers_are_compared_before_they_are_believed() -> None:
    """An attribute that was changed after the constructor says another thing than that does."""
    model = Net(classes=4).eval()
    model.width = 5
    dense = dense_of(model)
    assert (dense.width, dense.same) == (5, 4)


def test_a_constructor_without_source_says_nothing() -> None:
    space: dict[str, Any] = {"nn": nn}
    # A class of which no file has the source.
    exec(
        "class Made(nn.Module):\n"
        "    def __init__(self, width=8):\n"
        "        super().__init__()\n"
        "        self.width, self.one, self.head = width, nn.Conv2d(3, width, 1), nn.Conv2d(width, 2, 1)\n"
        "    def forward(self, x):\n"
        "        return self.head(self.one(x))\n",
        space,
    )
    model = space["Made"]().eval()
    dense = dense_of(model)
    assert dense.width == 8
    assert dense.report.stale == {"width": 8}
    assert sizes_shown(model, dense) == {}
    assert stale_numbers(model, model) == {}


MODULE = """
from contextlib import nullcontext

from torch import nn

def conv(entering, leaving):
    return nn.Conv2d(entering, leaving, 1)

def plus(number, more=0):
    return number + more

def either(width):
    if width > 100:
        return nn.Identity()
    return conv(3, width)

def flipped(leaving, entering):
    return nn.Conv2d(entering, leaving, 1)

def one_of(width, other):
    if width > 100:
        return nn.Identity()
    return conv(3, other)

class Part(nn.Module):
    def __init__(self, width, kernel=1):
        super().__init__()
        self.inner, self.layer = width, nn.Conv2d(3, width, kernel)

class Own(nn.Conv2d):
    def __init__(self, width):
        super().__init__(3, width, 1)

class Reading(Part):
    def __init__(self, width):
        super().__init__(width)
        self.same = self.inner

class ReadingOwn(nn.Conv2d):
    def __init__(self, width):
        super().__init__(3, width, 1)
        self.same = self.out_channels

class Derived(Part):
    def __init__(self, kernel, *, width):
        super().__init__(width, kernel=kernel)

class Again(Part):
    def __init__(self, width, other):
        super().__init__(width)
        self.inner = other
        self.two = conv(3, self.inner)

class Changing(nn.Module):
    def __init__(self, width, other):
        nn.Module.__init__(self)
        self.inner = width
        self.layer = conv(3, width)
        self.inner = other

class Net(nn.Module):
    def __init__(self, width, other, sizes, config):
        super().__init__()
        {lines}
"""
MAKES = "self.one = conv(3, width)"
BESIDE = f"{MAKES}; self.two = conv(3, other); self.shown = width"
# What a constructor does, and what of it is the width of the layer that got narrower. ``other`` is the same number, and
# that of a layer that stays: what holds it mustn't be shown, and neither may what is read before a name changes.
LATER = "; ".join(f"n{at + 1} = n{at}" for at in range(20))
OWN = "; ".join(f"self.n{at + 1} = self.n{at}" for at in range(20))
CONSTRUCTORS = {
    "a name": (f"inner = width; self.shown = inner; self.not_shown = other; {MAKES}", {"shown": 6}),
    "a name of its own": ("number = [width][0]; self.shown = number; self.one = conv(3, number)", {"shown": 6}),
    "a type beside": (f"inner: int = width; self.shown: int = inner; {MAKES}", {"shown": 6}),
    "a tuple": (f"self.shown, self.not_shown = width, other; {MAKES}", {"shown": 6}),
    "a tuple of others": ("self.a, self.b = 8, *[8]; self.one = conv(3, width)", {}),
    "two values": ("number = other; self.a = number; number = width; self.one = conv(3, number)", {}),
    "two values of an argument": ("self.a = width; width = width + 0; self.one = conv(3, width)", {}),
    "an argument set before": ("kept = width; width = other; self.a = width; self.one = conv(3, kept)", {}),
    "a sum": ("number = other; self.a = number; number += width - 8; self.one = conv(3, number)", {}),
    "a loop": ("number = other; self.a = number\nfor number in [width]: self.one = conv(3, number)", {}),
    "within a loop": (
        "for number in [other, width]:\n"
        "    inner = number\n"
        "    if number is other: self.a = inner\n"
        "self.one = conv(3, inner)",
        {},
    ),
    "a context": (
        "number = other; self.a = number\nwith nullcontext(width) as number: pass\nself.one = conv(3, number)",
        {},
    ),
    "a context without a name": (f"with nullcontext(): self.shown = width\n{MAKES}", {"shown": 6}),
    "an expression that assigns": (
        "number = other; self.a = number; (number := width); self.one = conv(3, number)",
        {},
    ),
    "a function within": (f"def inner(width): width = other; return width\nself.shown = width; {MAKES}", {"shown": 6}),
    "an attribute set twice": ("self.a = width; self.one = conv(3, self.a); self.a = other", {}),
    "an attribute that is read": ("self.shown = width; self.one = conv(3, self.shown)", {"shown": 6}),
    "an attribute of its own": ("self.shown = [width][0]; self.one = conv(3, self.shown)", {"shown": 6}),
    "an attribute set in a tuple of many": ("self.a, *self.b = width, 8, 9; self.one = conv(3, self.a)", {}),
    "a list": (f"self.a = [other, width]; {MAKES}", {"a[1]": 6}),
    "a list with a star": (f"self.a = [*[other, other], width]; {MAKES}", {}),
    "a dict": (
        f"self.a = {{'x': width, 'y': [other, width], **{{'z': other}}}}; {MAKES}",
        {"a['x']": 6, "a['y'][1]": 6},
    ),
    "an argument's parts": (
        "self.a = sizes; self.one = conv(3, sizes[0]); self.two = conv(3, sizes[1])",
        {"a[0]": 6, "a[1]": 8},
    ),
    "parts by a variable": ("at = 0; self.a = sizes[at + 1]; self.one = conv(3, sizes[at])", {}),
    "an argument's attributes": (
        "self.a, self.b = config.width, config.other; self.one = conv(3, config.width)",
        {"a": 6},
    ),
    "arithmetic": ("self.a = 2 * width; self.b = 2 + width; self.one = conv(3, 2 * width)", {"a": 12}),
    "a negative number": ("self.a = width + -2; self.b = other + -2; self.one = conv(3, width + -2)", {"a": 4}),
    "another sign": ("self.a = other + 2 - 2; self.b = 8 + -0; self.one = conv(3, width + 2 - 2)", {}),
    "arithmetic with two values": (
        "number = other; self.a = number + 1; number = width; self.one = conv(3, number + 1)",
        {},
    ),
    "calls": (
        "self.a, self.b, self.c = int(width * 1.0), max(width, 4), plus(width, 2)\n"
        "self.one = conv(int(width * 1.0), max(width, 4)); self.two = conv(3, plus(width, 2))",
        {"a": 6, "b": 6, "c": 8},
    ),
    "a call of an argument": ("self.a = config.call(other); self.one = conv(3, config.call(width))", {}),
    "calls by keyword": ("self.a = plus(4, more=other - 4); self.one = conv(3, plus(4, more=width - 4))", {}),
    "calls for the next": ("left = iter([other, width]); self.a = next(left); self.one = conv(3, next(left))", {}),
    "a call of two values": (
        "number = other; self.a = max(number, 2); number = width; self.one = conv(3, max(number, 2))",
        {},
    ),
    "a layer's size": (
        "self.one = conv(3, width); self.a, self.b = self.one.out_channels, self.one.in_channels",
        {"a": 6, "b": 3},
    ),
    "a size of a list's layer": (
        "self.all = nn.ModuleList([conv(3, width)]); self.a = self.all[0].out_channels",
        {"a": 6},
    ),
    "a part": ("self.part = Part(width); self.a = self.part.inner", {"part.inner": 6, "a": 6}),
    "parts": ("self.part = Part(width); self.next = Part(other)", {"part.inner": 6, "next.inner": 8}),
    "a derived part": (
        "self.part = Derived(1, width=width); self.a = width; self.b = other",
        {"part.inner": 6, "a": 6},
    ),
    "a part that is set twice": (
        "self.part = Part(other); self.part = Part(width); self.a = other; self.b = width",
        {"part.inner": 6},
    ),
    "a layer of its own class": ("self.one = Own(width); self.a, self.b = width, other", {"a": 6}),
    "what a base class has set": (
        "self.part, self.next = Reading(width), Reading(other)",
        {"part.inner": 6, "part.same": 6, "next.inner": 8, "next.same": 8},
    ),
    "a layer's own size": (
        "self.one, self.two = ReadingOwn(width), ReadingOwn(other)",
        {"one.same": 6, "two.same": 8},
    ),
    "a class in a variable": (
        "kind = nn.Conv2d if other else nn.Linear; self.one = kind(3, width, 1); self.a = width",
        {"a": 6},
    ),
    "sizes with a star": ("self.one = nn.Conv2d(*[3, width], 1); self.a = width", {}),
    "a module of two kinds": ("self.one = either(width); self.a = width", {}),
    "layers in a row": (
        "self.all = nn.Sequential(nn.ReLU(), conv(3, width), conv(8, other)); self.a, self.b = width, other",
        {"a": 6, "b": 8},
    ),
    "an empty list": ("self.all = nn.ModuleList(); self.all.append(conv(3, width)); self.a = width", {}),
    "a list with more": (
        "parts = [nn.ReLU(), conv(3, width)]; self.a, self.b = width, other\n"
        "self.all = nn.Sequential(*parts, conv(3, other))",
        {"a": 6, "b": 8},
    ),
    "a list that grows": (
        "parts = []; parts.append(conv(3, width)); parts.extend([nn.ReLU(), conv(3, other)])\n"
        "self.all = nn.Sequential(*parts); self.a, self.b = width, other",
        {"a": 6, "b": 8},
    ),
    "a list that grows perhaps": (
        "parts = [nn.ReLU()]\n"
        "if other: parts.append(conv(3, width))\n"
        "else: parts.append(nn.ReLU())\n"
        "parts.append(conv(3, other)); self.all = nn.Sequential(*parts); self.a, self.b = width, other",
        {"b": 8},
    ),
    "a list that grows in a loop": (
        "parts = [conv(3, width)]\n"
        "for _ in range(2): parts.append(nn.ReLU())\n"
        "parts.append(conv(3, other)); self.all = nn.Sequential(*parts); self.a, self.b = width, other",
        {"a": 6, "b": 8},
    ),
    "a list that is written to": (
        "parts = [conv(3, other)]; parts[0] = conv(3, width); self.all = nn.Sequential(*parts); self.b = other",
        {},
    ),
    "a list that is put elsewhere": (
        "parts = [conv(3, width)]; parts.insert(0, conv(3, other)); self.all = nn.Sequential(*parts); self.a = width",
        {},
    ),
    "two lists of one name": (
        "parts = [conv(3, other)]; parts = [conv(3, width)]; self.all = nn.Sequential(*parts); self.a = other",
        {},
    ),
    "a list of lists": (
        f"self.a = [[other, width], {{'x': {{'y': width}}}}]; {MAKES}",
        {"a[0][1]": 6, "a[1]['x']['y']": 6},
    ),
    "a list that is longer than what is written": (f"self.a = [other]; self.a.append(width); {MAKES}", {}),
    "a function of two kinds": (f"self.a = width; {MAKES}; self.two = one_of(width, other)", {}),
    "a function in another order": (
        "self.a, self.b = width, other; self.one = flipped(width, other)",
        {"a": 6, "b": 8},
    ),
    "an attribute that a derived class sets anew": ("self.part = Again(width, other)", {"part.inner": 8}),
    "an attribute that changes": (f"self.a = width; {MAKES}; self.a = other", {}),
    "a part's attribute that changes": ("self.part = Changing(width, other); self.a = self.part.inner", {}),
    "a norm": ("self.norm = nn.LayerNorm(width); self.a = width", {"a": 6}),
    "a loop that adds nothing": (
        "parts = [conv(3, width)]\nfor _ in range(0): parts.append(nn.ReLU())\nparts.append(conv(3, other))\n"
        "self.all = nn.Sequential(*parts); self.a, self.b = width, other",
        {"a": 6, "b": 8},
    ),
    "a list that grows before a branch": (
        "parts = []; parts.append(conv(3, width)); self.names = []; self.names.append('a'); str(1)\n"
        "if other: parts.append(nn.ReLU())\n"
        "self.all = nn.Sequential(*parts); self.a = width",
        {"a": 6},
    ),
    "what a function lists": ("self.all = nn.Sequential(*list([conv(3, width)])); self.a = width", {}),
    "an empty list between": (
        "self.all = nn.Sequential(conv(3, width), *tuple(), conv(3, other)); self.a, self.b = width, other",
        {"a": 6, "b": 8},
    ),
    "a list between that was emptied": (
        "parts = [nn.ReLU()]; parts.clear(); self.a, self.b = width, other\n"
        "self.all = nn.Sequential(conv(3, width), *parts, conv(3, other))",
        {"a": 6, "b": 8},
    ),
    "another function where all layers agree": (f"{MAKES}; self.a = width; plus(width)", {"a": 6}),
    # Two layers hold the number: where another call got it, both may be made of it.
    "layers beside": (BESIDE, {"shown": 6}),
    "a function of Python's own": (f"{BESIDE}; max(width, 1); int(width)", {"shown": 6}),
    "another function": (f"{BESIDE}; max(width, 1); plus(width)", {}),
    "another function by keyword": (f"{BESIDE}; plus(1, more=width)", {}),
    "a star in a call": ("self.one = conv(3, sizes[0]); self.two = conv(3, other); self.a = sizes; plus(*sizes)", {}),
    # Expressions within one another are followed for twenty steps.
    "twenty attributes": (
        f"self.a = config{'.deep' * 19}.width; self.one = conv(3, config{'.deep' * 19}.width)",
        {"a": 6},
    ),
    "more attributes": (f"self.a = config{'.deep' * 20}.width; self.one = conv(3, config{'.deep' * 20}.width)", {}),
    "twenty sums": (f"self.a = width{' + 1' * 20}; self.one = conv(3, width{' + 1' * 20})", {"a": 26}),
    "more sums": (f"self.a = width{' + 1' * 21}; self.one = conv(3, width{' + 1' * 21})", {}),
    "twenty calls": (
        f"self.a = {'int(' * 20}width{')' * 20}; self.one = conv(3, {'int(' * 20}width{')' * 20})",
        {"a": 6},
    ),
    "more calls": (f"self.a = {'int(' * 21}width{')' * 21}; self.one = conv(3, {'int(' * 21}width{')' * 21})", {}),
    "twenty entries": (f"self.a = config.tower{'[0]' * 19}; self.one = conv(3, config.tower{'[0]' * 19})", {"a": 6}),
    "more entries": (f"self.a = config.higher{'[0]' * 20}; self.one = conv(3, config.higher{'[0]' * 20})", {}),
    "twenty names": (f"n0 = width\n{LATER}\nself.a = width; self.one = conv(3, n19)", {"a": 6}),
    "more names": (f"n0 = width\n{LATER}\nself.a = width; self.one = conv(3, n20)", {}),
    "attributes of attributes": (
        f"self.n0 = width\n{OWN}\nself.a = width; self.one = conv(3, self.n19)",
        {"a": 6, **{f"n{at}": 6 for at in range(21)}},
    ),
}


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_attributes_get_the_width_that_the_constructor_gives_a_layer_too(tmp_path: Path, name: str) -> None:
    lines, shown = CONSTRUCTORS[name]
    path, space = tmp_path / "net.py", dict[str, Any]()
    path.write_text(MODULE.format(lines=lines.replace("\n", "\n        ")))  # what is read is the source in a file
    exec(compile(path.read_text(), path, "exec"), space)
    nets = [space["Net"](width, 8, (width, 8), Config(width)) for width in (8, 6)]
    assert {_named(place): size for place, size in sizes_shown(*nets).items()} == shown


class Config:
    """Numbers in objects and lists within one another."""

    def __init__(self, width: int) -> None:
        self.width, self.other, self.deep, self.call = width, 8, self, int
        self.tower: Any = width
        for _ in range(19):
            self.tower = [self.tower]
        self.higher = [self.tower]


def _named(place: Place) -> str:
    name, key, path = place
    return f"{name}.{key}".lstrip(".") + "".join(f"[{each!r}]" for each in path)


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("layers.append(x)", "append"),
        ("layers.extend(x)", "extend"),
        ("layers.insert(0, x)", None),
        ("others.append(x)", None),
        ("append(x)", None),
        ("self.layers.append(x)", None),
    ],
)
def test_a_call_appends_to_the_list_of_its_own_name_alone(text: str, method: str | None) -> None:
    call = ast.parse(text, mode="eval").body
    assert isinstance(call, ast.Call)
    assert _method_of(call, "layers") == method
