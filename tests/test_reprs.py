"""What public functions return can be printed: a few lines, and no module or tensor in full."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import nni_topo
from nni_topo import zoo
from nni_topo.network.cost.latency import measure_latency
from nni_topo.testing import toy_images, toy_model

IMAGES = [toy_images(32)]


def masks() -> dict[str, dict[str, torch.Tensor]]:
    kept = (torch.arange(16) % 2).float()
    return {"hidden": {"weight": kept[:, None].expand(16, 8).clone(), "bias": kept}}


def model() -> nn.Module:
    return toy_model().eval()


def dense() -> nn.Module:
    return nni_topo.to_dense(model(), toy_images(2), masks())


def trained() -> object:
    data = zoo.load_data("digits", limit=40)
    net = zoo.create_model("lenet300", num_classes=10, in_channels=1, image_size=8)
    return zoo.train(net, data, zoo.Recipe(epochs=2, batch_size=20), seed=0)


# By what is printed, the number of lines at most and something that it says.
RESULTS = {
    "compensation": (lambda: nni_topo.compensation(model(), masks(), IMAGES), 8, "error_held_out"),
    "distillation": (lambda: nni_topo.distillation(dense(), model(), IMAGES, steps=2), 1, "distillation is"),
    "explain": (lambda: nni_topo.explain(model(), toy_images(2), "stem"), 8, "all but one of 8 channels can be pruned"),
    "shrink": (lambda: nni_topo.shrink(model(), IMAGES, {"flops": 0.5}, distill=False).report, 16, "unpruned"),
    "to_dense": (lambda: dense().report, 8, "hidden"),
    "data": (lambda: zoo.load_data("digits", limit=40), 1, "digits: "),
    "training": (trained, 3, "epoch"),
    "latency": (lambda: measure_latency(model(), toy_images(2)), 1, "4 layers"),
}


@pytest.mark.parametrize("name", RESULTS)
@pytest.mark.quick_every(2)
def test_a_result_is_printed_in_a_few_lines(name):
    work, lines, said = RESULTS[name]
    found = repr(work())
    assert said in found
    assert "Linear(" not in found
    assert "object at 0x" not in found
    assert len(found.splitlines()) <= lines
