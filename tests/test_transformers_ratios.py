"""Configs of Transformers that hold a ratio of two widths, and configs that hold no width of a layer."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import nni_topo
from nni_topo.errors import ConfigError

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
QUICK: dict[str, Any] = {"distill": False, "compensate": None, "pruner": "l1", "progress": False}


def dinov2(**knobs: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.Dinov2Config(**SIZES, num_labels=5, **knobs)
    return transformers.Dinov2ForImageClassification(config).eval()


def hiera() -> Any:
    torch.manual_seed(0)
    config = transformers.HieraConfig(
        embed_dim=12,
        image_size=[64, 64],
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 2, 4],
        masked_unit_attention=[True, True, False, False],
        mlp_ratio=4.0,
        num_labels=5,
    )
    return transformers.HieraForImageClassification(config).eval()


def swin() -> Any:
    torch.manual_seed(0)
    config = transformers.SwinConfig(
        image_size=32, patch_size=2, embed_dim=12, depths=[1, 2], num_heads=[2, 4], window_size=4, num_labels=5
    )
    return transformers.SwinForImageClassification(config).eval()


def vitpose() -> Any:
    torch.manual_seed(0)
    sizes = {**SIZES, "image_size": [32, 32], "patch_size": [8, 8]}
    backbone = transformers.VitPoseBackboneConfig(**sizes, mlp_ratio=4, out_indices=[2])
    config = transformers.VitPoseConfig(backbone_config=backbone, num_labels=3)
    return transformers.VitPoseForPoseEstimation(config).eval()


def poolformer() -> Any:
    torch.manual_seed(0)
    config = transformers.PoolFormerConfig(hidden_sizes=[12, 20, 24, 32], depths=[1, 1, 1, 1], num_labels=5)
    return transformers.PoolFormerForImageClassification(config).eval()


MODELS = {"dinov2": dinov2, "hiera": hiera, "swin": swin, "vitpose": vitpose, "poolformer": poolformer}
ANY_SIZE = ("poolformer",)


def outputs_of(model: Any, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(pixel_values=images)[0]
    return found


def size_of(model: Any) -> int:
    sizes = model.config.backbone_config if hasattr(model.config, "backbone_config") else model.config
    size = getattr(sizes, "image_size", 64)
    return size if isinstance(size, int) else size[0]


@pytest.mark.parametrize("share", [pytest.param(0.9, marks=pytest.mark.slow), 0.7])
@pytest.mark.parametrize("name", MODELS)
def test_a_network_of_any_share_loads_by_its_config(name: str, share: float, tmp_path: Path) -> None:
    model = MODELS[name]()
    size = size_of(model)
    images = torch.rand(24, 3, size, size)
    small: Any = nni_topo.shrink(
        model, [{"pixel_values": part} for part in images.split(8)], {"params": share}, **QUICK
    )
    assert small.report.budget.is_met
    assert small.report.undescribed == ""
    assert small.report.pruned_layers
    small.save_pretrained(tmp_path / "own")
    nni_topo.save_pretrained(small, tmp_path / "ours")
    size += 32 * (name in ANY_SIZE)
    others = torch.rand(3, 3, size, size)
    for folder in ("own", "ours"):
        again = type(model).from_pretrained(tmp_path / folder).eval()
        assert torch.equal(outputs_of(again, others), outputs_of(small, others))


def test_layers_of_several_widths_keep_one_share() -> None:
    model = hiera()
    batches = [{"pixel_values": torch.rand(8, 3, 64, 64)}]
    small: Any = nni_topo.shrink(model, batches, {"flops": 0.85}, **QUICK)
    before, after = (
        [module.out_features for name, module in net.named_modules() if name.endswith("mlp.fc1")]
        for net in (model, small)
    )
    assert before == [48, 96, 192, 384]
    assert after[0] < 48
    assert after == [after[0] * times for times in (1, 2, 4, 8)]


@pytest.mark.parametrize("width", [191, 190, 163, 129, 113, 96, 58, 49, 47, 1])
def test_every_width_is_written_as_a_ratio_that_gives_it(width: int) -> None:
    """48 times the quotient of a width and 48 may be just below the width."""
    model, images = dinov2(mlp_ratio=4), torch.rand(2, 3, 32, 32)
    names = [f"dinov2.encoder.layer.{block}.mlp.fc1" for block in range(2)]
    masks = {}
    for name in names:
        rows = (torch.arange(192) < width).float()
        masks[name] = {"weight": rows[:, None].expand(192, 48).clone(), "bias": rows}
    dense: Any = nni_topo.to_dense(model, {"pixel_values": images}, masks)
    assert [dense.get_submodule(name).out_features for name in names] == [width, width]
    built = type(dense)(copy.deepcopy(dense.config)).eval()
    built.load_state_dict(dense.state_dict())
    others = torch.rand(5, 3, 32, 32)
    assert torch.equal(outputs_of(built, others), outputs_of(dense, others))
    masked = nni_topo.masked_model(model, {"pixel_values": images}, masks)
    torch.testing.assert_close(outputs_of(dense, others), outputs_of(masked, others), rtol=1e-4, atol=1e-5)


def resnet() -> Any:
    config = transformers.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], num_labels=5)
    return transformers.ResNetForImageClassification(config).eval()


def convnext() -> Any:
    config = transformers.ConvNextConfig(hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 1, 1], num_labels=5)
    return transformers.ConvNextForImageClassification(config).eval()


def segformer() -> Any:
    config = transformers.SegformerConfig(
        hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 2, 4], num_labels=5
    )
    return transformers.SegformerForSemanticSegmentation(config).eval()


@pytest.mark.parametrize("make", [resnet, convnext, pytest.param(segformer, marks=pytest.mark.slow)])
def test_free_widths_are_the_default_where_a_config_describes_none(
    make: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model, images = make(), torch.rand(16, 3, 64, 64)
    with caplog.at_level(logging.WARNING, "nni_topo"):
        small: Any = nni_topo.shrink(model, [{"pixel_values": images}], {"params": 0.6}, **QUICK)
    assert small.report.budget.left == pytest.approx(0.6, abs=0.03)
    assert sum("free widths" in message for message in caplog.messages) == 1
    nni_topo.save(small, tmp_path / "small.pt")
    again = nni_topo.load(tmp_path / "small.pt", model)
    others = torch.rand(3, 3, 96, 96)
    assert torch.equal(outputs_of(again, others), outputs_of(small, others))
    with pytest.raises(ConfigError, match="'equal_blocks': False"):
        nni_topo.shrink(model, [{"pixel_values": images}], {"params": 0.6, "equal_blocks": True}, **QUICK)


def test_a_folder_is_written_only_if_it_loads_the_same_weights(tmp_path: Path) -> None:
    class Forgetful(transformers.Dinov2Model):  # type: ignore[misc,name-defined]
        _keys_to_ignore_on_save = ("encoder.layer.0.mlp.fc1.weight",)

    torch.manual_seed(0)
    model = Forgetful(transformers.Dinov2Config(**SIZES)).eval()
    with pytest.raises(ConfigError, match=r"others for encoder\.layer\.0\.mlp\.fc1\.weight"):
        nni_topo.save_pretrained(model, tmp_path / "folder")
    assert not list((tmp_path / "folder").iterdir())
