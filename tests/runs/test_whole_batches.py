"""Models that run on whole batches only: these are held out and distilled as they are."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import nni_topo
from nni_topo.errors import ConfigError, DataError


class Encoder(nn.Module):
    """A transformer whose padding mask is as long as the longest sample of a batch says."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave = nn.Linear(20, 32), nn.Linear(32, 11)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x, lengths):
        mask = torch.arange(int(lengths.max()))[None] >= lengths[:, None]
        return self.leave(self.layers(self.enter(x), src_key_padding_mask=mask))


def utterances(count=16, size=8, longest=0, seed=0):
    """Batches whose sample of full length is the one with that number, or in each batch another one for None."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for batch in range(count):
        lengths = torch.randint(5, 20, (size,), generator=generator)
        lengths[batch % size if longest is None else longest] = 20
        batches.append({"x": torch.randn(size, 20, 20, generator=generator), "lengths": lengths})
    return batches


class Graphs(nn.Module):
    """Two graph convolutions, and if asked the mean over the nodes of each graph."""

    def __init__(self, pools: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.leave = nn.Linear(6, 32), nn.Linear(32, 32), nn.Linear(32, 3)
        self.pools = pools

    def forward(self, x, edges):
        for layer in (self.first, self.second):
            x = layer(x + torch.zeros_like(x).index_add(0, edges[1], x[edges[0]])).relu()
        return self.leave(x.mean(0, keepdim=True) if self.pools else x)


def graphs(count=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for index in range(count):
        nodes = 9 + index % 5
        edges = torch.randint(0, nodes, (2, 3 * nodes), generator=generator)
        edges[:, 0] = nodes - 1
        batches.append({"x": torch.randn(nodes, 6, generator=generator), "edges": edges})
    return batches


class Speech(nn.Module):
    """Convolutions over time; each batch holds sequences of one length."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.leave = nn.Conv1d(4, 24, 3), nn.Conv1d(24, 24, 3), nn.Conv1d(24, 5, 1)

    def forward(self, x):
        return self.leave(self.second(self.first(x).relu()).relu()).transpose(1, 2)


def sequences(count=20, size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 4, 12 + 3 * (index % 4), generator=generator) for index in range(count)]


KINDS = {
    "lengths": (Encoder, utterances, utterances(1, 5, seed=3)[0]),
    "lengths, longest anywhere": (Encoder, lambda: utterances(longest=None), utterances(1, 3, seed=4)[0]),
    "nodes of a graph": (lambda: Graphs(False), graphs, graphs(1, seed=5)[0]),
    "one graph": (lambda: Graphs(True), graphs, graphs(1, seed=6)[0]),
    "equal lengths in a batch": (Speech, sequences, {"x": torch.randn(3, 4, 31)}),
    "one sequence a batch": (Speech, lambda: sequences(24, 1), {"x": torch.randn(5, 4, 17)}),
}


@pytest.mark.parametrize("distill", [False, {"steps": 30, "lr": 1e-3}])
@pytest.mark.parametrize("kind", KINDS)
def test_networks_shrink_on_the_batches_as_they_are(kind, distill):
    make, batches, other = KINDS[kind]
    model = make().eval()
    small = nni_topo.shrink(model, batches(), {"params": 0.5}, distill=distill, progress=False)
    before, after = (sum(weight.numel() for weight in net.parameters()) for net in (model, small))
    assert after / before == pytest.approx(0.5, abs=0.03)
    assert small.report.held_out > 0
    if distill:
        verdict = small.report.distillation
        assert verdict.steps > 15
        assert verdict.loss_after < 1.5 * verdict.loss_before
    with torch.no_grad():
        assert small(**other).shape == model(**other).shape


@pytest.mark.parametrize("kind", KINDS)
def test_the_dense_network_computes_what_the_masked_one_does(kind):
    make, batches, other = KINDS[kind]
    model, data = make().eval(), nni_topo.Calibration(batches())
    example = data[0]
    names = [name for name, module in model.named_modules() if name in ("first", "layers.layers.0.linear1")]
    pruner = nni_topo.create_pruner("l1", model, [{"op_names": names, "sparse_ratio": 0.5}])
    masks = pruner.compress()[1]
    pruner.unwrap_model()
    repaired = nni_topo.compensate(model, masks, data)
    dense = nni_topo.to_dense(repaired, example, masks)
    widths = {"first": 16 if isinstance(model, Graphs) else 12, "layers.layers.0.linear1": 32}
    layer = dense.get_submodule(names[0])
    assert len(layer.weight) == widths[names[0]]
    expected = nni_topo.masked_model(repaired, example, masks)(**other)
    torch.testing.assert_close(dense(**other), expected, rtol=1e-4, atol=1e-5)
    assert nni_topo.distillation(dense, model, data, steps=1, lr=1e-5).solved_on == 0
    damaged = nni_topo.to_dense(model, example, masks)
    with torch.no_grad():
        damaged.leave.bias += 1.0
    done = nni_topo.distillation(damaged, model, data, objective="squares", steps=60, lr=1e-2)
    assert done.images == data.samples
    assert done.distance_after < 0.5 * done.distance_before


def test_of_two_batches_one_is_held_out_and_one_batch_is_too_few():
    model = Encoder().eval()
    small = nni_topo.shrink(model, utterances(2), {"params": 0.6}, distill={"steps": 5}, progress=False)
    assert (small.report.images, small.report.held_out) == (8, 8)
    with pytest.raises(ConfigError, match=r"at least two batches, one to judge by, got 1: of 8 samples"):
        nni_topo.shrink(model, utterances(1), {"params": 0.6}, evaluate=lambda net: pytest.fail("it ran"))
    with pytest.raises(ConfigError, match=r"at least two batches, one to judge by, got 1: of 8 samples"):
        nni_topo.distill(model, model, utterances(1))
    with pytest.raises(DataError, match="at least two batches"):
        nni_topo.shrink(model, utterances(1), {"params": 0.6, "allocation": "auto"}, distill=False)
    alone = nni_topo.shrink(model, utterances(1), {"params": 0.6}, distill=False, progress=False)
    assert "two batches" in str(alone.report)


@pytest.mark.slow
def test_a_frontier_takes_whole_batches():
    model, batches = Encoder().eval(), utterances(8)
    found = nni_topo.frontier(model, batches, (0.7, 0.5), budget="params", distill={"steps": 5}, progress=False)
    assert list(found) == [0.7, 0.5]


@pytest.mark.slow
def test_a_tolerance_takes_whole_batches():
    small = nni_topo.shrink(
        Encoder().eval(), utterances(8), budget="params", tolerance=0.9, measure="distance", distill=False,
        progress=False,
    )  # fmt: skip
    assert small.report.tolerance.is_met


def test_removed_blocks_take_whole_batches():
    model, batches = Encoder().eval(), utterances(8)
    short = nni_topo.shrink(model, batches, {"params": 0.4}, depth=True, distill={"steps": 5}, progress=False)
    assert short.report.budget.left < 0.45


def test_a_choice_of_allocations_takes_whole_batches():
    model, batches = Encoder().eval(), utterances(8)
    best = nni_topo.shrink(model, batches, {"params": 0.6, "allocation": "auto"}, distill=False, progress=False)
    assert len(best.report.tried) > 1


def test_a_batch_that_fails_after_the_trial_is_named(caplog):
    """Only one sample of the data can't be learned from: it is long, and is met after the work has begun."""

    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.leave = nn.Linear(4, 16), nn.Linear(16, 3)

        def forward(self, x):
            if torch.is_grad_enabled() and len(x) > 40 and bool((x > 9).any()):
                raise RuntimeError("a sample is too long")
            return self.leave(self.first(x).relu())

    batches = [torch.randn(64, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    batches[1][30] = 10.0
    model = Picky().eval()
    dense = nni_topo.to_dense(model, batches[0], {})
    with torch.no_grad():
        dense.leave.weight *= 0.5
    with caplog.at_level(logging.INFO), pytest.raises(ConfigError, match=r"any number of samples, got RuntimeError"):
        nni_topo.distill(dense, model, batches, steps=20, lr=1e-3)


def test_samples_of_one_source_in_several_batches_are_held_out_together():
    batches = utterances(6)
    sources = [min(batch, 4) for batch in range(6) for _ in range(8)]
    data = nni_topo.Calibration(batches, groups=sources).as_whole_batches("a reason")
    learned, held_out = data.split()
    assert (len(learned), len(held_out)) == (4, 2)
    assert torch.equal(held_out[1]["x"], batches[5]["x"])
    assert learned.is_whole
