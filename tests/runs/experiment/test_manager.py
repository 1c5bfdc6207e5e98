"""Experiments with NNI's real manager on this machine, from start to export."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

import pytest
from nni.tools.nnictl.config_utils import Experiments
from recorded_manager import Manager

import nni_topo
from nni_topo import zoo
from nni_topo.cli import main
from nni_topo.errors import ConfigError, DataError
from nni_topo.runs.experiment import manager
from nni_topo.runs.experiment.manager import free_port, load_experiment, start_experiment
from nni_topo.runs.experiment.results import export_trial
from nni_topo.runs.experiment.trials import ManagerError, TrialRecord

CONFIG = """
searchSpace:
{space}
trialCommand: python -m nni_topo.runs.trial --limit 300 --train-epochs 4 --cache {nets} {words}
trialCodeDirectory: .
trialConcurrency: 2
maxTrialNumber: {trials}
tuner: {{name: GridSearch}}
trainingService: {{platform: local}}
experimentWorkingDirectory: {home}/nni-experiments
"""
PRUNERS = "  pruner: {_type: choice, _value: [l1, l2, l3, fpgm, random]}"
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
QUICK = """
import time
import nni
ratio = nni.get_next_parameter()["ratio"]
if ratio == 0.75:
    raise ValueError("a ratio that this network doesn't survive")
if ratio == 0.875:
    time.sleep(600)
nni.report_final_result({"default": ratio / 2, "accuracy": ratio})
"""
SECONDS = 240
ALL_INTERFACES = {"0" * 32, "0" * 8}


def listeners(port: int) -> set[str]:
    """Hexadecimal addresses on which something listens at a port."""
    lines = [line.split() for table in ("tcp", "tcp6") for line in Path("/proc/net", table).read_text().splitlines()]
    local = [line[1].split(":") for line in lines if line[3] == "0A"]
    return {address for address, number in local if int(number, 16) == port}


def configured(home, nets, space: str, trials: int, words: str = "") -> str:
    text = CONFIG.format(space=space, nets=nets, words=words, trials=trials, home=home.folder)
    return str(home.write("config.yml", text))


def statuses(home, port=None) -> list[str]:
    return sorted(job["status"] for job in home.rest("trial-jobs", port) or ())


@pytest.mark.slow
def test_five_trials_of_which_one_crashes(home, nets, wait_until):
    config = configured(home, nets, PRUNERS, 5)
    words = ["experiment", "run", config, "--port", str(home.port), "--out", "out", "--json"]
    with home.popen(sys.executable, "-m", "nni_topo", *words) as process:
        try:
            wait_until(lambda: process.poll() is not None or statuses(home))
            if sys.platform == "linux" and process.poll() is None:
                assert listeners(home.port)
                assert not listeners(home.port) & ALL_INTERFACES
            out, err = process.communicate(timeout=SECONDS)
        finally:
            process.send_signal(signal.SIGTERM)
    assert process.returncode == 1, err
    assert home.rest("check-status") is None
    document = json.loads(out)
    trials = {trial["parameters"]["pruner"]: trial for trial in document["trials"]}
    assert {name: trial["status"] for name, trial in trials.items()} == {
        **dict.fromkeys(("l1", "l2", "fpgm", "random"), "SUCCEEDED"),
        "l3": "FAILED",
    }
    assert "pruner must be a known name, got 'l3'; did you mean l" in trials["l3"]["error"]
    assert "failed: nni_topo.runs.trial: pruner must be" in " ".join(err.split())
    scores = {name: trial["result"]["default"] for name, trial in trials.items() if name != "l3"}
    assert document["best"]["result"]["default"] == max(scores.values()) > 0.3
    dense = nni_topo.load(
        home.folder / "out" / "best" / "dense.safetensors",
        lambda: zoo.create_model("small_cnn", num_classes=10, in_channels=1, image_size=8),
    )
    data = zoo.load_data("digits", limit=300)
    assert zoo.evaluate(dense, data.validation) == max(scores.values())
    assert json.loads((home.folder / "out" / "best" / "config_list.json").read_text())[0]["sparse_ratio"] > 0.5
    assert len(json.loads((home.folder / "out" / "trials.json").read_text())) == 5
    seen = home.topo("experiment", "status", "--json")
    again = json.loads(seen.stdout)
    assert again["status"] == "VIEWED"
    assert sorted(trial["status"] for trial in again["trials"]) == ["FAILED"] + ["SUCCEEDED"] * 4
    exported = home.topo("experiment", "export", again["experiment"], "--trial", trials["fpgm"]["id"], "--out", "fpgm")
    assert exported.returncode == 0, exported.stderr
    assert json.loads((home.folder / "fpgm" / "settings.json").read_text())["pruner"] == "fpgm"


def form(value):
    """Keys, and types of values, however deep."""
    if isinstance(value, dict):
        return {name: form(each) for name, each in value.items()}
    return [form(each) for each in value] if isinstance(value, list) else type(value).__name__


@pytest.mark.slow
def test_a_real_manager_answers_in_the_form_that_was_recorded(home, wait_until):
    """The tests of the verbs in tests/cli repeat the recorded replies."""
    home.write("quick.py", QUICK)
    text = CONFIG.format(
        space="  ratio: {_type: choice, _value: [0.25, 0.5, 0.75, 0.875]}",
        nets="",
        words="",
        trials=4,
        home=home.folder,
    )
    text = text.replace("trialConcurrency: 2", "trialConcurrency: 1")
    text = text.replace("tuner: {name: GridSearch}", "tuner: {name: GridSearch, classArgs: {optimize_mode: maximize}}")
    home.write("config.yml", re.sub("trialCommand: .*", "trialCommand: python quick.py", text))
    recorded = Manager(home.folder / "trials")
    words = ["experiment", "run", "config.yml", "--port", str(home.port), "--out", "out"]
    with home.popen(sys.executable, "-m", "nni_topo", *words) as process:
        try:
            expected = ["FAILED", "RUNNING", "SUCCEEDED", "SUCCEEDED"]
            wait_until(lambda: process.poll() is not None or statuses(home) == expected)
            found = {name: home.rest(name) for name in ("experiment", "check-status", "trial-jobs")}
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=SECONDS)
    assert [job["status"] for job in found["trial-jobs"]] == ["SUCCEEDED", "SUCCEEDED", "FAILED", "RUNNING"]
    for name, reply in found.items():
        assert form(reply) == form(recorded.replies[name]), name
    for name in ("hyperParameters", "sequenceId"):
        assert [job[name] for job in found["trial-jobs"]] == [job[name] for job in recorded.replies["trial-jobs"]]
    scores = [job["finalMetricData"][0]["data"] for job in found["trial-jobs"][:2]]
    assert scores == [job["finalMetricData"][0]["data"] for job in recorded.replies["trial-jobs"][:2]]


@pytest.mark.slow
def test_a_trial_that_asks_late_gets_its_own_parameters_and_the_end_of_the_grid_is_the_experiments(home):
    home.write("late.py", LATE)
    text = CONFIG.format(space="  x: {_type: choice, _value: [0, 1]}", nets="", words="", trials=9, home=home.folder)
    home.write("config.yml", re.sub("trialCommand: .*", "trialCommand: python late.py", text))
    done = home.topo("experiment", "run", "config.yml", "--port", str(home.port), "--out", "out")
    # these trials leave no files to export
    assert "its command is that of nni_topo.runs.trial, got 'python late.py'" in " ".join(done.stderr.split())
    trials = json.loads((home.folder / "out" / "trials.json").read_text())
    assert [(trial["parameters"]["x"], trial["result"]["default"]) for trial in trials] == [(0, 0), (1, 1)]


@pytest.mark.slow
def test_a_killed_manager_is_resumed_and_its_trials_go_on(home, nets, wait_until):
    config = configured(home, nets, "  seed: {_type: choice, _value: [0, 1, 2, 3]}", 4, "--retrain-epochs 40")
    words = ["experiment", "run", config, "--port", str(home.port), "--out", "out"]
    with home.popen(sys.executable, "-m", "nni_topo", *words) as process:
        try:
            wait_until(lambda: {"SUCCEEDED", "RUNNING"} <= set(statuses(home)))
            (entry,) = json.loads((home.folder / "nni-experiments" / ".experiment").read_text()).values()
            before = {job["trialJobId"]: job["status"] for job in home.rest("trial-jobs")}
            os.kill(entry["pid"], signal.SIGKILL)
            _, err = process.communicate(timeout=SECONDS)
        finally:
            process.send_signal(signal.SIGTERM)
    assert process.returncode == 2
    said = " ".join(err.split())
    assert f"NNI's manager must answer, got none (port {home.port})" in said
    assert f"nni-topo experiment run --resume {entry['id']}" in said
    port = free_port()
    resumed = home.run("nnictl", "resume", entry["id"], "--port", str(port))
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    try:
        wait_until(lambda: statuses(home, port) == ["SUCCEEDED"] * 4)
        after = {job["trialJobId"]: job["status"] for job in home.rest("trial-jobs", port)}
    finally:
        home.run("nnictl", "stop", "--port", str(port))
    assert before.keys() <= after.keys()
    best = home.topo("experiment", "export", entry["id"], "--out", "best")
    assert best.returncode == 0, best.stderr
    assert (home.folder / "best" / "dense.safetensors").stat().st_size > 1000


@pytest.mark.slow
def test_an_interrupted_run_exports_what_it_found_and_names_one_way_on(home, nets, wait_until):
    # so many that most are still to come when the signal arrives, however busy the machine is
    config = configured(home, nets, f"  seed: {{_type: choice, _value: {[*range(10)]}}}", 10, "--retrain-epochs 40")
    words = ["experiment", "run", config, "--port", str(home.port), "--out", "out"]
    with home.popen(sys.executable, "-m", "nni_topo", *words) as process:
        wait_until(lambda: {"SUCCEEDED", "RUNNING"} <= set(statuses(home)))
        process.send_signal(signal.SIGINT)
        said, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 130
    (known,) = json.loads((home.folder / "nni-experiments" / ".experiment").read_text())
    way_on = f"nni-topo experiment run --resume {known} --out out"
    assert (said + err).count("--resume") == 1
    assert way_on in err
    assert "the same command" not in said + err
    assert (home.folder / "out" / "best" / "dense.safetensors").exists()
    found = {trial["id"]: trial["status"] for trial in json.loads((home.folder / "out" / "trials.json").read_text())}
    assert "STOPPED" in found.values()
    assert "RUNNING" not in found.values()

    seen = home.topo("experiment", "status", "--json")
    assert {trial["id"]: trial["status"] for trial in json.loads(seen.stdout)["trials"]} == found
    shown = home.topo("experiment", "status").stdout
    assert f"resume with: nni-topo experiment run --resume {known}" in shown

    again = home.topo(*way_on.split()[1:], "--port", str(free_port()))
    assert again.returncode == 0, again.stderr
    after = json.loads((home.folder / "out" / "trials.json").read_text())
    assert [trial["status"] for trial in after] == ["SUCCEEDED"] * 10
    assert found.keys() <= {trial["id"] for trial in after}


def test_a_port_in_use_is_a_clear_error(home, capsys, monkeypatch):
    config = configured(home, home.folder, PRUNERS, 5)
    monkeypatch.chdir(home.folder)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", home.port))
        taken.listen()
        with pytest.raises(ManagerError, match=rf"got: Port {home.port} is not idle .*\(port {home.port}\)"):
            start_experiment(load_experiment(config), home.port)
        assert main(["experiment", "run", config, "--port", str(home.port), "--out", "out"]) == 2
    assert f"Port {home.port} is not idle" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(ManagerError, match=r"must start, got: .*\(port 70000\)"):
        start_experiment(load_experiment(config), 70000)


REMOTE = """
trainingService:
  platform: remote
  reuseMode: false
  machineList: [{host: 127.0.0.1, user: nobody, password: none}]
"""


def test_trials_on_other_machines_need_the_next_port_too(home, monkeypatch):
    local = configured(home, home.folder, PRUNERS, 5)
    text = Path(local).read_text().replace("trainingService: {platform: local}\n", "nniManagerIp: 127.0.0.1\n")
    remote = home.write("remote.yml", text + REMOTE)
    monkeypatch.chdir(home.folder)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", home.port + 1))
        taken.listen()
        with pytest.raises(ManagerError, match=rf"must start, got: Port {home.port + 1} is not idle"):
            start_experiment(load_experiment(remote), home.port)


def test_a_stopped_experiment_is_resumed_with_its_own_configuration(tmp_path, monkeypatch):
    # what NNI leaves of an experiment: a row in its list, and a database in the experiment's folder
    monkeypatch.setattr(Experiments.__init__, "__defaults__", (str(tmp_path),))
    params = {**Manager(tmp_path / "trials").replies["experiment"]["params"], "trialCommand": "python of_this_one.py"}
    known = Experiments()
    for name, state in (("old", "STOPPED"), ("new", "STOPPED"), ("begun", "STOPPED"), ("going", "RUNNING")):
        begin = len(known.get_all_experiments())
        own = {"status": state, "logDir": tmp_path, "pid": os.getpid()}
        known.add_experiment(name, 8080, begin, "local", "", **own)
    for name in ("old", "new"):
        (tmp_path / name / "db").mkdir(parents=True)
        with closing(sqlite3.connect(tmp_path / name / "db" / "nni.sqlite")) as base:
            base.execute("create table ExperimentProfile (params text, id text, revision integer)")
            row = json.dumps({**params, "maxTrialNumber": len(name)}), name, 1
            base.execute("insert into ExperimentProfile values (?, ?, ?)", row)
            base.commit()
    config = manager._stopped_config("old")
    assert (config.trial_command, config.max_trial_number) == ("python of_this_one.py", 3)
    with pytest.raises(ConfigError, match="got one killed before: run its file again"):
        manager._stopped_config("begun")
    with pytest.raises(ConfigError, match="must have ended to be resumed, got RUNNING: `nnictl stop going` ends it"):
        manager._stopped_config("going")
    assert manager._registered(None)["id"] == "going"
    with pytest.raises(ConfigError, match=r"must be one that NNI knows, got 'other' \(experiment\)"):
        manager._stopped_config("other")


def test_requests_that_make_no_sense_are_clear_errors(home, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(home.folder))
    monkeypatch.chdir(home.folder)
    for words, message in (
        (["run", "--out", "out"], "must be a file, or --resume ID, got both or neither"),
        (["run", "missing.yml", "--out", "out"], "No such file"),
        (["status", "--port", str(home.port)], f"NNI's manager must answer, got none (port {home.port})"),
        (["run", "--resume", "abc", "--out", "out"], "must be one that NNI knows, got none at all"),
    ):
        assert main(["experiment", *words]) == 2
        assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_a_trial_without_files_here_is_run_again(nets, tmp_path):
    away = TrialRecord("abc", 0, "SUCCEEDED", {"pruner": "l1"}, {"default": 0.7}, "/on/another/machine")
    with pytest.raises(DataError, match="must be on this machine, or run again here"):
        export_trial(away, tmp_path / "none")
    command = f"python -m nni_topo.runs.trial --limit 300 --train-epochs 4 --cache {nets}"
    metrics = export_trial(away, tmp_path / "again", command=command)
    assert metrics["settings"]["pruner"] == "l1"
    assert (tmp_path / "again" / "dense.safetensors").exists()
    with pytest.raises(DataError, match=r"if its command is that of nni_topo.runs.trial, got 'true'"):
        export_trial(away, tmp_path / "other", command="true")
    with pytest.raises(DataError, match=r"must run again here, got: .*Unrecognized options: --no-such"):
        export_trial(away, tmp_path / "bad", command=f"{command} --no-such")
