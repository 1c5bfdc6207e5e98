"""Products with weights that are looked up when a model runs again on the same values."""

import pytest
import torch
from nni.compression.pruning import L1NormPruner
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import nni_topo
from nni_topo.network.runtime.products import ProductsReused


class _Attention(nn.MultiheadAttention):
    def forward(self, states: Tensor) -> Tensor:
        return super().forward(states, states, states)[0]


LAYERS = {
    "linear": (nn.Linear(6, 4), (3, 5, 6)),
    "convolution": (nn.Conv2d(6, 4, 3, padding=1), (3, 6, 5, 5)),
    "transposed": (nn.ConvTranspose1d(6, 4, 2), (3, 6, 5)),
    "attention": (_Attention(6, 2, batch_first=True), (3, 5, 6)),
}


class _Computed(TorchFunctionMode):
    """Counts the products that are computed."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        self.count += name in ("linear", "multi_head_attention_forward") or name.startswith("conv")
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=LAYERS)
def layer_and_input(request):
    layer, shape = LAYERS[request.param]
    return layer.eval(), torch.randn(shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_equal_samples_and_samples_twice_are_looked_up(layer_and_input):
    layer, x = layer_and_input
    expected = layer(x), layer(torch.cat([x, x]))
    products = ProductsReused()
    with _Computed() as computed:
        with products:
            first, again = layer(x), layer(x.clone())
        with products:
            twice = layer(torch.cat([x, x]))
    assert computed.count == 1
    assert torch.equal(first, expected[0])
    assert torch.equal(again, expected[0])
    torch.testing.assert_close(twice, expected[1])
    again.zero_()  # a tensor of its own
    assert torch.equal(first, expected[0])


@torch.no_grad()
def test_what_has_changed_is_computed(layer_and_input):
    layer, x = layer_and_input
    with _Computed() as computed, ProductsReused():
        layer(x)
        layer(x + 1)
        layer(torch.cat([x, x + 1]))
        layer(x[:1])
        assert computed.count == 4
        weight = next(layer.parameters())
        weight.mul_(2)
        changed = layer(x)
        assert computed.count == 5
        weight.div_(2)
        changed.zero_()
        layer(x)
        assert computed.count == 6
        with torch.enable_grad():
            assert layer(x).requires_grad
    assert computed.count == 7


class _InPlace(nn.Module):
    """Writes into what its layers return, and calls one of them twice on equal values."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)

    def forward(self, x):
        x = self.first(x).relu_()
        return self.last((self.second(x).add_(1) * self.second(x.clone())).mean((2, 3)))


def test_groups_and_dense_network_of_a_forward_that_writes_into_outputs():
    torch.manual_seed(0)
    net, x = _InPlace().eval(), torch.randn(2, 3, 8, 8)
    groups = nni_topo.dependency_groups(net, x, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    assert [entry["op_names"] for entry in groups] == [["first"], ["second"]]
    pruner = L1NormPruner(net, groups)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    dense = nni_topo.to_dense(net, x, masks, groups=groups)
    assert (dense.first.out_channels, dense.second.out_channels) == (4, 4)
    other = torch.randn(3, 3, 11, 9)
    expected = nni_topo.masked_model(net, x, masks)(other)
    torch.testing.assert_close(dense(other), expected)
