"""Small networks, one for each trait that makes a network hard to prune; the tests use them too."""
# ruff: noqa: D102

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from benchmarks.networks.zoo_by_value import Detector, Experts, InParts, Untraceable, block


class UNet(nn.Module):
    """Down, up by transposed convolutions, skips by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = block(3, 8), block(8, 16), block(16, 32)
        self.up2, self.mix2 = nn.ConvTranspose2d(32, 16, 2, stride=2), block(32, 16)
        self.up1, self.mix1 = nn.ConvTranspose2d(16, 8, 2, stride=2), block(16, 8)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(functional.max_pool2d(one, 2))
        x = self.bottom(functional.max_pool2d(two, 2))
        x = self.mix2(torch.cat([self.up2(x), two], 1))
        return self.head(self.mix1(torch.cat([self.up1(x), one], 1)))


class Residual(nn.Module):
    """Layers between a stem and a pooled head, with a skip around the middle."""

    def __init__(self, stem: nn.Module, middle: nn.Module, width: int) -> None:
        super().__init__()
        self.stem, self.middle, self.head = stem, middle, nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem(x))
        return self.head((x + self.middle(x)).flatten(2).mean(2))


def conv1d() -> nn.Module:
    """One-dimensional convolutions, dilated, with batch norms."""
    middle = nn.Sequential(
        nn.Conv1d(12, 16, 3, padding=2, dilation=2), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, 12, 1)
    )
    return Residual(nn.Conv1d(2, 12, 5, padding=2), middle, 12)


def conv3d() -> nn.Module:
    """Three-dimensional convolutions with batch norms."""
    middle = nn.Sequential(nn.Conv3d(8, 12, 3, padding=1), nn.BatchNorm3d(12), nn.ReLU(), nn.Conv3d(12, 8, 1))
    return Residual(nn.Conv3d(1, 8, 3, padding=1), middle, 8)


def group_norm_3d() -> nn.Module:
    """Group norms behind three-dimensional convolutions."""
    stem = nn.Sequential(nn.Conv3d(1, 8, 3, padding=1), nn.GroupNorm(4, 8))
    middle = nn.Sequential(nn.Conv3d(8, 16, 3, padding=1), nn.GroupNorm(8, 16), nn.ReLU(), nn.Conv3d(16, 8, 1))
    return Residual(stem, middle, 8)


def group_norm_one_each() -> nn.Module:
    """A group norm with a group for each channel: an instance norm."""
    middle = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.GroupNorm(16, 16), nn.ReLU(), nn.Conv2d(16, 8, 1))
    return Residual(nn.Conv2d(3, 8, 3, padding=1), middle, 8)


def instance_norm() -> nn.Module:
    """Instance norms, with and without parameters."""
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.InstanceNorm2d(8, affine=True))
    middle = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.InstanceNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 1))
    return Residual(stem, middle, 8)


class SqueezeExcite(nn.Module):
    """A gate for each channel, by a sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.tail = block(3, 16), nn.Conv2d(16, 4, 1)
        self.squeeze, self.excite = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        gate = torch.sigmoid(self.excite(functional.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.tail(x * gate).mean((2, 3))


class Recurrent(nn.Module):
    """A recurrent layer between linear ones."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embed, self.body = nn.Linear(4, 12), kind(12, 10, batch_first=True)
        self.inner, self.head = nn.Linear(10, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(functional.relu(self.embed(x)))[0]
        return self.head(functional.relu(self.inner(x[:, -1])))


class Shared(nn.Module):
    """A block that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice, self.inner, self.tail = block(3, 12), block(12, 12), block(12, 8), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.tail(self.inner(self.twice(self.twice(x)))).mean((2, 3))


class Shuffled(nn.Module):
    """Upsampling by pixel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide, self.tail = block(3, 8), nn.Conv2d(8, 24, 3, padding=1), block(6, 8)
        self.shuffle, self.head = nn.PixelShuffle(2), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tail(self.shuffle(self.wide(self.stem(x)))))


class Sliced(nn.Module):
    """Channels that are chunked, sliced, split by fixed sizes and written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = block(3, 16), block(8, 12), block(12, 10)
        self.four, self.head = block(10, 8), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.one(x).chunk(2, 1)
        x = self.two(left * torch.sigmoid(right))
        x = self.three(torch.cat([x[:, 6:], x[:, :6]], 1))
        x = self.four(x)
        first, _ = torch.split(x, [6, 2], 1)
        return self.head(first.mean((2, 3)))


class Written(nn.Module):
    """Channels that are split, sliced and viewed by sizes which its attributes hold."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.sizes, self.shape, self.joined = 4, (8, 4), (12, 1, 1), 20
        self.one, self.two, self.three = block(3, 16), block(16, 12), block(12, 20)
        self.scale, self.head = nn.Parameter(torch.rand(12) + 0.5), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d = torch.split(self.one(x), self.width, 1)
        first, second = torch.split(self.two(torch.cat([b, 2 * d, c, a], 1)), self.sizes, 1)
        x = self.three(torch.cat([second, first], 1) * self.scale.view(self.shape))
        x = torch.cat([x[:, self.joined // 2 :], 2 * x[:, : self.joined // 2]], 1)
        return self.head(x.mean((2, 3)))


class Attended(nn.Module):
    """``nn.MultiheadAttention`` and a feed-forward part, both around a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(4, 16), nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.inner, self.outer, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        normed = self.norm(x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        return self.head((x + self.outer(functional.gelu(self.inner(x)))).mean(1))


class OwnAttention(nn.Module):
    """Attention by matrix products, with fixed heads, and a low-rank product whose inner width is free."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.out = nn.Linear(4, 16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.left, self.right, self.head = nn.Linear(16, 8), nn.Linear(16, 8), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q, k, v = self.qkv(x).reshape(x.shape[0], -1, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = ((q @ k.transpose(-2, -1)) / 2).softmax(-1) @ v
        x = x + self.out(y.transpose(1, 2).flatten(2))
        x = torch.tanh(self.left(x) @ self.right(x).transpose(-2, -1)) @ x
        return self.head(x.mean(1))


class ChannelShuffle(nn.Module):
    """Grouped convolutions with a channel shuffle of fixed groups between them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = block(3, 16), nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.wide, self.head = nn.Conv2d(16, 24, 1), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, c, h, w = x.shape
        x = x.view(b, 4, c // 4, h, w).transpose(1, 2).flatten(1, 2)
        return self.head(functional.relu(self.wide(self.inner(x))).mean((2, 3)))


class LayerScale(nn.Module):
    """A block whose output is scaled channel by channel, in a layout with the channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.norm, self.inner, self.outer = nn.LayerNorm(12), nn.Linear(12, 24), nn.Linear(24, 12)
        self.scale, self.head = nn.Parameter(torch.rand(12) + 0.5), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.depthwise(x).permute(0, 2, 3, 1)
        y = self.outer(functional.gelu(self.inner(self.norm(y)))) * self.scale
        return self.head((x + y.permute(0, 3, 1, 2)).mean((2, 3)))


class Constants(nn.Module):
    """Activations that aren't zero at zero, a unary operation without a rule, and a softmax over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three, self.four = (
            nn.Conv2d(*pair, 3, padding=1) for pair in ((3, 8), (8, 8), (8, 8), (8, 8))
        )
        self.five, self.head = block(8, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(torch.sigmoid(self.one(x)))
        x = self.four(torch.cumsum(self.three(torch.softmax(x, 1)), 1))
        return self.head(self.five(x).mean((2, 3)))


class Words(nn.Module):
    """Embeddings, a head, and arguments by name."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.inner, self.head = nn.Embedding(30, 12), nn.Linear(12, 16), nn.Linear(16, 30)

    def forward(self, ids: Tensor, scale: Tensor) -> Tensor:
        return self.head(functional.relu(self.inner(self.words(ids) * scale)))


class Reparametrized(nn.Module):
    """Layers under weight norm, of the old kind and the new, beside plain ones."""

    def __init__(self) -> None:
        super().__init__()
        self.old = nn.utils.weight_norm(nn.Conv2d(3, 8, 3, padding=1))
        self.new = parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1))
        self.plain, self.inner, self.head = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 8, 1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.plain(functional.relu(self.new(functional.relu(self.old(x))))))
        return self.head(functional.relu(self.inner(x)).mean((2, 3)))


class FixedView(nn.Module):
    """A size written into the forward, and a shape that is unpacked."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.wide, self.head = block(3, 8), block(8, 12), nn.Linear(12 * 16, 20), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.adaptive_avg_pool2d(self.two(self.one(x)), 4)
        return self.head(functional.relu(self.wide(x.view(-1, 192))))


IMAGE = (2, 3, 16, 16)
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "unet": (UNet, IMAGE),
    "conv1d": (conv1d, (2, 2, 24)),
    "conv3d": (conv3d, (2, 1, 6, 6, 6)),
    "group_norm_3d": (group_norm_3d, (2, 1, 6, 6, 6)),
    "group_norm_one_each": (group_norm_one_each, IMAGE),
    "instance_norm": (instance_norm, IMAGE),
    "squeeze_excite": (SqueezeExcite, IMAGE),
    "lstm": (lambda: Recurrent(nn.LSTM), (2, 5, 4)),
    "gru": (lambda: Recurrent(nn.GRU), (2, 5, 4)),
    "shared": (Shared, IMAGE),
    "pixel_shuffle": (Shuffled, IMAGE),
    "sliced": (Sliced, IMAGE),
    "written": (Written, IMAGE),
    "multihead_attention": (Attended, (2, 5, 4)),
    "own_attention": (OwnAttention, (2, 5, 4)),
    "channel_shuffle": (ChannelShuffle, IMAGE),
    "layer_scale": (LayerScale, IMAGE),
    "constants": (Constants, IMAGE),
    "words": (Words, (2, 7)),
    "reparametrized": (Reparametrized, IMAGE),
    "fixed_view": (FixedView, IMAGE),
    "untraceable": (Untraceable, (2, 4)),
    "in_parts": (InParts, IMAGE),
    "detector": (Detector, IMAGE),
    "experts": (Experts, (2, 24, 4)),
}
"""By name what makes the network, and the shape of its input; ``words`` takes indices and a number."""


def make(name: str) -> tuple[nn.Module, Any]:
    """Make a network, seeded, with norms that aren't trivial, and an input."""
    torch.manual_seed(0)
    factory, shape = NETS[name]
    model = lively(factory().eval())
    if name == "words":
        return model, {"ids": torch.randint(0, 30, shape), "scale": torch.tensor(2.0)}
    return model, ([*torch.randn(shape)],) if name in ("in_parts", "detector") else torch.randn(shape)


def lively(model: nn.Module) -> nn.Module:
    """Draw what is zero, and all of norms: a shift that survives shows, and every channel has its own."""
    with torch.no_grad():
        for parameter in model.parameters():
            # A head or a layer scale that starts at zero, or next to it, would hide what differs before it, and one of
            # equal values which of its places are gone.
            least, most = parameter.min(), parameter.max()
            if max(-float(least), float(most)) < 1e-3 or (parameter.numel() > 1 and bool(least == most)):
                parameter.normal_(0, 0.2)
        for module in model.modules():
            if (
                isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm))
                and module.weight is not None
            ):
                module.weight.uniform_(0.5, 1.5)
                if module.bias is not None:
                    module.bias.normal_(0, 0.3)
            if isinstance(getattr(module, "running_mean", None), Tensor):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.7, 1.5)
    return model
