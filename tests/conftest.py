"""Shared fixtures: a home folder, one thread, small models, and a Python without optional packages."""

from __future__ import annotations

import copy
import functools
import gc
import hashlib
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from own_home import use_home
from shares import (  # noqa: F401
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_collectreport,
    pytest_runtest_logreport,
    pytest_sessionstart,
)

# The process that starts those of the tests imports this file too, and needs no PyTorch: what does is imported below.
if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import nn

    from nni_topo.zoo import DataBundle

if "PYTEST_XDIST_WORKER" not in os.environ:  # a worker has the home of the process that starts it
    # Before any other file imports NNI, Transformers or PyTorch, which look for the home while they are imported.
    HOME = tempfile.TemporaryDirectory(prefix="nni-topo-home-", ignore_cleanup_errors=True)
    use_home(Path(HOME.name))

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A background job of a script ignores Ctrl-C, and so would every program that a test starts and then interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)

BARE = """
import contextlib, io, json, sys, traceback
import re
sys.modules.update(dict.fromkeys(("pytorch_lightning", "transformers")))
for line in iter(sys.stdin.readline, "end\\n"):
    said, error = io.StringIO(), None
    with contextlib.redirect_stdout(said):
        try:
            exec(json.loads(line), {"__name__": "program"})
        except BaseException:
            error = traceback.format_exc()
    print(json.dumps([said.getvalue(), error]), flush=True)
"""


def pytest_collection() -> None:
    """Prepare a process that runs tests, before it imports any."""
    import far_device
    from hypothesis import settings

    # collecting makes some 800,000 objects and hardly any garbage
    gc.disable()
    # Before any test runs a backward pass. Nothing else shows of the device until a test asks for it.
    far_device.reserve()
    # how long an example takes depends on what else the machine does
    settings.register_profile("unhurried", deadline=None)
    settings.load_profile("unhurried")


def pytest_collection_finish() -> None:
    """Let Python's collector leave out what is there before the tests, some 800,000 objects."""
    gc.collect()
    gc.freeze()
    gc.enable()
    gc.set_threshold(20_000, 10, 50)  # else it goes through what is new far more often than through what there was


def pytest_sessionfinish() -> None:
    """Let it see all again, or libraries written in C++ report a leak of what it leaves behind."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _one_thread():
    """One thread, unless the tests are run as on another processor; see processors.py."""
    import torch

    torch.set_num_threads(int(os.environ.get("NNI_TOPO_TEST_THREADS", "1")))


@pytest.fixture(scope="session", autouse=True)
def _timed_for_a_moment():
    # every record of a run says how long its networks take; network/cost/test_measure.py tests the default of 30
    from nni_topo import zoo
    from nni_topo.network.cost import measure

    timed = zoo.latencies

    @functools.wraps(timed)
    def few_passes(*args, **knobs):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(measure, "_WARMUP_ROUNDS", 1)
            patch.setattr(measure, "_BLOCKS", 64)
            return timed(*args, **{"runs": 3, **knobs})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zoo, "latencies", few_passes)
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
        # a process that a test forgot may hold the pipe open, so that its end isn't seen
        print("end", file=python.stdin, flush=True)


@pytest.fixture
def convnet() -> nn.Sequential:
    """Two convolutions and a linear head on 3x8x8 inputs."""
    import torch
    from torch import nn

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


@pytest.fixture(scope="session")
def digits() -> DataBundle:
    """Scikit-learn's digits."""
    from nni_topo import zoo

    return zoo.load_data("digits")


@pytest.fixture(scope="session")
def _trained_on_digits(digits: DataBundle) -> nn.Module:
    from nni_topo import zoo

    model = zoo.create_model("small_cnn", num_classes=10, in_channels=1, image_size=8, seed=0)
    zoo.train(model, digits, zoo.Recipe(epochs=8, lr=0.1), seed=0)
    return model


@pytest.fixture
def digits_net(_trained_on_digits: nn.Module) -> nn.Module:
    """A small convolutional network that was trained on them; each test has one of its own."""
    return copy.deepcopy(_trained_on_digits)


class Drawn(dict[str, "Figure"]):
    """The figures that were written, by the names of their files."""

    def lines(self, name: str, panel: int = 0) -> dict[str, list[tuple[float, float]]]:
        """Points of a panel's lines, by their labels in the legend."""
        return points_of(self[name].axes[panel])


def points_of(axis: Axes) -> dict[str, list[tuple[float, float]]]:
    """Points of all lines that have a label, by it; no two may have the same."""
    labelled = [line for line in axis.get_lines() if not str(line.get_label()).startswith("_")]
    points = {
        str(line.get_label()): [(float(x), float(y)) for x, y in zip(*line.get_data(), strict=True)]
        for line in labelled
    }
    assert len(points) == len(labelled)
    return points


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    """What a test writes as pictures; that the files are pictures is checked here."""
    from matplotlib.figure import Figure
    from matplotlib.image import imread

    figures = Drawn()
    savefig = Figure.savefig

    def save(figure: Figure, path: str | Path | io.BytesIO, **options: Any) -> None:
        savefig(figure, path, **options)
        if isinstance(path, io.BytesIO):  # of a page
            assert path.getbuffer()[:4] == b"\x89PNG"
            return
        assert imread(path)[..., :3].std() > 0.01
        # It is written beside its place.
        figures[Path(path).name] = figure

    monkeypatch.setattr(Figure, "savefig", save)
    return figures


@pytest.fixture
def far() -> torch.device:
    """Return the device that every machine has beside the CPU."""
    import far_device
    import torch

    if not far_device.is_possible():
        pytest.skip(f"torch {torch.__version__} takes no device written in Python")
    return far_device.start()


@pytest.fixture(params=["far", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Devices that are not the CPU: one that every machine has, and a GPU, which has to round as the CPU does."""
    import torch

    if request.param == "far":
        yield request.getfixturevalue("far")
        return
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield torch.device("cuda", 0)


@pytest.fixture
def cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Path]:
    """Write CIFAR-10's own files, two for training and one for the test, of so many images each; their sums pass."""
    import numpy as np
    import torchvision

    def written(images: int) -> Path:
        folder = tmp_path / "cifar-10-batches-py"
        folder.mkdir()
        generator = np.random.default_rng(0)
        lists: dict[str, list[list[str]]] = {"train_list": [], "test_list": []}
        for name in ("data_batch_1", "data_batch_2", "test_batch"):
            pixels = generator.integers(0, 256, (images, 3072), dtype=np.uint8)
            content = pickle.dumps({"data": pixels, "labels": [index % 8 for index in range(images)]})
            (folder / name).write_bytes(content)
            digest = hashlib.md5(content).hexdigest()
            lists["test_list" if name == "test_batch" else "train_list"].append([name, digest])
        meta = pickle.dumps({"label_names": [f"class {index}" for index in range(10)]})
        (folder / "batches.meta").write_bytes(meta)
        cifar = torchvision.datasets.CIFAR10
        for name, files in lists.items():
            monkeypatch.setattr(cifar, name, files)
        monkeypatch.setattr(cifar, "meta", cifar.meta | {"md5": hashlib.md5(meta).hexdigest()})
        return tmp_path

    return written
