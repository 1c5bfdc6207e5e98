from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from nni_topo.errors import DataError
from nni_topo.pruners.genetic_weight.population import MaskedScores, PopulationAccuracy
from nni_topo.testing import toy_images, toy_model


def labelled(model, images, classes, seed=1):
    """Labels that the model hits about half of the time."""
    torch.manual_seed(seed)
    with torch.no_grad():
        hits = model(images).argmax(1)
    return torch.where(torch.rand(len(images)) < 0.5, hits, torch.randint(0, classes, (len(images),)))


def population(size, count=7, seed=0):
    rng = np.random.default_rng(seed)
    masks = [rng.random(size) < share for share in np.linspace(0.2, 0.9, count - 1)]
    return [np.ones(size, dtype=np.bool_), *masks]


def one_by_one(model, layers, masks, images, labels):
    """Mask a copy, an output that lost all weights without its bias, and count."""
    accuracies = []
    for mask in masks:
        net, start = copy.deepcopy(model).eval(), 0
        for name in layers:
            layer = net.get_submodule(name)
            part = torch.from_numpy(mask[start : start + layer.weight.numel()]).view_as(layer.weight)
            start += layer.weight.numel()
            layer.weight.data *= part
            if layer.bias is not None:
                layer.bias.data *= part.flatten(1).any(1)
        with torch.no_grad():
            accuracies.append(float((net(images).argmax(1) == labels).double().mean()))
    return np.array(accuracies)


class Branches(nn.Module):
    """A grouped, a circular and a one-dimensional convolution, and what goes around the masked layers."""

    def __init__(self):
        super().__init__()
        self.grouped = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2)
        self.circular = nn.Conv2d(8, 6, 3, padding=1, padding_mode="circular", bias=False)
        self.line = nn.Conv1d(6, 5, 3, dilation=2)
        self.scale = nn.Parameter(torch.rand(6, 1, 1))
        self.tokens = nn.Linear(12, 7)
        self.head = nn.Linear(35, 3)

    def forward(self, images):
        around = images.mean((1, 2, 3))
        features = torch.tanh(self.circular(torch.tanh(self.grouped(images)))) * self.scale
        features = torch.tanh(self.tokens(self.line(features.flatten(2))))
        return self.head(features.flatten(1)) + around[:, None]


@pytest.mark.parametrize(
    "layers", [["stem"], ["inner"], ["hidden"], ["head"], ["stem", "inner", "hidden"], ["hidden", "head"]]
)
@pytest.mark.parametrize("knobs", [{}, {"max_bytes": 1}])
@pytest.mark.quick_every(3)
def test_a_population_scores_as_its_members_do(layers, knobs, caplog):
    model = toy_model(3).eval()
    model.hidden.bias.data += 1.0
    images = toy_images(50, seed=2)
    labels = labelled(model, images, 4)
    masks = population(sum(model.get_submodule(name).weight.numel() for name in layers))
    scored = PopulationAccuracy(model, layers, zip(images.split(17), labels.split(17), strict=True), **knobs)
    assert caplog.text == ""
    assert scored.samples == 50
    expected = one_by_one(model, layers, masks, images, labels)
    assert len(set(expected)) > 1
    np.testing.assert_array_equal(scored(masks), expected)


@pytest.mark.parametrize("layers", [["grouped"], ["circular"], ["line"], ["tokens"], ["grouped", "circular", "tokens"]])
def test_every_kind_of_layer(layers, caplog):
    torch.manual_seed(0)
    model = Branches().eval()
    images = torch.randn(40, 4, 8, 8)
    labels = labelled(model, images, 3)
    masks = population(sum(model.get_submodule(name).weight.numel() for name in layers))
    scored = PopulationAccuracy(model, layers, [(images, labels)])
    assert caplog.text == ""
    np.testing.assert_array_equal(scored(masks), one_by_one(model, layers, masks, images, labels))


def test_an_output_without_weights_loses_its_bias():
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].weight.data = torch.eye(2)
    model[0].bias.data = torch.tensor([0.0, 5.0])
    batches = [(torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 0]))]
    whole, cut = np.ones(4, dtype=np.bool_), np.array([True, True, False, False])
    np.testing.assert_array_equal(PopulationAccuracy(model, ["0"], batches)([whole, cut]), [0.0, 1.0])


class Called(nn.Module):
    """Uses its layer's weight beside its call, so that the graph can't be cut there."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, images):
        return nn.functional.linear(images, self.layer.weight, self.layer.bias)


def test_a_graph_that_cannot_be_cut_is_run_mask_by_mask(caplog):
    torch.manual_seed(0)
    model = Called()
    images = torch.randn(30, 4)
    labels = labelled(model, images, 3)
    scored = PopulationAccuracy(model, ["layer"], [(images, labels)])
    assert "masks are run one by one" in caplog.text
    masks = population(12)
    np.testing.assert_array_equal(scored(masks), one_by_one(model, ["layer"], masks, images, labels))


def test_any_score_of_a_masked_network():
    layer = nn.Linear(3, 1, bias=False)
    layer.weight.data = torch.tensor([[1.0, 2.0, 4.0]])
    scores = MaskedScores([layer.weight], [None], lambda: float(layer.weight.detach().sum()))
    masks = [np.array(mask) for mask in ([True, True, True], [True, False, True], [False, False, True])]
    np.testing.assert_array_equal(scores(masks), [7.0, 5.0, 4.0])
    assert layer.weight.tolist() == [[1.0, 2.0, 4.0]]
    with pytest.raises(DataError, match="must return a finite number, got nan"):
        MaskedScores([layer.weight], [None], lambda: float("nan"))(masks)


def test_an_output_loses_its_bias_with_its_last_weight():
    layer = nn.Linear(1, 2)
    layer.weight.data, layer.bias.data = torch.tensor([[1.0], [2.0]]), torch.tensor([10.0, 20.0])
    scores = MaskedScores([layer.weight], [layer.bias], lambda: float(layer(torch.ones(1)).detach().sum()))
    np.testing.assert_array_equal(scores([np.array([True, True]), np.array([True, False])]), [33.0, 11.0])
    assert layer.bias.tolist() == [10.0, 20.0]


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "at least one labelled image, got none"),
        ([torch.zeros(2, 3, 8, 8)], "pairs \\(inputs, labels\\)"),
        ([(toy_images(2), torch.tensor([0]))], "pairs \\(inputs, labels\\)"),
        ([(toy_images(2), torch.tensor([0, 4]))], "labels must be below the 4 outputs, got 4"),
    ],
)
def test_bad_batches_are_refused(batches, message):
    with pytest.raises(DataError, match=message):
        PopulationAccuracy(toy_model(), ["head"], batches)
