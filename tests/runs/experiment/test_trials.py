"""Trials as NNI's manager tells of them, and what is said where it doesn't answer."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from recorded_manager import FAILED, RUNNING, SUCCEEDED, recorded_manager

from nni_topo.disk import is_held, only_process
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


def experiment(port, config=None):
    return SimpleNamespace(port=port, id="g4", url_prefix=None, config=config)


def test_only_a_trial_with_a_score_that_succeeded_is_a_candidate():
    states = {"WAITING": False, "RUNNING": False, "UNKNOWN": False, "SUCCEEDED": True, "FAILED": True, "STOPPED": True}
    assert {status: record(status).is_finished for status in states} == states
    assert not record("SUCCEEDED").is_candidate
    assert not record("RUNNING", 0.5).is_candidate
    assert record("SUCCEEDED", 0.0).is_candidate
    assert record("SUCCEEDED", 0.5).score == 0.5


def test_scores_may_be_zero_or_negative():
    trials = [record("SUCCEEDED", -0.5), record("SUCCEEDED", 0.0), record("SUCCEEDED", -0.25)]
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


def test_a_manager_that_is_silent_is_told_with_its_last_error(tmp_path):
    config = SimpleNamespace(canonical_copy=lambda: SimpleNamespace(experiment_working_directory=str(tmp_path)))

    def told(silent):
        with pytest.raises(ManagerError) as found, answering(silent):
            raise ConnectionError
        return str(found.value)

    way_on = "; if it was killed, `nni-topo experiment run --resume g4` goes on"
    for silent in (experiment(7), experiment(7, config)):
        assert told(silent) == f"NNI's manager must answer, got none (port 7){way_on}"
    log = tmp_path / "g4" / "log" / "nnimanager.log"
    log.parent.mkdir(parents=True)
    log.write_bytes(b"[1] INFO began\n")
    assert told(experiment(7, config)) == f"NNI's manager must answer, got none (port 7){way_on}"
    log.write_bytes(b"[1] ERROR one\n[2] ERROR (x) the disk is \xff full\n[3] INFO end\n")
    wanted = f"NNI's manager must answer, got none (port 7), after: (x) the disk is \ufffd full{way_on}"
    assert told(experiment(7, config)) == wanted


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("options", [None, "--trace-warnings"])
def test_the_manager_finds_this_python_and_listens_here_alone(everywhere, options, monkeypatch):
    monkeypatch.setenv("PATH", "/somewhere")
    monkeypatch.delenv("NODE_OPTIONS", raising=False)
    if options:
        monkeypatch.setenv("NODE_OPTIONS", options)
    before = dict(os.environ)
    found = {}

    def ends_in_an_error():
        with module._manager_environment(everywhere):
            found.update(os.environ)
            raise RuntimeError("of the block")

    with pytest.raises(RuntimeError, match="of the block"):
        ends_in_an_error()
    assert dict(os.environ) == before
    assert found["PATH"] == f"{Path(module.sys.executable).parent}{os.pathsep}/somewhere"
    scripts = [f'--require="{module.PAIRING}"', *([] if everywhere else [f'--require="{module.LOOPBACK}"'])]
    assert found["NODE_OPTIONS"] == " ".join([*([options] if options else []), *scripts])


def test_a_tuner_maximises_unless_it_is_told_otherwise():
    tuners = {
        "maximize": [None, SimpleNamespace(class_args=None), SimpleNamespace(class_args={"seed": 1})],
        "minimize": [SimpleNamespace(class_args={"optimize_mode": "minimize"})],
    }
    for mode, given in tuners.items():
        assert [module.optimize_mode(SimpleNamespace(tuner=tuner)) for tuner in given] == [mode] * len(given)


def job(trial: str, number: int | str, ratio: float, ran: int | str | None = None) -> dict[str, Any]:
    """A trial as the manager's REST API gives it; ``ran`` is the number of the proposal that its result carries."""
    proposal = {"parameter_id": number, "parameters": {"ratio": ratio}, "parameter_index": 0}
    row: dict[str, Any] = {"trialJobId": trial, "hyperParameters": [json.dumps(proposal)]}
    return row if ran is None else {**row, "finalMetricData": [{"parameterId": str(ran), "data": '"0.5"'}]}


def test_swapped_rows_are_paired_by_the_number_of_the_result():
    jobs = [job("a", 0, 0.25, ran=1), job("b", 1, 0.5, ran=0), job("c", 2, 0.75, ran=2), job("d", 3, 0.9)]
    assert {trial: ran["ratio"] for trial, ran in pair_by_result(jobs).items()} == {
        "a": 0.5,
        "b": 0.25,
        "c": 0.75,
        "d": 0.9,
    }


def test_numbers_may_be_words_and_unknown_ones_change_nothing():
    jobs = [job("a", "0_0_x", 0.25, ran="0_1_y"), job("b", "0_1_y", 0.5, ran="0_0_x"), job("c", 7, 0.1, ran=99)]
    assert [ran["ratio"] for ran in pair_by_result(jobs).values()] == [0.5, 0.25, 0.1]
    assert pair_by_result([{"trialJobId": "waiting"}]) == {"waiting": {}}


def test_of_a_number_given_out_twice_each_trial_keeps_its_own():
    jobs = [job("a", 1, 0.25, ran=1), job("b", 2, 0.5, ran=2), job("c", 1, 0.75, ran=1)]
    assert {trial: ran["ratio"] for trial, ran in pair_by_result(jobs).items()} == {"a": 0.25, "b": 0.5, "c": 0.75}


def test_trials_of_an_ended_experiment_are_stopped_unless_they_still_work(tmp_path):
    alive, dead = tmp_path / "alive", tmp_path / "dead"
    with only_process(dead):
        pass
    trials = [
        TrialRecord("a", 0, "RUNNING", {}, {}, str(alive)),
        TrialRecord("b", 1, "RUNNING", {}, {}, str(dead)),
        TrialRecord("c", 2, "WAITING", {}, {}, ""),
        TrialRecord("d", 3, "SUCCEEDED", {}, {"default": 0.5}, str(dead)),
    ]
    with only_process(alive):
        assert is_held(alive)
        assert [trial.status for trial in stopped(trials)] == ["RUNNING", "STOPPED", "STOPPED", "SUCCEEDED"]
    assert not is_held(alive)


LATE = """
import pathlib, time
import nni
asked = pathlib.Path("asked")
while nni.get_sequence_id() == 0 and not asked.exists():
    time.sleep(0.1)
x = nni.get_next_parameter()["x"]
asked.touch()
nni.report_final_result(x)
"""
CONFIG = """
searchSpace:
  x: {{_type: choice, _value: [0, 1]}}
trialCommand: python late.py
trialCodeDirectory: .
trialConcurrency: 2
maxTrialNumber: 2
tuner: {{name: GridSearch}}
trainingService: {{platform: local}}
experimentWorkingDirectory: {home}/nni-experiments
"""


def rows(home: Any, port: int, wait_until: Any) -> list[tuple[int, float]]:
    """Run two trials, of which the first one asks late, by plain nnictl; return what their rows show."""
    home.write("late.py", LATE)
    home.write("config.yml", CONFIG.format(home=home.folder))
    made = home.run("nnictl", "create", "--config", "config.yml", "--port", str(port))
    assert made.returncode == 0, made.stdout + made.stderr
    try:

        def both() -> Any:
            jobs = home.rest("trial-jobs", port) or []
            ended = sum(job["status"] in ("SUCCEEDED", "FAILED") for job in jobs)
            return jobs if ended == 2 or any(job["status"] == "FAILED" for job in jobs) else None

        jobs = sorted(wait_until(both), key=lambda job: job["sequenceId"])
        seen = home.topo("experiment", "status", "--port", str(port), "--json")
        trials = json.loads(seen.stdout)["trials"]
        assert all(trial["parameters"]["x"] == trial["result"]["default"] for trial in trials)
    finally:
        home.run("nnictl", "stop", "--port", str(port))
    return [
        (json.loads(job["hyperParameters"][0])["parameters"]["x"], float(json.loads(job["finalMetricData"][0]["data"])))
        for job in jobs
    ]


@pytest.mark.slow
def test_rows_that_nnictl_swapped_are_told_by_their_results(home, wait_until, monkeypatch):
    monkeypatch.delenv("NODE_OPTIONS", raising=False)
    assert rows(home, home.port, wait_until) == [(0, 1.0), (1, 0.0)]
