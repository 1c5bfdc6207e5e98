"""Small networks as strangers write them, each whole: 3 channels or rows in, some answers out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from reliability.cases import Case, images
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


def unit(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Make a convolution, a batch norm and a ReLU."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class Pooled(nn.Module):
    """Features, their mean over places, and a linear layer."""

    def __init__(self, features: nn.Module, width: int) -> None:
        super().__init__()
        self.features, self.head = features, nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut, of ResNet."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Squeeze(nn.Module):
    """Squeeze-and-excite."""

    def __init__(self, width: int, less: int = 2) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(width, width // less, 1), nn.Conv2d(width // less, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = F.adaptive_avg_pool2d(x, 1)
        return x * torch.sigmoid(self.fc2(F.silu(self.fc1(scale))))


class SqueezeByLinear(nn.Module):
    """The same with linear layers and a view, as most write it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(nn.Linear(width, width // 2), nn.ReLU(), nn.Linear(width // 2, width), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.size()
        y = self.fc(self.pool(x).view(b, c)).view(b, c, 1, 1)
        return x * y.expand_as(x)


class UNet(nn.Module):
    """Two levels, transposed convolutions up, skips concatenated, cropped where sizes are odd."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.middle = unit(3, 6), unit(6, 8), unit(8, 10)
        self.up2, self.left2 = nn.ConvTranspose2d(10, 8, 2, 2), unit(16, 8)
        self.up1, self.left1 = nn.ConvTranspose2d(8, 6, 2, 2), unit(12, 6)
        self.last = nn.Conv2d(6, 2, 1)

    def _higher(self, layer: nn.Module, x: Tensor, skip: Tensor) -> Tensor:
        x = layer(x)
        x = F.pad(x, (0, skip.shape[3] - x.shape[3], 0, skip.shape[2] - x.shape[2]))
        return torch.cat([skip, x], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        x = self.middle(F.max_pool2d(second, 2))
        x = self.left2(self._higher(self.up2, x, second))
        return self.last(self.left1(self._higher(self.up1, x, first)))


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Shuffle channels between groups, as torchvision does."""
    n, c, h, w = x.size()
    x = x.view(n, groups, c // groups, h, w)
    return torch.transpose(x, 1, 2).contiguous().view(n, -1, h, w)


class ShuffleBlock(nn.Module):
    """A block of ShuffleNet v2: half of the channels pass."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.branch = nn.Sequential(
            unit(half, half, 1),
            nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False),
            nn.BatchNorm2d(half),
            unit(half, half, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, dim=1)
        return channel_shuffle(torch.cat((x1, self.branch(x2)), dim=1), 2)


class Inverted(nn.Module):
    """An inverted residual of MobileNet, with squeeze-and-excite if asked for."""

    def __init__(self, inputs: int, outputs: int, wide: int = 3, squeeze: bool = False, act: Any = nn.ReLU6) -> None:
        super().__init__()
        inner = inputs * wide
        layers = [nn.Conv2d(inputs, inner, 1, bias=False), nn.BatchNorm2d(inner), act()]
        layers += [nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False), nn.BatchNorm2d(inner), act()]
        layers += [Squeeze(inner)] if squeeze else []
        layers += [nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.conv = nn.Sequential(*layers)
        self.use_res_connect = inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over channels of an image."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """Depth-wise convolution, layer norm, two linear layers, layer scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.pwconv1, self.pwconv2 = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        out = self.gamma * self.pwconv2(F.gelu(self.pwconv1(out)))
        return x + out.permute(0, 3, 1, 2)


class MixerBlock(nn.Module):
    """MLP-Mixer's block: over places, then over channels."""

    def __init__(self, places: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.places = nn.Sequential(nn.Linear(places, 12), nn.GELU(), nn.Linear(12, places))
        self.channels = nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.places(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Mixer(nn.Module):
    """MLP-Mixer."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 2, 2)
        self.blocks = nn.Sequential(MixerBlock(16, 8), MixerBlock(16, 8))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.patch(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(rows)).mean(1))


class Attention(nn.Module):
    """Attention as timm writes it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.scale = self.head_dim**-0.5
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, N, _ = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        attn = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(B, N, self.num_heads * self.head_dim))


class ViT(nn.Module):
    """A vision transformer with a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 12, 2, 2)
        self.cls = nn.Parameter(torch.randn(1, 1, 12))
        self.pos = nn.Parameter(torch.randn(1, 17, 12))
        self.norms = nn.ModuleList(nn.LayerNorm(12) for _ in range(4))
        self.mix = nn.ModuleList(Attention(12, 3) for _ in range(2))
        self.mlps = nn.ModuleList(nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12)) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1) + self.pos
        for index in range(2):
            x = x + self.mix[index](self.norms[2 * index](x))
            x = x + self.mlps[index](self.norms[2 * index + 1](x))
        return self.head(self.norm(x)[:, 0])


class Encoder(nn.Module):
    """PyTorch's own encoder over patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 2, 2)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.patch(x).flatten(2).transpose(1, 2)).mean(1))


class SequenceClassifier(nn.Module):
    """Embeddings, an LSTM, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(20, 8), nn.LSTM(8, 10, batch_first=True)
        self.fc, self.head = nn.Linear(10, 12), nn.Linear(12, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        _, (hidden, _) = self.lstm(self.embed(tokens))
        return self.head(F.relu(self.fc(hidden[-1])))


class Wave(nn.Module):
    """A one-dimensional network with dilated, gated convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(3, 8, 1)
        self.gates = nn.ModuleList(nn.Conv1d(8, 16, 3, padding=2**i, dilation=2**i) for i in range(3))
        self.outs = nn.ModuleList(nn.Conv1d(8, 8, 1) for _ in range(3))
        self.head = nn.Conv1d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        skips = 0
        for gate, out in zip(self.gates, self.outs, strict=True):
            value, scale = gate(x).chunk(2, dim=1)
            x = x + out(torch.tanh(value) * torch.sigmoid(scale))
            skips = skips + x
        return self.head(F.relu(skips))


class TwoInputs(nn.Module):
    """Images and a vector, joined."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.fc, self.mix, self.head = nn.Linear(4, 6), nn.Linear(12, 8), nn.Linear(8, 5)

    def forward(self, image: Tensor, vector: Tensor) -> Tensor:
        seen = F.relu(self.conv2(F.relu(self.conv1(image)))).mean((2, 3))
        return self.head(F.relu(self.mix(torch.cat((seen, F.relu(self.fc(vector))), -1))))


class Heads(nn.Module):
    """Two answers of one body, as a tuple, a dict or a named tuple."""

    class Answer(NamedTuple):
        """Classes and boxes."""

        classes: Tensor
        boxes: Tensor

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.body = nn.Sequential(unit(3, 8), unit(8, 8))
        self.classes, self.boxes = nn.Conv2d(8, 5, 1), nn.Sequential(unit(8, 6), nn.Conv2d(6, 4, 1))
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        x = self.body(x)
        classes, boxes = self.classes(x), self.boxes(x).exp()
        if self.kind == "dict":
            return {"classes": classes, "boxes": boxes}
        return Heads.Answer(classes, boxes) if self.kind == "named" else (classes, [boxes])


class SharedHead(nn.Module):
    """One head over two levels (RetinaNet), with a norm of each level."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = unit(3, 8), unit(8, 8, stride=2)
        self.tower, self.last = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 3, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))

    def forward(self, x: Tensor) -> list[Tensor]:
        low = self.low(x)
        return [
            self.last(F.relu(norm(self.tower(level))))
            for norm, level in zip(self.norms, (low, self.high(low)), strict=True)
        ]


class Pyramid(nn.Module):
    """A feature pyramid with three levels."""

    def __init__(self) -> None:
        super().__init__()
        self.c2, self.c3, self.c4 = unit(3, 6), unit(6, 8, stride=2), unit(8, 10, stride=2)
        self.laterals = nn.ModuleList(nn.Conv2d(width, 8, 1) for width in (6, 8, 10))
        self.smooth = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        c2 = self.c2(x)
        c3 = self.c3(c2)
        c4 = self.c4(c3)
        p4 = self.laterals[2](c4)
        p3 = self.laterals[1](c3) + F.interpolate(p4, size=c3.shape[-2:], mode="nearest")
        p2 = self.laterals[0](c2) + F.interpolate(p3, size=c2.shape[-2:], mode="nearest")
        levels = [smooth(p) for smooth, p in zip(self.smooth, (p2, p3, p4), strict=True)]
        return {f"p{index + 2}": self.head(level) for index, level in enumerate(levels)}


class Cbam(nn.Module):
    """Attention over channels, then over places by the mean and the largest of all channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Conv2d(width, width // 2, 1), nn.ReLU(), nn.Conv2d(width // 2, width, 1))
        self.spatial = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.mlp(F.adaptive_avg_pool2d(x, 1)) + self.mlp(F.adaptive_max_pool2d(x, 1))
        x = x * torch.sigmoid(gate)
        largest, _ = torch.max(x, dim=1, keepdim=True)
        places = torch.cat([torch.mean(x, dim=1, keepdim=True), largest], dim=1)
        return x * torch.sigmoid(self.spatial(places))


class Siamese(nn.Module):
    """The distance of two images' features."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(unit(3, 8), nn.MaxPool2d(2), unit(8, 6))
        self.fc = nn.Linear(6, 4)

    def embed(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).mean((2, 3)))

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        return F.pairwise_distance(self.embed(x1), self.embed(x2))


class Autoencoder(nn.Module):
    """A convolutional encoder and a decoder of transposed convolutions, with a code of its own size."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU())
        self.code, self.back = nn.Linear(12 * 4, 10), nn.Linear(10, 12 * 4)
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(12, 8, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(8, 3, 4, 2, 1), nn.Tanh()
        )

    def forward(self, x: Tensor) -> Tensor:
        code = self.code(torch.flatten(self.encoder(x), 1))
        return self.decoder(F.relu(self.back(code)).view(-1, 12, 2, 2))


class Variational(nn.Module):
    """An encoder that draws its code in training."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.mu, self.log = nn.Sequential(unit(3, 8, stride=2), unit(8, 6)), nn.Linear(6, 4), nn.Linear(6, 4)
        self.decode = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 6))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = self.body(x).mean((2, 3))
        mu, log = self.mu(rows), self.log(rows)
        z = mu + torch.randn_like(mu) * torch.exp(0.5 * log) if self.training else mu
        return self.decode(z), mu, log


class SelectiveKernel(nn.Module):
    """Two kernels' features, mixed by a softmax between them (SKNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.k3, self.k5 = unit(3, 8), unit(8, 8), unit(8, 8, 5)
        self.fc, self.fcs = nn.Linear(8, 4), nn.ModuleList(nn.Linear(4, 8) for _ in range(2))
        self.last, self.head = unit(8, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        found = torch.stack([self.k3(x), self.k5(x)], dim=1)
        z = F.relu(self.fc(found.sum(1).mean((2, 3))))
        gates = torch.stack([fc(z) for fc in self.fcs], dim=1).softmax(dim=1)
        return self.head(self.last((found * gates[..., None, None]).sum(1)).mean((2, 3)))


class PointNet(nn.Module):
    """Points to classes, by the maximum over points."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Conv1d(3, 8, 1), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 12, 1))
        self.fc1, self.bn, self.head = nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.max(self.mlp(x), 2)[0]
        return self.head(F.relu(self.bn(self.fc1(x))))


class Graph(nn.Module):
    """A graph network: an adjacency matrix and rows."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(3, 8), nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, rows: Tensor, adjacency: Tensor) -> Tensor:
        adjacency = adjacency / adjacency.sum(-1, keepdim=True).clamp(min=1e-6)
        rows = F.relu(adjacency @ self.fc1(rows))
        return self.head(F.relu(torch.bmm(adjacency, self.fc2(rows))))


class Ghost(nn.Module):
    """GhostNet's module: cheap features beside others, cut to a width."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.oup = outputs
        self.primary, self.cheap = (
            unit(inputs, (outputs + 1) // 2, 1),
            unit((outputs + 1) // 2, (outputs + 1) // 2, groups=(outputs + 1) // 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.primary(x)
        return torch.cat([x1, self.cheap(x1)], dim=1)[:, : self.oup, :, :]


class Csp(nn.Module):
    """YOLO's C2f: split, blocks in a list, all concatenated."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.c = outputs // 2
        self.cv1, self.cv2 = unit(inputs, 2 * self.c, 1), unit(4 * self.c, outputs, 1)
        self.m = nn.ModuleList(nn.Sequential(unit(self.c, self.c), unit(self.c, self.c)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).split((self.c, self.c), 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class SuperResolution(nn.Module):
    """Convolutions, pixel shuffle, and the image itself, enlarged (ESPCN, EDSR)."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.body1, self.body2 = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Conv2d(8, 8, 3, padding=1),
        )
        self.tail, self.shuffle = nn.Conv2d(8, 12, 3, padding=1), nn.PixelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(x)
        y = y + 0.1 * self.body2(F.relu(self.body1(y)))
        return self.shuffle(self.tail(y)) + F.interpolate(x, scale_factor=2, mode="nearest")


class Film(nn.Module):
    """Features scaled and shifted by a second input (FiLM, StyleGAN's AdaIN)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm, self.conv2 = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.InstanceNorm2d(8),
            nn.Conv2d(8, 6, 3, padding=1),
        )
        self.style, self.head = nn.Linear(4, 16), nn.Linear(6, 5)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        gamma, beta = self.style(style).chunk(2, 1)
        x = self.norm(self.conv1(x)) * (1 + gamma[..., None, None]) + beta[..., None, None]
        return self.head(F.relu(self.conv2(F.relu(x))).mean((2, 3)))


class KeywordNet(nn.Module):
    """Takes keyword arguments, one of them optional."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.head = unit(3, 8), unit(8, 6), nn.Linear(6, 5)

    def forward(self, *, pixel_values: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> dict[str, Tensor]:
        x = self.conv1(pixel_values)
        if mask is not None:
            x = x * mask.unsqueeze(1)
        return {"logits": self.head(self.conv2(x).mean((2, 3))) * scale}


def vgg() -> nn.Module:
    """A plain stack that ends in a flattened map."""
    return nn.Sequential(
        unit(3, 8),
        nn.MaxPool2d(2),
        unit(8, 10),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(40, 12),
        nn.ReLU(),
        nn.Linear(12, 5),
    )


def volumes() -> nn.Module:
    """A three-dimensional network."""
    return nn.Sequential(
        nn.Conv3d(3, 6, 3, padding=1),
        nn.BatchNorm3d(6),
        nn.ReLU(),
        nn.MaxPool3d(2),
        nn.Conv3d(6, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


def rows(batch: int, size: int) -> Tensor:
    """Draw ``(n, 3, t)``."""
    return torch.randn(batch, 3, 2 * size)


def _net(name: str, make: Callable[[], nn.Module], inputs: Any = images, **options: Any) -> Case:
    return Case(f"networks/{name}", make, inputs, **options)


def _pooled(name: str, width: int, *features: Callable[[], nn.Module], **options: Any) -> Case:
    return _net(name, lambda: Pooled(nn.Sequential(*(make() for make in features)), width), **options)


NETWORKS: list[Case] = [
    _net("VGG", vgg),
    _pooled("ResNet", 12, lambda: unit(3, 8), lambda: BasicBlock(8, 8), lambda: BasicBlock(8, 12, 2)),
    _pooled("squeeze-and-excite", 8, lambda: unit(3, 8), lambda: Squeeze(8), lambda: unit(8, 8)),
    _pooled(
        "squeeze-and-excite by linear layers", 8, lambda: unit(3, 8), lambda: SqueezeByLinear(8), lambda: unit(8, 8)
    ),
    _net("UNet with transposed convolutions", UNet),
    _pooled("ShuffleNet", 8, lambda: unit(3, 8), lambda: ShuffleBlock(8), lambda: ShuffleBlock(8)),
    _pooled("MobileNet v2", 8, lambda: unit(3, 6), lambda: Inverted(6, 6), lambda: Inverted(6, 8)),
    _pooled(
        "MobileNet v3",
        8,
        lambda: unit(3, 6),
        lambda: Inverted(6, 6, 2, True, nn.Hardswish),
        lambda: Inverted(6, 8, 2, True, nn.Hardswish),
    ),
    _pooled(
        "ConvNeXt",
        8,
        lambda: nn.Conv2d(3, 8, 2, 2),
        lambda: LayerNorm2d(8),
        lambda: ConvNeXtBlock(8),
        lambda: ConvNeXtBlock(8),
    ),
    _net("MLP-Mixer", Mixer, sizes=(8,)),
    _net("vision transformer", ViT, sizes=(8,)),
    _net("PyTorch's encoder", Encoder),
    _net("LSTM of tokens", SequenceClassifier, lambda n, size: torch.randint(0, 20, (n, size))),
    _net("WaveNet", Wave, rows),
    _net("PointNet", PointNet, rows),
    _net("volumes", volumes, lambda n, size: torch.randn(n, 3, 4, size, size), sizes=(6, 8)),
    _net("graph network", Graph, lambda n, size: (torch.randn(n, size, 3), torch.rand(n, size, size))),
    _net("two inputs", TwoInputs, lambda n, size: (torch.randn(n, 3, size, size), torch.randn(n, 4))),
    _net(
        "keyword inputs",
        KeywordNet,
        lambda n, size: {
            "pixel_values": torch.randn(n, 3, size, size),
            "mask": torch.rand(n, size, size),
            "scale": 2.0,
        },
    ),
    _net("a style's input", Film, lambda n, size: (torch.randn(n, 3, size, size), torch.randn(n, 4))),
    _net("two heads, a tuple", lambda: Heads("tuple")),
    _net("two heads, a dict", lambda: Heads("dict")),
    _net("two heads, a named tuple", lambda: Heads("named")),
    _net("a head shared by levels", SharedHead),
    _net("feature pyramid", Pyramid),
    _pooled("CBAM", 8, lambda: unit(3, 8), lambda: Cbam(8), lambda: unit(8, 8)),
    _net("siamese", Siamese, lambda n, size: (torch.randn(n, 3, size, size), torch.randn(n, 3, size, size))),
    _net("autoencoder", Autoencoder, sizes=(8,)),
    _net("variational autoencoder", Variational, noisy=True),
    _net("selective kernels", SelectiveKernel),
    _pooled("GhostNet", 8, lambda: unit(3, 8), lambda: Ghost(8, 9), lambda: Ghost(9, 8)),
    _pooled("YOLO's blocks", 8, lambda: unit(3, 8), lambda: Csp(8, 8), lambda: Csp(8, 8)),
    _net("super-resolution", SuperResolution),
]
