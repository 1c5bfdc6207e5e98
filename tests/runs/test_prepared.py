"""The steps of `shrink`, each by itself: what is refused before any work, which layers lose channels, what is told."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from toy_times import LAYERS, proportional

from nni_topo import compensate, create_pruner, shrink
from nni_topo.errors import ConfigError, DataError
from nni_topo.network.runtime.calibration import Calibration
from nni_topo.network.speedup.dense import dense_of
from nni_topo.pruners.budget import Budget
from nni_topo.recovery import distillation
from nni_topo.runs.images import ImageParts
from nni_topo.runs.measurements import Measurements, evaluated
from nni_topo.runs.prepared import Prepared
from nni_topo.runs.settings import Settings
from nni_topo.testing import toy_images, toy_model

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


def test_distillation_needs_two_samples_of_any_shape():
    never = {"distill": {"steps": 2}, "evaluate": lambda net: pytest.fail("it ran")}
    with pytest.raises(DataError, match="at least two samples, one to judge by, got 1"):
        shrink(toy_model().eval(), images(1), {"flops": 0.5}, **never)
    data = Calibration([torch.randn(2, 3, 8, 8), torch.randn(2, 3, 9, 9)])
    small = shrink(toy_model().eval(), data, {"flops": 0.5}, distill={"steps": 2})
    assert small.report.distillation.held_out == 2


EVEN = {"distance": 0.1, "distance_low": 0.05, "distance_high": 0.15, "calibration_distance": 0.1}


def measured(*stages, **knobs):
    """Measurements with stages of such names and figures."""
    model = toy_model().eval()
    found = Measurements(model, ImageParts.of(images(), model), None, **knobs)
    found.add("unpruned", model)
    for name, figures in stages:
        found.stages.append(replace(found.stages[0], network=name, **EVEN | figures))
    return found


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
        ({}, {**FAR, "distance_low": 0.05, "distance": 5.0, "distance_high": 9.0}, False),
        ({}, {**LESS, "agreement_high": 0.9}, False),  # the interval ends at the other figure
        ({}, {**LESS, "agreement": 0.85, "agreement_high": 0.88}, False),  # not more than 0.05 less
    ],
)
def test_too_few_images_are_told_by_the_last_network(before, last, is_told):
    found = measured(("pruned", before), ("reconstructed", last))
    assert ["samples are too few" in text for text in found.warnings(())] == [True] * is_told


def test_a_network_is_measured_on_the_first_and_the_last_part():
    model, other = toy_model().eval(), toy_model(1).eval()
    first, judges, held_out = images(8), images(8, 1), images(8, 2)
    data = ImageParts.of(first, model, (first, judges, held_out))

    def double(output, inputs):
        return output[:, :2]

    other.mark = True
    found = Measurements(model, data, lambda net: 1 + hasattr(net, "mark"), double)
    found.add("unpruned", model)
    found.add("pruned", other, 3.0)
    with torch.no_grad():
        wanted, got = ([net(toy_images(8, seed))[:, :2].double() for seed in range(3)] for net in (model, other))
    # Shares of the variance of the images held out.
    scale = (wanted[2] - wanted[2].mean(0)).square().sum(1).mean()
    far = [float((one - two).square().sum(1).mean() / scale) for one, two in zip(wanted, got, strict=True)]
    unpruned, pruned = found.stages
    assert (unpruned.network, pruned.network) == ("unpruned", "pruned")
    assert (pruned.calibration_distance, pruned.distance) == pytest.approx((far[0], far[2]))
    assert (unpruned.accuracy, pruned.accuracy) == (1.0, 2.0)
    assert (unpruned.seconds, pruned.seconds) == (0.0, 3.0)


def test_a_number_that_evaluate_cannot_find_is_told_of_a_pruned_network_and_refused_of_the_given_one(caplog):
    model, other = toy_model().eval(), toy_model(1).eval()
    other.mark = True
    found = Measurements(model, ImageParts.of(images(), model), lambda net: math.nan if hasattr(net, "mark") else 1.0)
    with pytest.raises(ConfigError, match="evaluate must return a number for the model as it was given, got nan"):
        found.add("unpruned", other)
    found.add("unpruned", model)
    with caplog.at_level(logging.WARNING, logger="nni_topo"):
        found.add("pruned", other)
    assert caplog.messages == ["evaluate returned nan for the pruned network"]
    assert math.isnan(found.stages[-1].accuracy)


@pytest.mark.parametrize("given", [None, "0.25", torch.zeros(2)])
def test_what_is_no_number_is_refused(given):
    with pytest.raises(ConfigError, match=r"evaluate must return a number, got .* \(shrink\)"):
        evaluated(lambda net: given, toy_model(), "unpruned")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"pruner": "taylor"}, "needs no evaluator, training_steps, got 'taylor'"),
        ({"pruner": "reconstruction", "knobs": {"budget": {"flops": 0.2}}}, "budget must be left out of knobs"),
        (
            {"budget": Budget(flops=0.5, allocation="error")},
            r"allocation of pruner 'l1' must be 'uniform', got 'error'",
        ),
    ],
)
def test_choices_that_could_not_be_kept_are_refused_before_any_work(given, told):
    with pytest.raises(ConfigError, match=told):
        asked(**{name: value for name, value in given.items() if name != "budget"}).check_together(
            given.get("budget", FLOPS)
        )


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


def masks_of(seed, **knobs):
    masks = steps(pruner="random", seed=seed, **knobs).select(FLOPS).masks
    return torch.cat([masks[name]["weight"].flatten() for name in ("stem", "hidden")])


def test_a_pruner_gets_the_seed_and_the_knobs_of_the_caller():
    assert torch.equal(masks_of(1), masks_of(1))
    assert not torch.equal(masks_of(1), masks_of(2))
    assert torch.equal(masks_of(1), masks_of(2, knobs={"seed": 1}))
    assert int(masks_of(1, round_to=4)[-16 * 8 :].view(16, 8).amax(1).sum()) % 4 == 0


def recovered_from(chosen, masks, planned=None, left=1.0):
    return replace(chosen.start, masks=masks, planned=planned, left=left).remove()


def halved(name, width):
    mask = torch.ones_like(getattr(toy_model(), name).weight)
    mask[: width // 2] = 0.0
    return {name: {"weight": mask}}


def test_the_share_of_a_cost_that_a_network_keeps():
    chosen = steps()
    half = recovered_from(chosen, halved("hidden", 16))
    # A convolution has 8 x 8 places; the hidden layer maps 8 features to 16, the head these to 4.
    whole = 64 * 9 * (3 * 8 + 8 * 8) + 8 * 16 + 16 * 4
    assert chosen.share_left(half.dense) == pytest.approx((whole - 8 * 8 - 8 * 4) / whole)
    assert 0.1 < steps(budget=Budget(latency=0.5)).share_left(half.dense) < 4.0  # it is timed
    # By a table of the products of widths, of which the hidden layer and the head lose half.
    table = proportional(dict.fromkeys((*LAYERS, "head"), 1.0))
    assert steps(budget=Budget(latency=0.5, latency_table=table)).share_left(half.dense) == pytest.approx(
        (3 * 8 + 8 * 8 + 8 * 8 + 8 * 4) / (3 * 8 + 8 * 8 + 8 * 16 + 16 * 4)
    )
    assert steps(budget=Budget(params=0.5)).share_left(half.dense) == pytest.approx(
        1 - (8 * 9 + 8 * 4) / 1076, rel=1e-2
    )


class Recurrent(nn.Module):
    """Takes a state (levels, samples, units), and returns the next one."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRU(3, 5, 2, batch_first=True), nn.Linear(5, 2)

    def forward(self, x, state):
        found, state = self.cell(x, state)
        return self.head(found[:, -1]), state


def test_samples_of_a_state_are_first():
    model, x, state = Recurrent().eval(), torch.randn(32, 4, 3), torch.zeros(2, 32, 5)
    with pytest.raises(
        ConfigError, match=r"got 1: of 32 samples it got .*samples must be the first dimension of every"
    ):
        shrink(model, [((x, state),)], {"params": 0.5})
    with pytest.raises(ConfigError, match=r"a tolerance needs .* got 32; the model runs on whole batches only"):
        shrink(model, [((x, state),)], "params", tolerance=0.5, measure="distance")


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
    with pytest.raises(ConfigError, match=r"got 1: of 40 samples it got 2 and raised"):
        shrink(model, [(inputs, torch.zeros(40))], {"params": 0.5}, progress=False)
    small = shrink(model, [(inputs, torch.zeros(40))], {"params": 0.5}, distill=False, progress=False)
    assert small.enter.out_features < 8
    pruner = create_pruner("l1", model, [{"op_names": ["enter"], "sparse_ratio": 0.5}])
    _, masks = pruner.compress()
    pruner.unwrap_model()
    dense = dense_of(compensate(model, masks, [(inputs, torch.zeros(40))]), inputs, masks)
    assert dense.enter.out_features == 4
    assert dense(*inputs).shape == (40, 2)


def test_knobs_of_the_caller_go_before_those_of_a_network():
    for given, taken in (({"steps": 1}, 1), ({"steps": None}, 2)):  # None isn't given
        made = distilled(steps(distill=given), toy_model(1).eval(), lr=1e-3, steps=2)
        assert made.verdict.steps == taken
