"""A trial: its settings, where its parameters come from, what it leaves in its folder, and where its results go."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import nni
import pytest
import torch

import nni_topo
from nni_topo import zoo
from nni_topo.errors import ConfigError, DataError
from nni_topo.runs import trial
from nni_topo.runs.choices import (
    CompensationChoice,
    DataChoice,
    DistillationChoice,
    ModelChoice,
    PrunerChoice,
    Target,
)
from nni_topo.runs.run import load_model_data
from nni_topo.runs.trial import TrialSettings, read_parameters, reported, run_trial, with_parameters

METRICS = {"score": 0.25, "accuracy": 0.5, "flops_share": 0.125, "test_accuracy": 1.0}


@pytest.fixture
def seen(monkeypatch):
    """Runs of trials, none of which prunes anything, and what NNI is told."""
    found = {"runs": [], "final": [], "steps": [], "results": []}

    def run(settings, out, *, cache, report):
        report(3, {"default": 0.75})
        found["runs"].append((settings, out, cache))
        return METRICS

    monkeypatch.setattr(trial, "run_trial", run)
    monkeypatch.setattr(nni, "get_next_parameter", lambda: {"ratio": 0.75})
    monkeypatch.setattr(nni, "get_trial_id", lambda: "t1")
    monkeypatch.setattr(nni, "report_final_result", found["final"].append)
    monkeypatch.setattr(nni, "report_intermediate_result", found["results"].append)
    monkeypatch.setattr(nni.trial, "overwrite_intermediate_seq", found["steps"].append)
    return found


def test_under_nni_the_tuner_gives_parameters_and_gets_results(seen, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NNI_OUTPUT_DIR", str(tmp_path / "experiment" / "trials" / "t1"))
    assert trial.main(["--pruner", "l2"]) == 0
    ((settings, out, cache),) = seen["runs"]
    assert (settings.pruner, settings.ratio) == ("l2", 0.75)
    assert (out, cache) == (tmp_path / "experiment" / "trials" / "t1", tmp_path / "experiment" / "nets")
    assert (seen["steps"], seen["results"]) == ([3], [{"default": 0.75}])
    assert seen["final"] == [{"default": 0.25, "accuracy": 0.5, "flops_share": 0.125}]
    assert capsys.readouterr().out == ""
    assert trial.main(["--out", str(tmp_path / "own"), "--cache", str(tmp_path / "shared")]) == 0
    assert seen["runs"][1][1:] == (tmp_path / "own", tmp_path / "shared")


def test_alone_a_file_gives_parameters_and_the_results_are_printed(seen, tmp_path, capsys):
    (tmp_path / "p.json").write_text('{"ratio": 0.125}')
    words = ["--params", str(tmp_path / "p.json"), "--out", str(tmp_path / "out")]
    assert trial.main(words) == 0
    ((settings, out, cache),) = seen["runs"]
    assert settings.ratio == 0.125
    assert (out, cache) == (tmp_path / "out", None)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    sentence = "0.12 of the MACs, an accuracy of 100 % on the test images"
    results = {"sentence": sentence, "default": 0.25, "accuracy": 0.5, "flops_share": 0.125}
    assert lines == [{"step": 3, "default": 0.75}, results]
    assert (seen["final"], seen["steps"], seen["results"]) == ([], [], [])


@pytest.mark.parametrize("words", [["--params", "p.json"], []])
def test_a_trial_has_a_folder(words, seen, monkeypatch, capsys):
    monkeypatch.delenv("NNI_OUTPUT_DIR", raising=False)
    if words:  # a file of parameters is for trials outside of NNI, whatever the environment says
        monkeypatch.setenv("NNI_OUTPUT_DIR", "elsewhere")
    assert trial.main(words) == 2
    assert "must have --params FILE and --out FOLDER, got no folder" in capsys.readouterr().err
    assert seen["runs"] == []
    assert not Path("elsewhere").exists()


def test_without_nni_and_without_a_file_there_are_no_parameters(tmp_path, capsys):
    assert trial.main(["--out", str(tmp_path / "out")]) == 2
    assert "parameters must come from NNI or from --params FILE, got neither" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_parameters_replace_settings_and_fill_ratios_and_knobs():
    found = with_parameters(
        TrialSettings(pruner="topological", seed=3),
        {
            "ratio.conv1": 0.25,
            "ratio.*": 0.75,
            "knob.n_jobs": 7,
            "knob.solver.population_size": 3,
            "retrain_epochs": 2.0,
            "flops": 0.5,
        },
    )
    assert (found.retrain_epochs, found.flops, found.seed) == (2, 0.5, 3)
    assert type(found.retrain_epochs) is int
    assert [found.layer_ratio(name) for name in ("conv1", "conv2")] == [0.25, 0.75]
    assert (found.cell().pruner.knobs, found.cell().seed) == ({"n_jobs": 7, "solver": {"population_size": 3}}, 3)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"prunner": "l1"}, "did you mean pruner"),
        ({"pruner": "l3"}, "did you mean l"),
        ({"TRIAL_BUDGET": 3}, "must be a known name, got 'TRIAL_BUDGET'"),
        ({"knob.generations": 3}, "knob of pruner 'l1'"),
        ({"ratio": 1.0}, r"a ratio must be in \[0, 1\), got 1.0 \(ratio\)"),
        ({"ratio.conv1": "half"}, r"a ratio must be .*, got 'half' \(ratio.conv1\)"),
        ({"seed": 1.5}, r"seed must be an integer .* got 1.5 \(trial\)"),
        ({"model": True}, "model must be a str, got True"),
        ({"lr": float("nan")}, "lr must be a finite number or None, got nan"),
        ({"flops_weight": -0.5}, "flops_weight must be at least 0 and finite, got -0.5"),
        ({"flops": 2.0}, r"must be in \(0, 1\], got 2.0"),
    ],
)
def test_bad_parameters_are_refused(parameters, message):
    with pytest.raises(ConfigError, match=message):
        with_parameters(TrialSettings(), parameters)


@pytest.mark.parametrize(
    ("text", "message"), [("[1]", "must be a JSON object, got list"), ("{", "a whole file of JSON")]
)
def test_files_of_parameters_must_be_json_objects(text, message, tmp_path):
    path = tmp_path / "params.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_parameters(path)
    with pytest.raises(DataError, match="must be a file that exists, got none"):
        read_parameters(tmp_path / "missing.json")


def test_a_cell_has_what_the_settings_say():
    given = {"width": 0.5, "limit": 50, "train_epochs": 3, "pruner": "l2", "flops": 0.25, "calibration": 8}
    cell = TrialSettings(**given, compensate=16, distill=32, retrain_epochs=4, lr=0.5).cell()
    assert (cell.model, cell.data) == (ModelChoice("small_cnn", 0.5), DataChoice("digits", limit=50))
    assert (cell.pruner, cell.target) == (PrunerChoice("l2"), Target("flops", 0.25))  # it takes no calibration data
    assert TrialSettings(pruner="subcluster", calibration=8).cell().pruner.calibration == 8
    assert (cell.train.epochs, cell.retrain.epochs, cell.retrain.lr) == (3, 4, 0.5)
    assert TrialSettings().cell().retrain.lr == pytest.approx(0.01)
    assert (cell.compensate, cell.distill) == (CompensationChoice(16), DistillationChoice(32))
    settings = TrialSettings(ratio=0.125, ratios={"conv*": 0.25, "conv1": 0.75, "*1": 0.5})
    assert [settings.layer_ratio(name) for name in ("conv1", "conv2", "fc1", "fc2")] == [0.75, 0.25, 0.5, 0.125]


def test_parameters_come_on_top_of_those_that_are_there():
    settings = TrialSettings(
        pruner="topological", ratios={"conv1": 0.25, "fc": 0.5}, knobs={"solver": {"population_size": 3}, "n_jobs": 2}
    )
    found = with_parameters(settings, {"ratio.fc": 0.75, "knob.solver.generations": 5, "knob.criterion": "bottleneck"})
    assert found.ratios == {"conv1": 0.25, "fc": 0.75}
    assert found.knobs == {"solver": {"population_size": 3, "generations": 5}, "n_jobs": 2, "criterion": "bottleneck"}
    assert settings.ratios == {"conv1": 0.25, "fc": 0.5}
    assert with_parameters(TrialSettings(flops=0.5, limit=5), {"flops": None}).flops is None
    assert type(with_parameters(TrialSettings(), {"flops_weight": 1}).flops_weight) is float


FILES = {"settings.json", "masks.pt", "dense.safetensors", "config_list.json", "metrics.json"}
SMALL_WORDS = ["--limit", "300", "--train-epochs", "4"]


def files(folder):
    return {path.name for path in folder.iterdir()} - {".lock"}


def whole_net():
    return zoo.create_model("small_cnn", num_classes=10, in_channels=1, image_size=8)


def test_a_trial_leaves_a_net_that_does_what_its_metrics_say(settings, nets, tmp_path):
    told = []
    metrics = run_trial(
        settings, tmp_path / "trial", cache=nets, report=lambda step, result: told.append((step, result))
    )
    assert files(tmp_path / "trial") == FILES
    assert json.loads((tmp_path / "trial" / "metrics.json").read_text()) == metrics
    dense = nni_topo.load(tmp_path / "trial" / "dense.safetensors", whole_net)
    data = load_model_data(ModelChoice("small_cnn"), DataChoice("digits", limit=300))
    assert zoo.evaluate(dense, data.test) == metrics["test_accuracy"]
    assert zoo.evaluate(dense, data.validation) == metrics["accuracy"] == metrics["score"]
    assert [step for step, _ in told] == [0, 1]
    assert told[0][1]["accuracy"] == metrics["accuracy_pruned"]
    assert told[1][1] == {"default": metrics["score"], "accuracy": metrics["accuracy"]}
    assert metrics["flops"] < 0.4 * metrics["flops_before"]


def test_the_config_list_leads_nnis_own_pruner_to_the_same_widths(settings, nets, tmp_path):
    metrics = run_trial(dataclasses.replace(settings, flops=0.3), tmp_path / "trial", cache=nets)
    assert metrics["flops_share"] == pytest.approx(0.3, abs=0.01)
    assert metrics["budget"] == {
        "kind": "flops",
        "asked": 0.3,
        "left": pytest.approx(metrics["flops_share"]),
        "is_met": True,
        "why": "",
    }
    net, images = whole_net(), torch.randn(2, 1, 8, 8)
    config_list = json.loads((tmp_path / "trial" / "config_list.json").read_text())
    pruner = nni_topo.create_pruner("l1", net, config_list)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    dense = nni_topo.to_dense(net, images, masks)
    widths = {
        n: m.weight.shape[0] for n, m in dense.named_modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))
    }
    assert widths == metrics["widths"]


def test_ratios_are_proportions_under_a_budget(settings, nets, tmp_path):
    ratios = {"features.conv1": 0.0, "features.*": 0.6, "classifier.fc1": 0.9}
    tried = dataclasses.replace(settings, flops=0.2, ratios=ratios, retrain_epochs=0)
    metrics = run_trial(tried, tmp_path / "trial", cache=nets)
    assert metrics["flops_share"] == pytest.approx(0.2, abs=0.01)
    widths = metrics["widths"]
    assert widths["features.conv1"] / 16 > widths["features.conv3"] / 64 > widths["classifier.fc1"] / 64
    wrong = dataclasses.replace(settings, ratios={"features.conv9": 0.5})
    with pytest.raises(ConfigError, match="did you mean features"):
        run_trial(wrong, tmp_path / "wrong", cache=nets)


def test_the_score_is_accuracy_less_what_size_and_time_cost(settings, nets, tmp_path):
    weighed = dataclasses.replace(settings, flops_weight=0.2, latency_weight=0.1, retrain_epochs=0, compensate=128)
    metrics = run_trial(weighed, tmp_path / "trial", cache=nets)
    price = 0.2 * metrics["flops_share"] + 0.1 * metrics["latency_share"]
    assert metrics["score"] == pytest.approx(metrics["accuracy"] - price)
    assert metrics["latency_share"] == pytest.approx(metrics["latency_ms"] / metrics["latency_before_ms"])
    assert set(reported(metrics)) == {"default", "accuracy", "flops_share", "latency_share"}


def test_a_finished_trial_isnt_run_again_and_another_one_is_refused(settings, nets, tmp_path):
    first = run_trial(settings, tmp_path / "trial", cache=nets)
    began = time.perf_counter()
    assert run_trial(settings, tmp_path / "trial", cache=tmp_path / "none") == first
    assert time.perf_counter() - began < 1.0
    with pytest.raises(ConfigError, match="must hold one trial, got another one, with other ratio, seed"):
        run_trial(dataclasses.replace(settings, ratio=0.6, seed=1), tmp_path / "trial", cache=nets)


def test_pruners_of_single_weights_are_refused(settings, tmp_path):
    with pytest.raises(ConfigError, match="must remove whole channels, got 'level'"):
        run_trial(dataclasses.replace(settings, pruner="level"), tmp_path / "trial")


def test_a_folder_that_cant_be_made_is_a_clear_error(settings, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="must be a folder that can be written to"):
        run_trial(settings, tmp_path / "file" / "trial")


@pytest.mark.parametrize(("images", "seen"), [(None, 300), (50, 50), (900, 300)])
def test_retraining_takes_no_more_images_than_training_did(images, seen, settings, nets, tmp_path, monkeypatch):
    counts = []
    monkeypatch.setattr(trial, "retrain", lambda net, data, recipe, **knobs: counts.append(len(data.train)))
    run_trial(dataclasses.replace(settings, retrain_images=images), tmp_path, cache=nets)
    assert counts == [seen]
