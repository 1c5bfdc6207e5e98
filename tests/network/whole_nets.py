"""Small nets with modules that read all channels at once: gates along channels, response norms, computed weights."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn
from torch.nn import functional


class Gate(nn.Module):
    """ECA as timm writes it: a convolution goes along the channels of pooled features."""

    def __init__(self, size, bias=False, hidden=1):
        super().__init__()
        self.conv = nn.Conv1d(1, hidden, size, padding=size // 2, bias=bias)
        self.last = nn.Identity() if hidden == 1 else nn.Conv1d(hidden, 1, 1)

    def forward(self, x):
        y = self.last(self.conv(x.mean((2, 3)).view(x.shape[0], 1, -1)))
        return x * torch.sigmoid(y).view(x.shape[0], -1, 1, 1).expand_as(x)


class TransposedGate(nn.Module):
    """ECA as its authors write it, with a dilated kernel."""

    def __init__(self):
        super().__init__()
        self.pool, self.conv = nn.AdaptiveAvgPool2d(1), nn.Conv1d(1, 1, 3, padding=2, dilation=2, bias=False)

    def forward(self, x):
        y = self.conv(self.pool(x).squeeze(-1).transpose(-1, -2)).transpose(-1, -2).unsqueeze(-1)
        return x * torch.sigmoid(y).expand_as(x)


class ResponseNorm(nn.Module):
    """GRN as timm and Transformers write it, but for names, layouts and what is added to the mean."""

    def __init__(self, channels, eps=1e-6, dim=-1):
        super().__init__()
        shape = [1, 1, 1, 1]
        shape[dim] = channels
        self.gamma, self.beta = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(shape))
        self.eps, self.dim, self.places = eps, dim, (1, 2) if dim == -1 else (2, 3)

    def forward(self, x):
        lengths = torch.linalg.vector_norm(x, dim=self.places, keepdim=True)
        return self.gamma * (x * (lengths / (lengths.mean(self.dim, keepdim=True) + self.eps))) + self.beta + x


class ChannelsFirst(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Root(nn.Module):
    """The RMS norm of LLaMA, or that of Gemma, which multiplies by one more than its weight."""

    def __init__(self, width=5, shift=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, width))
        self.hidden_size, self.shape, self.shift, self.eps = width, (width,), shift, 1e-6

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (self.shift + self.weight)


class Standardized(nn.Conv2d):
    """Weight standardization with a gain, as in NF-ResNets; ``alike`` pads as TensorFlow does."""

    def __init__(self, ins, outs, size, stride=1, groups=1, alike=False):
        super().__init__(ins, outs, size, stride, padding=0 if alike else size // 2, groups=groups)
        self.gain, self.alike = nn.Parameter(torch.rand(outs, 1, 1, 1) + 0.5), alike

    def forward(self, x):
        if self.alike:
            ends = []
            for size in x.shape[:1:-1]:
                missing = max((math.ceil(size / self.stride[0]) - 1) * self.stride[0] + self.kernel_size[0] - size, 0)
                ends += [missing // 2, missing - missing // 2]
            x = functional.pad(x, ends)
        variance, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True, correction=0)
        weight = (self.weight - mean) * torch.rsqrt(variance + 1e-6) * self.gain
        return functional.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Residual(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return x + self.body(x)


class ResponseBlock(nn.Module):
    """A block of ConvNeXt v2, in either layout."""

    def __init__(self, channels, eps=1e-6, dim=-1):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.expand, self.join = nn.Linear(channels, 3 * channels), nn.Linear(3 * channels, channels)
        self.norm, self.dim = ResponseNorm(3 * channels, eps, dim), dim

    def forward(self, x):
        y = functional.gelu(self.expand(self.depthwise(x).permute(0, 2, 3, 1)))
        y = self.norm(y) if self.dim == -1 else self.norm(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.join(y).permute(0, 3, 1, 2)


def _headed(*parts, width):
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4))


def _eca(gate):
    body = nn.Sequential(nn.Conv2d(12, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), gate, nn.Conv2d(16, 12, 1))
    return _headed(
        nn.Conv2d(3, 12, 3), nn.ReLU(), Residual(body), nn.ReLU(), nn.Conv2d(12, 20, 1), copy.deepcopy(gate), width=20
    )


def _standardized(**knobs):
    body = nn.Sequential(Standardized(12, 16, 3, groups=2), nn.GELU(), Standardized(16, 12, 3, **knobs))
    wide = Standardized(12, 20, 3, 2, **knobs)
    return _headed(Standardized(3, 12, 3, 2, **knobs), nn.ReLU(), Residual(body), wide, nn.ReLU(), width=20)


NETS = {
    "eca": lambda: _eca(Gate(3)),
    "eca_wide": lambda: _eca(Gate(5, bias=True)),
    "eca_transposed": lambda: _eca(TransposedGate()),
    "response_norm": lambda: _headed(nn.Conv2d(3, 8, 2, 2), ResponseBlock(8), ResponseBlock(8, 1e-3), width=8),
    "response_norm_first": lambda: _headed(nn.Conv2d(3, 8, 2, 2), ResponseBlock(8, dim=1), width=8),
    "standardized": _standardized,
    "standardized_alike": lambda: _standardized(alike=True),
}


def make(name):
    """Make a network in double precision, with batch norms that aren't trivial."""
    torch.manual_seed(0)
    model = NETS[name]().double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model
