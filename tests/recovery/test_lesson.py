"""The images that distillation learns from, and those that judge."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from distill_nets import batches, divergence, inputs, pair
from torch import nn

import nni_topo
from nni_topo.errors import ConfigError, DataError
from nni_topo.recovery import distill, distillation, lesson
from nni_topo.recovery.lesson import Lesson


def test_augmented_views_are_answered_by_the_original():
    """Images that all lie on one side teach nothing of the other, unless they are turned."""
    dense, original = pair()
    sided = [inputs(512).abs()]
    other = -inputs(256, seed=1).abs()

    def turned(part):
        assert part.dim() == 2
        return torch.where(torch.rand(len(part), 1) < 0.5, part, -part)

    plain = distill(dense, original, sided, steps=300, lr=0.01)
    augmented = distill(dense, original, sided, steps=300, lr=0.01, augment=turned)
    assert divergence(augmented, original, other) < 0.5 * divergence(plain, original, other)


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e3])
@pytest.mark.quick_every(2)
def test_the_rate_suits_the_size_of_the_weights(scale):
    """Where inputs are thirty times as large, weights are small, and a high rate takes them far away."""
    _, original = pair()
    dense = copy.deepcopy(original)
    with torch.no_grad():
        dense.head.weight *= 1.1
        for net in (dense, original):
            net.first.weight /= scale
    images = [scale * part for part in batches(256)]
    known = {"steps": 200, "held_out": images[:2]}
    found = distillation(dense, original, images, **known)
    assert found.is_kept
    assert found.lr == {1.0: 6e-3, 30.0: 2e-3, 1e3: 6e-5}[scale]
    assert [each.is_taken for each in found.rates] == [False] * (len(found.rates) - 1) + [True]
    # A rate that was found is as good as the same rate given for the other steps, and enough time changes nothing.
    left = {**known, "steps": 200 - 10 * len(found.rates)}
    assert distillation(dense, original, images, lr=found.lr, **left).loss_after == found.loss_after
    assert distillation(dense, original, images, seconds=1000, **known).lr == found.lr


def test_half_of_the_images_are_blended_with_others_in_all_passes_but_the_first():
    dense, original = pair()
    seen = []
    original.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    # All are different, because equal ones stay together; 840 of them are learned from, in 14 batches.
    images = [torch.eye(6).repeat(160, 1) * torch.linspace(0.9, 1.0, 960)[:, None]]
    distill(dense, original, images, steps=14, lr=0.01)
    plain = torch.cat(seen)
    assert bool(((plain > 0).sum(1) == 1).all())
    distill(dense, original, images, steps=28, lr=0.01)
    view = torch.cat(seen)[2 * len(plain) :]
    assert view.shape == (840, 6)
    assert 0.9 - 1e-6 <= float(view.sum(1).min()) <= float(view.sum(1).max()) <= 1.0 + 1e-6
    parts = (view > 0).sum(1)
    assert set(parts.tolist()) == {1, 2}
    # Half of the images, but for the sixth of these that meet their like.
    assert float((parts == 2).float().mean()) == pytest.approx(0.5 * 5 / 6, abs=0.05)
    assert float(view[:, 0].unique().diff().max()) < 0.1


def test_answers_that_do_not_fit_into_memory_are_asked_for_again(monkeypatch):
    dense, original = pair()
    knobs = {"steps": 30, "lr": 6e-3}
    asked = []
    original.register_forward_pre_hook(lambda _, args: asked.append(len(args[0])))
    kept = distillation(dense, original, batches(), **knobs)
    few = sum(asked)
    monkeypatch.setattr(lesson, "free_memory_of", lambda device: 0)
    again = distillation(dense, original, batches(), **knobs)
    assert sum(asked) > 3 * few
    torch.testing.assert_close(again.model.state_dict(), kept.model.state_dict(), rtol=1e-4, atol=1e-5)
    assert again.loss_after == pytest.approx(kept.loss_after, rel=1e-3)
    monkeypatch.setattr(lesson, "free_memory_of", lambda device: 4 * 96 * 4 * 4)  # four times all answers
    asked.clear()
    distillation(dense, original, batches(), **knobs)
    assert sum(asked) == few


@pytest.mark.parametrize("kind", ["whole numbers", "two tensors", "one value"])
def test_what_is_not_one_tensor_of_images_is_not_blended(kind):
    class Reads(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, inputs, other=None):
            inputs = inputs.float() if other is None else inputs + other
            return self.net(inputs if inputs.dim() == 2 else inputs[:, None].expand(-1, 6))

    given = {
        "whole numbers": [(10 * inputs()).long()],
        "two tensors": [{"inputs": inputs(), "other": inputs(seed=1)}],
        "one value": [inputs()[:, 0]],
    }[kind]
    dense, original = (Reads(net) for net in pair())
    with_, without = (distill(dense, original, given, steps=10, blend=each) for each in (True, False))
    torch.testing.assert_close(with_.state_dict(), without.state_dict(), rtol=0, atol=0)
    assert not torch.equal(with_.net.head.weight, dense.net.head.weight)


def test_nothing_is_learned_from_images_held_out():
    dense, original = pair()
    knobs = {"steps": 40, "lr": 6e-3}
    nets = [distill(dense, original, batches(), held_out=[scale * inputs(40, seed=1)], **knobs) for scale in (1, 9)]
    assert torch.equal(nets[0].head.weight, nets[1].head.weight)
    assert not torch.equal(nets[0].head.weight, dense.head.weight)


def test_images_held_out_judge():
    dense, original = pair()
    judges = inputs(40, seed=1)
    found = distillation(dense, original, batches(), held_out=[judges[:30], judges[30:]], steps=40, seed=4)
    assert found.images == 136
    assert found.loss_before == pytest.approx(divergence(dense, original, judges), rel=1e-4)
    assert found.loss_after == pytest.approx(divergence(found.model, original, judges), rel=1e-4)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([inputs(1)], DataError, "at least two samples, one to judge by, got 1"),
        ([inputs(0)], DataError, "must hold inputs, got an empty one"),
        ([inputs(8) * math.nan], DataError, "must be finite .*got NaN"),
        ([torch.ones(4, 5)], DataError, "must fit the model"),
        (inputs(8), ConfigError, "iterable of batches, e.g. a list of tensors or a DataLoader, got one Tensor"),
    ],
)
def test_bad_images_are_refused(images, error, message):
    dense, original = pair()
    with pytest.raises(error, match=message):
        distill(dense, original, images)


def test_lists_of_images_as_detectors_take_them_are_refused_with_a_way_on():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, images):
            return [self.head(self.first(image[None]).mean((2, 3))) for image in images]

    net = Listed().eval()
    listed = [{"images": [torch.rand(3, 8, 8), torch.rand(3, 9, 8)]}]
    with pytest.raises(DataError, match="got a list, as detectors take it"):
        distill(copy.deepcopy(net), net, listed)


class WithAnchors(nn.Module):
    """Gives a tensor beside its answer that has as many rows whatever the number of samples."""

    def __init__(self, rows):
        super().__init__()
        self.first, self.head = nn.Linear(6, 12), nn.Linear(12, 4)
        self.anchors = nn.Parameter(torch.ones(rows, 3))

    def forward(self, states):
        return self.head(self.first(states).relu()), 2.0 * self.anchors


@pytest.mark.parametrize(
    ("rows", "outputs"),
    [
        (1, None),
        (64, None),
        (64, lambda output, inputs: output),
    ],
)
@pytest.mark.quick_every(2)
def test_a_tensor_that_is_as_long_as_a_batch_by_chance_is_not_an_output(rows, outputs):
    torch.manual_seed(0)
    original = WithAnchors(rows).eval()
    dense = copy.deepcopy(original)
    with torch.no_grad():
        dense.head.weight += 0.2
    found = distillation(dense, original, batches(256), steps=20, lr=2e-3, outputs=outputs)
    assert found.is_kept
    assert found.outputs.compared == (() if outputs else ("output[0]",))
    # The last batch has as many images as that tensor has rows.
    images = list(inputs(128 + rows).split(64))
    small = nni_topo.shrink(original, images, {"flops": 0.5}, distill={"steps": 20, "lr": 2e-3}, outputs=outputs)
    assert small.report.outputs.compared == (() if outputs else ("output[0]",))


class Scoring(nn.Linear):
    """Gives scores for each place."""

    def __init__(self, seed):
        torch.manual_seed(seed)
        super().__init__(3, 5)

    def forward(self, states, attention_mask=None):
        return {"logits": super().forward(states)}


@pytest.mark.parametrize("is_padded", [True, False])
@pytest.mark.parametrize("has_places", [True, False])
def test_losses_are_means_over_real_positions(is_padded, has_places):
    if is_padded and not has_places:
        return
    original, student = (Scoring(seed).double().eval() for seed in (0, 1))
    states = torch.randn(20, 4, 3, generator=torch.Generator().manual_seed(2)).double()
    mask = torch.ones(20, 4, dtype=torch.int64)
    states = states if has_places else states[:, 0]
    call = {"states": states}
    if is_padded:
        mask[::2, 2:] = 0
        call["attention_mask"] = mask

    def real(values):
        if not has_places:
            return values
        return values[mask.bool()] if is_padded else values.flatten(0, -2)

    found = Lesson(original, student, ((), call), "auto", 3.0)
    index = torch.arange(20)
    with torch.no_grad():
        given = original(states)["logits"]
        wanted, scores = real(given), real(student(states)["logits"])
    likely = (wanted / 3).softmax(1)
    loss = 9 * (likely * (likely.log() - (scores / 3).log_softmax(1))).sum(1).mean()
    variance = wanted if is_padded or not has_places else wanted.unflatten(0, (20, 4))
    distance = (scores - wanted).square().mean() / variance.var(0, correction=0).mean()
    judged = found.judge(student, index)
    assert found.objective_name == "kl"
    assert judged.loss == pytest.approx(float(loss), rel=1e-9)
    assert judged.distance == pytest.approx(float(distance))
    assert judged.agreement == pytest.approx(float((wanted.argmax(1) == scores.argmax(1)).double().mean()))
    constant = float(9 * (likely * (likely / likely.mean(0)).log()).sum(1).mean())
    assert found.loss_of_a_constant(index) == pytest.approx(constant)
    assert float(found.objective(student, ((), call), [given]).detach()) == pytest.approx(float(loss))
    found.split(index, index)
    expected = float(loss + constant * distance)
    assert float(found.objective(student, ((), call), [given]).detach()) == pytest.approx(expected)
