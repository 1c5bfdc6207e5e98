"""Networks of several families: what dependency groups leave out and name; tests/test_golden.py compares them all."""

from __future__ import annotations

import pytest
import torch
import torchvision
from nni.compression.speedup import ModelSpeedup
from speedup_nets import Concatenated, Grouped, Residual, chain, l1_masks, masks_of
from torch import nn

import nni_topo
from benchmarks.networks import zoo_nets
from benchmarks.zoo import zoo as bench
from nni_topo.errors import ConfigError, DataError


@pytest.mark.slow
def test_a_smaller_detector_finds_the_same_boxes_as_the_masked_one_and_learns():
    torch.manual_seed(0)
    build = torchvision.models.detection.ssdlite320_mobilenet_v3_large
    model = build(weights=None, weights_backbone=None, score_thresh=0.0).eval()
    images = [torch.rand(3, 200, 240)]
    masks = masks_of(nni_topo.create_pruner("l2", model, nni_topo.dependency_groups(model, (images,), bench.ASKED)))
    dense, masked = nni_topo.to_dense(model, (images,), masks), nni_topo.masked_model(model, (images,), masks)
    assert bench.zoo.count_params(dense) < 0.4 * bench.zoo.count_params(model)
    others = [torch.rand(3, 300, 180, dtype=torch.float64), torch.rand(3, 160, 160, dtype=torch.float64)]
    with torch.no_grad():
        found = [each.double()(others) for each in (dense, masked)]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    assert len(found[0][0]["boxes"]) > 10
    targets = [{"boxes": torch.tensor([[10.0, 10.0, 90.0, 90.0]]), "labels": torch.tensor([1])}] * 2
    losses = dense.float().train()(2 * images, targets)
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in dense.parameters())


def test_strict_makes_a_layer_left_whole_an_error():
    model, inputs = zoo_nets.make("sliced")
    with pytest.raises(ConfigError, match=r"able to lose channels, got four\.0: the forward picks or counts"):
        nni_topo.dependency_groups(model, inputs, bench.ASKED, strict=True)
    model, inputs = zoo_nets.make("unet")
    assert nni_topo.dependency_groups(model, inputs, bench.ASKED, strict=True).skipped.keys() == {"head"}


WRONG = {
    "channels": (torch.randn(4, 5, 8, 8), r"must fit the model: Sequential can't be run on float32 of shape \(4, 5"),
    "no batch": (torch.randn(3, 8, 8), r"must hold a batch.*got a tensor of shape \(3, 8, 8\), which enters"),
    "no samples": (torch.randn(0, 3, 8, 8), r"must hold at least one sample, got shape \(0, 3, 8, 8\)"),
    "another name": ({"y": torch.randn(4, 3, 8, 8)}, r"Sequential can't be run on \{'y': float32 of shape"),
}


@pytest.mark.parametrize("name", WRONG)
def test_inputs_that_do_not_fit_the_model_are_said_to_be_those(name):
    inputs, text = WRONG[name]
    with pytest.raises((ConfigError, DataError), match=text):
        nni_topo.dependency_groups(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)), inputs, bench.ASKED)


def test_what_is_named_is_never_left_out(caplog):
    model, inputs = zoo_nets.make("lstm")
    config = [{"op_names": ["embed", "head"], "op_types": ["Linear"], "sparse_ratio": 0.5}]
    groups = nni_topo.dependency_groups(model, inputs, config)
    assert [entry["op_names"] for entry in groups] == [["embed"], ["head"]]
    assert groups.skipped == {}
    assert "should be excluded, got head" in caplog.text


def test_one_warning_names_all_that_is_left_whole(caplog):
    model, inputs = zoo_nets.make("constants")
    nni_topo.dependency_groups(model, inputs, bench.ASKED)
    (message,) = [record.getMessage() for record in caplog.records]
    # What a sigmoid makes of removed channels, and what a cumulative sum makes of them, isn't read.
    assert "one: " not in message
    assert "three: " not in message
    assert "two: the result of an operation depends on removed channels (softmax)" in message


@pytest.mark.parametrize("make", [chain, Residual, Concatenated, Grouped])
@pytest.mark.quick_every(2)
def test_numbers_infer_what_nnis_own_speedup_does_by_running(make):
    model, images = make().eval(), torch.rand(2, 3, 8, 8)
    masks = l1_masks(model, nni_topo.dependency_groups(model, images, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]))
    dense = nni_topo.to_dense(model, images, masks)
    # NNI keeps the shift of a batch norm behind a removed channel, so the widths are compared and not the outputs.
    theirs = ModelSpeedup(make().eval(), images, masks).speedup_model()
    for name, module in theirs.named_modules():
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.Linear)):
            other = dense.get_submodule(name)
            assert other.weight.shape == module.weight.shape


def test_channels_that_a_pixel_shuffle_spreads_are_asked_for_together():
    model, inputs = zoo_nets.make("pixel_shuffle")
    stem, wide, tail = nni_topo.dependency_groups(model, inputs, bench.ASKED)
    assert wide == {"op_names": ["wide"], "sparse_ratio": 0.5, "granularity": [4, -1, -1, -1]}
    assert "granularity" not in stem | tail
    dense = nni_topo.to_dense(model, inputs, l1_masks(model, [stem, wide, tail]))
    assert [dense.wide.out_channels, dense.tail[0].in_channels, dense.report.kept] == [12, 3, ()]


def test_a_weight_that_is_looked_at_for_its_type_holds_nothing():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.head = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 12, 1), nn.Conv2d(12, 4, 1)

        def forward(self, x):
            x = self.one(x.to(self.one.weight.dtype)).to(self.two.weight.device)
            return self.head(self.two(x).to(self.head.weight.dtype))

    model, images = Model(), torch.rand(2, 3, 4, 4)
    groups = nni_topo.dependency_groups(model, images, bench.ASKED)
    assert groups.skipped.keys() == {"head"}
    dense = nni_topo.to_dense(model, images, l1_masks(model, groups))
    assert [dense.one.out_channels, dense.two.out_channels] == [8, 6]


def test_a_layer_whose_channels_only_go_together_stays_whole():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.PixelShuffle(2), nn.Conv2d(1, 2, 1))
    groups = nni_topo.dependency_groups(model, torch.rand(1, 3, 4, 4), bench.ASKED)
    assert [entry["op_names"] for entry in groups] == [["0"]]
    assert groups.skipped["2"] == "all of its channels are coupled with one another"
