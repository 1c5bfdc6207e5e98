"""Distillation towards what is read of a model's output, and towards what its blocks put out."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from distill_nets import batches, inputs, pair
from sklearn.datasets import (
    load_breast_cancer,
    load_diabetes,
    load_digits,
    load_iris,
    load_linnerud,
    load_wine,
    make_regression,
)
from torch import nn
from torch.nn.functional import cross_entropy, interpolate, normalize, softmax

import nni_topo
from nni_topo.errors import ConfigError
from nni_topo.network.runtime.calibration import Calibration
from nni_topo.recovery import distill, distillation
from nni_topo.recovery.lesson import Lesson
from nni_topo.recovery.likeness import Answers
from nni_topo.recovery.outputs import shared_blocks


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


def read(model, images, **knobs):
    """Return what a model's outputs hold, and the sentence."""
    answers = Answers(model, Calibration(images), **knobs)
    return [(kind.holds, kind.form) for kind in answers.kinds], answers.read_as


class Given(nn.Module):
    """Returns what it gets; no operation says what it is."""

    def forward(self, given):
        return given * 1.0


@pytest.mark.parametrize(
    ("rows", "holds"),
    [
        (normalize(torch.randn(16, 4, generator=torch.Generator().manual_seed(0))), "vectors"),
        (torch.tensor([[0.6, -0.8], [-1.0, 0.0]]).repeat(8, 1), "vectors"),
        (torch.tensor([[0.6, 0.7]]).repeat(16, 1), "decisions"),
        (torch.eye(4).repeat(4, 1), "classes"),  # probabilities of a classifier that is sure
        (torch.eye(4).repeat(4, 1) * 2.0, "classes"),
        (torch.tensor([[1.0], [-1.0]]).repeat(8, 1), "numbers"),  # a single number has no direction
        (normalize(torch.arange(-64.0, 64.0).reshape(16, 2, 4), dim=2), "vectors"),
        (torch.tensor([[0.0, 0.3, 0.7]]).repeat(8, 1), "classes"),
        (torch.tensor([[0.3, 0.5, 1.0]]).repeat(7, 1), "classes"),  # few samples may lie in [0, 1] by chance
        (torch.tensor([[-0.1, 0.5, 0.9]]).repeat(8, 1), "classes"),
        (torch.tensor([[0.1, 0.5, 1.1]]).repeat(8, 1), "classes"),
        (torch.tensor([[0.0, 1.0, 1.0]]).repeat(8, 1), "classes"),  # no number says that these are probabilities
    ],
)
def test_without_an_operation_values_say_what_outputs_hold(rows, holds):
    for size in (len(rows), 3):
        assert read(Given(), list(rows.split(size)))[0][0][0] == holds


@pytest.mark.parametrize(("ratio", "holds"), [(0.1, "classes"), (0.58, "classes"), (0.64, "numbers"), (3.0, "numbers")])
def test_scores_of_classes_may_rise_together_as_those_of_a_recurrent_classifier_do(ratio, holds):
    """Of k outputs with deviation 2 and a common part of variance c the sum varies k c / (4 + c) times as much."""
    generator = torch.Generator().manual_seed(0)
    apart = torch.randn(4096, 10, generator=generator)
    apart = apart - apart.mean(1, keepdim=True)
    apart = 2.0 * apart / apart.std(0, keepdim=True)
    common = torch.randn(4096, 1, generator=generator) * (4.0 * ratio / (10.0 - ratio)) ** 0.5
    assert read(Given(), list((apart + common).split(512)))[0][0][0] == holds


class Ends(nn.Module):
    """A layer, and a function of its output."""

    def __init__(self, head, end):
        super().__init__()
        self.head, self.end = head, end

    def forward(self, inputs):
        return self.end(self.head(inputs))


def layer(out_features=6):
    torch.manual_seed(0)
    return nn.Linear(8, out_features)


def convolution(channels=5):
    torch.manual_seed(0)
    return nn.Conv2d(3, channels, 3)


ROWS = torch.randn(48, 8, generator=torch.Generator().manual_seed(3))
IMAGES = torch.randn(24, 3, 9, 9, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("head", "end", "images", "kinds", "sentence"),
    [
        (layer(), lambda x: x.softmax(1), ROWS, [("classes", "probabilities")], "of 6 classes (softmax)"),
        (layer(), lambda x: softmax(input=x, dim=-1), ROWS, [("classes", "probabilities")], "of 6 classes (softmax)"),
        (layer(), lambda x: x.log_softmax(1), ROWS, [("classes", "log-probabilities")], "of 6 classes (log_softmax)"),
        (layer(), lambda x: x.softmax(1).log(), ROWS, [("classes", "log-probabilities")], "of 6 classes"),
        (
            layer(),
            lambda x: x.softmax(1) / 2 + x.softmax(1) / 2,
            ROWS,
            [("classes", "probabilities")],
            "by their values",
        ),
        (layer(24), lambda x: x.view(-1, 4, 6).softmax(2), ROWS, [("classes", "probabilities")], "6 classes by place"),
        (layer(24), lambda x: x.view(-1, 4, 6).softmax(1), ROWS, [("classes", "probabilities")], "4 classes by place"),
        (convolution(), lambda x: x.softmax(1), IMAGES, [("classes", "probabilities")], "5 classes by place"),
        (
            convolution(),
            lambda x: interpolate(x.softmax(1), scale_factor=2, mode="bilinear").permute(0, 2, 3, 1).flatten(1, 2),
            IMAGES,
            [("classes", "probabilities")],
            "5 classes by place",
        ),
        (
            convolution(7),
            lambda x: {"logits": x},
            IMAGES,
            [("classes", "scores")],
            "7 classes by place (called logits)",
        ),
        (layer(), lambda x: x.softmax(1)[:, 1], ROWS, [("decisions", "probabilities")], "taken at 0.5 (of softmax)"),
        (layer(), torch.sigmoid, ROWS, [("decisions", "probabilities")], "taken at 0.5 (sigmoid)"),
        (layer(24), lambda x: x.view(-1, 4, 6).sigmoid_(), ROWS, [("decisions", "probabilities")], "(sigmoid)"),
        (layer(), normalize, ROWS, [("vectors", "scores")], "vectors of length one with 6 numbers (normalize)"),
        (layer(), torch.tanh, ROWS, [("numbers", "scores")], "numbers (tanh)"),
        (layer(1), lambda x: x, ROWS, [("numbers", "scores")], "outputs: numbers"),
        (convolution(), lambda x: x, IMAGES, [("numbers", "scores")], "outputs: numbers"),
        (layer(), lambda x: x, ROWS, [("classes", "scores")], "scores of 6 classes (last layer `head`, assumed"),
        (
            layer(),
            lambda x: {"tags": x[:, :2].sigmoid(), "kind": x[:, 2:5].softmax(1), "size": x[:, 5:]},
            ROWS,
            [("decisions", "probabilities"), ("classes", "probabilities"), ("numbers", "scores")],
            "kind: probabilities of 3 classes (softmax)",
        ),
    ],
)
def test_the_last_operation_says_what_outputs_hold(head, end, images, kinds, sentence):
    found, words = read(Ends(head, end), list(images.split(16)))
    assert found == kinds
    assert sentence in words
    assert ("agreement" in words) is any(holds in ("classes", "decisions") for holds, _ in kinds)


def test_a_layer_that_ends_in_softmax_is_named():
    _, words = read(nn.Sequential(layer(), nn.Sequential(nn.Softmax(1))), [ROWS])
    assert words.startswith("outputs: probabilities of 6 classes (softmax in `1.0`)")


def test_objective_overrides_what_outputs_hold():
    for objective, holds in (("kl", "classes"), ("binary", "decisions"), ("squares", "numbers"), ("cosine", "vectors")):
        assert read(layer(), [ROWS], objective=objective)[0][0][0] == holds
    tall = Answers(convolution(), Calibration([IMAGES]), objective="kl")
    assert tall.kinds[0].axis == -3  # the channels of the convolution that made them


def test_one_score_at_each_place_is_a_decision_if_its_values_are():
    sure = 6.0 * torch.sign(torch.randn(32, 1, 12, generator=torch.Generator().manual_seed(0)))
    for scale, holds in ((1.0, "decisions"), (0.05, "numbers")):
        head = nn.Conv1d(1, 1, 1)
        nn.init.constant_(head.weight, scale)
        nn.init.zeros_(head.bias)
        found, _ = read(Ends(head, lambda x: x.squeeze(1)), [sure])
        assert found == [(holds, "scores")]


def kl_by_hand(mine, theirs, axis):
    return float((theirs * (theirs.log() - mine.log())).sum(axis).mean())


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        (lambda x: x.softmax(1), lambda mine, theirs: kl_by_hand(mine, theirs, 1)),
        (lambda x: x.log_softmax(1), lambda mine, theirs: kl_by_hand(mine.exp(), theirs.exp(), 1)),
        (lambda x: x.view(-1, 4, 2).softmax(1), lambda mine, theirs: kl_by_hand(mine, theirs, 1)),
        (
            torch.sigmoid,
            lambda mine, theirs: float(
                (theirs * (theirs / mine).log() + (1 - theirs) * ((1 - theirs) / (1 - mine)).log()).mean()
            ),
        ),
        (
            lambda x: (x[:, :3].softmax(1), x[:, 3:].tanh()),
            lambda mine, theirs: (
                (
                    kl_by_hand(mine[0], theirs[0], 1)
                    + float((mine[1] - theirs[1]).square().mean() / theirs[1].var(0, correction=0).mean())
                )
                / 2
            ),
        ),
    ],
)
def test_the_loss_follows_from_what_outputs_hold(end, expected):
    torch.manual_seed(1)
    unpruned, dense = Ends(nn.Linear(8, 8), end), Ends(nn.Linear(8, 8), end)
    index = torch.arange(len(ROWS))
    judged = Lesson(unpruned, dense, ((ROWS,), {}), "auto", 1.0).judge(dense, index)
    with torch.no_grad():
        assert judged.loss == pytest.approx(expected(dense(ROWS), unpruned(ROWS)), rel=1e-4)


@pytest.mark.parametrize(
    ("end", "answers"),
    [
        (lambda x: x.softmax(1), lambda x: x.argmax(1)),
        (lambda x: x.view(-1, 4, 2).softmax(1), lambda x: x.argmax(1)),
        (torch.sigmoid, lambda x: x > 0.5),
    ],
)
def test_agreement_follows_from_what_outputs_hold(end, answers):
    torch.manual_seed(1)
    unpruned, dense = Ends(nn.Linear(8, 8), end), Ends(nn.Linear(8, 8), end)
    (likeness,) = Answers(unpruned, Calibration([ROWS])).likenesses(dense)
    with torch.no_grad():
        expected = float((answers(dense(ROWS)) == answers(unpruned(ROWS))).double().mean())
    assert 0.0 < expected < 1.0
    assert likeness.agreement.value == pytest.approx(expected)
    assert Lesson(unpruned, dense, ((ROWS,), {}), "auto", 2.0).judge(
        dense, torch.arange(len(ROWS))
    ).agreement == pytest.approx(expected)


def fitted(inputs, targets, loss):
    """Return a small network that is trained on all samples, and its inputs."""
    torch.manual_seed(0)
    inputs = torch.tensor(inputs, dtype=torch.float32)
    inputs = (inputs - inputs.mean(0)) / inputs.std(0).clamp_min(1e-6)
    outputs = targets.shape[1] if targets.dim() > 1 else int(targets.max()) + 1
    net = nn.Sequential(nn.Linear(inputs.shape[1], 32), nn.ReLU(), nn.Linear(32, outputs))
    if targets.dim() > 1:
        with torch.no_grad():
            net[-1].bias.copy_(targets.mean(0))
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        loss(net(inputs), targets).backward()
        optimizer.step()
    return net.eval(), inputs


def regressions():
    """Ten regressions: of two data sets of measurements, of pixels, and synthetic ones, some of them standardized."""
    linnerud = load_linnerud()
    features, progress = load_diabetes(return_X_y=True)
    iris, wine = load_iris().data, load_wine().data
    data = {
        "linnerud": (linnerud.data, linnerud.target),
        "diabetes": (features, np.c_[progress, 100.0 * features[:, 2:4]]),
        "iris": (iris[:, :2], iris[:, 2:]),
        "wine": (wine[:, :8], wine[:, 9:12]),
    }
    for count in (2, 3, 10):
        data[f"synthetic {count}"] = make_regression(400, 12, n_informative=8, n_targets=count, random_state=count)
    for name in ("linnerud", "diabetes", "synthetic 3"):
        inputs, targets = data[name]
        data[f"{name}, standardized"] = inputs, (targets - targets.mean(0)) / targets.std(0)
    return data


@pytest.mark.parametrize("name", sorted(regressions()))
def test_regressors_give_numbers(name):
    inputs, targets = regressions()[name]
    targets = torch.tensor(targets, dtype=torch.float32)
    net, images = fitted(inputs, targets, lambda y, t: ((y - t).square() / t.var(0)).mean())
    assert read(net, [images])[0] == [("numbers", "scores")]


@pytest.mark.parametrize("load", [load_iris, load_wine, load_digits, load_breast_cancer])
def test_classifiers_give_classes_before_and_after_training(load):
    data = load()
    net, images = fitted(data.data, torch.tensor(data.target), cross_entropy)
    assert read(net, [images])[0] == [("classes", "scores")]
    fresh = nn.Sequential(nn.Linear(images.shape[1], 32), nn.ReLU(), nn.Linear(32, 3))
    assert read(fresh, [images])[0] == [("classes", "scores")]


@pytest.mark.parametrize("is_by_place", [False, True])
def test_a_hundred_classes_whose_scores_rise_together_are_classes(is_by_place):
    """Adam lets the scores of many classes rise and fall together, which those of few or of SGD don't."""
    data, draw = load_digits(), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    images, labels = torch.tensor(data.data / 16.0, dtype=torch.float32), torch.tensor(data.target)
    one, other = torch.randint(len(images), (2, 6000), generator=draw)
    inputs, targets = torch.cat([images[one], images[other]], 1), labels[one] * 10 + labels[other]
    net = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 100))
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for rows in (rows for _ in range(6) for rows in torch.randperm(6000, generator=draw).split(64)):
        optimizer.zero_grad()
        cross_entropy(net(inputs[rows]), targets[rows]).backward()
        optimizer.step()
    net.eval()
    with torch.no_grad():
        scores = net(inputs[:512])
    assert float(scores.sum(1).var() / scores.var(0).sum()) > 1.0
    shown = inputs[:512].unflatten(0, (64, 8)) if is_by_place else inputs[:512]
    assert read(net, list(shown.split(32)))[0] == [("classes", "scores")]


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
