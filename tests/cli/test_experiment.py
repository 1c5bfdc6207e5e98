"""What the verbs of `nni-topo experiment` show and write, from replies of NNI's manager that were recorded.

NNI's client is the real one. The manager isn't, and `run` doesn't start one here. The slow tests in
`tests/runs/experiment/test_manager.py` run, interrupt, resume and export with a real manager, and hold the recorded
replies against its own.
"""

from __future__ import annotations

import io
import json
import os
import re
import signal

import pytest
from nni.experiment import Experiment
from recorded_manager import FAILED, RUNNING, SUCCEEDED, recorded_manager
from rich.console import Console

from nni_topo.cli import experiment as verbs
from nni_topo.cli import main

CONFIG = """
searchSpace: {ratio: {_type: choice, _value: [0.25, 0.5, 0.75, 0.875]}}
trialCommand: python quick.py
trialCodeDirectory: .
trialConcurrency: 1
maxTrialNumber: 4
tuner: {name: GridSearch, classArgs: {optimize_mode: MODE}}
trainingService: {platform: local}
"""
LINES = [
    "trial 0 (RVApu) succeeded: 0.1250 · ratio=0.25",
    "trial 1 (epUED) succeeded: 0.2500 · ratio=0.5",
    "trial 2 (NKlsg) failed: ValueError: a ratio that this network doesn't survive · ratio=0.75",
]


@pytest.fixture
def trials(tmp_path):
    """Folder of the trials' folders; those that succeeded have files to export."""
    folder = tmp_path / "trials"
    for trial in SUCCEEDED:
        place = folder / trial
        place.mkdir(parents=True)
        for name in ("dense.safetensors", "config_list.json", "masks.pt", "settings.json"):
            (place / name).write_text(f"{name} of {trial}")
        (place / "metrics.json").write_text(json.dumps({"test_accuracy": 0.375, "of": trial}))
    return folder


@pytest.fixture
def manager(trials):
    with recorded_manager(trials) as found:
        yield found


def show(manager, *words, status=0):
    words = ["experiment", *words, "--port", str(manager.port)]
    assert main(words) == status


def test_status_shows_every_trial_and_why_one_failed(manager, capsys):
    show(manager, "status")
    shown = capsys.readouterr().out
    assert f"experiment {manager.id}: no_more_trial" in shown
    rows = [line.replace("│", " ").split() for line in shown.splitlines()]
    assert [row[:5] for row in rows if row[1:2] == [SUCCEEDED[0]]] == [
        ["0", "RVApu", "SUCCEEDED", "0.1250", "ratio=0.25"]
    ]
    assert "ValueError: a ratio that this network doesn't survive" in shown
    assert "stopped before their end" not in shown
    show(manager, "status", "--json")
    document = json.loads(capsys.readouterr().out)
    assert (document["experiment"], document["status"], document["errors"]) == (manager.id, "NO_MORE_TRIAL", [])
    found = {trial["id"]: (trial["number"], trial["status"], trial["parameters"]) for trial in document["trials"]}
    assert found == {
        "RVApu": (0, "SUCCEEDED", {"ratio": 0.25}),
        "epUED": (1, "SUCCEEDED", {"ratio": 0.5}),
        FAILED: (2, "FAILED", {"ratio": 0.75}),
        RUNNING: (3, "RUNNING", {"ratio": 0.875}),
    }
    assert [trial["result"] for trial in document["trials"][:2]] == [
        {"default": 0.125, "accuracy": 0.25},
        {"default": 0.25, "accuracy": 0.5},
    ]


def test_status_of_an_ended_experiment_says_what_was_cut_short_what_went_wrong_and_how_to_go_on(manager, capsys):
    manager.replies["check-status"] = {"status": "STOPPED", "errors": ["the disk is full", "so is the other"]}
    show(manager, "status")
    lines = capsys.readouterr().out.splitlines()
    way_on = f"nni-topo experiment run --resume {manager.id} --out FOLDER"
    assert lines[-3:] == [
        f"1 stopped before their end; resume with: {way_on}",
        "the disk is full",
        "so is the other",
    ]
    show(manager, "status", "--json")
    document = json.loads(capsys.readouterr().out)
    assert document["errors"] == ["the disk is full", "so is the other"]
    assert [trial["status"] for trial in document["trials"]] == ["SUCCEEDED", "SUCCEEDED", "FAILED", "STOPPED"]


@pytest.mark.parametrize(("mode", "best"), [("maximize", 1), ("minimize", 0)])
def test_best_is_the_trial_that_the_tuner_looks_for(mode, best, manager, trials, capsys):
    manager.replies["experiment"]["params"]["tuner"]["classArgs"]["optimize_mode"] = mode
    show(manager, "best")
    lines = capsys.readouterr().out.splitlines()
    score, ratio = (0.125, 0.25) if best == 0 else (0.25, 0.5)
    assert lines == [
        f"best trial {best} ({SUCCEEDED[best]}): score {score:.4f}, accuracy {ratio:.4f}",
        f"ratio={ratio}",
        f"folder: {trials / SUCCEEDED[best]}",
    ]
    show(manager, "best", "--json")
    assert json.loads(capsys.readouterr().out)["id"] == SUCCEEDED[best]


@pytest.mark.parametrize(("words", "trial"), [([], "epUED"), (["--trial", "RVApu"], "RVApu")])
def test_export_copies_the_best_trials_files_or_those_of_the_one_named(words, trial, manager, tmp_path, capsys):
    show(manager, "export", *words, "--out", str(tmp_path / "out"))
    shown = capsys.readouterr().out
    assert (tmp_path / "out" / "dense.safetensors").read_text() == f"dense.safetensors of {trial}"
    score, ratio = ("0.1250", "0.2500") if trial == "RVApu" else ("0.2500", "0.5000")
    assert shown.splitlines()[0].endswith(f"({trial}): score {score}, accuracy {ratio}, test_accuracy 0.3750")
    assert shown.endswith(f"dense model and config_list: {tmp_path / 'out'}\n")
    show(manager, "export", *words, "--out", str(tmp_path / "again"), "--json")
    document = json.loads(capsys.readouterr().out)
    assert (document["id"], document["metrics"]) == (trial, {"test_accuracy": 0.375, "of": trial})


def test_a_trial_whose_files_are_gone_runs_again_only_where_that_is_asked_for(manager, trials, tmp_path, capsys):
    (trials / "epUED" / "masks.pt").unlink()
    show(manager, "export", "--out", str(tmp_path / "out"), status=2)
    assert "a trial's files must be on this machine, or run again here, got none" in " ".join(
        capsys.readouterr().err.split()
    )
    show(manager, "export", "--rerun", "--out", str(tmp_path / "out"), status=2)
    said = " ".join(capsys.readouterr().err.split())
    assert "its command is that of nni_topo.runs.trial, got 'python quick.py' (epUED)" in said
    show(manager, "export", "--trial", "nobody", "--out", str(tmp_path / "out"), status=2)
    assert "a trial must be one of the experiment, got 'nobody'" in capsys.readouterr().err


class Running:
    """`nni-topo experiment run` beside the recorded manager; each pause of the program is a look of the test's."""

    def __init__(self, manager, tmp_path, monkeypatch):
        self.manager, self.folder = manager, tmp_path
        self.at_pauses = []
        self.experiments = []
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(verbs, "start_experiment", self.start)
        monkeypatch.setattr("nni_topo.runs.experiment.manager.time.sleep", self.pause)

    def start(self, config, port, *, resume, everywhere):
        """In place of a process of NNI's manager: the one that answers already."""
        experiment = Experiment.connect(port)
        experiment.config = config
        self.experiments.append((experiment, resume, everywhere))
        return experiment

    def pause(self, seconds):
        self.at_pauses.pop(0)()

    def run(self, console, *, mode="maximize", out="out", **flags):
        (self.folder / "config.yml").write_text(CONFIG.replace("MODE", mode))
        verb = verbs.Run(config=self.folder / "config.yml", port=self.manager.port, out=self.folder / out, **flags)
        return verb.run(console)

    def end(self):
        self.manager.replies["check-status"]["status"] = "DONE"
        job = self.manager.job(RUNNING)
        job.update(status="SUCCEEDED", finalMetricData=[{"parameterId": "3", "data": json.dumps("0.1875")}])

    def interrupt(self):
        raise KeyboardInterrupt


@pytest.fixture
def running(manager, tmp_path, monkeypatch):
    return Running(manager, tmp_path, monkeypatch)


def test_a_run_tells_each_trial_once_and_exports_the_best(running, manager):
    running.at_pauses = [lambda: None, running.end]
    said = io.StringIO()
    assert running.run(Console(file=said, width=160)) == 1
    lines = said.getvalue().splitlines()
    assert lines[0] == f"experiment {manager.id} at http://localhost:{manager.port} (this machine only)"
    assert lines[1:5] == [*LINES, "trial 3 (LDsaB) succeeded: 0.1875 · ratio=0.875"]
    assert lines[5] == "best trial 1 (epUED): score 0.2500, accuracy 0.5000, test_accuracy 0.3750"
    assert lines[6] == "ratio=0.5"
    out = running.folder / "out"
    assert (
        lines[7] == f"dense model and config_list: {out / 'best'} · all trials: {out} · report: {out / 'report.html'}"
    )
    assert lines[8:] == ["1 of 4 trials failed"]
    assert (out / "best" / "dense.safetensors").read_text() == "dense.safetensors of epUED"
    page = (out / "report.html").read_text()
    assert "best trial 1: a score of 0.25" in page
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", page, re.S)]
    assert [
        row[1] for name in ("score", "accuracy", "test accuracy", "ratio") for row in rows if row[:1] == [name]
    ] == [
        "0.25",
        "0.5",
        "0.375",
        "0.5",
    ]
    assert [trial["id"] for trial in json.loads((out / "trials.json").read_text())] == [*SUCCEEDED, FAILED, RUNNING]
    ((experiment, resume, everywhere),) = running.experiments
    assert experiment.port is None  # it was stopped
    assert (resume, everywhere) == (None, False)


def test_ctrl_c_exports_what_there_is_and_names_one_way_on(running, manager, capsys):
    running.at_pauses = [running.interrupt]
    # a folder's name may look like Rich's markup, and be long
    out = f"runs[red]/{'long' * 30}"
    (running.folder / "config.yml").write_text(CONFIG.replace("MODE", "maximize"))
    show(manager, "run", "config.yml", "--out", out, status=130)
    output = capsys.readouterr()
    way_on = f"`nni-topo experiment run --resume {manager.id} --out {out}` resumes it"
    assert output.err == f"nni-topo experiment run: interrupted; {way_on}\n"
    assert "interrupted: stopping the manager and its trials" in output.out
    assert "best trial 1 (epUED)" in output.out
    written = json.loads((running.folder / out / "trials.json").read_text())
    assert [trial["status"] for trial in written] == ["SUCCEEDED", "SUCCEEDED", "FAILED", "STOPPED"]
    assert running.experiments[0][0].port is None


def test_an_export_runs_a_trial_again_unless_it_is_interrupted(running, trials, capsys):
    running.at_pauses = [running.interrupt]
    (trials / "epUED" / "masks.pt").unlink()
    (running.folder / "config.yml").write_text(CONFIG.replace("MODE", "maximize"))
    show(running.manager, "run", "config.yml", "--out", "out", status=2)
    assert "or run again here, got none" in " ".join(capsys.readouterr().err.split())


def test_a_run_that_is_told_to_end_stops_its_manager(running, manager, capsys):
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    running.at_pauses = [lambda: os.kill(os.getpid(), signal.SIGTERM), running.end]
    (running.folder / "config.yml").write_text(CONFIG.replace("MODE", "maximize"))
    try:
        show(manager, "run", "config.yml", "--out", "out", status=130)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "experiment run: interrupted; " in capsys.readouterr().err
    assert running.experiments[0][0].port is None


def test_an_experiment_that_breaks_down_says_why(running, manager, capsys):
    manager.replies["check-status"] = {"status": "ERROR", "errors": ["the tuner", "has ended"]}
    (running.folder / "config.yml").write_text(CONFIG.replace("MODE", "maximize"))
    show(manager, "run", "config.yml", "--out", "out", status=2)
    said = " ".join(capsys.readouterr().err.split())
    assert f"an experiment must run to its end, got: the tuner; has ended (experiment {manager.id})" in said


def test_a_tuner_without_further_proposals_ends_a_run_after_some_looks(running, manager):
    running.end()
    manager.replies["check-status"]["status"] = "TUNER_NO_MORE_TRIAL"
    running.at_pauses = [lambda: None] * 9
    assert running.run(Console(file=io.StringIO())) == 1
    assert len(running.at_pauses) == 5
