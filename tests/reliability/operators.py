"""Operators between two layers: ``conv a -> operator -> conv b``, of each kind that forwards hold."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from reliability.cases import Case, images
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import parametrizations, spectral_norm, weight_norm
from torch.nn.utils.parametrize import register_parametrization

Forward = Callable[[Any, torch.Tensor], Any]


def conv(inputs: int, outputs: int, **options: Any) -> nn.Conv2d:
    """Make a convolution that keeps the image's size."""
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def operator(
    name: str,
    forward: Forward,
    *,
    sizes: tuple[int, ...] = (8, 11, 16),
    whole: tuple[str, ...] = (),
    noisy: bool = False,
    **parts: Callable[[], Any],
) -> Case:
    """Make a case of a forward; ``parts`` build what else than ``a``, 3 to 8 channels, and ``b``, 8 to 6, it uses."""
    made = {"a": lambda: conv(3, 8), "b": lambda: conv(8, 6), **parts}

    def make() -> nn.Module:
        net: nn.Module = type(name.title().replace(" ", ""), (nn.Module,), {"forward": forward})()
        for part, build in made.items():
            setattr(net, part, build())
        return net

    return Case(f"operators/{name}", make, images, sizes, whole, noisy)


def without_b(name: str, forward: Forward, **options: Any) -> Case:
    """Make a case without ``b``, in which ``last`` is a linear layer of eight inputs unless it is given."""
    return operator(name, forward, **{"last": lambda: nn.Linear(8, 5), "b": nn.Identity, **options})


def between(name: str, work: Callable[[], nn.Module], **options: Any) -> Case:
    """Make a case of a module between ``a`` and ``b``."""
    return operator(name, lambda self, x: self.b(self.work(self.a(x))), work=work, **options)


class Shifted(nn.Module):
    """A parametrization: weights that are computed from others."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight - weight.mean(dim=(1, 2, 3), keepdim=True)


class RmsNorm(nn.Module):
    """A norm over channels as papers write it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6) * self.scale


def _weight_normed(module: nn.Module, **options: Any) -> nn.Module:
    return weight_norm(module, **options)  # the one of old, by hooks


def _parametrized(module: nn.Module) -> nn.Module:
    register_parametrization(module, "weight", Shifted())
    return module


def _rows(self: Any, x: torch.Tensor) -> torch.Tensor:
    """Return what ``a`` gives as rows, (n, places, channels)."""
    return self.a(x).flatten(2).transpose(1, 2)


def _attended(self: Any, x: torch.Tensor) -> torch.Tensor:
    q, k, v = (layer(_rows(self, x)) for layer in (self.q, self.k, self.v))
    scores = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1)
    return self.last(scores @ v)


def _heads(self: Any, x: torch.Tensor) -> torch.Tensor:
    rows = _rows(self, x)
    parts = [layer(rows).view(*rows.shape[:2], 2, -1).transpose(1, 2) for layer in (self.q, self.k, self.v)]
    mixed = F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)
    return self.last(mixed)


def _fold(self: Any, x: torch.Tensor) -> torch.Tensor:
    z = self.a(x)
    columns = F.unfold(z, 3, padding=1)
    return self.b(F.fold(columns, z.shape[2:], 3, padding=1))


def _shuffle(self: Any, x: torch.Tensor) -> torch.Tensor:
    z = self.a(x)
    n, c, h, w = z.shape
    return self.b(z.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


def _inplace(self: Any, x: torch.Tensor) -> torch.Tensor:
    z = self.a(x)
    z += 0.5
    z.mul_(2).clamp_(min=-1)
    return self.b(z)


def _assigned(self: Any, x: torch.Tensor) -> torch.Tensor:
    z = self.a(x).clone()
    z[:, 1:3] = z[:, 1:3] * 2
    return self.b(z)


def _gathered(self: Any, x: torch.Tensor) -> torch.Tensor:
    z = self.a(x)
    index = torch.arange(z.shape[1] - 1, -1, -1, device=z.device).view(1, -1, 1, 1).expand_as(z)
    return self.b(z.gather(1, index))


def _looped(self: Any, x: torch.Tensor) -> torch.Tensor:
    state = torch.zeros(x.shape[0], 6, device=x.device, dtype=x.dtype)
    for row in _rows(self, x).unbind(1):
        state = self.cell(row, state)
    return self.last(state)


def _polar(self: Any, x: torch.Tensor) -> torch.Tensor:
    spectrum = torch.fft.rfft2(self.a(x))
    return self.b(torch.fft.irfft2(spectrum * (1 + 0.5j), s=x.shape[2:]))


def _normed(self: Any, x: torch.Tensor) -> torch.Tensor:
    z = self.a(x)
    return self.b(F.batch_norm(z, self.mean, self.var, self.weight, self.bias, self.training, 0.1, 1e-5).relu())


def _demodulated(self: Any, x: torch.Tensor) -> torch.Tensor:
    z, style = self.a(x), self.style(x.mean((2, 3)))
    weight = self.b.weight * style.mean(0).view(1, -1, 1, 1)
    weight = weight * torch.rsqrt(weight.square().sum((1, 2, 3), keepdim=True) + 1e-8)
    return F.conv2d(z, weight, self.b.bias, padding=1)


def _halves(self: Any, x: torch.Tensor) -> torch.Tensor:
    first, second = self.a(x).chunk(2, 1)
    return self.b(torch.cat([second.relu(), first], 1))


def _glu(self: Any, x: torch.Tensor) -> torch.Tensor:
    value, gate = self.a(x).split(4, dim=1)
    return self.b(value * gate.sigmoid())


def _moments(self: Any, x: torch.Tensor) -> torch.Tensor:
    z = self.a(x)
    var, mean = torch.var_mean(z, dim=(2, 3), keepdim=True)
    return self.b((z - mean) / (var + 1e-5).sqrt())


def _standardized(self: Any, x: torch.Tensor) -> torch.Tensor:
    z = self.a(x)
    return self.b((z - z.mean(1, keepdim=True)) / (z.std(1, keepdim=True) + 1e-5))


def _squeezed(self: Any, x: torch.Tensor, gate: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    z = self.a(x)
    return self.b(z * torch.sigmoid(gate(z)))


def _gates(name: str, gate: Callable[[torch.Tensor], torch.Tensor]) -> Case:
    """Multiply channels with a sigmoid of what all of them make."""
    return operator(name, lambda self, x: _squeezed(self, x, gate))


def _applied(name: str, work: Callable[[torch.Tensor], torch.Tensor], **options: Any) -> Case:
    """Make a case of a function between ``a`` and ``b``."""
    return operator(name, lambda self, x: self.b(work(self.a(x))), **options)


ELEMENTWISE = [
    _applied("relu", F.relu),
    _applied("silu", F.silu),
    _applied("sigmoid", torch.sigmoid),
    _applied("softplus", F.softplus),
    _applied("exp of tanh", lambda z: torch.exp(torch.tanh(z))),
    _applied("square plus one", lambda z: z * z + 1),
    _applied("reciprocal of a shift", lambda z: 1 / (z.square() + 0.5)),
    _applied("where it is positive", lambda z: torch.where(z > 0, z, torch.full_like(z, 0.2))),
    _applied("masked fill", lambda z: z.masked_fill(z < 0, 0.7)),
    between("prelu of each channel", lambda: nn.PReLU(8)),
    between("prelu of all channels", nn.PReLU),
    between("dropout and alpha dropout", lambda: nn.Sequential(nn.Dropout2d(), nn.AlphaDropout())),
    operator("sigmoid, no border", lambda self, x: self.b(self.a(x).sigmoid()), b=lambda: nn.Conv2d(8, 6, 3)),
    operator("in place", _inplace),
    operator("channels assigned in place", _assigned),
    operator(
        "a parameter added", lambda self, x: self.b(self.a(x) + self.w), w=lambda: nn.Parameter(torch.randn(8, 1, 1))
    ),
    operator(
        "layer scale",
        lambda self, x: self.b(self.a(x) * self.w.view(1, -1, 1, 1)),
        w=lambda: nn.Parameter(torch.rand(8)),
    ),
    operator(
        "a constant added",
        lambda self, x: self.b(self.a(x) + torch.linspace(-1, 1, 8, device=x.device).to(x.dtype).view(1, -1, 1, 1)),
    ),
]

POOLING = [
    between("max pooling", lambda: nn.MaxPool2d(2)),
    between("max pooling, ceiled", lambda: nn.MaxPool2d(3, 2, padding=1, ceil_mode=True)),
    between("average pooling", lambda: nn.AvgPool2d(3, 2, padding=1)),
    between("power pooling", lambda: nn.Sequential(nn.ReLU(), nn.LPPool2d(2, 2))),
    between("adaptive average pooling", lambda: nn.AdaptiveAvgPool2d(3)),
    operator(
        "max pooling and back",
        lambda self, x: self.b(F.max_unpool2d(*F.max_pool2d(self.a(x), 2, return_indices=True), 2)),
        sizes=(8, 12, 16),
    ),
]

NORMS = [
    between("batch norm", lambda: nn.Sequential(nn.BatchNorm2d(8), nn.ReLU())),
    between("batch norm of the batch", lambda: nn.Sequential(nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU())),
    between("sigmoid before a batch norm", lambda: nn.Sequential(nn.Sigmoid(), nn.BatchNorm2d(8))),
    between(
        "sigmoid before a batch norm, no border",
        lambda: nn.Sequential(nn.Sigmoid(), nn.BatchNorm2d(8)),
        b=lambda: nn.Conv2d(8, 6, 1),
    ),
    operator(
        "sigmoid, a layer, a batch norm",
        lambda self, x: self.c(self.n(self.b(self.a(x).sigmoid())).relu()),
        b=lambda: nn.Conv2d(8, 6, 1, bias=False),
        n=lambda: nn.BatchNorm2d(6),
        c=lambda: conv(6, 4),
        whole=("c",),
    ),
    between(
        "batch norm before a sigmoid",
        lambda: nn.Sequential(nn.BatchNorm2d(8), nn.Sigmoid()),
        b=lambda: nn.Conv2d(8, 6, 1),
    ),
    between("group norm", lambda: nn.Sequential(nn.GroupNorm(4, 8), nn.ReLU())),
    between("group norm of one group", lambda: nn.Sequential(nn.GroupNorm(1, 8), nn.ReLU())),
    between("instance norm", lambda: nn.Sequential(nn.InstanceNorm2d(8, affine=True), nn.ReLU())),
    between("instance norm with statistics", lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True)),
    between("local response norm", lambda: nn.LocalResponseNorm(3)),
    between("local response norm of all", lambda: nn.LocalResponseNorm(17, alpha=0.1)),
    without_b(
        "layer norm over channels",
        lambda self, x: self.last(self.norm(_rows(self, x))).mean(1),
        norm=lambda: nn.LayerNorm(8),
    ),
    operator("layer norm over all", lambda self, x: self.b(F.layer_norm(self.a(x), self.a(x).shape[1:]))),
    between("rms norm as papers write it", lambda: RmsNorm(8)),
    without_b(
        "rms norm",
        lambda self, x: self.last(self.norm(_rows(self, x))).mean(1),
        norm=lambda: nn.RMSNorm(8),
    ),
    operator(
        "functional batch norm",
        _normed,
        mean=lambda: nn.Buffer(torch.randn(8) * 0.3),
        var=lambda: nn.Buffer(torch.rand(8) + 0.5),
        weight=lambda: nn.Parameter(torch.rand(8) + 0.5),
        bias=lambda: nn.Parameter(torch.randn(8)),
    ),
    operator("statistics of places", _moments),
    operator("standardized over channels", _standardized),
]

REDUCTIONS = [
    _gates("gate by the largest channel", lambda z: z.amax(1, keepdim=True)),
    _gates("gate by max with indices", lambda z: z.max(1, keepdim=True)[0]),
    _gates("gate by the mean of channels", lambda z: z.mean(1, keepdim=True)),
    _gates("gate by a norm", lambda z: z.norm(dim=1, keepdim=True)),
    _gates("gate by log-sum-exp", lambda z: z.logsumexp(1, keepdim=True)),
    _gates("gate by the median", lambda z: z.median(1, keepdim=True).values),
    _gates("gate by the best two", lambda z: z.topk(2, dim=1).values.sum(1, keepdim=True)),
    _gates("gate by a maximum over all", lambda z: z.amax(dim=(1, 2, 3), keepdim=True)),
    _gates("gate by each channel's maximum", lambda z: z.amax(dim=(2, 3), keepdim=True)),
    _gates("gate by each channel's mean", lambda z: F.adaptive_avg_pool2d(z, 1)),
    _applied("softmax over channels", lambda z: z.softmax(1)),
    _applied("softmax over places", lambda z: z.flatten(2).softmax(-1).view_as(z) * 10),
    _applied("sum of channels so far", lambda z: z.cumsum(1)),
    _applied("largest channel so far", lambda z: z.cummax(1).values),
    _applied("unit vectors of channels", lambda z: F.normalize(z, dim=1)),
    _applied("sorted channels", lambda z: z.sort(1, descending=True).values),
    _applied("maxout", lambda z: z.view(z.shape[0], 4, 2, *z.shape[2:]).amax(2), b=lambda: conv(4, 6)),
]

RESHAPES = [
    without_b(
        "flatten",
        lambda self, x: self.last(torch.flatten(self.pool(self.a(x)), 1)),
        pool=lambda: nn.AdaptiveAvgPool2d(2),
        last=lambda: nn.Linear(32, 5),
    ),
    without_b(
        "view by a size",
        lambda self, x: self.last(F.adaptive_avg_pool2d(self.a(x), 2).view(x.size(0), -1)),
        last=lambda: nn.Linear(32, 5),
    ),
    without_b(
        "flatten with places first",
        lambda self, x: self.last(F.adaptive_avg_pool2d(self.a(x), 2).permute(0, 2, 3, 1).reshape(x.shape[0], -1)),
        last=lambda: nn.Linear(32, 5),
    ),
    without_b("permuted to the last", lambda self, x: self.last(self.a(x).permute(0, 2, 3, 1))),
    between("pixel shuffle", lambda: nn.PixelShuffle(2), b=lambda: conv(2, 6)),
    between("pixel unshuffle", lambda: nn.PixelUnshuffle(2), b=lambda: conv(32, 6), sizes=(8, 12, 16)),
    between("channel shuffle of a module", lambda: nn.ChannelShuffle(2)),
    operator("channel shuffle by hand", _shuffle),
    operator("unfold and fold", _fold),
    without_b(
        "unfold to columns",
        lambda self, x: self.last(F.unfold(self.a(x), 2, stride=2).transpose(1, 2)).mean(1),
        last=lambda: nn.Linear(32, 5),
    ),
    _applied("repeated", lambda z: z.repeat(1, 2, 1, 1), b=lambda: conv(16, 6)),
    _applied("each channel twice", lambda z: z.repeat_interleave(2, dim=1), b=lambda: conv(16, 6)),
    _applied("expanded", lambda z: z.mean((2, 3), keepdim=True).expand_as(z)),
    _applied("rolled over channels", lambda z: z.roll(1, dims=1)),
    _applied("flipped over channels", lambda z: z.flip(1)),
]

JOINS = [
    operator(
        "concatenation",
        lambda self, x: self.b(torch.cat([self.a(x), self.c(x)], 1)),
        c=lambda: conv(3, 4),
        b=lambda: conv(12, 6),
    ),
    operator(
        "concatenation with the input", lambda self, x: self.b(torch.cat([x, self.a(x)], 1)), b=lambda: conv(11, 6)
    ),
    operator(
        "concatenation over places", lambda self, x: self.b(torch.cat([self.a(x), self.c(x)], 2)), c=lambda: conv(3, 8)
    ),
    operator("stack and sum", lambda self, x: self.b(torch.stack([self.a(x), self.c(x)]).sum(0)), c=lambda: conv(3, 8)),
    operator(
        "stack and flatten",
        lambda self, x: self.b(torch.stack([self.a(x), self.c(x)], 2).flatten(1, 2)),
        c=lambda: conv(3, 8),
        b=lambda: conv(16, 6),
    ),
    operator("sum of two", lambda self, x: self.b(self.a(x) + self.c(x)), c=lambda: conv(3, 8)),
    operator(
        "difference of two", lambda self, x: self.b(torch.sub(self.a(x), self.c(x), alpha=2)), c=lambda: conv(3, 8)
    ),
    operator("product of two", lambda self, x: self.b(self.a(x) * self.c(x)), c=lambda: conv(3, 8)),
    operator("larger of two", lambda self, x: self.b(torch.maximum(self.a(x), self.c(x))), c=lambda: conv(3, 8)),
    operator(
        "one channel over all",
        lambda self, x: self.b(self.a(x) * self.c(x).sigmoid()),
        c=lambda: conv(3, 1),
        whole=("c",),
    ),
    operator(
        "one channel added to all", lambda self, x: self.b(self.a(x) + self.c(x)), c=lambda: conv(3, 1), whole=("c",)
    ),
    operator(
        "a gate for each channel",
        lambda self, x: self.b(self.a(x) * self.c(x).mean((2, 3), keepdim=True).sigmoid()),
        c=lambda: conv(3, 8),
    ),
    operator("input added to some", lambda self, x: self.b(torch.cat([self.a(x)[:, :3] + x, self.a(x)[:, 3:]], 1))),
    operator(
        "padded shortcut",
        lambda self, x: self.b(self.a(x) + F.pad(self.c(x), (0, 0, 0, 0, 2, 2))),
        c=lambda: conv(3, 4),
    ),
]

PICKS = [
    operator("chunk", _halves),
    operator("split and gate", _glu, b=lambda: conv(4, 6)),
    _applied("split unevenly", lambda z: torch.cat([z[:, 3:], z.split([3, 5], 1)[0].relu()], 1)),
    _applied("glu", lambda z: F.glu(z, 1), b=lambda: conv(4, 6)),
    _applied("unbind", lambda z: torch.stack(z.unbind(1)[::2], 1), b=lambda: conv(4, 6)),
    _applied("slice", lambda z: z[:, 2:7], b=lambda: conv(5, 6)),
    _applied("slice with steps", lambda z: z[:, ::2], b=lambda: conv(4, 6)),
    _applied("a list of channels", lambda z: z[:, [0, 1, 7]], b=lambda: conv(3, 6)),
    operator(
        "index select",
        lambda self, x: self.b(self.a(x).index_select(1, self.order)),
        order=lambda: nn.Buffer(torch.tensor([6, 0, 3])),
        b=lambda: conv(3, 6),
    ),
    operator(
        "one channel by select", lambda self, x: self.b(self.a(x).select(1, 3).unsqueeze(1)), b=lambda: conv(1, 6)
    ),
    operator("gather", _gathered),
    _applied("partly normalized", lambda z: torch.cat([F.instance_norm(z[:, :4]), z[:, 4:]], 1)),
]

PADDING = [
    operator(
        f"padding by {mode}",
        lambda self, x: self.b(self.a(x).sigmoid()),
        b=lambda mode=mode: nn.Conv2d(8, 6, 3, padding=1, padding_mode=mode),
    )
    for mode in ("zeros", "reflect", "replicate", "circular")
]
PADDING += [
    _applied("ones around", lambda z: F.pad(z, (1, 1, 1, 1), value=1.0)),
    between("more channels by zeros", lambda: nn.ConstantPad3d((0, 0, 0, 0, 1, 1), 0.0), b=lambda: conv(10, 6)),
    operator("same padding", lambda self, x: self.b(self.a(x)), b=lambda: nn.Conv2d(8, 6, 4, padding="same")),
]

RESIZING = [
    _applied("nearest neighbours", lambda z: F.interpolate(z, scale_factor=2)),
    _applied("bilinear", lambda z: F.interpolate(z, size=(5, 7), mode="bilinear", align_corners=False)),
    between("upsampling", lambda: nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)),
    operator(
        "to another's size",
        lambda self, x: self.b(F.interpolate(self.a(x), size=self.c(x).shape[-2:]) + self.c(x)),
        c=lambda: nn.Conv2d(3, 8, 3, stride=2, padding=1),
    ),
    operator(
        "sampled by a grid",
        lambda self, x: self.b(
            F.grid_sample(
                self.a(x),
                F.affine_grid(
                    torch.eye(2, 3, device=x.device, dtype=x.dtype).expand(x.shape[0], 2, 3) * 0.7,
                    x.shape,
                    align_corners=False,
                ),
                align_corners=False,
            )
        ),
    ),
]

PRODUCTS = [
    without_b(
        "matmul with weights",
        lambda self, x: self.last(_rows(self, x) @ self.w),
        w=lambda: nn.Parameter(torch.randn(8, 8)),
    ),
    without_b(
        "einsum with weights",
        lambda self, x: torch.einsum("nchw,oc->nohw", self.a(x), self.w),
        last=nn.Identity,
        w=lambda: nn.Parameter(torch.randn(6, 8)),
    ),
    without_b(
        "linear by a function",
        lambda self, x: F.linear(_rows(self, x), self.w, self.v),
        last=nn.Identity,
        w=lambda: nn.Parameter(torch.randn(6, 8)),
        v=lambda: nn.Parameter(torch.randn(6)),
    ),
    without_b(
        "attention by hand",
        _attended,
        q=lambda: nn.Linear(8, 6),
        k=lambda: nn.Linear(8, 6),
        v=lambda: nn.Linear(8, 10),
        last=lambda: nn.Linear(10, 5),
        whole=("last",),
    ),
    without_b(
        "attention with heads",
        _heads,
        q=lambda: nn.Linear(8, 8),
        k=lambda: nn.Linear(8, 8),
        v=lambda: nn.Linear(8, 8),
        whole=("last",),
    ),
    without_b(
        "multi-head attention",
        lambda self, x: self.last(self.mix(*[_rows(self, x)] * 3, need_weights=False)[0]).mean(1),
        mix=lambda: nn.MultiheadAttention(8, 2, batch_first=True),
    ),
    operator(
        "attention of channels",
        lambda self, x: self.b(
            ((_rows(self, x).transpose(1, 2) @ _rows(self, x)).softmax(-1) @ self.a(x).flatten(2)).unflatten(
                2, x.shape[2:]
            )
        ),
    ),
]

RECURRENT = [
    without_b(
        "lstm",
        lambda self, x: self.last(self.mix(_rows(self, x))[0][:, -1]),
        mix=lambda: nn.LSTM(8, 6, batch_first=True),
        last=lambda: nn.Linear(6, 5),
        whole=("last",),
    ),
    without_b(
        "gru of two levels",
        lambda self, x: self.last(self.mix(_rows(self, x))[0].mean(1)),
        mix=lambda: nn.GRU(8, 6, 2, batch_first=True, bidirectional=True),
        last=lambda: nn.Linear(12, 5),
        whole=("last",),
    ),
    without_b(
        "rnn by its state",
        lambda self, x: self.last(self.mix(_rows(self, x).transpose(0, 1))[1][0]),
        mix=lambda: nn.RNN(8, 6),
        last=lambda: nn.Linear(6, 5),
        whole=("last",),
    ),
    without_b(
        "a cell in a loop",
        _looped,
        cell=lambda: nn.GRUCell(8, 6),
        last=lambda: nn.Linear(6, 5),
        sizes=(4, 3),
        whole=("last",),
    ),
]

LAYERS = [
    between("grouped convolution", lambda: conv(8, 8, groups=2)),
    between("grouped convolution to more", lambda: conv(8, 12, groups=4), b=lambda: conv(12, 6)),
    between("depth-wise convolution", lambda: nn.Sequential(conv(8, 8, groups=8), nn.BatchNorm2d(8), nn.ReLU())),
    between("depth-wise convolution to more", lambda: conv(8, 16, groups=8), b=lambda: conv(16, 6)),
    between("transposed convolution", lambda: nn.ConvTranspose2d(8, 10, 2, stride=2), b=lambda: conv(10, 6)),
    between("transposed convolution of equal widths", lambda: nn.ConvTranspose2d(8, 8, 3, padding=1)),
    between("grouped transposed convolution", lambda: nn.ConvTranspose2d(8, 8, 2, stride=2, groups=2)),
    between("depth-wise transposed convolution", lambda: nn.ConvTranspose2d(8, 8, 2, stride=2, groups=8)),
    between("dilated convolution", lambda: nn.Conv2d(8, 8, 3, padding=2, dilation=2, bias=False)),
    between(
        "convolution of one column",
        lambda: nn.Sequential(nn.Conv2d(8, 8, (3, 1), padding=(1, 0)), nn.Conv2d(8, 8, (1, 3))),
    ),
    operator(
        "convolution by a function",
        lambda self, x: self.b(F.conv2d(self.a(x), self.w, self.v, padding=1)),
        w=lambda: nn.Parameter(torch.randn(8, 8, 3, 3) / 8),
        v=lambda: nn.Parameter(torch.randn(8)),
    ),
    operator(
        "a layer's weight by a function",
        lambda self, x: self.b(F.conv2d(self.a(x), self.c.weight, self.c.bias, padding=1)),
        c=lambda: conv(8, 8),
    ),
    operator(
        "a fixed blur",
        lambda self, x: self.b(F.conv2d(self.a(x), self.w.repeat(8, 1, 1, 1), groups=8)),
        w=lambda: nn.Buffer(torch.rand(1, 1, 3, 3)),
    ),
    operator("a modulated convolution", _demodulated, style=lambda: nn.Linear(3, 8)),
    operator(
        "linear on places",
        lambda self, x: self.b(self.work(self.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)),
        work=lambda: nn.Linear(8, 8),
    ),
    operator(
        "an embedding added",
        lambda self, x: self.b(self.a(x) + self.table(x.mean((1, 2, 3)).gt(0).long())[..., None, None]),
        table=lambda: nn.Embedding(2, 8),
    ),
    without_b(
        "position embeddings",
        lambda self, x: self.last(_rows(self, x) + self.table).mean(1),
        table=lambda: nn.Parameter(torch.randn(1, 64, 8)),
        sizes=(8,),
    ),
    operator("a layer twice", lambda self, x: self.b(self.c(self.c(self.a(x)).relu())), c=lambda: conv(8, 8)),
    operator(
        "a layer twice, a norm between",
        lambda self, x: self.b(self.c(self.n(self.c(self.a(x))).relu())),
        c=lambda: conv(8, 8),
        n=lambda: nn.BatchNorm2d(8),
    ),
    operator(
        "attention of neighbours",
        lambda self, x: self.b(
            self.a(x) * self.c(self.a(x).mean((2, 3)).unsqueeze(1)).transpose(1, 2).unsqueeze(-1).sigmoid()
        ),
        c=lambda: nn.Conv1d(1, 1, 3, padding=1),
        whole=("c",),
    ),
]

COMPUTED = [
    operator(
        "weight norm", lambda self, x: self.b(self.a(x).relu()), a=lambda: parametrizations.weight_norm(conv(3, 8))
    ),
    operator(
        "weight norm behind",
        lambda self, x: self.b(self.a(x).relu()),
        b=lambda: parametrizations.weight_norm(conv(8, 6)),
    ),
    operator("weight norm by hooks", lambda self, x: self.b(self.a(x).relu()), a=lambda: _weight_normed(conv(3, 8))),
    operator(
        "spectral norm", lambda self, x: self.b(self.a(x).relu()), a=lambda: parametrizations.spectral_norm(conv(3, 8))
    ),
    operator("spectral norm behind", lambda self, x: self.b(self.a(x).relu()), b=lambda: spectral_norm(conv(8, 6))),
    operator("a parametrized weight", lambda self, x: self.b(self.a(x).relu()), a=lambda: _parametrized(conv(3, 8))),
    operator(
        "a parametrized weight behind", lambda self, x: self.b(self.a(x).relu()), b=lambda: _parametrized(conv(8, 6))
    ),
]

SIGNALS = [
    operator("through frequencies", _polar),
    _applied("absolute spectrum", lambda z: torch.fft.fft2(z).abs()),
    _applied("spectrum over channels", lambda z: torch.fft.fft(z, dim=1).real),
    _applied(
        "real and imaginary",
        lambda z: torch.view_as_real(torch.complex(z[:, :4], z[:, 4:])).sum(-1),
        b=lambda: conv(4, 6),
    ),
]

OPERATORS: list[Case] = [
    *ELEMENTWISE,
    *POOLING,
    *NORMS,
    *REDUCTIONS,
    *RESHAPES,
    *JOINS,
    *PICKS,
    *PADDING,
    *RESIZING,
    *PRODUCTS,
    *RECURRENT,
    *LAYERS,
    *COMPUTED,
    *SIGNALS,
]
