"""The steps of `shrink`, each by itself: what is refused before any work, which layers lose channels, what is told."""

from __future__ import annotations

import copy
import logging
import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from toy_times import LAYERS, proportional

from nni_topo import compensate, create_pruner, shrink
from nni_topo.errors import ConfigError, DataError
from nni_topo.network.runtime.calibration import Calibration
from nni_topo.network.speedup.analysis import Analysis
from nni_topo.network.speedup.dense import to_dense
from nni_topo.pruners.budget import Budget, budget_outcome
from nni_topo.recovery import Reconstruct, distillation
from nni_topo.recovery.likeness import NO_SCALE
from nni_topo.recovery.report import SMALL
from nni_topo.runs.images import ImageParts
from nni_topo.runs.measurements import Measurements, evaluated
from nni_topo.runs.prepared import Prepared
from nni_topo.runs.prunable import layers_to_prune
from nni_topo.runs.settings import Settings
from nni_topo.testing import toy_images, toy_model
from nni_topo.zoo.transformers import vit_small

FLOPS = Budget(flops=0.5)


def images(count=16, seed=0):
    return Calibration([toy_images(count, seed)])


def asked(**given):
    return Settings(**{"pruner": "l1", "compensate": None, "distill": False, "progress": False} | given)


def steps(model=None, budget=FLOPS, data=None, **given):
    """What is known of a network, by default the toy network, with few images."""
    model = toy_model().eval() if model is None else model
    return Prepared.of(model, data or ImageParts.of(images(), model), asked(**given), budget)


def distilled(chosen, dense, **own):
    return chosen.distil(replace(chosen.start, dense=dense), **own)


def test_parts_of_the_images_are_named_or_every_eighth_is_held_out():
    model, all_of_them, first, judges, held_out = toy_model().eval(), *map(images, (16, 8, 4, 3))
    parts = ImageParts.of(all_of_them, model)
    assert (parts.learned.samples, parts.judges.samples) == (14, 2)
    assert parts.judges is parts.held_out
    named = ImageParts.of(all_of_them, model, (first, judges, held_out))
    assert (named.all, named.learned) == (all_of_them, first)
    assert (named.judges, named.held_out) == (judges, held_out)
    for each in (parts, named):
        (example,) = each.example
        assert example.shape[1:] == (3, 8, 8)
    without_first = ImageParts.of(all_of_them, model, (None, judges, None))
    assert without_first.learned is all_of_them
    assert without_first.held_out is None
    assert ImageParts.of(Calibration([{"images": toy_images(4)}]), model).example.keys() == {"images"}
    assert ImageParts.of(Calibration([{"images": toy_images(4)}]), model, (None, None, None)).example.keys() == {
        "images"
    }


@pytest.mark.parametrize(
    ("knobs", "narrows", "round_to"),
    [
        ({}, True, None),
        ({"narrow_heads": False}, False, None),
        ({"budget": Budget(latency=0.5)}, False, None),
        ({"budget": Budget(flops=0.5, equal_blocks=True)}, False, None),
        ({"round_to": 1}, True, None),
        ({"round_to": 2}, False, 2),
        ({"round_to": 6}, False, 6),
    ],
)
@pytest.mark.quick_every(2)
def test_heads_get_narrower_unless_time_or_widths_count(knobs, narrows, round_to):
    found = steps(**knobs)
    assert (found.narrows, found.round_to) == (narrows, round_to)
    assert not found.is_search


class Attending(nn.Module):
    """Attention, a layer that loses channels and two heads, of which each gives an output."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.idle, self.unused, self.free = nn.Conv1d(8, 8, 1), nn.Conv1d(8, 8, 1), nn.Conv1d(8, 6, 1)
        self.one, self.two = nn.Linear(6, 3), nn.Linear(6, 2)

    def forward(self, x):
        """Map (samples, places, 8) to (samples, 3) and (samples, 2)."""
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.free(x.transpose(1, 2)).relu().mean(2)
        return self.one(x), self.two(x)


HEADS = {"op_names": ["attention"], "granularity": "head"}
NAMED = "layers of this model that can be named: "


@pytest.mark.parametrize(
    ("layers", "got"),
    [
        (["idle", "unused"], "idle, unused: the forward doesn't use the layer;"),
        # An entry that asks for heads leaves the others to be looked at.
        ([HEADS, "one"], "one: it gives the model's output;"),
        ([{"op_types": ["Linear"]}], "one, two: it gives the model's output;"),
        # What was named first isn't forgotten.
        ([{"op_names": ["one"]}, {"op_types": ["Conv1d"]}], "one: it gives the model's output;"),
        ([{"op_names": ["free", "one"]}], "one: it gives the model's output;"),
    ],
)
@pytest.mark.quick_every(4)
def test_layers_that_keep_all_channels_are_refused_by_name(layers, got):
    model, example = Attending().eval(), torch.rand(2, 5, 8)
    with pytest.raises(ConfigError) as caught:
        layers_to_prune(Analysis.on(model, example), layers)
    assert f"got {got}" in str(caught.value)
    assert "attention" not in str(caught.value).partition(NAMED)[0]


class Twice(nn.Module):
    """A layer under two names, and an embedding that isn't used."""

    def __init__(self):
        super().__init__()
        self.one, self.head, self.words = nn.Linear(4, 4), nn.Linear(4, 2), nn.Embedding(5, 4)
        self.two = self.one

    def forward(self, x):
        """Map (samples, 4) to (samples, 2)."""
        return self.head(self.two(self.one(x).relu()).relu())


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("two", "it is one under another name, and loses what that loses"),
        ("words", "the forward doesn't use the layer"),
    ],
)
def test_layers_that_no_list_of_layers_has_are_refused_with_the_reason(name, why):
    with pytest.raises(ConfigError, match=f"got {name}: {why}; layers of"):
        layers_to_prune(Analysis.on(Twice(), torch.rand(2, 4)), [name])


def test_an_entry_for_heads_may_name_a_module_that_holds_layers():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), nn.Linear(8, 2))
    entry = {"op_names": ["0"], "granularity": "head"}
    assert layers_to_prune(Analysis.on(model, torch.rand(2, 4)), [entry]).entries == [entry]
    with pytest.raises(ConfigError, match=r"got 0: it has no channels of its own;"):
        layers_to_prune(Analysis.on(model, torch.rand(2, 4)), ["0"])


def test_a_function_of_the_callers_may_change_the_config_list_it_is_given():
    seen = []

    def choose(model, config_list, images):
        seen.append(copy.deepcopy(config_list))
        for entry in config_list:
            entry["op_names"].clear()
        config_list.clear()
        return {}

    chosen = steps(pruner=choose)
    for _ in range(2):
        assert chosen.select(FLOPS).masks == {}
    assert seen[0] == seen[1]
    assert [entry["op_names"] for entry in seen[0]] == [["stem"], ["inner"], ["hidden"]]


@pytest.mark.parametrize("compensate", [None, "reconstruct"])
def test_masks_of_a_function_are_rounded_to_a_multiple(compensate):
    def choose(model, config_list, images):
        mask = torch.ones_like(model.hidden.weight)
        mask[:5] = 0.0
        return {"hidden": {"weight": mask}}

    chosen = steps(pruner=choose, round_to=4, compensate=compensate)
    pruned = chosen.select(FLOPS)
    assert pruned.planned is None
    made = chosen.reconstruct(pruned)
    assert made.dense.hidden.out_features == 12  # of 16, and 11 aren't a multiple of 4
    assert made.without_recovery().dense.hidden.out_features == 12


@pytest.mark.parametrize("distill", [False, lambda dense, model, images: dense])
def test_what_is_not_distilled_by_the_package_needs_no_images_for_it(distill):
    asked(distill=distill).check_distillation(toy_model().eval(), images(1))


@pytest.mark.parametrize("distill", [True, {}, {"steps": 2}])
def test_distillation_needs_two_samples(distill):
    model = toy_model().eval()
    with pytest.raises(DataError, match="at least two samples, one to judge by, got 1"):
        asked(distill=distill).check_distillation(model, images(1))
    asked(distill=distill).check_distillation(model, images(2))
    # A network without weights has no layer to prune, which is told later.
    asked(distill=distill).check_distillation(nn.ReLU(), Calibration([torch.zeros(2, 4), torch.zeros(2, 5)]))
    data = Calibration([torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 9, 9)])
    with pytest.raises(DataError, match="inputs of all batches must have one shape"):
        asked(distill=distill).check_distillation(model, data)


def test_outputs_of_the_knobs_go_before_those_of_the_call():
    def refuse(output, inputs):
        return output.sum()

    knobs = {"outputs": lambda output, inputs: output}
    asked(distill=knobs, outputs=refuse).check_distillation(toy_model().eval(), images(4))


EVEN = {"distance": 0.1, "distance_low": 0.05, "distance_high": 0.15, "calibration_distance": 0.1}


def measured(*stages, **knobs):
    """Measurements with stages of such names and figures."""
    model = toy_model().eval()
    found = Measurements(model, ImageParts.of(images(), model), None, **knobs)
    found.add("unpruned", model)
    for name, figures in stages:
        found.stages.append(replace(found.stages[0], network=name, **EVEN | figures))
    return found


@pytest.mark.parametrize(
    ("distances", "is_told"),
    [
        ({"pruned": 0.5, "reconstructed": 0.1, "distilled": 0.21}, True),
        ({"pruned": 0.05, "reconstructed": 0.1, "distilled": 0.2}, False),  # twice as far isn't more than twice
        ({"pruned": 0.1, "reconstructed": 0.3, "distilled": 0.5}, False),
        ({"pruned": 0.1, "distilled": 0.3}, True),
        ({"pruned": 0.1, "reconstructed": 0.3}, False),
        ({"pruned": 3.0, "distilled": 7.0}, True),
        ({"pruned": 3.0, "distilled": 5.0}, False),
    ],
)
def test_distillation_that_leads_away_is_told_by_the_last_two_networks(distances, is_told, caplog):
    stages = [(name, {"distance": far, "distance_high": 9.0}) for name, far in distances.items()]
    found = measured(*stages).warnings(())
    told = [text for text in found if "the distilled network is kept" in text]
    assert len(told) == is_told
    assert set(told) <= {record.getMessage() for record in caplog.records}


FAR = {"distance": 0.3, "distance_low": 0.2, "distance_high": 0.4}
LESS = {"agreement": 0.8, "agreement_low": 0.7, "agreement_high": 0.85, "calibration_agreement": 0.9}


@pytest.mark.parametrize(
    ("before", "last", "is_told"),
    [
        ({}, FAR, True),
        ({}, {**FAR, "distance": 0.2}, False),  # twice as far isn't more than twice
        (FAR, {}, False),
        ({}, LESS, True),
        (LESS, {}, False),
        ({}, {**FAR, **LESS}, True),
        ({}, {**FAR, "distance_low": 0.05, "distance": 5.0, "distance_high": 9.0}, False),
        ({}, {**LESS, "agreement_high": 0.9}, False),  # the interval ends at the other figure
        ({}, {**LESS, "agreement": 0.85, "agreement_high": 0.88}, False),  # not more than 0.05 less
        ({}, {**LESS, "distance": SMALL}, True),
        ({}, {**LESS, "distance": SMALL / 2}, False),
    ],
)
def test_too_few_images_are_told_by_the_last_network(before, last, is_told):
    found = measured(("pruned", before), ("reconstructed", last))
    assert ["samples are too few" in text for text in found.warnings(())] == [True] * is_told


@pytest.mark.parametrize(("place", "is_told"), [(1, False), (2, True)])
def test_outputs_without_a_scale_are_told_of_the_last_network(place, is_told):
    found = measured(("pruned", {}), ("reconstructed", {}))
    found.stages[place] = replace(found.stages[place], distance=math.inf)
    assert found.warnings(()) == ((NO_SCALE,) if is_told else ())


def test_a_network_is_measured_on_the_first_and_the_last_part():
    model, other = toy_model().eval(), toy_model(1).eval()
    first, judges, held_out = images(8), images(8, 1), images(8, 2)
    data = ImageParts.of(first, model, (first, judges, held_out))

    def double(output, inputs):
        return output[:, :2]

    other.mark = True
    found = Measurements(model, data, lambda net: 1 + hasattr(net, "mark"), double)
    for name, net in (("unpruned", model), ("pruned", other)):
        found.add(name, net)
    with torch.no_grad():
        wanted, got = ([net(toy_images(8, seed))[:, :2].double() for seed in range(3)] for net in (model, other))
    # Shares of the variance of the images held out.
    scale = (wanted[2] - wanted[2].mean(0)).square().sum(1).mean()
    far = [float((one - two).square().sum(1).mean() / scale) for one, two in zip(wanted, got, strict=True)]
    unpruned, pruned = found.stages
    assert (unpruned.network, pruned.network) == ("unpruned", "pruned")
    assert (pruned.calibration_distance, pruned.distance) == pytest.approx((far[0], far[2]))
    assert (unpruned.accuracy, pruned.accuracy) == (1.0, 2.0)
    assert unpruned.seconds == 0.0
    assert 0.0 < pruned.seconds < 600.0


def test_a_number_that_evaluate_cannot_find_is_told_of_a_pruned_network_and_refused_of_the_given_one(caplog):
    model, other, first = toy_model().eval(), toy_model(1).eval(), images(8)
    other.mark = True
    data = ImageParts.of(first, model, (first, images(8, 1), images(8, 2)))
    found = Measurements(model, data, lambda net: math.nan if hasattr(net, "mark") else 1.0)
    with pytest.raises(ConfigError, match="evaluate must return a number for the model as it was given, got nan"):
        found.add("unpruned", other)
    with pytest.raises(ConfigError, match="evaluate must return a number for the model as it was given, got inf"):
        Measurements(model, data, lambda net: math.inf).add("unpruned", model)
    assert found.stages == []
    found.add("unpruned", model)
    with caplog.at_level(logging.WARNING, logger="nni_topo"):
        found.add("pruned", other)
    assert caplog.messages == ["evaluate returned nan for the pruned network"]
    assert math.isnan(found.stages[-1].accuracy)


@pytest.mark.parametrize(("given", "found"), [(2, 2.0), (torch.tensor(0.5), 0.5), (torch.tensor([0.25]), 0.25)])
def test_what_evaluate_returns_is_a_number(given, found):
    assert evaluated(lambda net: given, toy_model(), "pruned") == found


@pytest.mark.parametrize("given", [None, "much", "0.25", b"1", torch.zeros(2), [1.0]])
def test_what_is_no_number_is_refused(given):
    with pytest.raises(ConfigError, match=r"evaluate must return a number, got .* \(shrink\)"):
        evaluated(lambda net: given, toy_model(), "unpruned")


def test_it_is_told_for_which_network_evaluate_fails_or_finds_no_finite_number(caplog):
    def failing(net):
        raise KeyError("width")

    with caplog.at_level(logging.WARNING, logger="nni_topo"):
        with pytest.raises(KeyError, match="width"):
            evaluated(failing, toy_model(), "reconstructed")
        assert evaluated(lambda net: math.inf, toy_model(), "distilled") == math.inf
        assert evaluated(lambda net: -math.inf, toy_model(), "unpruned") == -math.inf  # which is refused elsewhere
    failed, infinite = caplog.messages
    assert "the reconstructed network: KeyError: 'width'" in failed
    assert infinite == "evaluate returned inf for the distilled network"


@pytest.mark.parametrize(
    "layers",
    [None, ["stem"], [{"op_types": ["Conv2d"]}], ["stem", {"op_types": ["Linear"]}]],
)
def test_layers_that_a_model_has_are_taken(layers):
    asked(layers=layers).check_layers(toy_model())


def choices(budget=FLOPS, **given):
    asked(**given).check_budget(budget)


@pytest.mark.parametrize(
    "given",
    [
        {"knobs": {}, "layers": ["stem", {"op_types": ["Linear"]}], "distill": True},
        {"compensate": "reconstruct", "distill": {"held_out": [torch.zeros(1)], "progress": True}},
        {"compensate": Reconstruct(refine=0), "distill": {}},
        {"compensate": lambda model, masks, images: model, "distill": lambda dense, model, images: dense},
        {"pruner": lambda model, config_list, images: {}},
        {"outputs": lambda output, inputs: output, "evaluate": lambda network: 1.0},
        {"pruner": "reconstruction", "budget": Budget(flops=0.5, allocation="auto")},
    ],
)
def test_choices_that_can_be_used_are_taken(given):
    choices(**given)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"pruner": "taylor"}, "needs no evaluator, training_steps, got 'taylor'"),
        ({"pruner": "reconstruction", "knobs": {"budget": {"flops": 0.2}}}, "budget must be left out of knobs"),
        (
            {"budget": Budget(flops=0.5, allocation="error")},
            r"allocation of pruner 'l1' must be 'uniform', got 'error'",
        ),
        ({"distill": {"objective": "l2"}}, "objective must be a known name, got 'l2'"),
        ({"distill": {"seed": -1}}, "seed must be an integer of at least 0"),
    ],
)
def test_choices_that_could_not_be_kept_are_refused_before_any_work(given, told):
    with pytest.raises(ConfigError, match=told):
        choices(**given)


def test_entries_are_read_before_the_model_runs():
    with pytest.raises(ConfigError, match=r"got 'op_name'; did you mean op_names.*layers\[0\]"):
        asked(layers=[{"op_name": ["stem"]}]).check_layers(toy_model())


class Twelve(nn.Module):
    """Attention of twelve heads of eight channels, and two layers."""

    def __init__(self):
        super().__init__()
        self.embed, self.attention = nn.Linear(12, 96), nn.MultiheadAttention(96, 12, batch_first=True)
        self.hidden, self.head = nn.Linear(96, 128), nn.Linear(128, 4)

    def forward(self, x):
        x = self.embed(x)
        return self.head(self.hidden(x + self.attention(x, x, x, need_weights=False)[0]).relu()).mean(1)


def test_a_budget_that_narrower_heads_miss_is_told(caplog):
    torch.manual_seed(0)
    settings = {"pruner": "l1", "compensate": None, "distill": False}
    small = shrink(Twelve().eval(), [torch.randn(32, 5, 12)], {"params": 0.4}, **settings)
    assert not small.report.budget.is_met  # by 0.0101: whole heads would have met it
    assert [each for each in caplog.messages if "the params budget" in each] == [str(small.report.budget)]


def two_outputs(output, inputs):
    return output[:, :2]


def own_parts(model):
    """Images of which others decide than those that are held out."""
    return ImageParts.of(images(), model, (images(8), images(4, 1), images(4, 2)))


def test_distillation_gets_the_judges_the_outputs_and_the_seed():
    model, dense = toy_model().eval(), toy_model(1).eval()
    chosen = steps(model, data=own_parts(model), distill={"steps": 2, "lr": 1e-3}, outputs=two_outputs, seed=3)
    made = distilled(chosen, dense)
    knobs = {"held_out": images(4, 1), "outputs": two_outputs, "seed": 3, "steps": 2, "lr": 1e-3}
    wanted = distillation(dense, model, images(8), **knobs)
    torch.testing.assert_close(made.dense.state_dict(), wanted.model.state_dict(), rtol=0, atol=0)
    assert made.verdict == wanted.verdict


@pytest.mark.parametrize(
    ("given", "own", "taken"),
    [
        (True, {"steps": 2}, 2),
        ({}, {"steps": 2}, 2),
        ({"steps": 1}, {"steps": 2}, 1),
        ({"steps": None}, {"steps": 2}, 2),  # not given
        ({"steps": 1, "seconds": None}, {}, 1),
    ],
)
@pytest.mark.quick_every(2)
def test_knobs_of_the_caller_go_before_those_of_a_network(given, own, taken):
    made = distilled(steps(distill=given), toy_model(1).eval(), **{"lr": 1e-3, **own})
    assert made.verdict.steps == taken


def test_without_distillation_a_network_stays_and_a_function_takes_its_place():
    dense, other = toy_model(1).eval(), toy_model(2).eval()
    found = distilled(steps(), dense)
    assert (found.dense, found.verdict) == (dense, None)
    chosen = steps(distill=lambda small, model, images: other if (small, images.samples) == (dense, 14) else None)
    found = distilled(chosen, dense)
    assert (found.dense, found.verdict) == (other, None)
    with pytest.raises(ConfigError, match=r"distill must return a torch.nn.Module, got NoneType \(shrink\)"):
        distilled(chosen, other)


def masks_of(seed, **knobs):
    masks = steps(pruner="random", seed=seed, **knobs).select(FLOPS).masks
    return torch.cat([masks[name]["weight"].flatten() for name in ("stem", "hidden")])


def test_a_pruner_gets_the_seed_and_the_knobs_of_the_caller():
    assert torch.equal(masks_of(1), masks_of(1))
    assert not torch.equal(masks_of(1), masks_of(2))
    assert torch.equal(masks_of(1), masks_of(2, knobs={"seed": 1}))
    assert int(masks_of(1, round_to=4)[-16 * 8 :].view(16, 8).amax(1).sum()) % 4 == 0


@pytest.mark.parametrize("pruner", ["l1", "random"])
def test_a_missed_budget_is_told_once_of_the_dense_network(pruner, caplog):
    capped = [{"op_names": ["stem", "inner", "hidden"], "max_sparse_ratio": 0.25}]
    small = shrink(toy_model().eval(), images(), {"flops": 0.4}, pruner=pruner, layers=capped, distill=False)
    told = [each for each in caplog.messages if "the flops budget of 0.4 is missed" in each]
    assert told == [str(small.report.budget)]


@pytest.mark.parametrize(
    ("narrow_heads", "equal_blocks", "is_narrower"), [(True, False, True), (False, False, False), (True, True, False)]
)
@pytest.mark.quick_every(4)
def test_heads_get_narrower_where_that_is_asked_for(narrow_heads, equal_blocks, is_narrower):
    torch.manual_seed(0)
    net = vit_small(4, 1, 8).eval()
    data = ImageParts.of(Calibration([torch.randn(16, 1, 8, 8)]), net)

    def first_head(model, config_list, images):
        rows = torch.arange(len(model.blocks[0].attention.q_proj.weight))
        mask = (rows >= 16)[:, None].expand_as(model.blocks[0].attention.q_proj.weight).float()
        return {f"blocks.0.attention.{name}_proj": {"weight": mask.clone()} for name in "qkv"}

    budget = Budget(flops=0.5, equal_blocks=equal_blocks)
    pruned = steps(net, budget, data, pruner=first_head, narrow_heads=narrow_heads).select(budget)
    assert (pruned.narrower is not None) == is_narrower


def test_a_search_asks_the_same_pruner_for_every_size():
    once, search = steps(pruner="random"), steps(pruner="random").for_search()
    for share in (0.5, 0.75):
        budget = Budget(flops=share)
        kept = [each.select(budget) for each in (once, search)]
        torch.testing.assert_close(kept[0].masks, kept[1].masks, rtol=0, atol=0)
        assert [each.planned.left for each in kept] == pytest.approx([share] * 2, abs=0.05)


def test_inputs_by_which_a_cost_is_counted():
    time = Budget(latency=0.5)
    assert [each.shape[0] for each in steps(budget=time).example] == [14]  # a whole batch of those to learn from
    model = toy_model().eval()
    by_name = ImageParts.of(Calibration([{"images": toy_images(16)}]), model)
    assert steps(model, data=by_name).example is by_name.example
    assert steps(model, time, by_name).example["images"].shape == (14, 3, 8, 8)


def recovered_from(chosen, masks, planned=None, left=1.0):
    return replace(chosen.start, masks=masks, planned=planned, left=left).remove()


def halved(name, width):
    mask = torch.ones_like(getattr(toy_model(), name).weight)
    mask[: width // 2] = 0.0
    return {name: {"weight": mask}}


def test_why_a_budget_is_missed():
    chosen = steps(pruner="reconstruction")
    all_removed = recovered_from(chosen, halved("hidden", 16), left=0.4)
    assert chosen.why_missed(0.5, all_removed) == "the next possible numbers of channels come no nearer"
    # Channels of the stem are added to those of another layer, which keeps them.
    some_kept = recovered_from(chosen, halved("stem", 8), left=0.7)
    assert chosen.why_missed(0.5, some_kept) == "layers keep channels that were to be removed"
    free = replace(chosen, settings=asked(pruner="subcluster"))
    assert free.why_missed(0.5, some_kept) == "the pruner chooses how many channels it keeps"


def test_the_reason_of_the_plan_comes_first_and_a_plan_that_was_met_is_told():
    chosen = steps()
    for left, told in ((0.7, "all layers are at their bounds"), (0.5, "the planned share of 0.5 in a smaller network")):
        planned = budget_outcome("flops", 0.5, left, told)
        assert chosen.why_missed(0.5, recovered_from(chosen, halved("hidden", 16), planned, 0.7)).endswith(told)


def test_the_share_of_a_cost_that_a_network_keeps():
    chosen = steps()
    half = recovered_from(chosen, halved("hidden", 16))
    # A convolution has 8 x 8 places; the hidden layer maps 8 features to 16, the head these to 4.
    whole = 64 * 9 * (3 * 8 + 8 * 8) + 8 * 16 + 16 * 4
    assert chosen.share_left(half) == pytest.approx((whole - 8 * 8 - 8 * 4) / whole)
    assert 0.1 < steps(budget=Budget(latency=0.5)).share_left(half) < 4.0  # it is timed
    # By a table of the products of widths, of which the hidden layer and the head lose half.
    table = proportional(dict.fromkeys((*LAYERS, "head"), 1.0))
    assert steps(budget=Budget(latency=0.5, latency_table=table)).share_left(half) == pytest.approx(
        (3 * 8 + 8 * 8 + 8 * 8 + 8 * 4) / (3 * 8 + 8 * 8 + 8 * 16 + 16 * 4)
    )
    assert steps(budget=Budget(params=0.5)).share_left(half) == pytest.approx(1 - (8 * 9 + 8 * 4) / 1076, rel=1e-2)


@pytest.fixture
def shared():
    """Images that are shared with another process, which nothing asks."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield Calibration([toy_images(8)], process_group=dist.group.WORLD)
    dist.destroy_process_group()


def test_what_processes_that_share_images_can_not_do_is_refused(shared):
    def check(data, budget=FLOPS, tolerance=None, **given):
        asked(**{"compensate": "reconstruct", "distill": True} | given).check_shared(data, budget, tolerance)

    check(shared)
    check(shared, compensate=Reconstruct(), distill={"steps": 2})
    refused = {
        "distill": {"distill": lambda dense, model, images: dense},
        "tolerance": {"tolerance": 0.5},
        "depth": {"depth": True},
        "allocation": {"budget": Budget(flops=0.5, allocation="auto")},
        "pruner": {"pruner": lambda model, config_list, images: {}},
        "compensate": {"compensate": lambda model, masks, images: model},
    }
    for names in (*([name] for name in refused), ["distill", "compensate"]):
        given = {knob: value for name in names for knob, value in refused[name].items()}
        with pytest.raises(ConfigError) as caught:
            check(shared, **given)
        assert f"got {', '.join(names)} (process_group of" in str(caught.value)
        check(images(), **given)
    with pytest.raises(ConfigError, match="without seconds, augment, state, blocks, got seconds"):
        check(shared, distill={"seconds": 1.0})
    plain = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).eval()
    asked(distill={"blend": False}).check_distillation(plain, shared)
    for data in (shared, images()):
        for knobs in (True, {"objective": "cosine"}):
            if data is shared:
                with pytest.raises(ConfigError, match="processes that share images must distil"):
                    asked(distill=knobs).check_distillation(plain, data)
            else:
                asked(distill=knobs).check_distillation(plain, data)


class Recurrent(nn.Module):
    """Takes a state (levels, samples, units), and returns the next one or none."""

    def __init__(self, returns):
        super().__init__()
        self.cell, self.head, self.returns = nn.GRU(3, 5, 2, batch_first=True), nn.Linear(5, 2), returns

    def forward(self, x, state):
        found, state = self.cell(x, state)
        answer = self.head(found[:, -1])
        return (answer, state) if self.returns else answer


class StatesFirst(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, state):
        found = self.model(x, state.transpose(0, 1).contiguous())
        return (found[0], found[1].transpose(0, 1)) if isinstance(found, tuple) else found


@pytest.mark.parametrize("returns", [True, False])
def test_a_state_that_is_returned_is_told_and_its_samples_are_first(returns):
    model, x, state = Recurrent(returns).eval(), torch.randn(16, 4, 3), torch.zeros(2, 16, 5)
    with pytest.raises(
        ConfigError, match=r"every eighth one is held out.*samples must be the first dimension of every input"
    ):
        ImageParts.of(Calibration([((x, state),)]), model)
    turned = StatesFirst(model)
    measured = Measurements(turned, ImageParts.of(Calibration([((x, state.transpose(0, 1)),)]), turned), None)
    measured.add("unpruned", turned)
    told = ["one step at a time, each from the calibration data's state" in each for each in measured.warnings(())]
    assert any(told) == returns


class Graph(nn.Module):
    """Two graph convolutions over edges (2, edges), or over a matrix of adjacency (nodes, nodes)."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x, edges):
        for layer in (self.enter, self.leave):
            mixed = edges @ x if edges.is_floating_point() else torch.zeros_like(x).index_add(0, edges[1], x[edges[0]])
            x = layer(mixed).relu()
        return x


@pytest.mark.parametrize("edges", [torch.tensor([[0, 39], [39, 1]]), torch.eye(40)])
def test_rows_of_a_graph_are_nodes_and_whole_graphs_go_step_by_step(edges):
    model, inputs = Graph().eval(), (torch.randn(40, 3), edges)
    with pytest.raises(ConfigError, match=r"of 40 samples it got 35 .* take whole graphs"):
        shrink(model, [(inputs, torch.zeros(40))], {"params": 0.5}, progress=False)
    pruner = create_pruner("l1", model, [{"op_names": ["enter"], "sparse_ratio": 0.5}])
    _, masks = pruner.compress()
    pruner.unwrap_model()
    dense = to_dense(compensate(model, masks, [(inputs, torch.zeros(40))]), inputs, masks)
    assert dense.enter.out_features == 4
    assert dense(*inputs).shape == (40, 2)
