from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from toy_times import LAYERS, proportional

from nni_topo import dependency_groups, to_dense
from nni_topo.errors import ConfigError, DataError
from nni_topo.network.speedup.analysis import Analysis
from nni_topo.pruners.budget import network_time
from nni_topo.pruners.solving import solve_error, solve_timed, solve_uniform
from nni_topo.pruners.topological import TopologicalPruner
from nni_topo.testing import toy_images, toy_model


def kept(budget, table, allocation="uniform", model=None, **rule):
    model = toy_model() if model is None else model
    config = dependency_groups(model, toy_images(2), [{"op_names": list(LAYERS), **rule}])
    pruner = TopologicalPruner(
        model,
        config,
        budget={**budget, "allocation": allocation, "latency_table": table},
        example_inputs=toy_images(2),
        solver="greedy",
    )
    _, masks = pruner.compress()
    pruner.unwrap_model()
    assert to_dense(model, toy_images(2), masks)(toy_images(2)).shape == (2, 4)
    return {name: int(masks[name]["bias"].sum()) for name in masks}, pruner


def test_units_alike_lose_equally_many():
    rows, bounds = [8, 24, 8, 24, 8], [(0, 7), (0, 23)] * 2 + [(0, 7)]

    def remaining(removed):
        return 1 - sum(removed) / sum(rows)

    # 46 of 72 rows are asked for. One ratio removes 3 of 8 with 8 or 9 of 24: 45 or 47 rows stay, one from the budget.
    assert solve_uniform(rows, remaining, 46 / 72, bounds, alike=True) in ([3, 9, 3, 9, 3], [3, 8, 3, 8, 3])
    apart = solve_uniform(rows, remaining, 46 / 72, bounds)
    assert sum(apart) == 26
    assert len(set(apart[::2])) > 1 or len(set(apart[1::2])) > 1


def test_a_wide_layer_is_counted_for_a_part_of_its_rows():
    counted = []

    def remaining(removed):
        counted.append(removed[0])
        return 1.0 - removed[0] / 4096

    assert solve_error([np.arange(4096, 0, -1.0)], [(0, 4095)], remaining, 0.49) == [2089]
    assert len(counted) < 400


@pytest.mark.parametrize("allocation", ["uniform", "topological"])
@pytest.mark.parametrize("share", [0.7, 0.4, 0.15])
@pytest.mark.quick_every(3)
def test_the_share_of_the_table_is_met(share, allocation):
    table = proportional({"stem": 1.0, "inner": 2.0, "hidden": 1.0, "head": 0.5})
    counts, _ = kept({"latency": share}, table, allocation)
    residual, hidden = counts["stem"], counts["hidden"]
    assert counts["inner"] == residual
    whole = 24 + 2 * 64 + 128 + 0.5 * 64
    left = 3 * residual + 2 * residual**2 + residual * hidden + 0.5 * hidden * 4
    assert left / whole == pytest.approx(share, abs=0.09)  # one channel of the residual stream is up to 0.17
    assert kept({"latency": share}, table, allocation)[0] == counts


@pytest.mark.parametrize("allocation", ["uniform", "topological"])
@pytest.mark.quick_every(2)
def test_no_layer_is_emptied_and_bounds_hold(allocation):
    table = proportional(dict.fromkeys([*LAYERS, "head"], 1.0))
    assert min(kept({"latency": 1e-9}, table, allocation)[0].values()) == 1
    assert kept({"latency": 1e-9}, table, allocation, max_sparse_ratio=0.5)[0] == {"stem": 4, "inner": 4, "hidden": 8}
    assert kept({"latency": 1.0}, table, allocation)[0] == {"stem": 8, "inner": 8, "hidden": 16}


@pytest.mark.slow
def test_without_a_table_the_network_is_timed_once(monkeypatch):
    # how near the times are known doesn't matter here
    monkeypatch.setattr("nni_topo.pruners.budget._SECONDS", 0.1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 24, 3), nn.ReLU(), nn.Conv2d(24, 4, 3))
    images = torch.randn(4, 3, 24, 24)
    pruner = TopologicalPruner(
        model, [{"op_names": ["0", "2"]}], budget={"latency": 0.5}, example_inputs=images, solver="greedy"
    )
    _, masks = pruner.compress()
    table = pruner.planner.latency_table
    assert set(table.layers) == {"0", "2", "4"}
    _, again = pruner.compress()
    assert pruner.planner.latency_table is table
    torch.testing.assert_close(again, masks)


@pytest.mark.parametrize("share", [0.8, 0.5, 0.2])
@pytest.mark.parametrize("taken", [lambda said: 0.15 + 0.85 * said, lambda said: said**2, lambda said: said**0.3])
def test_what_networks_take_corrects_what_a_table_says(share, taken):
    def said(removed):
        return 1.0 - removed[0] / 1000

    removed, left, aim = solve_timed(
        lambda each: [round(1000 * (1.0 - each))],
        said,
        lambda tried: [taken(said(removed)) for removed in tried],
        share,
    )
    assert left == taken(said(removed)) == pytest.approx(taken(aim), rel=0.05)
    assert left == pytest.approx(share, rel=0.05)


def test_what_came_near_by_luck_alone_goes_on():
    timings = []

    def timed(tried):
        timings.extend(removed[0] for removed in tried)
        return [(1.0 - removed[0] / 1000) * (0.9 if len(timings) == 2 else 1.0) for removed in tried]

    removed, left, _ = solve_timed(
        lambda aim: [round(1000 * (1.0 - aim))], lambda removed: 1.0 - removed[0] / 1000, timed, 0.5
    )
    assert timings[:2] == [500, 500]
    assert len(timings) > 3
    assert left == pytest.approx(0.5, rel=0.02)
    assert left == 1.0 - removed[0] / 1000


def test_a_time_out_of_reach_is_come_near_to():
    removed, left, _ = solve_timed(
        lambda aim: [int(aim < 0.9)], lambda _: 0.5, lambda tried: [1.0 - removed[0] / 4 for removed in tried], 0.1
    )
    assert (removed, left) == ([1], 0.75)


@pytest.mark.parametrize(
    ("taken", "kept"),
    [
        (lambda said: max(0.7, said), 650),  # the time of launching operations
        (lambda said: 1.3 if said < 1.0 else 1.0, 1000),  # every pruned network is slower
        (lambda said: 0.65 + 0.3 * said, 100),  # narrower ones are faster, the narrowest hardly so
    ],
)
def test_a_network_is_not_ruined_for_a_time_out_of_reach(taken, kept):
    def said(removed):
        return 1.0 - removed[0] / 1000

    removed, left, aim = solve_timed(
        lambda each: [min(999, round(1000 * (1.0 - each)))],
        said,
        lambda tried: [taken(said(removed)) for removed in tried],
        0.5,
    )
    assert 1000 - removed[0] == kept
    assert left == taken(kept / 1000) <= 1.05 * min(taken(1.0), taken(0.001))
    assert aim == pytest.approx(kept / 1000)


@pytest.mark.parametrize("share", [0.5, 0.4])
def test_a_time_that_jumps_over_the_share_ruins_no_network(share):
    """Half of the channels fill the registers: one channel more takes 0.57 of the time, which is nearer to 0.5."""

    def said(removed):
        return 1.0 - removed[0] / 32

    def taken(removed):
        return 0.75 * said(removed) if removed[0] >= 16 else 0.55 + 0.45 * (said(removed) - 0.5)

    def timed(tried):
        return [taken(removed) for removed in tried]

    removed, left, aim = solve_timed(lambda each: [min(31, round(32 * (1.0 - each)))], said, timed, share)
    assert (removed, left) == ([16], 0.375)
    assert aim == pytest.approx(0.5, abs=0.02)


def test_where_all_widths_so_far_are_one_that_is_too_fast_a_wider_one_is_tried():
    """The table is right about the narrow network, so it is asked for again and again."""
    tried = []

    def solve(aim):
        tried.append(aim)
        return [7] if aim < 0.7 else [4] if aim < 1.0 else [0]

    said, times = {7: 0.3, 4: 0.6, 0: 1.0}, {7: 0.3, 4: 0.5, 0: 1.0}
    removed, left, _ = solve_timed(
        solve, lambda removed: said[removed[0]], lambda each: [times[removed[0]] for removed in each], 0.5
    )
    assert (removed, left) == ([4], 0.5)
    assert max(tried) < 1.0


@pytest.mark.parametrize("images", [(torch.ones(2, 3, 8, 8),), torch.ones(2, 3, 8, 8)])
@pytest.mark.quick_every(2)
def test_the_network_that_is_timed_has_the_widths_asked_for(images):
    seen = []
    model = toy_model()
    model.register_forward_pre_hook(lambda net, _: seen.append((net.stem.out_channels, net.hidden.out_features)))
    time = network_time(Analysis.on(model, images), images, 0.5)
    kept = {"stem": np.arange(8) < 5, "inner": np.arange(8) < 5, "hidden": np.arange(16) < 3}
    assert all(share > 0.0 for share in time([kept, {}]))
    assert set(seen) == {(8, 16), (5, 3)}


@pytest.mark.parametrize(
    ("budget", "error", "words"),
    [
        ({"flops": 0.5, "latency_table": proportional({})}, ConfigError, "got 'flops'"),
        ({"latency_table": proportional({})}, ConfigError, "got none"),
        ({"latency": 0.5, "latency_table": "nowhere.json"}, DataError, r"nowhere\.json"),
    ],
)
def test_bad_requests_are_refused_before_the_model_is_wrapped(budget, error, words):
    model = toy_model()
    with pytest.raises(error, match=words):
        TopologicalPruner(model, [{"op_names": ["hidden"]}], example_inputs=toy_images(2), budget=budget)
    assert not hasattr(model.hidden, "_nni_wrapper")


def test_a_table_of_another_network_is_refused():
    with pytest.raises(DataError, match=r"every pruned layer, got none of that name \(hidden\)"):
        kept({"latency": 0.5}, proportional({}, ["stem", "inner"]))
    with pytest.raises(DataError, match=r"must have a positive cost, got 0\.0"):
        kept({"latency": 0.5}, proportional({}))
