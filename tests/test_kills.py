"""Long jobs that are killed and begun again; `tests/kills.py` kills them more often, and others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("jobs", "kills"),
    [
        pytest.param("comparison recovery rounds trial", 5, marks=pytest.mark.slow),
    ],
)
def test_killed_jobs_end_as_if_nothing_had_been(jobs, kills):
    # a process of its own: it forks, which one with threads mustn't
    command = [sys.executable, str(Path(__file__).with_name("kills.py")), *jobs.split(), "--kills", str(kills)]
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=os.environ | paths, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("all the same") == len(jobs.split())
