"""Layers of classes with a forward of their own, as other packages have them, and networks of them."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import nn
from torch.nn import functional


class Alike(nn.Conv2d):
    """It pads as its input's size needs, as TensorFlow does."""

    def forward(self, x):
        ends = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            missing = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            ends += [missing // 2, missing - missing // 2]
        x = functional.pad(x, ends)
        return functional.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Static(nn.Conv2d):
    """A child pads, as a size that was known beforehand needed."""

    def __init__(self, ins, outs, size, stride=1, **knobs):
        super().__init__(ins, outs, size, stride, **knobs)
        missing = max(size - stride, 0)
        ends = (missing // 2, missing - missing // 2) * 2
        self.static_padding = nn.ZeroPad2d(ends) if missing else nn.Identity()

    def forward(self, x):
        x = self.static_padding(x)
        return functional.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Mirrored(nn.Conv2d):
    """It pads with what lies within, and strides otherwise than its attribute says."""

    def forward(self, x):
        x = functional.pad(x, [self.kernel_size[0] // 2] * 4, mode="reflect")
        stride = 1 if self.kernel_size[0] == 1 else 2
        return functional.conv2d(x, self.weight, self.bias, stride, 0, self.dilation, self.groups)


class Framed(nn.Conv2d):
    """It pads with ones."""

    def forward(self, x):
        return super().forward(functional.pad(x, [self.kernel_size[0] // 2] * 4, value=1.0))


class Standardized(nn.Conv2d):
    """Its weight has no mean and a variance of 1."""

    def forward(self, x):
        weight = functional.batch_norm(
            self.weight.reshape(1, self.out_channels, -1), None, None, training=True, momentum=0.0, eps=1e-6
        ).reshape_as(self.weight)
        pad = self.kernel_size[0] // 2
        return functional.conv2d(x, weight, self.bias, self.stride, pad, self.dilation, self.groups)


class Equalized(nn.Conv2d):
    """Its weight and bias are multiplied, the weight by what its inputs are, as equalized learning rates have it."""

    def forward(self, x):
        scale = 2.0 / math.sqrt(self.weight[0].numel())
        bias = None if self.bias is None else self.bias * 0.5
        pad = self.kernel_size[0] // 2
        return functional.conv2d(x, self.weight * scale, bias, self.stride, pad, self.dilation, self.groups)


class Activated(nn.Conv2d):
    """It goes on with a norm and an activation, as detectors' convolutions do."""

    def __init__(self, ins, outs, size, stride=1, norm=nn.BatchNorm2d, activation=functional.relu, **knobs):
        super().__init__(ins, outs, size, stride, padding=size // 2, **knobs)
        self.norm, self.activation = norm(outs) if norm else None, activation

    def forward(self, x):
        x = functional.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        x = x if self.norm is None else self.norm(x)
        return x if self.activation is None else self.activation(x)


class Shuffled(nn.Conv2d):
    """It makes pixels of channels."""

    def forward(self, x):
        return functional.pixel_shuffle(super().forward(x), 2)


class Rectified(nn.Linear):
    def forward(self, x):
        return functional.relu(super().forward(x))


class Scaled(nn.Linear):
    def forward(self, x):
        return functional.linear(x, self.weight * 3.0, self.bias)


class Block(nn.Module):
    """A mobile block: pointwise, depth-wise, pointwise, with a way around them."""

    def __init__(self, conv, ins, wide, size, stride=1):
        super().__init__()
        self.expand, self.depthwise = conv(ins, wide, 1), conv(wide, wide, size, stride, groups=wide)
        self.project, self.norm = conv(wide, ins, 1), nn.BatchNorm2d(ins)
        self.stride = stride

    def forward(self, x):
        y = functional.relu6(self.expand(x))
        y = self.norm(self.project(functional.relu6(self.depthwise(y))))
        return x + y if x.shape == y.shape else y


class Net(nn.Module):
    """Two blocks between a stem and a head, all of one class of convolutions."""

    def __init__(self, conv, linear=nn.Linear):
        super().__init__()
        self.stem, self.first = conv(3, 8, 3, 2, bias=False), nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(Block(conv, 8, 16, 3), Block(conv, 8, 12, 5, 2))
        self.last, self.fc, self.head = conv(8, 16, 1), linear(16, 12), nn.Linear(12, 4)

    def forward(self, x):
        x = functional.relu(self.last(self.blocks(self.first(self.stem(x)))))
        return self.head(functional.relu(self.fc(x.mean((2, 3)))))


BARE = {"alike": Alike, "static": Static, "mirrored": Mirrored}
COMPUTED = {"standardized": Standardized, "equalized": Equalized}
GOING_ON = {
    "activated": Activated,
    "frozen": partial(Activated, norm=None, activation=nn.functional.hardswish),
}
KINDS = BARE | COMPUTED | GOING_ON


def make(name):
    """Make a network of a kind of layers, with norms that aren't trivial, in evaluation mode."""
    torch.manual_seed(0)
    model = Net(KINDS[name], Scaled if name in COMPUTED else Rectified if name in GOING_ON else nn.Linear).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model
