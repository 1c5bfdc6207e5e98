"""The recovery method "ahead" of the benchmarks, which registers itself, against what it starts from."""

from __future__ import annotations

import torch
from bench_modules import BENCHMARKS, imported
from every_sample import compensate, compensation
from torch import nn

from nni_topo import masked_model
from nni_topo.recovery.registry import RECOVERIES


class Saturated(nn.Module):
    """A layer whose outputs are read over a sigmoid."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(4, 3)

    def forward(self, values):
        return self.third(torch.sigmoid(self.second(self.first(values))))


def test_kept_channels_that_know_all_are_solved_for_the_output(monkeypatch):
    monkeypatch.setattr(RECOVERIES, "table", dict(RECOVERIES.table))
    torch.manual_seed(0)
    model = Saturated().double().eval()
    with torch.no_grad():
        model.first.weight[4:] = -2 * model.first.weight[:4]
        model.first.bias[4:] = -2 * model.first.bias[:4]
    mask = (torch.arange(8) < 4).double()[:, None].expand(8, 6)
    masks, batches = {"first": {"weight": mask}}, torch.randn(256, 6, dtype=torch.float64).split(64)
    with imported(BENCHMARKS / "recovery", "ahead"):
        found = compensation(model, masks, batches, method="ahead", ridge=1e-2)
    closed = compensate(model, masks, batches, ridge=1e-2)  # the ridge leaves an error
    inputs = torch.cat(batches)
    with torch.no_grad():
        left, before = (
            float((masked_model(net, inputs, masks)(inputs) - model(inputs)).square().mean())
            for net in (found.model, closed)
        )
    assert before > 1e-8
    assert left < 0.05 * before
    assert found.report.layers[-1].error_after < 1e-6
