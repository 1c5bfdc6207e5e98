"""Trials of NNI's manager, read through its REST API."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import requests
from nni.experiment import Experiment, rest

from nni_topo.errors import DataError

FAILED = ("FAILED", "SYS_CANCELED", "USER_CANCELED")
STOPPED = "STOPPED"
_UNFINISHED = ("WAITING", "RUNNING", "UNKNOWN")
_STDERR = "trial.stderr"


class ManagerError(DataError):
    """NNI's manager doesn't answer, or has given up an experiment."""


@dataclass(frozen=True)
class TrialRecord:
    """A trial of NNI's manager."""

    id: str  # NNI's
    number: int  # from 0
    status: str  # NNI's word, such as SUCCEEDED or FAILED; STOPPED if its experiment ended before it did
    parameters: dict[str, Any]  # the tuner's proposal that the trial ran: the one for which it reported its result
    result: dict[str, float]  # its last report, with the score under `default`; empty before
    folder: str  # on the trial's machine
    error: str = ""  # last line of a failed trial's standard error, if available

    @property
    def score(self) -> float | None:
        """The value that the tuner optimises; None before the final result."""
        return self.result.get("default")

    @property
    def is_candidate(self) -> bool:
        """Whether the trial can be the best one: it has succeeded and has a score."""
        return self.status == "SUCCEEDED" and self.score is not None

    @property
    def is_finished(self) -> bool:
        """Whether the trial has ended, well or not."""
        return self.status not in _UNFINISHED

    def to_dict(self) -> dict[str, Any]:
        """Return the trial as plain values."""
        return asdict(self)


def read_trials(experiment: Experiment) -> list[TrialRecord]:
    """Return all trials, by number; ManagerError if the manager doesn't answer."""
    with answering(experiment):
        # Experiment.list_trial_jobs refuses Hyperband's trials, whose parameters have no index
        jobs = rest.get(experiment.port, "/trial-jobs", experiment.url_prefix)
    ran = pair_by_result(jobs)
    return sorted((_record(experiment, job, ran[job["trialJobId"]]) for job in jobs), key=lambda trial: trial.number)


def pair_by_result(jobs: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the parameters that each trial ran, as far as the REST API's list shows them.

    NNI's manager gives the next parameters in its queue to whichever trial asks first, while its tables and the tuner
    assign them to the trial that was submitted first (``nni_node/training_service/v3/compat.js``). `compat.PAIRING`
    prevents that.
    """
    shown = {job["trialJobId"]: json.loads(job["hyperParameters"][-1]) for job in jobs if job.get("hyperParameters")}
    numbered = {str(proposal.get("parameter_id")): proposal["parameters"] for proposal in shown.values()}
    ran = {}
    for job in jobs:
        own = shown.get(job["trialJobId"], {"parameters": {}})
        # A result has the number of the proposal that ran. Without a result, or if the number is the trial's own, the
        # trial's own row is used, because NNI by itself repeats numbers when it resumes an experiment.
        number = str(((job.get("finalMetricData") or [{}])[-1]).get("parameterId"))
        is_own = number == str(own.get("parameter_id"))
        ran[job["trialJobId"]] = own["parameters"] if is_own else numbered.get(number, own["parameters"])
    return ran


def stopped(trials: Iterable[TrialRecord]) -> list[TrialRecord]:
    """Return the trials of an ended experiment; trials that NNI still calls running become stopped."""
    return [trial if trial.is_finished else replace(trial, status=STOPPED) for trial in trials]


def best_trial(trials: list[TrialRecord], *, mode: str = "maximize") -> TrialRecord:
    """Return the succeeded trial with the best score; DataError if there is none."""
    done = [trial for trial in trials if trial.is_candidate]
    if not done:
        states = ", ".join(sorted({trial.status for trial in trials})) or "no trials"
        raise DataError(f"an experiment must have a trial that succeeded, got {states} (best)")
    sign = -1.0 if mode == "minimize" else 1.0
    return max(done, key=lambda trial: sign * (trial.score or 0.0))


@contextmanager
def answering(experiment: Experiment) -> Iterator[None]:
    """Raise a :class:`ManagerError` that says what to do if a manager doesn't answer."""
    try:
        yield
    except OSError as error:
        raise ManagerError(
            f"NNI's manager must answer, got none (port {experiment.port}); if it was killed, "
            f"`nni-topo experiment run --resume {experiment.id}` goes on, and its log is "
            f"{experiment.id}/log/nnimanager.log in the folder of NNI's experiments"
        ) from error


def _record(experiment: Experiment, job: dict[str, Any], parameters: dict[str, Any]) -> TrialRecord:
    results = job.get("finalMetricData") or []
    # NNI encodes a result twice
    data = json.loads(json.loads(results[-1]["data"])) if results else {}
    result = data if isinstance(data, dict) else {"default": float(data)}
    # NNI gives the status ADD_RESUMED to a trial that a resumed experiment is about to run again.
    folder, status = job.get("logPath", ""), job["status"].replace("ADD_RESUMED", "WAITING")
    error, trial = "", job["trialJobId"]
    if status == "FAILED":
        path = Path(folder, _STDERR)
        with suppress(OSError):
            if path.exists():
                text = path.read_text(encoding="utf-8", errors="replace")
            else:
                # The manager fetches it, also from another machine.
                prefix = f"/{experiment.url_prefix}" if experiment.url_prefix else ""
                url = f"http://localhost:{experiment.port}{prefix}/api/v1/nni/trial-file/{trial}/stderr"
                reply = requests.get(url, timeout=rest.timeout)
                text = reply.text if reply.ok else ""
            error = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
    return TrialRecord(trial, job.get("sequenceId", 0), status, parameters, result, folder, error)
