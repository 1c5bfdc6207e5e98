"""A layer that reads a removed channel reads a zero, whatever an operation before it has made of it."""

from __future__ import annotations

import copy

import pytest
import torch
from speedup_nets import Doubling, Net, Rows, filter_mask, lively
from tied_nets import TiedReaders
from torch import Tensor, nn
from torch.nn import functional
from whole_nets import ChannelsFirst, ResponseNorm, Root

from nni_topo import to_dense
from nni_topo.network.layers.slicing import cut
from nni_topo.network.speedup.leaving_out import run_over_kept
from nni_topo.speedup import dependency_groups, masked_model

GONE = [1, 2, 4, 5]  # equally many of both groups
BY_TYPE = [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.5}]


# tests/reliability has more of both.
BETWEEN = {
    "sigmoid": nn.Sigmoid,
    "shift of a norm": lambda: nn.BatchNorm2d(8),
    "norm of a sigmoid": lambda: nn.Sequential(nn.Sigmoid(), nn.BatchNorm2d(8), nn.Sigmoid()),
}
BEHIND = {
    "bias": lambda: [nn.Conv2d(8, 6, 3)],
    "zeros beyond the border": lambda: [nn.Conv2d(8, 6, 3, padding=1)],
    "groups": lambda: [nn.Conv2d(8, 6, 3, padding=1, groups=2, bias=False)],
    "transposed": lambda: [nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1)],
    "linear": lambda: [Rows(nn.Linear(8, 6))],
    "recurrent": lambda: [Rows(nn.GRU(8, 6, batch_first=True))],
    "own class": lambda: [Doubling(8, 6, 3)],
}


def made(between: str, behind: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    net = lively(Net(BETWEEN[between](), *BEHIND[behind]()).eval()).double()
    return net, torch.rand(2, 3, 10, 10, dtype=torch.float64)


def without_weights(net: Net) -> Net:
    """Zero the weights with which the layer behind reads the removed channels, and those of the gate."""
    net = copy.deepcopy(net)
    for reader in (*net.between.modules(), *net.behind.modules()):
        if isinstance(reader, nn.GRU):
            reader.weight_ih_l0.data[:, GONE] = 0
        elif isinstance(reader, nn.ConvTranspose2d):
            reader.weight.data[GONE] = 0
        elif isinstance(reader, (nn.Conv2d, nn.Linear)):
            each = 8 // getattr(reader, "groups", 1)
            for channel in GONE:
                rows = slice(0, 6) if each == 8 else slice(channel // each * 3, channel // each * 3 + 3)
                reader.weight.data[rows, channel % each] = 0
    return net


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("behind", BEHIND)
@torch.no_grad()
@pytest.mark.quick_every(4)
def test_a_layer_reads_zeros_in_place_of_removed_channels(between, behind):
    net, images = made(between, behind)
    assert dependency_groups(net, images, BY_TYPE).skipped.keys() == {"head"}
    masks, before = {"first": filter_mask(net.first, GONE)}, copy.deepcopy(net.state_dict())
    dense, masked = to_dense(net, images, masks), masked_model(net, images, masks)
    assert dense.first.out_channels == 4
    assert (dense.report.kept, dense.report.notes) == ((), ())
    others = torch.randn(3, 3, 12, 10, dtype=torch.float64)
    expected = without_weights(net)(others)
    torch.testing.assert_close(dense(others), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(masked(others), expected, rtol=1e-9, atol=1e-12)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    # In training mode a batch norm has the statistics of the batch, of each channel by itself.
    torch.testing.assert_close(dense.train()(others), masked.train()(others), rtol=1e-9, atol=1e-12)


@torch.no_grad()
def test_a_depth_wise_convolution_makes_nothing_of_removed_channels_that_is_read():
    net, images = made("sigmoid", "bias")
    net.behind = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Sigmoid(), nn.Conv2d(8, 6, 1)).double()
    masks = {"first": filter_mask(net.first, GONE)}
    dense = to_dense(net, images, masks)
    assert (dense.behind[0].groups, dense.behind[2].in_channels) == (4, 4)
    net.behind[2].weight[:, GONE] = 0
    torch.testing.assert_close(dense(images), net(images), rtol=1e-9, atol=1e-12)


@torch.no_grad()
def test_each_of_two_layers_that_share_weights_reads_its_own_channels():
    torch.manual_seed(0)
    net, rows = TiedReaders().double(), torch.rand(3, 4, dtype=torch.float64)
    masks = {name: filter_mask(net.get_submodule(name), GONE) for name in ("first", "other")}
    dense = to_dense(net, rows, masks)
    assert dense.second.in_features == 4
    assert dense.third.weight is dense.second.weight
    assert dense.third.bias is dense.second.bias
    net.second.weight[:, GONE] = 0
    torch.testing.assert_close(dense(rows), net(rows), rtol=1e-9, atol=1e-12)


class Apart(nn.Module):
    """An operation over all channels, which isn't a norm that this package knows."""

    def __init__(self, operation) -> None:
        super().__init__()
        self.first, self.operation, self.head = nn.Linear(4, 8), operation, nn.Linear(8, 2)

    def forward(self, rows: Tensor) -> Tensor:
        return self.head(self.operation(self.first(rows)))


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x.softmax(-1),
        lambda x: functional.normalize(x.sigmoid(), dim=-1),
        lambda x: x.sigmoid() / x.sigmoid().sum(-1, keepdim=True),
        lambda x: functional.layer_norm(x, (8,)),
    ],
)
def test_layers_stay_whole_where_what_is_left_depends_on_what_is_removed(operation):
    skipped = dependency_groups(Apart(operation).eval(), torch.randn(3, 4), BY_TYPE).skipped
    assert "removed channels" in skipped["first"]


def layer(norm: nn.LayerNorm, x: Tensor, kept: list[int]) -> Tensor:
    """Normalize (..., kept channels)."""
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
    return (x - mean) / (variance + norm.eps).sqrt() * norm.weight[kept] + norm.bias[kept]


def root(norm: Root, x: Tensor, kept: list[int]) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * (norm.shift + norm.weight[kept])


def response(norm: ResponseNorm, x: Tensor, kept: list[int]) -> Tensor:
    lengths = x.square().sum((1, 2), keepdim=True).sqrt()
    gamma, beta = norm.gamma.flatten()[kept], norm.beta.flatten()[kept]
    return gamma * x * lengths / (lengths.mean(-1, keepdim=True) + norm.eps) + beta + x


def group(norm: nn.GroupNorm, x: Tensor, kept: list[int]) -> Tensor:
    size, groups = norm.num_channels // norm.num_groups, torch.empty_like(x)
    for at in range(norm.num_groups):
        places = [place for place, channel in enumerate(kept) if channel // size == at]
        if places:
            part = x[..., places]
            mean, variance = part.mean((1, 2, 3), keepdim=True), part.var((1, 2, 3), correction=0, keepdim=True)
            groups[..., places] = (part - mean) / (variance + norm.eps).sqrt()
    return groups * norm.weight[kept] + norm.bias[kept]


# By name: the norm, its formula with the channels last, the dimension of its channels, and the channels that are left.
NORMS = {
    "layer": (nn.LayerNorm(6), layer, -1, [0, 2, 5]),
    "channels first": (ChannelsFirst(6, eps=0.1), layer, 1, [0, 2, 5]),
    "root": (Root(6), root, -1, [1, 4]),
    "shifted root": (Root(6, 1.0), root, -1, [1, 4]),
    "response": (ResponseNorm(6), response, -1, [0, 2, 5]),
    "response, channels first": (ResponseNorm(6, dim=1), response, 1, [0, 2, 5]),
    "group": (nn.GroupNorm(2, 6), group, 1, [0, 2, 4, 5]),
    "group that loses one": (nn.GroupNorm(3, 6), group, 1, [0, 1, 4, 5]),
}


@pytest.mark.parametrize("name", NORMS)
@torch.no_grad()
def test_a_norm_runs_over_the_channels_that_are_left(name: str) -> None:
    norm, formula, dim, kept = NORMS[name]
    torch.manual_seed(0)
    norm = copy.deepcopy(norm).double()
    for parameter in norm.parameters():
        parameter.copy_(torch.randn_like(parameter))
    x = torch.randn(2, 4, 3, 6).double() + 0.5
    wanted = torch.zeros_like(x)
    wanted[..., kept] = formula(norm, x[..., kept], kept)
    whole, small = copy.deepcopy(norm), copy.deepcopy(norm)
    run_over_kept(whole, torch.arange(6))
    run_over_kept(whole, torch.tensor(kept))  # what it is told last counts
    assert isinstance(whole, type(norm))
    torch.testing.assert_close(whole(x.movedim(-1, dim)).movedim(dim, -1), wanted)
    cut("norm", small, torch.tensor(kept), torch.tensor(kept))
    assert type(small) is type(norm)
    torch.testing.assert_close(small(x[..., kept].movedim(-1, dim)).movedim(dim, -1), wanted[..., kept])
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), norm.parameters(), strict=True))


@torch.no_grad()
def test_a_convolution_along_channels_runs_over_those_that_are_left() -> None:
    torch.manual_seed(0)
    conv, x, kept = nn.Conv1d(1, 1, 3, padding=1), torch.randn(2, 1, 7), [0, 2, 3, 6]
    rows, (before, at, after) = functional.pad(x[..., kept], (1, 1)), conv.weight.flatten()
    wanted = torch.zeros_like(x)
    wanted[..., kept] = before * rows[..., :-2] + at * rows[..., 1:-1] + after * rows[..., 2:] + conv.bias
    run_over_kept(conv, torch.tensor(kept))
    torch.testing.assert_close(conv(x), wanted)
