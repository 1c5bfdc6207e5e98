"""``compensate`` and ``round_to``, which every structured pruner of the package takes."""

from __future__ import annotations

import copy

import pytest
import torch

import nni_topo
from nni_topo.errors import ConfigError, DataError
from nni_topo.pruners.registry import create_pruner
from nni_topo.speedup import dependency_groups, masked_model, to_dense
from nni_topo.testing import toy_evaluator, toy_images, toy_model

NAMES = ["random", "topological", "energy", "cluster", "subcluster", "matrix"]
IMAGES = toy_images(64, seed=1)
BATCHES = list(IMAGES.split(16))


EXTRAS = {
    "energy": {"example_inputs": IMAGES[:2], "linear": "unit-energy"},
    "cluster": {"calibration": BATCHES},
    "subcluster": {"calibration": BATCHES, "energy": 0.95, "growth": {"initial_ratio": 0.2}},
}


def make(name, model, config_list, evaluator=None, **knobs):
    return create_pruner(name, model, config_list, evaluator, **{**EXTRAS.get(name, {}), **knobs})


def config(model, ratio=0.5):
    plain = [{"op_names": ["stem", "inner", "hidden"], "sparse_ratio": ratio}]
    return dependency_groups(model, IMAGES[:2], plain)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["reconstruct", "channel", "pair"])
def test_compress_also_compensates(name, method):
    original = toy_model().eval()
    model = copy.deepcopy(original)
    pruner = make(name, model, config(model), compensate=method, calibration=BATCHES)
    wrapped, masks = pruner.compress()
    pruner.unwrap_model()
    pairs = pruner.pairs_of(masks) if method == "pair" else None
    assert (pairs is not None) == (method == "pair" and "cluster" in name)
    expected = nni_topo.compensate(original, masks, BATCHES, method=method, pairs=pairs)
    for key, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)
    dense = to_dense(model, IMAGES[:2], masks)
    torch.testing.assert_close(dense(IMAGES), masked_model(model, IMAGES[:2], masks)(IMAGES), atol=1e-5, rtol=0)
    with torch.no_grad():
        lost, left = ((to_dense(net, IMAGES[:2], masks)(IMAGES) - original(IMAGES)).norm() for net in (original, model))
    assert left < lost
    assert pruner.compensation_report.images == 64
    assert wrapped is model


def test_the_wrapped_model_is_compensated_too():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    batches = [torch.randn(64, 6)]
    pruner = create_pruner("random", model, [{"op_names": ["0"], "sparse_ratio": 0.5}], compensate="reconstruct",
                           calibration=batches)  # fmt: skip
    pruner.compress()
    masked = model(batches[0])
    pruner.unwrap_model()
    dense = to_dense(model, batches[0], pruner.get_masks())
    torch.testing.assert_close(masked, dense(batches[0]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("round_to", "widths"), [(3, (6, 6, 9)), (4, (4, 4, 8)), (16, (8, 8, 16))])
def test_widths_are_multiples(name, round_to, widths):
    model = toy_model()
    pruner = make(name, model, config(model), round_to=round_to)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    kept = tuple(int(masks[layer]["weight"].flatten(1)[:, 0].sum()) for layer in ("stem", "inner", "hidden"))
    if name == "subcluster":  # finds the number of neurons itself
        assert all(found % round_to == 0 or found == whole for found, whole in zip(kept, (8, 8, 16), strict=True))
    else:
        assert kept == widths


def test_a_budget_counts_rounded_widths():
    model = toy_model()
    knobs = {"target": {"flops": 0.5}, "example_inputs": IMAGES[:2], "round_to": 2}
    free = [{key: value for key, value in entry.items() if key != "sparse_ratio"} for entry in config(model)]
    pruner = create_pruner("topological", model, free, **knobs)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    assert all(int(mask["weight"].flatten(1)[:, 0].sum()) % 2 == 0 for mask in masks.values())
    dense = to_dense(model, IMAGES[:2], masks)
    share = nni_topo.zoo.count_macs(dense, IMAGES[:1]) / nni_topo.zoo.count_macs(model, IMAGES[:1])
    assert 0.3 < share < 0.7


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"compensate": "reconstruct", "calibration": None}, "needs calibration"),
        ({"compensate": "magic", "calibration": BATCHES}, "compensate.*magic"),
        ({"round_to": 0}, "round_to must be a positive integer or None, got 0"),
        ({"round_to": 2.0}, "round_to must be a positive integer or None, got 2.0"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_bad_knobs_are_refused_before_the_model_is_wrapped(name, knobs, message):
    model = toy_model()
    with pytest.raises(ConfigError, match=message):
        make(name, model, config(model), **knobs)
    assert not any(hasattr(module, "_nni_wrapper") for module in model.modules())


def test_bad_calibration_leaves_the_weights_as_they_were():
    model = toy_model()
    before = copy.deepcopy(model.state_dict())
    broken = [torch.full((4, 3, 8, 8), torch.nan)]
    pruner = create_pruner("random", model, config(model), compensate="reconstruct", calibration=broken)
    with pytest.raises(DataError, match="calibration inputs must be finite"):
        pruner.compress()
    pruner.unwrap_model()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_schedule_refuses_to_compensate():
    from nni.compression.pruning import LinearPruner

    model = toy_model()
    evaluator = toy_evaluator(model)
    inner = create_pruner("random", model, config(model), evaluator, compensate="pair", calibration=BATCHES)
    scheduled = LinearPruner(inner, interval_steps=2, total_times=2)
    with pytest.raises(ConfigError, match="compensate goes with pruning in one step"):
        scheduled.compress(max_steps=6, max_epochs=None)
