from __future__ import annotations

import copy
import dataclasses
import logging
import math
import time

import pytest
import torch
from nni.compression.pruning import FPGMPruner, L1NormPruner, L2NormPruner, LevelPruner
from speedup_nets import Concatenated, Grouped, LeNet, Residual, chain
from torch import nn

from nni_topo import Calibration, to_dense, zoo
from nni_topo.errors import ConfigError, DataError, SpeedupError
from nni_topo.recovery import Reconstruct, compensate, compensation
from nni_topo.speedup import dependency_groups, masked_model
from nni_topo.testing import toy_images, toy_model


def pruned(model, inputs, pruner=L1NormPruner, ratio=0.5, exclude=()):
    """Masks of one of NNI's pruners on all layers but some."""
    config = {"op_types": ["Conv2d", "Linear"], "sparse_ratio": ratio, "exclude_op_names": list(exclude)}
    config_list = [config] if pruner is LevelPruner else dependency_groups(model, inputs, [config])
    wrapped = pruner(model, config_list)
    masks = wrapped.compress()[1]
    wrapped.unwrap_model()
    return masks


def distance(model, other, inputs):
    """Squared distance of outputs as a share of the first one's variance."""
    with torch.no_grad():
        expected, found = model.eval()(inputs), other.eval()(inputs)
    return float((expected - found).square().sum() / (expected - expected.mean(0)).square().sum())


def test_trained_net_without_three_quarters_of_its_channels(digits):
    model = zoo.create_model("small_cnn", num_classes=10, in_channels=1, image_size=8, seed=0)
    recipe = dataclasses.replace(zoo.default_recipe("small_cnn", "digits"), epochs=3)
    zoo.train(model, digits, recipe, seed=0)
    images = digits.train.tensors[0]
    masks = pruned(model, images[:2], ratio=0.75, exclude=["classifier.fc2"])
    shipped = zoo.evaluate(masked_model(model, images[:2], masks), digits.test)
    found = compensation(model, masks, images[:512].split(128))
    dense = to_dense(found.model, images[:2], masks)
    repaired = zoo.evaluate(dense, digits.test)
    assert shipped < 0.6
    assert repaired > max(0.85, shipped + 0.3)
    assert zoo.evaluate(masked_model(found.model, images[:2], masks), digits.test) == repaired
    assert "almost lost" not in " ".join(found.report.warnings)


@pytest.mark.parametrize(
    ("net", "pruner", "method"),
    [
        (LeNet, L1NormPruner, "reconstruct"),
        (Concatenated, L1NormPruner, "pair"),
        (Grouped, L1NormPruner, "reconstruct"),
        (chain, L2NormPruner, "reconstruct"),
        (Residual, FPGMPruner, "reconstruct"),
        (toy_model, FPGMPruner, "pair"),
    ],
)
@pytest.mark.quick_every(3)
def test_masks_of_nnis_pruners_on_nets_with_a_trait_each(net, pruner, method):
    model = net().eval()
    shape = (1, 28, 28) if net is LeNet else (3, 8, 8)
    images = torch.randn(96, *shape, generator=torch.Generator().manual_seed(0))
    head = [name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))][-1]
    masks = pruned(model, images[:2], pruner, exclude=[head])
    repaired = compensate(model, masks, images.split(32), method=method)
    dense = to_dense(repaired, images[:2], masks, check=net is not Grouped)
    before = distance(model, to_dense(model, images[:2], masks, check=False), images)
    after = distance(model, dense, images)
    assert after < {"reconstruct": 0.95}.get(method, 1.1) * before
    if net is not Grouped:
        assert distance(masked_model(repaired, images[:2], masks), dense, images) < 1e-8


def test_single_weights_that_are_masked_stay_as_they_are(caplog):
    model, images = toy_model(), toy_images(64)
    masks = pruned(model, images, LevelPruner, exclude=["head"])
    with caplog.at_level(logging.WARNING):
        found = compensation(model, masks, images.split(32))
    assert found.report.left_alone == {
        "inner": "masked weight by weight", "hidden": "masked weight by weight"
    }  # fmt: skip
    assert "inner, hidden (masked weight by weight)" in caplog.text
    assert [layer.layer for layer in found.report.layers] == ["head"]
    assert torch.equal(found.model.inner.weight, model.inner.weight)
    masked = masked_model(model, images, masks), masked_model(found.model, images, masks)
    assert distance(model, masked[1], images) < distance(model, masked[0], images)


def test_layers_that_can_not_be_solved_are_named_and_left():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 6, 3, padding=1)
            self.twice = nn.Conv2d(6, 6, 3, padding=1)
            self.up = nn.ConvTranspose2d(6, 5, 2, stride=2)
            self.tied = nn.Conv2d(5, 5, 1)
            self.other = nn.Conv2d(5, 5, 1)
            self.other.weight = self.tied.weight
            self.rnn = nn.GRU(5, 4, batch_first=True)
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            x = torch.relu(self.twice(torch.relu(self.twice(torch.relu(self.first(x))))))
            x = self.up(x, output_size=[16, 16])
            x = self.other(torch.relu(self.tied(x))).flatten(2).transpose(1, 2)
            return self.head(torch.relu(self.normed(self.rnn(x)[0][:, -1])))

    torch.manual_seed(0)
    model, images = Odd().eval(), toy_images(64)
    mask = torch.ones_like(model.twice.weight)
    mask[4:] = 0
    masks = {"twice": {"weight": mask}, "first": {"weight": mask[:, :3]}}
    found = compensation(model, masks, images.split(16))
    reasons = found.report.left_alone
    assert reasons["twice"] == "called more than once"
    assert reasons["up"] == "called in an unusual way"
    assert reasons["tied"] == reasons["other"] == "its weight belongs to another module too"
    assert reasons["rnn"] == "of type GRU"
    assert any(name.startswith("normed") for name in reasons)
    assert [layer.layer for layer in found.report.layers] == ["head"]
    frame = found.report.to_frame()
    assert frame["note"].tolist()[1:] == [f"not reconstructed: {reason}" for reason in reasons.values()]
    before, after = (
        distance(model, masked_model(net, images, masks), images) for net in (model, found.model)
    )  # fmt: skip
    assert after < before


def test_report_tells_layer_by_layer_what_was_done():
    model, images = toy_model(), toy_images(640)
    masks = pruned(model, images[:2], exclude=["head"])
    began = time.perf_counter()
    report = compensation(model, masks, images.split(64), method=Reconstruct(refine=0)).report
    took = time.perf_counter() - began
    # Every eighth image is left for distillation to judge on.
    assert (report.images, report.held_out) == (560, 80)
    assert report.read_as.startswith("outputs: scores of ")
    assert report.read_as in repr(report)
    frame = report.to_frame()
    assert frame["layer"].tolist() == ["inner", "hidden", "head"]
    assert frame["place"].tolist() == ["add", "hidden", "head"]
    assert frame["unknowns"].tolist() == [36, 4, 8]
    assert frame["samples"].tolist() == [560 * 30, 560, 560]
    assert (frame["error_after"] < frame["error_before"]).all()
    assert (frame["error_held_out"] >= 0.8 * frame["error_after"]).all()
    assert (frame["note"] == "").all()
    assert (frame["seconds"] > 0).all()
    assert took >= report.seconds >= frame["seconds"].sum()


def test_fixed_ridge_is_used_and_a_large_one_changes_little():
    model, images = toy_model(), toy_images(64)
    masks = pruned(model, images, exclude=["head"])
    found = compensation(model, masks, [images], ridge=1e6)
    assert {layer.ridge for layer in found.report.layers} == {1e6}
    change = (found.model.inner.weight - model.inner.weight)[:, :][masks["inner"]["weight"][:, 0, 0, 0] > 0]
    kept = masks["inner"]["weight"][:, 0, 0, 0] > 0
    assert float(change[:, kept].abs().max().detach()) < 1e-4


def test_too_few_samples_warn_and_still_help(caplog):
    model, images = toy_model(), toy_images(6)
    masks = pruned(model, images, ratio=0.25, exclude=["head"])
    with caplog.at_level(logging.WARNING):
        found = compensation(model, masks, [images], method=Reconstruct(refine=0))
    assert "'head' (6 of 12)" in caplog.text
    assert "at least 12 instead of 6" in caplog.text
    # What is advised helps.
    assert compensation(model, masks, [toy_images(14)], method=Reconstruct(refine=0)).report.warnings == ()
    notes = found.report.to_frame()["note"].tolist()
    assert ["fewer samples than unknowns" in note for note in notes] == [False, False, True]
    assert all(bool(torch.isfinite(p).all()) for p in found.model.parameters())


def test_one_image_is_enough_to_run():
    model, images = toy_model(), toy_images(1)
    masks = pruned(model, images, exclude=["head"])
    found = compensation(model, masks, [images])
    assert all(math.isnan(layer.error_held_out) for layer in found.report.layers)
    assert all(bool(torch.isfinite(p).all()) for p in found.model.parameters())


def test_lost_layers_are_named(caplog):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 3)).eval()
    masks = {"0": {"weight": (torch.arange(40) < 1).float()[:, None]}}
    with caplog.at_level(logging.WARNING):
        compensation(model, masks, [torch.randn(400, 40)])
    assert "almost lost: '1'" in caplog.text
    more = {"0": {"weight": (torch.arange(40) < 36).float()[:, None]}}
    assert compensation(model, more, [torch.randn(400, 40)]).report.warnings == ()


def test_batch_norms_are_recalibrated_by_a_method_that_does_nothing_else():
    model, images = toy_model(), toy_images(64)
    masks = pruned(model, images, exclude=["head"])
    found = compensate(model, masks, images.split(16), method="recalibrate")
    kept = masks["stem"]["weight"][:, 0, 0, 0] > 0
    solved_on = images[torch.arange(64) % 8 != 7]
    torch.testing.assert_close(found.norm.running_mean[kept], model.stem(solved_on).mean((0, 2, 3))[kept].detach())
    assert torch.equal(found.norm.running_var[~kept], model.norm.running_var[~kept])
    after, before = found.state_dict(), model.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert "norm.running_mean" in changed
    assert all("running" in name or "num_batches" in name for name in changed)


def test_half_precision_stays_half():
    model, images = toy_model().bfloat16(), toy_images(64).bfloat16()
    masks = pruned(model, images, exclude=["head"])
    found = compensate(model, masks, images.split(16))
    assert {p.dtype for p in found.parameters()} == {torch.bfloat16}
    assert distance(model, masked_model(found, images, masks), images) < distance(
        model, masked_model(model, images, masks), images
    )


@pytest.mark.parametrize(
    ("calibration", "error", "message"),
    [
        ([], DataError, "at least one batch, got none"),
        (
            [toy_images(2), torch.full((1, 3, 8, 8), math.nan)],
            DataError,
            "must be finite .*got NaN or inf .calibration, batch 1.",
        ),
        ([toy_images(2), torch.ones(2, 1, 8, 8)], DataError, "must fit the model, got RuntimeError: .* .batch 1."),
        ([toy_images(2) * 1e30], DataError, "activations must be finite, got NaN or infinity .inner."),
        (["images"], ConfigError, "got 'images'"),
    ],
)
@pytest.mark.quick_every(3)
def test_bad_calibration_is_refused_and_nothing_changes(calibration, error, message):
    model = toy_model()
    masks = pruned(model, toy_images(2), exclude=["head"])
    before = copy.deepcopy(model.state_dict())
    if error is DataError and "activations" in message:
        model.stem.weight.data.mul_(1e15)
        before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        compensate(model, masks, calibration)
    assert model.training
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"method": "magic"}, "method must be a known name, got 'magic'"),
        ({"ridge": -1.0}, "ridge must be 'auto' or a finite number of at least 0, got -1.0"),
        ({"cache_bytes": -1}, "cache_bytes must be an integer of at least 0 .*, got -1"),
        ({"ridge": "much"}, "got 'much'"),
        ({"method": 3}, "method must be a str or a RecoveryMethod, got 3"),
    ],
)
def test_bad_knobs_are_refused(knobs, message):
    with pytest.raises(ConfigError, match=message):
        compensate(toy_model(), {}, [toy_images(2)], **knobs)


@pytest.mark.parametrize(
    ("masks", "error", "message"),
    [
        ({"outer": {"weight": torch.ones(1)}}, ConfigError, "the module of a mask must be a known name"),
        ({"inner": {"weight": torch.ones(5, 5)}}, ConfigError, "must have its parameter's shape"),
        ({"inner": {"weight": torch.ones(3)}}, ConfigError, r"or 1 in place of some of its sizes, got \(3,\) \(inner"),
        ({"inner": {"weight": torch.zeros(8, 1, 1, 1)}}, SpeedupError, "at least one channel"),
        ({"head": {"weight": torch.eye(4)[0][:, None]}}, SpeedupError, "shape of the model's output must not change"),
    ],
)
def test_bad_masks_are_refused(masks, error, message):
    with pytest.raises(error, match=message):
        compensate(toy_model(), masks, [toy_images(2)])


def test_bad_models_are_refused():
    wrapped = toy_model()
    L1NormPruner(wrapped, [{"op_names": ["inner"], "sparse_ratio": 0.5}])
    with pytest.raises(SpeedupError, match="unwrap_model"):
        compensate(wrapped, {}, [toy_images(2)])
    broken = toy_model()
    broken.head.bias.data[0] = math.nan
    with pytest.raises(DataError, match=r"must hold no NaN, got NaN \(head.bias\)"):
        compensate(broken, {}, [toy_images(2)])


class Padded(nn.Module):
    """An encoder of states that gets told which of them are padding."""

    def __init__(self):
        super().__init__()
        self.body = nn.TransformerEncoderLayer(12, 2, 24, batch_first=True)
        self.head = nn.Linear(12, 3)

    def forward(self, states, src_key_padding_mask):
        return self.head(self.body(states, src_key_padding_mask=src_key_padding_mask)[:, 0])


def test_positions_that_are_padding_do_not_count():
    torch.manual_seed(0)
    model, name = Padded().eval(), "body.linear1"
    states, gone = torch.randn(12, 6, 12), torch.arange(6) >= torch.randint(2, 6, (12, 1))
    masks = {name: {"weight": (torch.arange(24) % 3 > 0)[:, None].expand(24, 12).float()}}

    def repaired(padding):
        inputs = {"states": torch.where(gone[:, :, None], padding, states), "src_key_padding_mask": gone}
        return compensation(model, masks, Calibration([inputs], hold_out=False))

    found = [repaired(padding) for padding in (torch.tensor(0.0), 5.0 * torch.randn(12, 6, 12))]
    assert [layer.samples for layer in found[0].report.layers] == [int((~gone).sum()), 12]
    assert not torch.equal(found[0].model.body.linear2.weight, model.body.linear2.weight)
    torch.testing.assert_close(*(each.model.body.linear2.weight for each in found), rtol=1e-4, atol=1e-6)


def square():
    return nn.Linear(4, 4)


class Routed(nn.Module):
    """An expert that gets the samples for which another layer's first output is above zero, and a head."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 6)
        self.expert, self.head = nn.Linear(6, 5), nn.Linear(8, 5)

    def forward(self, values):
        values = torch.tanh(self.first(values))
        routed = self.second(values)
        found = torch.relu(self.expert(routed[routed[:, 0] > 0.0]))
        return self.head(values) + found.mean(0)


def test_layers_after_one_that_gets_other_samples_are_solved():
    torch.manual_seed(0)
    model = Routed().eval()
    masks = {
        name: {"weight": (torch.arange(len(weight)) < 4).float()[:, None].expand_as(weight)}
        for name, weight in (("first", model.first.weight), ("second", model.second.weight))
    }
    report = compensation(model, masks, [torch.randn(50, 4)]).report
    assert report.left_alone == {"expert": "in the pruned network a router sends it other samples"}
    assert [layer.layer for layer in report.layers] == ["second", "head"]
