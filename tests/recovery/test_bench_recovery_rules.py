"""Rules of other papers, of the benchmarks, against a reference worked out another way: by hand, by lstsq."""

from __future__ import annotations

import pytest
import torch
from bench_modules import BENCHMARKS, imported
from every_sample import compensate
from torch import nn

from nni_topo.network.speedup.equivalence import masked_model
from nni_topo.recovery.registry import RECOVERIES

KEPT, GONE = [0, 2, 3], [1, 4, 5]


@pytest.fixture(autouse=True)
def _rules(monkeypatch):
    monkeypatch.setattr(RECOVERIES, "table", dict(RECOVERIES.table))
    with imported(BENCHMARKS / "recovery", "recovery_rules"):
        yield


class Chain(nn.Module):
    """Two convolutions with a batch norm between them, or none, and a head."""

    def __init__(self, *, norm: bool, bias: bool = True) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3, padding=1, bias=not norm)
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.second = nn.Conv2d(6, 5, 3, bias=bias)
        self.head = nn.Linear(5, 3)

    def forward(self, images):
        x = torch.relu(self.norm(self.first(images)))
        return self.head(torch.relu(self.second(x)).mean((2, 3)))


def built(lively, **traits):
    """A chain with lively batch norms, its masks without half of the first layer, and 64 images; float64."""
    torch.manual_seed(0)
    model = lively(Chain(**traits)).double().eval()
    mask = torch.ones_like(model.first.weight)
    mask[GONE] = 0
    images = torch.randn(64, 2, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return model, {"first": {"weight": mask}}, images


def merged_by_hand(rows, biases, *, normed):
    """Return for each removed channel the kept one and the factor, each pair looked at alone."""
    found = {}
    for gone in GONE:
        scores = {}
        for kept in KEPT:
            factor = rows[gone].norm() / rows[kept].norm()
            likeness = rows[gone] @ rows[kept] / (rows[gone].norm() * rows[kept].norm())
            scores[kept] = float(likeness), float(factor), float((factor * biases[kept] - biases[gone]).abs())
        largest = max(score[2] for score in scores.values())
        if normed:
            best = min(KEPT, key=lambda k: 0.85 * (1 - scores[k][0]) + 0.15 * scores[k][2] / largest)
        else:
            best = max(KEPT, key=lambda k: scores[k][0])
        found[gone] = best, scores[best][1] if scores[best][0] >= 0.1 else 0.0
    return found


@pytest.mark.parametrize("normed", [False, True])
def test_merge_deals_weights_out_by_the_likeness_of_filters(lively, normed):
    model, masks, images = built(lively, norm=normed)
    with torch.no_grad():  # channel 4 like channel 2, channel 5 like none
        model.first.weight[4] = 3 * model.first.weight[2] + 0.01
        model.first.weight[5] = -model.first.weight[KEPT].sum(0)
    rows = model.first.weight.detach().flatten(1)
    if normed:
        scale = model.norm.weight.detach() / (model.norm.running_var + model.norm.eps).sqrt()
        rows = rows * scale[:, None]
        biases = model.norm.bias.detach() - model.norm.running_mean * scale
    else:
        biases = model.first.bias.detach()
        rows = torch.cat([rows, biases[:, None]], 1)
    expected = model.second.weight.detach().clone()
    by_hand = merged_by_hand(rows, biases, normed=normed)
    assert by_hand[5][1] == 0.0
    assert by_hand[4][0] == 2
    assert by_hand[4][1] > 1.0
    for gone, (kept, factor) in by_hand.items():
        expected[:, kept] += factor * model.second.weight.detach()[:, gone]
    found = compensate(model, masks, images.split(16), method="merge")
    torch.testing.assert_close(found.second.weight[:, KEPT], expected[:, KEPT])
    assert torch.equal(found.second.bias, model.second.bias)
    # From weights alone: other images, the same solution.
    again = compensate(model, masks, (images + 3.0).split(16), method="merge")
    assert torch.equal(again.second.weight, found.second.weight)


def test_merge_counts_all_layers_that_make_a_residual_stream(residual_net, images, halves, twin):
    twin(residual_net.stem, residual_net.norm)
    twin(residual_net.conv2, residual_net.norm2)
    masks = halves(residual_net, "stem", "conv2")
    found = compensate(residual_net, masks, images, method="merge")
    masked = masked_model(found, images[0], masks)
    torch.testing.assert_close(masked(images[0]), residual_net(images[0]))
