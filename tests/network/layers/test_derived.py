"""Layers of classes with a forward of their own lose channels, cost and are sampled by what they compute."""

from __future__ import annotations

import copy

import pytest
import torch
from own_layers import COMPUTED, KINDS, Shuffled, make
from speedup_nets import masks_of
from torch import nn

import nni_topo
from nni_topo.network.cost.cost import NetworkCost
from nni_topo.network.cost.measure import count_macs
from nni_topo.network.layers.derived import (
    PaddedAlike,
    call_of,
    fold,
    graph_of_convolution,
    has_own_forward,
    inner_of,
    is_followed,
    padded_size,
)

HALF = [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.5}]
SIDE = 21


def images(count=2, side=SIDE, scale=1.0):
    return scale * torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(side))


def pruned(model, example=None):
    example = images() if example is None else example
    groups = nni_topo.dependency_groups(model, example, HALF)
    masks = masks_of(nni_topo.create_pruner("l1", model, groups))
    return groups, masks


def check_same(masked, dense, bound=1e-4):
    with torch.no_grad():
        for side, scale in ((SIDE, 1.0), (SIDE + 1, 0.01), (33, 100.0)):
            wanted, given = masked(images(3, side, scale)), dense(images(3, side, scale))
            assert (wanted - given).abs().max() <= bound * wanted.abs().max()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.quick_every(6)
def test_they_lose_channels_and_the_dense_network_computes_the_same(name):
    model = make(name)
    before = copy.deepcopy(model.state_dict())
    groups, masks = pruned(model)
    assert groups.skipped == {"head": "it gives the model's output"}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    dense = nni_topo.to_dense(model, images(), masks)
    check_same(nni_topo.masked_model(model, images(), masks), dense)
    assert dense.stem.weight.shape[0] in (4, 5)  # where a constant needs a channel, one more stays
    assert dense.blocks[0].depthwise.groups in (8, 9)
    if name not in COMPUTED:
        assert {type(each) for each in dense.modules()} == {type(each) for each in model.modules()}


@pytest.mark.parametrize("name", ["standardized", "activated"])
def test_they_are_saved_and_loaded(name, tmp_path):
    model = make(name)
    dense = nni_topo.to_dense(model, images(), pruned(model)[1])
    nni_topo.save(dense, tmp_path / "dense.pt")
    again = nni_topo.load(tmp_path / "dense.pt", lambda: make(name))
    with torch.no_grad():
        assert torch.equal(again.eval()(images()), dense(images()))


@pytest.mark.parametrize("name", ["mirrored", "standardized", "activated"])
@pytest.mark.quick_every(2)
def test_their_cost_is_what_a_run_takes(name):
    model = make(name)
    masks = pruned(model)[1]
    kept = {key: each["weight"].flatten(1).amax(1).bool().numpy() for key, each in masks.items()}
    cost = NetworkCost.on(model, images())
    assert cost({}).macs == count_macs(model, images())
    assert cost({}).params == sum(each.numel() for each in model.parameters())
    dense = nni_topo.to_dense(model, images(), masks)
    if not any("brings" in row.reason for row in dense.report.kept):
        assert cost(kept).macs == count_macs(dense, images())


@pytest.mark.parametrize(("name", "padded"), [("alike", 13), ("static", 13), ("mirrored", 14), ("activated", 14)])
def test_the_graph_of_a_layer_has_the_edges_that_it_computes_with(name, padded):
    layer = make(name).blocks[1].depthwise  # 5x5, stride 2, on 10x10
    graph = graph_of_convolution(layer, (10, 10))
    assert padded_size(layer, (10, 10)) == (padded, padded)
    with torch.no_grad():
        outputs = layer(torch.zeros(1, 12, 10, 10))
    assert (graph.inputs, graph.outputs) == (12 * padded**2, outputs.numel())
    assert graph.edges == outputs.numel() * 25  # each channel reads its own alone


@pytest.mark.parametrize("name", KINDS)
def test_windows_times_the_weight_are_what_is_convolved(name):
    layer = make(name).blocks[1].depthwise
    x = torch.randn(2, 12, 9, 11, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        call = call_of(layer, x)
        bias = torch.zeros(12) if call.bias is None else call.bias
        found = torch.einsum("nchwij,cij->nchw", call.windows(), call.weight[:, 0]) + bias[:, None, None]
        torch.testing.assert_close(found, call.run())
        if is_followed(layer):
            return
        torch.testing.assert_close(found, layer(x))


def test_what_a_forward_does_is_told_by_trying_it():
    class Looking(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) * x.mean()

    class Twice(nn.Conv2d):
        def forward(self, x):
            return super().forward(super().forward(x))

    class Chosen(nn.Conv2d):
        def forward(self, x):
            return nn.functional.conv2d(x, self.weight * x.mean(), self.bias)

    class Central(nn.Conv2d):
        def forward(self, x):
            return nn.functional.conv2d(x, self.weight[..., :1, :1], self.bias)

    class Normed(nn.Conv2d):
        def __init__(self, *args):
            super().__init__(*args)
            self.norm = nn.BatchNorm2d(args[0])

        def forward(self, x):
            return super().forward(self.norm(x))

    class InPlace(nn.Conv2d):
        def forward(self, x):
            return super().forward(x).relu_()

    assert not has_own_forward(nn.Conv2d(3, 3, 1))
    for kind in (Looking, Twice, Chosen, Central, Normed):
        assert has_own_forward(kind(3, 3, 3))
        assert inner_of(kind(3, 3, 3)) is None
    assert is_followed(InPlace(3, 3, 1))
    assert is_followed(Shuffled(3, 8, 1))


def test_a_layer_that_makes_pixels_of_channels_loses_blocks_of_them():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), Shuffled(8, 16, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    groups, masks = pruned(model.eval(), images(2, 8))
    assert [entry["op_names"] for entry in groups] == [["0"], ["2"]]
    dense = nni_topo.to_dense(model, images(2, 8), masks)
    assert dense[2].weight.shape[:2] == (8, 4)
    assert NetworkCost.on(model, images(2, 8))({}).macs == count_macs(model, images(2, 8))
    check_same(nni_topo.masked_model(model, images(2, 8), masks), dense)


class Turned(nn.Linear):
    """It multiplies with its weight's transpose, as Falcon's layers do."""

    def forward(self, x):
        products = x @ self.weight.T
        return products if self.bias is None else products + self.bias


class TurnedToo(nn.Linear):
    """The same by another name."""

    def forward(self, x):
        return torch.matmul(x, self.weight.t())


@pytest.mark.parametrize(("kind", "bias"), [(Turned, True), (TurnedToo, False)])
@pytest.mark.parametrize("shape", [(16, 12), (16, 5, 12)])
@pytest.mark.quick_every(4)
def test_linear_layers_may_multiply_with_their_weights_transpose(kind, bias, shape):
    torch.manual_seed(0)
    model = nn.Sequential(kind(12, 24, bias=bias), nn.GELU(), kind(24, 20, bias=False), nn.GELU(), nn.Linear(20, 6))
    plain = nn.Sequential(nn.Linear(12, 24, bias=bias), nn.GELU(), nn.Linear(24, 20, bias=False), nn.GELU(), model[4])
    plain.load_state_dict(model.state_dict())
    images = [torch.randn(shape) for _ in range(6)]
    call = call_of(model[0], images[0])
    assert call.weight is model[0].weight
    torch.testing.assert_close(call.run() + (model[0].bias if bias else 0.0), model[0](images[0]))
    small, same = (
        nni_topo.shrink(net.eval(), images, {"flops": 0.6}, distill=False, progress=False) for net in (model, plain)
    )
    assert [layer.weight.shape for layer in small[::2]] == [layer.weight.shape for layer in same[::2]]
    assert small.report.budget.left < 0.65
    lost = [((net(images[0]) - model(images[0])) ** 2).mean() / model(images[0]).var() for net in (small, same)]
    assert lost[0] < 3 * lost[1]


class ByName(nn.ConvTranspose1d):
    """It names all arguments, with one number for all axes."""

    def forward(self, x):
        return nn.functional.conv_transpose1d(input=x, weight=self.weight, stride=3, output_padding=1, dilation=2)


class InOrder(nn.ConvTranspose2d):
    """It hands all arguments over in PyTorch's order, which isn't that of a convolution."""

    def forward(self, x):
        return nn.functional.conv_transpose2d(x, self.weight, self.bias, (3, 2), (1, 0), (1, 1), 2, (2, 1))


# By name: the layer, what enters, and stride, padding, dilation, groups, and the pixels that leave.
CALLS = {
    "1d": (
        nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2), (2, 4, 11),
        ((2,), ((1, 1),), (2,), 2, (5,)),
    ),
    "2d": (
        nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 3)), (2, 3, 8, 9),
        ((2, 1), ((2, 2), (1, 1)), (1, 3), 1, (5, 8)),
    ),
    "same": (
        nn.Conv2d(3, 4, (4, 3), padding="same", dilation=(1, 2)), (2, 3, 7, 8),
        ((1, 1), ((1, 2), (2, 2)), (1, 2), 1, (7, 8)),
    ),
    "mirrored": (
        nn.Conv1d(3, 4, 3, padding=2, padding_mode="reflect"), (2, 3, 7),
        ((1,), ((0, 0),), (1,), 1, (9,)),
    ),
    "transposed": (
        nn.ConvTranspose2d(3, 4, (3, 2), stride=(3, 2), output_padding=(2, 0), dilation=(2, 1)), (1, 3, 4, 5),
        ((3, 2), ((0, 0), (0, 0)), (2, 1), 1, (16, 10)),
    ),
    "linear": (nn.Linear(3, 4), (2, 5, 3), ((), (), (), 1, ())),
    "by name": (ByName(3, 4, 2), (2, 3, 5), ((3,), ((0, 0),), (2,), 1, (16,))),
    "in order": (InOrder(4, 6, 2, groups=2), (2, 4, 5, 6), ((3, 2), ((1, 1), (0, 0)), (2, 1), 2, (14, 13))),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
@torch.no_grad()
def test_the_call_of_a_layer_has_its_settings_and_the_size_of_what_leaves(name):
    layer, shape, (stride, padding, dilation, groups, size) = CALLS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    call, expected = call_of(layer, x), layer(x)
    assert (call.stride, call.padding, call.dilation, call.groups) == (stride, padding, dilation, groups)
    assert call.output_size == size
    assert tuple(expected.shape[2:]) == size or isinstance(layer, nn.Linear)
    assert call.kernel == tuple(layer.weight.shape[2:])
    assert call.padded_size == tuple(call.padded.shape[2:][: len(size)])
    torch.testing.assert_close(call.run(), expected, rtol=0, atol=0)
    assert call.weight is layer.weight


@pytest.mark.parametrize(
    ("size", "kernel", "knobs", "padding"),
    [
        ((5, 6), (3, 5), {"stride": (2, 1), "dilation": (1, 2)}, (4, 4, 1, 1)),
        ((8, 5), (3, 1), {"stride": (2, 3), "groups": 2}, (0, 0, 0, 1)),
    ],
)
def test_a_layer_padded_as_tensorflow_does_adds_an_odd_pixel_at_the_end(size, kernel, knobs, padding):
    torch.manual_seed(0)
    layer, x = PaddedAlike(4, 6, kernel, **knobs), torch.randn(2, 4, *size)
    settings = {"stride": 1, "dilation": 1, "groups": 1} | knobs
    expected = nn.functional.conv2d(nn.functional.pad(x, padding), layer.weight, layer.bias, **settings)
    torch.testing.assert_close(layer(x), expected)
    assert expected.shape[2:] == tuple(-(-n // each) for n, each in zip(size, knobs["stride"], strict=True))


class Centred(nn.Conv2d):
    """Its weight is computed."""

    def forward(self, x):
        return nn.functional.conv2d(x, self.weight - self.weight.mean(), self.bias)


@pytest.mark.parametrize("trained", [True, False])
def test_a_layer_with_the_weight_that_it_computed_learns_as_before(trained):
    layer = Centred(3, 4, 1)
    expected = (layer.weight - layer.weight.mean()).detach()
    for parameter in layer.parameters():
        parameter.requires_grad_(trained)
    assert fold(layer)
    assert type(layer) is nn.Conv2d
    assert (layer.weight.requires_grad, layer.bias.requires_grad) == (trained, trained)
    torch.testing.assert_close(layer.weight.detach(), expected)


class OwnLinear(nn.Module):
    """Not derived from PyTorch's, as PyTorch Geometric's."""

    def __init__(self, width, out):
        super().__init__()
        self.width = width
        self.weight, self.bias = nn.Parameter(torch.randn(out, width)), nn.Parameter(torch.randn(out))

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


class Sized(OwnLinear):
    def forward(self, x):
        return super().forward(x.reshape(*x.shape[:-1], self.width))


class Scaled(OwnLinear):
    def forward(self, x):
        return nn.functional.linear(x, 0.5 * self.weight, 3 * self.bias)


class Strided(nn.Module):
    def __init__(self):
        super().__init__()
        self.groups, self.weight = 2, nn.Parameter(torch.randn(6, 2, 3, 1))

    def forward(self, x):
        return nn.functional.conv2d(x, self.weight, None, (2, 1), (1, 0), (2, 1), self.groups)


class Router(OwnLinear):
    """The module around it reads its other buffer."""

    def __init__(self, width, out):
        super().__init__(width, out)
        self.register_buffer("correction", torch.zeros(out))


class Gated(OwnLinear):
    def forward(self, x):
        return super().forward(x) * x.mean()


@pytest.mark.parametrize("kind", [OwnLinear, Sized, Scaled])
def test_a_layer_that_is_not_derived_from_pytorchs_loses_channels_and_keeps_its_class(kind):
    torch.manual_seed(0)
    model, x = nn.Sequential(kind(4, 6), nn.ReLU(), kind(6, 5), nn.ReLU(), nn.Linear(5, 2)).eval(), torch.randn(3, 4)
    mask = torch.ones(6, 4)
    mask[[1, 3]] = 0
    expected = torch.nn.functional.relu(model[0](x)) * mask[:, 0]
    dense = nni_topo.to_dense(model, x, {"0": {"weight": mask}})
    torch.testing.assert_close(dense(x), model[1:](expected))
    assert [tuple(dense[at].weight.shape) for at in (0, 2)] == [(4, 4), (5, 4)]
    assert type(dense[2]) is (OwnLinear if kind is OwnLinear else nn.Linear)  # others read a size, or other weights
    assert "in_features" not in vars(model[0])
    assert ("out_features" in vars(dense[2])) == (kind is not OwnLinear)
    assert nni_topo.explain(model, x, "0").channels == 6


def test_own_layers_are_those_of_pytorch_where_they_compute_the_same():
    torch.manual_seed(0)
    model = nn.Sequential(OwnLinear(4, 4), OwnLinear(4, 4), Router(4, 4), Gated(4, 4), Scaled(4, 4)).eval()
    model[1].weight = model[0].weight
    x = torch.randn(2, 4)
    plain = nni_topo.as_torch_layers(model)
    assert [type(each) for each in plain] == [nn.Linear, nn.Linear, Router, Gated, nn.Linear]
    assert plain[0].weight is plain[1].weight
    torch.testing.assert_close(plain(x), model(x))
    torch.testing.assert_close(plain[4].weight, 0.5 * model[4].weight)
    (conv,) = nni_topo.as_torch_layers(nn.Sequential(Strided()))
    assert (type(conv), conv.stride, conv.padding, conv.dilation, conv.groups) == (nn.Conv2d, (2, 1), (1, 0), (2, 1), 2)


def test_a_network_with_own_layers_is_compensated(device):
    torch.manual_seed(0)
    model = nn.Sequential(OwnLinear(4, 8), OwnLinear(8, 3)).eval().to(device)
    data = [torch.randn(64, 4, device=device)]
    masks = {"0": {"weight": torch.ones(8, 4, device=device)}}
    masks["0"]["weight"][6:] = 0
    solved = nni_topo.compensate(model, masks, data)
    # Four inputs span all that six rows have to reproduce.
    torch.testing.assert_close(nni_topo.to_dense(solved, data[0], masks)(data[0]), model(data[0]), rtol=1e-3, atol=1e-3)
    assert type(solved[0]) is OwnLinear
