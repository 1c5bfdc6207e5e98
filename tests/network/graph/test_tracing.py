from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nni_topo import dependency_groups, to_dense
from nni_topo.network.graph.recording import record
from nni_topo.network.graph.tracing import trace


def test_a_model_may_put_out_nan():
    class Log(nn.Linear):
        def forward(self, x):
            return torch.log(super().forward(x) * 0.0 - 1.0)

    graph_module, args = trace(Log(3, 2).eval(), ((torch.ones(2, 3),), {}))
    assert graph_module(*args).isnan().all()


class TooLarge(nn.Sequential):
    """Wants more memory than any machine has."""

    def forward(self, x):
        return super().forward(x) + torch.zeros(1 << 50).sum()


def test_where_memory_is_what_lacks_it_is_what_is_said():
    config = [{"op_types": ["Linear"], "sparse_ratio": 0.5}]
    for model in (TooLarge(nn.Linear(3, 4)), nn.Sequential(nn.Linear(3, 4), TooLarge(nn.Linear(4, 2)))):
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            dependency_groups(model, torch.ones(2, 3), config)


class Eager(nn.Module):
    """Takes memory that isn't there in one way to compute attention, and can't be followed in the other."""

    def __init__(self, follows: bool) -> None:
        super().__init__()
        self.config = SimpleNamespace(_attn_implementation="sdpa")
        self.layer, self.follows = nn.Linear(3, 4), follows

    def forward(self, x):
        x = self.layer(x)
        if self.config._attn_implementation == "eager":
            return x + torch.zeros(1 << 50).sum()
        return x if self.follows else x * float(x.numpy().sum())


def test_memory_that_one_way_of_attention_lacks_is_what_is_said_if_the_other_fails():
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        record(Eager(follows=False).eval(), {"x": torch.ones(2, 3)})
    assert record(Eager(follows=True).eval(), {"x": torch.ones(2, 3)}) is not None


def hungry(x):
    """Take more memory than there is for several inputs at once."""
    if len(x) > 2:
        torch.zeros(1 << 50)
    return x


def hungry_for_numbers(x):
    """Take more memory than there is for large numbers."""
    if float(x.abs().max()) > 20:
        torch.zeros(1 << 50)
    return x


torch.fx.wrap("hungry")
torch.fx.wrap("hungry_for_numbers")


class Hungry(nn.Module):
    def __init__(self, of_numbers: bool) -> None:
        super().__init__()
        self.first, self.last, self.of_numbers = nn.Linear(3, 4), nn.Linear(4, 2), of_numbers
        nn.init.ones_(self.first.weight)

    def forward(self, x):
        x = self.first(x)
        return self.last(hungry_for_numbers(x) if self.of_numbers else hungry(x))


LINEAR = [{"op_types": ["Linear"], "sparse_ratio": 0.5}]
MASKS = {"first": {"weight": torch.tensor([1.0, 1, 0, 0])[:, None].expand(4, 3).clone()}}


def test_memory_that_lacks_in_a_rehearsal_is_what_is_said_and_a_comparison_is_named_without_it():
    model = Hungry(of_numbers=True).eval()
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        dependency_groups(model, torch.ones(2, 3), LINEAR)
    assert "times 100" not in to_dense(model, torch.ones(2, 3), MASKS).report.checked


def test_inputs_for_which_together_there_is_no_memory_are_taken_one_by_one():
    model = Hungry(of_numbers=False).eval()
    assert "first" not in dependency_groups(model, torch.ones(2, 3), LINEAR).skipped
    dense = to_dense(model, torch.ones(2, 3), MASKS)
    assert dense.first.out_features == 2
    assert "shifted by -3" in dense.report.checked
