"""Networks that call layers under torch.vmap or torch.func.grad: what runs there stays, all else is pruned."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import nni_topo
from nni_topo.errors import SpeedupError
from nni_topo.network.runtime.copies import detached_copy
from nni_topo.speedup import masked_model

LINEAR = [{"op_types": ["Linear"], "sparse_ratio": 0.5}]
INSIDE = "the layer isn't called by itself, or its channels couldn't be followed"
ENTERS = "its output enters code that could not be traced"


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


class Between(nn.Module):
    """Layers before and after."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.before = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6))
        self.middle = middle
        self.after = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.middle(self.before(x)))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("kind", [BySample, Gradient])
def test_a_network_of_transformed_layers_alone_says_why_it_stays(kind):
    model, inputs = kind().eval(), torch.randn(20, 6)
    skipped = nni_topo.dependency_groups(model, inputs, LINEAR).skipped
    assert set(skipped) == {"inner", "head"}
    assert all("what runs under torch.vmap or torch.func can't be recorded" in each for each in skipped.values())
    with pytest.raises(SpeedupError, match=r"what runs under torch\.vmap"):
        nni_topo.shrink(model, inputs.split(5), {"params": 0.5}, distill=False)


@pytest.mark.parametrize("kind", [BySample, Gradient])
def test_layers_around_a_transformation_lose_channels(kind):
    model, inputs = Between(kind()).eval(), torch.randn(20, 6)
    expected = model(inputs)
    groups = nni_topo.dependency_groups(model, inputs, LINEAR)
    assert groups.skipped == {"before.2": ENTERS, "after.2": ENTERS, "middle.inner": INSIDE, "middle.head": INSIDE}
    small = nni_topo.shrink(model, inputs.split(2), {"params": 0.8}, distill=False)
    assert len(small.before[0].weight) < 12
    masks = nni_topo.create_pruner("l1", detached_copy(model), groups).compress()[1]
    dense, masked = nni_topo.to_dense(model, inputs, masks), masked_model(model, inputs, masks)
    assert (len(dense.before[0].weight), len(dense.after[0].weight)) == (6, 6)
    torch.testing.assert_close(dense(inputs), masked(inputs))
    assert torch.equal(model(inputs), expected)
