from __future__ import annotations

import json
import re

import PIL.Image
import pytest
import torch

import nni_topo
from nni_topo import zoo
from nni_topo.cli import main

QUICK = ["--limit", "300", "--train-epochs", "1", "--retrain-epochs", "1"]


def test_list_as_json(capsys):
    assert main(["list", "--json", "*logical"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert list(document["pruners"]) == ["topological"]
    assert "criterion" in document["pruners"]["topological"]["knobs"]
    assert "refine" in document["recoveries"]["reconstruct"]["knobs"]
    assert "lenet5_like" in document["models"]
    assert "digits" in document["data"]


def test_compare_writes_records_and_a_picture(tmp_path, capsys, drawn):
    words = ["compare", "--model", "small_cnn", "--pruners", "l1,random", "--ratio", "0.5", *QUICK]
    assert main([*words, "--out", str(tmp_path / "run"), "--json"]) == 0
    output = capsys.readouterr()
    records = json.loads(output.out)
    assert [record["pruner"] for record in records] == ["l1", "random"]
    assert "[2/2]" in output.err
    shown = [float(bars[0].get_ydata()[0]) for axis in drawn["accuracy.png"].axes for bars in axis.containers]
    wanted = [record[f"accuracy_{when}"] for when in ("oneshot", "retrained") for record in records]
    assert shown == pytest.approx([100 * accuracy for accuracy in wanted])
    assert len((tmp_path / "run" / "results.jsonl").read_text().splitlines()) == 2
    assert main(["report", str(tmp_path / "run"), "--markdown"]) == 0
    assert "| l1 |" in capsys.readouterr().out
    assert main(["report", str(tmp_path)]) == 2


def run(command):
    return main(command.split())


@pytest.fixture
def net(tmp_path):
    """The flags of a network for digits and its weights."""
    net = zoo.create_model("small_cnn", num_classes=10, in_channels=1, image_size=8, seed=0)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    return f"--model small_cnn --checkpoint {tmp_path}/net.pt"


def test_prune_takes_the_seed_and_shows_costs_before_and_after(tmp_path, net, capsys):
    config = tmp_path / "prune.yaml"
    config.write_text("pruner: random\nconfig_list: [{op_types: [Conv2d], sparse_ratio: 0.5}]\nretrain: {epochs: 1}\n")
    line = f"prune {net} --limit 64 --config {config} --seed 3 --out {tmp_path}"
    assert run(f"{line}/json --json") == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["seed"], record["pruner"], record["model"]) == (3, "random", "small_cnn")
    assert record == json.loads((tmp_path / "json" / "summary.json").read_text())
    assert run(f"{line}/shown") == 0
    shown = capsys.readouterr().out
    assert "small_cnn, random" in shown
    place = tmp_path / "shown"
    files = f"dense model: {place / 'dense.safetensors'} (nni_topo.load) · report: {place / 'report.html'}"
    assert shown.endswith(f"{files}\n")


PRUNE = "pruner: {}\nconfig_list:\n  - {{op_types: [Conv2d], sparse_ratio: 0.5}}\n{}\n"


@pytest.mark.parametrize(
    ("verb", "given", "message"),
    [
        ("shrink", ["--pruner", "level"], "pruner must be one that removes whole channels, got 'level'"),
        ("shrink", ["--allocation", "auto", "--pruner", "l1"], "must distribute budgets in several ways"),
        ("shrink", ["--device", "nowhere"], "device must be cpu, cuda or auto"),
        ("prune", PRUNE.format("l1", "knobs: {sed: 1}"), "knob of pruner 'l1' must be a known name, got 'sed'"),
        ("prune", PRUNE.format("l1", "retrain: {epoch: 1}"), "key of a recipe must be a known name, got 'epoch'"),
    ],
)
def test_nothing_is_trained_for_a_request_that_can_not_be_used(verb, given, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("nni_topo.zoo.train", lambda *_, **__: pytest.fail("trained"))
    if isinstance(given, str):
        (tmp_path / "prune.yaml").write_text(given)
        given = ["--config", str(tmp_path / "prune.yaml")]
    words = [verb, "--model", "small_cnn", "--limit", "60", "--out", str(tmp_path / "out"), *given]
    assert main(words) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_shrink_writes_a_network_and_says_what_each_step_did(tmp_path, capsys):
    line = f"shrink --model small_cnn --limit 200 --images 64 --distill-seconds 60 --params 0.3 --out {tmp_path}/small"
    assert run(f"{line} --json") == 0
    shown = json.loads(capsys.readouterr().out)
    stages = shown["stages"]
    assert [stage["network"] for stage in stages] == ["unpruned", "pruned", "reconstructed", "distilled"]
    assert stages[-1]["params"] == pytest.approx(0.3 * stages[0]["params"], rel=0.1)
    assert stages[-1]["accuracy"] > stages[1]["accuracy"]
    model = zoo.create_model("small_cnn", num_classes=10, in_channels=1, image_size=8, seed=1)
    dense = nni_topo.load(tmp_path / "small" / "dense.safetensors", model)
    assert zoo.evaluate(dense, zoo.load_data("digits").test) == stages[-1]["accuracy"]
    page = (tmp_path / "small" / "report.html").read_text()
    assert all(f">{word}<" in page for word in ("reconstructed", "Recovery by layer", "error held out", "parameters"))
    assert shown["sentence"] in page
    assert re.fullmatch(
        r"[\d.]+ of the time, 0\.\d\d of the MACs, 0\.(29|30) of the parameters, .* held-out samples", shown["sentence"]
    )
    assert page.count(">features.conv2<") > 1  # its width, and how it came back
    assert '<img alt="distillation"' in page
    document = json.loads((tmp_path / "small" / "shrink.json").read_text())
    assert document == shown
    assert any(note.startswith("distillation is ") for note in document["notes"])
    assert PIL.Image.open(tmp_path / "small" / "distillation.png").info["dpi"] == pytest.approx((110, 110), abs=0.1)
    assert run(line) == 2
    assert "must be new or empty, got 4 entries" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_shrink_goes_as_far_as_a_tolerance_allows_by_flags_or_a_file(tmp_path, net, capsys):
    line = f"shrink {net} --limit 500 --images 400 --distill-seconds 0.2 --tolerance"
    assert run(f"{line} 0.05 --out {tmp_path}/flags --json") == 0
    document = json.loads((tmp_path / "flags" / "shrink.json").read_text())
    found = document["tolerance"]
    assert (found["tolerance"], found["kind"], found["measure"], found["held_out"]) == (0.05, "flops", "answers", 150)
    assert document["networks tried"] == found["candidates"]
    assert json.loads(capsys.readouterr().out) == document
    assert ">Networks tried<" in (tmp_path / "flags" / "report.html").read_text()
    line += " 0.1 --cost params --allocation error"
    assert run(f"{line} --out {tmp_path}/error") == 0
    document = json.loads((tmp_path / "error" / "shrink.json").read_text())
    assert (document["tolerance"]["tolerance"], document["tolerance"]["kind"]) == (0.1, "params")
    assert document["budget"] == {"params": None, "allocation": "error"}


def test_a_profile_shows_the_figures_of_its_document_in_their_units(capsys):
    line = "profile --model small_cnn --in-channels 1 --image-size 8 --runs 1"
    assert run(f"{line} --json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert run(line) == 0
    shown = capsys.readouterr().out
    for row in rows:  # but for times, those of both runs are the same
        line = next(line for line in shown.splitlines() if row["network"] in line.split())
        figures = [row["peak_bytes"] / 1e6, row["macs"] / 1e6, row["params"] / 1e3]
        assert line.replace("│", " ").split()[-3:] == [f"{each:.1f}" for each in figures]
