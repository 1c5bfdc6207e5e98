"""Blocks that learn by gradients: what falls, what stays as it was, and what is told where a block can't learn."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import nni_topo
from nni_topo.errors import ConfigError, DataError
from nni_topo.network.speedup.equivalence import masked_model
from nni_topo.recovery import Block, compensate, compensation
from nni_topo.recovery.course import Course


def error(found, model, masks, images):
    """Return the squared error of a masked model's outputs on some images, over their variance."""
    with torch.no_grad():
        wanted = model(images)
        return float((masked_model(found, images[:2], masks)(images) - wanted).square().mean() / wanted.var())


def learned(found):
    """Return the reports of blocks that took steps."""
    return [layer for layer in found.report.layers if not math.isnan(layer.lr)]


class Gated(nn.Module):
    """Two blocks of a tanh layer that is added, whose halves aren't multiples of each other, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.norm1, self.first, self.second = nn.LayerNorm(6), nn.Linear(6, 16), nn.Linear(16, 6)
        self.norm2, self.third, self.fourth = nn.LayerNorm(6), nn.Linear(6, 16), nn.Linear(16, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, values):
        values = values + self.second(torch.tanh(2 * self.first(self.norm1(values))))
        values = values + self.fourth(torch.tanh(2 * self.third(self.norm2(values))))
        return self.head(values)


@pytest.fixture
def gated():
    torch.manual_seed(0)
    return Gated().eval()


@pytest.fixture
def values():
    """256 samples of six numbers in batches of 64."""
    return list(torch.randn(256, 6, generator=torch.Generator().manual_seed(1)).split(64))


MASK = (torch.arange(16) < 8).float()[:, None].expand(16, 6)
MASKS = {"first": {"weight": MASK}, "third": {"weight": MASK}}


def test_the_error_on_other_samples_falls_below_that_of_the_closed_form(gated, values):
    others = torch.randn(512, 6, generator=torch.Generator().manual_seed(2))
    closed = compensate(gated, MASKS, values)
    found = compensation(gated, MASKS, values, method="block")
    assert error(found.model, gated, MASKS, others) < 0.85 * error(closed, gated, MASKS, others)
    steps = learned(found)
    assert [step.layer for step in steps] == ["first, second, norm2, third, fourth, head"]
    assert steps[0].is_kept
    assert steps[0].error_after < 0.7 * steps[0].error_before


def test_removed_channels_stay_and_dense_equals_masked(gated, values):
    before = copy.deepcopy(gated.state_dict())
    found = compensate(gated, MASKS, values, method="block")
    torch.testing.assert_close(gated.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(found.first.weight[8:], gated.first.weight[8:])
    assert torch.equal(found.first.bias[8:], gated.first.bias[8:])
    assert not found.second.weight[:, 8:].any()
    assert not torch.equal(found.first.weight[:8], gated.first.weight[:8])
    # LayerNorms whose channels all stay learn, too; what precedes everything that is pruned doesn't.
    assert not torch.equal(found.norm2.weight, gated.norm2.weight)
    assert torch.equal(found.norm1.weight, gated.norm1.weight)
    dense = nni_topo.to_dense(found, values[0], MASKS)
    with torch.no_grad():
        torch.testing.assert_close(dense(values[0]), masked_model(found, values[0], MASKS)(values[0]))


@pytest.mark.slow
def test_the_seed_repeats_and_the_generator_modes_and_flags_stay(gated, values):
    gated.train()
    gated.third.eval()
    gated.norm1.weight.requires_grad_(False)
    state = torch.get_rng_state()
    found = [compensate(gated, MASKS, values, method="block", seed=seed, cache_bytes=size)
             for seed, size in ((0, 2**30), (0, 2**30), (1, 2**30), (0, 0))]  # fmt: skip
    assert torch.equal(torch.get_rng_state(), state)
    assert (found[0].training, found[0].third.training) == (True, False)
    assert [p.requires_grad for p in found[0].parameters()] == [p.requires_grad for p in gated.parameters()]
    states = [each.state_dict() for each in found]
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)
    # Other memory, other sums, but the same samples at each step.
    torch.testing.assert_close(states[3], states[0], rtol=1e-3, atol=1e-4)
    assert not torch.equal(states[2]["first.weight"], states[0]["first.weight"])


class Padded(nn.Module):
    """A pruned layer on each position of a text, beside a mask of its padding."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 6)

    def forward(self, states, attention_mask):
        return states + self.second(torch.tanh(2 * self.first(states)))


def test_padding_counts_neither_in_steps_nor_in_errors(values):
    torch.manual_seed(0)
    model = Padded().eval()
    states = torch.cat(values).reshape(64, 4, 6)
    mask = (torch.arange(4) < 3).long().expand(64, 4)
    batches = [
        [{"states": each, "attention_mask": mask[:16]} for each in padded.split(16)]
        for padded in (states, states.clone().index_fill_(1, torch.tensor([3]), 9.0))
    ]
    first, second = (compensation(model, {"first": {"weight": MASK}}, each, method="block") for each in batches)
    assert learned(first)
    torch.testing.assert_close(second.model.state_dict(), first.model.state_dict(), rtol=1e-3, atol=1e-4)
    assert learned(second)[0].samples == 56 * 3 * 6


def test_batches_of_several_lengths_stay_as_they_are(values):
    torch.manual_seed(0)
    model = Padded().eval()
    states = torch.cat(values).reshape(64, 4, 6)
    lengths = [states[:32], states[32:, :3]]
    batches = [{"states": each, "attention_mask": torch.ones(each.shape[:2]).long()} for each in lengths]
    masks = {"first": {"weight": MASK}}
    (step,) = learned(compensation(model, masks, batches, method=Block(lr=6e-3)))
    assert step.is_kept
    assert step.error_after < 0.9 * step.error_before


def test_groups_are_held_out_as_a_whole(gated, values, monkeypatch):
    """Five copies of each sample: of a group, either all or none are learned from."""
    seen = []

    def run(self, *args, **knobs):
        batches = self.training.batches()
        seen.append(torch.cat([part.entering[0] for part, _ in (next(batches) for _ in range(12))]))

    monkeypatch.setattr(Course, "run", run)
    rows = torch.cat(values)[:40]
    repeated = rows.repeat_interleave(5, 0)
    groups = nni_topo.Calibration(list(repeated.split(50)), groups=torch.arange(40).repeat_interleave(5).tolist())
    groups = groups.learned  # without every eighth group
    compensate(gated, MASKS, groups, method=Block(lr=1e-3))
    learned_from = torch.arange(40) % 8 != 7
    held = learned_from & (learned_from.cumsum(0) % 5 == 0)
    is_seen = torch.tensor([bool((seen[0] - each).abs().sum(1).min() < 1e-6) for each in rows])
    assert torch.equal(is_seen, learned_from & ~held)


class Twice(nn.Module):
    """Layers that are called twice, which neither a closed form nor gradients may change."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 6)

    def forward(self, values):
        return self.second(torch.tanh(self.first(values))) + self.second(torch.tanh(self.first(2 * values)))


def test_a_block_in_which_nothing_may_move_stays(values):
    torch.manual_seed(0)
    model = Twice().eval()
    found = compensation(model, {"first": {"weight": MASK}}, values, method="block")
    torch.testing.assert_close(found.model.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert not found.report.layers


def test_weights_that_are_learned_but_worse_are_discarded_and_the_report_says_so(gated, values):
    found = compensation(gated, MASKS, values, method=Block(lr=30.0, steps=2))
    closed = compensate(gated, MASKS, values)
    torch.testing.assert_close(found.model.state_dict(), closed.state_dict(), rtol=0, atol=0)
    steps = learned(found)
    assert steps
    assert not any(step.is_kept for step in steps)
    assert all(step.error_after == step.error_before for step in steps)
    assert "learned weights discarded" in repr(found.report)


class Logs(Gated):
    """Outputs that are NaN after the last layer, where no closed form looks."""

    def forward(self, values):
        return super().forward(values).log()


def test_activations_that_are_not_finite_name_the_block(values):
    torch.manual_seed(0)
    model = Logs().eval()
    compensate(model, MASKS, values)
    with pytest.raises(DataError, match=r"activations must be finite, got NaN or infinity \(first, .*, head\)"):
        compensate(model, MASKS, values, method=Block(steps=1, lr=1e-3))


def test_few_samples_leave_none_to_hold_out(gated, values, caplog):
    found = compensate(gated, MASKS, [values[0][:4]], method="block")
    assert torch.equal(found.first.weight, gated.first.weight)
    assert "of 4 samples none is held out" in caplog.text


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"steps": 0}, r"steps must be an integer of at least 1, got 0 \(block\)"),
        ({"batch_size": 1.5}, r"batch_size must be an integer of at least 1, got 1.5 \(block\)"),
        ({"lr": 0.0}, r"lr must be .*above 0.*, got 0.0 \(block\)"),
        ({"lr": "fast"}, r"lr must be .*, got 'fast' \(block\)"),
        ({"refine": -1}, r"refine must be an integer of at least 0, got -1 \(block\)"),
    ],
)
def test_bad_settings_are_told(knobs, message):
    with pytest.raises(ConfigError, match=message):
        Block(**knobs)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
@pytest.mark.quick_every(2)
def test_other_precisions_learn(gated, values, kind):
    model, batches = gated.to(kind), [each.to(kind) for each in values]
    found = compensation(model, MASKS, batches, method="block")
    assert found.model.first.weight.dtype == kind
    assert learned(found)[0].is_kept
    assert learned(found)[0].error_after < 0.9 * learned(found)[0].error_before


@pytest.mark.slow
def test_heads_of_attention_learn_with_their_queries_keys_and_values():
    torch.manual_seed(0)
    model = nni_topo.zoo.create_model("vit_small", num_classes=4, in_channels=1, image_size=8, seed=0).eval()
    images = torch.randn(96, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    config = [{"op_names_re": [r".*\.attention"], "granularity": "head", "sparse_ratio": 0.84}]
    victim = copy.deepcopy(model)
    groups = list(nni_topo.dependency_groups(victim, images[:2], config))
    masks = nni_topo.create_pruner("l1", victim, groups).compress()[1]
    found = compensation(model, masks, list(images.split(48)), method=Block(steps=30, lr=1e-3, batch_size=48))
    assert "blocks.0.attention.q_proj" in learned(found)[0].layer
    old, new = (net.blocks[0].attention.q_proj.weight for net in (model, found.model))
    kept = masks["blocks.0.attention.q_proj"]["weight"][:, 0].bool()
    assert torch.equal(new[~kept], old[~kept])
    assert not torch.equal(new[kept], old[kept])
    nni_topo.to_dense(found.model, images[:2], masks)


class Normed(nn.Module):
    """A pruned layer, a batch norm whose statistics are far from those of its inputs, and a layer."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 6)
        self.norm.running_var.fill_(9.0)
        nn.init.normal_(self.norm.bias)

    def forward(self, values):
        return self.second(torch.tanh(self.norm(self.first(values))))


FIRST = (torch.arange(16) < 8).float()
NORMED_MASKS = {"first": {"weight": FIRST[:, None], "bias": FIRST}, "norm": {"weight": FIRST, "bias": FIRST}}


def test_batch_norms_keep_their_statistics_and_no_bar_is_shown(values, capsys, monkeypatch):
    monkeypatch.setattr("nni_topo.network.runtime.progress._DELAY", 0.0)
    torch.manual_seed(0)
    model = Normed().eval()
    data = nni_topo.Calibration(values, hold_out=False)
    found = compensation(model, NORMED_MASKS, data, method=Block(steps=60), progress=False)
    assert capsys.readouterr().err == ""
    (report,) = learned(found)
    result = found.model
    assert report.is_kept
    for name in ("running_mean", "running_var"):
        assert torch.equal(getattr(result.norm, name), getattr(model.norm, name))
    # Removed channels stay as they were.
    for name, rows in (("first.weight", slice(8, 16)), ("first.bias", slice(8, 16)), ("norm.weight", slice(8, 16))):
        assert torch.equal(result.get_parameter(name)[rows], model.get_parameter(name)[rows])
        assert not torch.equal(result.get_parameter(name)[:8], model.get_parameter(name)[:8])
    pruned = masked_model(result, values[0][:2], NORMED_MASKS)
    with torch.no_grad():
        off = torch.cat([pruned(each) - model(each) for each in values]).double()
        wanted = torch.cat([model(each) for each in values]).double()
    spread = wanted.square().mean() - wanted.mean().square()
    held = torch.arange(256) % 5 == 4
    assert report.error_after == pytest.approx(float(off[~held].square().mean() / spread), rel=1e-3)
    assert report.error_held_out == pytest.approx(float(off[held].square().mean() / spread), rel=1e-3)
    assert (report.unknowns, report.samples) == (16 * 6 + 16 + 16 + 16 + 6 * 16 + 6, 256 * 6)
    assert (report.layer, report.place) == ("first, norm, second", "output")


class Deep(nn.Module):
    """Blocks of two layers that add to a stream; gradients may end after the first."""

    def __init__(self, blocks, has_end=False):
        super().__init__()
        torch.manual_seed(0)
        self.has_end = has_end
        self.layers = nn.ModuleList(nn.Linear(*sizes) for _ in range(blocks) for sizes in ((6, 16), (16, 6)))

    def forward(self, values):
        for number, (first, second) in enumerate(zip(self.layers[::2], self.layers[1::2], strict=True)):
            values = values + second(torch.tanh(first(values)))
            if self.has_end and not number:
                values = values.detach()
        return values


def halved(model):
    """Return masks that remove half of the channels within each block."""
    return {f"layers.{number}": {"weight": MASK} for number in range(0, len(model.layers), 2)}


def test_four_blocks_of_two_layers_learn_together(values):
    model = Deep(5).eval()
    steps = learned(compensation(model, halved(model), values[:2], method=Block(steps=1, lr=1e-3)))
    names = [f"layers.{number}" for number in range(10)]
    assert [step.layer for step in steps] == [", ".join(names[:8]), ", ".join(names[8:])]


@pytest.mark.parametrize(("noise", "rate"), [(0.01, 2e-3), (0.1, 6e-3)])
def test_a_rate_that_breaks_a_block_is_not_tried_on_the_next(values, monkeypatch, noise, rate):
    """Channels of the first block that are nearly those that stay leave an error that high rates make much larger."""
    monkeypatch.setattr("nni_topo.recovery.block._TOGETHER", 1)
    model = Deep(2).eval()
    with torch.no_grad():
        first = model.layers[0]
        first.weight[8:] = first.weight[:8] + noise * torch.randn(8, 6)
        first.bias[8:] = first.bias[:8]
    steps = learned(compensation(model, halved(model), values[:2], method=Block(steps=1)))
    assert [(step.layer, step.place) for step in steps] == [
        ("layers.0, layers.1", "add"), ("layers.2, layers.3", "output")
    ]  # fmt: skip
    assert [step.lr for step in steps] == [rate] * 2


def test_blocks_after_one_that_can_not_learn_do(values, monkeypatch, caplog):
    monkeypatch.setattr("nni_topo.recovery.block._TOGETHER", 1)
    model = Deep(3, has_end=True).eval()
    steps = learned(compensation(model, halved(model), values[:2], method=Block(steps=1, lr=1e-3)))
    assert [step.layer for step in steps] == ["layers.2, layers.3", "layers.4, layers.5"]
    (message,) = (each for each in caplog.messages if "can't learn" in each)
    assert message.startswith("layers.0, layers.1 can't learn")
