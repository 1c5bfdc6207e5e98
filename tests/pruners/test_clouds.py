"""Clouds of what is read need layers that are read: decided before the model is wrapped or anything long runs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import VisionTransformer

import nni_topo
from nni_topo.errors import ConfigError
from nni_topo.hooks import FunctionalCollector

IMAGES = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """The channels of ``wide`` are read in parts."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.first = nn.Conv2d(3, 4, 3)
        self.wide = nn.Conv2d(4, 8, 3)
        self.left = nn.Conv2d(2 if way == "pixel_shuffle" else 4, 6, 1)
        self.right = nn.Conv2d(4, 6, 1)
        self.head = nn.Linear(6, 2)

    def forward(self, images: Tensor) -> Tensor:
        wide = self.wide(self.first(images))
        if self.way == "chunk":
            one, two = wide.chunk(2, 1)
            return self.head((self.left(one) + self.right(two)).mean((2, 3)))
        if self.way == "slice":
            return self.head(self.left(wide[:, :4]).mean((2, 3)))
        return self.head(self.left(functional.pixel_shuffle(wide, 2)).mean((2, 3)))


def layers(*names: str) -> list[dict[str, object]]:
    return [{"op_names": list(names), "sparse_ratio": 0.5}]


def refused(net: nn.Module, config: list[dict[str, object]], name: str) -> str:
    parameters = list(net.parameters())
    with pytest.raises(ConfigError) as caught:
        nni_topo.create_pruner(name, net, config, calibration=[IMAGES])
    assert not any(name.endswith("_nni_wrapper") for name, _ in net.named_modules())
    assert all(one is other for one, other in zip(net.parameters(), parameters, strict=True))
    return str(caught.value)


@pytest.mark.parametrize("name", ["topological", "reconstruction"])
def test_layers_with_channels_that_nothing_reads_are_refused_before_wrapping_with_a_way_on(name):
    words = refused(Net("slice"), layers("first", "wide"), name)
    assert words.endswith("(wide)")
    assert "exclude_op_names" in words
    assert "cloud='weight'" in words


def vision_transformer() -> nn.Module:
    torch.manual_seed(0)
    net = VisionTransformer(32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=5)
    nn.init.normal_(net.heads.head.weight)
    return net.eval()


def test_the_stream_of_a_vision_transformer_is_read_by_attention_too():
    net = vision_transformer()
    stream = ["conv_proj", *(name for name, _ in net.named_modules() if name.endswith(("out_proj", "mlp.3")))]
    batches = [torch.rand(4, 3, 32, 32)]
    groups = nni_topo.dependency_groups(net, batches[0], [{"op_names": stream, "sparse_ratio": 0.5}])

    def points() -> torch.Tensor:
        pruner = nni_topo.TopologicalPruner(copy.deepcopy(net), groups, calibration=batches)
        return FunctionalCollector(batches).collect(pruner.context)["conv_proj"]["weight"]

    whole = points()
    # What queries, keys and values read of a channel moves it away from the others.
    with torch.no_grad():
        net.encoder.layers[0].self_attention.in_proj_weight[:, 3] *= 10
    moved = points()
    farther = torch.cdist(moved, moved)[3] > 2 * torch.cdist(whole, whole)[3]
    assert farther[torch.arange(32) != 3].all()


def test_shrink_leaves_layers_whole_that_nobody_named_and_refuses_those_named():
    class Half(Net):
        """Has another layer that may go instead."""

        def __init__(self) -> None:
            super().__init__("slice")
            self.more = nn.Conv2d(6, 24, 1)
            self.head = nn.Linear(24, 2)

        def forward(self, images: Tensor) -> Tensor:
            one = self.wide(self.first(images))[:, :4]
            return self.head(self.more(self.left(one) + self.right(one)).mean((2, 3)))

    torch.manual_seed(0)
    net = Half().eval()
    small = nni_topo.shrink(net, [IMAGES], {"params": 0.6}, distill=False)
    assert small.wide.out_channels == net.wide.out_channels
    assert small.more.out_channels < net.more.out_channels
    with pytest.raises(ConfigError, match=r"\(wide\)"):
        nni_topo.shrink(net, [IMAGES], {"params": 0.6}, layers=["first", "wide", "more"], distill=False)
