"""Attributes that code around a network relies on, and networks of timm and torchvision that go on living there."""

from __future__ import annotations

import copy
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import mobilenet_v2
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.ops import FeaturePyramidNetwork

import nni_topo
from nni_topo.errors import ConfigError
from nni_topo.network.speedup import width_attributes


def dense_of(model: nn.Module, images: Tensor, **entry: Any) -> Any:
    asked = [{"sparse_ratio": 0.5, **(entry or {"op_types": ["Conv2d", "Linear"]})}]
    groups = nni_topo.dependency_groups(model, images, asked)
    masks = nni_topo.create_pruner("l1", copy.deepcopy(model), groups).compress()[1]
    return nni_topo.to_dense(model, images, masks)


class Head(nn.Module):
    """As timm's heads."""

    def __init__(self, widths: dict[str, int], classes: int) -> None:
        super().__init__()
        self.in_features = self.num_features = max(widths.values())
        self.norm, self.fc = nn.BatchNorm2d(24), nn.Linear(24, classes)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.norm(x).mean((2, 3))
        return x if pre_logits else self.fc(x)

    def reset(self, classes: int) -> None:
        self.fc = nn.Linear(self.num_features, classes)


class Body(nn.Module):
    """A network that is written as timm's are."""

    def __init__(self) -> None:
        super().__init__()
        widths = {f"stage{at}": 8 * at for at in (1, 2, 3)}
        self.feature_info = [
            {"module": name, "num_chs": width, "reduction": 2} for name, width in reversed(list(widths.items()))
        ]
        self.num_features = self.head_hidden_size = max(widths.values())
        self.stage1 = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.stage2 = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.stage3 = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU())
        self.head = Head({"one": 24, "other": 24}, 4)

    def forward_features(self, x: Tensor) -> Tensor:
        found: Tensor = self.stage3(self.stage2(self.stage1(x)))
        return found

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        found: Tensor = self.head(x, pre_logits=pre_logits)
        return found

    def get_classifier(self) -> nn.Module:
        found: nn.Module = self.head.fc
        return found

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_a_network_written_as_those_of_timm_tells_its_widths(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = Body().eval()
    dense = dense_of(model, IMAGES, op_names=["stage1.0", "stage3.0"])
    # Stage 2 keeps its channels, and its maps of 8 x 8 are as large as stage 1 was wide.
    assert [entry["num_chs"] for entry in dense.feature_info] == [12, 16, 4]
    assert (dense.num_features, dense.head_hidden_size, dense.head.in_features, dense.head.num_features) == (12,) * 4
    assert dense.report.stale == {}
    assert [entry["num_chs"] for entry in model.feature_info] == [24, 16, 8]
    nni_topo.save(dense, tmp_path / "dense.safetensors")
    loaded: Any = nni_topo.load(tmp_path / "dense.safetensors", Body)
    assert (loaded.feature_info, loaded.num_features) == (dense.feature_info, 12)
    dense.head.reset(7)
    assert dense(IMAGES).shape == (2, 7)


def test_what_describes_another_tensor_is_left_and_named(caplog: pytest.LogCaptureFixture) -> None:
    model = Body().eval()
    for entry, module in zip(model.feature_info, ("stage1", "stage2.0", "stage4"), strict=True):
        entry["module"] = module
    dense = dense_of(model, IMAGES)
    # Stage 1 never had 24 channels, there is no stage 4, and what stage 2 begins with has the width that it says.
    assert [entry["num_chs"] for entry in dense.feature_info] == [24, 8, 8]
    assert dense.report.stale == {"feature_info[0]['num_chs']": 24, "feature_info[2]['num_chs']": 8}
    told = "feature_info[0]['num_chs'] 24, feature_info[2]['num_chs'] 8"
    assert sum(told in record.getMessage() for record in caplog.records) == 1
    assert f"attributes not updated: {told}" in repr(dense.report)
    # Where no layer of such a width loses channels, none is stale.
    assert dense_of(model, IMAGES, op_names=["stage2.0"]).report.stale == {}


def trained_pyramid(body: nn.Module, widths: list[int], maps: Any, images: Tensor) -> None:
    """Train a pyramid over the maps of a body for a step: all weights that the maps depend on change."""
    pyramid = FeaturePyramidNetwork(widths, 8)
    parameters = [*body.train().parameters(), *pyramid.parameters()]
    optimizer = torch.optim.Adam(parameters, 0.01)
    levels = pyramid(OrderedDict((str(at), each) for at, each in enumerate(maps(images))))
    assert {level.shape[1] for level in levels.values()} == {8}
    sum(level.square().mean() for level in levels.values()).backward()
    assert sum(each.grad is not None for each in body.parameters()) > 4
    before = [each.detach().clone() for each in parameters]
    optimizer.step()
    for old, parameter in zip(before, parameters, strict=True):
        assert parameter.grad is None or not parameter.grad.any() or not torch.equal(old, parameter)


@pytest.mark.slow
def test_a_resnet_of_torchvision_gets_a_pyramid() -> None:
    torch.manual_seed(0)
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=4).eval()
    images = torch.randn(2, 3, 32, 32)
    dense = dense_of(model, images)
    assert (model.inplanes, dense.inplanes, dense.layer4[0].conv2.out_channels) == (512, 256, 256)
    # The width per group counts no channels, though the first layer had as many.
    assert (dense.base_width, dense.report.stale) == (64, {})
    getter = IntermediateLayerGetter(copy.deepcopy(dense), {"layer2": "two", "layer4": "four"})
    assert {name: each.shape[1] for name, each in getter(images).items()} == {"two": 64, "four": 256}
    backbone = _resnet_fpn_extractor(dense, trainable_layers=5)
    assert {each.shape[1] for each in backbone(images).values()} == {256}
    trained_pyramid(getter, [64, 256], lambda x: getter(x).values(), images)


@pytest.mark.slow
def test_a_mobile_net_v2_of_torchvision_gets_a_new_classifier() -> None:
    torch.manual_seed(0)
    dense = dense_of(mobilenet_v2(width_mult=0.35, num_classes=4).eval(), torch.randn(2, 3, 32, 32))
    assert dense.last_channel == 640
    dense.classifier[1] = nn.Linear(dense.last_channel, 7)
    assert dense(torch.randn(2, 3, 32, 32)).shape == (2, 7)


SMALL = {"img_size": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "resnet10t": {},
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 48},
    "mobilenetv3_small_050": {},
    "convnext_atto": {},
    "regnetx_002": {},
    "efficientnet_lite0": {},
    "densenet121": {"growth_rate": 8, "block_config": (2, 2, 2, 2)},
    "swin_tiny_patch4_window7_224": {
        **SMALL, "embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8), "window_size": 2,
    },
    "ghostnet_050": {},
    "poolformer_s12": {},
    "fastvit_t8": {},
    "mobilenetv2_050": {},
    "xcit_nano_12_p16_224": {**SMALL, "depth": 2, "cls_attn_layers": 1},
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=pytest.mark.slow if at > 1 else ()) for at, each in enumerate(FAMILIES)]
)
def test_families_of_timm(name: str) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **FAMILIES[name]).eval()
    images = torch.randn(2, 3, *[FAMILIES[name].get("img_size", 64)] * 2)
    dense = dense_of(model, images)
    features = dense.forward_features(images)
    pooled = dense.forward_head(features, pre_logits=True)
    assert model.num_features > dense.num_features
    assert dense.num_features in (features.shape[1], features.shape[-1])
    assert dense.head_hidden_size == pooled.shape[1] == dense.get_classifier().in_features
    # What is left describes how the network was made, not what it gives.
    assert not [each for each in dense.report.stale if "num_features" in each or "feature_info" in each]

    found = timm.models._features.FeatureGetterNet(copy.deepcopy(dense), out_indices=(-2, -1))
    maps = found(images)
    assert found.feature_info.channels() == [each.shape[1] for each in maps]
    assert found.feature_info.channels()[-1] < model.feature_info[-1]["num_chs"]
    trained_pyramid(found, found.feature_info.channels(), found, images)

    dense.reset_classifier(7)
    logits = dense.train()(images)
    assert logits.shape == (2, 7)
    logits.square().mean().backward()
    assert dense.get_classifier().weight.grad.any()
    dense.reset_classifier(0)
    assert torch.equal(dense.eval()(images), dense.forward_head(dense.forward_features(images), pre_logits=True))


class Halves(nn.Module):
    """As a C2f block of ultralytics: a method beside the forward splits by an attribute."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.width = self.split = width
        self.first, self.second = nn.Conv2d(3, 2 * width, 1), nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.first(x).chunk(2, 1)
        found: Tensor = self.second(left * right)
        return found

    def by_width(self, x: Tensor) -> Tensor:
        left, right = self.first(x).split((self.width, self.width), 1)
        found: Tensor = self.second(left * right)
        return found


class Derived(Halves):
    pass


@pytest.mark.parametrize("kind", [Halves, f"{__name__}.Halves"])
@torch.no_grad()
def test_a_registered_attribute_follows(kind: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(width_attributes, "_TABLE", dict(width_attributes._TABLE))
    kept = torch.tensor([1.0, 0, 1, 0, 1, 0, 0, 0] * 2).view(-1, 1, 1, 1).expand(16, 3, 1, 1)
    for make in (Halves, Derived):
        model, masks = nn.Sequential(make()).eval(), {"0.first": {"weight": kept}}
        unknown: Any = nni_topo.to_dense(model, IMAGES, masks)
        assert (unknown[0].width, unknown.report.stale) == (8, {})
    nni_topo.register_width_attribute(kind, "width", "second", "input")
    nni_topo.register_width_attribute(kind, "split", "first")  # of which there are twice as many
    for make in (Halves, Derived):
        dense: Any = nni_topo.to_dense(nn.Sequential(make()).eval(), IMAGES, masks)
        assert (dense[0].width, dense.report.stale) == (3, {"0.split": 8})
        torch.testing.assert_close(dense[0].by_width(IMAGES), dense(IMAGES))
    nni_topo.save(dense, tmp_path / "dense.safetensors")
    assert nni_topo.load(tmp_path / "dense.safetensors", nn.Sequential(Derived()))[0].width == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((nn.Linear(2, 2), "width"), "kind must be a class of modules or its full name, got Linear"),
        ((int, "width"), "kind must be a class of modules or its full name"),
        ((Halves, None), "attribute must be"),
        ((Halves, "width", None), "module must be"),
        ((Halves, "width", "", "inputs"), "did you mean input"),
    ],
)
def test_entries_that_cannot_be_are_refused(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        nni_topo.register_width_attribute(*given)


def test_attributes_that_a_forward_reads_stay() -> None:
    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_channels = self.out_channels = 8
            self.layer = nn.Conv2d(3, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.layer(x) / self.out_channels
            return found

    dense = dense_of(nn.Sequential(Reading(), nn.Conv2d(8, 2, 1)).eval(), IMAGES)
    assert (dense[0].layer.out_channels, dense[0].out_channels) == (4, 8)
    # The images have 3 channels; the forward doesn't read the attribute that says 8.
    assert (dense[0].in_channels, dense.report.stale) == (8, {"0.in_channels": 8})


def test_a_network_of_timm_that_returns_features_alone_tells_their_widths(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")

    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = timm.create_model("resnet10t", features_only=True, out_indices=(1, -1))
            self.joints = nn.ModuleList(nn.Conv2d(width, 2, 1) for width in self.features.feature_info.channels())

        def forward(self, x: Tensor) -> list[Tensor]:
            return [joint(each) for joint, each in zip(self.joints, self.features(x), strict=True)]

    torch.manual_seed(0)
    model, images = Detector().eval(), torch.randn(2, 3, 64, 64)
    dense = dense_of(model, images)
    assert model.features.feature_info.channels() == [64, 512]
    assert dense.features.feature_info.channels() == [each.shape[1] for each in dense.features(images)] == [32, 256]
    nni_topo.save(dense, tmp_path / "dense.safetensors")
    loaded = nni_topo.load(tmp_path / "dense.safetensors", Detector)
    assert loaded.features.feature_info.channels() == [32, 256]
