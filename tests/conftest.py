"""Shared fixtures: one thread, small models, and a Python without optional packages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import settings
from torch import nn

# how long an example takes depends on what else the machine does
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

BARE = """
import contextlib, io, json, sys, traceback
sys.modules.update(dict.fromkeys(("numba", "pytorch_lightning", "transformers")))
for line in sys.stdin:
    said, error = io.StringIO(), None
    with contextlib.redirect_stdout(said):
        try:
            exec(json.loads(line), {"__name__": "program"})
        except BaseException:
            error = traceback.format_exc()
    print(json.dumps([said.getvalue(), error]), flush=True)
"""


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _children_import_no_trainers():
    # a child that needs Lightning or Transformers takes the variable out; the others start in half the time
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NNI_TOPO_EVALUATORS", "torch")
        yield


@pytest.fixture(scope="session")
def bare_python() -> Iterator[Callable[[str], str]]:
    """Run a program in a Python without optional packages and with a hash seed of its own; give what it prints.

    All programs share one interpreter, since a new one takes seconds to import PyTorch and NNI.
    """
    words = [sys.executable, "-W", "ignore", "-c", BARE]
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True) as python:

        def run(program: str) -> str:
            assert python.stdin is not None
            assert python.stdout is not None
            print(json.dumps(program), file=python.stdin, flush=True)
            said: str
            said, error = json.loads(python.stdout.readline())
            assert error is None, error
            return said

        yield run
        python.stdin.close()


@pytest.fixture
def convnet() -> nn.Sequential:
    """Two convolutions and a linear head on 3x8x8 inputs."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    )
