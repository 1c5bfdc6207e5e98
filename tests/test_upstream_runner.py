"""The script that runs NNI's tests, on a checkout of two tests."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "tools/upstream/run.py"
IDX = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)

LOOKS_AROUND = """
import os
import sys
from pathlib import Path

def test_finds_images():
    assert os.environ["TESTED"] == "yes"
    assert Path("data/mnist/MNIST/raw/train-images-idx3-ubyte").read_bytes() == b"images"

def test_finds_package():
    assert "nni_topo" in sys.modules
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """NNI's layout with one test file in it."""
    pruning = tmp_path / "nni/test/algo/compression/pruning"
    pruning.mkdir(parents=True)
    for package in (pruning, pruning.parent, pruning.parents[1]):
        (package / "__init__.py").touch()
    (pruning.parents[1] / "__init__.py").write_text("import ut\n")
    (tmp_path / "nni/test/ut").mkdir()
    (tmp_path / "nni/test/ut/__init__.py").write_text("import os\nos.environ['TESTED'] = 'yes'\n")
    (pruning / "test_speedup_softmax.py").write_text(LOOKS_AROUND)
    return tmp_path / "nni"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in IDX[1:]:
        (folder / name).write_bytes(b"other")
    (folder / f"{IDX[0]}.gz").write_bytes(gzip.compress(b"images"))
    return folder


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_passing_tests_are_counted_and_nothing_is_left_in_the_checkout(
    checkout: Path, images: Path, tmp_path: Path
) -> None:
    before = sorted(checkout.rglob("*"))
    out = tmp_path / "out.json"
    done = run("--nni", checkout, "--fashion-mnist", images, "--only", "test_speedup_softmax", "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 passed" in done.stdout
    found = json.loads(out.read_text())
    assert (found["passed"], found["expected"], found["import_nni_topo"]) == (2, 2, True)
    assert found["files"][0]["failures"] == []
    assert found["versions"]["nni"] == "3.0"
    assert sorted(checkout.rglob("*")) == before


def test_failures_are_told(checkout: Path, images: Path) -> None:
    done = run("--nni", checkout, "--fashion-mnist", images, "--only", "test_speedup_softmax", "--plain")
    assert done.returncode == 1
    assert "1 of 2 passed" in done.stdout
    assert "FAILED test_speedup_softmax: test_finds_package" in done.stdout
