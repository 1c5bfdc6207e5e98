"""What the comparison on networks from outside reads and measures; what isn't installed is skipped."""

from __future__ import annotations

import importlib
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from nni_topo.studies.tables import with_tables

_PROJECT = Path(__file__).parents[1]
_INSTALL = "make trained-packages installs it"


@pytest.fixture(scope="module")
def modules():
    sys.path.insert(0, str(_PROJECT))
    names = ("photos", "sentences", "pretrained", "measures", "run", "report", "longer")
    yield {name: importlib.import_module(f"benchmarks.trained.{name}") for name in names}
    sys.path.remove(str(_PROJECT))


def test_pasted_images_keep_the_range_and_are_the_same_for_the_same_seed(modules):
    pasted = modules["longer"].pasted
    images = torch.rand(64, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0
    torch.manual_seed(3)
    found = pasted(images)
    torch.manual_seed(3)
    assert torch.equal(pasted(images), found)
    assert found.shape == images.shape
    assert float(found.abs().max()) <= 1.0
    changed = (found - images).abs().flatten(1).amax(1)
    assert bool((changed > 0.01).all())
    assert torch.equal(images, images.clamp(-1.0, 1.0))


def test_the_readme_quotes_the_long_courses(modules):
    records = modules["longer"].read_records(_PROJECT / "benchmarks/records/trained/longer.jsonl")
    cosines = {tuple(record["key"]): record["figures"]["cosine"]["value"] for record in records[-4:]}
    ours, theirs = (cosines["minilm", 0.5, name, 38_000] for name in ("sentences", "sentences, l1 alone"))
    quoted = f"with 38,000 sentences, reaches {ours:.3f} ({theirs:.3f} by L1 and distillation)"
    assert quoted in (_PROJECT / "README.md").read_text(encoding="utf-8")


def test_the_table_of_long_courses_says_what_was_discarded(modules):
    longer = modules["longer"]
    records = longer.read_records(_PROJECT / "benchmarks/records/trained/longer.jsonl")
    made = longer.table(records)
    lines = [line for line in made.splitlines() if line.startswith("| ") and line[2].isdigit()]
    assert len(lines) == len(records)
    assert sum("discarded" in line for line in lines) == sum(not record["is_kept"] for record in records)
    assert sum(" -> " in line for line in lines) == sum(record["is_kept"] for record in records)


def test_new_weights_are_new_in_all_layers_and_the_same_in_each_run(modules):
    def net():
        return nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2))

    first, second = net(), net()
    with torch.no_grad():
        for each in (*first.parameters(), *second.parameters()):
            each.fill_(7.0)
    for each in (first, second):
        modules["run"].draw_weights(each)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
        assert not bool((one == 7.0).any())


def test_no_photo_and_no_package_is_in_two_parts(modules):
    for parts in (modules["photos"].PHOTOS, modules["sentences"].PACKAGES):
        names = [name for part in parts.values() for name in part]
        assert len(names) == len(set(names))
    photos = modules["photos"]
    assert {part: len(names) for part, names in photos.PHOTOS.items()} == {
        "calibration": 40,
        "validation": 8,
        "test": 24,
    }
    assert {name.partition("/")[0] for part in photos.PHOTOS.values() for name in part} <= photos.SOURCES.keys()
    assert set(photos.KNOWN) <= {name for part in photos.PHOTOS.values() for name in part}


@pytest.mark.slow
def test_crops_are_those_of_the_seed(modules):
    photos = modules["photos"]
    if lacking := photos.missing():
        pytest.skip(f"photos of {', '.join(lacking)} aren't installed: {_INSTALL}")
    found, again, other = (photos.random_crops("test", 30, seed) for seed in (1, 1, 2))
    assert found.images.shape == (30, 3, 128, 128)
    assert found.photos.tolist() == sorted([*range(24), *range(6)])
    assert torch.equal(found.images, again.images)
    assert not torch.equal(found.images, other.images)
    assert -1.0 <= float(found.images.min()) < 0.0 < float(found.images.max()) <= 1.0
    few = photos.random_crops("calibration", 12, 0, photos=3)
    assert few.photos.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_sentences_are_read_from_docstrings_and_code_is_not(modules, tmp_path, monkeypatch):
    package = tmp_path / "written"
    package.mkdir()
    (package / "__init__.py").write_text(
        '"""It reads the first of several sentences. A second one follows right after it!\n\n'
        '>>> It isn\'t read here, being code.\n"""\n'
        "raise RuntimeError('the code must not run')\n",
        encoding="utf-8",
    )
    (package / "broken.py").write_text("def (:", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    found = list(modules["sentences"]._of_package("written"))
    assert found == ["It reads the first of several sentences.", "A second one follows right after it!"]


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
def test_the_networks_are_those_that_were_trained(modules, tmp_path):
    pretrained, photos, sentences = (modules[name] for name in ("pretrained", "photos", "sentences"))
    if lacking := [*pretrained.missing(), *photos.missing()]:
        pytest.skip(f"{', '.join(lacking)} isn't installed: {_INSTALL}")
    from torchvision.models._meta import _IMAGENET_CATEGORIES as CLASSES
    from torchvision.transforms import functional

    model = pretrained.efficientnet_lite0()
    right = 0
    for name, classes in photos.KNOWN.items():
        photo = photos.open_photo(name)
        photo = functional.center_crop(photo, min(photo.size)).resize((224, 224))
        image = functional.normalize(functional.to_tensor(photo), photos.MEAN, photos.STD)
        with torch.no_grad():
            right += CLASSES[int(model(image[None]).argmax())] in classes
    assert right >= 11  # of 13
    folder = pretrained.minilm_folder(tmp_path)
    encoder, words = pretrained.minilm(folder), pretrained.tokenizer(folder)
    texts = ["Sort the rows of a table.", "Order a data frame by a column.", "Draw a circle on the canvas."]
    inputs = sentences.tokens(words, texts)
    with torch.no_grad():
        found = pretrained.embedding(encoder(**inputs), inputs["attention_mask"])
    similar = found @ found.T
    assert similar.diagonal().tolist() == pytest.approx([1.0] * 3, abs=1e-5)
    assert similar[0, 1] > 0.5 > similar[0, 2]


RECORDS = _PROJECT / "benchmarks" / "records" / "trained"


def test_the_page_holds_the_tables_of_the_records(modules):
    page = (_PROJECT / "benchmarks" / "results" / "trained.md").read_text(encoding="utf-8")
    report = modules["report"]
    assert with_tables(page, report.SOURCE, report.tables(report.read(RECORDS))) == page


def test_rows_of_a_table_cost_the_same_and_no_cell_is_there_twice(modules):
    records = modules["report"].read(RECORDS)
    keys = [tuple(record["key"]) for record in records]
    assert len(keys) == len(set(keys))
    costs = {}
    for record in records:
        if "macs" in record:
            costs.setdefault((record["network"], record["key"][1]), []).append(record["macs"])
    for (network, _), found in costs.items():
        assert max(found) - min(found) < 0.01, network


def test_the_readme_says_what_the_records_hold(modules):
    """Each figure of the sentences on these networks is that of the cell."""
    report = modules["report"]
    cells = {tuple(record["key"]): record["figures"] for record in report.read(RECORDS)}
    text = " ".join((_PROJECT / "README.md").read_text(encoding="utf-8").split())
    for key, column, said in report.QUOTED:
        figure = report.figure(column, cells[key][column]).partition(" ")[0]
        assert said.format(figure) in text, said


def test_pictures_and_tables_are_made_of_few_cells_too(modules, tmp_path):
    report = modules["report"]
    some = [record for record in report.read(RECORDS) if record["key"][3] == "none"]
    report.picture(some, tmp_path / "agreement.png")
    assert (tmp_path / "agreement.png").stat().st_size > 5_000
    assert "compensate" not in report.tables(some).replace("benchmarks", "")


def test_crops_take_turns_and_come_with_their_photos(modules):
    photos = modules["photos"]
    owners = torch.tensor([0, 0, 0, 1, 1, 2])
    crops = photos.Crops(torch.arange(6.0).view(6, 1, 1, 1), owners)
    data = modules["run"]._in_turns(crops, size=4)
    assert torch.cat(list(data)).flatten().tolist() == [0, 3, 5, 1, 4, 2]
    assert data.groups.tolist() == [0, 1, 2, 0, 1, 0]


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
