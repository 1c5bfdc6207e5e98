"""The program of a trial: where its parameters come from, and where its results go."""

from __future__ import annotations

import json
from pathlib import Path

import nni
import pytest

from nni_topo.runs import trial

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
    monkeypatch.setattr(nni, "get_sequence_id", lambda: 2)
    monkeypatch.setattr(nni, "report_final_result", found["final"].append)
    monkeypatch.setattr(nni, "report_intermediate_result", found["results"].append)
    monkeypatch.setattr(nni.trial, "overwrite_intermediate_seq", found["steps"].append)
    return found


def test_under_nni_the_tuner_gives_parameters_and_gets_results(seen, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NNI_OUTPUT_DIR", str(tmp_path / "experiment" / "trials" / "t1"))
    growing = ["--retrain-images", "10", "--double-images-after", "1"]
    assert trial.main(["--pruner", "l2", *growing]) == 0
    ((settings, out, cache),) = seen["runs"]
    assert (settings.pruner, settings.ratio, settings.retrain_images) == ("l2", 0.75, 40)
    assert (out, cache) == (tmp_path / "experiment" / "trials" / "t1", tmp_path / "experiment" / "nets")
    assert (seen["steps"], seen["results"]) == ([3], [{"default": 0.75}])
    assert seen["final"] == [{"default": 0.25, "accuracy": 0.5, "flops_share": 0.125}]
    assert capsys.readouterr().out == ""
    assert trial.main(["--out", str(tmp_path / "own"), "--cache", str(tmp_path / "shared")]) == 0
    assert seen["runs"][1][1:] == (tmp_path / "own", tmp_path / "shared")


def test_alone_a_file_gives_parameters_and_the_results_are_printed(seen, tmp_path, capsys):
    (tmp_path / "p.json").write_text('{"ratio": 0.125}')
    words = ["--params", str(tmp_path / "p.json"), "--out", str(tmp_path / "out")]
    assert trial.main([*words, "--retrain-images", "10", "--double-images-after", "1"]) == 0
    ((settings, out, cache),) = seen["runs"]
    assert (settings.ratio, settings.retrain_images) == (0.125, 10)
    assert (out, cache) == (tmp_path / "out", None)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [{"step": 3, "default": 0.75}, {"default": 0.25, "accuracy": 0.5, "flops_share": 0.125}]
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
