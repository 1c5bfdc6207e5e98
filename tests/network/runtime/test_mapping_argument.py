"""Models whose forward takes one mapping, such as a batch of a data set."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import nni_topo
from nni_topo.errors import ConfigError, DataError


class ByName(nn.Module):
    """Takes its two tensors by name."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.images, self.vectors, self.head = nn.Linear(6, 16), nn.Linear(3, 16), nn.Linear(16, 4)

    def forward(self, x, v):
        return self.head(torch.relu(self.images(x)) + torch.relu(self.vectors(v)))


class ByMapping(ByName):
    """Takes both in one mapping."""

    def forward(self, batch, scale=1.0):
        return super().forward(scale * batch["x"], batch["v"])


def batches(count=96, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [{"x": torch.randn(32, 6, generator=generator), "v": torch.randn(32, 3, generator=generator)}] * (
        count // 32
    )


def test_shrink_does_with_the_mapping_what_it_does_with_its_entries_by_name():
    seen = []

    def augment(batch):
        seen.append(set(batch))
        return {**batch, "x": -batch["x"]}

    knobs = {"pruner": "reconstruction", "distill": {"steps": 20, "augment": augment}}
    labelled = [(batch, torch.zeros(32)) for batch in batches()]
    small, other = (
        nni_topo.shrink(net.eval(), given, {"flops": 0.5}, **knobs)
        for net, given in ((ByMapping(), labelled), (ByName(), batches()))
    )
    torch.testing.assert_close(small.state_dict(), other.state_dict())
    assert small(batches()[0]).shape == (32, 4)
    assert seen
    assert all(keys == {"x", "v"} for keys in seen)


class Arbitrary(ByName):
    def forward(self, batch, **others):
        return super().forward(batch["x"], batch["v"])


def test_where_it_could_mean_either_it_holds_arguments_by_name():
    model, images = Arbitrary().eval(), batches()
    with pytest.raises(ConfigError, match=r"missing a required argument: 'batch'|unexpected keyword argument"):
        nni_topo.dependency_groups(model, images[0], [{"op_types": ["Linear"]}])
    with pytest.raises(DataError, match=r"missing a required argument: 'batch'|unexpected keyword argument"):
        nni_topo.recalibrate_batch_norm(model, images)


def test_a_mapping_with_wrong_keys_gets_the_models_own_error():
    with pytest.raises(DataError, match="must fit the model, got KeyError: 'v'"):
        nni_topo.shrink(ByMapping().eval(), [{"x": torch.zeros(8, 6)}], {"flops": 0.5})
