from __future__ import annotations

import json

import pytest

from nni_topo import zoo
from nni_topo.cli import main
from nni_topo.runs.choices import DataChoice, ModelChoice
from nni_topo.runs.run import build_model, load_model_data
from nni_topo.studies.analysis.retraining import epochs_to_recover

DATA = DataChoice("digits", limit=400)
RECIPE = zoo.Recipe(epochs=3, batch_size=32, lr=0.05)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A lenet300 trained for a moment on a few digits."""
    data = load_model_data(ModelChoice("lenet300"), DATA)
    model = build_model(ModelChoice("lenet300"), data, 0)
    zoo.train(model, data, RECIPE, seed=0)
    path = tmp_path_factory.mktemp("study") / "lenet300.pt"
    zoo.save_checkpoint(path, model, {})
    return path


def command(study, checkpoint, out, *more):
    words = ["analyze", study, "--model", "lenet300", "--data", "digits", "--limit", "400"]
    return main([*words, "--checkpoint", str(checkpoint), "--out", str(out), *more])


@pytest.mark.slow
def test_deviation_command(checkpoint, tmp_path, capsys, drawn):
    pruners = "connections,level,cluster,subcluster"
    arguments = ("--pruners", pruners, "--ratios", "0", "0.5", "--images", "8", "--calibration", "100", "--json")
    assert command("deviation", checkpoint, tmp_path, *arguments) == 0
    study = json.loads(capsys.readouterr().out)
    points = {(point["pruner"], point["ratio"]): point for point in study["points"]}
    assert len(points) == 8
    assert study["images"] == 8
    for name in ("connections", "level", "cluster"):
        assert points[name, 0.0]["error"] == points[name, 0.0]["bound"] == points[name, 0.0]["dev"] == 0.0
        assert points[name, 0.0]["accuracy"] == study["accuracy"]
    for name in pruners.split(","):
        point = points[name, 0.5]
        assert 0.0 < point["error"] <= point["lipschitz"]
        assert point["dev"] == pytest.approx(point["error"] - point["bound"])
        assert point["relative"] == pytest.approx(point["error"] / point["bound"] - 1.0)
    assert points["connections", 0.5]["pruned"] == pytest.approx(0.5, abs=1e-3)
    assert points["level", 0.5]["error"] < points["connections", 0.5]["error"]
    assert {path.name for path in tmp_path.iterdir()} == {
        "deviation.json",
        "deviation.png",
        "accuracy.png",
        "report.html",
    }
    panels = [("deviation.png", 0, "dev"), ("deviation.png", 1, "relative"), ("deviation.png", 2, "error")]
    for picture, panel, column in [*panels, ("accuracy.png", 0, "accuracy")]:
        for name, curve in drawn.lines(picture, panel).items():
            wanted = [(100 * points[name, r]["pruned"], points[name, r][column]) for r in (0.0, 0.5)]
            factor = 100 if column == "accuracy" else 1
            assert curve == [pytest.approx((x, factor * y), nan_ok=True) for x, y in sorted(wanted)]
        assert list(drawn.lines(picture, panel)) == pruners.split(",")


@pytest.mark.slow
def test_retraining_command(checkpoint, tmp_path, capsys, drawn):
    arguments = ("--ratios", "0.3", "0.8", "--epochs", "2", "--images", "200", "--tolerance", "0.05", "--gamma", "0.5")
    assert command("retraining", checkpoint, tmp_path, *arguments, "--json") == 0
    study = json.loads(capsys.readouterr().out)
    assert study["gamma"] == 0.5
    kinds = {(point["pruner"], point["kind"]) for point in study["points"]}
    assert kinds == {("connections", "connection"), ("random", "node")}
    for point in study["points"]:
        assert point["bound"] > 0
        assert point["derived"] > 0
        back = point["epochs"] is not None
        assert back == (point["accuracy_retrained"] >= study["accuracy"] - 0.05)
    assert {path.name for path in tmp_path.iterdir()} == {"retraining.json", "retraining.png", "report.html"}
    for panel, name in enumerate(dict.fromkeys(point["pruner"] for point in study["points"])):
        rows = sorted((point for point in study["points"] if point["pruner"] == name), key=lambda row: row["ratio"])
        curves = drawn.lines("retraining.png", panel)
        assert curves["epochs taken"] == [(row["ratio"], 2 if row["epochs"] is None else row["epochs"]) for row in rows]
        assert curves["bound (3.1)"] == [(row["ratio"], pytest.approx(row["bound"])) for row in rows]
        assert curves["bound as derived"] == [(row["ratio"], pytest.approx(row["derived"])) for row in rows]


def test_epochs_end_when_the_accuracy_is_back():
    data = load_model_data(ModelChoice("lenet300"), DATA)
    model = build_model(ModelChoice("lenet300"), data, 0)
    start = zoo.evaluate(model, data.test)
    assert epochs_to_recover(model, data, RECIPE, start, seed=0) == (0, start)
    taken, accuracy = epochs_to_recover(model, data, RECIPE, start + 0.05, seed=0)
    assert taken in (1, 2, 3)
    assert accuracy >= start + 0.05
    assert epochs_to_recover(model, data, RECIPE, 1.0, seed=0)[0] is None


@pytest.mark.parametrize(
    ("study", "words", "message"),
    [
        ("deviation", ("--pruners", "l3"), "did you mean"),
        ("deviation", ("--ratios", "1.0"), "must be in [0, 1), got 1.0"),
        ("deviation", ("--images", "0"), "images must be an integer of at least 1, got 0"),
        ("retraining", ("--calibration", "0"), "calibration must be an integer of at least 1, got 0"),
        ("retraining", ("--gamma", "-1"), "gamma must be above 0 and finite, got -1.0"),
        ("retraining", ("--tolerance", "7"), "tolerance must be in [0, 1], got 7.0"),
    ],
)
def test_bad_requests_are_refused(study, words, message, checkpoint, tmp_path, capsys):
    assert command(study, checkpoint, tmp_path, *words) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_connectivity_command(checkpoint, tmp_path, capsys):
    arguments = ("--pruners", "connections,level", "--ratios", "0", "0.99", "--seeds", "2", "--json")
    assert command("connectivity", checkpoint, tmp_path, *arguments) == 0
    study = json.loads(capsys.readouterr().out)
    points = {(point["pruner"], point["ratio"], point["seed"]): point for point in study["points"]}
    # magnitudes are the same for every seed
    runs = {("connections", 0), ("connections", 1), ("level", 0)}
    assert points.keys() == {(name, ratio, seed) for name, seed in runs for ratio in (0.0, 0.99)}
    whole = points["level", 0.0, 0]
    assert whole["kept"] == whole["outputs"] == whole["channels"] == 1.0
    assert whole["accuracy"] == study["accuracy"]
    for seed in (0, 1):
        point = points["connections", 0.99, seed]
        assert point["kept"] == pytest.approx(0.01, abs=1e-3)
        assert point["channels"] < 1.0
        assert point["channels_reached"] <= 1.0
    assert command("connectivity", checkpoint, tmp_path, "--pruners", "level", "--ratios", "0.5") == 0
    assert "channels connected %" in capsys.readouterr().out


@pytest.mark.slow
def test_evolution_command(checkpoint, tmp_path, capsys):
    arguments = ("--damage-rates", "0.1", "0.5", "--population-size", "4", "--generations", "2")
    assert command("evolution", checkpoint, tmp_path, *arguments, "--layers", "fc1", "--json") == 0
    output = capsys.readouterr()
    assert output.err.count("% of fc1 removed") == 2
    study = json.loads(output.out)
    assert list(study) == ["damage 10 %", "damage 50 %"]
    for trial in study.values():
        history = trial["history"]
        assert set(history["generation"]) == {0, 1, 2}
        assert len(history["fitness"]) == 12
        fittest = max(range(12), key=lambda index, values=history["fitness"]: (values[index], index))
        assert trial["kept"] == pytest.approx(1 - history["compression"][fittest])
    assert {"evolution.json", "fitness.png", "solutions.png"} < {path.name for path in tmp_path.iterdir()}
    assert command("evolution", checkpoint, tmp_path, "--generations", "1", "--population-size", "2") == 0
    assert "of fc2 removed" in capsys.readouterr().out  # the layer with the most weights
