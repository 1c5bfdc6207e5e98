"""Norms over channels are found by what they compute, and are the same norms of fewer channels once they are cut."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from speedup_nets import filter_mask, masks_of
from torch import Tensor, nn
from torch.nn import functional
from whole_nets import ChannelsFirst, ResponseNorm, Root

import nni_topo
from nni_topo.network.layers.norms import channel_dim, cut_norm, is_over_channels
from nni_topo.network.layers.slicing import cut


class Written(Root):
    """A layer norm by hand with other names, in a layout of texts alone."""

    def __init__(self, width: int = 5):
        super().__init__(width)
        self.beta = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        _, _, _ = x.shape
        distance = x - x.mean(-1, keepdim=True)
        return self.weight * distance / distance.square().mean(-1, keepdim=True).sqrt().add(self.eps) + self.beta


class LayerScale(Root):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class OverGroups(Root):
    def forward(self, x: Tensor) -> Tensor:
        return functional.group_norm(x.flatten(0, -2), 2, self.weight, None).view(x.shape)


class OverPlaces(Root):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / x.square().mean(tuple(range(1, x.dim() - 1)), keepdim=True).sqrt()


class Refusing(Root):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("not here")


class WithBuffer(Root):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("note", torch.zeros(1))


class WithChild(Root):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Identity()


class InSingle(nn.LayerNorm):
    """It gives single precision, whatever it gets."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)


class WithoutParameters(nn.Module):
    """OLMo's norm: it holds the width alone."""

    def __init__(self, width: int):
        super().__init__()
        self.normalized_shape = (width,)

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x.float(), self.normalized_shape, None, None, 1e-5).to(x.dtype)


DIMS = {
    -1: [
        nn.LayerNorm(4), nn.LayerNorm(4, elementwise_affine=False), nn.RMSNorm(4), Root(), Root(shift=1.0), Written(),
        ResponseNorm(4), InSingle(4), InSingle(4).bfloat16(), Root().double(), WithChild(),
        WithoutParameters(4),
    ],
    1: [nn.BatchNorm2d(4), nn.InstanceNorm1d(4), nn.GroupNorm(2, 4), ChannelsFirst(4), ResponseNorm(4, dim=1)],
    None: [
        nn.LayerNorm((2, 4)), nn.RMSNorm((2, 4)), ChannelsFirst((2, 4)), nn.Linear(4, 4), nn.PReLU(4),
        LayerScale(), OverGroups(4), OverPlaces(), Refusing(), WithBuffer(), Root(1),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("norm", "dim"),
    [(norm, dim) for dim, norms in DIMS.items() for norm in norms],
    ids=lambda each: type(each).__name__,
)
def test_the_dimension_of_a_norms_channels_is_found(norm: nn.Module, dim: int | None) -> None:
    before = {name: each.clone() for name, each in norm.state_dict().items()}
    assert channel_dim(norm) == dim
    assert channel_dim(norm) == dim  # asked again
    assert is_over_channels(norm) is (dim is not None and not isinstance(norm, nn.modules.batchnorm._NormBase))
    assert all(torch.equal(each, before[name]) for name, each in norm.state_dict().items())


def test_a_forward_that_is_put_in_place_counts() -> None:
    norm = Root()
    assert channel_dim(norm) == -1
    norm.forward = lambda x: x * norm.weight
    assert channel_dim(norm) is None


def test_norms_are_found_on_another_device(far: torch.device) -> None:
    for norm, dim in ((Root(), -1), (ChannelsFirst(4), 1), (ResponseNorm(4), -1)):
        assert channel_dim(norm.to(far)) == dim


MAKERS = {
    "layer": nn.LayerNorm,
    "no parameters": partial(nn.LayerNorm, elementwise_affine=False),
    "root": nn.RMSNorm,
    "channels first": ChannelsFirst,
    "own root": Root,
    "own layer": Written,
    "own, no parameters": WithoutParameters,
    "response": ResponseNorm,
    "response, channels first": partial(ResponseNorm, dim=1),
}


@pytest.mark.parametrize("name", MAKERS)
@torch.no_grad()
def test_a_cut_norm_is_the_same_norm_of_fewer_channels(name: str) -> None:
    norm, small, kept = MAKERS[name](6), MAKERS[name](3), torch.tensor([0, 2, 5])
    for parameter, fewer in zip(norm.parameters(), small.parameters(), strict=True):
        parameter.copy_(torch.rand(parameter.shape))
        fewer.copy_(parameter.flatten()[kept].view(fewer.shape))
    dim = channel_dim(norm)
    cut("norm", norm, kept, kept)
    assert type(norm) is type(small)
    assert repr(norm) == repr(small)
    for held in ("normalized_shape", "hidden_size", "shape"):
        assert getattr(norm, held, None) == getattr(small, held, None)
    x = torch.randn(2, 4, 3) if name == "own layer" else torch.randn(2, 4, 4, 3)
    assert torch.equal(norm(x.movedim(-1, dim)), small(x.movedim(-1, dim)))


def test_a_cut_norm_keeps_which_parameters_are_trained() -> None:
    norm = nn.LayerNorm(4)
    norm.weight.requires_grad_(requires_grad=False)
    cut_norm(norm, torch.tensor([1, 2]))
    assert (norm.weight.requires_grad, norm.bias.requires_grad) == (False, True)


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm, nn.RMSNorm, Root, Written, ChannelsFirst], ids=lambda norm: norm.__name__
)
def test_layers_around_norms_lose_channels_and_the_dense_network_is_saved_and_cut_again(norm, tmp_path: Path) -> None:
    torch.manual_seed(0)
    if norm is ChannelsFirst:
        model, x = nn.Sequential(nn.Conv2d(3, 6, 1), norm(6), nn.ReLU(), nn.Conv2d(6, 2, 1)), torch.randn(4, 3, 5, 5)
    else:
        model, x = nn.Sequential(nn.Linear(3, 6), norm(6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(4, 7, 3)
    groups = nni_topo.dependency_groups(model, x, [{"op_names": ["0"], "sparse_ratio": 0.5}])
    assert [entry["op_names"] for entry in groups] == [["0"]]
    dense = nni_topo.to_dense(model, x, masks_of(nni_topo.create_pruner("l1", model, groups)))
    twice = nni_topo.to_dense(dense, x, {"0": filter_mask(dense[0], [1])})
    for small, width in ((dense, 3), (twice, 2)):
        assert type(small[1]) is norm
        assert small[0].weight.shape[0] == small[1].weight.numel() == width
        nni_topo.save(small, tmp_path / "small.pt")
        again = nni_topo.load(tmp_path / "small.pt", model)
        assert repr(again) == repr(small)
        assert (getattr(again[1], "hidden_size", width), getattr(again[1], "shape", (width,))) == (width, (width,))
        with torch.no_grad():
            assert torch.equal(again(x), small(x))


class Named(nn.Module):
    """A norm that gets its input by name."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second, self.head = (
            nn.Linear(4, 6),
            nn.LayerNorm(6),
            nn.Linear(6, 6),
            nn.Linear(6, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.norm(input=self.first(x))).relu())


def test_layers_around_a_norm_that_is_called_by_name_lose_channels() -> None:
    groups = nni_topo.dependency_groups(Named().eval(), torch.randn(3, 4), [{"op_types": ["Linear"]}])
    assert groups.skipped.keys() == {"head"}
