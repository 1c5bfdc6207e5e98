"""NNI's own experiments run in the environment that the install gives: its programs don't import the package."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from nni_topo import compat
from nni_topo.runs.experiment.manager import free_port

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


def nnictl(home: Path, *arguments: str, **variables: str) -> str:
    script = Path(sys.executable).with_name("nnictl")
    path = f"{script.parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "HOME": str(home), "PATH": path, **variables}
    run = subprocess.run(
        [str(script), *arguments], cwd=home, env=environment, capture_output=True, text=True, timeout=SECONDS
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def trials(port: int) -> list[dict[str, Any]]:
    try:
        with urllib.request.urlopen(f"http://localhost:{port}/api/v1/nni/trial-jobs", timeout=5) as reply:
            found: list[dict[str, Any]] = json.load(reply)
            return found
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return []


def create(home: Path, deadline: float, **variables: str) -> int:
    """Start the experiment; nnictl gives its manager some four seconds, which a busy machine may not keep."""
    while True:
        port = free_port()
        try:
            nnictl(home, "create", "--config", "config.yml", "--port", str(port), **variables)
            return port
        except AssertionError as error:
            if "Connection refused" not in str(error) or time.monotonic() > deadline:
                raise


def status(port: int, host: str) -> int:
    """The status of the manager's answer to a request for a host."""
    connection = http.client.HTTPConnection("localhost", port, timeout=60)
    connection.request("GET", "/api/v1/nni/check-status", headers={"Host": host})
    return connection.getresponse().status


def listeners(port: int) -> set[str]:
    """Hexadecimal addresses on which something listens at a port."""
    lines = [line.split() for table in ("tcp", "tcp6") for line in Path("/proc/net", table).read_text().splitlines()]
    local = [line[1].split(":") for line in lines if line[3] == "0A"]
    return {address for address, number in local if int(number, 16) == port}


ALL_INTERFACES = {"0" * 32, "0" * 8}
THIS_MACHINE = {"0" * 24 + "01000000", "0100007F"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "addresses"),
    [({}, ALL_INTERFACES), ({"NODE_OPTIONS": f'--require="{compat.LOOPBACK}"'}, THIS_MACHINE)],
    ids=["as it is", "bound"],
)
def test_two_trials_on_this_machine(tmp_path: Path, variables: dict[str, str], addresses: set[str]) -> None:
    (tmp_path / "trial.py").write_text("import nni\nnni.report_final_result(nni.get_next_parameter()['x'])\n")
    (tmp_path / "config.yml").write_text(CONFIG.format(python=sys.executable, home=tmp_path / "experiments"))
    assert nnictl(tmp_path, "--version").strip() == "3.0"
    deadline = time.monotonic() + SECONDS
    port = create(tmp_path, deadline, **variables)
    try:
        if sys.platform == "linux":
            found = listeners(port)
            assert found
            assert found <= addresses
        assert status(port, f"localhost:{port}") == 200
        assert status(port, "rebound.example") == (200 if addresses is ALL_INTERFACES else 403)
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
