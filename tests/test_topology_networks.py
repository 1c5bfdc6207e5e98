"""T3 to T5 of the hypotheses about topology: scores, losses and tables on examples with known answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bench_modules import BENCHMARKS, imported
from torch import nn
from torch.nn.functional import normalize

import nni_topo

FOLDER = BENCHMARKS / "topology"


@pytest.fixture(scope="module")
def encoders():
    with imported(FOLDER, "encoders") as module:
        yield module


@pytest.fixture(scope="module")
def loss():
    with imported(FOLDER, "which_loss") as module:
        yield module


@pytest.fixture(scope="module")
def ratio():
    with imported(FOLDER, "which_ratio") as module:
        yield module


@pytest.fixture(scope="module")
def blocks():
    with imported(FOLDER, "which_blocks") as module:
        yield module


@pytest.fixture
def points():
    return torch.randn(40, 6, generator=torch.Generator().manual_seed(0))


# Encoders


def test_recall_and_accuracy_of_neighbours(encoders):
    wanted = torch.tensor([[0, 1], [2, 3]])
    assert encoders.recall(torch.tensor([[1, 0], [3, 9]]), wanted) == 0.75
    gallery = torch.cat([torch.tensor([[1.0, 0.0]]).repeat(12, 1), torch.tensor([[0.0, 1.0]]).repeat(12, 1)])
    labels = torch.tensor([0] * 12 + [1] * 12)
    queries = torch.tensor([[3.0, 0.1], [0.1, 1.0], [1.0, 0.2]])
    assert encoders.neighbour_accuracy(queries, torch.tensor([0, 1, 1]), gallery, labels) == pytest.approx(2 / 3)


# T5


def test_rtd_lite_is_that_of_outputs_of_length_one_over_their_number(loss, points):
    other = points.flip(0)
    distances = [torch.cdist(each, each).double().numpy() for each in (normalize(points), normalize(other))]
    distances = [np.maximum(each, each.T) * (1.0 - np.eye(40)) for each in distances]
    with imported(FOLDER, "rtd") as rtd:
        wanted = rtd.rtd_lite(*distances) / 40
    assert float(loss.rtd_lite(points, other)) == pytest.approx(wanted, rel=1e-3)


def test_cosine_and_similarities_is_the_loss_of_distill(loss):
    torch.manual_seed(0)
    original, dense, images = nn.Linear(8, 4), nn.Linear(8, 4), torch.randn(60, 8)
    batches = {"held_out": [images], "objective": "cosine", "steps": 1, "lr": 1e-9}
    done = nni_topo.distillation(dense, original, [torch.randn(20, 8)], **batches)
    with torch.no_grad():
        wanted = loss.cosine_and_similarities(dense(images), original(images), torch.ones(()))
    assert done.loss_before == pytest.approx(float(wanted), rel=1e-4)


def test_settings_are_chosen_on_the_validation_images_of_exploration(loss):
    records = []
    for seed in (300, 301, 310, 311):
        for name in (*loss.LOSSES, loss.OURS):
            for rate in (0.003, 0.01):
                is_best = (rate == 0.003) == (seed < 305)
                weight = 0.1 if name == loss.OURS else 0.0
                test = 0.5 + 0.01 * (seed % 2) + (0.1 + 0.02 * (seed % 2)) * (name == "cosine")
                record = {"key": [seed, name, rate, weight], "steps": 7, "test": test, "undistilled": {"test": 0.4}}
                records.append({**record, "validation": 0.6 + 0.1 * is_best + 0.01 * (name == "cosine")})
    assert loss.chosen_course(records, loss.OURS) == (loss.OURS, 0.003, 0.1)
    assert loss.chosen_course(records, loss.SQUARES) == (loss.SQUARES, 0.003, 0.0)
    fresh = [record for record in records if record["key"][0] < 305 or record["key"][2] == 0.003]
    text = loss.tables(fresh)
    assert "| no distillation |  |  |  | 40.0 ± 0.0 |" in text
    assert "| cosine (best baseline) | -11.0 ± 12.7 |" in text
    assert "| squares | +0.0 ± 0.0 |" in text


# T4


def test_where_a_curve_reaches_a_level(ratio):
    curve = [0.0, 0.5, 0.75], [0.0, 0.02, 0.1]
    assert ratio.crossing(curve, 0.06) == pytest.approx(0.625)
    assert ratio.crossing(curve, 0.01) == pytest.approx(0.25)
    assert ratio.crossing(curve, 0.2) == 1.0
    assert ratio.knee_of(([0.0, 0.25, 0.5, 0.75], [0.0, 0.0, 0.0, 1.0])) == 0.5
    assert ratio.knee_of(([0.0, 0.5], [0.0, 1.0])) == 1.0


def test_alignment_of_many_features_is_that_of_gram_matrices(ratio):
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(9, count, generator=generator).double() for count in (30, 12))
    centred = [each - each.mean(0) for each in (one, other)]
    first, second = (each @ each.T for each in centred)
    wanted = float((first * second).sum() / (first.square().sum() * second.square().sum()).sqrt())
    assert ratio.linear_cka(one, other) == pytest.approx(wanted)
    few = one[:, :5], other[:, :5]
    first, second = ((each - each.mean(0)) @ (each - each.mean(0)).T for each in few)
    assert ratio.linear_cka(*few) == pytest.approx(float((first * second).sum() / (first.norm() * second.norm())))


def falling(ratio, seeds):
    """Records of encoders that break at 0.5, 0.6 ...; RTD-Lite is what is lost, the squared distance rises evenly."""
    records = []
    for number, seed in enumerate(seeds):
        at = 0.5 + 0.1 * number
        for gone in range(10):
            share = gone / 10
            lost = 0.05 * share / at if share <= at else 0.05 + 2.0 * (share - at)
            scores = {ratio.RTD_LITE: 4.0 * lost, ratio.SQUARES: share, ratio.CKA: share}
            record = {"key": [seed, gone], "ratio": share, "scores": scores}
            records.append({**record, "validation": 0.8 - lost, "test": 0.7 - lost})
    return records


def test_the_error_of_predicted_ratios(ratio):
    records = falling(ratio, (300, 301)) + falling(ratio, (310, 311, 312))
    assert ratio.true_ratios(records, range(310, 313), "test") == pytest.approx({310: 0.5, 311: 0.6, 312: 0.7})
    found = ratio.errors(records, range(310, 313), "test")
    assert found[f"{ratio.RTD_LITE}, threshold"] == pytest.approx(dict.fromkeys((310, 311, 312), 0.0), abs=1e-9)
    # the mean ratio of exploration is 0.55
    assert found[ratio.CONSTANT] == pytest.approx({310: 0.05, 311: 0.05, 312: 0.15})
    assert found[f"{ratio.CKA}, knee"] == pytest.approx({310: 0.5, 311: 0.4, 312: 0.3})  # a line has no knee
    text = ratio.tables(records)
    assert f"| {ratio.CONSTANT} | 5.0 ± 0.0 | 8.3 ± 14.3 |" in text
    assert "| RTD-Lite, threshold | 0.0 ± 0.0 | 0.0 ± 0.0 |" in text


# T3


def test_correlations_are_of_complete_networks(blocks):
    records = []
    for seed in (300, 310, 311, 312):
        for place in range(12 if seed < 312 else 11):
            rises = place if seed != 311 else max(place, 1)  # a tie, so that the networks differ
            scores = dict.fromkeys(blocks.METHODS, float(-place)) | {blocks.RTD_AVERAGED: float(rises) ** 3}
            record = {"key": [blocks.VIT, seed, f"blocks.{place}"], "scores": scores}
            records.append({**record, "validation": float(place), "test": float(place) ** 0.5})
    found = blocks.correlations(records, blocks.VIT, range(310, 325))
    assert found[blocks.RTD_AVERAGED] == pytest.approx({310: 1.0, 311: 1.0}, abs=2e-3)
    assert found[blocks.RTD_AVERAGED][311] < 1.0
    assert found[blocks.COSINE] == pytest.approx({310: -1.0, 311: -1.0})
    assert blocks.chosen_cloud(records) == blocks.RTD_AVERAGED
    text = blocks.tables(records)
    assert "| score | ViT of twelve blocks, 2 networks |" in text
    assert "| cosine (best baseline) | +2.00 ± 0.01 |" in text
