"""Transposed convolutions under NNI's own pruners, and convolutions to one channel, as NNI is and as it is patched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nni.common.concrete_trace_utils import concrete_trace
from nni.compression.base.compressor import Pruner
from nni.compression.pruning import FPGMPruner, L1NormPruner, L2NormPruner, LevelPruner
from nni.compression.speedup import auto_set_denpendency_group_ids as auto_set_ids_of_graph
from nni.compression.utils import auto_set_denpendency_group_ids
from torch import Tensor, nn

import nni_topo


def kept(pruner: Pruner) -> dict[str, int]:
    """Filters that stay, by layer."""
    _, masks = pruner.compress()
    pruner.unwrap_model()
    return {name: int(targets["weight"].flatten(1)[:, 0].sum()) for name, targets in masks.items()}


def nnis(model: nn.Module, config: list[dict[str, Any]]) -> L1NormPruner:
    """NNI's pruner with its layers in alphabetical order: as it is, the order depends on the hash seed."""
    pruner = L1NormPruner(model, config)
    pruner._target_spaces = dict(sorted(pruner._target_spaces.items()))
    return pruner


class Upsampled(nn.Module):
    """Adds a convolution and a transposed one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.transposed = nn.ConvTranspose2d(3, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.conv(images) + self.transposed(images))
        return logits


def test_transposed_convolution_in_an_addition() -> None:
    torch.manual_seed(0)
    model, images = Upsampled().eval(), torch.rand(2, 3, 8, 8)
    config = [{"op_names": ["conv", "transposed"], "sparse_ratio": 0.5}]
    assert_pruned_to_four(nnis(model, auto_set_denpendency_group_ids(model, config, images)), images)
    grouped = nni_topo.dependency_groups(model, images, config)
    assert_pruned_to_four(nni_topo.RandomPruner(model, grouped), images)
    assert_pruned_to_four(nnis(model, grouped), images)


def assert_pruned_to_four(pruner: Pruner, images: Tensor) -> None:
    model = pruner.bound_model
    _, masks = pruner.compress()
    masked = model(images)
    pruner.unwrap_model()
    dense = nni_topo.to_dense(model, images, masks)
    assert (dense.conv.out_channels, dense.transposed.out_channels, dense.head.in_channels) == (4, 4, 4)
    torch.testing.assert_close(dense(images), masked)


@pytest.mark.parametrize("kind", [L1NormPruner, L2NormPruner, FPGMPruner, LevelPruner, nni_topo.RandomPruner])
@pytest.mark.parametrize(("channels", "groups"), [((6, 8), 1), ((4, 12), 2), ((6, 6), 6)])
@pytest.mark.parametrize("layer", [nn.ConvTranspose1d, nn.ConvTranspose2d])
def test_masks_of_the_bias_are_those_of_the_output_channels(
    kind: type[Pruner], channels: tuple[int, int], groups: int, layer: type[nn.ConvTranspose2d]
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(layer(*channels, 3, stride=2, groups=groups))
    with torch.no_grad():
        rows = model[0].weight.unflatten(0, (groups, -1))
        rows[:, :, 0] *= 1e-3  # the first channel of each group is worth least
    _, masks = kind(model, [{"op_names": ["0"], "sparse_ratio": 0.5}]).compress()
    alive = outputs_with_weights(masks["0"]["weight"].expand_as(model[0].weight), groups)
    assert torch.equal(alive, masks["0"]["bias"].bool())
    if kind is not LevelPruner:
        assert int(alive.sum()) == channels[1] // 2
    if kind in (L1NormPruner, L2NormPruner) and groups < channels[1]:
        assert not alive.unflatten(0, (groups, -1))[:, 0].any()


def test_what_another_layer_aligns_to_a_transposed_convolution_follows_its_outputs() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(4, 8, 3), nn.BatchNorm2d(8))
    follows = {"align": {"module_name": "0", "target_name": "weight", "dims": [0]}}
    config = [
        {"op_names": ["0"], "sparse_ratio": 0.5},
        {"op_names": ["1"], "target_names": ["weight"], "target_settings": {"weight": follows}},
    ]
    _, masks = L1NormPruner(model, config).compress()
    assert torch.equal(masks["1"]["weight"], masks["0"]["bias"])
    assert int(masks["1"]["weight"].sum()) == 4


def outputs_with_weights(mask: Tensor, groups: int) -> Tensor:
    """Output channels of a transposed convolution of which a mask keeps at least one weight."""
    return mask.unflatten(0, (groups, -1)).flatten(3).any(3).any(1).flatten()


class Mapped(nn.Module):
    """Ends in a map of one channel and four logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.map = nn.Conv2d(8, 1, 1)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.conv(images)
        return self.map(features), self.head(features)


def test_convolution_to_one_channel_is_no_depthwise_one() -> None:
    config = [{"op_types": ["Conv2d"], "exclude_op_names": ["head"], "sparse_ratio": 0.5}]
    images = torch.rand(1, 3, 8, 8)
    graph = concrete_trace(Mapped(), {"images": images})
    tied = auto_set_ids_of_graph(graph, config)
    assert len({entry["dependency_group_id"] for entry in tied}) == 1  # 8 channels tied to 1
    free = nni_topo.dependency_groups(Mapped(), images, config)
    assert not any("dependency_group_id" in entry for entry in free)
    assert free.skipped == {"map": "it gives the model's output"}
    assert kept(nni_topo.RandomPruner(Mapped(), free)) == {"conv": 4}
    assert graph.map.groups == 1
