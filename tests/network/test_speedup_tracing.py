from __future__ import annotations

import pytest
import torch
from torch import nn

from nni_topo import dependency_groups
from nni_topo.network.tracing import trace


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
