from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from nni_topo.cli import main
from nni_topo.errors import ConfigError
from nni_topo.runs.choices import load_prune_config
from nni_topo.studies.analysis.magnitude.storage import stored_bytes, with_sparse_linears
from nni_topo.studies.analysis.magnitude.study import AnalyzeMagnitude

SMALL = ["--model", "lenet300", "--limit", "200", "--images", "100"]


def test_zeros_take_no_room_where_they_are_left_out():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 100), nn.ReLU(), nn.Linear(100, 10))
    before = stored_bytes(model)
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight *= torch.rand_like(layer.weight) < 0.1
    after = stored_bytes(model)
    assert after["dense"] == before["dense"]
    assert after["gzip"] < 0.4 * before["gzip"]
    assert before["coo"] > before["csr"] > before["csr32"] > before["dense"]
    assert after["coo"] > after["csr"] > after["csr32"]
    assert after["csr32"] < 0.3 * before["dense"]
    inputs = torch.randn(7, 200)
    torch.testing.assert_close(with_sparse_linears(model)(inputs), model(inputs))


@pytest.mark.slow
def test_the_study_writes_rows_a_picture_and_goes_on(tmp_path, capsys, drawn):
    words = ["analyze", "magnitude", *SMALL, "--rounds", "2", "--epochs", "2", "--json", "--out", str(tmp_path)]
    assert main([*words, "--ratios", "0.5"]) == 0
    first = json.loads(capsys.readouterr().out)
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert len(lines) == 9
    (tmp_path / "rows.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    assert main([*words, "--ratios", "0.5", "0.8"]) == 0
    output = capsys.readouterr()
    document = json.loads(output.out)
    assert output.err.count("0.5:") == 1
    kinds = {(row["pruner"], row["part"], row["way"]) for row in document["rows"]}
    assert len(kinds) == 9
    assert len(document["rows"]) == 18
    kept = [row for row in document["rows"] if row["ratio"] == 0.5]
    assert [row["accuracy"] for row in kept] == [row["accuracy"] for row in first["rows"]]
    level, matrix = (
        next(row for row in document["rows"] if row["pruner"] == name and row["ratio"] == 0.8 and "params" in row)
        for name in ("level", "matrix")
    )
    assert matrix["params"] < level["params"] < 0.25 * document["baseline"]["params"]
    assert matrix["bytes"]["dense"] < 0.5 * level["bytes"]["dense"]
    assert set(level["latency_ms"]) == {"unpruned", "zeros", "csr"}
    assert set(matrix["latency_ms"]) == {"unpruned", "zeros", "dense"}
    check_picture(drawn, document)


def check_picture(drawn, document):
    """The five panels: accuracy, layers alone, parameters, bytes and time, against the ratio."""
    rows = sorted(document["rows"], key=lambda row: row["ratio"])
    accuracy = {}
    for row in rows:
        way = row["way"].replace("retrained", "fine-tuned")  # records keep the older word
        label = f"{row['pruner']}, {row['part']}, {way}"
        accuracy.setdefault(label, []).append((row["ratio"], row["accuracy"]))
    assert drawn.lines("magnitude.png", 0) == accuracy
    alone = {
        "+".join(curve["layers"]): [(float(ratio), value) for ratio, value in curve["accuracy"].items()]
        for curve in document["sensitivity"]["curves"]
    }
    assert drawn.lines("magnitude.png", 1) == alone
    params, disk, time = {}, {}, {}
    for row in (row for row in rows if row["part"] == "all" and row["way"] == "direct"):
        params.setdefault(row["pruner"], []).append((row["ratio"], row["params"]))
        for name, size in row["bytes"].items():
            disk.setdefault(f"{row['pruner']}, {name}", []).append((row["ratio"], size))
        for name in set(row["latency_ms"]) - {"unpruned"}:
            share = row["latency_ms"][name] / row["latency_ms"]["unpruned"]
            time.setdefault(f"{row['pruner']}, {name}", []).append((row["ratio"], share))
    assert [drawn.lines("magnitude.png", panel) for panel in (2, 3, 4)] == [params, disk, time]
    levels = [axis.get_lines()[-1].get_ydata()[0] for axis in drawn["magnitude.png"].axes]
    baseline = document["baseline"]
    assert levels == [baseline["accuracy"], baseline["accuracy"], baseline["params"], baseline["bytes"]["dense"], 1.0]


def test_sensitivity_suggests_what_prune_takes(tmp_path, capsys):
    words = ["--model", "lenet300", "--limit", "300"]
    out = tmp_path / "study"
    assert (
        main(["analyze", "sensitivity", *words, "--ratios", "0.3", "0.6", "--budget", "0.05", "--out", str(out)]) == 0
    )
    output = capsys.readouterr().out
    assert "fc1 at 0.3:" in output
    assert "fc3 at" not in output
    config = load_prune_config(out / "suggested.yaml")
    assert config.pruner == "l1"
    assert main(["prune", *words, "--config", str(out / "suggested.yaml"), "--out", str(tmp_path / "dense")]) == 0
    summary = json.loads((tmp_path / "dense" / "summary.json").read_text())
    assert summary["params"] < summary["params_before"]


@pytest.mark.parametrize(("pruner", "kept"), [("taylor", "training_steps: 4"), ("cluster", "calibration: 100")])
def test_sensitivity_gives_pruners_the_data_they_need(pruner, kept, tmp_path):
    words = ["--model", "lenet300", "--limit", "100"]
    study = ["analyze", "sensitivity", *words, "--pruner", pruner, "--ratios", "0.5", "--budget", "1.0"]
    assert main([*study, "--out", str(tmp_path)]) == 0
    assert kept in (tmp_path / "suggested.yaml").read_text()
    assert main(["prune", *words, "--config", str(tmp_path / "suggested.yaml"), "--out", str(tmp_path / "dense")]) == 0
    summary = json.loads((tmp_path / "dense" / "summary.json").read_text())
    assert summary["params"] < 0.6 * summary["params_before"]


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"ratios": ()}, "ratios must be one or more numbers"),
        ({"ratios": (1.0,)}, "ratios must be one or more numbers"),
        ({"rounds": 0}, "rounds must be in \\[1, epochs\\], got 0 of 3 epochs"),
        ({"rounds": 4}, "got 4 of 3 epochs"),
    ],
)
def test_bad_requests_are_refused(knobs, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        AnalyzeMagnitude(model="lenet300", out=tmp_path, **knobs).find(print)
