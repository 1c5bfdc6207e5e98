from __future__ import annotations

import numpy as np
import pytest
import torch

from nni_topo import dependency_groups, to_dense, zoo
from nni_topo.errors import ConfigError
from nni_topo.pruners.budget import solve_uniform
from nni_topo.pruners.topological.pruner import TopologicalPruner
from nni_topo.runs.widths import inner_layers

IMAGES = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def resnet():
    return zoo.create_model("resnet20", num_classes=10, in_channels=1, image_size=16, seed=0).eval()


def pruned(model, target, **knobs):
    config = dependency_groups(model, IMAGES, [{"op_names": inner_layers(model, IMAGES), **knobs.pop("rule", {})}])
    pruner = TopologicalPruner(
        model, config, target=target, example_inputs=IMAGES, solver="greedy", collector="weight", **knobs
    )
    _, masks = pruner.compress()
    pruner.unwrap_model()
    return masks, to_dense(model, IMAGES, masks)


@pytest.mark.parametrize("allocation", ["topological", "uniform"])
@pytest.mark.parametrize(("kind", "share"), [("flops", 0.5), ("flops", 0.1), ("params", 0.3)])
def test_the_dense_model_meets_the_budget(kind, share, allocation):
    model = resnet()
    _, dense = pruned(model, {kind: share}, allocation=allocation)
    measure = zoo.count_params if kind == "params" else lambda net: zoo.count_macs(net, IMAGES)
    assert measure(dense) / measure(model) == pytest.approx(share, abs=0.02)


def test_one_tolerance_takes_more_where_the_death_times_fall_off():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Linear(32, 32), torch.nn.Linear(32, 4))
    with torch.no_grad():  # the first layer's filters: 8 directions and 24 near zero
        model[0].weight[8:] *= 1e-3
    config = [{"op_names": ["0", "1"]}]
    pruner = TopologicalPruner(
        model, config, target={"params": 0.321}, allocation="topological", example_inputs=torch.ones(1, 16)
    )
    _, masks = pruner.compress()
    kept = {name: int(masks[name]["bias"].sum()) for name in masks}
    assert kept["0"] == 8
    assert kept["1"] == 32


def test_bounds_of_the_config_list_hold():
    masks, _ = pruned(resnet(), {"flops": 0.05}, rule={"max_sparse_ratio": 0.5})
    assert all(targets["weight"].flatten(1)[:, 0].mean() >= 0.5 for targets in masks.values())
    masks, _ = pruned(resnet(), {"flops": 0.9}, rule={"min_sparse_ratio": 0.25})
    assert all(targets["weight"].flatten(1)[:, 0].mean() <= 0.75 for targets in masks.values())


def test_a_budget_out_of_reach_empties_no_layer():
    masks, dense = pruned(resnet(), {"flops": 1e-9})
    assert all(targets["weight"].any() for targets in masks.values())
    assert dense(IMAGES).shape == (2, 10)


def test_calibration_serves_as_example_inputs():
    model = resnet()
    config = dependency_groups(model, IMAGES, [{"op_names": inner_layers(model, IMAGES)}])
    pruner = TopologicalPruner(model, config, target={"flops": 0.5}, calibration=[(IMAGES, None)], solver="greedy")
    _, masks = pruner.compress()
    pruner.unwrap_model()
    left = zoo.count_macs(to_dense(model, IMAGES, masks), IMAGES) / zoo.count_macs(model, IMAGES)
    assert left == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("knobs", "config", "words"),
    [
        ({"target": {"flop": 0.5}}, {}, "did you mean flops"),
        ({"target": {"flops": 0.0}}, {}, r"must be in \(0, 1\], got 0.0"),
        ({"target": {"flops": 0.5, "params": 0.5}}, {}, "one entry"),
        ({"target": {"flops": 0.5}, "allocation": "unifrom"}, {}, "did you mean uniform"),
        ({"target": {"flops": 0.5}}, {"sparse_ratio": 0.5}, r"replaces sparse_ratio, got both \(config_list\[0\]\)"),
        ({"target": {"flops": 0.5}, "example_inputs": None}, {}, "needs example_inputs or calibration"),
    ],
)
def test_bad_budgets_are_refused_before_the_model_is_wrapped(knobs, config, words):
    model = resnet()
    with pytest.raises(ConfigError, match=words):
        TopologicalPruner(model, [{"op_types": ["Conv2d"], **config}], **{"example_inputs": IMAGES, **knobs})
    assert not any(hasattr(module, "_nni_wrapper") for module in model.modules())


def test_equal_widths_round_one_after_the_other():
    rows = [16] * 8
    counts = [solve_uniform(rows, lambda removed: 1 - sum(removed) / 128, share) for share in np.linspace(0.2, 1, 30)]
    lost = [sum(count) / 128 for count in counts]
    np.testing.assert_allclose(lost, 1 - np.linspace(0.2, 1, 30), atol=1 / 128)
    assert all(max(count) - min(count) <= 1 for count in counts)
