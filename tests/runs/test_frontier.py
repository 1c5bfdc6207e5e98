from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from toy_times import LAYERS, proportional

import nni_topo
from nni_topo import zoo
from nni_topo.errors import ConfigError
from nni_topo.runs import frontier as module
from nni_topo.runs import prepared
from nni_topo.runs.frontier import Frontier, FrontierPoint
from nni_topo.testing import toy_images, toy_model

SHARES = (0.7, 0.45, 0.25)


def images(count: int = 128) -> list[torch.Tensor]:
    return list(toy_images(count).split(32))


def made(shares=SHARES, model=None, given=None, **knobs):
    return nni_topo.frontier(
        toy_model().eval() if model is None else model,
        images() if given is None else given,
        shares,
        **{"distill": False, **knobs},
    )


def test_each_network_is_the_one_that_shrink_makes():
    found = made()
    assert list(found) == list(SHARES)
    with pytest.raises(KeyError, match=r"share must be one of the frontier's, got 0.3; known: "):
        found[0.3]
    for share, point in zip(SHARES, found.points[1:], strict=True):
        alone = nni_topo.shrink(toy_model().eval(), images(), {"flops": share}, distill=False)
        torch.testing.assert_close(found[share].state_dict(), alone.state_dict(), rtol=1e-5, atol=1e-6)
        mine, theirs = found[share].report, alone.report
        for name in ("layers", "budget", "whole", "outputs", "images", "held_out", "warnings"):
            assert getattr(mine, name) == getattr(theirs, name)
        assert [each.place for each in mine.compensation.layers] == [each.place for each in theirs.compensation.layers]
        assert [stage.network for stage in mine.stages] == ["unpruned", "reconstructed"]
        assert (point.share, point.left, point.start) == (share, theirs.budget.left, 1.0)
        assert (point.macs, point.params) == (theirs.stages[-1].macs, theirs.stages[-1].params)
        assert point.changed == pytest.approx(1.0 - theirs.stages[-1].agreement)
        assert point.changed_low <= point.changed <= point.changed_high
        assert point.distance == pytest.approx(theirs.stages[-1].distance, rel=1e-3)
        assert point.distance_low < point.distance < point.distance_high
        assert 0.0 < point.seconds < 100.0
    whole = found.points[0]
    assert (whole.share, whole.left, whole.changed, whole.distance) == (1.0, 1.0, 0.0, 0.0)
    assert (whole.macs, whole.params) == (theirs.stages[0].macs, theirs.stages[0].params)
    assert (whole.start, whole.is_distilled, whole.is_knee, whole.seconds) == (1.0, False, False, 0.0)
    assert (found.kind, found.measure, found.images, found.held_out) == ("flops", "answers", 112, 8)


def test_the_table_has_a_row_for_each_network_and_the_unpruned_one():
    found = made(evaluate=lambda net: 0.5, budget="params")
    frame = found.to_frame()
    assert list(frame["share"]) == [1.0, *SHARES]
    assert list(frame["accuracy"]) == [0.5] * 4
    assert frame["params"][1] == zoo.count_params(found[0.7])
    assert found.points[1].left == zoo.count_params(found[0.7]) / zoo.count_params(toy_model())
    assert [line.split()[0] for line in repr(found).splitlines()[2:6]] == ["1", "0.7", "0.45", "0.25"]
    assert found.read_as.startswith("outputs: scores of ")
    assert found.read_as in repr(found)


def points(*pairs: tuple[float, float], knee: int | None = None) -> list[FrontierPoint]:
    return [
        FrontierPoint(
            left, left, 1, 1, lost, lost / 2, 2 * lost, 3 * lost, 2 * lost, 5 * lost, accuracy=math.nan, start=1.0,
            is_distilled=False, is_knee=index == knee, seconds=0.0,
        )
        for index, (left, lost) in enumerate(pairs)
    ]  # fmt: skip


def test_the_picture_has_the_points_their_intervals_and_the_knee():
    curve = points((1.0, 0.0), (0.5, 0.01), (0.25, 0.02), (0.1, 0.2), knee=2)
    found = Frontier({}, curve, "flops", "answers", 100, 50)
    assert found.knee == 0.25
    (axis,) = found.plot().axes
    line, mark = (each for each in axis.lines if len(each.get_xdata()) in (4, 1) and each.get_marker() in ("o", "D"))
    assert list(line.get_xdata()) == [100.0, 50.0, 25.0, 10.0]
    assert list(line.get_ydata()) == pytest.approx([0.0, 1.0, 2.0, 20.0])
    assert (list(mark.get_xdata()), list(mark.get_ydata())) == ([25.0], [2.0])
    (bars,) = axis.containers[0].lines[2]
    ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
    assert ends == [pytest.approx([lost / 2, 2 * lost]) for lost in (0.0, 1.0, 2.0, 20.0)]
    assert axis.get_ylabel() == "changed answers %"
    assert axis.get_xlabel() == "MACs kept %"
    names = [text.get_text() for text in axis.get_legend().get_texts()]
    assert sorted(names) == ["50 held-out samples", "knee"]
    assert "the knee is at a share of 0.25" in repr(found)
    straight = Frontier({}, points((1.0, 0.0), (0.5, 0.1), (0.0, 0.2)), "flops", "answers", 100, 50)
    assert straight.knee is None
    assert "no knee" in repr(straight)


def wide_net() -> tuple[nn.Module, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8.0)
    return net, [torch.randn(256, 16, generator=generator)]


KEPT = {"steps": 5, "lr": 1e-3}  # the learned weights are kept


def test_a_smaller_network_starts_from_a_larger_one_where_that_is_no_worse(monkeypatch):
    net, rows = wide_net()
    losses = []

    def judged(*given):
        found = own_judged(*given)
        losses.append([each.loss for each in found])
        return found

    own_judged = module.judged
    monkeypatch.setattr(module, "judged", judged)
    found = made((0.5, 0.25), net, rows, distill=KEPT)
    ((from_larger, plain),) = losses
    assert found.points[2].start == (0.5 if from_larger <= plain else 1.0)
    # Taken in any case, it has the size and the report of a network made from the unpruned one.
    monkeypatch.setattr(module, "first_smallest", lambda losses: 0)
    found = made((0.5, 0.25), net, rows, distill=KEPT)
    assert found.points[2].start == 0.5
    assert found.points[2].left == pytest.approx(0.25, abs=0.01)
    row = found[0.25].report.layers.rows[0]
    assert (row.before, row.after) == (64, found[0.25][0].out_features)
    assert found[0.25][0].out_features < found[0.5][0].out_features
    assert found[0.25].report.budget.left == found.points[2].left
    assert found[0.25].report.stages[-1].network == "distilled"
    assert [point.is_distilled for point in found.points] == [False, True, True]
    # Bounds of layers are shares of the unpruned network's channels; there is nothing to start from where the learned
    # weights were discarded.
    for knobs in ({"layers": [{"op_names": ["0"], "max_sparse_ratio": 0.9}]}, {"distill": {"steps": 2, "lr": 1e3}}):
        assert made((0.75, 0.5), net, rows, **{"distill": KEPT, **knobs}).points[2].start == 1.0


@pytest.mark.slow
def test_a_budget_of_time_is_counted_by_one_table_and_the_networks_are_timed_together(monkeypatch):
    tables, timings = [], []
    table = proportional(dict.fromkeys((*LAYERS, "head"), 1.0))

    def measure_latency(model, example):
        tables.append(example)
        return table

    def time_shares(models, whole, example, wanted):
        timings.append((len(models), whole, example, wanted))
        return [(0.71, 0.0), (0.41, 0.0), (0.21, 0.0)]

    monkeypatch.setattr(prepared, "measure_latency", measure_latency)
    monkeypatch.setattr(module, "time_shares", time_shares)
    model = toy_model().eval()
    found = made((0.7, 0.4, 0.2), model, budget="latency", pruner="l1", distill=KEPT)
    assert [point.left for point in found.points] == [1.0, 0.71, 0.41, 0.21]
    assert [point.start for point in found.points] == [1.0] * 4
    ((example,),) = tables
    ((count, whole, (batch,), wanted),) = timings
    assert (count, type(whole), wanted) == (3, type(model), 0.2)
    assert len(example) == len(batch) == 32  # as large as the first batch that is given
    # A table that is given counts, and nothing is timed.
    found = made((0.7, 0.4, 0.2), model, budget={"latency": None, "latency_table": table}, pruner="l1")
    assert (len(tables), len(timings)) == (1, 1)
    assert [point.left for point in found.points] == pytest.approx([1.0, 0.7, 0.4, 0.2], abs=0.1)
    assert found.points[1].left != 0.71


def test_layers_may_be_an_iterator_and_all_ways_to_distribute_a_budget_are_told():
    net, rows = wide_net()
    small = made((0.9,), net, rows, layers=iter(["2"]), budget={"flops": None, "allocation": "auto"})[0.9]
    assert small.report.layers.pruned_layers == ("2",)
    assert sum(each.is_chosen for each in small.report.tried) == 1


@pytest.mark.slow
def test_all_networks_share_the_steps_of_distillation():
    found = made(distill=True)
    steps = [found[share].report.distillation.most_steps for share in SHARES]
    assert sum(steps) == pytest.approx(600, abs=2)
    assert steps == sorted(steps)
    given = made(distill={"steps": 5})
    assert [given[share].report.distillation.most_steps for share in SHARES] == [5, 5, 5]


@pytest.mark.parametrize("shares", [(0.5, 0.75), (1.0, 0.5), (0.5, math.nan), (0.5, "0.25"), (), 0.5])
def test_shares_that_are_none_are_refused_before_anything_runs(shares):
    model = toy_model()
    model.register_forward_hook(lambda *given: pytest.fail("it ran"))
    with pytest.raises(ConfigError, match=r"descending numbers in \(0, 1\), at least one, got .* \(shares, frontier\)"):
        made(shares, model=model)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"budget": {"flops": 0.5}}, "budget must name a cost, e.g. 'flops' .*: shares says how much is kept"),
        ({"budget": "size"}, "budget must be a known name, got 'size'"),
        ({"budget": None}, "budget must name a cost"),
        ({"pruner": "subcluster"}, "shares must have a pruner that can be asked for a size, got 'subcluster'"),
    ],
)
def test_what_can_not_be_used_is_refused(knobs, message):
    with pytest.raises(ConfigError, match=message):
        made(**knobs)
