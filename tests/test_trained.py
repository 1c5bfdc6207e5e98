"""What the comparison on networks from outside reads and measures; what isn't installed is skipped."""

from __future__ import annotations

import importlib
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

_PROJECT = Path(__file__).parents[1]
_INSTALL = "make trained-packages installs it"


@pytest.fixture(scope="module")
def modules():
    names = ("photos", "sentences", "pretrained", "measures", "report", "longer")
    return {name: importlib.import_module(f"benchmarks.trained.{name}") for name in names}


def test_the_page_quotes_the_long_courses(modules):
    records = modules["longer"].read_records(_PROJECT / "benchmarks/records/trained/longer.jsonl")
    cosines = {tuple(record["key"]): record["figures"]["cosine"]["value"] for record in records[-4:]}
    ours, theirs = (cosines["minilm", 0.5, name, 38_000] for name in ("sentences", "sentences, l1 alone"))
    text = (_PROJECT / "benchmarks" / "results" / "trained.md").read_text(encoding="utf-8")
    assert f"**MiniLM reaches a cosine of {ours:.3f}" in text
    assert f"Distilled from L1 alone it has {theirs:.3f}" in text


def test_no_photo_and_no_package_is_in_two_parts(modules):
    for parts in (modules["photos"].PHOTOS, modules["sentences"].PACKAGES):
        names = [name for part in parts.values() for name in part]
        assert len(names) == len(set(names))
    counts = {part: len(names) for part, names in modules["photos"].PHOTOS.items()}
    assert counts == {"calibration": 40, "validation": 8, "test": 24}


def test_intervals_are_those_of_photos_and_not_of_crops(modules):
    clustered = modules["measures"].clustered
    photos = torch.arange(4).repeat_interleave(25)
    by_photo = torch.tensor([0.0, 0.0, 1.0, 1.0])[photos]
    found = clustered(by_photo, photos)
    # Four photos, of which two agree: Student's t with three degrees of freedom, of four numbers.
    assert found.value == 0.5
    assert found.high - found.value == pytest.approx(3.182446 * math.sqrt(1 / 3) / 2, rel=1e-5)
    alone = clustered(by_photo, torch.arange(100))
    assert alone.high - alone.low < 0.5 * (found.high - found.low)


def test_agreement_of_classes(modules):
    measures, photos = modules["measures"], modules["photos"]
    theirs = torch.eye(8)[[0, 1, 2, 3]] * 9.0
    mine = theirs.clone()
    mine[0] = torch.tensor([4.0, 9.0, 0, 0, 0, 0, 0, 0])  # second
    mine[1] = torch.tensor([9.0, 0.0, 8, 7, 6, 5, 4, 3])  # last
    crops = photos.Crops(torch.zeros(4, 3, 1, 1), torch.arange(4))
    found = measures.like_classifier(mine, theirs, crops)
    assert (found["top 1"].value, found["top 5"].value) == (0.5, 0.75)
    divergence = nn.functional.kl_div(mine.log_softmax(1), theirs.softmax(1), reduction="batchmean")
    assert found["KL"].value == pytest.approx(float(divergence), rel=1e-5)


def test_turned_embeddings_have_the_same_neighbours(modules):
    like = modules["measures"].like_encoder
    drawing = torch.Generator().manual_seed(0)
    theirs = nn.functional.normalize(torch.randn(200, 16, generator=drawing), dim=1)
    turn = torch.linalg.qr(torch.randn(16, 16, generator=drawing)).Q
    turned, other = like(theirs @ turn, theirs), like(torch.randn(200, 16, generator=drawing), theirs)
    assert turned["recall@10"].value == 1.0
    assert turned["Spearman"].value == pytest.approx(1.0, abs=1e-4)
    assert abs(turned["cosine"].value) < 0.5
    assert other["recall@10"].value == pytest.approx(10 / 199, abs=0.04)


@pytest.mark.slow
@pytest.mark.parametrize("page", ["cnn_from_a_wheel", "embedding_model"])
def test_the_pages_run_from_the_wheel_to_the_exported_file(modules, page, tmp_path, monkeypatch):
    if lacking := [*modules["pretrained"].missing(), *modules["photos"].missing()]:
        pytest.skip(f"{', '.join(lacking)} isn't installed: {_INSTALL}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(_PROJECT)
    (tmp_path / "runs").mkdir()
    text = (_PROJECT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    names = {"__name__": page}
    for snippet in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(compile(snippet, page, "exec"), names)
    stages = {stage.network: stage for stage in names["small"].report.stages}
    share = 0.8 if page == "cnn_from_a_wheel" else 0.5
    assert stages["pruned"].macs / stages["unpruned"].macs == pytest.approx(share, abs=0.01)
    assert stages["reconstructed"].distance < 0.8 * stages["pruned"].distance
    assert names["small"].report.held_out > 0
    assert names["done"].error < 1e-4
    if page == "cnn_from_a_wheel":
        images = names["crops"].images[:2]
        assert torch.equal(names["small"](images), names["again"](images))
    else:
        assert float((names["one"] - names["other"]).abs().max()) < 1e-5
