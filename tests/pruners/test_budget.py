from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from nni_topo import Budget, ReconstructionPruner, create_pruner, dependency_groups, to_dense, zoo
from nni_topo.errors import ConfigError
from nni_topo.network.cost.cost import cost_of
from nni_topo.pruners.budget import budget_outcome
from nni_topo.pruners.solving import solve_error, solve_uniform
from nni_topo.pruners.topological import TopologicalPruner
from nni_topo.runs.widths import inner_layers

IMAGES = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def resnet():
    return zoo.create_model("resnet20", num_classes=10, in_channels=1, image_size=16, seed=0).eval()


@functools.cache
def layers():
    return inner_layers(resnet(), IMAGES)


def pruned(model, budget, **knobs):
    config = dependency_groups(model, IMAGES, [{"op_names": layers(), **knobs.pop("rule", {})}])
    pruner = TopologicalPruner(
        model, config, budget=budget, example_inputs=IMAGES, solver="greedy", cloud="weight", **knobs
    )
    _, masks = pruner.compress()
    pruner.unwrap_model()
    return masks, to_dense(model, IMAGES, masks)


def test_macs_are_flops_and_a_bare_number_is_told_how_to_name_its_cost():
    found, known = (pruned(resnet(), {name: 0.5})[0] for name in ("macs", "flops"))
    assert all(torch.equal(found[name]["weight"], masks["weight"]) for name, masks in known.items())
    with pytest.raises(ConfigError, match=r"must name its cost, e.g. \{'flops': 0.5\}, got 0.5"):
        pruned(resnet(), 0.5)
    with pytest.raises(ConfigError, match="'macs'"):
        pruned(resnet(), {"macs": 0.5, "flops": 0.5})


@pytest.mark.parametrize("allocation", ["topological", "uniform"])
@pytest.mark.parametrize(("kind", "share"), [("flops", 0.5), ("flops", 0.1), ("params", 0.3)])
@pytest.mark.quick_every(6)
def test_the_dense_model_meets_the_budget(kind, share, allocation):
    model = resnet()
    _, dense = pruned(model, {kind: share, "allocation": allocation})
    measure = zoo.count_params if kind == "params" else lambda net: zoo.count_macs(net, IMAGES)
    assert measure(dense) / measure(model) == pytest.approx(share, abs=0.02)


def test_one_tolerance_takes_more_where_the_death_times_fall_off():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Linear(32, 32), torch.nn.Linear(32, 4))
    with torch.no_grad():  # the first layer's filters: 8 directions and 24 near zero
        model[0].weight[8:] *= 1e-3
    config = [{"op_names": ["0", "1"]}]
    pruner = TopologicalPruner(
        model, config, budget=Budget(params=0.321, allocation="topological"), example_inputs=torch.ones(1, 16)
    )
    _, masks = pruner.compress()
    kept = {name: int(masks[name]["bias"].sum()) for name in masks}
    assert kept["0"] == 8
    assert kept["1"] == 32


@pytest.mark.parametrize("seed", range(5))
def test_widths_by_error_are_near_the_best_of_all_where_costs_multiply(seed):
    """Three layers in a row cost the products of their widths; every choice of widths is tried beside."""
    rng = np.random.default_rng(seed)
    rows = [6, 8, 7]
    losses = [np.sort(rng.exponential(size=count) ** 2)[::-1] for count in rows]

    def left(removed):
        kept = [3, *(count - gone for count, gone in zip(rows, removed, strict=True)), 4]
        return sum(a * b for a, b in itertools.pairwise(kept)) / 150  # 3 * 6 + 6 * 8 + 8 * 7 + 7 * 4

    def lost(removed):
        return sum(worth[len(worth) - gone :].sum() for worth, gone in zip(losses, removed, strict=True))

    found = solve_error(losses, [(0, count - 1) for count in rows], left, 0.4)
    tried = [each for each in itertools.product(*map(range, rows)) if left(each) <= left(found) + 1e-9]
    assert left(found) == pytest.approx(0.4, abs=0.05)
    assert lost(found) <= 1.25 * min(map(lost, tried))
    assert solve_error(losses, [(1, 2)] * 3, left, 1e-3) == [2, 2, 2]
    assert solve_error(losses, [(1, 2)] * 3, left, 1.0) == [1, 1, 1]


def test_widths_by_error_are_taken_where_channels_say_the_same():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Linear(32, 32), torch.nn.Linear(32, 4)).eval()
    with torch.no_grad():  # the first layer's neurons: 8 of which the other 24 are mixtures
        model[0].weight[8:] = torch.randn(24, 8) @ model[0].weight[:8]
        model[1].weight *= 1.0 + torch.rand(32, 1)
    config, images = [{"op_names": ["0", "1"]}], [torch.randn(256, 16)]

    def kept(**knobs):
        pruner = ReconstructionPruner(model, config, calibration=images, **knobs)
        _, masks = pruner.compress()
        pruner.unwrap_model()
        return [int(masks[name]["bias"].sum()) for name in ("0", "1")]

    # Eight neurons say all that the second layer reads, four of that all that the outputs read.
    first, second = kept(budget={"params": 0.12, "allocation": "error"})
    assert first >= 8
    assert second <= 6
    uniform, _ = kept(budget={"params": 0.12})
    assert uniform < 8
    with pytest.raises(ConfigError, match="allocation of this pruner must be a known name, got 'error'"):
        TopologicalPruner(model, config, budget={"flops": 0.5, "allocation": "error"}, example_inputs=images[0])


@pytest.mark.parametrize("name", ["reconstruction", "energy", "cluster", "matrix", "random"])
@pytest.mark.slow
def test_every_structured_pruner_that_is_told_how_much_takes_a_budget(name):
    model = resnet()
    config = dependency_groups(model, IMAGES, [{"op_names": layers()}])
    images = torch.randn(24, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    data = {"calibration": [images]} if name in ("reconstruction", "cluster") else {}
    pruner = create_pruner(name, model, config, budget={"flops": 0.3}, example_inputs=IMAGES, **data)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    left = zoo.count_macs(to_dense(model, IMAGES, masks), IMAGES) / zoo.count_macs(model, IMAGES)
    assert left == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("kind", ["flops", "params", "memory"])
@pytest.mark.quick_every(3)
def test_other_layers_lose_what_caps_and_floors_do_not_let_go(kind, caplog):
    model = resnet()
    names = layers()
    middle = [name for name in names if name.startswith("stage2")]
    bounds = [{"op_names": middle, "max_sparse_ratio": 0.25}]
    rest = [name for name in names if name not in middle]
    config = dependency_groups(model, IMAGES, [*bounds, {"op_names": rest, "min_sparse_ratio": 0.2}])
    budget = {kind: 0.5}
    pruner = create_pruner("matrix", model, config, budget=budget, example_inputs=IMAGES)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    dense = to_dense(model, IMAGES, masks)
    costs = [cost_of(kind, net, IMAGES) for net in (dense, model)]
    assert costs[0] / costs[1] == pytest.approx(0.5, abs=0.011)
    shares = {row.name: row.after / row.before for row in dense.report.rows}
    assert all(shares[name] >= 0.75 for name in middle)
    assert all(shares[name] <= 0.8 for name in rest)
    assert "is missed" not in caplog.text


@pytest.mark.parametrize(
    ("kind", "asked", "left", "is_near"),
    [
        ("flops", 0.5, 0.509, True),
        ("latency", 0.5, 0.52, True),
        ("latency", 0.5, 0.53, False),
        ("latency", 0.1, 0.109, True),
        ("flops", 0.5, 0.51, True),
        ("flops", 0.5, 0.51004, False),
        ("flops", 0.25, 0.23999999, False),
        ("params", 0.5, float("nan"), False),
        ("flops", 0.05, 0.055, True),
        ("params", 0.05, 0.0551, False),
    ],
)
def test_a_budget_is_met_up_to_a_hundredth_a_tenth_of_itself_or_a_share_of_the_time(kind, asked, left, is_near):
    """A network that costs less meets its budget too, and says how much less and why."""
    outcome = budget_outcome(kind, asked, left, "of a reason")
    assert outcome.is_near is is_near
    assert outcome.is_met is (is_near or left < asked)
    text = str(outcome)
    assert text.endswith("because of a reason") is not is_near
    assert f"is {'met' if outcome.is_met else 'missed'}: {left:.4g} of" in text
    if is_near:
        assert text.endswith(f"within {outcome.tolerance:.4g} of it")
    elif left == left:
        assert f"{abs(left - asked):.4g} {'less' if left < asked else 'more'} than asked" in text


def test_a_budget_out_of_reach_empties_no_layer():
    masks, dense = pruned(resnet(), {"flops": 1e-9})
    assert all(targets["weight"].any() for targets in masks.values())
    assert dense(IMAGES).shape == (2, 10)


@pytest.mark.parametrize(
    ("knobs", "config", "words"),
    [
        ({"budget": {"flops": 0.0}}, {}, r"flops must be in \(0, 1\], got 0.0"),
        ({"budget": {"flops": 0.5, "params": 0.5}}, {}, r"a share of one of .*, got \['flops', 'params'\]"),
        ({"budget": {"time": 0.5}}, {}, "key of budget must be a known name, got 'time'"),
        ({"budget": "flops"}, {}, "budget must be a Budget or a mapping of its fields or None, got 'flops'"),
        ({"budget": {}}, {}, "a share of one of .*, got none"),
        ({"budget": {"flops": 0.5}}, {"sparse_ratio": 0.5}, r"replaces sparse_ratio, got both \(config_list\[0\]\)"),
        ({"budget": {"flops": 0.5}, "example_inputs": None}, {}, "a budget needs example_inputs"),
    ],
)
def test_bad_budgets_are_refused_before_the_model_is_wrapped(knobs, config, words):
    model = resnet()
    with pytest.raises(ConfigError, match=words):
        TopologicalPruner(model, [{"op_types": ["Conv2d"], **config}], **{"example_inputs": IMAGES, **knobs})
    assert not any(hasattr(module, "_nni_wrapper") for module in model.modules())


def test_equal_widths_round_one_after_the_other():
    rows = [16] * 8
    bounds = [(0, count - 1) for count in rows]
    shares = np.linspace(0.2, 1, 30)
    counts = [solve_uniform(rows, lambda removed: 1 - sum(removed) / 128, share, bounds) for share in shares]
    lost = [sum(count) / 128 for count in counts]
    np.testing.assert_allclose(lost, 1 - np.linspace(0.2, 1, 30), atol=1 / 128)
    assert all(max(count) - min(count) <= 1 for count in counts)


def widths_under(budget, held, **bounds):
    """Return the widths of two linear layers, of 64 and 32, before others that must stay, and the outcome."""
    torch.manual_seed(0)
    layers = [nn.Linear(a, b, bias=False) for a, b in itertools.pairwise((16, 64, 32, *held))]
    config = [{"op_names": ["0", "1"], **bounds}]
    pruner = ReconstructionPruner(nn.Sequential(*layers), config, calibration=[torch.randn(64, 16)], budget=budget)
    _, masks = pruner.compress()
    return [int(masks[name]["weight"].any(1).sum()) for name in "01"], pruner.planner.outcome


@pytest.mark.parametrize("allocation", ["uniform", "topological", "error"])
@pytest.mark.parametrize(
    ("held", "bounds", "kept", "left"),
    [
        ((64, 64), {}, [8, 4], (16 * 8 + 8 * 4 + 4 * 64 + 64 * 64) / 9216),  # an eighth
        ((64, 64), {"max_sparse_ratio": 0.9375}, [4, 2], (16 * 4 + 4 * 2 + 2 * 64 + 64 * 64) / 9216),
        ((1,), {}, [3, 2], (16 * 3 + 3 * 2 + 2) / 3104),  # of sixteen or more never one
    ],
)
def test_a_budget_out_of_reach_leaves_every_layer_a_share_and_names_one_within_reach(
    held, bounds, kept, left, allocation
):
    share = 0.4 if held == (64, 64) else 1e-3
    widths, outcome = widths_under({"params": share, "allocation": allocation}, held, **bounds)
    assert widths == kept
    assert outcome.left == pytest.approx(left)
    assert not outcome.is_met
    assert outcome.why.endswith(f"; a budget of {left:.4g} can be met")
    _, again = widths_under({"params": round(left, 4), "allocation": allocation}, held, **bounds)
    assert again.is_near


def test_a_small_budget_that_can_be_met_leaves_fewer_than_an_eighth():
    widths, outcome = widths_under({"params": 0.02}, (1,))
    assert outcome.is_near
    assert widths[0] < 8
