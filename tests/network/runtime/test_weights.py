"""Random weights and weights in double precision."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nni_topo.network.runtime.copies import detached_copy
from nni_topo.network.runtime.weights import RandomWeights, in_double


class Tied(nn.Module):
    """An embedding whose weights are the head's too, a recurrent layer and a norm, in half precision."""

    def __init__(self):
        super().__init__()
        self.table, self.units, self.norm = nn.Embedding(7, 4), nn.LSTM(4, 4, batch_first=True), nn.LayerNorm(4)
        self.conv, self.head = nn.Conv1d(4, 4, 1), nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("shift", torch.ones(4))
        self.bfloat16()

    def forward(self, numbers):
        values = self.norm(self.units(self.table(numbers))[0] + self.shift)
        return self.head(self.conv(values.mT).mT) @ self.table.weight


def test_a_copy_in_double_precision_computes_as_one_and_holds_the_large_weights_as_they_are():
    torch.manual_seed(0)
    model, numbers = Tied().eval(), torch.randint(7, (3, 5))
    before = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    full = detached_copy(model).double()
    copied = in_double(model)
    with torch.no_grad():
        found, expected = copied(numbers), full(numbers)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for name in ("conv", "head"):
        own = copied.get_submodule(name)._parameters["weight"]
        assert own.data_ptr() == model.get_submodule(name).weight.data_ptr()
    now = model.state_dict(keep_vars=True)
    for name, (tensor, values) in before.items():
        assert now[name] is tensor
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, values)
    assert type(model.head) is nn.Linear


def test_random_weights_differ_from_row_to_row_and_from_layer_to_layer():
    numbers = RandomWeights(torch.randn, torch.Generator().manual_seed(0))
    one, other = (numbers.like(torch.empty(700, 512, 1, 1), 0.1) for _ in range(2))
    rows = torch.cat([one, other]).flatten(1)
    assert len(rows.unique(dim=0)) == 1400
    assert not bool((one == other).any())
    assert float(one.std()) == pytest.approx(0.1, rel=0.01)
