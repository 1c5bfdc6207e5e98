"""Whole requests by dependency groups: channels that only go together, and what a pruner can make nothing of."""

from __future__ import annotations

import logging

import nni
import pytest
import torch
from nni.compression import TorchEvaluator
from torch import nn

import nni_topo
from benchmarks.networks import zoo_nets
from nni_topo.errors import ConfigError, LayerError
from nni_topo.pruners.registry import list_pruners, pruner_info
from nni_topo.testing import toy_knobs

ASKED = [{"op_types": ["Conv2d", "Linear", "LSTM"], "sparse_ratio": 0.5}]
# It scores batch norms, not the layers before them.
STRUCTURED = [name for name in list_pruners() if pruner_info(name).structured and name != "slim"]
LIKE_L1 = ("fpgm", "l2", "random")  # which differ from it in the scores of whole rows alone
WEIGHTS = [name for name in list_pruners() if not pruner_info(name).structured]


def knobs_of(name, model, inputs):
    info = pruner_info(name)
    batches = [inputs + 0.1 * torch.randn(inputs.shape, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    knobs = toy_knobs(info.knobs(), info.needs)
    if "example_inputs" in knobs:
        knobs["example_inputs"] = inputs
    if "calibration" in knobs:
        knobs["calibration"] = batches
    if "training_steps" in info.needs:
        knobs |= {"training_steps": 2, "evaluator": evaluator(model, batches)}
    if name == "genetic_weight":
        knobs |= {"evaluate": lambda model: 1.0, "search": {"generations": 1, "population_size": 2}}
    return knobs


def evaluator(model, batches):
    def train(model, optimizer, step, scheduler, max_steps, max_epochs):
        for batch in batches[:max_steps]:
            optimizer.zero_grad()
            step(batch, model).backward()
            optimizer.step()

    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.0)
    return TorchEvaluator(train, optimizer, lambda batch, model: model(batch).square().mean())


def pruned(name, model, inputs, asked=ASKED):
    groups = nni_topo.dependency_groups(model, inputs, asked)
    pruner = nni_topo.create_pruner(name, model, groups, **knobs_of(name, model, inputs))
    _, masks = pruner.compress()
    pruner.unwrap_model()
    return masks


@pytest.mark.parametrize("name", STRUCTURED)
@pytest.mark.quick_every(3)
def test_every_pruner_takes_half_of_what_a_pixel_shuffle_spreads(name):
    model, inputs = zoo_nets.make("pixel_shuffle")
    masks = pruned(name, model, inputs)
    dense = nni_topo.to_dense(model, inputs, masks)
    assert [dense.stem[0].out_channels, dense.wide.out_channels, dense.tail[0].out_channels] == [4, 12, 4]
    images = masks["wide"]["weight"].flatten(1)[:, 0].view(6, 4)
    assert torch.equal(images, images[:, :1].expand_as(images))
    assert dense.report.kept == ()


@pytest.mark.parametrize("net", ["multihead_attention", "own_attention", "sliced", "lstm", "squeeze_excite"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LIKE_L1)) for name in STRUCTURED]
)
@pytest.mark.quick_every(18)
def test_every_pruner_serves_a_whole_request(name, net):
    model, inputs = zoo_nets.make(net)
    masks = pruned(name, model, inputs)
    dense = nni_topo.to_dense(model, inputs, masks)
    for layer, found in masks.items():
        removed = [1 - float(mask.float().mean()) for mask in found.values() if mask is not None]
        assert max(removed) >= 0.2, layer  # half of the channels, but for those that are kept for their readers
    before, after = (sum(p.numel() for p in each.parameters()) for each in (model, dense))
    assert after <= 0.8 * before
    # the forward of "sliced" takes channels by fixed numbers, which no config_list can say; these stay with a warning
    assert bool(dense.report.kept) <= (net == "sliced")
    if not dense.report.kept:
        expected = nni_topo.masked_model(model, inputs, masks)(inputs)
        torch.testing.assert_close(dense(inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", WEIGHTS)
def test_pruners_of_single_weights_pass_over_what_goes_together(name):
    model, inputs = zoo_nets.make("pixel_shuffle")
    masks = pruned(name, model, inputs)
    weight = masks["wide"]["weight"]
    assert 0.4 < float(weight.mean()) < 1.0 if name == "genetic_weight" else float(weight.mean()) == pytest.approx(0.5)
    plain = [{"op_names": ["wide"], "sparse_ratio": 0.5, "granularity": [4, -1, -1, -1]}]
    if name != "level":
        with pytest.raises(ConfigError, match="granularity"):
            nni_topo.create_pruner(name, model, plain, **knobs_of(name, model, inputs)).compress()


@pytest.mark.parametrize(("name", "knobs"), [("reconstruction", {}), ("cluster", {"algorithm": "ward"})])
def test_of_two_images_that_are_the_same_one_goes(name, knobs):
    model, inputs = zoo_nets.make("pixel_shuffle")
    with torch.no_grad():
        model.wide.weight[8:12] = model.wide.weight[:4]
        model.wide.bias[8:12] = model.wide.bias[:4]
    groups = nni_topo.dependency_groups(model, inputs, [{"op_names": ["wide"], "sparse_ratio": 0.2}])
    pruner = nni_topo.create_pruner(name, model, groups, **knobs_of(name, model, inputs) | knobs)
    _, masks = pruner.compress()
    gone = masks["wide"]["bias"].view(6, 4).sum(1)
    assert sorted(gone[[0, 2]].tolist()) == [0, 4]
    assert gone[[1, 3, 4, 5]].tolist() == [4] * 4
    if name == "cluster":
        one, other = (0, 8) if gone[0] == 0 else (8, 0)
        assert pruner.pairs["wide"] == {one + i: other + i for i in range(4)}


class Sliced(nn.Module):
    """A layer of which some channels are read by nothing, so that no cloud of what is read can look at it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.wide = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3)
        self.left, self.right, self.head = nn.Conv2d(4, 6, 1), nn.Conv2d(4, 6, 1), nn.Linear(6, 2)

    def forward(self, images):
        one = self.wide(self.first(images))[:, :4]
        return self.head((self.left(one) + self.right(one)).mean((2, 3)))


def test_what_a_pruner_can_make_nothing_of_stays_whole_with_one_warning_unless_it_is_named(caplog):
    model, inputs = Sliced(), torch.randn(2, 3, 8, 8)
    with caplog.at_level(logging.WARNING, "nni_topo"):
        masks = pruned("reconstruction", model, inputs)
    assert masks.keys() == {"first", "left", "right"}
    assert [r.getMessage() for r in caplog.records if "layers stay unpruned (wide)" in r.getMessage()] != []
    assert nni_topo.to_dense(model, inputs, masks).wide.out_channels == 8
    before = dict(model.named_modules())
    with pytest.raises(LayerError, match=r"\(wide\)") as caught:
        pruned("reconstruction", model, inputs, [{"op_names": ["first", "wide"], "sparse_ratio": 0.5}])
    assert caught.value.layers == ("wide",)
    assert dict(model.named_modules()) == before


def test_channels_that_only_go_together_are_asked_for_together():
    model, inputs = zoo_nets.make("pixel_shuffle")
    one_by_one = [{"op_names": ["wide"], "sparse_ratio": 0.5}]
    pruner = nni_topo.ReconstructionPruner(model, one_by_one, calibration=[inputs])
    with pytest.raises(LayerError, match="must be in one dependency group"):
        pruner.compress()
    assert not any(name.endswith("_nni_wrapper") for name, _ in model.named_modules())
