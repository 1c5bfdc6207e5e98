"""Several layers ahead, on small nets: what is met, what stays, and that bad knobs change nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.fx import symbolic_trace

from nni_topo.errors import ConfigError
from nni_topo.network.speedup.equivalence import masked_model
from nni_topo.recovery import Ahead, compensate, compensation, windows
from nni_topo.recovery.windows import segments


def error(found, model, masks, images):
    """Return the squared error of a masked model's outputs on all images."""
    batch = torch.cat(images)
    with torch.no_grad():
        return float((masked_model(found, images[0], masks)(batch) - model(batch)).square().mean())


def reports(found):
    """Return the reports of what was met ahead."""
    return [layer for layer in found.report.layers if ", " in layer.layer or layer.place == "output"]


def test_the_error_ahead_falls_below_that_of_the_closed_form(residual_net, images, halves):
    masks = halves(residual_net, "stem", "conv1", "conv2", "conv3")
    closed = compensate(residual_net, masks, images)
    found = compensation(residual_net, masks, images, method="ahead")
    assert error(found.model, residual_net, masks, images) < 0.8 * error(closed, residual_net, masks, images)
    steps = reports(found)
    assert all(step.error_after <= step.error_before for step in steps)
    assert any(step.error_after < 0.9 * step.error_before for step in steps)


def test_removed_channels_stay_out_and_the_model_and_masks_as_they_were(residual_net, images, halves):
    masks = halves(residual_net, "stem", "conv1", "conv2", "conv3")
    before, asked = copy.deepcopy(residual_net.state_dict()), copy.deepcopy(masks)
    found = compensate(residual_net, masks, images[:1], method="ahead")
    torch.testing.assert_close(residual_net.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(masks, asked, rtol=0, atol=0)
    # Kept channels read no removed ones, and the weights of the removed ones are what they were.
    assert not found.conv1.weight[:4, 4:].any()
    assert torch.equal(found.conv1.weight[4:], residual_net.conv1.weight[4:])
    assert torch.equal(found.stem.weight, residual_net.stem.weight)


@pytest.mark.slow
def test_the_same_call_gives_the_same_weights_whatever_is_kept_in_memory(residual_net, images, halves):
    masks = halves(residual_net, "conv1", "conv3")
    found = [
        compensate(residual_net, masks, images, method="ahead", cache_bytes=size).state_dict()
        for size in (2**30, 2**30, 0)
    ]
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    # Sums in another order: steps with more unknowns than values let their rounding grow.
    torch.testing.assert_close(found[2], found[0], rtol=1e-4, atol=2e-5)


class Saturated(nn.Module):
    """A layer whose outputs are read over a sigmoid, and of which half are the other half, mirrored."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 4)
        self.third = nn.Linear(4, 3)

    def forward(self, values):
        return self.third(torch.sigmoid(self.second(self.first(values))))


def test_what_can_be_met_is_met():
    torch.manual_seed(0)
    model = Saturated().double().eval()
    with torch.no_grad():
        model.first.weight[4:] = -2 * model.first.weight[:4]
        model.first.bias[4:] = -2 * model.first.bias[:4]
    mask = torch.ones_like(model.first.weight)
    mask[4:] = 0
    masks = {"first": {"weight": mask}}
    batches = list(torch.randn(256, 6, dtype=torch.float64).split(64))
    # A ridge leaves something to be met ahead.
    closed = compensate(model, masks, batches, ridge=1e-2)
    found = compensation(model, masks, batches, method="ahead", ridge=1e-2)
    assert error(closed, model, masks, batches) > 1e-8
    assert error(found.model, model, masks, batches) < 0.05 * error(closed, model, masks, batches)
    assert found.report.layers[-1].error_after < 1e-6


@pytest.mark.parametrize("layers", [0, -1, 1.5, True, "far", None])
def test_bad_numbers_of_layers_are_told(layers):
    with pytest.raises(ConfigError, match="layers must be an integer of at least 1"):
        Ahead(layers=layers)


def test_blocks_begin_where_everything_flows_through_one_value_and_places_lie_ahead(residual_net, images):
    graph = symbolic_trace(residual_net).graph
    nodes = list(graph.nodes)
    names = ("conv1", "conv2", "conv3", "conv4", "shortcut", "head")
    layers = [node for node in nodes if node.name in names]
    touched = set(nodes[nodes.index(layers[0]) :])

    cut = segments(nodes, touched, layers, 1)
    blocks = [([layer.name for layer in each.layers], each.place.name) for each in cut]
    first, second = ["conv1", "conv2"], ["conv3", "conv4", "shortcut"]
    assert blocks == [([*first, *second], "output"), ([*second, "head"], "output"), (["head"], "output")]
    alone = [
        ([layer.name for layer in each.layers], each.place.name) for each in segments(nodes, touched, layers, 0, 1)
    ]
    assert alone == [(first, "relu_"), (second, "mean"), (["head"], "output")]
    # conv3's output isn't all that is read: the shortcut reads what entered it.
    assert nodes[cut[1].first - 1].name == "relu_"


class Recurrent(nn.Module):
    """A layer in front of an LSTM, which PyTorch has no forward derivatives of."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 8)
        self.between = nn.Linear(8, 5)
        self.lstm = nn.LSTM(5, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, values):
        return self.head(self.lstm(self.between(self.inner(values)))[0])


def test_what_has_no_derivatives_stays_as_the_closed_form_leaves_it(caplog):
    torch.manual_seed(0)
    model = Recurrent().eval()
    mask = torch.ones_like(model.inner.weight)
    mask[::2] = 0
    batches = [torch.randn(16, 5, 4) for _ in range(4)]
    found = compensate(model, {"inner": {"weight": mask}}, batches, method=Ahead(layers=9))
    closed = compensate(model, {"inner": {"weight": mask}}, batches)
    assert torch.equal(found.between.weight, closed.between.weight)
    assert "an operation has no forward derivative" in caplog.text


@pytest.mark.parametrize("cache_bytes", [300, 500, 1000, 2000])
@pytest.mark.quick_every(2)
def test_a_small_memory_that_holds_some_batches_gives_what_a_large_one_does(cache_bytes):
    torch.manual_seed(0)
    layers = [nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)]
    net, batches = nn.Sequential(*layers).eval(), list(torch.randn(16, 4).split(8))
    masks = {"2": {"weight": (torch.arange(8) < 4).float()[:, None].expand(8, 8)}}
    small, large = (
        compensate(net, masks, batches, method=Ahead(layers=1), cache_bytes=each) for each in (cache_bytes, 2**30)
    )
    torch.testing.assert_close(small.state_dict(), large.state_dict())


@pytest.mark.parametrize(
    ("ends", "layers", "borders"),
    [
        ([0, 3, 6], [1, 4, 7], [0, 6]),  # blocks hold two layers
        ([0, 1, 2, 3], [1, 2, 4, 5], [0, 3]),
        ([], [1, 2, 3], [-1]),
        ([3], [1, 2, 3, 4, 5], [-1, 3]),
        ([1], [1, 2, 3], [-1]),
        ([0], [1], [0]),
    ],
)
def test_blocks_begin_right_before_a_layer_and_hold_two(ends, layers, borders):
    assert windows._borders(ends, layers) == borders


def test_values_are_alive_where_they_differ_between_images_of_all_batches():
    first = [torch.tensor([[1.0, 2.0], [1.0, 3.0]]), torch.tensor([[1.0], [2.0]])]
    second = [torch.tensor([[4.0, 3.0]]), torch.tensor([[1.0, 2.0]])]
    assert [each.tolist() for each in windows.alive([first])] == [[False, True], [True]]
    varied, other = windows.alive([first, second])
    assert (varied.tolist(), other) == ([True, True], None)  # of another shape
    back = windows.alive([first, second, first])
    assert (back[0].tolist(), back[1]) == ([True, True], None)
    low = windows.alive([[torch.tensor([[4.0, 4.0]])], [torch.tensor([[4.0, 1.0]])]])
    assert low[0].tolist() == [False, True]
    assert windows.alive([]) == []


def test_moments_are_the_count_the_sum_and_the_squares():
    assert windows.moments(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).tolist() == [4.0, 10.0, 30.0]
    assert windows.moments(torch.tensor([300.0], dtype=torch.float16)).tolist() == [1.0, 300.0, 90000.0]
    values = {"a": torch.ones(2), "b": [torch.arange(2), torch.zeros(1)]}
    assert [each.tolist() for each in windows.floats(values)] == [[1.0, 1.0], [0.0]]


def test_types_of_half_precision_become_single():
    found = [windows._in_single(each) for each in (torch.float16, torch.bfloat16, torch.float64, 3, None)]
    assert found == [torch.float32, torch.float32, torch.float64, 3, None]
