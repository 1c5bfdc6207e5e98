"""T4b of the hypotheses about topology: scenes, the two measures, and tables on examples with known answers."""

from __future__ import annotations

import pytest
import torch
from bench_modules import BENCHMARKS, imported
from torch import nn
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


@pytest.fixture(scope="module")
def made(scenes):
    """Scenes of ten squares, each as bright as its class says."""
    images = torch.zeros(10, 1, 28, 28)
    images[:, :, 6:22, 6:22] = (0.5 + 0.05 * torch.arange(10.0)).view(-1, 1, 1, 1)
    images[9] /= images.max()
    return scenes.composed(images, torch.arange(10), 40, seed=0)


def test_a_box_holds_the_pixels_of_its_object_and_no_others(scenes, made):
    assert made.images.shape == (40, 1, scenes.SIDE, scenes.SIDE)
    counts = (made.labels >= 0).sum(1)
    assert counts.min() >= 1
    assert counts.max() > 2
    for scene in range(40):
        left = made.pixels[scene].clone()
        for box, label in zip(made.boxes[scene].long(), made.labels[scene], strict=True):
            if label >= 0:
                inside = left[box[1] : box[3], box[0] : box[2]]
                assert (inside == label + 1).double().mean() > 0.8  # squares are full but for their corners
                assert set(inside.unique().tolist()) <= {0, int(label) + 1}
                inside.zero_()
        assert not left.any()
        assert torch.equal(made.pixels[scene] > 0, made.images[scene, 0] > 0.1)


def test_scenes_come_from_their_seed(scenes, made):
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(6, 1, 28, 28, generator=generator), torch.arange(6)
    one, same, other = (scenes.composed(images, labels, 3, seed) for seed in (0, 0, 1))
    assert torch.equal(one.images, same.images)
    assert not torch.equal(one.images, other.images)


def test_intersection_over_union_by_hand(scenes, made):
    pixels = torch.tensor([[[0, 0], [1, 1]], [[0, 0], [2, 2]]])
    found = torch.tensor([[[0, 0], [1, 0]], [[0, 0], [1, 2]]])
    logits = one_hot(found, 11).permute(0, 3, 1, 2).float()
    truth = scenes.Scenes(made.images, pixels, made.boxes, made.labels)
    # background 4 of 5, class 1: 1 of 3, class 2: 1 of 2; no other class occurs
    assert scenes.mean_intersection_over_union(logits, truth) == pytest.approx((4 / 5 + 1 / 3 + 1 / 2) / 3)


def perfect(scenes, made):
    """Outputs of a detector that knows."""
    outputs = torch.full((40, 15, 6, 6), -20.0)
    outputs[:, 1:5] = 0.0
    for scene, place in (made.labels >= 0).nonzero().tolist():
        left, top, right, bottom = made.boxes[scene, place].tolist()
        x, y = (left + right) / 2 / scenes.STRIDE, (top + bottom) / 2 / scenes.STRIDE
        sizes = torch.tensor([right - left, bottom - top]) / scenes.REFERENCE
        cell = outputs[scene, :, int(y), int(x)]
        cell[0] = 20.0
        cell[1:5] = torch.tensor([x - int(x) - 0.5, y - int(y) - 0.5, *sizes.log()])
        cell[5 + made.labels[scene, place]] = 20.0
    return outputs


def test_a_detector_that_knows_has_no_loss_and_full_precision(scenes, made):
    outputs = perfect(scenes, made)
    loss = scenes.detection_loss(outputs, made, torch.arange(40))
    assert float(loss) == pytest.approx(0.0, abs=1e-5)
    assert scenes.quality(scenes.DETECTOR, outputs, made) == pytest.approx(1.0)
    # boxes that are twice as wide and high overlap a quarter
    wide = outputs.clone()
    wide[:, 3:5] += torch.tensor(2.0).log()
    assert scenes.quality(scenes.DETECTOR, wide, made) == 0.0
    assert float(scenes.detection_loss(wide, made, torch.arange(40))) > 1.0


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


@pytest.mark.parametrize("kind", ["segmentation", "detection"])
@pytest.mark.quick_every(2)
def test_all_convolutions_but_the_head_get_narrower(bench, scenes, made, kind):
    torch.manual_seed(0)
    model = scenes.KINDS[kind](10).eval()
    small = bench.pruned(model, 0.3, made.images[:32], 0)
    layers = {name: layer.out_channels for name, layer in small.named_modules() if isinstance(layer, nn.Conv2d)}
    assert layers.pop("head") == model.head.out_channels
    assert sorted(layers.values()) == [3] + [6] * (len(layers) - 1)
    assert bench.outputs_for(small, made.images).shape == bench.outputs_for(model, made.images).shape


@pytest.mark.parametrize("kind", ["segmentation", "detection"])
@pytest.mark.quick_every(2)
def test_training_lowers_the_loss(scenes, made, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(scenes, "BATCH", 8)
    torch.manual_seed(300)
    untrained = scenes.KINDS[kind](scenes.width_of(300)).eval()
    model = scenes.trained_on_scenes(kind, 300, made, tmp_path)
    before, after = (
        scenes.LOSSES[kind](scenes.outputs_for(net, made.images), made, torch.arange(40)) for net in (untrained, model)
    )
    assert after < before
    again = scenes.trained_on_scenes(kind, 300, made, tmp_path)
    assert torch.equal(scenes.outputs_for(again, made.images), scenes.outputs_for(model, made.images))


def test_scores_are_of_both_clouds(bench):
    outputs = torch.randn(20, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    turned = outputs.clone()
    turned[:10] = turned[:10].flip(2)  # averages don't see where things are
    found = bench.scores(outputs, turned)
    assert set(found) == set(bench.COMPARISONS)
    for name, value in found.items():
        assert abs(value) < 1e-5 if name.endswith(bench.AVERAGED) else value > 1e-3, name


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
