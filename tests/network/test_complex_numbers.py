"""Networks with complex numbers: layers with complex weights stay as they are, all others are pruned."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import nni_topo
from nni_topo.network.runtime.copies import to_precision
from nni_topo.network.runtime.inputs import call_in_precision
from nni_topo.speedup import masked_model

COMPLEX = torch.complex64
LAYERS = [{"op_types": ["Linear", "Conv1d", "Conv2d"], "sparse_ratio": 0.5}]
ITSELF = "its weights are complex numbers, which stay as they are"
READS = "they enter {}, whose weights are complex numbers"
OUTPUT = "it gives the model's output"


class Between(nn.Module):
    """A complex linear layer between real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(6, 8), nn.Linear(8, 8, dtype=COMPLEX)
        self.second, self.third, self.head = nn.Linear(8, 12), nn.Linear(12, 10), nn.Linear(10, 3)

    def middle(self, x: Tensor) -> Tensor:
        return self.inner(x.to(COMPLEX))

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.first(x).relu()).abs()
        return self.head(self.third(self.second(x).relu()).relu())


class Fourier(nn.Module):
    """A spectral convolution with weights of each frequency beside a plain one (Fourier neural operators)."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.plain = nn.Conv1d(2, 6, 1), nn.Conv1d(6, 6, 1)
        self.modes = nn.Parameter(torch.randn(6, 6, 4, dtype=COMPLEX))
        self.second, self.head = nn.Conv1d(6, 12, 1), nn.Conv1d(12, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(x)
        spectrum = torch.einsum("bix,iox->box", torch.fft.rfft(x)[..., :4], self.modes)
        x = (torch.fft.irfft(spectrum, n=x.shape[-1]) + self.plain(x)).relu()
        return self.head(self.second(x).relu())


NETWORKS = {
    "linear": (Between, (40, 6), {"first": READS.format("inner"), "inner": ITSELF, "head": OUTPUT}),
    "fourier": (Fourier, (12, 2, 16), {"lift": None, "plain": None, "head": OUTPUT}),
}


def network(kind: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, shape, _ = NETWORKS[kind]
    return make().eval(), torch.randn(shape)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *((kind, torch.float32) for kind in NETWORKS),
        ("fourier", torch.float64),
    ],
)
@pytest.mark.quick_every(3)
def test_all_but_complex_layers_and_their_neighbours_lose_channels(kind, dtype):
    model, inputs = network(kind)
    if dtype == torch.float64:
        to_precision(model, dtype)
        inputs = call_in_precision(((inputs,), {}), dtype)[0][0]
    before = copy.deepcopy(model.state_dict())
    groups = nni_topo.dependency_groups(model, inputs, LAYERS)
    expected = NETWORKS[kind][2]
    assert set(groups.skipped) == set(expected)
    assert all(text is None or groups.skipped[name] == text for name, text in expected.items())
    masks = nni_topo.create_pruner("l1", copy.deepcopy(model), groups).compress()[1]
    dense, masked = nni_topo.to_dense(model, inputs, masks), masked_model(model, inputs, masks)
    torch.testing.assert_close(dense(inputs), masked(inputs))
    assert len(dense.second.weight) == len(model.second.weight) // 2
    for name, value in dense.state_dict().items():
        if value.is_complex():
            assert torch.equal(value, before[name])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_to_change_about_complex_weights_is_said():
    model, inputs = network("linear")
    assert "real and imaginary parts in layers of their own" in str(nni_topo.explain(model, inputs, "first"))
