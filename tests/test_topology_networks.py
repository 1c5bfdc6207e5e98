"""T3 to T5 of the hypotheses about topology: scores, losses and tables on examples with known answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bench_modules import BENCHMARKS, imported
from torch import nn
from torch.nn.functional import normalize

import nni_topo
from nni_topo.zoo.transformers import TransformerBlock

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


@pytest.fixture
def turned(points):
    """The points, turned and doubled."""
    basis, _ = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))
    return 2.0 * points @ basis


# Encoders


def test_a_patch_is_a_part_of_its_image(encoders):
    images = torch.arange(3 * 28 * 28, dtype=torch.float32).view(3, 1, 28, 28)
    patches = encoders.random_patches(images, torch.Generator().manual_seed(0))
    for image, patch in zip(images, patches, strict=True):
        top, left = divmod(int(patch[0, 0, 0]) % (28 * 28), 28)
        assert torch.equal(patch, image[:, top : top + 20, left : left + 20])
    assert torch.equal(encoders.centre_patches(images), images[:, :, 4:24, 4:24])


def test_neighbours_are_those_of_large_cosine_and_never_the_vector_itself(encoders):
    angles = torch.arange(24) * 0.1
    vectors = torch.stack([angles.cos(), angles.sin()], 1) * (1.0 + angles[:, None])
    found = encoders.nearest(vectors, vectors)
    assert set(found[0].tolist()) == set(range(1, 11))
    assert set(found[12].tolist()) == {*range(7, 12), *range(13, 18)}


def test_recall_and_accuracy_of_neighbours(encoders):
    wanted = torch.tensor([[0, 1], [2, 3]])
    assert encoders.recall(torch.tensor([[1, 0], [3, 9]]), wanted) == 0.75
    gallery = torch.cat([torch.tensor([[1.0, 0.0]]).repeat(12, 1), torch.tensor([[0.0, 1.0]]).repeat(12, 1)])
    labels = torch.tensor([0] * 12 + [1] * 12)
    queries = torch.tensor([[3.0, 0.1], [0.1, 1.0], [1.0, 0.2]])
    assert encoders.neighbour_accuracy(queries, torch.tensor([0, 1, 1]), gallery, labels) == pytest.approx(2 / 3)


# T5


def test_equal_outputs_have_no_loss_and_some_losses_ignore_what_leaves_neighbours_alone(loss, points, turned):
    variance = points.var(0).mean()
    for name, method in loss.LOSSES.items():
        assert float(method(points, points, variance)) == pytest.approx(0.0, abs=1e-6), name
        assert float(method(points.flip(0), points, variance)) > 1e-2, name
    assert float(loss.rtd_lite(points, points)) == pytest.approx(0.0, abs=1e-6)
    assert float(loss.cosine(3.0 * points, points, variance)) == pytest.approx(0.0, abs=1e-6)
    for value in (loss.similarities(turned, points, variance), loss.rtd_lite(turned, points)):
        assert float(value) == pytest.approx(0.0, abs=1e-5)
    assert float(loss.squares(points + variance.sqrt(), points, variance)) == pytest.approx(1.0)


def test_rtd_lite_is_that_of_outputs_of_length_one_over_their_number(loss, points):
    other = points.flip(0)
    distances = [torch.cdist(each, each).double().numpy() for each in (normalize(points), normalize(other))]
    distances = [np.maximum(each, each.T) * (1.0 - np.eye(40)) for each in distances]
    wanted = nni_topo.topology.rtd_lite(*distances) / 40
    assert float(loss.rtd_lite(points, other)) == pytest.approx(wanted, rel=1e-3)


def test_cosine_and_similarities_is_the_loss_of_distill(loss):
    torch.manual_seed(0)
    original, dense, images = nn.Linear(8, 4), nn.Linear(8, 4), torch.randn(60, 8)
    batches = {"held_out": [images], "objective": "cosine", "steps": 1, "lr": 1e-9}
    done = nni_topo.distillation(dense, original, [torch.randn(20, 8)], **batches)
    with torch.no_grad():
        wanted = loss.cosine_and_similarities(dense(images), original(images), torch.ones(()))
    assert done.loss_before == pytest.approx(float(wanted), rel=1e-4)


def test_a_course_learns_within_its_time(loss, monkeypatch):
    monkeypatch.setattr(loss, "SECONDS", 0.2)
    torch.manual_seed(0)
    teacher, dense, images = nn.Linear(8, 4), nn.Linear(8, 4), torch.randn(100, 8)
    with torch.no_grad():
        wanted = teacher(images)
        before = loss.squares(dense(images), wanted, wanted.var(0).mean())
        for course in ((loss.SQUARES, 0.05, 0.0), (loss.OURS, 0.05, 1.0)):
            with torch.enable_grad():
                student, steps = loss.distilled(dense, images, wanted, course, 0)
            assert steps > 1
            assert loss.squares(student(images), wanted, wanted.var(0).mean()) < before


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


def test_scores_of_outputs(ratio, points, turned):
    same, other = ratio.scores(points, 3.0 * points), ratio.scores(points, points.flip(0))
    assert all(abs(same[name]) < 1e-6 < other[name] for name in ratio.SCORES)
    # neighbours and alignment don't see a rotation, the squared distance does
    found = ratio.scores(points, turned)
    assert abs(found[ratio.RTD_LITE]) < 1e-6
    assert abs(found[ratio.CKA]) < 1e-6
    assert found[ratio.SQUARES] > 0.5


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


def test_scores_of_a_block(blocks):
    generator = torch.Generator().manual_seed(0)
    stream = torch.randn(12, 5, 4, 4, generator=generator)
    mapped = torch.einsum("oc,nchw->nohw", torch.randn(5, 5, generator=generator), stream) + 3.0
    for name, method in blocks.STREAM.items():
        assert method(stream, stream) == pytest.approx(0.0, abs=1e-5), name
        assert method(stream, mapped.relu()) > 1e-3, name
    assert blocks.linear_residual(stream, mapped) == pytest.approx(0.0, abs=1e-9)
    assert blocks.block_influence(stream, 2.0 * stream) == pytest.approx(0.0, abs=1e-6)
    assert blocks.block_influence(stream, -stream) == pytest.approx(2.0)
    # of a channel that is always zero there is nothing to explain
    stream[:, 0] = 0.0
    assert blocks.linear_residual(stream, 2.0 * stream) == pytest.approx(0.0, abs=1e-9)
    tokens = stream.flatten(2).transpose(1, 2)
    assert torch.equal(blocks.averaged(tokens), tokens.mean(1))
    assert torch.allclose(blocks.averaged(stream), blocks.averaged(tokens), atol=1e-6)
    assert torch.equal(blocks.positions(stream), blocks.positions(tokens))


@pytest.fixture(scope="module")
def vit(blocks):
    torch.manual_seed(0)
    return blocks.DeepViT(10, 1, 28).eval()


def test_the_blocks_are_those_that_keep_the_shape(blocks, vit):
    assert blocks.block_names(vit) == [f"blocks.{place}" for place in range(12)]
    names = blocks.block_names(blocks.resnet56(10, 1, 28))
    assert len(names) == blocks.BLOCKS[blocks.RESNET]
    assert {f"stage{stage}.0" for stage in (2, 3)}.isdisjoint(names)
    assert "stage1.0" in names
    assert all(isinstance(vit.get_submodule(name), TransformerBlock) for name in blocks.block_names(vit))


def test_a_block_that_adds_nothing_can_go(blocks, vit):
    with torch.no_grad():
        for layer in (vit.blocks[3].attention.o_proj, vit.blocks[3].mlp.fc2):
            layer.weight.zero_()
            layer.bias.zero_()
    images = torch.randn(8, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    before = vit(images).detach()
    assert blocks.loss_without(vit, "blocks.3", images) == pytest.approx(0.0, abs=1e-6)
    assert blocks.loss_without(vit, "blocks.4", images) > 1e-6
    found = blocks.stream_scores(vit, ["blocks.3", "blocks.4"], images)
    assert all(abs(value) < 1e-5 < found["blocks.4"][score] for score, value in found["blocks.3"].items())
    assert torch.equal(vit(images).detach(), before)  # and the network is as it was


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
