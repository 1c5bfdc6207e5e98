"""Blocks that learn by gradients: what falls, what stays as it was, and what is told where a block can't learn."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import nni_topo
from nni_topo.errors import ConfigError, DataError
from nni_topo.network.speedup.analysis import Analysis
from nni_topo.network.speedup.equivalence import masked_model
from nni_topo.recovery import Block, compensate, compensation
from nni_topo.recovery.block import (
    _learners,
    _Learning,
    _Values,
)
from nni_topo.recovery.course import Course
from nni_topo.recovery.networks import build_networks, plan_of
from nni_topo.recovery.reconstruct import Reconstruct
from nni_topo.recovery.registry import Tools
from nni_topo.recovery.replay import Replay, touched_nodes
from nni_topo.recovery.windows import segments


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


def test_nothing_changes_where_nothing_is_pruned(gated, values):
    masks = {"first": {"weight": torch.ones(16, 6)}}
    found = compensation(gated, masks, values, method="block")
    torch.testing.assert_close(found.model.state_dict(), gated.state_dict(), rtol=0, atol=0)
    assert not found.report.layers


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


def test_a_loader_that_shuffles_is_read_once(gated, values):
    data = torch.utils.data.TensorDataset(torch.cat(values))
    loader = torch.utils.data.DataLoader(data, batch_size=64, shuffle=True, generator=torch.Generator().manual_seed(0))
    order = torch.utils.data.DataLoader(data, batch_size=64, shuffle=True, generator=torch.Generator().manual_seed(0))
    found = compensate(gated, MASKS, loader, method="block")
    expected = compensate(gated, MASKS, list(order), method="block")
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=0)


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

    def run(self, lesson, batches, total, *args, **knobs):
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


class Untraced(nn.Module):
    """A block whose values are computed without gradients."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 16), nn.Linear(16, 6), nn.Linear(6, 3)

    def forward(self, values):
        return self.head(torch.relu(self.second(torch.relu(self.first(values))))).detach()


def test_what_has_no_gradients_stays_as_the_closed_form_leaves_it(values, caplog):
    torch.manual_seed(0)
    model, masks = Untraced().eval(), {"first": {"weight": MASK}}
    found = compensate(model, masks, values, method=Block(layers=9))
    closed = compensate(model, masks, values)
    assert torch.equal(found.first.weight, closed.first.weight)
    assert torch.equal(found.second.weight, closed.second.weight)
    assert "first, second, head can't learn" in caplog.text


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
        ({"layers": -1}, r"layers must be an integer of at least 0, got -1 \(block\)"),
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


class Uses(nn.Module):
    """A layer that is pruned, one that is used twice, two of one weight, a norm and a head."""

    def __init__(self):
        super().__init__()
        self.start, self.first = nn.Linear(4, 6), nn.Linear(6, 6)
        self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 6)
        self.twice, self.norm, self.head = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 2)
        self.third.weight = self.second.weight

    def forward(self, values):
        values = self.second(self.first(self.start(values).relu()).relu())
        values = self.twice(self.third(values).relu())
        return self.head(self.norm(self.twice(values)))


def test_layers_that_are_used_once_may_learn_after_what_is_pruned():
    torch.manual_seed(0)
    masks = {"start": {"weight": (torch.arange(6) < 3).float()[:, None].expand(6, 4)}}
    call = ((torch.randn(8, 4),), {})
    networks = build_networks(Analysis(Uses().eval(), call), masks)
    touched = touched_nodes(networks.unpruned, networks.pruned)
    found = {node.name: names for node, names in _learners(networks, touched).items()}
    assert found == {
        "start": ["start.weight", "start.bias"],
        "first": ["first.weight", "first.bias"],
        "second": ["second.bias"],
        "third": ["third.bias"],
        "norm": ["norm.weight", "norm.bias"],
        "head": ["head.weight", "head.bias"],
    }
    later = {node for node in touched if node.name in ("norm", "head")}
    assert [node.name for node in _learners(networks, later)] == ["norm", "head"]


class Watched(_Learning):
    """Notes what is looked at and the losses there, how many steps are taken, and which modules of the block train."""

    def __init__(self, *args):
        self.looked_at, self.losses, self.steps, self.modes = [], [], 0, set()
        super().__init__(*args)

    def judge(self, student, index):
        self.looked_at.append(index.tolist())
        self.losses.append(super().judge(student, index))
        return self.losses[-1]

    def objective(self, student, call, wanted):
        self.steps += 1
        self.modes |= {module.training for module in student.body.modules()}
        return super().objective(student, call, wanted)


class Flat(nn.Module):
    """Layers on the positions of all samples in one dimension."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 6)

    def forward(self, values):
        return self.second(self.first(values.flatten(0, 1)))


def learner(model, masks, batches, **knobs):
    """Return what learns all blocks of a model together."""
    networks = build_networks(Analysis(model, ((batches[0],), {})), masks)
    replay = Replay(model, networks.unpruned, networks.pruned, batches, 2**30)
    Reconstruct().tasks(plan_of(networks, replay.touched_nodes), networks)  # layers read removed channels no more
    sizes = tuple(len(each) for each in batches)
    held_out = torch.arange(sum(sizes)) % 5 == 4
    tools = Tools(sum(sizes), sizes, held_out, 0, 2**30, False, lambda: replay)
    learners = _learners(networks, replay.touched_nodes)
    (segment, *_) = segments(replay.nodes, replay.touched_nodes, learners, 0, 9)
    names = [name for own in learners.values() for name in own]
    known = _Values(replay, segment, tools)
    return Watched(Block(**knobs), networks, segment, names, known, 0)


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
    block = learner(model, NORMED_MASKS, values, steps=4)
    report = block.run((2e-3, 1e-9))
    assert (report.lr, report.is_kept, report.ridge) == (2e-3, True, 0.0)
    assert (block.steps, block.modes) == (10 + 4, {False})
    assert capsys.readouterr().err == ""
    result = block._networks.result
    for name in ("running_mean", "running_var"):
        assert torch.equal(getattr(result.norm, name), getattr(model.norm, name))
    # Removed channels stay as they were.
    for name, rows in (("first.weight", slice(8, 16)), ("first.bias", slice(8, 16)), ("norm.weight", slice(8, 16))):
        assert torch.equal(result.get_parameter(name)[rows], model.get_parameter(name)[rows])
        assert not torch.equal(result.get_parameter(name)[:8], model.get_parameter(name)[:8])
    # The pruned network goes on with what was learned.
    pruned = block._networks.pruned
    for name in ("first.weight", "norm.weight", "second.bias"):
        torch.testing.assert_close(pruned.get_parameter(name)[:6], result.get_parameter(name)[:6])
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


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_blocks_after_one_that_can_not_learn_do(values, monkeypatch, caplog, precision):
    monkeypatch.setattr("nni_topo.recovery.block._TOGETHER", 1)
    model = Deep(3, has_end=True).eval()
    steps = learned(
        compensation(model, halved(model), values[:2], method=Block(steps=1, lr=1e-3, layers=2, precision=precision))
    )
    assert [step.layer for step in steps] == ["layers.2, layers.3", "layers.4, layers.5"]
    (message,) = (each for each in caplog.messages if "can't learn" in each)
    assert message.startswith("layers.0, layers.1 can't learn")
    assert message.endswith(" (precision='bfloat16')") is (precision == "bfloat16")


def test_layers_at_the_ends_of_blocks_learn_with_them(values, monkeypatch):
    monkeypatch.setattr("nni_topo.recovery.block._TOGETHER", 1)
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(*sizes) for sizes in ((6, 16), (16, 6)) * 2)).eval()
    masks = {"0": {"weight": MASK}, "2": {"weight": MASK}}
    steps = learned(compensation(model, masks, values[:2], method=Block(steps=1, lr=1e-3)))
    assert [(step.layer, step.place) for step in steps] == [("0, 1", "_1"), ("2, 3", "output")]


def test_errors_are_shares_of_the_variance_and_what_is_zero_for_a_mask_stays(values):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Linear(16, 1)).eval()
    block = learner(model, {"0": {"weight": MASK}}, values, batch_size=8)
    pruned, result = block._networks.pruned, block._networks.result
    with torch.no_grad():
        for net in (pruned, result):
            net.get_parameter("0.bias")[1] = 0.0
        pruned.get_parameter("0.bias")[2] = 0.0
        wanted = torch.cat([model(each) for each in values])
        off = torch.cat([pruned(each) for each in values]) - wanted
    student = block.student()
    for index in ([0], [5, 100, 7], range(256)):
        expected = off[list(index)].square().mean() / wanted.var(correction=0)
        assert block.judge(student, torch.tensor(list(index))) == pytest.approx(float(expected), rel=1e-4)
    part, meant = next(block.batches())
    rows = [int((torch.cat(values) == row).all(1).nonzero()) for row in part.entering[0]]
    assert len(rows) == 8
    loss = block.objective(student, part, meant)
    torch.testing.assert_close(loss, off[rows].square().mean() / wanted.var(correction=0), rtol=1e-4, atol=0)
    loss.backward()
    assert (student.body.get_parameter("0.bias").grad[:4] != 0).tolist() == [True, True, False, True]


def test_batches_that_have_no_entry_for_each_sample_stay_as_they_are(values):
    torch.manual_seed(0)
    model = Flat().eval()
    batches = [each.reshape(-1, 2, 6) for each in values]
    block = learner(model, {"first": {"weight": MASK}}, batches)
    assert (block._values._are_mixed, block._values._sizes) == (False, [32] * 4)
    with torch.no_grad():
        wanted = [model(each) for each in batches]
        off = torch.cat([block._networks.pruned(each) - meant for each, meant in zip(batches, wanted, strict=True)])
        shares = off.square().reshape(128, -1).mean(1) / torch.cat(wanted).var(correction=0)
        for index in ([0], [3, 40, 41]):
            found = block.judge(block.student(), torch.tensor(index))
            assert found == pytest.approx(float(shares[index].mean()), rel=1e-4)


def test_projections_within_attention_learn_where_it_is_computed():
    torch.manual_seed(0)
    model = nni_topo.zoo.create_model("vit_small", num_classes=3, in_channels=1, image_size=8, seed=0).eval()
    weight = model.blocks[3].mlp.fc1.weight
    mask = (torch.arange(len(weight)) < len(weight) // 2).float()
    masks = {"blocks.3.mlp.fc1": {"weight": mask[:, None].expand_as(weight), "bias": mask}}
    networks = build_networks(Analysis(model, ((torch.randn(2, 1, 8, 8),), {})), masks)
    found = _learners(networks, touched_nodes(networks.unpruned, networks.pruned))
    owners = [list(dict.fromkeys(name.rpartition(".")[0] for name in names)) for names in found.values()]
    last = "blocks.4."
    assert owners == [
        ["blocks.3.mlp.fc1"],
        ["blocks.3.mlp.fc2"],
        [f"{last}norm1"],
        [f"{last}attention.{kind}_proj" for kind in "qkv"],
        [f"{last}attention.o_proj"],
        [f"{last}norm2"],
        [f"{last}mlp.fc1"],
        [f"{last}mlp.fc2"],
        ["norm"],
        ["head"],
    ]
    assert all(len(names) == 2 * len(own) for names, own in zip(found.values(), owners, strict=True))


def test_a_rate_is_taken_if_the_loss_grows_by_at_most_a_quarter_of_what_it_is_off_one(values):
    """Of a network that always gives the same answer the loss is one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 6)).eval()
    masks = {"0": {"weight": (torch.arange(16) < 1).float()[:, None].expand(16, 6)}}
    block = learner(model, masks, values, steps=1)
    rates = torch.logspace(0.5, -2.5, 25).tolist()
    report = block.run(rates)
    first, *tried = block.losses[2 : 4 + rates.index(report.lr)]
    assert min(tried[:-1]) > first + 0.25 * abs(1.0 - first) >= tried[-1]
    assert min(tried[:-1]) < first + 0.25 * abs(2.0 - first)


@pytest.mark.parametrize("knobs", [{}, {"lr": 1e-30}])
def test_a_block_that_learns_nothing_stays(gated, values, knobs):
    """No rate is left to try, or one at which no weight moves."""
    block = learner(gated, MASKS, values, steps=2, **knobs)
    report = block.run(())
    assert (report.is_kept, report.ridge) == (False, math.inf)
    assert math.isnan(report.lr) if not knobs else report.lr == 1e-30
    assert block.steps == (2 if knobs else 0)


def test_transposed_convolutions_learn_by_output():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 8, 1), nn.Tanh(), nn.ConvTranspose1d(8, 3, 2, stride=2)).eval()
    mask = (torch.arange(8) < 4).float()
    masks = {"0": {"weight": mask[:, None, None].expand(8, 2, 1), "bias": mask}}
    images = list(torch.randn(40, 2, 5, generator=torch.Generator().manual_seed(0)).split(20))
    block = learner(model, masks, images, steps=4, lr=1e-2)
    report = block.run(())
    assert report.is_kept
    learned = torch.arange(40) % 5 != 4
    with torch.no_grad():
        wanted = model(torch.cat(images))
        off = block._networks.pruned(torch.cat(images)) - wanted
    assert report.error_after == pytest.approx(float(off[learned].square().mean() / wanted.var(correction=0)), rel=1e-4)
    assert report.error_after < report.error_before
