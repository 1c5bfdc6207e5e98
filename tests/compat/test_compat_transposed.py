"""Transposed convolutions, and those to one channel, through NNI's speedup as it is and as it is mended."""

from __future__ import annotations

import copy

import pytest
import torch
from compat_pruners import kept, nnis, ours
from nni.common.concrete_trace_utils import concrete_trace
from nni.compression.base.compressor import Pruner
from nni.compression.speedup import auto_set_denpendency_group_ids as auto_set_ids_of_graph
from nni.compression.utils import auto_set_denpendency_group_ids
from torch import Tensor, nn

import nni_topo


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
    grouped = auto_set_denpendency_group_ids(model, config, images)
    pruner = nnis(grouped, model)
    with pytest.raises(RuntimeError, match="must match the size"):
        pruner.compress()
    pruner.unwrap_model()
    grouped = nni_topo.dependency_groups(model, images, config)
    assert_pruned_to_four(ours(grouped, model), images)
    nni_topo.enable_strict()
    assert_pruned_to_four(nnis(grouped, model), images)


def assert_pruned_to_four(pruner: Pruner, images: Tensor) -> None:
    model = pruner.bound_model
    _, masks = pruner.compress()
    masked = model(images)
    pruner.unwrap_model()
    dense = nni_topo.to_dense(model, images, masks)
    assert (dense.conv.out_channels, dense.transposed.out_channels, dense.head.in_channels) == (4, 4, 4)
    torch.testing.assert_close(dense(images), masked)


def test_transposed_convolution_with_a_bias() -> None:
    config = [{"op_names": ["transposed"], "sparse_ratio": 0.5}]
    with pytest.raises(RuntimeError, match="must match the size"):
        nnis(config, Upsampled()).compress()
    nni_topo.enable_strict()
    for pruner in (ours(config, Upsampled()), nnis(config, Upsampled())):
        _, masks = pruner.compress()
        assert torch.equal(masks["transposed"]["weight"][0, :, 0, 0], masks["transposed"]["bias"])
        assert int(masks["transposed"]["bias"].sum()) == 4


def outputs_with_weights(mask: Tensor, groups: int) -> Tensor:
    """Output channels of a transposed convolution of which a mask keeps at least one weight."""
    return mask.unflatten(0, (groups, -1)).flatten(3).any(3).any(1).flatten()


@pytest.mark.parametrize(("groups", "outputs"), [(2, 8), (2, 16), (4, 8), (4, 16)])
def test_grouped_transposed_convolution(groups: int, outputs: int) -> None:
    torch.manual_seed(0)
    images = torch.rand(2, 8, 8, 8)
    up, head = nn.ConvTranspose2d(8, outputs, 3, groups=groups), nn.Conv2d(outputs, 4, 1)
    model = nn.Sequential(nn.Conv2d(8, 8, 1), up, head).eval()
    config = [{"op_names": ["0", "1"], "sparse_ratio": 0.5}]
    plain = nnis(config[:1], copy.deepcopy(model))
    if outputs == 8:  # the bias of outputs that stay is gone
        masks = plain.compress()[1]["1"]
        assert not torch.equal(outputs_with_weights(masks["weight"], groups), masks["bias"].bool())
    else:
        with pytest.raises(RuntimeError, match="must match the size"):
            plain.compress()
    grouped = nni_topo.dependency_groups(model, images, config)
    nni_topo.enable_strict()
    for build in (ours, nnis):
        pruner = build(grouped, model)
        _, masks = pruner.compress()
        masked = model(images)
        pruner.unwrap_model()
        assert torch.equal(outputs_with_weights(masks["1"]["weight"], groups), masks["1"]["bias"].bool())
        dense = nni_topo.to_dense(model, images, masks)
        assert (dense[1].in_channels, dense[1].out_channels) == (4, outputs // 2)
        torch.testing.assert_close(dense(images), masked)


def test_depthwise_transposed_convolution() -> None:
    torch.manual_seed(0)
    images = torch.rand(2, 8, 8, 8)
    model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ConvTranspose2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1)).eval()
    grouped = nni_topo.dependency_groups(model, images, [{"op_names": ["0", "1"], "sparse_ratio": 0.5}])
    pruner = ours(grouped, model)
    _, masks = pruner.compress()
    masked = model(images)
    pruner.unwrap_model()
    dense = nni_topo.to_dense(model, images, masks)
    assert (dense[1].in_channels, dense[1].out_channels, dense[1].groups) == (4, 4, 4)
    torch.testing.assert_close(dense(images), masked)


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
    with pytest.raises(RuntimeError, match=r"shape|size"):  # which one depends on the hash seed
        nnis(tied, Mapped()).compress()

    free = nni_topo.dependency_groups(Mapped(), images, config)
    assert not any("dependency_group_id" in entry for entry in free)
    assert free.skipped == {"map": "it gives the model's output"}
    assert kept(ours(free, Mapped())) == {"conv": 4}
    nni_topo.enable_strict()
    apart = auto_set_ids_of_graph(graph, config)
    assert not any("dependency_group_id" in entry for entry in apart)
    assert kept(nnis(apart, Mapped())) == {"conv": 4, "map": 1}
    assert graph.map.groups == 1
