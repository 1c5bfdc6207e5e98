"""NNI's own experiments run in the environment that the install gives, without importing the package."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

CONFIG = """
searchSpace:
  x: {{_type: choice, _value: [1, 2, 3]}}
trialCommand: {python} trial.py
trialCodeDirectory: .
trialConcurrency: 1
maxTrialNumber: 2
tuner: {{name: Random}}
trainingService: {{platform: local}}
experimentWorkingDirectory: {home}
"""
SECONDS = 120


def nnictl(home: Path, *arguments: str) -> str:
    script = Path(sys.executable).with_name("nnictl")
    environment = {**os.environ, "HOME": str(home), "PATH": f"{script.parent}{os.pathsep}{os.environ['PATH']}"}
    run = subprocess.run(
        [str(script), *arguments], cwd=home, env=environment, capture_output=True, text=True, timeout=SECONDS
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def trials(port: int) -> list[dict[str, Any]]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/nni/trial-jobs", timeout=5) as reply:
            found: list[dict[str, Any]] = json.load(reply)
            return found
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return []


def create(home: Path, deadline: float) -> int:
    """Start the experiment; nnictl gives its manager some four seconds, which a busy machine may not keep."""
    while True:
        port = free_port()
        try:
            nnictl(home, "create", "--config", "config.yml", "--port", str(port))
            return port
        except AssertionError as error:
            if "Connection refused" not in str(error) or time.monotonic() > deadline:
                raise


@pytest.mark.slow
def test_version(tmp_path: Path) -> None:
    assert nnictl(tmp_path, "--version").strip() == "3.0"


@pytest.mark.slow
def test_two_trials_on_this_machine(tmp_path: Path) -> None:
    (tmp_path / "trial.py").write_text("import nni\nnni.report_final_result(nni.get_next_parameter()['x'])\n")
    (tmp_path / "config.yml").write_text(CONFIG.format(python=sys.executable, home=tmp_path / "experiments"))
    deadline = time.monotonic() + SECONDS
    port = create(tmp_path, deadline)
    try:
        while time.monotonic() < deadline:
            states = [job["status"] for job in trials(port)]
            if len(states) == 2 and not {"WAITING", "RUNNING", "UNKNOWN"} & set(states):
                break
            time.sleep(1)
        assert states == ["SUCCEEDED"] * 2
    finally:
        nnictl(tmp_path, "stop", "--port", str(port))
    while trials(port) and time.monotonic() < deadline:
        time.sleep(1)
    assert trials(port) == []
