"""T4b of the hypotheses about topology: scenes, the two measures, and tables on examples with known answers."""

from __future__ import annotations

import pytest
import torch
from bench_modules import BENCHMARKS, imported
from torch.nn.functional import one_hot

FOLDER = BENCHMARKS / "topology"


@pytest.fixture(scope="module")
def bench():
    with imported(FOLDER, "which_ratio_scenes") as module:
        yield module


@pytest.fixture(scope="module")
def scenes():
    with imported(FOLDER, "scenes") as module:
        yield module


def test_intersection_over_union_by_hand(scenes):
    pixels = torch.tensor([[[0, 0], [1, 1]], [[0, 0], [2, 2]]])
    found = torch.tensor([[[0, 0], [1, 0]], [[0, 0], [1, 2]]])
    logits = one_hot(found, 11).permute(0, 3, 1, 2).float()
    truth = scenes.Scenes(torch.zeros(2, 1, 2, 2), pixels, torch.zeros(2, 0, 4), torch.zeros(2, 0))
    # background 4 of 5, class 1: 1 of 3, class 2: 1 of 2; no other class occurs
    assert scenes.mean_intersection_over_union(logits, truth) == pytest.approx((4 / 5 + 1 / 3 + 1 / 2) / 3)


def test_average_precision_by_hand(scenes):
    box = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    away = torch.tensor([[30.0, 30.0, 40.0, 40.0]])
    boxes = torch.stack([torch.cat([box, away]), torch.cat([box, away])])
    labels = torch.tensor([[3, 3], [3, 5]])

    def found(*each):
        spots, scores, classes = zip(*each, strict=True)
        return torch.cat(spots), torch.tensor(scores), torch.tensor(classes)

    near = box + torch.tensor([0.0, 0.0, 0.0, 8.0])  # overlap 10 of 18
    first = found((box, 0.9, 3), (near, 0.8, 3), (box, 0.7, 5))
    second = found((near, 0.6, 3), (away, 0.5, 3))
    # class 3 by score: right, the object is taken, right, wrong class there: precision 1 and 2/3 at two of 3 objects
    # class 5 is never found where it is
    wanted = ((1.0 + 2 / 3) / 3 + 0.0) / 2
    assert scenes.mean_average_precision([first, second], boxes, labels) == pytest.approx(wanted)
    nothing = (torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long))
    assert scenes.mean_average_precision([nothing, nothing], boxes, labels) == 0.0


def test_a_later_right_detection_raises_the_precision_before_it(scenes):
    boxes = torch.tensor([[[0.0, 0.0, 10.0, 10.0], [30.0, 30.0, 40.0, 40.0]]])
    spots = torch.cat([torch.tensor([[15.0, 15.0, 25.0, 25.0]]), boxes[0]])
    found = (spots, torch.tensor([0.9, 0.8, 0.7]), torch.tensor([1, 1, 1]))
    # wrong, right, right: the precision is 2/3 at both recalls
    assert scenes.mean_average_precision([found], boxes, torch.tensor([[1, 1]])) == pytest.approx(2 / 3)


def test_a_box_that_overlaps_a_surer_one_of_its_class_is_left_out(scenes):
    outputs = torch.full((1, 15, 6, 6), -20.0)
    outputs[:, 1:5] = 0.0
    for column, score in ((2, 2.0), (3, 1.0)):
        outputs[0, 0, 1, column] = score
        outputs[0, 1, 1, column] = 0.5 if column == 2 else -0.5  # both centres are between the two cells
        outputs[0, 5 + 4, 1, column] = 20.0
    ((boxes, scores, classes),) = scenes.detections(outputs)
    assert boxes.tolist() == [[16.0, 4.0, 32.0, 20.0]]
    assert scores.tolist() == pytest.approx([torch.tensor(2.0).sigmoid().item()])
    assert classes.tolist() == [4]


def falling(bench, kind, seeds, first):
    """Records of networks that break at `first`, and 0.1 later each; averaged RTD-Lite is what is lost."""
    records = []
    for number, seed in enumerate(seeds):
        at, width = first + 0.1 * number, bench.width_of(seed)
        for gone in range(width):
            share = gone / width
            lost = 0.05 * share / at if share <= at else 0.05 + 2.0 * (share - at)
            scores = dict.fromkeys(bench.COMPARISONS, share) | {f"RTD-Lite{bench.AVERAGED}": 4.0 * lost}
            record = {"key": [kind, seed, gone], "ratio": share, "scores": scores}
            records.append({**record, "validation": 0.8 - lost, "test": 0.7 - lost})
    return records


def test_one_cloud_and_rule_for_both_kinds_and_levels_for_each(bench):
    records = []
    for kind, first in ((bench.SEGMENTER, 0.5), (bench.DETECTOR, 0.2)):
        records += falling(bench, kind, (300, 304), first) + falling(bench, kind, (310, 314, 318), first)
    unfinished = [{**record, "key": [*record["key"][:1], 311, *record["key"][2:]]} for record in records[:3]]
    text = bench.tables(records + unfinished)
    for kind, first in ((bench.SEGMENTER, 0.5), (bench.DETECTOR, 0.2)):
        true = bench.true_ratios(bench.of_kind(records + unfinished, kind), range(310, 325), "test")
        assert true == pytest.approx({310: first, 314: first + 0.1, 318: first + 0.2}, abs=0.06)
        assert f"| {kind}, confirmation, 3 networks | {bench.MEASURES[kind]} | 70.0 ± 0.0 |" in text
    assert "| networks | RTD-Lite, averaged over places, threshold against | difference, points | p |" in text
    differences = text.split("**Differences")[1]
    assert differences.count("(best baseline)") == 2
    assert "RTD-Lite, threshold" not in differences
    assert bench.tables([]) == ""
