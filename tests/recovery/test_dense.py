"""What `to_dense` says about the answers that stay, on networks trained with and without masks."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from nni.compression.pruning import L1NormPruner
from torch import nn

import nni_topo
from nni_topo import zoo


class Block(nn.Module):
    """A residual block with group norms."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, channels, 3, padding=1), nn.GroupNorm(4, channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 3, padding=1), nn.GroupNorm(4, channels)

    def forward(self, x):
        return torch.relu(x + self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x))))))


def train(model, data, epochs):
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    images, labels = data.train.tensors
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=generator).split(64):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
    model.eval()


@pytest.fixture(scope="module")
def data():
    return zoo.load_data("digits")


@pytest.fixture(scope="module")
def trained(data):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), Block(16), Block(16)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10))
    train(model, data, 8)
    return model


CONFIG = [{"op_names": ["3.conv1", "4.conv1"], "sparse_ratio": 0.5}]


@pytest.fixture(scope="module")
def under_masks(trained, data):
    """The network trained for two epochs in NNI's wrapper, and its masks."""
    model = copy.deepcopy(trained)
    config_list = nni_topo.dependency_groups(model, data.train.tensors[0][:2], CONFIG)
    pruner = L1NormPruner(model, config_list)
    _, masks = pruner.compress()
    train(model, data, 2)
    accuracy = zoo.evaluate(model, data.test)
    pruner.unwrap_model()
    return model, masks, accuracy


def shares(report):
    """The percentages of a report's sentence."""
    words = report.answers.split()
    return [float(words[place - 1]) for place, word in enumerate(words) if word == "%"]


def agreement(one, other, images):
    with torch.no_grad():
        return 100.0 * float((one(images).argmax(1) == other(images).argmax(1)).double().mean())


def wrapped(model, masks):
    """The function that NNI's wrapper computes."""
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for name, targets in masks.items():
            for target, mask in targets.items():
                if mask is not None:
                    masked.get_submodule(name).get_parameter(target).mul_(mask)
    return masked.eval()


def test_a_network_trained_under_masks_hears_of_its_answers_and_of_constants(under_masks, data, caplog):
    model, masks, accuracy = under_masks
    images = data.train.tensors[0][:256]
    with caplog.at_level(logging.WARNING):
        dense = nni_topo.to_dense(model, images, masks)
    expected = [agreement(dense, model, images), agreement(dense, wrapped(model, masks), images)]
    assert shares(dense.report) == pytest.approx(expected, abs=0.06)
    assert expected[1] < 99.5
    (said,) = [record.getMessage() for record in caplog.records if "% of the answers" in record.getMessage()]
    assert dense.report.answers in said
    assert "nni_topo.compensate(model, masks, batches)" in said
    assert 'constants="keep"' in said
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        kept = nni_topo.to_dense(model, images, masks, constants="keep")
    assert shares(kept.report)[1] > expected[1]
    assert not any('constants="keep"' in record.getMessage() for record in caplog.records)
    assert zoo.evaluate(kept, data.test) > max(accuracy - 0.03, zoo.evaluate(dense, data.test))


def test_after_compensate_one_share_is_told_and_no_remedy(trained, data, caplog):
    model = copy.deepcopy(trained)
    pruner = L1NormPruner(model, CONFIG)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    images = data.train.tensors[0][:512]
    with caplog.at_level(logging.WARNING):
        dense = nni_topo.to_dense(model, images, masks)
    assert "nni_topo.compensate(model, masks, batches)" in caplog.text
    assert shares(dense.report)[0] < 97.0
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        dense = nni_topo.to_dense(nni_topo.compensate(model, masks, [images]), images, masks)
    assert len(shares(dense.report)) == 1
    assert "compensate(" not in caplog.text
    # The dense network isn't one of full size that `compensate` returned.
    again = L1NormPruner(dense, [{"op_names": ["3.conv1"], "sparse_ratio": 0.5}])
    _, masks = again.compress()
    again.unwrap_model()
    assert len(shares(nni_topo.to_dense(dense, images, masks).report)) == 2


@pytest.mark.parametrize("how", [{}, {"check": False}])
def test_few_samples_and_no_check_are_silent_but_for_the_comparison(how, under_masks, data, caplog):
    model, masks, _ = under_masks
    images = data.train.tensors[0][: 64 if how else 31]
    with caplog.at_level(logging.WARNING):
        dense = nni_topo.to_dense(model, images, masks, **how)
    assert dense.report.answers == ""
    assert "answers" not in caplog.text
    assert ("equal to the masked network on random inputs" in repr(dense.report)) == (not how)


def test_numbers_have_an_error_and_inputs_by_name_are_compared(caplog):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(16, 1)

        def forward(self, one, two):
            return self.last(torch.relu(torch.cat([self.first(one), self.second(two)], 1)))

    torch.manual_seed(0)
    model, inputs = Sum().eval(), {"one": torch.randn(64, 4), "two": torch.randn(64, 4)}
    mask = torch.ones(8, 4)
    mask[4:] = 0.0
    masks = {"first": {"weight": mask, "bias": mask[:, 0].clone()}}
    with caplog.at_level(logging.WARNING):
        dense = nni_topo.to_dense(model, inputs, masks)
    with torch.no_grad():
        whole = model(**inputs).double()
        error = float(((dense(**inputs) - whole).square().mean() / whole.var(unbiased=False)).sqrt())
    assert f"an error of {error:.2g} standard deviations from the model without its masks" in dense.report.answers
    assert "nni_topo.compensate" in caplog.text
    assert "constants=" not in caplog.text
