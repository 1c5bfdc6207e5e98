"""Attributes that count channels: counted anew where the constructors show it, else named."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nni_topo
from nni_topo.network.layers.constructors import sizes_shown, stale_numbers


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
