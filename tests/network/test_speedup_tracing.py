from __future__ import annotations

import torch
from torch import nn

from nni_topo.network.tracing import trace


def test_a_model_may_put_out_nan():
    class Log(nn.Linear):
        def forward(self, x):
            return torch.log(super().forward(x) * 0.0 - 1.0)

    graph_module, args = trace(Log(3, 2).eval(), ((torch.ones(2, 3),), {}))
    assert graph_module(*args).isnan().all()
