"""Trained nets for trials, and experiments in homes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nni_topo.runs.experiment.manager import free_port
from nni_topo.runs.trial import TrialSettings, run_trial

SMALL = {"limit": 300, "train_epochs": 4, "ratio": 0.5}


@pytest.fixture(scope="session")
def nets(tmp_path_factory) -> Path:
    """Folder of trained nets, with one for the settings SMALL."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("nets")
    run_trial(TrialSettings(**SMALL, retrain_epochs=0), folder / "first", cache=folder)
    return folder


@pytest.fixture
def settings() -> TrialSettings:
    return TrialSettings(**SMALL)


class Home:
    """A home folder with NNI's experiments, and programs that run in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        keys = {"HOME": str(folder), "PATH": path, "OMP_NUM_THREADS": "1"}
        self.environment = {**os.environ, **keys}

    def popen(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            list(words),
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *words: str, seconds: float = 300) -> subprocess.CompletedProcess[str]:
        with self.popen(*words) as process:
            try:
                out, err = process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def topo(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-m", "nni_topo", *words)

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text)
        return path

    def rest(self, what: str, port: int | None = None) -> Any:
        """What the manager's REST API says; None while it doesn't answer."""
        try:
            url = f"http://localhost:{port or self.port}/api/v1/nni/{what}"
            with urllib.request.urlopen(url, timeout=5) as reply:
                return json.load(reply)
        except (urllib.error.URLError, ConnectionError, TimeoutError, ValueError):
            # the manager answers with its web page as long as it begins
            return None


@pytest.fixture
def wait_until() -> Callable[..., Any]:
    """A function that asks until the answer is true, and returns it."""

    def wait(condition: Callable[[], Any], seconds: float = 240) -> Any:
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.5)
        return found

    return wait


@pytest.fixture
def home(tmp_path) -> Home:
    return Home(tmp_path)
