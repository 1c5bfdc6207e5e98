"""``round_to``, which every structured pruner of the package takes, and compensation of what each one masks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import nni_topo
from nni_topo import to_dense
from nni_topo.pruners.registry import create_pruner
from nni_topo.speedup import dependency_groups, masked_model
from nni_topo.testing import toy_images, toy_model

NAMES = ["random", "topological", "energy", "cluster", "subcluster", "matrix"]
IMAGES = toy_images(64, seed=1)
BATCHES = list(IMAGES.split(16))


EXTRAS = {
    "energy": {"example_inputs": IMAGES[:2]},
    "cluster": {"calibration": BATCHES},
    "subcluster": {"calibration": BATCHES, "energy": 0.95, "growth": {"initial_ratio": 0.2}},
}


def make(name, model, config_list, evaluator=None, **knobs):
    return create_pruner(name, model, config_list, evaluator, **{**EXTRAS.get(name, {}), **knobs})


def config(model, ratio=0.5):
    plain = [{"op_names": ["stem", "inner", "hidden"], "sparse_ratio": ratio}]
    return dependency_groups(model, IMAGES[:2], plain)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["reconstruct", "pair"])
@pytest.mark.quick_every(6)
def test_masks_of_every_pruner_can_be_compensated(name, method):
    original = toy_model().eval()
    model = copy.deepcopy(original)
    pruner = make(name, model, config(model))
    _, masks = pruner.compress()
    pruner.unwrap_model()
    pairs = getattr(pruner, "pairs", None) if method == "pair" else None
    assert (pairs is not None) == (method == "pair" and "cluster" in name)
    chosen = nni_topo.recovery.Pair(pairs) if method == "pair" else method
    done = nni_topo.compensate(model, masks, BATCHES, method=chosen)
    assert all(torch.equal(value, original.state_dict()[key]) for key, value in model.state_dict().items())
    dense = to_dense(done, IMAGES[:2], masks)
    torch.testing.assert_close(dense(IMAGES), masked_model(done, IMAGES[:2], masks)(IMAGES), atol=1e-5, rtol=0)
    with torch.no_grad():
        lost, left = ((to_dense(net, IMAGES[:2], masks)(IMAGES) - original(IMAGES)).norm() for net in (original, done))
    assert left < lost


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("round_to", "widths"), [(3, (6, 6, 9)), (4, (4, 4, 8)), (16, (8, 8, 16))])
@pytest.mark.quick_every(4)
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
    knobs = {"budget": {"flops": 0.5}, "example_inputs": IMAGES[:2], "round_to": 2}
    free = [{key: value for key, value in entry.items() if key != "sparse_ratio"} for entry in config(model)]
    pruner = create_pruner("topological", model, free, **knobs)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    assert all(int(mask["weight"].flatten(1)[:, 0].sum()) % 2 == 0 for mask in masks.values())
    dense = to_dense(model, IMAGES[:2], masks)
    share = nni_topo.zoo.count_macs(dense, IMAGES[:1]) / nni_topo.zoo.count_macs(model, IMAGES[:1])
    assert 0.3 < share < 0.7


class Attending(nn.Module):
    """Twelve heads of eight channels, and two layers."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(96, 12, batch_first=True)
        self.hidden, self.head = nn.Linear(96, 64), nn.Linear(64, 4)

    def forward(self, x):
        return self.head(self.hidden(self.attention(x, x, x, need_weights=False)[0]).relu()).mean(1)


def test_heads_count_by_their_channels():
    torch.manual_seed(0)
    model, batch = Attending().eval(), torch.randn(32, 5, 96)
    config_list = dependency_groups(model, batch, [{"op_types": ["MultiheadAttention"], "sparse_ratio": 0.6}])
    pruner = nni_topo.RandomPruner(model, config_list, round_to=16, seed=0)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    # Five heads of twelve would stay, and forty channels aren't a multiple of 16.
    assert int(masks["attention"]["in_proj_weight"][:96, 0].sum()) == 48
    small = nni_topo.shrink(model, [batch], {"flops": 0.4}, round_to=16, distill=False)
    assert small.report.budget.left == pytest.approx(0.4, abs=0.02)
