from __future__ import annotations

import copy
import logging
import math

import pytest
import torch
from distill_nets import Narrow, batches, divergence, inputs, pair
from torch import nn

import nni_topo
from nni_topo.errors import ConfigError, GradientError, SpeedupError
from nni_topo.recovery import distill, distillation, distilling, recalibrate_batch_norm
from nni_topo.recovery.held_out import is_solved_on
from nni_topo.recovery.rates import RATES
from nni_topo.testing import toy_images, toy_model


def test_loss_is_the_divergence_of_softened_probabilities_on_images_held_out():
    dense, original = pair()
    found = distillation(dense, original, batches(64), steps=40, temperature=3.0, seed=4)
    assert (found.images, found.steps, found.objective, found.is_kept) == (64, 37, "kl", True)
    held = inputs(64)[7::8]
    assert found.loss_before == pytest.approx(divergence(dense, original, held, 3.0), rel=1e-4)
    assert found.loss_after == pytest.approx(divergence(found.model, original, held, 3.0), rel=1e-4)
    assert found.loss_after < found.loss_before
    with torch.no_grad():
        mine, theirs, given = (net.eval()(held).argmax(1) for net in (found.model, original, dense))
    assert found.agreement_after == float((mine == theirs).double().mean())
    assert found.agreement_before == float((given == theirs).double().mean())
    assert found.seconds > 0.0


@pytest.mark.parametrize(
    ("form", "objective", "expected"),
    [
        ("named", "auto", "kl"),
        ("tokens", "auto", "squares"),
        ("tokens", "kl", "kl"),
        ("tuple", "auto", "squares"),
        ("dict", "auto", "squares"),
    ],
)
@pytest.mark.quick_every(2)
def test_outputs_of_any_form_are_met(form, objective, expected):
    dense, original = pair(form)
    found = distillation(dense, original, batches(), objective=objective, steps=150, lr=0.01)
    assert found.objective == expected
    assert found.is_kept
    assert found.loss_after < 0.7 * found.loss_before


def test_squares_are_shares_of_each_outputs_variance():
    dense, original = pair("tuple")
    held = inputs(96)[7::8]
    with torch.no_grad():
        whole = original(held)
        shares = [
            (mine - theirs).square().mean() / each.var(0, correction=0).mean()
            for mine, theirs, each in zip(dense(held), original(held), whole, strict=True)
        ]
    found = distillation(dense, original, batches(), steps=1)
    assert found.loss_before == pytest.approx(float(sum(shares) / 2), rel=1e-4)


def test_nothing_that_is_given_changes_and_modes_stay():
    dense, original = pair(norm=True)
    dense.train()
    dense.drop.eval()
    original.head.train()
    states = [copy.deepcopy(net.state_dict()) for net in (dense, original)]
    random = torch.get_rng_state()
    with torch.no_grad():
        added = {"augment": lambda part: part + torch.randn_like(part)}
        found = distill(dense, original, batches(600), steps=40, **added)
    assert torch.equal(torch.get_rng_state(), random)
    for net, state in zip((dense, original), states, strict=True):
        torch.testing.assert_close(net.state_dict(), state, rtol=0, atol=0)
    modes = {name: module.training for name, module in found.named_modules()}
    assert modes == {name: module.training for name, module in dense.named_modules()}
    assert original.head.training
    assert not original.first.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in found.parameters())
    assert not torch.equal(found.head.weight, dense.head.weight)


def test_same_seed_same_result():
    dense, original = pair(norm=True)

    def learned(seed):
        torch.manual_seed(torch.seed())
        return distill(dense, original, batches(600), steps=30, seed=seed, augment=torch.nn.Dropout(0.1)).state_dict()

    torch.testing.assert_close(learned(1), learned(1), rtol=0, atol=0)
    assert not torch.equal(learned(1)["head.weight"], learned(2)["head.weight"])


def test_batch_norms_learn_from_their_batches_where_images_suffice():
    dense, original = pair(norm=True)
    few, many = (distill(dense, original, batches(count), steps=100) for count in (128, 600))
    assert torch.equal(few.norm.running_mean, dense.norm.running_mean)
    assert not torch.allclose(many.norm.running_mean, dense.norm.running_mean, atol=1e-3)


@pytest.mark.parametrize("is_out_of_date", [False, True])
def test_batch_norms_have_the_statistics_that_are_better_on_held_out_images(is_out_of_date):
    """Those of the steps, or those of all images as they are."""
    dense, original = pair(norm=True)
    if is_out_of_date:  # the steps hardly change statistics that fit no image
        dense.norm.momentum = 1e-4
        dense.norm.running_mean += 2.0
    shift = 0.0 if is_out_of_date else 1.0  # the steps see images like the held-out ones, the images as they are differ
    held = inputs(75, seed=1) + shift
    found = distillation(
        dense, original, batches(600), held_out=[held], augment=lambda part: part + shift, steps=200, lr=0.03
    )
    measured = recalibrate_batch_norm(found.model, batches(600))
    loss = divergence(measured, original, held)
    assert found.is_kept
    assert found.loss_after == pytest.approx(loss, rel=1e-3) if is_out_of_date else found.loss_after < loss / 2


def test_what_got_worse_is_left_out(caplog):
    dense, original = pair()
    near = distill(dense, original, batches(), steps=100)
    with caplog.at_level(logging.WARNING):
        found = distillation(near, original, batches(), steps=3, lr=10.0)
    assert not found.is_kept
    assert not found.loss_after < found.loss_before
    torch.testing.assert_close(found.model.state_dict(), near.state_dict(), rtol=0, atol=0)
    assert "distillation is discarded" in caplog.text


def fragile() -> tuple[nn.Module, nn.Module, list[torch.Tensor]]:
    """Inputs are so large and weights so small that each step is many times a weight."""
    dense, original = pair()
    with torch.no_grad():
        for net in (dense, original):
            net.first.weight /= 1e7
    return dense, original, [1e7 * part for part in batches()]


def test_where_every_rate_breaks_the_network_no_step_is_taken(caplog):
    dense, original, images = fragile()
    found = distillation(dense, original, images, steps=600, blend=False)
    assert math.isnan(found.lr)
    assert (found.steps, found.is_kept, found.curve) == (0, False, ())
    assert [(each.lr, each.steps, each.is_taken) for each in found.rates] == [(lr, 18, False) for lr in RATES]
    assert not found.is_out_of_time
    assert "No step was taken" in caplog.text
    torch.testing.assert_close(found.model.state_dict(), dense.state_dict(), rtol=0.0, atol=0.0)


def test_a_rate_that_is_asked_for_is_given_up_where_held_out_loss_grows(caplog):
    dense, original, images = fragile()
    with caplog.at_level("INFO", "nni_topo.recovery.course"):
        high = distillation(dense, original, images, steps=600, lr=0.05, blend=False)
    assert "learning rate 0.05 is given up after 72 of 600 steps" in caplog.text
    assert (high.is_kept, high.steps, high.rates) == (False, 72, ())
    # one that lowers the loss all the time has all of its steps
    low = distillation(*pair(), batches(), steps=100, lr=1e-3, blend=False)
    assert low.is_kept
    assert low.steps == 100


class Drifting(Narrow):
    """After so many passes with gradients, its weights move away at each of them."""

    since, by, passes = 0, 0.0, 0

    def forward(self, inputs):
        if torch.is_grad_enabled():
            self.passes += 1
            if self.passes > self.since:
                with torch.no_grad():
                    self.head.weight[0] += self.by
        return super().forward(inputs)


def drifting(since, by):
    dense, original = pair()
    made = Drifting(4)
    made.load_state_dict(dense.state_dict())
    made.since, made.by = since, by
    return made.eval(), original


def test_weights_from_before_are_kept_where_those_at_the_end_are_worse():
    found = distillation(*drifting(60, 0.5), batches(), steps=100, lr=1e-2, blend=False)
    assert found.is_kept
    assert found.weights_of == 60
    assert found.steps > 60
    best = next(each for each in found.curve if each.step == 60)
    assert found.loss_after == pytest.approx(best.loss)
    assert found.loss_after < found.loss_before < found.curve[-1].loss
    assert "; the weights are those after 60 steps, because those at the end are no better" in str(found)


def test_a_distillation_that_gains_nothing_ends_after_a_fifth_and_says_so(caplog):
    found = distillation(*drifting(0, 0.004), batches(), steps=600, lr=1e-4, blend=False)
    assert (found.gains_nothing, found.is_kept, found.steps, found.weights_of) == (True, False, 180, 0)
    assert "It took 180 of at most 600 steps at a learning rate of up to 0.0001, and ended early because" in caplog.text


def test_nothing_is_learned_where_nothing_is_left_to_learn(caplog):
    _, original = pair()
    found = distillation(copy.deepcopy(original), original, batches(), lr=0.01)
    assert (found.steps, found.is_kept, found.rates, found.is_out_of_time) == (0, False, (), False)
    assert "No step was taken: there is nothing to learn" in str(found.verdict)
    assert not caplog.records


def test_norms_keep_their_statistics_where_those_of_batches_break_the_network():
    """A network that was trained with fixed statistics, which aren't those of the images."""
    _, original = pair(norm=True)
    with torch.no_grad():
        original.norm.running_mean.fill_(1.0)
        original.norm.running_var.fill_(9.0)
        dense = copy.deepcopy(original)
        dense.head.bias += torch.tensor([0.05, -0.05, 0.1, 0.0])
    images = batches(600)
    found = distillation(dense, original, images, objective="squares", steps=60, blend=False)
    assert found.rates[-1].is_taken
    given = distillation(dense, original, images, objective="squares", steps=found.steps, lr=found.lr, blend=False)
    assert given.loss_after == found.loss_after
    for each in (found, given):
        assert each.is_kept
        assert torch.equal(each.model.norm.running_mean, dense.norm.running_mean)


def test_no_rate_is_tried_where_time_allows_no_steps():
    dense, original = pair()
    found = distillation(dense, original, batches(), seconds=1e-3)
    assert (found.steps, found.rates, found.is_kept) == (0, (), False)
    assert "No step was taken: seconds= allows too few" in str(found.verdict)


class Choosy(Narrow):
    """Runs on 32 samples only."""

    def forward(self, inputs):
        if len(inputs) != 32:
            raise ValueError(f"there must be 32, got {len(inputs)}")
        return super().forward(inputs)


def test_models_that_run_on_some_numbers_of_samples_only_need_two_batches():
    dense, original = pair()
    choosy = Choosy(16).eval()
    for given in ((dense, choosy), (choosy, original)):
        with pytest.raises(ConfigError, match=r"at least two batches.*got 1: .*raised ValueError"):
            distill(*given, batches()[:1])
        found = distillation(*given, batches(), steps=10, lr=1e-3)
        assert (found.images, found.held_out) == (96, 32)
    with pytest.raises(ConfigError, match=r"of 32 samples it got 2 and raised ValueError"):
        nni_topo.shrink(choosy, batches()[:1], {"flops": 0.5}, evaluate=lambda net: pytest.fail("it ran"))


def test_the_curve_is_the_held_out_loss_along_the_steps():
    dense, original = pair()
    found = distillation(dense, original, batches(), steps=100, lr=1e-3, blend=False)
    assert [each.step for each in found.curve] == list(range(4, 101, 4))
    assert found.curve[-1].loss == found.loss_after
    assert [each.lr for each in found.curve[:4]] == pytest.approx([3e-4, 7e-4, 1e-3, 1e-3])
    assert found.curve[-1].lr < 1e-4
    assert "It took 100 of at most 100 steps" in str(found.verdict)


def test_masked_channels_and_single_weights_stay_zero(lively):
    model, images = lively(toy_model()).eval(), toy_images(64)
    masks = {
        "stem": {"weight": torch.ones_like(model.stem.weight)},
        "hidden": {"weight": (model.hidden.weight > 0) * 1.0},
    }
    masks["stem"]["weight"][[1, 5]] = 0
    masked = nni_topo.masked_model(model, images[:2], masks)
    found = distillation(masked, model, images.split(32), steps=30, lr=0.01)
    assert found.is_kept
    for name, value in masked.named_parameters():
        learned = found.model.get_parameter(name)
        assert torch.equal(learned[value == 0], value[value == 0])
        assert not torch.equal(learned, value)


def test_half_precision_learns_in_single_and_stays_half():
    dense, original = (net.bfloat16() for net in pair())
    found = distillation(dense, original, [part.bfloat16() for part in batches()], steps=100)
    assert {p.dtype for p in found.model.parameters()} == {torch.bfloat16}
    assert found.is_kept


def test_frozen_parameters_stay():
    dense, original = pair()
    dense.first.requires_grad_(False)
    found = distill(dense, original, batches(), steps=10)
    assert torch.equal(found.first.weight, dense.first.weight)
    assert not found.first.weight.requires_grad
    assert not torch.equal(found.head.weight, dense.head.weight)


def test_a_network_that_is_frozen_as_a_whole_learns_and_stays_frozen():
    dense, original = pair()
    free = distill(dense, original, batches(), steps=10, lr=1e-3)
    found = distillation(dense.requires_grad_(False), original, batches(), steps=10, lr=1e-3)
    assert found.is_kept
    assert not any(parameter.requires_grad for parameter in (*found.model.parameters(), *dense.parameters()))
    for mine, its in zip(found.model.parameters(), free.parameters(), strict=True):
        assert torch.equal(mine, its)


class Wrapped(torch.nn.Module):
    """A network, and what is done with its inputs or outputs."""

    def __init__(self, inner, work):
        super().__init__()
        self.inner, self.work = inner, work

    def forward(self, x):
        return self.work(self.inner, x)


def without_gradients(inner, x):
    with torch.no_grad():
        return inner(x)


def detached(inner, x):
    return inner(x).detach()


def overwritten(inner, x):
    given = inner(x)
    found = given.exp()
    return found + found.sigmoid().mul_(2.0) if found.add_(1.0) is found else given


@pytest.mark.parametrize("work", [without_gradients, detached, overwritten])
def test_networks_without_gradients_are_refused_before_anything_is_learned(work):
    dense, original = pair()
    wrapped = Wrapped(dense, work), Wrapped(original, work)
    with pytest.raises(GradientError, match="a network that is distilled must compute gradients, got"):
        distill(*wrapped, batches())
    assert all(parameter.grad is None for parameter in wrapped[0].parameters())


def test_a_network_without_parameters_is_refused():
    with pytest.raises(ConfigError, match=r"a model must have floating parameters, got none \(dense\)"):
        distill(torch.nn.Flatten(), torch.nn.Flatten(), [torch.rand(16, 3)])


BAD_VIEWS = [
    (lambda part: part[:1], r"as many samples as it gets, 2, got Tensor .*\(augment\)"),
    (lambda _: None, r"the same structure .* got NoneType .*\(augment\)"),
    (lambda part: part / 0.0, r"must return finite values, .*\(augment\)"),
    (lambda part: part.double(), r"must return inputs that fit the model, .*\(augment\)"),
    (lambda part: {"x": part}, r"got dict .* for Tensor .*\(augment\)"),
]


@pytest.mark.parametrize(("work", "message"), BAD_VIEWS)
def test_what_augment_returns_is_looked_at_before_anything_is_learned(work, message):
    dense, original = pair()
    calls = []

    def augment(part):
        calls.append(len(part))
        return work(part)

    with pytest.raises(ConfigError, match=message):
        distill(dense, original, batches(600), augment=augment)
    assert calls == [2]


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"objective": "labels"}, "objective must be a known name, got 'labels'"),
        ({"temperature": 0.0}, "temperature must be above 0 and finite, got 0.0"),
        ({"precision": "half"}, r"precision must be a known name, got 'half'; known: bfloat16, float32 \(distill\)"),
        ({"augment": 5}, r"augment must be a function or None, got 5 \(distill\)"),
    ],
)
def test_bad_knobs_are_refused(knobs, message):
    dense, original = pair()
    with pytest.raises(ConfigError, match=message):
        distill(dense, original, batches(), **knobs)


def test_models_that_do_not_fit_each_other_are_refused():
    _, original = pair()
    for dense in (nn.Linear(6, 5), Narrow(4, "tuple"), Narrow(4, "tokens")):
        with pytest.raises(ConfigError, match=r"must give outputs of the same shapes, got .* \(dense\)"):
            distill(dense, original, batches())
    with pytest.raises(ConfigError, match="must hold a floating tensor with an entry per sample, got Tensor"):
        distill(nn.Sequential(nn.Linear(6, 4), Sign()), nn.Sequential(nn.Linear(6, 4), Sign()), batches())
    wrapped = toy_model()
    nni_topo.create_pruner("l1", wrapped, [{"op_names": ["inner"], "sparse_ratio": 0.5}])
    with pytest.raises(SpeedupError, match="unwrap_model"):
        distill(wrapped, toy_model(), [toy_images(8)])


class Sign(nn.Module):
    def forward(self, inputs):
        return inputs > 0


class ScoresMasked(nn.Module):
    """Masks the scores of a class, for all samples or by the sample."""

    def __init__(self, net, by_sample):
        super().__init__()
        self.net, self.by_sample = net, by_sample

    def forward(self, inputs):
        is_masked = inputs[:, 0] > 0 if self.by_sample else torch.ones_like(inputs[:, 0], dtype=torch.bool)
        found = self.net(inputs)
        return torch.cat([found[:, :3], found[:, 3:].masked_fill(is_masked[:, None], -math.inf)], 1)


@pytest.mark.parametrize("by_sample", [False, True])
@pytest.mark.parametrize("objective", ["kl", "squares"])
@pytest.mark.quick_every(2)
def test_masked_scores_have_no_part_in_the_loss(objective, by_sample):
    dense, original = (ScoresMasked(net, by_sample) for net in pair())
    found = distillation(dense, original, batches(256), objective=objective, steps=100)
    assert found.is_kept
    assert found.loss_after < 0.8 * found.loss_before
    assert 0.0 < found.distance_after < found.distance_before
    for each in found.model.parameters():
        assert bool(each.isfinite().all())


def test_embeddings_with_sparse_gradients_learn_and_stay_as_they_are():
    def words(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.EmbeddingBag(20, 6, sparse=True), nn.Linear(6, 4)).eval()

    texts = [torch.randint(0, 20, (96, 5), generator=torch.Generator().manual_seed(0))]
    dense, original = words(0), words(1)
    found = distillation(dense, original, texts, steps=40, lr=6e-3)
    assert found.is_kept
    assert not torch.equal(found.model[0].weight, dense[0].weight)
    assert (found.model[0].sparse, dense[0].sparse) == (True, True)


@pytest.mark.parametrize(("count", "size", "steps"), [(3840, 64, 600), (3841, 64, 610), (61, 1, 610), (0, 1, 600)])
def test_a_course_has_ten_passes_or_six_hundred_steps(count, size, steps):
    assert distilling.course_length(count, size) == steps


class Single(Narrow):
    """Doesn't run under autocast."""

    def forward(self, inputs):
        if torch.is_autocast_enabled("cpu"):
            raise RuntimeError("not under autocast")
        return super().forward(inputs)


def test_a_network_that_does_not_run_in_bfloat16_is_refused_before_there_is_a_smaller_model():
    model = Single(16).eval()
    with pytest.raises(ConfigError, match="not under autocast"):
        distillation(Single(4).eval(), model, batches(), steps=2, precision="bfloat16")
    knobs = {"evaluate": lambda net: pytest.fail("it ran"), "distill": {"precision": "bfloat16"}}
    with pytest.raises(ConfigError, match="not under autocast"):
        nni_topo.shrink(model, batches(), {"flops": 0.5}, **knobs)


def test_while_learning_goes_on_256_of_the_held_out_images_are_looked_at():
    dense, original = pair()
    judges = inputs(300, seed=1)
    drawn = torch.randperm(300, generator=torch.Generator().manual_seed(2))
    found = distillation(dense, original, batches(), held_out=[judges], steps=10, lr=1e-3, seed=2)
    assert found.is_kept
    assert found.held_out == 300
    assert found.curve[-1].loss == pytest.approx(divergence(found.model, original, judges[drawn[:256]]), rel=1e-4)
    # Where the others are far away, the loss before the first step is that of those that are looked at, too.
    judges[drawn[256:]] *= 1000.0
    broken = distillation(dense, original, batches(), held_out=[judges], steps=100, lr=3.0, seed=2)
    assert broken.loss_before > 100.0 * divergence(dense, original, judges[drawn[:256]])
    assert broken.steps == 52


class Taking(Narrow):
    """Takes a second for a pass with gradients, and some time for each sample without."""

    watch = None
    seconds = 0.0

    def forward(self, inputs):
        self.watch.now += 1.0 if torch.is_grad_enabled() else self.seconds * len(inputs)
        return super().forward(inputs)


@pytest.fixture
def watch(watch, monkeypatch):
    monkeypatch.setattr(Taking, "watch", watch)
    return watch


@pytest.mark.parametrize("is_normed", [False, True])
@pytest.mark.parametrize("lr", [None, 1e-3])
@pytest.mark.parametrize("seconds", [8.0, 60.0])
def test_seconds_hold_for_the_whole_call(watch, seconds, lr, is_normed):
    """A look at the 40 held-out samples takes two seconds, and new statistics of norms another fourteen."""
    dense, original = Taking(4, norm=is_normed).eval(), pair(norm=is_normed)[1]
    dense.seconds = 0.05
    found = distillation(dense, original, batches(320), seconds=seconds, lr=lr)
    assert found.seconds < seconds + 1.0


@pytest.mark.parametrize(
    ("knobs", "level", "words"),
    [
        (
            {"steps": 20},
            "INFO",
            "at most about 40 s: 20 steps of 1 s each, as many again at a sixth of the rate if the result is discarded",
        ),
        ({"steps": 100}, "INFO", "100 steps of 1 s each, at most 24 of them to find the learning rate, as many again"),
        ({"steps": 20, "lr": 1e-3}, "INFO", "at most about 20 s: 20 steps of 1 s each, and comparisons with"),
        ({"lr": 1e-3}, "WARNING", "10 minutes: 601 steps of 1 s each, and comparisons with the unpruned network; seco"),
        ({"lr": 1e-3, "seconds": 9.0}, "INFO", "the unpruned network; seconds= ends it after 9 s"),
    ],
)
def test_the_time_is_told_before_it_is_spent(watch, caplog, knobs, level, words):
    caplog.set_level("INFO", "nni_topo")
    distillation(Taking(4).eval(), pair()[1], batches(), **{"steps": 601, **knobs})
    told = [each for each in caplog.records if "distillation take" in each.getMessage()]
    assert [each.levelname for each in told] == [level]
    assert words in told[0].getMessage()


def test_what_is_discarded_is_learned_once_more_at_a_sixth_of_the_rate(monkeypatch):
    """The range test is made to take a rate that is too high for the whole course."""
    _, original = pair()
    monkeypatch.setattr("nni_topo.recovery.rates.RATES", (0.6,))
    monkeypatch.setattr("nni_topo.recovery.rates._MOST_LOSS", 1e9)
    monkeypatch.setattr("nni_topo.recovery.rates._MOST_GROWTH", 1e9)
    near = copy.deepcopy(original)
    with torch.no_grad():
        near.first.weight.mul_(1.02)
    found = distillation(near, original, batches(), steps=80)
    assert found.discarded_lr == 0.6
    assert found.lr == pytest.approx(0.1)
    assert len(found.rates) == 1
    assert "after what was learned at 0.6 had been discarded" in repr(found)
    # A rate that is given is the user's.
    assert math.isnan(distillation(near, original, batches(), steps=80, lr=0.6).discarded_lr)


def test_outputs_that_differ_by_rounding_are_not_learned():
    _, original = pair()
    near = copy.deepcopy(original)
    with torch.no_grad():
        near.head.weight.mul_(1.0 + 1e-6)
    found = distillation(near, original, batches(), steps=20)
    assert found.loss_before > 0.0 or found.distance_before > 0.0
    assert (found.steps, found.rates, found.is_kept) == (0, (), False)
    assert "there is nothing to learn" in repr(found)
    torch.testing.assert_close(found.model.state_dict(), near.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(("seconds", "trials", "lr"), [(20.0, 0, 2e-4), (200.0, 4, 6e-5)])
def test_the_range_test_takes_a_quarter_of_the_time(watch, seconds, trials, lr):
    """A step takes a second. In 197 seconds there is room for ten steps at four rates, and then for the lowest one."""
    dense, original = Taking(4).eval(), pair()[1]
    with torch.no_grad():
        for net in (dense, original):
            net.first.weight /= 1e7
    images = [1e7 * part for part in batches()]
    found = distillation(dense, original, images, seconds=seconds, blend=False)
    assert [(each.lr, each.steps) for each in found.rates] == [(rate, 10) for rate in RATES[:trials]]
    assert lr in (found.lr, found.discarded_lr)
    assert found.seconds < seconds + 1.0


def test_the_steps_of_the_range_test_are_some_of_all_steps(watch):
    """A step takes a second, so that all that is taken shows in the time: one pass is a check, and two time a step."""
    found = distillation(Taking(4).eval(), pair()[1], batches(), steps=100)
    tried = sum(each.steps for each in found.rates)
    assert tried in (8, 16, 24)
    assert (found.is_kept, found.steps) == (True, 100 - tried)
    assert found.seconds == 3 + 100
    assert f"{100 - tried} of at most {100 - tried} steps" in repr(found)
    few = distillation(Taking(4).eval(), pair()[1], batches(), steps=23)
    assert (few.rates, 2e-4 in (few.lr, few.discarded_lr)) == ((), True)


@pytest.mark.parametrize(("images", "lr"), [(128, 2e-4), (600, 2e-3)])
def test_few_steps_have_a_higher_rate_where_batch_norms_learn_from_the_batches(images, lr):
    few = distillation(*pair(norm=True), batches(images), steps=20)
    assert (few.rates, lr in (few.lr, few.discarded_lr)) == ((), True)


def test_of_groups_every_eighth_judges():
    dense, original = pair()
    data = nni_topo.Calibration(batches(48), groups=[index // 3 for index in range(48)])
    found = distillation(dense, original, data, steps=1, lr=1e-3)
    assert found.held_out == 6
    assert found.loss_before == pytest.approx(divergence(dense, original, inputs(48)[data.held_out(8)]), rel=1e-4)


def solved(data, seed=0):
    """Return a network, its pruned form after weight reconstruction on some images, and the masks."""
    torch.manual_seed(seed)
    original = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    masks = {"0": {"weight": (torch.arange(16) < 6).float()[:, None].expand(16, 6)}}
    full = nni_topo.compensate(original, masks, data, progress=False)
    return original, nni_topo.to_dense(full, inputs(2), masks)


def judged_on(original, dense, data):
    """Return the images that a distillation was judged on: those whose loss is the one that it gives."""
    done = distillation(dense, original, data, steps=1, lr=1e-3, progress=False)
    return done, done.loss_before


def test_what_was_solved_on_does_not_judge():
    images = inputs(64)
    original, dense = solved([images])
    done, loss = judged_on(original, dense, [images])
    assert loss == pytest.approx(divergence(dense, original, images[7::8]), rel=1e-3)
    assert (done.held_out, done.solved_on) == (8, 0)
    # In another order, as a loader that shuffles has it, the same eighth judges.
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    done, loss = judged_on(original, dense, [images[order]])
    assert loss == pytest.approx(divergence(dense, original, images[7::8]), rel=1e-3)
    # Among others, those judge on which nothing was solved: 72 of 128, of which every fourth.
    more = torch.cat([inputs(1, seed=7), images, inputs(63, seed=5)])
    fresh = torch.cat([inputs(1, seed=7), images[7::8], inputs(63, seed=5)])
    done, loss = judged_on(original, dense, [more])
    assert (done.held_out, done.solved_on) == (18, 0)
    assert loss == pytest.approx(divergence(dense, original, fresh[3::4]), rel=1e-3)


def test_of_groups_that_were_solved_on_in_part_no_sample_is_fresh():
    _, dense = solved([inputs(64)])
    assert is_solved_on(dense, nni_topo.Calibration([inputs(64)])).tolist() == [index % 8 != 7 for index in range(64)]
    halves = nni_topo.Calibration([torch.cat([inputs(64)[:4], inputs(4, seed=9)])], groups=[0, 1, 2, 3, 0, 0, 5, 6])
    assert is_solved_on(dense, halves).tolist() == [True] * 6 + [False] * 2


def test_a_distilled_network_knows_what_it_learned_from():
    images = inputs(64)
    original, dense = solved([images])
    done = distillation(dense, original, [images], steps=40, progress=False)
    assert done.is_kept
    again, loss = judged_on(original, done.model, [images])
    assert loss == pytest.approx(divergence(done.model, original, images[7::8]), rel=1e-3)
    assert again.solved_on == 0
    other, _ = judged_on(original, copy.deepcopy(done.model), [images[:56]])
    assert other.solved_on == 0


def test_of_a_group_that_was_solved_on_no_sample_judges():
    images, groups = inputs(64), [index // 4 for index in range(64)]
    original, dense = solved([images[: 4 * 10]])  # all samples of ten groups, and every eighth of these isn't solved on
    data = nni_topo.Calibration([images], groups=groups)
    done, loss = judged_on(original, dense, data)
    # Of six groups that are left as many judge as of sixteen every eighth: every third.
    held = torch.isin(torch.tensor(groups), torch.tensor([12, 15]))
    assert (done.held_out, done.solved_on) == (8, 0)
    assert loss == pytest.approx(divergence(dense, original, images[held]), rel=1e-3)
