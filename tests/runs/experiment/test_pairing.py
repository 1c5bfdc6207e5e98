"""A trial and its parameters belong together, also under plain nnictl, which can swap them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from nni_topo.disk import is_held, only_process
from nni_topo.runs.experiment.pairing import pair_by_result
from nni_topo.runs.experiment.trials import TrialRecord, stopped

GRID = Path(__file__).parents[3] / "configs" / "experiments" / "grid.yml"


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


def test_the_grid_runs_the_program_whose_trials_run_what_their_rows_show():
    # the two slow tests below show what happens to two trials at a time with and without it
    grid = yaml.safe_load(GRID.read_text())
    assert grid["trialConcurrency"] > 1
    words = [word for word in grid["trialCommand"].split() if "=" not in word]
    assert words[:3] == ["python", "-m", "nni_topo.runs.trial"]


LATE = """
import pathlib, time
import nni
from nni_topo.runs.experiment import next_parameters
asked = pathlib.Path("asked")
while nni.get_sequence_id() == 0 and not asked.exists():
    time.sleep(0.1)
x = next_parameters()["x"]
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


def rows(home: Any, port: int, wait_until: Any, late: str) -> list[tuple[int, float]]:
    """Run two trials, of which the first one asks late, by plain nnictl; return what their rows show."""
    home.write("late.py", late)
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
def test_under_plain_nnictl_a_trial_runs_what_its_row_shows(home, wait_until, monkeypatch):
    monkeypatch.delenv("NODE_OPTIONS", raising=False)
    assert rows(home, home.port, wait_until, LATE) == [(0, 0.0), (1, 1.0)]


@pytest.mark.slow
def test_rows_that_nnictl_swapped_are_told_by_their_results(home, wait_until, monkeypatch):
    monkeypatch.delenv("NODE_OPTIONS", raising=False)
    plain = LATE.replace("from nni_topo.runs.experiment import", "from nni import get_next_parameter as")
    assert rows(home, home.port, wait_until, plain) == [(0, 1.0), (1, 0.0)]
