from __future__ import annotations

import copy
import logging
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import softmax

import nni_topo
from nni_topo import zoo
from nni_topo.errors import ConfigError, DataError, SpeedupError
from nni_topo.recovery import distill, distillation
from nni_topo.testing import toy_images, toy_model


class Narrow(nn.Module):
    """Gives logits, a tuple, a dict or features, with a hidden layer of any width."""

    def __init__(self, width, form="logits", *, norm=False):
        super().__init__()
        torch.manual_seed(width)
        self.first = nn.Linear(6, width)
        self.norm = nn.BatchNorm1d(width) if norm else nn.Identity()
        self.head = nn.Linear(width, 4)
        self.drop = nn.Dropout(0.5)
        self.form = form

    def forward(self, inputs):
        hidden = torch.relu(self.norm(self.first(inputs)))
        found = self.head(self.drop(hidden))
        if self.form == "tokens":
            return found.unflatten(1, (2, 2))
        kinds = {"tuple": (found, hidden[:, :2]), "dict": {"boxes": found, "count": 3}, "named": {"logits": found}}
        return kinds.get(self.form, found)


def inputs(count=96, seed=0):
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


def batches(count=96):
    return list(inputs(count).split(32))


def pair(form="logits", **traits):
    return Narrow(4, form, **traits).eval(), Narrow(16, form, **traits).eval()


def divergence(model, original, images, temperature=2.0):
    """Kullback-Leibler divergence, written out."""
    with torch.no_grad():
        mine = softmax(model.eval()(images).double() / temperature, 1)
        theirs = softmax(original.eval()(images).double() / temperature, 1)
    return float((theirs * (theirs.log() - mine.log())).sum(1).mean()) * temperature**2


@pytest.mark.slow
def test_three_quarters_pruned_and_compensated_net_gets_better_without_labels(digits, digits_net):
    model = digits_net
    images = list(digits.train.tensors[0][:768].split(128))
    layers = ["features.conv1", "features.conv2", "classifier.fc1"]
    config = nni_topo.dependency_groups(model, images[0][:2], [{"op_names": layers, "sparse_ratio": 0.9}])
    pruner = nni_topo.create_pruner("l1", model, config)
    masks = pruner.compress()[1]
    pruner.unwrap_model()
    dense = nni_topo.to_dense(nni_topo.compensate(model, masks, images), images[0][:2], masks)
    found = distillation(dense, model, images)
    before, after = (zoo.evaluate(net, digits.validation) for net in (dense, found.model))
    assert found.is_kept
    assert found.steps == 600
    assert after > before + 0.05
    # The same labels would say no more: the validation images were never looked at.
    assert after > 0.8 * zoo.evaluate(model, digits.validation)


def test_loss_is_the_divergence_of_softened_probabilities_on_images_held_out():
    dense, original = pair()
    found = distillation(dense, original, batches(64), steps=40, temperature=3.0, seed=4)
    assert (found.images, found.steps, found.objective, found.is_kept) == (64, 40, "kl", True)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(4))
    held = inputs(64)[order[::8]]
    assert found.loss_before == pytest.approx(divergence(dense, original, held, 3.0), rel=1e-4)
    assert found.loss_after == pytest.approx(divergence(found.model, original, held, 3.0), rel=1e-4)
    assert found.loss_after < found.loss_before
    with torch.no_grad():
        mine, theirs, given = (net.eval()(held).argmax(1) for net in (found.model, original, dense))
    assert found.agreement_after == float((mine == theirs).double().mean())
    assert found.agreement_before == float((given == theirs).double().mean())
    assert found.seconds > 0.0


@pytest.mark.parametrize(("scale", "steps", "lr"), [(6.0, 1, 1e-6), (0.2, 60, 1e-3), (1.0, 3, 10.0)])
def test_less_loss_is_better_whatever_the_answers(scale, steps, lr):
    dense, original = pair()
    student = copy.deepcopy(original if scale != 1.0 else dense)
    student.load_state_dict({name: scale * value for name, value in student.state_dict().items()})
    found = distillation(student, original, batches(64), steps=steps, lr=lr)
    assert found.is_kept == (found.loss_after < found.loss_before)


@pytest.mark.parametrize(
    ("form", "objective", "expected"),
    [
        ("logits", "auto", "kl"),
        ("named", "auto", "kl"),
        ("logits", "squares", "squares"),
        ("tokens", "auto", "squares"),
        ("tokens", "kl", "kl"),
        ("tuple", "auto", "squares"),
        ("dict", "auto", "squares"),
    ],
)
def test_outputs_of_any_form_are_met(form, objective, expected):
    dense, original = pair(form)
    found = distillation(dense, original, batches(), objective=objective, steps=150, lr=0.01)
    assert found.objective == expected
    assert found.is_kept
    assert found.loss_after < 0.7 * found.loss_before


def test_squares_are_shares_of_each_outputs_variance():
    dense, original = pair("tuple")
    held = inputs(96)[torch.randperm(96, generator=torch.Generator().manual_seed(0))[::8]]
    with torch.no_grad():
        whole = original(inputs(96))
        shares = [
            (mine - theirs).square().mean() / each.var(0, correction=0).mean()
            for mine, theirs, each in zip(dense(held), original(held), whole, strict=True)
        ]
    found = distillation(dense, original, batches(), steps=1)
    assert found.loss_before == pytest.approx(float(sum(shares) / 2), rel=1e-4)


def test_inputs_may_be_mappings_and_labels_are_not_looked_at():
    dense, original = pair()
    plain = distill(dense, original, batches(), steps=5)
    labelled = distill(dense, original, [(part, "no label") for part in batches()], steps=5)
    named = distill(dense, original, [{"inputs": part} for part in batches()], steps=5)
    assert torch.equal(plain.head.weight, labelled.head.weight)
    assert torch.equal(plain.head.weight, named.head.weight)


def test_nothing_that_is_given_changes_and_modes_stay():
    dense, original = pair(norm=True)
    dense.train()
    dense.drop.eval()
    original.head.train()
    states = [copy.deepcopy(net.state_dict()) for net in (dense, original)]
    random = torch.get_rng_state()
    with torch.no_grad():
        found = distill(dense, original, batches(600), steps=20, augment=lambda part: part + torch.randn_like(part))
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
    few, many = (distill(dense, original, batches(count), steps=10) for count in (128, 600))
    assert torch.equal(few.norm.running_mean, dense.norm.running_mean)
    order = torch.randperm(600, generator=torch.Generator().manual_seed(0))
    learned = inputs(600)[order[torch.arange(600) % 8 != 0]]
    with torch.no_grad():
        torch.testing.assert_close(many.norm.running_mean, many.first(learned).mean(0))


def test_what_got_worse_is_left_out(caplog):
    dense, original = pair()
    near = distill(dense, original, batches(), steps=100)
    with caplog.at_level(logging.WARNING):
        found = distillation(near, original, batches(), steps=3, lr=10.0)
    assert not found.is_kept
    assert not found.loss_after < found.loss_before
    torch.testing.assert_close(found.model.state_dict(), near.state_dict(), rtol=0, atol=0)
    assert "what was distilled is left out: held out it has loss" in caplog.text


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
    # The norm's shift of a removed channel would bring it back.
    assert bool((masked.norm.bias[[1, 5]] == 0).all())


def test_zeros_of_a_dense_model_stay_too():
    dense, original = pair()
    with torch.no_grad():
        dense.first.weight[:, ::2] = 0
    found = distill(dense, original, batches(), steps=20)
    assert not found.first.weight[:, ::2].any()
    assert not torch.equal(found.first.weight[:, 1::2], dense.first.weight[:, 1::2])


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
    assert divergence(augmented, original, other) < 0.3 * divergence(plain, original, other)


@pytest.mark.parametrize(("scale", "expected"), [(1.0, 6e-3), (30.0, 2e-3), (1e3, None)])
def test_what_would_be_left_out_is_learned_at_a_lower_rate(scale, expected, tmp_path):
    """Where inputs are thirty times as large, weights are small, and a high rate takes them far away."""
    _, original = pair()
    dense = copy.deepcopy(original)
    with torch.no_grad():
        dense.head.weight *= 1.1
        for net in (dense, original):
            net.first.weight /= scale
    images = [scale * part for part in batches(256)]
    known = {"steps": 80, "held_out": images[:2]}
    alone = {lr: distillation(dense, original, images, lr=lr, **known) for lr in (6e-3, 2e-3, 6e-4)}
    assert next((lr for lr, each in alone.items() if each.is_kept), None) == expected
    found = distillation(dense, original, images, state=tmp_path / "state.pt", **known)
    again = distillation(dense, original, images, state=tmp_path / "state.pt", **known)
    for each in (found, again):
        assert (each.lr, each.is_kept, each.steps) == (expected or 6e-4, expected is not None, 80)
        assert each.loss_after == alone[each.lr].loss_after
    # Time for one course is no time for two.
    assert distillation(dense, original, images, seconds=100, **known).lr == 6e-3


def test_half_of_the_images_are_blended_with_others_in_all_passes_but_the_first():
    dense, original = pair()
    seen = []
    original.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    images = [torch.eye(6).repeat(160, 1)]  # 840 of them are learned from, in 14 batches
    distill(dense, original, images, steps=14, lr=0.01)
    plain = torch.cat(seen)
    assert bool((plain.amax(1) == 1).all())
    distill(dense, original, images, steps=15, lr=0.01)
    view = torch.cat(seen)[2 * len(plain) :]
    assert view.shape == (840, 6)
    torch.testing.assert_close(view.sum(1), torch.ones(840))
    parts = (view > 0).sum(1)
    assert set(parts.tolist()) == {1, 2}
    # Half of the images, but for the sixth of these that meet their like.
    assert float((parts == 2).float().mean()) == pytest.approx(0.5 * 5 / 6, abs=0.05)
    assert float(view[:, 0].unique().diff().max()) < 0.1


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


def test_images_held_out_judge_and_none_is_learned_from():
    dense, original = pair()
    judges = inputs(40, seed=1)
    found = distillation(dense, original, batches(), held_out=[judges[:30], judges[30:]], steps=40, seed=4)
    assert found.images == 136
    assert found.loss_before == pytest.approx(divergence(dense, original, judges), rel=1e-4)
    assert found.loss_after == pytest.approx(divergence(found.model, original, judges), rel=1e-4)
    other = distillation(dense, original, batches(), held_out=[inputs(40, seed=2)], steps=40, seed=4, lr=found.lr)
    assert torch.equal(other.model.head.weight, found.model.head.weight)
    with pytest.raises(DataError, match="at least one batch, got none"):
        distillation(dense, original, batches(), held_out=[])


def test_budget_of_seconds_ends_it():
    dense, original = pair()
    found = distillation(dense, original, batches(), steps=10**9, seconds=0.3)
    assert 1 <= found.steps < 10**6
    assert found.seconds < 20.0
    assert found.is_kept


def test_what_was_stopped_goes_on_to_the_same_result(tmp_path):
    dense, original = pair(norm=True)
    steps = iter(range(12))

    def noisy(part):
        return part + 0.1 * torch.randn_like(part)

    def stopping(part):
        # Three views of 525 images, in three parts each, come before the fourth pass.
        if next(steps) == 11:
            raise KeyboardInterrupt
        return noisy(part)

    knobs = {"steps": 60, "seed": 5, "state": tmp_path / "state.pt", "state_seconds": 0.0}
    whole = distill(dense, original, batches(600), augment=noisy, steps=60, seed=5)
    with pytest.raises(KeyboardInterrupt):
        distill(dense, original, batches(600), augment=stopping, **knobs)
    kept = torch.load(tmp_path / "state.pt", weights_only=True)
    assert 0 < kept["done"] < 60
    found = distillation(dense, original, batches(600), augment=noisy, **knobs)
    assert found.steps == 60
    torch.testing.assert_close(found.model.state_dict(), whole.state_dict(), rtol=0, atol=0)
    # What is done isn't done again, and what is another distillation's is refused.
    again = distill(dense, original, batches(600), **knobs)
    torch.testing.assert_close(again.state_dict(), whole.state_dict(), rtol=0, atol=0)
    with pytest.raises(ConfigError, match="must go on with seed 5, got 6"):
        distill(dense, original, batches(600), **{**knobs, "seed": 6})
    (tmp_path / "state.pt").write_bytes(b"no state")
    with pytest.raises(DataError, match="must be a whole file of this distillation"):
        distill(dense, original, batches(600), **knobs)


# 7/8 of 4,800 images are 4,200: 66 batches of at most 64.
@pytest.mark.parametrize(("images", "steps"), [pytest.param(64, 600, marks=pytest.mark.slow), (4800, 660)])
def test_ten_passes_over_many_images(images, steps):
    dense, original = pair()
    assert distillation(dense, original, [inputs(images)]).steps == steps


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
    with pytest.raises(ConfigError, match=r"must have parameters that require gradients, got none \(dense\)"):
        distill(dense.requires_grad_(False), original, batches())


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([], DataError, "at least one batch, got none"),
        ([inputs(1)], DataError, "at least two images, one to judge by, got 1"),
        ([inputs(0)], DataError, "must hold inputs, got an empty one"),
        ([inputs(8) * math.nan], DataError, "must be finite, got NaN"),
        ([torch.ones(4, 5)], DataError, "must fit the model"),
        (inputs(8), ConfigError, "iterable of batches, e.g. a list of tensors, got one tensor"),
        ([inputs(4), {"inputs": inputs(4)}], DataError, "one shape but for their number"),
    ],
)
def test_bad_images_are_refused(images, error, message):
    dense, original = pair()
    with pytest.raises(error, match=message):
        distill(dense, original, images)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"objective": "labels"}, "objective must be a known name, got 'labels'"),
        ({"temperature": 0.0}, "temperature must be above 0 and finite, got 0.0"),
        ({"temperature": None}, "temperature must be above 0 and finite, got None"),
        ({"seconds": math.inf}, "seconds must be above 0 and finite or None, got inf"),
        ({"lr": -1}, "lr must be above 0 and finite or None, got -1"),
        ({"steps": 0}, "steps must be an integer of at least 1 or None, got 0"),
        ({"batch_size": 1.5}, "batch_size must be an integer of at least 1, got 1.5"),
        ({"state_seconds": -1.0}, "state_seconds must be at least 0 and finite, got -1.0"),
        ({"seed": -1}, "seed must be an integer of at least 0 .*, got -1"),
        ({"blend": 1}, "blend must be True or False, got 1"),
        ({"augment": lambda part: part[:3]}, "augment must return as many images as it gets"),
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
    with pytest.raises(ConfigError, match="must hold a floating tensor with an entry per image, got Tensor"):
        distill(nn.Sequential(nn.Linear(6, 4), Sign()), nn.Sequential(nn.Linear(6, 4), Sign()), batches())
    wrapped = toy_model()
    nni_topo.create_pruner("l1", wrapped, [{"op_names": ["inner"], "sparse_ratio": 0.5}])
    with pytest.raises(SpeedupError, match="unwrap_model"):
        distill(wrapped, toy_model(), [toy_images(8)])


class Sign(nn.Module):
    def forward(self, inputs):
        return inputs > 0
