"""Gates that weigh places by the mean and the maximum over all channels, as CBAM's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nni_topo
from nni_topo.network.layers.norms import channel_dim, gives_no_channels

IMAGES = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Pool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.max(1)[0].unsqueeze(1), x.mean(1).unsqueeze(1)], 1)


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool, self.conv = Pool(), nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv(self.pool(x)).sigmoid()


class Weights(nn.Module):
    """The gate alone, as CBAM is often written: the block multiplies by it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)).sigmoid()


class Weighed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = Weights()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weights(x)


class OfPlaces(nn.Module):
    """It treats channels alike too, but each by itself."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean((2, 3), keepdim=True)


@pytest.mark.parametrize("kind", [Gate, Weighed])
@pytest.mark.parametrize("left", [[0, 3, 4, 7, 8, 9, 12, 15], [5]])
def test_a_gate_runs_over_the_channels_that_are_left(kind: Any, left: list[int]) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Sigmoid(), kind(), nn.Conv2d(16, 4, 3)).double().eval()
    groups = nni_topo.dependency_groups(model, IMAGES, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    assert "0" not in groups.skipped
    (inner,) = groups.skipped.keys() - {"3"}
    assert groups.reasons[inner][0].kind == "inside_gate"
    kept = torch.tensor(left)
    mask = torch.zeros(16, 3, 3, 3, dtype=torch.float64).index_fill(0, kept, 1.0)
    dense = nni_topo.to_dense(model, IMAGES, {"0": {"weight": mask}})
    assert type(dense[2]) is kind
    with torch.no_grad():
        gated = model[2](model[1](model[0](IMAGES))[:, kept])
        wanted = nn.functional.conv2d(gated, model[3].weight[:, kept], model[3].bias)
        torch.testing.assert_close(dense(IMAGES), wanted, rtol=1e-9, atol=1e-12)


def test_what_treats_each_channel_by_itself_or_places_alike_is_none() -> None:
    assert channel_dim(Gate()) == 1
    assert channel_dim(Weights()) == 1
    assert gives_no_channels(Weights())
    assert not gives_no_channels(Gate())
    assert channel_dim(OfPlaces()) is None
    assert gives_no_channels(Pool())
    assert channel_dim(nn.Sequential(nn.Conv2d(6, 6, 1), nn.ReLU())) is None


def test_a_response_norm_over_neighbours_has_those_that_are_left() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LocalResponseNorm(3, alpha=1.0), nn.Conv2d(8, 4, 1)).double().eval()
    kept = torch.tensor([0, 3, 4, 7])
    mask = torch.zeros(8, 3, 3, 3, dtype=torch.float64).index_fill(0, kept, 1.0)
    dense = nni_topo.to_dense(model, IMAGES, {"0": {"weight": mask}})
    with torch.no_grad():
        left = model[1](model[0](IMAGES)[:, kept])
        wanted = nn.functional.conv2d(left, model[2].weight[:, kept], model[2].bias)
        torch.testing.assert_close(dense(IMAGES), wanted, rtol=1e-9, atol=1e-12)


class Largest(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (x >= x.topk(5, 1).values[:, -1:])


class Zeroed(nn.Module):
    """Its layer does nothing yet, and could tell channels apart."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(6, 6, 1)
        for parameter in self.layer.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.layer(x).sigmoid() - x.mean(1, keepdim=True)


class Powers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.power = nn.Parameter(torch.rand(8)), 8

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight / (x.abs().pow(self.power).mean(-1, keepdim=True) + 1e-6) ** (1 / self.power)


class OfFirst(nn.Module):
    """A gate by channels with fixed numbers, of which a narrow input has none but these."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :8].mean(1, keepdim=True).sigmoid()


def test_what_needs_its_number_of_channels_is_no_gate() -> None:
    assert channel_dim(OfFirst()) is None
    assert channel_dim(Largest()) is None
    assert channel_dim(Zeroed()) is None


def test_a_number_that_only_equals_the_width_stays() -> None:
    model = nn.Sequential(nn.Linear(3, 8), Powers(), nn.Linear(8, 2)).eval()
    mask = torch.ones(8, 3).index_fill(0, torch.tensor([1, 2, 6]), 0.0)
    dense = nni_topo.to_dense(model, torch.randn(4, 3), {"0": {"weight": mask}})
    assert (dense[1].power, dense[1].weight.numel()) == (8, 5)


def test_a_network_with_a_gate_or_a_response_norm_is_saved_and_loaded(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.LocalResponseNorm(3), Weighed(), nn.Conv2d(8, 4, 1)).double().eval()

    mask = torch.ones(8, 3, 3, 3, dtype=torch.float64).index_fill(0, torch.tensor([1, 6]), 0.0)
    dense = nni_topo.to_dense(build(), IMAGES, {"0": {"weight": mask}})
    nni_topo.save(dense, tmp_path / "dense.safetensors")
    with torch.no_grad():
        assert torch.equal(nni_topo.load(tmp_path / "dense.safetensors", build)(IMAGES), dense(IMAGES))
