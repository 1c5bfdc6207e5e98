"""Networks that call layers under torch.vmap or torch.func.grad: what runs there stays, all else is pruned."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import nni_topo
from nni_topo.errors import SpeedupError

LINEAR = [{"op_types": ["Linear"], "sparse_ratio": 0.5}]


class BySample(nn.Module):
    """Two layers that are called on one sample."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(6, 8), nn.Linear(8, 6)

    def one(self, sample: Tensor) -> Tensor:
        return self.head(self.inner(sample).relu())

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(self.one)(x)


class Gradient(BySample):
    """The gradient of an energy, as networks give forces."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(torch.func.grad(lambda sample: self.one(sample).square().sum()))(x)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("kind", [BySample, Gradient])
@pytest.mark.slow
def test_a_network_of_transformed_layers_alone_says_why_it_stays(kind):
    model, inputs = kind().eval(), torch.randn(20, 6)
    skipped = nni_topo.dependency_groups(model, inputs, LINEAR).skipped
    assert set(skipped) == {"inner", "head"}
    assert all("what runs under torch.vmap or torch.func can't be recorded" in each for each in skipped.values())
    with pytest.raises(SpeedupError, match=r"what runs under torch\.vmap"):
        nni_topo.shrink(model, inputs.split(5), {"params": 0.5}, distill=False)
