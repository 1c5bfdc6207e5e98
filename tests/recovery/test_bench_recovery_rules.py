"""Rules of other papers, of the benchmarks, against a reference worked out another way: by hand, by lstsq."""

from __future__ import annotations

import pytest
import torch
from bench_modules import BENCHMARKS, imported
from every_sample import compensate, compensation
from torch import nn
from torch.nn.functional import unfold

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


def entering(model, images):
    """Return what enters the second convolution, and its patches (samples, channels, kernel elements)."""
    with torch.no_grad():
        values = torch.relu(model.norm(model.first(images)))
    patches = unfold(values, 3).unflatten(1, (6, 9))
    return values, patches.permute(0, 3, 1, 2).flatten(0, 1)


def wanted(model, images):
    """Return the original's outputs of the second convolution, (samples, 5)."""
    with torch.no_grad():
        return model.second(entering(model, images)[0]).flatten(2).transpose(1, 2).flatten(0, 1)


@pytest.fixture
def chain(lively):
    return built(lively, norm=False)


def test_mean_puts_what_removed_channels_give_on_average_into_the_bias(chain):
    model, masks, images = chain
    found = compensate(model, masks, images.split(16), method="mean")
    given = torch.einsum("nck,ock->o", entering(model, images)[1][:, GONE], model.second.weight.flatten(2)[:, GONE])
    torch.testing.assert_close(found.second.bias, model.second.bias + given / (64 * 16))
    assert torch.equal(found.second.weight[:, KEPT], model.second.weight[:, KEPT])
    assert torch.equal(found.head.weight, model.head.weight)


def test_scalar_finds_one_factor_a_channel_by_least_squares(chain):
    model, masks, images = chain
    found = compensate(model, masks, images.split(16), method="scalar", ridge=0.0)
    patches, weight = entering(model, images)[1], model.second.weight.detach()
    # One column a channel: its part of all outputs of all samples, one below the other.
    parts = torch.einsum("nck,ock->noc", patches, weight.flatten(2))
    lacking = wanted(model, images) - model.second.bias.detach()
    factors = torch.linalg.lstsq(parts[:, :, KEPT].flatten(0, 1), lacking.flatten()).solution
    torch.testing.assert_close(found.second.weight[:, KEPT], weight[:, KEPT] * factors[None, :, None, None])
    assert torch.equal(found.second.bias, model.second.bias)
    assert float((factors - 1).abs().min()) > 0.01


def solved(patches, outputs):
    """Return weights (outputs, unknowns) and constants by least squares."""
    rows = patches.flatten(1)
    columns = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
    solution = torch.linalg.lstsq(columns, outputs).solution
    return solution[:-1].T, solution[-1]


@pytest.mark.parametrize("method", ["layer", "sequential"])
def test_layer_and_sequential_solve_for_the_layers_own_output(chain, method):
    model, masks, images = chain
    found = compensate(model, masks, images.split(16), method=method, ridge=0.0)
    weight, bias = solved(entering(model, images)[1][:, KEPT], wanted(model, images))
    torch.testing.assert_close(found.second.weight[:, KEPT].flatten(1), weight)
    torch.testing.assert_close(found.second.bias, bias)
    report = compensation(model, masks, images.split(16), method=method).report
    assert [layer.place for layer in report.layers] == ["second", "head"]


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


@pytest.mark.parametrize("bias", [True, False])
def test_channels_are_predicted_from_all_kept_ones(lively, bias):
    model, masks, images = built(lively, norm=False, bias=bias)
    found = compensate(model, masks, images.split(16), method="channel", ridge=0.0)
    values = entering(model, images)[0].transpose(0, 1).flatten(1).T
    if bias:
        values = torch.cat([values, torch.ones_like(values[:, :1])], 1)
    kept = [*KEPT, 6] if bias else KEPT
    mixing = torch.linalg.lstsq(values[:, kept], values[:, GONE]).solution
    weight = model.second.weight.detach()
    expected = weight[:, KEPT] + torch.einsum("kg,ogij->okij", mixing[:3], weight[:, GONE])
    torch.testing.assert_close(found.second.weight[:, KEPT].detach(), expected)
    if bias:
        shift = weight[:, GONE].sum((2, 3)) @ mixing[3]
        torch.testing.assert_close(found.second.bias.detach(), model.second.bias.detach() + shift)
