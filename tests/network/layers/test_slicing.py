"""Layers that are cut compute what they did, on inputs without the pruned channels and for the kept outputs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from nni_topo.errors import SpeedupError
from nni_topo.network.layers.slicing import cut, cut_channelwise, keep

# By name: the layer, the kept input and output channels, what enters it at full width, and the dimension of channels.
LAYERS = {
    "convolution": (nn.Conv2d(5, 6, 3, padding=1), [0, 2, 3], [1, 4, 5], (2, 5, 4, 4), 1),
    "without a bias": (nn.Conv1d(5, 6, 3, bias=False), [4], [0, 1, 2, 3, 4, 5], (2, 5, 7), 1),
    "of all channels": (nn.Conv3d(2, 3, 2), [0, 1], [0, 1, 2], (1, 2, 3, 3, 3), 1),
    "in another order": (nn.Conv2d(4, 4, 1), [3, 0, 2], [2, 1], (2, 4, 3, 3), 1),
    "transposed": (nn.ConvTranspose2d(4, 6, 2, stride=2), [1, 3], [0, 2, 5], (2, 4, 3, 3), 1),
    "two groups": (nn.Conv2d(6, 8, 3, groups=2), [0, 2, 3, 4], [1, 2, 6, 7], (2, 6, 4, 4), 1),
    "one group of two": (nn.Conv2d(6, 8, 3, groups=2), [3, 5], [4, 5, 7], (2, 6, 4, 4), 1),
    "transposed groups": (nn.ConvTranspose1d(6, 4, 3, groups=2), [0, 1, 4, 5], [0, 3], (2, 6, 5), 1),
    "first and last of three groups": (nn.Conv1d(6, 9, 1, groups=3), [1, 4], [0, 2, 6, 7], (2, 6, 5), 1),
    "depth-wise": (nn.Conv2d(5, 5, 3, groups=5, padding=1), [1, 2, 4], [1, 2, 4], (2, 5, 4, 4), 1),
    "two for each": (nn.Conv1d(3, 6, 3, groups=3), [0, 2], [0, 1, 4, 5], (2, 3, 5), 1),
    "linear": (nn.Linear(5, 4), [0, 4], [1, 2, 3], (3, 5), 1),
    "linear without a bias": (nn.Linear(5, 4, bias=False), [0, 1, 2, 3, 4], [0], (3, 2, 5), 2),
    "PReLU": (nn.PReLU(4), [1, 2], [1, 2], (2, 4, 3), 1),
    "PReLU of two": (nn.PReLU(2), [1], [1], (2, 2, 3), 1),
    "PReLU of one": (nn.PReLU(), [1, 2], [1, 2], (2, 4, 3), 1),
    "batch norm": (nn.BatchNorm2d(4), [0, 3], [0, 3], (2, 4, 3, 3), 1),
    "without parameters": (nn.BatchNorm1d(4, affine=False), [0, 3], [0, 3], (2, 4, 3), 1),
    "instance norm": (nn.InstanceNorm2d(4, affine=True), [0, 3], [0, 3], (2, 4, 3, 3), 1),
    "group norm": (nn.GroupNorm(2, 6), [0, 2, 4, 5], [0, 2, 4, 5], (2, 6, 3), 1),
    "one group of a norm": (nn.GroupNorm(3, 6), [2, 3], [2, 3], (2, 6, 3), 1),
    "one channel of each": (nn.GroupNorm(2, 6), [1, 4], [1, 4], (2, 6, 3), 1),
    "layer norm": (nn.LayerNorm(5), [0, 2, 3], [0, 2, 3], (3, 5), 1),
    "layer norm without parameters": (nn.LayerNorm(5, elementwise_affine=False), [1, 2], [1, 2], (3, 2, 5), 2),
    "root mean square norm": (nn.RMSNorm(5), [0, 2, 3], [0, 2, 3], (3, 5), 1),
    "units": (nn.LSTM(3, 4, batch_first=True), [0, 2], None, (2, 5, 3), 2),
    "units of a GRU": (nn.GRU(3, 4, batch_first=True), [1], None, (2, 5, 3), 2),
}


def drawn(layer: nn.Module) -> nn.Module:
    """Fill all parameters and buffers with random numbers, above zero so that they may be variances."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in [*layer.parameters(), *layer.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
    return layer.double().eval()


@pytest.mark.parametrize(
    "knobs", [{}, {"bidirectional": True}, {"num_layers": 2}, {"num_layers": 2, "bidirectional": True}]
)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@torch.no_grad()
def test_units_go_from_all_levels_and_directions(kind: type[nn.RNNBase], knobs: dict[str, Any]) -> None:
    """Units without weights in the whole layer put out zeros, so the others compute what they do without them."""
    layer, kept, rows = kind(3, 4, **knobs).double().eval(), torch.tensor([0, 3]), torch.randn(5, 2, 3).double()
    gates = len(layer.weight_ih_l0) // 4
    places = torch.cat([kept + 4 * gate for gate in range(gates)])
    for parameter in layer.parameters():
        gone = torch.ones(len(parameter), dtype=torch.bool).index_fill(0, places, False)
        parameter[gone] = 0
    expected = layer(rows)[0].unflatten(-1, (-1, 4))[..., kept].flatten(-2)
    cut("a", layer, torch.arange(3), places)
    assert layer.hidden_size == 2
    torch.testing.assert_close(layer(rows)[0], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_a_cut_layer_computes_what_it_did(name: str) -> None:
    layer, ins, outs, shape, dim = LAYERS[name]
    layer = drawn(layer)
    entering = torch.zeros(shape, dtype=torch.float64)
    some = torch.randn(*shape[:dim], len(ins), *shape[dim + 1 :], generator=torch.Generator().manual_seed(1))
    entering.index_copy_(dim, torch.tensor(ins), some.double())
    expected = layer(entering)
    if isinstance(layer, nn.RNNBase):
        expected, _ = expected
        rows = torch.arange(len(layer.weight_ih_l0))  # all units
        cut(name, layer, torch.tensor(ins), rows)
        found = layer(some.double())[0]
    else:
        expected = expected.index_select(dim, torch.tensor(outs))
        cut(name, layer, torch.tensor(ins), torch.tensor(outs))
        found = layer(some.double())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_a_cut_layer_says_how_wide_it_is() -> None:
    layer = nn.Conv2d(6, 8, 3, groups=2)
    cut("a", layer, torch.tensor([0, 2, 3, 4]), torch.tensor([1, 2, 6, 7]))
    assert (layer.in_channels, layer.out_channels, layer.groups, tuple(layer.weight.shape)) == (4, 4, 2, (4, 2, 3, 3))
    layer = nn.Conv2d(6, 8, 3, groups=2)
    cut("a", layer, torch.tensor([3, 5]), torch.tensor([4, 5, 7]))
    assert (layer.in_channels, layer.out_channels, layer.groups) == (2, 3, 1)
    linear = nn.Linear(5, 4)
    cut("a", linear, torch.tensor([0, 4]), torch.tensor([1]))
    assert (linear.in_features, linear.out_features) == (2, 1)
    norm = nn.GroupNorm(3, 6)
    cut("a", norm, torch.tensor([2, 3]), torch.tensor([2, 3]))
    assert (norm.num_groups, norm.num_channels, type(norm)) == (1, 2, nn.GroupNorm)
    norms = nn.BatchNorm1d(4), nn.LayerNorm(4), nn.PReLU(4), nn.Embedding(7, 4)
    for each in norms:
        cut("a", each, torch.tensor([1, 2]), torch.tensor([1, 2]))
    widths = norms[0].num_features, norms[1].normalized_shape, norms[2].num_parameters, norms[3].embedding_dim
    assert widths == (2, (2,), 2, 2)
    gru = nn.GRU(5, 3)
    cut("a", gru, torch.tensor([0, 1, 4]), torch.tensor([0, 2, 3, 5, 6, 8]))  # the first and last of three units
    assert (gru.input_size, gru.hidden_size) == (3, 2)
    assert tuple(gru.weight_hh_l0.shape) == (6, 2)
    both = nn.RNN(5, 3, bidirectional=True)
    cut("a", both, torch.tensor([0, 4]), torch.arange(3))
    assert (both.weight_ih_l0.shape[1], both.weight_ih_l0_reverse.shape[1]) == (2, 2)


def test_rows_of_an_embedding_stay() -> None:
    layer = nn.Embedding(3, 4)
    before = layer.weight.detach().clone()
    cut("a", layer, torch.arange(0), torch.tensor([0, 3]))
    assert torch.equal(layer.weight, before[:, [0, 3]])


def test_a_layer_that_would_be_empty_is_named() -> None:
    for ins, outs in (([], [0]), ([0], [])):
        with pytest.raises(SpeedupError, match=r"^a layer must keep at least one channel, got none left \(head\)$"):
            cut("head", nn.Linear(2, 2), torch.tensor(ins), torch.tensor(outs))
    with pytest.raises(SpeedupError, match="at least one channel"):
        cut("words", nn.Embedding(3, 4), torch.tensor([0]), torch.arange(0))


def test_groups_that_would_be_uneven_are_counted() -> None:
    layer = nn.Conv2d(4, 4, 1, groups=2)
    for ins, outs, words in (
        ([0, 1, 2], [0, 1, 2, 3], "got 2, 1 in and 2, 2 out"),
        ([0, 2], [0, 1, 2], "got 1, 1 in and 2, 1 out"),
        ([0, 1], [2, 3], "got 2, 0 in and 0, 2 out"),
    ):
        with pytest.raises(SpeedupError, match=rf"groups of a convolution must keep equally many.*{words} \(body\)"):
            cut("body", layer, torch.tensor(ins), torch.tensor(outs))
    many = nn.Conv2d(18, 9, 1, groups=9)
    with pytest.raises(
        SpeedupError, match=r"got 1, 1, 1, 1, 1, 1, 1, 1, \.\.\. in and 1, 1, 1, 1, 1, 1, 1, 1, \.\.\. out"
    ):
        cut("body", many, torch.tensor([0, 2, 4, 6, 8, 10, 12, 14, 16, 17]), torch.arange(9))
    eight = nn.Conv2d(16, 8, 1, groups=8)
    with pytest.raises(SpeedupError, match=r"got 1, 1, 1, 1, 1, 1, 1, 2 in and 1, 1, 1, 1, 1, 1, 1, 1 out"):
        cut("body", eight, torch.tensor([0, 2, 4, 6, 8, 10, 12, 14, 15]), torch.arange(8))
    norm = nn.GroupNorm(2, 4)
    with pytest.raises(SpeedupError, match=r"groups of a norm must keep equally many channels, got 2, 1 \(norm\)"):
        cut("norm", norm, torch.tensor([0, 1, 3]), torch.tensor([0, 1, 3]))
    assert (layer.in_channels, norm.num_channels) == (4, 4)


def test_a_parameter_keeps_its_kind_and_whether_it_is_trained() -> None:
    layer = nn.Linear(3, 2)
    shared = layer.weight
    layer.weight.requires_grad_(requires_grad=False)
    layer.register_buffer("scale", torch.ones(3))
    cut("a", layer, torch.arange(3), torch.arange(2))
    assert layer.weight is not shared
    assert layer.weight.data_ptr() != shared.data_ptr()
    assert (layer.weight.requires_grad, layer.bias.requires_grad) == (False, True)
    keep(layer, "scale", torch.zeros(1))
    assert (type(layer.scale), "scale" in dict(layer.named_buffers())) == (torch.Tensor, True)
    keep(layer, "bias", None)
    assert layer.bias is not None
    keep(layer, "absent", torch.zeros(1))
    assert not hasattr(layer, "absent")


@pytest.mark.parametrize(("kernel", "dilation", "bias"), [(3, 1, True), (3, 2, False), (4, 1, True)])
@torch.no_grad()
def test_a_convolution_over_channels_reads_zeros_in_place_of_removed_ones(
    kernel: int, dilation: int, bias: bool
) -> None:
    layer = nn.Conv1d(2, 3, kernel, padding="same", dilation=dilation, bias=bias).double()
    values = torch.randn(2, 2, 7, generator=torch.Generator().manual_seed(0)).double()
    kept, fewer = torch.tensor([0, 2, 3, 6]), torch.tensor([1, 3])
    zeros = [torch.zeros_like(values).index_copy_(2, each, values[..., each]) for each in (kept, kept[fewer])]
    expected = [layer(each) for each in zeros]
    cut_channelwise(layer, kept, 7)
    torch.testing.assert_close(layer(values[..., kept]), expected[0][..., kept])
    cut_channelwise(layer, fewer, 4)
    torch.testing.assert_close(layer(values[..., kept[fewer]]), expected[1][..., kept[fewer]])
    assert (layer.counted, "taps" in layer.state_dict()) == (7, False)


@pytest.mark.parametrize("name", ["convolution", "in another order", "transposed groups", "two groups", "linear"])
@torch.no_grad()
def test_a_layer_on_another_device_is_cut_there(name: str, far: torch.device) -> None:
    _, ins, outs, _, _ = LAYERS[name]
    layer = {
        "convolution": nn.Conv2d(5, 6, 3),
        "in another order": nn.Conv2d(4, 4, 1),
        "transposed groups": nn.ConvTranspose1d(6, 4, 3, groups=2),
        "two groups": nn.Conv2d(6, 8, 3, groups=2),
        "linear": nn.Linear(5, 4),
    }[name]
    away = copy.deepcopy(layer).to(far)
    for each in (layer, away):
        cut(name, each, *(torch.tensor(kept).to(each.weight.device) for kept in (ins, outs)))
    for one, other in zip(layer.parameters(), away.parameters(), strict=True):
        assert other.device == far
        assert torch.equal(other.cpu(), one)


@torch.no_grad()
def test_taps_lie_on_the_device_of_the_weight(far: torch.device) -> None:
    layer, values = nn.Conv1d(2, 3, 3, padding=1), torch.randn(2, 2, 4)
    away = copy.deepcopy(layer).to(far)
    for each in (layer, away):
        cut_channelwise(each, torch.tensor([0, 2, 3]).to(each.weight.device), 7)
    torch.testing.assert_close(away(values[..., :3].to(far)).cpu(), layer(values[..., :3]))


def test_a_group_norm_counts_the_channels_that_its_groups_had() -> None:
    norm = nn.GroupNorm(2, 6)
    cut("a", norm, torch.tensor([0, 2, 4, 5]), torch.tensor([0, 2, 4, 5]))
    assert (norm.counted, type(norm.counted)) == (3, int)
