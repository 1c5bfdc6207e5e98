"""Networks that are followed part by part: what only goes from one part to another may lose channels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from speedup_nets import masks_of
from torch import Tensor, nn

import nni_topo

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Head(nn.Module):
    """A convolution of each of some levels, which come in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleDict({"a": nn.Conv2d(6, 4, 1), "b": nn.Conv2d(6, 4, 1)})
        self.last = nn.Linear(8, 3)

    def forward(self, levels: dict[str, Tensor]) -> Tensor:
        found = [self.convs[key](level).relu().mean((2, 3)) for key, level in levels.items()]
        return self.last(torch.cat(found, 1))


class Backbone(nn.Sequential):
    """Layers that no tracer but the recorder follows, and give a dict."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        images = super().forward(images)
        return {"level": images * (2.0 if float(images.sum()) > -1 else 1.0)}


class Net(nn.Module):
    """A backbone and a head, which is named first, and between them something that a test chooses."""

    def __init__(self, between: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.head, self.between = Head(), between
        self.backbone = Backbone(nn.Conv2d(3, 6, 3), nn.ReLU())

    def forward(self, images: Tensor) -> list[Tensor]:
        level = self.backbone(images)["level"]
        told = self.between(level)
        rows = self.head({"a": level, "b": self.backbone(images.flip(3))["level"]})
        best = [row for row in rows if float(row.sum()) > 0] or [rows[0]]
        return [torch.stack(best), *([told] if isinstance(told, Tensor) else [])]


def net(between: Callable[[Tensor], object]) -> nn.Module:
    torch.manual_seed(0)
    return Net(between).eval()


ALL = [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.5}]


@pytest.mark.parametrize(
    "between",
    [
        lambda level: torch.arange(level.shape[2] * level.size(-1)) + level.dim(),
        lambda level: torch.zeros(level.shape[-2:], dtype=level.dtype, device=level.device),
    ],
    ids=["numbers", "zeros"],
)
def test_channels_go_where_only_sizes_are_asked_for(between):
    model = net(between)
    groups = nni_topo.dependency_groups(model, IMAGES, ALL)
    assert groups.skipped.keys() == {"head.last"}
    assert "could not be traced" in groups.skipped["head.last"]
    assert "two graphs" in groups.skipped["head.last"]
    masks = masks_of(nni_topo.RandomPruner(model, groups, seed=0))
    dense = nni_topo.to_dense(model, IMAGES, masks)
    assert (dense.backbone[0].out_channels, dense.head.convs["a"].in_channels, dense.head.last.in_features) == (3, 3, 4)
    masked = nni_topo.masked_model(model, IMAGES, masks)
    torch.testing.assert_close(dense(IMAGES[:1]), masked(IMAGES[:1]))


@pytest.mark.parametrize(
    "between",
    [
        lambda level: level,
        lambda level: level.relu_(),
        lambda level: torch.from_numpy(level.numpy()) * 2,
        lambda level: torch.zeros_like(level),
    ],
    ids=["returned", "written to", "as an array", "as large"],
)
def test_channels_stay_where_anything_else_has_a_part_in_them(between):
    groups = nni_topo.dependency_groups(net(between), IMAGES, ALL)
    assert "backbone.0" in groups.skipped
    assert [entry["op_names"][0] for entry in groups] == ["head.convs.a", "head.convs.b"]


class Halves(nn.Module):
    """Adds both halves of what a convolution gives; an attribute holds their width."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 6
        self.conv = nn.Conv2d(6, 2 * self.width, 1)

    def forward(self, images: Tensor) -> Tensor:
        first, second = torch.split(self.conv(images), self.width, 1)
        return first.relu() + second


def test_sizes_that_attributes_of_parts_hold_are_those_of_the_whole_model():
    torch.manual_seed(0)
    model = Net(lambda level: None).eval()
    model.backbone.append(nn.Sequential(Halves()))
    groups = nni_topo.dependency_groups(model, IMAGES, ALL)
    masks = masks_of(nni_topo.RandomPruner(model, groups, seed=0))
    dense = nni_topo.to_dense(model, IMAGES, masks)
    assert (dense.backbone[2][0].width, dense.backbone[2][0].conv.out_channels) == (3, 6)
    assert model.backbone[2][0].width == 6
    torch.testing.assert_close(dense(IMAGES[:1]), nni_topo.masked_model(model, IMAGES, masks)(IMAGES[:1]))


def test_a_model_is_left_as_it_was_by_tracers_that_fail():
    model = net(lambda level: None)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    held = [(name, id(module), set(vars(module))) for name, module in model.named_modules()]
    nni_topo.dependency_groups(model, IMAGES, ALL)
    assert held == [(name, id(module), set(vars(module))) for name, module in model.named_modules()]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Detector(nn.Module):
    """Scores places, and looks again at those that score enough, by layers of their own."""

    def __init__(self, least: float) -> None:
        super().__init__()
        self.least = least
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1))
        self.score = nn.Sequential(nn.Conv2d(6, 4, 1), nn.ReLU(), nn.Conv2d(4, 1, 1))
        self.head = nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 5))

    def forward(self, images: list[Tensor] | Tensor) -> list[Tensor]:
        states = self.backbone(images if isinstance(images, Tensor) else torch.stack(images))
        places = self.score(states).sigmoid()[:, 0] > self.least
        return [self.head(states.permute(0, 2, 3, 1)[places]), places]


@pytest.mark.parametrize("as_list", [True, False])
def test_a_detector_that_finds_nothing_in_the_example_says_so_and_its_other_layers_are_pruned(as_list: bool) -> None:
    torch.manual_seed(0)
    model, images = Detector(1.0).eval(), {"images": [*IMAGES] if as_list else IMAGES}
    groups = nni_topo.dependency_groups(model, images, ALL)
    assert [entry["op_names"] for entry in groups] == [["backbone.0"], ["score.0"]]
    for name in ("head.0", "head.3"):
        assert [reason.kind for reason in groups.reasons[name]] == ["nothing_found"]
    masks = masks_of(nni_topo.create_pruner("l1", model, groups))
    dense, masked = nni_topo.to_dense(model, images, masks), nni_topo.masked_model(model, images, masks)
    assert [len(each.weight) for each in (dense.backbone[0], dense.score[0], dense.head[0])] == [4, 2, 10]
    others = torch.randn(5, 3, 12, 9)
    dense.least = masked.least = 0.0
    found, wanted = dense([*others]), masked([*others])
    assert len(found[0]) == 5 * 12 * 9
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


class Sequences(nn.Module):
    """An encoder with attention, and a list whose length values decide, which is followed part by part."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, sequences: Tensor) -> list[Tensor]:
        rows = self.head(self.encoder(sequences).mean(1))
        return [torch.stack([row for row in rows if float(row.sum()) > 0] or [rows[0]])]


def test_attention_within_a_part_loses_heads():
    torch.manual_seed(0)
    model, inputs = Sequences().eval(), torch.randn(2, 5, 16)
    groups = nni_topo.dependency_groups(model, inputs, [{"op_types": ["MultiheadAttention"], "sparse_ratio": 0.5}])
    masks = masks_of(nni_topo.RandomPruner(model, groups, seed=0))
    dense = nni_topo.to_dense(model, inputs, masks)
    assert dense.encoder.layers[0].self_attn.num_heads == 2
    other = torch.randn(3, 7, 16)
    expected = nni_topo.masked_model(model, inputs, masks)(other)
    torch.testing.assert_close(dense(other), expected, rtol=1e-4, atol=1e-5)
