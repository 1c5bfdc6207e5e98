"""Trials as NNI's manager tells of them, and what is said where it doesn't answer."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from recorded_manager import FAILED, RUNNING, SUCCEEDED, recorded_manager

from nni_topo.errors import DataError
from nni_topo.runs.experiment import manager as module
from nni_topo.runs.experiment import pairing
from nni_topo.runs.experiment.trials import ManagerError, TrialRecord, answering, best_trial, read_trials


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


PROPOSAL = {"parameter_id": 3, "parameters": {"x": 0.5}}


class Replies:
    """What a manager answers, one reply after the other; the last one again and again."""

    def __init__(self, *replies):
        self.replies, self.asked = list(replies), []

    def get(self, url, timeout):
        self.asked.append((url, timeout))
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        if isinstance(reply, OSError):
            raise reply
        status, text = reply
        return SimpleNamespace(status_code=status, json=lambda: json.loads(text))


@pytest.mark.parametrize(
    ("replies", "wanted", "asked"),
    [
        ([(200, json.dumps({"hyperParameters": [json.dumps({"a": 1}), json.dumps(PROPOSAL)]}))], PROPOSAL, 1),
        ([(200, "{}"), (200, "<html>"), (200, "[]"), (200, json.dumps({"hyperParameters": []}))], None, 3),
        ([(404, json.dumps({"hyperParameters": [json.dumps(PROPOSAL)]}))], None, 1),
        ([(500, "{}"), ConnectionError()], None, 2),
        ([(200, "{}"), (200, json.dumps({"hyperParameters": [json.dumps(PROPOSAL)]}))], PROPOSAL, 2),
    ],
)
def test_a_trial_asks_the_manager_for_its_parameters_until_they_are_written(replies, wanted, asked, monkeypatch):
    told = Replies(*replies)
    clock = iter(range(0, 1000, 5))  # the fourth look is twenty seconds after the beginning
    monkeypatch.setattr(pairing.requests, "get", told.get)
    monkeypatch.setattr(pairing.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(pairing.time, "monotonic", lambda: next(clock) + 0.5)
    assert pairing._kept("ws://here:8080/prefix/env/abc", "t1") == wanted
    urls = {url for url, _ in told.asked}
    assert urls == {"ws://here:8080/prefix/api/v1/nni/trial-jobs/t1"}
    assert {seconds for _, seconds in told.asked} == {20.0}
    assert len(told.asked) == asked


def test_a_trial_elsewhere_asks_nobody(monkeypatch):
    monkeypatch.setattr(pairing.requests, "get", None)
    for channel in (None, "ws://here:8080/elsewhere", ""):
        assert pairing._kept(channel, "t1") is None
