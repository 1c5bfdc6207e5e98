from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from nni_topo.cli import main
from nni_topo.errors import ConfigError
from nni_topo.studies.analysis.magnitude import AnalyzeMagnitude, MagnitudeStudy, stored_bytes, with_sparse_linears
from nni_topo.studies.tables import as_markdown

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
def test_the_study_writes_rows_and_a_picture(tmp_path, capsys, drawn):
    words = ["analyze", "magnitude", *SMALL, "--rounds", "2", "--epochs", "2", "--json", "--out", str(tmp_path)]
    words += ["--batch", "64", "--seconds", "0.2", "--seeds", "2"]
    # without fine-tuning the direct rows alone
    assert main([*words, "--ratios", "0.5", "--epochs", "0"]) == 0
    assert capsys.readouterr().err.count("direct, 0.5, seed") == 6
    assert main([*words, "--ratios", "0.8", "0.5"]) == 0
    document = json.loads(capsys.readouterr().out)
    kinds = {(row["pruner"], row["part"], row["way"], row["seed"]) for row in document["rows"]}
    assert len(kinds) == 18
    assert len(document["rows"]) == 36
    # the seeds train networks of their own
    assert [base["seed"] for base in document["baselines"]] == [0, 1]
    assert document["baselines"][0]["bytes"]["gzip"] != document["baselines"][1]["bytes"]["gzip"]
    for seed, baseline in enumerate(document["baselines"]):
        level, matrix = (
            next(
                row
                for row in document["rows"]
                if (row["pruner"], row["ratio"], row["seed"]) == (name, 0.8, seed) and "params" in row
            )
            for name in ("level", "matrix")
        )
        assert matrix["params"] < level["params"] < 0.25 * baseline["params"]
        assert matrix["bytes"]["dense"] < 0.5 * level["bytes"]["dense"]
        assert set(level["time_shares"]) == {"unpruned", "zeros", "csr"}
        assert set(matrix["time_shares"]) == {"unpruned", "zeros", "dense"}
    check_picture(drawn, document)


def check_picture(drawn, document):
    """The panels: accuracy, layers alone, parameters, bytes and time, means over the seeds against the ratio."""
    accuracy, time = {}, {}
    for row in sorted(document["rows"], key=lambda row: row["ratio"]):
        way = row["way"].replace("retrained", "fine-tuned")  # records keep the older word
        label = f"{row['pruner']}, {row['part']}, {way}"
        accuracy.setdefault(label, {}).setdefault(row["ratio"], []).append(row["accuracy"])
        for name, share in row.get("time_shares", {}).items():
            time.setdefault(f"{row['pruner']}, {name}", {}).setdefault(row["ratio"], []).append(share["median"])
    for panel, found in ((0, accuracy), (4, time)):
        assert drawn.lines("magnitude.png", panel) == {
            label: [(ratio, pytest.approx(sum(values) / len(values))) for ratio, values in points.items()]
            for label, points in found.items()
        }
    levels = [axis.get_lines()[-1].get_ydata()[0] for axis in drawn["magnitude.png"].axes]
    baselines = document["baselines"]
    expected = [sum(base[key] for base in baselines) / len(baselines) for key in ("accuracy", "accuracy", "params")]
    dense = sum(base["bytes"]["dense"] for base in baselines) / len(baselines)
    assert levels == pytest.approx([*expected, dense, 1.0])


def record(ratio, seed, accuracy, **costs):
    return {
        "pruner": "level",
        "part": "all",
        "way": "direct",
        "ratio": ratio,
        "seed": seed,
        "accuracy": accuracy,
    } | costs


def test_tables_have_means_with_the_lowest_and_the_highest_of_the_seeds():
    sizes = dict.fromkeys(("dense", "gzip", "coo", "csr", "csr32"), 2000)
    rows, baselines, sensitivities = [], [], []
    for seed, accuracy in enumerate((0.5, 0.6, 0.9)):
        shares = {"unpruned": {"median": 1.0 + 0.01 * (seed - 1), "half": 0.01}}
        shares["zeros"] = {"median": 0.5 + 0.1 * seed, "half": 0.04}
        sized = sizes | {"gzip": 1000 * (seed + 1)}
        rows.append(record(0.5, seed, accuracy, params=500, bytes=sized, time_shares=shares))
        baselines.append(
            {"seed": seed, "accuracy": 0.8, "params": 1000, "bytes": sizes, "latency_ms": 2.0, "batch": 256}
        )
        curves = [{"layers": ["a", "b"], "accuracy": {"0.5": accuracy - 0.1}}]
        sensitivities.append({"seed": seed, "curves": curves})
    study = MagnitudeStudy(rows, baselines, sensitivities)
    text = as_markdown(AnalyzeMagnitude(model="lenet300", out=None).show(study))
    assert "Unpruned: 80.0 %, 2.0 ms for 256 images. Seeds: 3." in text
    assert "| level | all | direct | 66.7 [50.0, 90.0] |" in text
    assert "| a+b | 56.7 [40.0, 80.0] |" in text
    assert "| level | parameters (k) | 1.0 | 0.5 |" in text
    assert "| level | gzip (kB) | 2.0 | 2.0 [1.0, 3.0] |" in text
    assert "| level | zeros: time / unpruned network's time | 1 | 0.60 [0.50, 0.70] |" in text
    assert "takes 1.000 [0.990, 1.010] of its time" in text
    assert "on average 2.5 % of it to either side, at most 4.0 %" in text


@pytest.mark.parametrize(
    ("pruner", "kept"),
    [("taylor", "training_steps: 4"), pytest.param("cluster", "calibration: 100", marks=pytest.mark.slow)],
)
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
        ({"ratios": (1.0,)}, "ratios must be a tuple of at least 1"),
        ({"rounds": 4}, r"rounds must be in \[1, epochs\], got 4 of 3 epochs"),
        ({"seconds": 0.0}, r"seconds must be above 0 and finite, got 0.0 \(magnitude\)"),
    ],
)
def test_bad_requests_are_refused(knobs, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        AnalyzeMagnitude(model="lenet300", out=tmp_path, **knobs).check()
