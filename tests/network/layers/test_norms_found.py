"""Norms of original width against PyTorch's on zeros, and what is found out about norms of other classes by trying."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from speedup_nets import masks_of
from torch import Tensor, nn
from torch.nn import functional

import nni_topo
from nni_topo import dependency_groups
from nni_topo.network.layers.original_width import (
    ChannelsFirstLayerNorm,
    OriginalWidthGroupNorm,
    OriginalWidthLayerNorm,
    OriginalWidthResponseNorm,
    OriginalWidthRMSNorm,
    ShiftedLayerNorm,
    ShiftedRMSNorm,
    channel_dim,
    keep_original_width,
    plain_norm,
    response_norm,
    silent_value,
)

KEPT = [0, 2, 5]


def drawn(norm: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return norm.double()


def entering(*shape: int) -> Tensor:
    """Return inputs of which some are as small as the epsilons."""
    images = torch.randn(*shape, generator=torch.Generator().manual_seed(1)).double() + 0.5
    images[0] *= 1e-3
    return images


class ChannelsFirst(nn.LayerNorm):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.movedim(1, -1)).movedim(-1, 1)


class ChannelsLast(nn.LayerNorm):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images)


class Response(nn.Module):
    """The response norm of ConvNeXt v2, with channels last or first."""

    def __init__(self, width: int, dim: int = -1, *, eps: float = 1e-6, flat: bool = False):
        super().__init__()
        shape = (width,) if flat or dim == -1 else (1, width, 1, 1)
        self.gamma, self.beta = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(shape))
        self.dim, self.eps = dim, eps

    def forward(self, images: Tensor) -> Tensor:
        places = (1, 2) if self.dim == -1 else (2, 3)
        lengths = images.norm(dim=places, keepdim=True)
        weights = lengths / (lengths.mean(self.dim, keepdim=True) + self.eps)
        return self.gamma * (images * weights) + self.beta + images


def shifted(norm: nn.Module) -> nn.Module:
    norm.shift = 1.0
    return norm


# By name: the norm, the shape of what enters, the dimension of the channels, and the class that it gets.
NORMS = {
    "layer norm": (nn.LayerNorm(6), (3, 6), -1, OriginalWidthLayerNorm),
    "layer norm, eps": (nn.LayerNorm(6, eps=0.1), (3, 2, 6), -1, OriginalWidthLayerNorm),
    "no parameters": (nn.LayerNorm(6, elementwise_affine=False), (3, 6), -1, OriginalWidthLayerNorm),
    "channels first": (ChannelsFirst(6), (3, 6, 2, 2), 1, OriginalWidthLayerNorm),
    "shifted": (shifted(ShiftedLayerNorm(6)), (3, 2, 6), -1, OriginalWidthLayerNorm),
    "root mean square, eps": (nn.RMSNorm(6, eps=0.1), (3, 2, 6), -1, OriginalWidthRMSNorm),
    "root mean square, no weight": (nn.RMSNorm(6, elementwise_affine=False), (3, 6), -1, OriginalWidthRMSNorm),
    "response": (Response(6), (3, 2, 2, 6), -1, OriginalWidthResponseNorm),
    "response, first": (Response(6, 1), (3, 6, 2, 2), 1, OriginalWidthResponseNorm),
}


@pytest.mark.parametrize("name", NORMS)
@torch.no_grad()
def test_the_kept_channels_are_what_they_are_beside_zeros(name: str) -> None:
    norm, shape, dim, kind = NORMS[name]
    norm, images, kept = drawn(copy.deepcopy(norm)), entering(*shape), torch.tensor(KEPT)
    zeroed = torch.zeros_like(images).index_copy(dim, kept, images.index_select(dim, kept))
    wanted = norm(zeroed).index_select(dim, kept)
    whole = norm(images)
    keep_original_width(norm, 6)
    assert type(norm) is kind
    assert (norm.counted, norm.dim) == (6, dim)
    assert "counted=6" in repr(norm)
    torch.testing.assert_close(norm(images), whole, rtol=1e-9, atol=1e-12)
    keep_original_width(norm, 9)  # it keeps the number that it has
    assert norm.counted == 6
    for key, parameter in list(norm.named_parameters()):
        place = max(range(parameter.dim()), key=lambda d: parameter.shape[d])
        setattr(norm, key, nn.Parameter(parameter.index_select(place, kept)))
    torch.testing.assert_close(norm(images.index_select(dim, kept)), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("affine", [True, False])
@torch.no_grad()
def test_groups_that_lose_channels_are_what_they_are_beside_zeros(affine: bool) -> None:
    norm, images, kept = drawn(nn.GroupNorm(2, 6, affine=affine)), entering(3, 6, 4, 2), torch.tensor([0, 2, 3, 5])
    wanted = norm(torch.zeros_like(images).index_copy(1, kept, images[:, kept]))[:, kept]
    keep_original_width(norm, 3)
    assert type(norm) is OriginalWidthGroupNorm
    assert "counted=3" in repr(norm)
    norm.num_channels = 4
    for key, parameter in list(norm.named_parameters()):
        setattr(norm, key, nn.Parameter(parameter[kept]))
    torch.testing.assert_close(norm(images[:, kept]), wanted, rtol=1e-9, atol=1e-12)
    flat = entering(3, 6)[:, kept]
    torch.testing.assert_close(norm(flat), norm(flat[..., None])[..., 0])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 6), ChannelsFirst(6), Response(6, 1)])
@torch.no_grad()
def test_pytorchs_older_exporter_writes_no_size_into_a_file(norm: nn.Module, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    norm, kept = drawn(copy.deepcopy(norm)).float(), torch.tensor([0, 2, 3, 5])
    keep_original_width(norm, 3 if getattr(norm, "num_groups", 1) == 2 else 6)
    norm.num_channels = 4
    for key, parameter in list(norm.named_parameters()):
        setattr(norm, key, nn.Parameter(parameter.flatten()[kept]))
    path, axes = str(tmp_path / "norm.onnx"), {"x": {0: "n", 2: "h", 3: "w"}}
    torch.onnx.export(norm, (torch.randn(2, 4, 5, 5),), path, dynamo=False, input_names=["x"], dynamic_axes=axes)
    images = torch.randn(3, 4, 3, 8)
    found = onnxruntime.InferenceSession(path).run(None, {"x": images.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), norm(images), rtol=1e-4, atol=1e-5)


class Twice(nn.LayerNorm):
    """It does more than normalize."""

    def forward(self, images: Tensor) -> Tensor:
        return 2 * super().forward(images)


class Other(nn.RMSNorm):
    pass


class InFloats(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).type_as(x)


class Halved(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


def test_the_dimension_of_a_norms_channels_is_found_by_class_or_by_trying() -> None:
    dims = {
        -1: [nn.LayerNorm(4), nn.RMSNorm(4), ShiftedRMSNorm(4), ChannelsLast(4),
             ChannelsLast(4, elementwise_affine=False), Response(4), Other(4, elementwise_affine=False), InFloats(4)],
        1: [ChannelsFirst(4), Response(4, 1), nn.BatchNorm2d(4), nn.GroupNorm(2, 4)],
        None: [nn.LayerNorm((2, 4)), nn.RMSNorm((2, 4)), Other((2, 4)), Halved(4), Twice(4), ChannelsLast((2, 4))],
    }  # fmt: skip
    for dim, norms in dims.items():
        for norm in norms:
            assert channel_dim(norm) == dim, norm
    for norm in (nn.LayerNorm(4), ChannelsFirst(4)):
        before = channel_dim(norm)
        keep_original_width(norm, 4)
        assert channel_dim(norm) == before
    root = nn.RMSNorm(4)
    keep_original_width(root, 4)
    assert channel_dim(root) == -1


class Root(nn.Module):
    """A norm of a model's own: ``kind`` says what it computes."""

    def __init__(self, kind: str = "root", width: int = 5, key: str = "eps", eps: object = 1e-6):
        super().__init__()
        self.weight, self.kind = nn.Parameter(torch.linspace(0.5, 1.5, width)), kind
        setattr(self, key, eps)
        self.used = eps if isinstance(eps, float) else 1e-6

    def forward(self, x: Tensor) -> Tensor:
        if self.kind in ("layer", "shifted layer"):
            factors = self.weight + (self.kind == "shifted layer")
            return functional.layer_norm(x, x.shape[-1:], factors, getattr(self, "bias", None), self.used)
        if self.kind == "refusing":
            raise ValueError("not here")
        if self.kind == "several":
            return x, x
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.used * (self.kind != "no eps"))
        if self.kind == "shifted":
            return x * (1 + self.weight)
        return x * self.weight + (1e-4 if self.kind == "off" else 0.0)


def test_plain_norms_are_found_by_trying() -> None:
    for key in ("variance_epsilon", "eps", "epsilon"):
        found = plain_norm(norm := Root(key=key, eps=1e-5))
        assert (type(found), found.eps, found.normalized_shape) == (nn.RMSNorm, 1e-5, (5,))
        assert found.weight is norm.weight
    shifted = plain_norm(Root("shifted"))
    assert (type(shifted), shifted.shift) == (ShiftedRMSNorm, 1.0)
    layer = plain_norm(Root("layer"))
    assert (type(layer), layer.bias) == (nn.LayerNorm, None)
    for kind, wanted in (("layer", nn.LayerNorm), ("shifted layer", ShiftedLayerNorm)):
        norm = Root(kind)
        norm.bias = nn.Parameter(torch.linspace(-1, 1, 5))
        found = plain_norm(norm)
        assert type(found) is wanted
        assert found.weight is norm.weight
        assert found.bias is norm.bias
        assert plain_norm(Root(kind)).bias is None
    assert type(plain_norm(Root().double())) is nn.RMSNorm
    for kind in ("refusing", "several", "off", "no eps"):
        assert plain_norm(Root(kind)) is None
    assert plain_norm(Root(eps=1)).eps == plain_norm(Root(key="other")).eps == 1e-6
    assert plain_norm(nn.RMSNorm(5, eps=1e-6)) is None  # PyTorch's own needs no other
    assert plain_norm(nn.Linear(2, 2)) is None
    two = Root()
    two.more = nn.Parameter(torch.ones(5))
    assert plain_norm(two) is None


class Written(nn.Module):
    """A norm as people write it: ``how`` says by which operations, with which names."""

    def __init__(self, how: str, width: int = 5):
        super().__init__()
        self.how = how
        first, *others = {
            "gain": ["scale"], "function": ["weight"], "function with eps": ["g"], "layer": ["weight"],
            "gain and bias": ["gamma", "beta"], "bias first": ["beta", "gamma"], "images": ["weight", "bias"],
            "squared gain": ["scale"], "by channel": ["weight", "bias"],
        }[how]  # fmt: skip
        self.names = [first, *others]
        for name in self.names:
            setattr(self, name, nn.Parameter(torch.full((width,), float(name not in ("beta", "bias")))))
        if how == "function with eps":
            self.variance = 0.02

    def forward(self, x: Tensor) -> Tensor:
        one = getattr(self, self.names[0])
        if self.how in ("gain", "squared gain"):
            return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5) * one ** (1 + (self.how == "squared gain"))
        if self.how.startswith("function"):
            return functional.rms_norm(x, (x.shape[-1],), one, self.variance if hasattr(self, "variance") else None)
        if self.how == "layer":
            return functional.layer_norm(x, self.weight.shape, self.weight, None, 1e-5)
        if self.how in ("gain and bias", "bias first"):
            distance = x - x.mean(-1, keepdim=True)
            return distance / (distance.square().mean(-1, keepdim=True) + 1e-8).sqrt() * self.gamma + self.beta
        if self.how == "images":
            distance = x - x.mean(1, keepdim=True)
            x = distance / torch.sqrt(distance.pow(2).mean(1, keepdim=True) + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


@pytest.mark.parametrize(
    ("how", "wanted", "eps"),
    [
        ("gain", nn.RMSNorm, 1e-5),
        ("function", nn.RMSNorm, None),
        ("function with eps", nn.RMSNorm, 0.02),
        ("layer", nn.LayerNorm, 1e-5),
        ("gain and bias", nn.LayerNorm, 1e-8),
        ("bias first", nn.LayerNorm, 1e-8),
        ("images", ChannelsFirstLayerNorm, 1e-6),
    ],
)
@torch.no_grad()
def test_norms_are_found_whatever_their_parameters_are_called_and_wherever_their_epsilon_is(how, wanted, eps) -> None:
    norm = Written(how)  # its parameters are ones and zeros, as those of a fresh network
    found = plain_norm(norm)
    assert type(found) is wanted
    assert found.eps == eps
    assert {id(each) for each in found.parameters()} == {id(each) for each in norm.parameters()}
    for parameter in norm.parameters():
        parameter.copy_(torch.randn(5, generator=torch.Generator().manual_seed(parameter.sum().int().item())))
    x = entering(3, 5, 2, 5).float()
    torch.testing.assert_close(found(x), norm(x))


def test_what_only_fresh_parameters_hide_is_no_norm() -> None:
    assert plain_norm(Written("squared gain")) is None
    assert plain_norm(Written("by channel")) is None


@pytest.mark.parametrize("how", ["gain", "layer", "bias first", "images"])
def test_layers_around_norms_of_ones_own_lose_channels_once_these_are_pytorchs(how: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    if how == "images":
        model = nn.Sequential(nn.Conv2d(3, 6, 1), Written(how, 6), nn.ReLU(), nn.Conv2d(6, 2, 1))
        x = torch.randn(4, 3, 5, 5)
    else:
        model = nn.Sequential(nn.Linear(3, 6), Written(how, 6), nn.ReLU(), nn.Linear(6, 2))
        x = torch.randn(4, 7, 3)
    own = drawn(model).float()
    told = "1 is a norm of the model's own: nni_topo.as_torch_layers(model) makes it one that can lose channels"
    assert str(nni_topo.explain(own, x, "0").reasons[0]) == told
    assert dependency_groups(own, x, [{"op_types": ["Linear", "Conv2d"], "sparse_ratio": 0.5}]).skipped["0"] == told
    model = nni_topo.as_torch_layers(own)
    torch.testing.assert_close(model(x), own(x))
    groups = dependency_groups(model, x, [{"op_names": ["0"], "sparse_ratio": 0.5}])
    assert [entry["op_names"] for entry in groups] == [["0"]]
    masks = masks_of(nni_topo.create_pruner("l1", model, groups))
    dense = nni_topo.to_dense(model, x, masks)  # which compares it with the masked model
    assert dense[0].weight.shape[0] == 3
    nni_topo.save(dense, tmp_path / "small.pt")
    with torch.no_grad():
        torch.testing.assert_close(nni_topo.load(tmp_path / "small.pt", model)(x), dense(x), rtol=0, atol=0)


@torch.no_grad()
def test_a_shifted_norm_computes_in_single_precision_at_least() -> None:
    norm = ShiftedRMSNorm(4, eps=1e-3)
    norm.shift = 1.0
    norm.weight.copy_(torch.tensor([0.0, 1.0, -1.0, 0.5]))
    x = torch.tensor([[1.0, -2.0, 3.0, 4.0], [1e-3, 0.0, 0.0, 0.0]])
    wanted = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * torch.tensor([1.0, 2.0, 0.0, 1.5])
    torch.testing.assert_close(norm(x), wanted)
    half = norm.half()(x.half())
    assert half.dtype == torch.float16
    torch.testing.assert_close(half, wanted.half(), rtol=1e-3, atol=1e-3)


class OneMore(nn.LayerNorm):
    """The norm of Nemotron."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)


class OneGroup(nn.GroupNorm):
    """The norm of PoolFormer, which does to rows what a layer norm does."""


@torch.no_grad()
def test_a_class_derived_from_a_layer_norm_is_replaced_where_it_computes_other_factors() -> None:
    norm, x = drawn(OneMore(5)), entering(3, 2, 5)
    found = plain_norm(norm)
    assert type(found) is ShiftedLayerNorm
    assert channel_dim(found) == -1
    torch.testing.assert_close(found(x), norm(x), rtol=1e-9, atol=1e-12)
    for other in (ChannelsLast(5), ChannelsFirst(5), Twice(5), OneGroup(1, 5)):
        assert plain_norm(drawn(other)) is None


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_a_channel_with_silent_values_is_zero_whatever_the_others_are(bias: bool) -> None:
    shifted_norms = [shifted(ShiftedLayerNorm(6, bias=bias)), shifted(ShiftedLayerNorm(6, bias=bias))]
    keep_original_width(shifted_norms[1], 9)
    for norm in (*shifted_norms, nn.LayerNorm(6, bias=bias)):
        images = entering(3, 6)
        images[..., 2] = 0.0
        assert bool(drawn(norm)(images)[..., 2].all())
        for key, parameter in norm.named_parameters():
            parameter[2] = silent_value(norm, key)
        assert not norm(images)[..., 2].any()


def test_response_norms_are_told_from_what_only_looks_like_one() -> None:
    for norm, dim in ((Response(4), -1), (Response(4, 1), 1), (Response(2), -1), (Response(4, eps=1e-3), -1)):
        found = response_norm(norm)
        assert (type(found), found.dim, found.counted, found.eps) == (
            OriginalWidthResponseNorm, dim, len(norm.gamma.flatten()), norm.eps,
        )  # fmt: skip
        assert response_norm(found) is found
        assert not norm.gamma.any()  # it was tried with others
    with_buffer, other = Response(4), Response(4)
    with_buffer.register_buffer("note", torch.zeros(1))
    other.forward = lambda images: images
    for norm in (with_buffer, other, nn.LayerNorm(4)):
        assert response_norm(norm) is None


class AlikeRoot(Root):
    """It computes what an RMS norm does, but for one thing."""

    def forward(self, x: Tensor) -> Tensor:
        found = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.used * (4 if self.kind == "eps" else 1))
        if self.kind == "over places":
            found = x * torch.rsqrt(x.square().mean((*range(1, x.dim()),), keepdim=True) + self.used)
        if self.kind == "by dimension":
            found = found * (1 + (x.dim() > 2))
        return found * self.weight * float(self.kind if self.kind[0].isdigit() else 1)


class Gated(Root):
    """It takes a gate as well, as that of Mamba does."""

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        found = super().forward(x)
        return found if gate is None else found * gate


def test_a_root_mean_square_norm_is_known_within_rounding() -> None:
    others = ("eps", "over places", "by dimension")
    for kind in (*others, "1.001", "1.0001"):
        assert plain_norm(AlikeRoot(kind)) is None, kind
    assert plain_norm(Gated()) is None
    for kind in ("none", "1.000001"):
        assert type(plain_norm(AlikeRoot(kind))) is nn.RMSNorm, kind


class InSingle(nn.LayerNorm):
    """It gives single precision, whatever it gets."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)


def test_a_norm_that_gives_another_type_than_it_gets_computes_something_else() -> None:
    assert channel_dim(InSingle(5)) == -1
    assert channel_dim(InSingle(5).bfloat16()) is None
    assert plain_norm(InSingle(5).bfloat16()) is None


@torch.no_grad()
def test_a_norm_that_is_no_root_mean_square_is_no_layer_norm_either() -> None:
    """A weight that is near -0.5 makes a shifted norm of a plain one with another sign, and is told apart."""
    for weight in (torch.full((4,), -0.5), torch.zeros(4), torch.ones(1), torch.ones(2)):
        for kind in ("root", "shifted", "layer", "shifted layer"):
            norm = Root(kind, width=len(weight))
            norm.weight.copy_(weight)
            found, x = plain_norm(norm), entering(3, len(weight)).float()
            assert found is not None
            torch.testing.assert_close(found(x), norm(x))


def test_a_norm_without_an_epsilon_of_its_own_has_that_of_its_precision() -> None:
    for kind in (torch.float32, torch.float64):
        norm, x = nn.RMSNorm(4, dtype=kind), torch.tensor([[1e-4, 2e-4, 0.0, 0.0], [1e-9, 0.0, 0.0, 0.0]], dtype=kind)
        wanted = norm(x)
        keep_original_width(norm, 4)
        torch.testing.assert_close(norm(x), wanted)
        norm.weight = nn.Parameter(torch.ones(2, dtype=kind))
        torch.testing.assert_close(norm(x[:, :2]), wanted[:, :2])


def test_norms_are_found_on_another_device(far: torch.device) -> None:
    for kind, wanted in (("root", nn.RMSNorm), ("shifted", ShiftedRMSNorm), ("layer", nn.LayerNorm)):
        assert type(plain_norm(Root(kind).to(far))) is wanted
    for norm in (ChannelsFirst(4), ChannelsLast(4), Response(4)):
        assert channel_dim(norm.to(far)) == (1 if isinstance(norm, ChannelsFirst) else -1)
