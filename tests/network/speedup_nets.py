"""Small nets, each with one trait that makes pruning hard, and the run from config_list to dense model."""

from __future__ import annotations

import copy

import torch
from nni.compression.pruning import L1NormPruner
from torch import nn

from nni_topo import to_dense
from nni_topo.speedup import dependency_groups


def lively(model):
    """Give batch norms statistics and biases that aren't trivial, so that a surviving bias shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.5, generator=generator)
                module.running_mean.normal_(0, 0.3, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
    return model


def masks_of(pruner):
    """Masks of a pruner; the model comes back unwrapped."""
    _, masks = pruner.compress()
    pruner.unwrap_model()
    return masks


def l1_masks(model, config_list):
    """Masks of NNI's L1 pruner; the model comes back unwrapped."""
    return masks_of(L1NormPruner(model, config_list))


def prune_half(model, inputs, types=("Conv2d",), exclude=(), **knobs):
    """Prune half of the channels of all layers of some types and make the model dense."""
    config = {"op_types": list(types), "sparse_ratio": 0.5, "exclude_op_names": list(exclude)}
    masks = l1_masks(model, dependency_groups(model, inputs, [config]))
    return masks, to_dense(model, inputs, masks, **knobs)


def same_output(dense, reference, *inputs):
    """Compare what two models give in evaluation mode, to a share of the largest output."""
    with torch.no_grad():
        expected, actual = (copy.deepcopy(model).eval()(*inputs) for model in (reference, dense))
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def filter_mask(module, pruned):
    """The mask of a layer's weight that removes some output channels."""
    mask = torch.ones_like(module.weight)
    mask[list(pruned)] = 0
    return {"weight": mask}


def chain():
    """Convolution, batch norm, ReLU, convolution, head."""
    torch.manual_seed(1)
    return lively(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, 4),
        )
    )


class LeNet(nn.Module):
    """Functional activations and a view, as in many user models."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.conv1 = nn.Conv2d(1, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 25, 84)
        self.fc2 = nn.Linear(84, 10)

    def forward(self, x):
        x = torch.max_pool2d(torch.relu(self.conv1(x)), 2)
        x = torch.max_pool2d(torch.relu(self.conv2(x)), 2)
        return self.fc2(torch.relu(self.fc1(x.view(x.size(0), -1))))


class Residual(nn.Module):
    """Two convolutions that meet in an addition, one of them over a depth-wise convolution."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm = nn.BatchNorm2d(8)
        self.point = nn.Conv2d(8, 8, 1)
        self.tail = nn.Conv2d(8, 4, 1)
        lively(self)

    def forward(self, x):
        x = self.stem(x)
        y = self.point(torch.relu(self.norm(self.depthwise(x))))
        return self.tail(torch.relu(x + y)).mean((2, 3))


class Concatenated(nn.Module):
    """Two convolutions concatenated, a batch norm and a depth-wise convolution over both."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.left = nn.Conv2d(3, 4, 3, padding=1)
        self.right = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(10)
        self.depthwise = nn.Conv2d(10, 10, 3, padding=1, groups=10)
        self.tail = nn.Conv2d(10, 5, 1)
        lively(self)

    def forward(self, x):
        both = torch.cat([self.left(x), self.right(x)], dim=1)
        return self.tail(torch.relu(self.depthwise(self.norm(both)))).flatten(2).mean(2)


class Grouped(nn.Module):
    """A convolution in two groups, a group norm and a batch norm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 12, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(12)
        self.tail = nn.Conv2d(12, 5, 1)
        lively(self)

    def forward(self, x):
        x = torch.relu(self.norm(self.second(torch.relu(self.first(x)))))
        return self.tail(x).mean((2, 3))


class Chunked(nn.Module):
    """A convolution whose output is halved, one half gated by the other."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(4, 5, 3, padding=1)

    def forward(self, x):
        one, two = self.first(x).chunk(2, dim=1)
        return self.second(one * torch.sigmoid(two)).mean((2, 3))


class Shared(nn.Module):
    """One convolution called twice, one batch norm after two different layers, a layer never called."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(6)
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.twice = nn.Conv2d(6, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.tail = nn.Conv2d(6, 3, 1)
        self.never = nn.Conv2d(3, 3, 1)
        lively(self)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.norm(self.twice(x)))
        return self.tail(self.twice(x)).mean((2, 3))


class Optional(nn.Module):
    """Optional arguments, one of which changes the graph."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 1)

    def forward(self, x, mask=None, scale=2.0, *, shift=None):
        x = torch.relu(self.first(x))
        if mask is not None:
            x = x * mask
        return {"y": self.second(x * scale) + (0.0 if shift is None else shift)}


class Net(nn.Module):
    """A layer, something between that makes other values of zeros, and what reads these."""

    def __init__(self, between, *behind):
        super().__init__()
        self.first, self.between, self.behind = nn.Conv2d(3, 8, 3), between, nn.Sequential(*behind)
        self.head = nn.Linear(6, 2)

    def forward(self, images):
        return self.head(self.behind(self.between(self.first(images))).relu().flatten(2).mean(2))


class Rows(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, images):
        found = self.layer(images.flatten(2).transpose(1, 2))
        return (found[0] if isinstance(found, tuple) else found).transpose(1, 2)


class Doubling(nn.Conv2d):
    def forward(self, images):
        return 2 * super().forward(images)


def norm_behind(*layers):
    return [each for layer in layers for each in (layer, nn.BatchNorm2d(layer.out_channels))]


class ShuffleUnit(nn.Module):
    """A unit of ShuffleNet v2: one half goes by, and channels are shuffled; the first of a stage takes all twice."""

    def __init__(self, ins, half, is_first):
        super().__init__()
        ins = ins if is_first else half
        self.branch = nn.Sequential(
            *norm_behind(nn.Conv2d(ins, half, 1)), nn.ReLU(),
            *norm_behind(nn.Conv2d(half, half, 3, padding=1, groups=half), nn.Conv2d(half, half, 1)), nn.ReLU(),
        )  # fmt: skip
        self.other = nn.Sequential(*norm_behind(nn.Conv2d(ins, half, 1)), nn.ReLU()) if is_first else None

    def forward(self, x):
        one, other = (x, x) if self.other is not None else x.chunk(2, dim=1)
        one = one if self.other is None else self.other(one)
        x = torch.cat([one, self.branch(other)], 1)
        batch, channels, height, width = x.size()
        return x.view(batch, 2, channels // 2, height, width).transpose(1, 2).contiguous().view(x.size())


def shuffled(half, units):
    """A stage of such units, in double precision."""
    torch.manual_seed(0)
    stage = [ShuffleUnit(8 if place == 0 else half, half, place == 0) for place in range(units)]
    parts = nn.Conv2d(3, 8, 3), *stage, nn.Conv2d(2 * half, 12, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return lively(nn.Sequential(*parts, nn.Linear(12, 4))).double().eval()
