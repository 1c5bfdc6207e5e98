"""NNI's manager, through NNI's Python API: start, watch, read and stop experiments, with clear errors."""

from __future__ import annotations

import os
import socket
import sqlite3
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import nni
from nni.experiment import Experiment, ExperimentConfig, RunMode, rest
from nni.experiment.config.utils import unset_base_path
from nni.tools.nnictl.config_utils import Experiments
from nni.tools.nnictl.nnictl_utils import update_experiment

from nni_topo.compat import LOOPBACK, PAIRING
from nni_topo.disk import check_free_disk
from nni_topo.errors import ConfigError
from nni_topo.runs.experiment.trials import ManagerError, TrialRecord, answering, read_trials

ENDED = ("DONE", "ERROR", "STOPPED", "VIEWED")
_LOOKS = 5


def load_experiment(path: str | Path) -> ExperimentConfig:
    """Read an experiment's configuration and let NNI validate it; ConfigError if it can't be read or NNI refuses it."""
    try:
        config = ExperimentConfig.load(path)
        config.validate()
    except Exception as error:
        # NNI's parsers and checks raise any kind of error, often bare assertions
        line = traceback.extract_tb(error.__traceback__)[-1].line
        reason = str(error) or f"{type(error).__name__} at `{line}`"
        raise ConfigError(f"an experiment must be a configuration that NNI takes, got: {reason} ({path})") from error
    finally:
        # NNI doesn't do this after an error, and then refuses every other file
        unset_base_path()
    return config


def start_experiment(
    config: ExperimentConfig | None, port: int, *, resume: str | None = None, everywhere: bool = False
) -> Experiment:
    """Start NNI's manager, which starts the trials; it ends with this process, or with ``stop()``.

    ``port`` is the port of its web page and REST API; services on other machines also need the next port. ``resume``
    names a stopped or killed experiment: it continues, and runs unfinished trials again. With ``everywhere`` the
    manager listens on all interfaces, as NNI's does, which trials on other machines need. ConfigError if there is
    nothing to resume, DataError if the folder has no room, ManagerError if a port is in use or the manager doesn't
    start.
    """
    config = _stopped_config(resume) if config is None else config
    check_free_disk(Path(config.canonical_copy().experiment_working_directory))
    nni.silence_stdout()
    experiment = Experiment(config, id=resume)
    try:
        with _manager_environment(everywhere):
            if resume is None:
                experiment.start(port, run_mode=RunMode.Background)
            else:
                experiment.resume(port, wait_completion=False)
    except Exception as error:
        raise ManagerError(f"NNI's manager must start, got: {error} (port {port})") from error
    return experiment


def free_port() -> int:
    """Return a port that was free a moment ago, like the next port."""
    while True:
        with socket.socket() as one, socket.socket() as next_one, suppress(OSError, OverflowError):
            one.bind(("127.0.0.1", 0))
            port: int = one.getsockname()[1]
            next_one.bind(("127.0.0.1", port + 1))
            return port


def read_status(experiment: Experiment) -> tuple[str, list[str]]:
    """Return NNI's word for the experiment, such as ``"RUNNING"`` or ``"DONE"``, and the manager's errors."""
    with answering(experiment):
        reply = rest.get(experiment.port, "/check-status", experiment.url_prefix)
    return str(reply["status"]), [str(error) for error in reply.get("errors", ())]


def follow(
    experiment: Experiment, tell: Callable[[str, list[TrialRecord]], None], *, seconds: float = 2.0
) -> list[TrialRecord]:
    """Pass an experiment's status and trials to ``tell`` until it ends; return all trials, or raise ManagerError."""
    idle = 0
    while True:
        status, errors = read_status(experiment)
        trials = read_trials(experiment)
        tell(status, trials)
        exhausted = status == "TUNER_NO_MORE_TRIAL" and bool(trials) and all(trial.is_finished for trial in trials)
        idle = idle + 1 if exhausted else 0
        if status == "ERROR":
            reason = "; ".join(errors) or "no reason"
            raise ManagerError(f"an experiment must run to its end, got: {reason} (experiment {experiment.id})")
        # NNI waits forever if the tuner has no more proposals; its last ones may arrive a moment later
        if status in ENDED or idle == _LOOKS:
            return trials
        time.sleep(seconds)


def optimize_mode(config: ExperimentConfig) -> str:
    """Return ``"maximize"`` or ``"minimize"``, as the tuner's arguments say."""
    arguments = getattr(config.tuner, "class_args", None) or {}
    return str(arguments.get("optimize_mode", "maximize"))


@contextmanager
def opened(experiment_id: str | None, port: int | None) -> Iterator[Experiment]:
    """Give access to a running experiment, or to a stopped one through a manager in view mode.

    Without an identifier it is the experiment at ``port``, or the one started last; ConfigError without any.
    """
    nni.silence_stdout()
    entry: dict[str, Any] = {"status": "RUNNING", "port": port} if port is not None else _registered(experiment_id)
    if entry["status"] != "STOPPED":
        number = int(entry["port"])
        try:
            experiment = Experiment.connect(number)
        except Exception as error:
            raise ManagerError(f"NNI's manager must answer, got none (port {number})") from error
        yield experiment
        return
    _written_config(entry["id"])
    experiment = Experiment(None, id=entry["id"])
    with _manager_environment(everywhere=False):
        experiment.view(free_port(), non_blocking=True)
    try:
        yield experiment
    finally:
        experiment.stop()


def _registered(experiment_id: str | None) -> dict[str, Any]:
    """Return NNI's entry for an experiment, by default the one started last."""
    update_experiment()
    known = Experiments().get_all_experiments()
    if not known:
        raise ConfigError("an experiment must be one that NNI knows, got none at all (experiment)")
    if experiment_id is None:
        return dict(max(known.values(), key=lambda entry: entry["startTime"]))
    if experiment_id not in known:
        raise ConfigError(f"an experiment must be one that NNI knows, got {experiment_id!r} (experiment)")
    return dict(known[experiment_id])


def _stopped_config(experiment_id: str | None) -> ExperimentConfig:
    entry = _registered(experiment_id)
    if entry["status"] != "STOPPED":
        # After a run is killed, its manager and the trials continue.
        raise ConfigError(
            f"an experiment must have ended to be resumed, got {entry['status']}: `nnictl stop {experiment_id}` ends "
            f"it ({experiment_id})"
        )
    return _written_config(entry["id"])


def _written_config(experiment_id: str) -> ExperimentConfig:
    experiment = Experiment(None, id=experiment_id)
    try:
        experiment.load_checkpoint()
    except (sqlite3.Error, TypeError) as error:
        # NNI lists an experiment before its manager has written the configuration
        raise ConfigError(
            f"an experiment must have begun, got one killed before: run its file again ({experiment_id})"
        ) from error
    return experiment.config


@contextmanager
def _manager_environment(everywhere: bool) -> Iterator[None]:
    """Let processes started inside find this Python first; the manager pairs trials and parameters, and stays local."""
    scripts = [PAIRING] if everywhere else [PAIRING, LOOPBACK]
    options = [os.environ.get("NODE_OPTIONS", ""), *(f'--require="{script}"' for script in scripts)]
    changes = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "NODE_OPTIONS": " ".join(options).strip(),
    }
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
