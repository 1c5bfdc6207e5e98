"""Norms over channels are found by what they compute, and are the same norms of fewer channels once they are cut."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from whole_nets import ChannelsFirst, ResponseNorm, Root

import nni_topo
from nni_topo.network.layers.norms import channel_dim, gives_no_channels, is_over_channels
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
    """It adds a buffer, into which it writes; one with a number for each channel isn't cut."""

    def __init__(self, size: int = 1) -> None:
        super().__init__()
        self.register_buffer("note", torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        self.note.fill_(0.5)
        return super().forward(x) + self.note


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


class RootAlone(nn.Module):
    """The RMS norm of diffusers without a weight: a tuple holds the width, or nothing does."""

    def __init__(self, width: int):
        super().__init__()
        self.dim, self.weight = torch.Size((width,)), None

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class RootOfChannels(nn.Module):
    def forward(self, x: Tensor, dim: int | None = None) -> Tensor:
        return x / (x.square().mean(dim or 1, keepdim=True) + 1e-6).sqrt()


DIMS = {
    -1: [
        nn.LayerNorm(4), nn.LayerNorm(4, elementwise_affine=False), nn.RMSNorm(4), Root(), Root(shift=1.0), Written(),
        ResponseNorm(4), InSingle(4), InSingle(4).bfloat16(), Root().double(), WithChild(),
        WithoutParameters(4), WithBuffer(), RootAlone(4), nn.LayerNorm((2, 4)), nn.RMSNorm((2, 4)),
    ],
    1: [
        nn.BatchNorm2d(4), nn.InstanceNorm1d(4), nn.GroupNorm(2, 4), ChannelsFirst(4), ResponseNorm(4, dim=1),
        nn.PReLU(4), RootOfChannels(),
    ],
    None: [
        ChannelsFirst((2, 4)), nn.Linear(4, 4), nn.PReLU(),
        LayerScale(), OverGroups(4), OverPlaces(), Refusing(), WithBuffer(4), Root(1),
    ],
}  # fmt: skip
BY_CHANNEL = (nn.modules.batchnorm._NormBase, nn.PReLU)


@pytest.mark.parametrize(
    ("norm", "dim"),
    [(norm, dim) for dim, norms in DIMS.items() for norm in norms],
    ids=lambda each: type(each).__name__,
)
def test_the_dimension_of_a_norms_channels_is_found(norm: nn.Module, dim: int | None) -> None:
    before = {name: each.clone() for name, each in norm.state_dict().items()}
    assert channel_dim(norm) == dim
    assert channel_dim(norm) == dim  # asked again
    assert is_over_channels(norm) is (dim is not None and not isinstance(norm, BY_CHANNEL))
    assert all(torch.equal(each, before[name]) for name, each in norm.state_dict().items())


def test_a_forward_that_is_put_in_place_counts() -> None:
    norm = Root()
    assert channel_dim(norm) == -1
    norm.forward = lambda x: x * norm.weight
    assert channel_dim(norm) is None


MAKERS = {
    "layer": nn.LayerNorm,
    "no parameters": partial(nn.LayerNorm, elementwise_affine=False),
    "root": nn.RMSNorm,
    "channels first": ChannelsFirst,
    "own root": Root,
    "own layer": Written,
    "own, no parameters": WithoutParameters,
    "own root, no parameters": RootAlone,
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


class Spectrogram(nn.Module):
    """A layer norm over (frequencies, channels) as SpeechBrain's, over whole images, or over pixels or heads."""

    def __init__(self, shape: tuple[int, ...], *, affine: bool = True, last: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave, self.last = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 4, 1), last
        self.norm = nn.LayerNorm(shape, elementwise_affine=affine)
        with torch.no_grad():
            for parameter in self.norm.parameters():
                parameter.normal_()

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x).movedim(1, -1) if self.last else self.enter(x)
        x = self.norm(x)
        return self.leave((x.movedim(-1, 1) if self.last else x).relu())


class ByHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.norm, self.leave = nn.Linear(2, 8), nn.LayerNorm((4, 2)), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.norm(self.enter(x).unflatten(-1, (-1, 2))).flatten(-2))


OVER_SEVERAL = {  # the network, an input, one of another size and batch, the shape of the norm that is left
    "frequencies and channels": (partial(Spectrogram, (5, 8), last=True), (2, 2, 6, 5), (3, 2, 9, 5), (5, 4)),
    "images": (partial(Spectrogram, (8, 6, 5)), (2, 2, 6, 5), (3, 2, 6, 5), (4, 6, 5)),
    "as many pixels as channels": (partial(Spectrogram, (8, 8, 8)), (2, 2, 8, 8), (3, 2, 8, 8), (4, 8, 8)),
    "no weights": (partial(Spectrogram, (5, 8), affine=False, last=True), (2, 2, 6, 5), (3, 2, 9, 5), (5, 4)),
    "pixels": (partial(Spectrogram, (6, 5)), (2, 2, 6, 5), (3, 2, 6, 5), (6, 5)),
    "heads": (ByHead, (2, 3, 2), (3, 7, 2), (2, 2)),
}


@pytest.mark.parametrize("name", OVER_SEVERAL)
@torch.no_grad()
def test_a_norm_over_several_dimensions_runs_over_the_channels_that_are_left(name: str) -> None:
    make, size, other_size, left = OVER_SEVERAL[name]
    model, x, other = make().eval(), torch.randn(size), torch.randn(other_size)
    groups = nni_topo.dependency_groups(model, x, [{"op_names": ["enter"], "sparse_ratio": 0.5}])
    masks = nni_topo.create_pruner("random", copy.deepcopy(model), groups).compress()[1]
    dense, masked = nni_topo.to_dense(model, x, masks), nni_topo.masked_model(model, x, masks)
    assert dense.norm.normalized_shape == left
    assert [tuple(each.shape) for each in dense.norm.parameters()] == [left] * len(list(model.norm.parameters()))
    assert dense.enter.weight.shape[0] == dense.leave.weight.shape[1] == 4
    for inputs in (x, other):
        torch.testing.assert_close(dense(inputs), masked(inputs))
    if name == "no weights":  # by hand
        kept = masks["enter"]["bias"].nonzero().flatten()
        normed = functional.layer_norm(model.enter(x)[:, kept].movedim(1, -1), (5, 4)).movedim(-1, 1)
        wanted = functional.conv2d(normed.relu(), model.leave.weight[:, kept], model.leave.bias)
        torch.testing.assert_close(dense(x), wanted)
