"""A killed experiment is resumed: nothing is lost, nothing tried twice, no number given out twice."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from typing import Any

import pytest

from nni_topo.runs.experiment.manager import free_port

TRIAL = """
import pathlib, time
import nni
x = nni.get_next_parameter()["x"]
while nni.get_sequence_id() > 1 and not pathlib.Path("go").exists():
    time.sleep(0.1)
nni.report_final_result(x)
"""
CONFIG = """
searchSpace:
  x: {{_type: choice, _value: [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]}}
trialCommand: python trial.py
trialCodeDirectory: .
trialConcurrency: 2
maxTrialNumber: 6
tuner: {tuner}
trainingService: {{platform: local}}
experimentWorkingDirectory: nni-experiments
"""
SECONDS = 240


def started(home: Any, *words: str) -> subprocess.Popen[str]:
    return home.popen(sys.executable, "-m", "nni_topo", "experiment", "run", *words, "--out", "out")


def killed(home: Any, process: subprocess.Popen[str]) -> str:
    """Kill the manager, and wait for the end of the command; return NNI's identifier of the experiment."""
    (entry,) = json.loads((home.folder / "nni-experiments" / ".experiment").read_text()).values()
    os.kill(entry["pid"], signal.SIGKILL)
    process.communicate(timeout=SECONDS)
    assert process.returncode == 2
    return str(entry["id"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "tuner",
    [
        "{name: GridSearch}",
        "{name: Random, classArgs: {seed: 3}}",
        "{name: TPE, classArgs: {seed: 3, optimize_mode: maximize}}",
    ],
)
def test_each_point_is_tried_once(home, wait_until, tuner):
    home.write("trial.py", TRIAL)
    config = home.write("config.yml", CONFIG.format(tuner=tuner))
    process = started(home, str(config), "--port", str(home.port))
    try:
        jobs = wait_until(lambda: (seen := home.rest("trial-jobs")) and len(seen) == 4 and seen)
        name = killed(home, process)
    finally:
        process.send_signal(signal.SIGTERM)
    before = {job["trialJobId"]: json.loads(job["hyperParameters"][0]) for job in jobs}
    with sqlite3.connect(home.folder / "nni-experiments" / name / "db" / "nni.sqlite") as database:
        # as a manager leaves it that was killed once more, while it took this trial up again
        again = next(job["trialJobId"] for job in jobs if job["sequenceId"] == 2)
        words = "insert into TrialJobEvent (timestamp, trialJobId, event, data) values (?, ?, 'ADD_RESUMED', '')"
        database.execute(words, (jobs[-1]["startTime"], again))
    (home.folder / "go").touch()

    port = free_port()
    with started(home, "--resume", name, "--port", str(port)) as process:
        jobs = wait_until(lambda: (seen := home.rest("trial-jobs", port)) and len(seen) == 6 and seen)
        _, err = process.communicate(timeout=SECONDS)
    # a trial of its own leaves no network to be exported
    assert "a trial can be run again if its command is that of nni_topo.runs.trial" in " ".join(err.split())

    proposals = {job["trialJobId"]: json.loads(job["hyperParameters"][0]) for job in jobs}
    assert {trial: each["parameters"] for trial, each in proposals.items() if trial in before} == {
        trial: each["parameters"] for trial, each in before.items()
    }
    assert len({each["parameter_id"] for each in proposals.values()}) == 6
    trials = json.loads((home.folder / "out" / "trials.json").read_text())
    assert [trial["number"] for trial in trials] == list(range(6))
    assert {trial["status"] for trial in trials} == {"SUCCEEDED"}
    assert all(trial["parameters"]["x"] == trial["result"]["default"] for trial in trials)
    assert sorted(trial["parameters"]["x"] for trial in trials) == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
