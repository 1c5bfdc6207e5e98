"""Layers that are cut compute what they did, on inputs without the pruned channels and for the kept outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from nni_topo.errors import SpeedupError
from nni_topo.network.layers.slicing import cut

# By name: the layer, the kept input and output channels, what enters it at full width, and the dimension of channels.
LAYERS: dict[str, tuple[nn.Module, list[int], list[int], tuple[int, ...], int]] = {
    "convolution": (nn.Conv2d(5, 6, 3, padding=1), [0, 2, 3], [1, 4, 5], (2, 5, 4, 4), 1),
    "without a bias": (nn.Conv1d(5, 6, 3, bias=False), [4], [0, 1, 2, 3, 4, 5], (2, 5, 7), 1),
    "in another order": (nn.Conv2d(4, 4, 1), [3, 0, 2], [2, 1], (2, 4, 3, 3), 1),
    "transposed": (nn.ConvTranspose2d(4, 6, 2, stride=2), [1, 3], [0, 2, 5], (2, 4, 3, 3), 1),
    "two groups": (nn.Conv2d(6, 8, 3, groups=2), [0, 2, 3, 4], [1, 2, 6, 7], (2, 6, 4, 4), 1),
    "one group of two": (nn.Conv2d(6, 8, 3, groups=2), [3, 5], [4, 5, 7], (2, 6, 4, 4), 1),
    "transposed groups": (nn.ConvTranspose1d(6, 4, 3, groups=2), [0, 1, 4, 5], [0, 3], (2, 6, 5), 1),
    "depth-wise": (nn.Conv2d(5, 5, 3, groups=5, padding=1), [1, 2, 4], [1, 2, 4], (2, 5, 4, 4), 1),
    "two for each": (nn.Conv1d(3, 6, 3, groups=3), [0, 2], [0, 1, 4, 5], (2, 3, 5), 1),
    "linear": (nn.Linear(5, 4), [0, 4], [1, 2, 3], (3, 5), 1),
    "linear without a bias": (nn.Linear(5, 4, bias=False), [0, 1, 2, 3, 4], [0], (3, 2, 5), 2),
    "PReLU": (nn.PReLU(4), [1, 2], [1, 2], (2, 4, 3), 1),
    "PReLU of one": (nn.PReLU(), [1, 2], [1, 2], (2, 4, 3), 1),
    "batch norm": (nn.BatchNorm2d(4), [0, 3], [0, 3], (2, 4, 3, 3), 1),
    "without parameters": (nn.BatchNorm1d(4, affine=False), [0, 3], [0, 3], (2, 4, 3), 1),
    "instance norm": (nn.InstanceNorm2d(4, affine=True), [0, 3], [0, 3], (2, 4, 3, 3), 1),
    "one group of a norm": (nn.GroupNorm(3, 6), [2, 3], [2, 3], (2, 6, 3), 1),
}


def drawn(layer: nn.Module) -> nn.Module:
    """Fill all parameters and buffers with random numbers, above zero so that they may be variances."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in [*layer.parameters(), *layer.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
    return layer.double().eval()


@pytest.mark.parametrize("knobs", [{}, {"num_layers": 2, "bidirectional": True}])
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
    expected = layer(entering).index_select(dim, torch.tensor(outs))
    cut(name, layer, torch.tensor(ins), torch.tensor(outs))
    torch.testing.assert_close(layer(some.double()), expected, rtol=1e-9, atol=1e-12)


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
    norm = nn.GroupNorm(2, 4)
    with pytest.raises(SpeedupError, match=r"groups of a norm must keep equally many channels, got 2, 1 \(norm\)"):
        cut("norm", norm, torch.tensor([0, 1, 3]), torch.tensor([0, 1, 3]))
    assert (layer.in_channels, norm.num_channels) == (4, 4)


def test_a_parameter_keeps_its_kind_and_whether_it_is_trained() -> None:
    layer = nn.Linear(3, 2)
    shared = layer.weight
    layer.weight.requires_grad_(requires_grad=False)
    cut("a", layer, torch.arange(3), torch.arange(2))
    assert layer.weight is not shared
    assert layer.weight.data_ptr() != shared.data_ptr()
    assert (layer.weight.requires_grad, layer.bias.requires_grad) == (False, True)
