from __future__ import annotations

import copy
import re
import time
from collections import OrderedDict
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from tied_nets import Bottleneck, Mirrored, TiedConvolutions
from torch import nn
from toy_times import LAYERS, proportional

import nni_topo
from nni_topo import zoo
from nni_topo.errors import ConfigError, DataError, GradientError, SpeedupError
from nni_topo.network.cost.cost import cost_of
from nni_topo.network.io import exporting
from nni_topo.network.speedup.analysis import Analysis
from nni_topo.pruners.budget import network_cost
from nni_topo.recovery import Reconstruct
from nni_topo.runs.prepared import prepare
from nni_topo.runs.settings import Settings
from nni_topo.sharing import find_ties
from nni_topo.testing import toy_images, toy_model


def images_of(digits, count=512):
    return list(digits.train.tensors[0][:count].split(128))


def shrunk(budget=None, **knobs):
    return nni_topo.shrink(
        toy_model().eval(), list(toy_images(64).split(32)), budget or {"flops": 0.5}, **{"distill": False, **knobs}
    )


@pytest.mark.parametrize("make", [TiedConvolutions, Mirrored, Bottleneck])
@pytest.mark.quick_every(2)
def test_modules_that_share_a_weight_still_do_and_a_budget_of_parameters_is_met(make):
    model, generator = make().eval(), torch.Generator().manual_seed(0)
    is_text = make is Bottleneck
    inputs = (
        torch.randint(0, 11, (64, 5), generator=generator) if is_text else torch.rand(64, 3, 8, 8, generator=generator)
    )
    small = nni_topo.shrink(model, inputs.split(16), {"params": 0.75}, distill=False)
    assert find_ties(small) == find_ties(model)
    assert zoo.count_params(small) / zoo.count_params(model) == pytest.approx(0.75, abs=0.08)
    assert small.report.budget.left == zoo.count_params(small) / zoo.count_params(model)


class Answers(nn.Module):
    """A network of which only the answers come out, in a form that can't be compared or learned from."""

    def __init__(self, form):
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.form = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), form

    def forward(self, rows):
        return self.form(self.layers(rows))


@pytest.mark.parametrize(
    ("form", "distill", "error", "message"),
    [
        (torch.sum, True, ConfigError, "a floating tensor with an entry per sample"),
        (torch.detach, {"steps": 10}, GradientError, r"got outputs without any.*distill=False leaves distillation out"),
        (lambda found: found[:, None], {"objective": "cosine"}, ConfigError, "must have one vector for each sample"),
        (torch.relu, {"blocks": 1.0}, ConfigError, "blocks must be 0 where no block's output"),
        (torch.relu, {"outputs": lambda *_: "text"}, ConfigError, "outputs= returns must hold a floating tensor"),
    ],
)
def test_outputs_that_nothing_learns_from_are_refused_before_anything_is_pruned(form, distill, error, message):
    with pytest.raises(error, match=message):
        nni_topo.shrink(
            Answers(form).eval(),
            torch.rand(64, 6).split(16),
            {"flops": 0.5},
            distill=distill,
            evaluate=lambda net: pytest.fail("ran"),
        )


def test_one_call_leaves_an_eighth_of_the_work_and_most_of_the_accuracy(digits_net, digits):
    before = copy.deepcopy(digits_net.state_dict())
    small = nni_topo.shrink(
        digits_net,
        images_of(digits),
        {"flops": 0.125},
        evaluate=lambda net: zoo.evaluate(net, digits.validation),
        distill={"steps": 300},
    )
    torch.testing.assert_close(digits_net.state_dict(), before, rtol=0, atol=0)
    stages = {stage.network: stage for stage in small.report.stages}
    assert list(stages) == ["unpruned", "pruned", "reconstructed", "distilled"]
    assert all(0.0 < stage.seconds < 600.0 for stage in small.report.stages[1:])
    whole, last = stages["unpruned"], stages["distilled"]
    assert (whole.distance, whole.agreement) == (0.0, 1.0)
    assert whole.macs == zoo.count_macs(digits_net, images_of(digits)[0])
    assert last.macs == zoo.count_macs(small, images_of(digits)[0])
    assert last.params == zoo.count_params(small)
    assert last.macs == pytest.approx(0.125 * whole.macs, rel=0.08)
    assert last.accuracy == zoo.evaluate(small, digits.validation)
    assert stages["pruned"].accuracy < min(stages["reconstructed"].accuracy, last.accuracy)
    assert stages["pruned"].agreement < min(stages["reconstructed"].agreement, last.agreement)
    assert last.accuracy > whole.accuracy - 0.1
    assert stages["pruned"].distance > stages["reconstructed"].distance > 0.0
    assert (small.report.images, small.report.judges, small.report.held_out) == (448, 32, 32)
    held_out = torch.cat(images_of(digits))[15::16]
    with torch.no_grad():
        wanted, found = digits_net.eval()(held_out), small(held_out)
    assert last.agreement == pytest.approx(float((wanted.argmax(1) == found.argmax(1)).double().mean()))
    assert last.agreement_low < last.agreement <= last.agreement_high
    assert last.distance_low < last.distance < last.distance_high
    assert small.report.budget.is_met
    assert [line.split()[0] for line in repr(small.report).splitlines()[2:6]] == list(stages)
    assert repr(small.report).splitlines()[0] == small.report.sentence


def test_a_network_is_made_smaller_again_and_the_report_is_that_of_the_last_step():
    first = shrunk({"flops": 0.7})
    second = nni_topo.shrink(first, list(toy_images(64).split(32)), {"flops": 0.7}, distill=False)
    assert second.report.stages[0].macs == first.report.stages[-1].macs
    assert second.report.stages[-1].macs <= 0.75 * second.report.stages[0].macs
    widths = {row.name: row.after for row in first.report.layers.rows}
    assert {row.name: row.before for row in second.report.layers.rows} == widths


class Tagger(nn.Module):
    """A recurrent layer, which keeps all units if it has a projection, and a layer that can be pruned."""

    def __init__(self, width=24, **knobs):
        super().__init__()
        self.states = nn.LSTM(8, 24, batch_first=True, **knobs)
        self.hidden, self.out = nn.Linear(width, 32), nn.Linear(32, 4)

    def forward(self, x):
        return self.out(torch.relu(self.hidden(self.states(x)[0])))


def test_layers_that_are_nearly_gone_are_told_and_what_keeps_the_cost():
    torch.manual_seed(0)
    model = Tagger(20, proj_size=20)
    small = nni_topo.shrink(model, [torch.randn(64, 6, 8)], {"flops": 0.5}, distill=False)
    assert small.hidden.out_features == 4  # an eighth
    assert "states keeps all channels: a recurrent layer keeps the size of its state" in repr(small.report)
    assert not [text for text in small.report.warnings if "one channel is left" in text]
    layers = [{"op_names": ["hidden"], "max_sparse_ratio": 0.99}]
    fewest = nni_topo.shrink(model, [torch.randn(64, 6, 8)], {"flops": 0.5}, layers=layers, distill=False)
    assert fewest.hidden.out_features == 1
    (told,) = [text for text in fewest.report.warnings if "one channel is left" in text]
    assert "hidden (of 32)" in told


def test_recurrent_layers_lose_units_for_a_budget_without_being_named():
    torch.manual_seed(0)
    model, rows = Tagger(48, bidirectional=True, num_layers=2), torch.randn(64, 6, 8)
    small = nni_topo.shrink(model, [rows], {"flops": 0.5}, distill={"steps": 5})
    assert small.states.hidden_size < 24
    assert small.report.whole.keys() == {"out"}
    assert 0.45 < nni_topo.zoo.count_macs(small, rows) / nni_topo.zoo.count_macs(model, rows) < 0.55


class Deployed(nn.Sequential):
    """A network that is only used: its forward takes no gradients."""

    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


def test_a_network_without_gradients_is_made_smaller_without_distillation(caplog):
    torch.manual_seed(0)
    model = Deployed(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    images = [torch.randn(64, 8)]
    small = nni_topo.shrink(model, images, {"flops": 0.5})
    assert [stage.network for stage in small.report.stages] == ["unpruned", "pruned", "reconstructed"]
    (told,) = [text for text in small.report.warnings if "isn't distilled" in text]
    assert "torch.no_grad()" in told
    assert told in caplog.text
    with pytest.raises(GradientError, match=r"must compute gradients.*distill=False leaves distillation out"):
        nni_topo.shrink(model, images, {"flops": 0.5}, distill={"steps": 5})


@pytest.mark.parametrize("pruner", ["l1", "topological", "energy"])
def test_any_structured_pruner_meets_the_budget_and_the_output_layer_stays(pruner):
    small = shrunk(pruner=pruner)
    stages = small.report.stages
    assert stages[-1].macs == pytest.approx(0.5 * stages[0].macs, rel=0.15)
    assert small.head.out_features == toy_model().head.out_features
    assert small.stem.out_channels < toy_model().stem.out_channels


def test_other_budgets_layers_and_widths_of_eight():
    small = shrunk({"params": 0.5})
    assert small.report.stages[-1].params == pytest.approx(0.5 * small.report.stages[0].params, rel=0.15)
    some = shrunk({"flops": 0.9}, layers=["hidden"])
    assert some.hidden.out_features < toy_model().hidden.out_features
    assert some.stem.out_channels == toy_model().stem.out_channels
    wide = shrunk({"flops": 0.5}, round_to=4)
    assert wide.stem.out_channels % 4 == wide.hidden.out_features % 4 == 0


@pytest.mark.parametrize(("pruner", "kind"), [("reconstruction", "flops"), ("l1", "params")])
def test_budgets_are_met_beside_caps_and_floors(pruner, kind):
    whole = toy_model()
    tied = {"op_names": ["stem", "inner"], "max_sparse_ratio": 0.25}
    small = shrunk({kind: 0.6}, pruner=pruner, layers=[tied, {"op_names": ["hidden"], "min_sparse_ratio": 0.5}])
    assert small.stem.out_channels == small.inner.out_channels == 6
    assert small.hidden.out_features <= 8
    left, cost = cost_of(kind, small, toy_images(1)), cost_of(kind, whole, toy_images(1))
    assert left / cost == pytest.approx(0.6, abs=0.03)


def test_the_report_has_times_if_they_are_asked_for_or_the_budget_is_one_of_time():
    plain = shrunk().report
    assert plain.time is None
    assert " ms " not in repr(plain)
    report = shrunk(time=True).report
    before, after = report.time.unpruned_ms, report.time.ms
    assert 0.0 < before[1] <= before[0] <= before[2]
    assert 0.0 < after[1] <= after[0] <= after[2]
    assert report.time.samples == 32
    told = "a batch of 32 samples takes"
    assert told in repr(report)
    cells = [line.split() for line in repr(report).splitlines()[1:5]]
    assert cells[0][3] == "ms"
    assert float(cells[1][3]) == pytest.approx(before[0], rel=1e-3)  # of the unpruned network
    assert float(cells[3][3]) == pytest.approx(after[0], rel=1e-3)  # of the one that is returned
    table = proportional(dict.fromkeys((*LAYERS, "head"), 1.0))
    assert shrunk({"latency": 0.6, "latency_table": table}).report.time is not None


@pytest.mark.slow
def test_a_budget_of_time_in_onnxruntime_is_timed_there(monkeypatch):
    timed = []

    def as_run_by(runtime, networks, inputs):
        found = exporting.as_run_by(runtime, networks, inputs)
        timed.extend(found)
        args = inputs if isinstance(inputs, tuple) else (inputs,)
        for net, other in zip(networks, found, strict=True):
            torch.testing.assert_close(torch.from_numpy(other(*args)[0]), net(*args), rtol=1e-4, atol=1e-5)
        return found

    for place in ("nni_topo.pruners.budget", "nni_topo.runs.prepared"):
        monkeypatch.setattr(f"{place}.as_run_by", as_run_by)
    monkeypatch.setattr("nni_topo.pruners.budget._SECONDS", 0.1)
    small = shrunk({"latency": 0.9, "runtime": "onnxruntime"}, pruner="l1", compensate=None)
    assert {type(each) for each in timed} == {exporting.OnnxNetwork}
    assert small.report.time.runtime == "onnxruntime"
    assert "on one thread of the CPU in onnxruntime" in repr(small.report)


@pytest.mark.parametrize(("runtime", "kind"), [("pytorch", torch.nn.Module), ("onnxruntime", exporting.OnnxNetwork)])
@pytest.mark.slow
def test_a_budget_of_time_counts_batches_as_large_as_the_first_one_in_its_runtime(monkeypatch, runtime, kind):
    sizes = []

    def time_shares(models, whole, inputs, wanted, **_):
        assert all(isinstance(each, kind) for each in (*models, whole))
        args = inputs if isinstance(inputs, tuple) else (inputs,)
        sizes.append(len(args[0]))
        return [(wanted, 0.01)] * len(models)

    for place in ("nni_topo.pruners.budget", "nni_topo.runs.prepared"):
        monkeypatch.setattr(f"{place}.time_shares", time_shares)
    budget = {"latency": 0.5, "runtime": runtime}
    nni_topo.shrink(toy_model().eval(), [toy_images(16)], budget, compensate=None, distill=False)
    assert set(sizes) == {16}  # also where some of them are held out


def test_a_budget_of_time_serves_pruners_of_nni_too():
    table = proportional(dict.fromkeys((*LAYERS, "head"), 1.0))
    small = shrunk({"latency": 0.6, "latency_table": table}, pruner="l1")
    cost = network_cost("latency", Analysis.on(toy_model(), toy_images(8)), table)
    widths = {row.name: (row.before, row.after) for row in small.report.layers.rows if row.name != "norm"}

    def share(more=()):
        """The share of the time that is kept, with one more channel in some of the layers."""
        masks = {name: np.arange(whole) < kept + (name in more) for name, (whole, kept) in widths.items()}
        return cost(masks) / cost({})

    steps = [share(more) - share() for more in (("stem", "inner"), ("hidden",))]
    assert min(steps) > 0
    # channels are whole, so the budget is met within half of the largest step
    assert share() == pytest.approx(0.6, abs=max(steps) / 2)
    # and the report counts by the same table
    assert small.report.budget.left == pytest.approx(share())


def convolutions(*widths):
    """Return convolutions of these widths with a linear layer at the end, and images for them."""
    torch.manual_seed(0)
    layers = []
    for entering, leaving in pairwise((1, *widths)):
        layers += [nn.Conv2d(entering, leaving, 3, padding=1), nn.ReLU()]
    pooling = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 3)]
    return nn.Sequential(*layers, *pooling).eval(), [torch.randn(4, 1, 6, 6)]


def test_widths_are_multiples_that_processors_like_where_they_meet_the_budget():
    net, images = convolutions(8, 32, 64, 128, 256)
    few = {"pruner": "l1", "compensate": None, "distill": False}
    small = nni_topo.shrink(net, images, {"flops": 0.5}, **few)
    assert small.report.budget.left == pytest.approx(0.5, abs=0.01)
    for row, multiple in zip(small.report.layers.rows, (1, 4, 8, 16, 16), strict=False):
        assert row.after < row.before
        assert row.after % multiple == 0
    free = nni_topo.shrink(net, images, {"flops": 0.5}, round_to=1, **few)
    assert free.report.budget.left == pytest.approx(0.5, abs=0.002)
    assert any(row.after % 2 for row in free.report.layers.rows[:5])


def test_layers_keep_other_widths_where_multiples_miss_the_budget():
    net, images = convolutions(128, 32)
    small = nni_topo.shrink(net, images, {"params": 0.53}, pruner="l1", compensate=None, distill=False)
    assert small.report.budget.is_met
    assert small.report.budget.left == pytest.approx(0.53, abs=0.01)


def test_a_pruner_that_finds_the_number_itself_tells_what_it_leaves(caplog):
    # With many bins clusters are split until few neurons go.
    small = shrunk({"params": 0.5}, pruner="subcluster", knobs={"energy": 1e-6, "growth": {"bins": 10}})
    left, whole = (cost_of("params", net, toy_images(1)) for net in (small, toy_model()))
    assert left / whole > 0.51
    assert f"{left / whole:.4g} of the unpruned network's cost is kept" in caplog.text


def coordinates(scale):
    """A network of three coordinates that move together: softened probabilities can't see how far."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3)).eval()
    with torch.no_grad():
        net[-1].weight += 0.6 * torch.randn(24)
        for parameter in net[-1].parameters():
            parameter.mul_(scale)
    return net, torch.randn(256, 8, generator=torch.Generator().manual_seed(1))


def test_distilled_weights_that_take_the_outputs_away_are_discarded_and_the_report_says_why(caplog):
    net, images = coordinates(3000.0)  # so much apart that probabilities are 0 and 1
    knobs = {"steps": 60, "lr": 6e-3}
    report = nni_topo.shrink(net, [images], {"flops": 0.715}, distill={**knobs, "objective": "kl"}).report
    verdict, stages = report.distillation, {stage.network: stage for stage in report.stages}
    assert verdict.loss_after < verdict.loss_before
    assert verdict.distance_after > 2.0 * verdict.distance_before
    assert not verdict.is_kept
    assert stages["distilled"].distance == stages["reconstructed"].distance
    assert "distillation is discarded" in repr(report)
    assert "distilled (discarded)" in repr(report)
    # No classifier has such a range, so without an objective the outputs are numbers.
    better = nni_topo.shrink(net, [images], {"flops": 0.715}, distill={"steps": 60, "lr": 1e-3}).report
    assert better.distillation.objective == "squares"
    assert better.distillation.is_kept
    assert better.stages[-1].distance < stages["reconstructed"].distance


def test_samples_of_the_report_choose_nothing(digits, digits_net):
    """Other samples in their place change no weight, but the figures."""
    images = torch.cat(images_of(digits))[:128]
    others = images.clone()
    others[15::16] = torch.rand(8, *images.shape[1:], generator=torch.Generator().manual_seed(0))
    budget = {"flops": 0.3, "allocation": "auto"}
    small, other = (
        nni_topo.shrink(digits_net, list(given.split(32)), budget, distill={"steps": 40}) for given in (images, others)
    )
    assert small.report.distillation.steps > 0
    for name, tensor in small.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    assert small.report.stages[-1].distance != other.report.stages[-1].distance
    assert small.report.distillation == other.report.distillation


@pytest.mark.parametrize(
    ("knobs", "error", "message"),
    [
        ({"budget": {"flops": 1.5}}, ConfigError, "flops must be in"),
        ({"budget": {"size": 0.5}}, ConfigError, "key of budget must be a known name"),
        ({"pruner": "magic"}, ConfigError, "pruner must be a known name, got 'magic'"),
        ({"pruner": "level"}, ConfigError, "pruner must be one that removes whole channels, got 'level'"),
        ({"knobs": {"magic": 1}}, ConfigError, "knob of pruner 'reconstruction' must be a known name"),
        ({"compensate": "magic"}, ConfigError, "compensate must be a known name"),
        ({"pruner": lambda *_: {}}, ConfigError, "pruner must be a str, got"),
        ({"compensate": Reconstruct}, ConfigError, "compensate must be a str or a RecoveryMethod or None, got"),
        ({"distill": lambda *_: {}}, ConfigError, "distill must be .*, got"),
        ({"distill": {"images": []}}, ConfigError, "knob of distill must be a known name, got 'images'"),
        ({"layers": ["nowhere"]}, ConfigError, "nowhere"),
        ({"layers": []}, ConfigError, r"layers must name at least one layer, got none.*\(shrink\)"),
        (
            {"layers": ["stem", {"op_names": ["hidden"], "sparse_ratio": 0.5}]},
            ConfigError,
            r"a budget replaces sparse_ratio, got both \(layers\[1\]\)",
        ),
    ],
)
def test_what_can_not_be_used_is_refused(knobs, error, message):
    with pytest.raises(error, match=message):
        shrunk(**knobs)


@pytest.mark.parametrize(("pruner", "kind"), [("reconstruction", "flops"), ("l1", "memory")])
def test_a_budget_out_of_reach_leaves_the_fewest_channels_whatever_prunes(pruner, kind):
    small = shrunk(pruner=pruner, budget={kind: 1e-4}, distill=False)
    assert not small.report.budget.is_met
    assert small.report.budget.why.endswith(f"a budget of {small.report.budget.left:.4g} can be met")
    assert small.inner.out_channels == 1


class Blurred(nn.Module):
    """A blur of each channel, by a kernel that is no parameter of a layer, costs more than the layers."""

    def __init__(self):
        super().__init__()
        self.enter, self.inner, self.leave = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 24, 1), nn.Conv2d(24, 2, 1)
        self.register_buffer("kernel", torch.ones(1, 1, 7, 7) / 49.0)

    def forward(self, x):
        for layer in (self.enter, self.inner):
            x = layer(x).relu()
            kernel = self.kernel.expand(x.shape[1], 1, 7, 7)
            x = nn.functional.conv2d(x, kernel, padding=3, groups=x.shape[1])
        return self.leave(x)


class OneWidth(nn.Module):
    """Both layers keep equally many channels, because one attribute counts them."""

    def __init__(self):
        super().__init__()
        self.width = 24
        self.first, self.second, self.leave = nn.Linear(8, 24), nn.Linear(24, 24), nn.Linear(24, 3)

    def forward(self, x):
        for layer in (self.first, self.second):
            x = layer(x).relu().view(-1, self.width, 1).flatten(1)
        return self.leave(x)


@pytest.mark.parametrize(
    ("make", "size", "share"), [(Blurred, (3, 8, 8), 0.5), (Blurred, (3, 8, 8), 0.3), (OneWidth, (8,), 0.29)]
)
@pytest.mark.parametrize("pruner", ["random", "l1"])
def test_a_budget_is_met_where_a_first_plan_would_miss_it(make, size, share, pruner):
    torch.manual_seed(0)
    model, batch = make().eval(), torch.randn(16, *size)
    small = nni_topo.shrink(model, [batch], {"flops": share}, pruner=pruner, distill=False, round_to=1)
    assert zoo.count_macs(small, batch[:1]) == pytest.approx(share * zoo.count_macs(model, batch[:1]), rel=0.035)
    assert small.report.budget.is_near
    assert not small.report.layers.kept


def test_bad_models_and_images_are_refused():
    with pytest.raises(DataError, match="at least one batch, got none"):
        nni_topo.shrink(toy_model(), [], {"flops": 0.5})
    wrapped = toy_model()
    nni_topo.create_pruner("l1", wrapped, [{"op_names": ["inner"], "sparse_ratio": 0.5}])
    with pytest.raises(SpeedupError, match="unwrap_model"):
        nni_topo.shrink(wrapped, [toy_images(8)], {"flops": 0.5})


def test_named_layers_that_have_no_channels_to_remove_are_refused_with_those_that_have():
    torch.manual_seed(0)
    layers = {"conv": nn.Conv2d(1, 4, 3), "norm": nn.BatchNorm2d(4), "flat": nn.Flatten(), "head": nn.Linear(144, 3)}
    model = nn.Sequential(OrderedDict(layers)).eval()
    reason = "got norm: it has no channels of its own; head: it gives the model's output"
    with pytest.raises(ConfigError, match=rf"{reason}.*can be named: conv \(layers\)"):
        nni_topo.shrink(model, [torch.randn(32, 1, 8, 8)], {"flops": 0.5}, layers=["norm", "head"])


class WithStubbornLayers(nn.Module):
    """One convolution loses channels; the others are mixed by a softmax, meet a fixed size, or aren't used."""

    def __init__(self):
        super().__init__()
        self.free, self.mixed, self.sized = (nn.Conv2d(inside, 8, 3, padding=1) for inside in (3, 8, 8))
        self.idle, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x):
        x = self.mixed(torch.relu(self.free(x))).softmax(1)
        return self.head(self.sized(x).reshape(len(x), 8, -1).mean(2))


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        (["mixed"], "got mixed: the result of an operation depends on removed channels"),
        (["free", "sized"], "got sized: the sizes of an operation don't fit"),
        ([{"op_names": ["idle"], "max_sparse_ratio": 0.5}], "got idle: the forward doesn't use the layer"),
        (["idle", "head"], "doesn't use the layer; head: it gives the model's output"),
    ],
)
def test_named_layers_that_keep_all_channels_are_refused_with_the_reason(layers, reason):
    model = WithStubbornLayers().eval()
    with pytest.raises(ConfigError, match=rf"{reason}.*can be named: free \(layers\)"):
        nni_topo.shrink(model, [torch.randn(32, 3, 8, 8)], {"flops": 0.5}, layers=layers)


def test_a_type_may_select_layers_that_keep_all_channels_beside_others():
    model = WithStubbornLayers().eval()
    small = nni_topo.shrink(
        model, [torch.randn(32, 3, 8, 8)], {"flops": 0.7}, layers=[{"op_types": ["Conv2d"]}], distill=False
    )
    assert small.free.out_channels < 8
    assert (small.mixed.out_channels, small.sized.out_channels, small.idle.out_channels) == (8, 8, 8)


def test_named_layers_that_share_all_channels_with_others_are_refused_before_any_work():
    with pytest.raises(ConfigError, match=r"got stem: shared with inner.*\(layers\)"):
        shrunk({"flops": 0.9}, layers=["stem"], evaluate=lambda net: pytest.fail("ran"))
    with pytest.raises(ConfigError, match=r"got inner: shared with stem"):
        nni_topo.frontier(toy_model().eval(), [toy_images(64)], [0.5], layers=[{"op_names": ["inner"]}])


def test_the_report_names_layers_that_would_have_to_be_named_too():
    shared = "shared with inner, which isn't among the layers to prune"
    report = shrunk({"params": 0.5}, layers=["stem", "hidden"]).report
    assert report.whole == {"stem": shared}
    assert f"stem keeps all channels: {shared}" in repr(report)
    assert not report.budget.is_met
    met = shrunk({"params": 0.9}, layers=["stem", "hidden"]).report
    assert met.budget.is_near
    assert met.budget.why == ""


def test_an_augment_function_is_tried_before_anything_is_pruned():
    with pytest.raises(ConfigError, match=r"augment must return inputs that fit the model, got .*\(augment\)"):
        shrunk(distill={"augment": torch.Tensor.double}, evaluate=lambda net: pytest.fail("ran"))


def test_heads_are_pruned_by_an_entry_of_their_own():
    entry = {"op_names": ["layers.0.self_attn"]}
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    states = [torch.randn(8, 5, 16) for _ in range(4)]
    layers = [{**entry, "granularity": "head"}]
    small = nni_topo.shrink(model, states, {"params": 0.9}, layers=layers, pruner="l1", distill=False)
    assert sum(each.numel() for each in small.parameters()) < sum(each.numel() for each in model.parameters())
    with pytest.raises(ConfigError, match=r"granularity must be a known name, got 'heads'"):
        nni_topo.shrink(model, states, {"params": 0.9}, layers=[{**entry, "granularity": "heads"}])


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.ReLU(), "no convolution, linear or recurrent layer"),
        (nn.Linear(4, 4), "the model itself: it gives the model's output"),
        (nn.Sequential(nn.Linear(4, 2)), "0: it gives the model's output"),
    ],
)
def test_a_model_without_a_layer_to_prune_is_told_so(model, words):
    with pytest.raises(ConfigError, match=rf"whose channels can be removed, got none: {words}"):
        nni_topo.shrink(model, [torch.rand(16, 4)], {"flops": 0.5})


@pytest.mark.parametrize(("knobs", "is_same"), [({"seed": 0}, True), ({"seed": 1}, False)])
def test_the_seed_is_0(knobs, is_same):
    first, second = (shrunk(pruner="random", compensate=None, **own) for own in ({}, knobs))
    same = [torch.equal(one, other) for one, other in zip(first.parameters(), second.parameters(), strict=True)]
    assert all(same) is is_same


@pytest.mark.parametrize("progress", [None, False])
def test_progress_of_recovery_is_shown_unless_it_is_unwanted(progress, capsys, monkeypatch):
    monkeypatch.setattr("nni_topo.network.runtime.progress._DELAY", 0.0)
    shrunk(distill={"steps": 2, "lr": 1e-3}, progress=progress)
    lines = capsys.readouterr().err.splitlines()
    shown = {line.split(":")[0] for line in lines} & {"compensate", "distill"}
    assert shown == (set() if progress is False else {"compensate", "distill"})


def test_where_no_time_is_left_the_network_is_not_distilled_and_a_warning_says_so(caplog):
    small, plain = shrunk(distill=True, seconds=1e-3), shrunk(distill=False)
    assert all(map(torch.equal, small.state_dict().values(), plain.state_dict().values()))
    assert [each.network for each in small.report.stages] == ["unpruned", "pruned", "reconstructed"]
    (warning,) = [each for each in small.report.warnings if "isn't distilled" in each]
    assert warning.startswith("the network isn't distilled: seconds=0.001 leaves no time for it")
    assert warning in caplog.text


@pytest.mark.parametrize(("seconds", "of_distillation"), [(4.0, None), (1000.0, 1.0)])
@pytest.mark.slow
def test_distillation_ends_when_the_time_of_the_call_or_its_own_is_over(seconds, of_distillation):
    images = torch.randn(2048, 16, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
    knobs = {"steps": 10**6, "lr": 1e-3, "seconds": of_distillation}
    began = time.perf_counter()
    small = nni_topo.shrink(model, [images], {"flops": 0.3}, compensate=None, distill=knobs, seconds=seconds)
    assert small.report.distillation.is_out_of_time
    assert time.perf_counter() - began < 100.0  # as many steps would take a thousand


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"tolerance": 0.2, "budget": "flops", "distill": True}, "left out with a tolerance"),
        ({"distill": False}, r"left out with distill=False.* \(seconds, shrink\)"),
        ({"distill": True, "seconds": 0}, r"seconds must be above 0 and finite or None, got 0 \(shrink\)"),
    ],
)
def test_time_that_cannot_be_limited_is_refused(knobs, words):
    with pytest.raises(ConfigError, match=words):
        shrunk(**{"seconds": 60.0, **knobs})


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        (
            {},
            "selecting channels about TIME, reconstructing weights about TIME, distilling at most TIME (600 steps of "
            "at most TIME each, 90 of them to find the learning rate, 600 more at a lower one if needed); "
            "distill={'seconds': ...} limits distillation",
        ),
        (
            {"pruner": "l1", "distill": {"steps": 2, "lr": 1e-3, "seconds": 60}},
            "reconstructing weights about TIME, distilling at most TIME (2 steps of at most TIME each); not counted: "
            "selecting channels",
        ),
        ({"distill": False}, "selecting channels about TIME, reconstructing weights about TIME"),
        ({"distill": False, "tolerance": 0.2}, "selecting channels about TIME, reconstructing weights about TIME"),
    ],
)
def test_what_each_stage_takes_is_told_before_the_work(knobs, words, caplog):
    caplog.set_level("INFO", "nni_topo")
    nni_topo.shrink(toy_model(), [toy_images(64)], "flops" if "tolerance" in knobs else {"flops": 0.5}, **knobs)
    told = [re.sub(r"[0-9.e-]+ (s|minutes?|hours?)\b", "TIME", each.getMessage()) for each in caplog.records]
    assert [each for each in told if each.startswith("shrink ")] == [f"shrink takes about TIME: {words}"]
    assert "WARNING" not in [each.levelname for each in caplog.records if "takes about" in each.getMessage()]


def test_more_than_ten_minutes_are_a_warning_beforehand(caplog):
    prepared = prepare(toy_model(), nni_topo.Calibration([toy_images(64)]), Settings(), nni_topo.Budget(flops=0.5))
    replace(prepared, seconds_of_a_step=0.1).tell_cost()
    assert [each.levelname for each in caplog.records] == ["WARNING"]
    assert "distilling at most 1.9 hours (600 steps of at most 5.6 s each" in caplog.text
