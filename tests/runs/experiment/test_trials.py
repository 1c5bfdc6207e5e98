"""Trials as NNI's manager tells of them, and what is said where it doesn't answer."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from recorded_manager import FAILED, RUNNING, SUCCEEDED, recorded_manager

from nni_topo.errors import DataError
from nni_topo.runs.experiment import manager as module
from nni_topo.runs.experiment.trials import (
    ManagerError,
    TrialRecord,
    answering,
    best_trial,
    pair_by_result,
    read_trials,
    stopped,
)


def record(status, score=None, number=0):
    return TrialRecord("abc", number, status, {}, {} if score is None else {"default": score}, "")


@pytest.fixture
def manager(tmp_path):
    with recorded_manager(tmp_path / "trials") as found:
        yield found


def experiment(port):
    return SimpleNamespace(port=port, id="g4", url_prefix=None)


def test_scores_may_be_zero_or_negative():
    trials = [record("SUCCEEDED", -0.5), record("SUCCEEDED", 0.0), record("SUCCEEDED", -0.25)]
    assert not record("SUCCEEDED").is_candidate
    assert (best_trial(trials).score, best_trial(trials, mode="minimize").score) == (0.0, -0.5)
    with pytest.raises(DataError, match=r"got no trials \(best\)"):
        best_trial([])
    with pytest.raises(DataError, match=r"got RUNNING, WAITING \(best\)"):
        best_trial([record("WAITING"), record("RUNNING"), record("WAITING")])


def test_trials_come_by_number_with_their_last_result_and_the_last_words_of_those_that_failed(manager, tmp_path):
    jobs = manager.replies["trial-jobs"]
    # numbers alone are scores too, and of several results the last one counts
    first = manager.job(SUCCEEDED[0])["finalMetricData"]
    first.append({**first[-1], "data": json.dumps("0.75")})
    del manager.job(RUNNING)["logPath"]
    jobs.reverse()
    found = read_trials(experiment(manager.port))
    assert [(trial.id, trial.number) for trial in found] == [
        (SUCCEEDED[0], 0), (SUCCEEDED[1], 1), (FAILED, 2), (RUNNING, 3),
    ]  # fmt: skip
    assert found[0].result == {"default": 0.75}
    assert found[1].result == {"default": 0.25, "accuracy": 0.5}
    assert [trial.error for trial in found] == ["", "", "ValueError: a ratio that this network doesn't survive", ""]
    assert (found[3].folder, found[3].result) == ("", {})
    # a file that is there comes before what the manager says
    place = Path(manager.job(FAILED)["logPath"])
    place.mkdir(parents=True)
    (place / "trial.stderr").write_bytes(b"first\n  last \xff words \n\n  \n")
    assert read_trials(experiment(manager.port))[2].error == "last \ufffd words"
    (place / "trial.stderr").write_text("\n")
    assert read_trials(experiment(manager.port))[2].error == ""
    (place / "trial.stderr").unlink()
    manager.job(FAILED)["trialJobId"] = "gone"
    assert read_trials(experiment(manager.port))[2].error == ""


@pytest.mark.parametrize("everywhere", [False, True])
def test_the_manager_finds_this_python_and_listens_here_alone(everywhere, monkeypatch):
    monkeypatch.setenv("PATH", "/somewhere")
    monkeypatch.setenv("NODE_OPTIONS", "--trace-warnings")
    before = dict(os.environ)
    with module._manager_environment(everywhere):
        found = dict(os.environ)
    assert dict(os.environ) == before
    assert found["PATH"] == f"{Path(module.sys.executable).parent}{os.pathsep}/somewhere"
    scripts = [f'--require="{module.PAIRING}"', *([] if everywhere else [f'--require="{module.LOOPBACK}"'])]
    assert found["NODE_OPTIONS"] == " ".join(["--trace-warnings", *scripts])


def test_a_manager_that_is_silent_is_told_with_the_way_on():
    words = (
        r"got none \(port 7\); if it was killed, `nni-topo experiment run --resume g4` goes on, .* g4/log/nnimanager"
    )
    with pytest.raises(ManagerError, match=words), answering(experiment(7)):
        raise ConnectionError


def job(trial: str, number: int | str, ratio: float, ran: int | str | None = None) -> dict[str, Any]:
    """A trial as the manager's REST API gives it; ``ran`` is the number of the proposal that its result carries."""
    proposal = {"parameter_id": number, "parameters": {"ratio": ratio}, "parameter_index": 0}
    row: dict[str, Any] = {"trialJobId": trial, "hyperParameters": [json.dumps(proposal)]}
    return row if ran is None else {**row, "finalMetricData": [{"parameterId": str(ran), "data": '"0.5"'}]}


def test_parameters_are_paired_by_the_number_of_the_result():
    jobs = [job("a", 0, 0.25, ran=1), job("b", 1, 0.5, ran=0), job("c", 2, 0.75, ran=2), job("d", 3, 0.9)]
    assert [ran["ratio"] for ran in pair_by_result(jobs).values()] == [0.5, 0.25, 0.75, 0.9]
    # numbers may be words, and unknown ones change nothing; of one given out twice each trial keeps its own
    jobs = [job("a", "0_x", 0.25, ran="1_y"), job("b", "1_y", 0.5, ran="0_x"), job("c", 7, 0.1, ran=99)]
    assert [ran["ratio"] for ran in pair_by_result(jobs).values()] == [0.5, 0.25, 0.1]
    jobs = [job("a", 1, 0.25, ran=1), job("b", 2, 0.5, ran=2), job("c", 1, 0.75, ran=1)]
    assert [ran["ratio"] for ran in pair_by_result(jobs).values()] == [0.25, 0.5, 0.75]


def test_unfinished_trials_of_an_ended_experiment_are_stopped():
    statuses = ("RUNNING", "WAITING", "SUCCEEDED", "FAILED")
    trials = [TrialRecord(status, number, status, {}, {}, "") for number, status in enumerate(statuses)]
    assert [trial.status for trial in stopped(trials)] == ["STOPPED", "STOPPED", "SUCCEEDED", "FAILED"]
