"""Distillation towards what is read of a model's output, and towards what its blocks put out."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import pytest
import torch
from distill_nets import batches, inputs, pair
from torch import nn
from torch.nn.functional import normalize

import nni_topo
from nni_topo.errors import ConfigError
from nni_topo.recovery import distill, distillation
from nni_topo.recovery.lesson import Lesson
from nni_topo.recovery.outputs import are_tags, read_outputs, shared_blocks


def unit(output, _):
    return normalize(output, dim=1)


def by_hand(mine, theirs):
    """Return one minus the mean cosine, and five times the squared difference of all pairs' cosines."""
    mine, theirs = normalize(mine.double(), dim=1), normalize(theirs.double(), dim=1)
    count = len(mine)
    pairs = [(float(mine[a] @ mine[b]) - float(theirs[a] @ theirs[b])) ** 2 for a in range(count) for b in range(count)]
    return 1.0 - float((mine * theirs).sum(1).mean()) + 5.0 * sum(pairs) / count**2


def test_vectors_of_length_one_are_compared_by_their_cosines():
    dense, original = pair()
    held = inputs(16, seed=5)
    found = distillation(dense, original, batches(), held_out=[held], outputs=unit, steps=60, lr=0.01)
    assert found.objective == "cosine"
    with torch.no_grad():
        assert found.loss_before == pytest.approx(by_hand(dense(held), original(held)), rel=1e-4)
        assert found.loss_after == pytest.approx(by_hand(found.model(held), original(held)), rel=1e-4)
    assert found.loss_after < 0.7 * found.loss_before
    assert found.agreement_after != found.agreement_after  # NaN: there are no classes


def test_outputs_get_what_the_model_returned_and_the_batch():
    """Only the first two of four numbers count, of a tuple, and the batch is a mapping with more than the inputs."""
    dense, original = pair("tuple")
    seen = []

    def first_two(output, batch):
        seen.append(batch)
        return output[0][:, :2]

    given = [{"inputs": each} for each in batches()]
    found = distillation(dense, original, given, outputs=first_two, objective="squares", steps=150, lr=0.02)
    assert all(set(each) == {"inputs"} for each in seen)
    held = inputs(64, seed=7)
    with torch.no_grad():
        off = [(net(held)[0] - original(held)[0]).square().mean(0) for net in (dense, found.model)]
    assert off[1][:2].sum() < 0.3 * off[0][:2].sum()
    # What isn't read is not learned.
    assert off[1][2:].sum() > 0.5 * off[0][2:].sum()


class Unit(nn.Module):
    """Ends a network by vectors of length one."""

    def forward(self, inputs):
        return normalize(inputs, dim=1)


def test_a_model_that_gives_vectors_of_length_one_needs_no_outputs():
    torch.manual_seed(0)
    layers = [nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 6)]
    images = [torch.randn(256, 8, generator=torch.Generator().manual_seed(1))]
    knobs = {"budget": {"flops": 0.5}, "distill": {"steps": 60, "lr": 0.003}}
    small = nni_topo.shrink(nn.Sequential(*layers, Unit()), images, **knobs)
    other = nni_topo.shrink(nn.Sequential(*layers), images, outputs=unit, **knobs)
    assert small.report.distillation.objective == "cosine"
    assert small.report.distillation.loss_after == pytest.approx(other.report.distillation.loss_after, rel=1e-4)
    assert [stage.agreement != stage.agreement for stage in small.report.stages] == [True] * 4
    assert "agreement" not in str(small.report)
    found = nni_topo.shrink(nn.Sequential(*layers, Unit()), images, tolerance=0.5, distill=False)
    assert found.report.tolerance.measure == "distance"


@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        (normalize(torch.randn(16, 4, generator=torch.Generator().manual_seed(0))), "cosine"),
        (torch.tensor([[0.6, -0.8], [-1.0, 0.0]]).repeat(8, 1), "cosine"),
        (torch.tensor([[0.6, 0.7]]).repeat(16, 1), "kl"),
        (torch.eye(4).repeat(4, 1), "kl"),  # probabilities of a classifier that is sure
        (torch.eye(4).repeat(4, 1) * 2.0, "kl"),
        (torch.tensor([[1.0], [-1.0]]).repeat(8, 1), "squares"),  # a single number has no direction
        (normalize(torch.ones(16, 2, 4), dim=2), "squares"),
        ({"logits": -torch.eye(4).repeat(4, 1)}, "kl"),
        ((-torch.eye(4).repeat(4, 1), torch.zeros(16, 4)), "squares"),
    ],
)
def test_embeddings_are_told_by_their_length(rows, kind):
    assert read_outputs(rows, ((inputs(16),), {}), 16, None)[1] == kind


@pytest.mark.parametrize(
    ("row", "samples", "expected"),
    [
        ([0.0, 0.5, 0.9], 8, True),  # a tag that is certainly absent
        ([0.3, 0.5, 1.0], 8, True),
        ([0.3, 0.5, 1.0], 7, False),  # few samples may lie in [0, 1] by chance
        ([0.0, 0.3, 0.7], 8, False),  # probabilities of classes
        ([0.0, 1.0, 1.0], 8, False),  # no number says that these are probabilities
        ([-0.1, 0.5, 0.9], 8, False),
        ([0.1, 0.5, 1.1], 8, False),
    ],
)
def test_tags_are_numbers_between_0_and_1_whose_rows_have_other_sums(row, samples, expected):
    rows = torch.tensor([row]).repeat(samples, 1)
    assert are_tags([rows]) is expected
    assert are_tags([rows[:3], rows[3:]]) is expected
    assert not are_tags([rows, rows[:, None]])


class Block(nn.Module):
    """A residual block, with a hidden layer of any width."""

    def __init__(self, width):
        super().__init__()
        self.expand, self.project = nn.Linear(8, width), nn.Linear(width, 8)

    def forward(self, states):
        return states + self.project(torch.relu(self.expand(states)))


class Stack(nn.Module):
    """Three blocks and a head that has two layers; padding is masked, if anything."""

    def __init__(self, width, head=8):
        super().__init__()
        torch.manual_seed(width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.heads = nn.Sequential(nn.Sequential(nn.Linear(8, head), nn.Linear(head, 3)))

    def forward(self, states, attention_mask=None):
        for block in self.blocks:
            states = block(states)
        return self.heads(states)


def test_blocks_are_found_and_their_outputs_learned():
    dense, original = Stack(4), Stack(16)
    states = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
    names = shared_blocks(original, dense, ((states[:1],), {}), (torch.device("cpu"), torch.float32))
    assert names == ["blocks.0", "blocks.1", "blocks.2", "heads.0"]
    plain, with_blocks = (
        distill(dense, original, [states], steps=200, lr=0.003, blocks=weight, objective="squares")
        for weight in (0.0, 2.0)
    )

    def off(net):
        with torch.no_grad():
            one, other = net.blocks[0](states), original.blocks[0](states)
        return float((one - other).square().mean())

    assert off(with_blocks) < 0.7 * off(plain)


def test_the_loss_of_blocks_is_a_share_of_their_variance_over_real_positions():
    dense, original = Stack(4), Stack(16)
    states = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(5) < torch.tensor([5, 4, 3, 5, 2, 1])[:, None]).long()
    call = ((), {"states": states, "attention_mask": mask})
    lesson = Lesson(original, dense, call, "squares", 2.0, blocks=3.0)
    real = mask.bool()
    with torch.no_grad():
        wanted = [original(states)]
        shares, mine, theirs = [], states, states
        for one, other in zip(dense.blocks, original.blocks, strict=True):
            mine, theirs = one(mine), other(theirs)
            shares.append((mine[real] - theirs[real]).square().mean() / theirs[real].var(0, correction=0).mean())
        mine, theirs = dense(states)[real], original(states)[real]
        shares.append((mine - theirs).square().mean() / theirs.var(0, correction=0).mean())
        plain = Lesson(original, dense, call, "squares", 2.0).objective(dense, call, wanted)
        found = lesson.objective(dense, call, wanted)
    assert float(found) == pytest.approx(float(plain + 3.0 * sum(shares) / 4), rel=1e-5)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"blocks": 1.0}, "blocks must be 0 where no block's output has the same shape in both models, got 1.0"),
        ({"outputs": "pooled"}, r"outputs must be a function of \(output, inputs\) or None, got 'pooled'"),
        ({"outputs": lambda output: output}, r"outputs must be a function of .* or None, got <lambda>\(output\)"),
        ({"objective": "cosine", "outputs": lambda output, _: output[:, None]}, "must have one vector for each sample"),
        ({"outputs": lambda output, _: output.sum()}, "outputs= returns must hold a floating tensor .*, got Tensor"),
        ({"outputs": lambda output, _: None}, "outputs= returns must hold a floating tensor .*, got NoneType"),
        ({"outputs": lambda output, _: output.expand(3, *output.shape)}, "if the samples are its second dimension"),
    ],
)
def test_bad_knobs_are_refused(knobs, message):
    dense, original = pair()
    with pytest.raises(ConfigError, match=message):
        distill(dense, original, batches(), **knobs)


class Several(nn.Module):
    """Returns scores of classes and other outputs, in a container of some kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.body = kind, nn.Linear(6, 12)
        self.head, self.boxes = nn.Linear(12, 3), nn.Linear(12, 4)

    def forward(self, x):
        hidden = self.body(x).relu()
        logits = self.head(hidden)
        if self.kind == "tensor":
            return logits
        boxes = self.boxes(hidden)
        if self.kind == "mapping":
            return {"logits": logits, "boxes": boxes, "more": (2.0 * boxes, None)}
        if self.kind == "data class":
            return Named(logits, boxes)
        return logits, boxes, torch.arange(3)


@dataclass
class Named:
    logits: torch.Tensor
    boxes: torch.Tensor


@pytest.mark.parametrize(
    ("kind", "compared", "left_out"),
    [
        ("mapping", ("logits",), ("boxes", "more[0]")),
        ("data class", ("logits",), ("boxes",)),
        ("tuple", ("output[0]", "output[1]"), ("output[2]",)),
        ("tensor", ("output",), ()),
    ],
)
@pytest.mark.quick_every(2)
def test_the_log_and_the_reports_name_the_outputs_that_are_compared_and_the_others(kind, compared, left_out, caplog):
    torch.manual_seed(0)
    model, images = Several(kind).eval(), [torch.randn(32, 6)]
    with caplog.at_level(logging.WARNING):
        small = nni_topo.shrink(model, images, {"params": 0.6}, distill={"steps": 2, "objective": "squares"})
    report = small.report
    assert report.outputs == (compared, left_out)
    assert (str(report.outputs) in repr(report)) is bool(left_out)
    assert (str(report.outputs) in caplog.text) is bool(left_out)
    assert all(name in str(report.outputs) for name in left_out)
    done = nni_topo.distillation(small, model, images, steps=2, objective="squares")
    assert done.outputs == (compared, left_out)
    assert (str(done.outputs) in repr(done)) is bool(left_out)
    all_of_them = nni_topo.shrink(model, images, {"params": 0.6}, distill=False, outputs=lambda output, _: output)
    assert all_of_them.report.outputs == ((), ())
