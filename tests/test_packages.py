"""What ``make packages`` says of a class, and how its tables count, by hand."""

import math

import pytest
import torch
from torch import nn
from torchvision.models import MobileNetV2

from benchmarks.packages import report, run
from benchmarks.packages.examples import Listed, documented, images


def tiny():
    """Build two blocks of MobileNetV2 with two images."""
    settings = [[1, 16, 1, 1], [4, 24, 1, 2]]
    return MobileNetV2(num_classes=3, width_mult=0.5, inverted_residual_setting=settings), images(3, 32)


def test_a_class_is_made_smaller_compared_and_saved():
    record = run.measure(Listed("torchvision", "tiny", tiny))
    assert record["outcome"] == "runs"
    assert record["removed"] == record["requested"] > 0
    assert set(record["differences"]) == {"other values", "batch", "size"}
    assert max(record["differences"].values()) < 1e-5 < record["change"]
    assert record["whole"] == {"classifier.1": report.OUTPUT}
    assert record["saved"] == {"nni_topo": "yes"}
    assert report.is_met({"status": "ok", **record})


def test_what_cannot_be_built_or_is_refused_is_said():
    def missing():
        raise ImportError("needs another package")

    def lone():
        return nn.Linear(4, 2), torch.randn(2, 4)

    record = run.measure(Listed("torchvision", "missing", missing))
    assert (record["outcome"], record["error"]) == ("not built", "ImportError: needs another package")
    record = run.measure(Listed("torchvision", "lone", lone))
    assert record["outcome"] == "refused"
    assert report.OUTPUT in record["error"]


def test_a_docstrings_example_is_run():
    model, inputs = documented("torch.nn", "Bilinear")
    assert isinstance(model, nn.Bilinear)
    assert model(**inputs).shape == (128, 40)
    with pytest.raises(LookupError, match="doesn't call it"):
        documented("torch.nn", "Container")


def test_sizes_of_inputs_are_changed_together():
    inputs = {"x": torch.arange(24.0).view(2, 4, 3), "mask": torch.ones(2, 4), "count": 4}
    longer = run.resized(inputs, 4, 8, first=False)
    assert longer["x"].shape == (2, 8, 3)
    assert longer["mask"].shape == (2, 8)
    assert longer["x"][0, :, 0].tolist() == [0.0, 0.0, 3.0, 3.0, 6.0, 6.0, 9.0, 9.0]
    assert run.resized(inputs, 2, 3, first=True)["x"][:, 0, 0].tolist() == [0.0, 0.0, 12.0]


def test_the_largest_step_is_a_head_where_heads_go():
    # 4 inputs, 8 channels in heads of 4, 2 outputs: 32 and 16 multiplications; a head takes 16 of 48.
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Linear(8, 2, bias=False))
    mask = torch.tensor([1.0] * 4 + [0.0] * 4).view(8, 1)
    heads = {"0": {"weight": mask}}
    assert run.largest_step(model, torch.randn(1, 4), heads) == pytest.approx(16 / 48)
    mask[0] = 0.0
    assert run.largest_step(model, torch.randn(1, 4), heads) == pytest.approx(4 / 48)


def record_of(name, **values):
    """Return a record of a class that keeps half of its cost."""
    record = {
        "model": f"monai/{name}",
        "status": "ok",
        "outcome": "runs",
        "left": 0.5,
        "why": "",
        "step": 0.0,
        "requested": 8,
        "removed": 8,
        "kept": {},
        "whole": {"last": report.OUTPUT},
        "channels": {"last": 2, "all": 34},
        "change": 1.0,
        "differences": {"batch": 0.0},
        "saved": {"nni_topo": "yes"},
    }
    return record | values


RECORDS = [
    record_of("near", left=0.51),
    record_of("one_head", left=0.58, step=0.08, saved={"nni_topo": "no", "own": "yes"}),
    record_of("far", left=0.58, step=0.05, whole={"last": report.OUTPUT, "a.b": "no rule (a.b)"})
    | {"channels": {"last": 2, "a.b": 8, "all": 34}, "kept": {"c": "no rule (c)"}},
    record_of("wrong", differences={"batch": 0.0, "size": math.inf}),
    {"model": "monai/no", "status": "ok", "outcome": "refused", "error": "E: x (a)"},
    {"model": "monai/slow", "status": "ended by signal 9"},
    {"model": "monai/none", "status": "ok", "outcome": "not built", "error": "I"},
]


def test_the_table_counts():
    head, _, row, total = report.table(RECORDS, {"monai/no": "It is."}).splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    counted = dict(zip((cell.strip() for cell in head.strip("|").split("|")), cells, strict=True))
    assert counted == {
        "package": "monai",
        "classes": "7",
        "built": "6",
        "run by default": "4 of 6",
        "budget met": "3 of 6",
        "or a true reason": "1 of 3",
        "channels offered": "0.94",  # 1, 1, 24 of 32, 1
        "requested channels removed": "1.00",
        "equal": "3 of 4",
        "saved": "4 of 4",
        "by its own means": "1 of 1",
    }
    assert total.split("|")[2:] == row.split("|")[2:]


def test_causes_are_counted_by_class():
    assert report.causes(RECORDS) == {
        "stays: no rule": ["monai/far"],
        "stays in part: no rule": ["monai/far"],
        "dense differs from masked, or doesn't run": ["monai/wrong"],
        "refused: E: x": ["monai/no"],
        "not finished: ended by signal N": ["monai/slow"],
    }


def test_losses_are_what_a_class_could_before():
    now = [record_of("near", left=0.7), record_of("far", left=0.5), record_of("one_head", saved={"nni_topo": "no"})]
    assert report.losses(now, RECORDS) == ["monai/near no longer meets the budget", "monai/one_head no longer is saved"]


def test_every_class_is_listed_once():
    from benchmarks.packages import language, speech, vision

    for names in (speech.NETWORKS.split(), vision.TIMM.split()):
        assert len(set(names)) == len(names)
    assert len(language.TRANSFORMERS) == 30
