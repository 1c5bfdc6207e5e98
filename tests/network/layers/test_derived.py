"""Layers of classes with a forward of their own lose channels, cost and are sampled by what they compute."""

from __future__ import annotations

import copy

import pytest
import torch
from own_layers import BARE, COMPUTED, KINDS, Shuffled, make
from torch import nn

import nni_topo
from nni_topo.network.cost.cost import NetworkCost
from nni_topo.network.cost.latency import measure_latency
from nni_topo.network.cost.measure import count_macs
from nni_topo.network.layers.derived import (
    call_of,
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
    pruner = nni_topo.create_pruner("l1", model, groups)
    masks = pruner.compress()[1]
    pruner.unwrap_model()
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


@pytest.mark.parametrize("name", ["static", "standardized", "activated"])
@pytest.mark.quick_every(2)
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
    cost = NetworkCost(model, images())
    assert cost({}).macs == count_macs(model, images())
    assert cost({}).params == sum(each.numel() for each in model.parameters())
    dense = nni_topo.to_dense(model, images(), masks)
    if not any("brings" in row.reason for row in dense.report.kept):
        assert cost(kept).macs == count_macs(dense, images())


@pytest.mark.parametrize("name", BARE)
@pytest.mark.quick_every(2)
def test_maps_smaller_than_the_kernel_are_no_error_where_the_forward_pads(name):
    model = make(name)
    side = {"mirrored": 12, "static": 5}.get(name, 3)
    groups, masks = pruned(model, images(2, side))
    assert len(groups) > 5
    dense = nni_topo.to_dense(model, images(2, side), masks)
    masked = nni_topo.masked_model(model, images(2, side), masks)
    with torch.no_grad():
        torch.testing.assert_close(dense(images(2, side)), masked(images(2, side)))


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
    for kind in (Looking, Twice, Chosen, Normed):
        assert has_own_forward(kind(3, 3, 1))
        assert inner_of(kind(3, 3, 1)) is None
    assert is_followed(InPlace(3, 3, 1))
    assert is_followed(Shuffled(3, 8, 1))


def test_a_layer_that_makes_pixels_of_channels_loses_blocks_of_them():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), Shuffled(8, 16, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    groups, masks = pruned(model.eval(), images(2, 8))
    assert [entry["op_names"] for entry in groups] == [["0"], ["2"]]
    dense = nni_topo.to_dense(model, images(2, 8), masks)
    assert dense[2].weight.shape[:2] == (8, 4)
    assert NetworkCost(model, images(2, 8))({}).macs == count_macs(model, images(2, 8))
    check_same(nni_topo.masked_model(model, images(2, 8), masks), dense)


def test_latency_is_of_layers_that_compute_the_same():
    for name in ("standardized", "activated"):
        model = make(name)
        table = measure_latency(model, images(), shares=(0.5,), repeats=1)
        assert table.layers.keys() >= {"stem", "blocks.0.depthwise", "fc", "head"}


class Turned(nn.Linear):
    """It multiplies with its weight's transpose, as Falcon's layers do."""

    def forward(self, x):
        products = x @ self.weight.T
        return products if self.bias is None else products + self.bias


class TurnedToo(nn.Linear):
    """The same by another name."""

    def forward(self, x):
        return torch.matmul(x, self.weight.t())


@pytest.mark.parametrize(("kind", "bias"), [(Turned, True), (Turned, False), (TurnedToo, False)])
@pytest.mark.parametrize("shape", [(16, 12), (16, 5, 12)])
@pytest.mark.quick_every(6)
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


@pytest.mark.parametrize("shape", [(16, 12), (4, 5, 12)])
def test_a_linear_layer_of_its_own_class_may_get_places(shape):
    class Rectified(nn.Linear):
        def forward(self, x):
            return torch.relu(super().forward(x))

    torch.manual_seed(0)
    assert call_of(Rectified(12, 3), torch.randn(shape)).output_size == ()


class Frozen(nn.Linear):
    """A layer whose own ``train`` doesn't return it."""

    def train(self, mode=True):
        super().train(mode)

    def forward(self, inputs):
        return nn.functional.linear(inputs, self.weight, self.bias) + 0.0


def test_a_layer_whose_train_returns_nothing_is_tried_out():
    assert inner_of(Frozen(3, 4)) is not None
