"""Experiments with NNI's real manager on this machine, from start to export."""

from __future__ import annotations

import json
import os
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
from nni_topo.errors import ConfigError
from nni_topo.runs.experiment import manager
from nni_topo.runs.experiment.manager import free_port, load_experiment, start_experiment
from nni_topo.runs.experiment.trials import ManagerError

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
        (["run", "--out", "out"], "either an experiment file or --resume ID, got both or neither"),
        (["run", "missing.yml", "--out", "out"], "No such file"),
        (["status", "--port", str(home.port)], f"NNI's manager must answer, got none (port {home.port})"),
        (["run", "--resume", "abc", "--out", "out"], "must be one that NNI knows, got none at all"),
    ):
        assert main(["experiment", *words]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
