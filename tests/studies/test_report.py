"""The report in a run's folder: what it shows is what the files say, and it needs no other file."""

from __future__ import annotations

import html
import importlib.util
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

import nni_topo
from nni_topo.cli import main
from nni_topo.errors import DataError
from nni_topo.runs.experiment.results import save_best, save_trials
from nni_topo.runs.experiment.trials import TrialRecord
from nni_topo.studies.report import write_report
from nni_topo.studies.tables import cells_of, grouped

spec = importlib.util.spec_from_file_location("screenshots", Path(__file__).parents[2] / "tools" / "screenshots.py")
screenshots = importlib.util.module_from_spec(spec)
spec.loader.exec_module(screenshots)
FACTS = {"model": "net", "data": "digits", "target": "ratio 0.5", "flops_before": 4e6, "flops": 1e6}
FACTS |= {"params_before": 8e3, "params": 2e3, "accuracy_before": 0.99, "accuracy_oneshot": 0.5}
FACTS |= {"latency_before_ms": 2.0, "latency_ms": 1.0, "prune_seconds": 0.1, "versions": {"torch": "2.x"}}
FACTS |= {"widths_before": {"conv1": 8, "head": 10}, "whole": {"head": "it gives the output"}}
RECORDS = [
    {**FACTS, "pruner": name, "pruner_name": "l1", "seed": seed, "widths": {"conv1": 4, "head": 10}}
    for name in ("l1", "<b>ours</b>")
    for seed in range(2)
]


class Page(HTMLParser):
    """Rows of tables, elements, addresses, and the texts that stand for pictures."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.tags, self.addresses, self.pictures, self._cell = [], [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]
        self.pictures += [value for name, value in attrs if name == "alt"]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._cell = True

    def handle_endtag(self, tag):
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data):
        if self._cell:
            self.rows[-1][-1] += data


def page_of(folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert all(address.startswith(("#", "data:")) for address in page.addresses)
    assert not re.search(r"@import|url\((?!#)", text)
    assert not {"script", "link", "iframe"} & set(page.tags)
    return page


def test_a_comparison_has_its_tables_pictures_and_widths(tmp_path):
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    (tmp_path / "plan.json").write_text(json.dumps({"seeds": 2, "retrain": {"epochs": 1}}))
    page = page_of(write_report(tmp_path).parent)
    # The answer comes first: a quarter of the MACs and parameters is left, and 49 points are lost.
    # These records hold no accuracy on validation images.
    assert page.rows[0] == [
        "after",
        "best method on test images",
        "points lost",
        "times fewer MACs",
        "parameters",
    ]
    assert page.rows[1] == ["no recovery", "l1", "49.0 ± 0.0", "4.0", "4.0"]
    head, rows = cells_of(next(iter(grouped(RECORDS).values())))
    start = page.rows.index(list(head))
    assert page.rows[start : start + len(rows) + 1] == [list(head), *rows]
    assert "b" not in page.tags
    assert page.tags.count("img") == 1
    assert ["conv1", "8", "4", "4", ""] in page.rows
    assert ["head", "10", "10", "10", "it gives the output"] in page.rows
    assert ["epochs", "1"] in page.rows
    assert ["torch", "2.x"] in page.rows


def test_a_pruning_shows_what_was_left_whole_and_how_each_layer_came_back(tmp_path):
    config, out = tmp_path / "prune.yaml", tmp_path / "out"
    config.write_text("pruner: l1\nconfig_list: [{op_types: [Conv2d], sparse_ratio: 0.5}]\ncompensate: {images: 64}\n")
    words = ["prune", "--model", "small_cnn", "--limit", "100", "--config", str(config), "--out", str(out)]
    assert main(words) == 0
    record = json.loads((out / "summary.json").read_text())
    page = page_of(out)
    assert ["features.conv1", "16", "8", ""] in page.rows
    assert ["classifier.fc1", "64", "64", "not asked for"] in page.rows
    assert ["classifier.fc2", "10", "10", "it gives the model's output"] in page.rows
    solved = [row for row in page.rows if row[0] in {found["layer"] for found in record["compensation"]}]
    assert len(solved) >= len(record["compensation"])
    assert [f"{100 * record['accuracy_compensated']:.1f}"] in [row[2:] for row in page.rows]
    before = (out / "report.html").read_text()
    (out / "report.html").unlink()
    assert main(["report", str(out)]) == 0
    assert (out / "report.html").read_text() == before


@pytest.mark.slow
def test_a_study_has_its_pictures_and_its_numbers(tmp_path):
    words = ["analyze", "topology", "--model", "small_cnn", "--limit", "100", "--ratio", "0.5"]
    assert main([*words, "--out", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "topology.json").read_text())
    page = page_of(tmp_path)
    assert page.tags.count("img") == len(list(tmp_path.glob("*.png"))) > 1
    for layer in document["layers"]:
        assert any({str(layer["points"]), str(layer["kept"])} <= set(row) for row in page.rows)


def test_a_picture_of_any_file_name_shows_that_name(tmp_path):
    name = '<b>&"x" onerror="y'
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    (tmp_path / f"{name}.png").write_bytes(b"")
    page = page_of(write_report(tmp_path).parent)
    assert name in page.pictures
    assert "b" not in page.tags


def test_no_absolute_folder_is_shown(tmp_path):
    records = [{**each, "data": "/home/me/photos"} for each in RECORDS]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    settings = {
        "data_dir": "/home/me/data",
        "nested": [[{"checkpoint": "/home/me/nets/a.pt"}]],
        "folder": str(tmp_path),
    }
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    write_report(tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "/home" not in text
    assert str(tmp_path) not in text
    assert all(name in text for name in ("photos", "data", "a.pt", tmp_path.name))


@pytest.mark.parametrize("files", [{}, {"notes.json": "{"}])
def test_a_folder_without_a_run_is_refused(files, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match="needs a run's files, got none" if not files else "a whole file of JSON"):
        write_report(tmp_path)


def small_network():
    torch.manual_seed(0)
    layers = [nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)]
    return nn.Sequential(*layers), [torch.randn(64, 16) for _ in range(8)]


def test_every_form_of_a_report_begins_with_its_sentence_and_has_every_figure():
    net, batches = small_network()
    report = nni_topo.shrink(net, batches, {"flops": 0.5}, time=True).report
    document = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    forms = {"terminal": repr(report), "markdown": report.to_markdown(), "html": html.unescape(report.to_html())}
    last = report.stages[-1]
    share = f"{report.time.share[0]:.2f} of the time, {last.macs / report.stages[0].macs:.2f} of the MACs, "
    assert report.sentence.startswith(share)
    assert document["sentence"] == report.sentence
    for form, text in forms.items():
        begin = text.index(report.sentence) + len(report.sentence)
        for step in document["steps"]:
            for cell in filter(None, step.values()):
                assert text.find(cell, begin) > begin, (form, cell)
        assert all(note in text for note in document["notes"])
    assert forms["terminal"].startswith(report.sentence)
    assert forms["markdown"].startswith(report.sentence)


def test_a_report_of_numbers_tells_the_error_in_standard_deviations():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1))
    report = nni_topo.shrink(net, [torch.randn(256, 16)], {"flops": 0.5}, distill=False).report
    error = report.stages[-1].distance ** 0.5
    assert f"an error of {error:.2g} standard deviations on" in report.sentence
    assert "answers" not in report.sentence
    assert "agreement" not in repr(report)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Report pages by what was run, each with the figures that it must show."""
    folder = tmp_path_factory.mktemp("pages")
    net, batches = small_network()
    found = {}
    report = nni_topo.shrink(net, batches, {"flops": 0.5}, time=True).report
    figures = [cell for step in report.to_dict()["steps"] for cell in step.values() if cell]
    figures += [str(row.after) for row in report.layers.rows]
    found["shrink"] = (report.to_html(), [report.sentence, *figures])
    frontier = nni_topo.frontier(net, batches, (0.5, 0.25), distill=False)
    figures = [str(number) for point in frontier.points for number in (point.macs, point.params)]
    found["frontier"] = (frontier.to_html(), [frontier.sentence, *figures])
    (folder / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    figures = ["0.50 of the time, 0.25 of the MACs, an accuracy of 50 % on the test images (unpruned 99 %)"]
    _, rows = cells_of(next(iter(grouped(RECORDS).values())))
    figures += [cell for row in rows for cell in row if cell]
    found["compare"] = (write_report(folder).read_text(), figures)
    result = {"default": 0.875, "accuracy": 0.9375, "flops_share": 0.3125}
    trials = [
        TrialRecord(f"t{number}", number, "SUCCEEDED", {"ratio.conv1": ratio}, {**result, "default": ratio}, "")
        for number, ratio in enumerate((0.4375, 0.8125))
    ]
    out = folder / "experiment"
    save_trials(trials, out)
    save_best(trials[1], {}, out)
    figures = ["best trial 1: 0.31 of the MACs, an accuracy of 93.8 % on the validation images"]
    found["experiment"] = (write_report(out).read_text(), [*figures, "0.4375", "0.8125", "0.3125", "ratio.conv1"])
    for name, (page, _) in found.items():
        (folder / f"{name}.html").write_text(page)
    return {name: (folder / f"{name}.html", figures) for name, (_, figures) in found.items()}


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("run", ["shrink", "frontier", "compare", "experiment"])
def test_a_browser_without_a_network_shows_every_figure_at_any_width_and_in_the_readers_colours(run, width, pages):
    page, figures = pages[run]
    light, dark = (screenshots.facts(page, width=width, dark=dark) for dark in (False, True))
    for shown in (light, dark):
        assert shown["wide"] == width
        assert shown["broken"] == 0
        words = " ".join(shown["text"].split())
        assert [figure for figure in figures if figure not in words] == []
    assert (light["paper"], dark["paper"]) == ("rgb(255, 255, 255)", "rgb(22, 24, 28)")
