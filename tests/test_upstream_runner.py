"""The script that runs NNI's tests, on a checkout of two tests."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "tools/upstream/run.py"
IDX = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")

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


@pytest.mark.slow
def test_passing_and_failing_tests_are_counted_and_nothing_is_left_in_the_checkout(tmp_path: Path) -> None:
    checkout, images, out = tmp_path / "nni", tmp_path / "images", tmp_path / "out.json"
    pruning = checkout / "test/algo/compression/pruning"
    pruning.mkdir(parents=True)
    for package in (pruning, pruning.parent):
        (package / "__init__.py").touch()
    (pruning.parents[1] / "__init__.py").write_text("import ut\n")
    (checkout / "test/ut").mkdir()
    (checkout / "test/ut/__init__.py").write_text("import os\nos.environ['TESTED'] = 'yes'\n")
    (pruning / "test_speedup_softmax.py").write_text(LOOKS_AROUND)
    images.mkdir()
    for name in IDX[1:]:
        (images / f"{name}-ubyte").write_bytes(b"other")
    (images / f"{IDX[0]}-ubyte.gz").write_bytes(gzip.compress(b"images"))
    before = sorted(checkout.rglob("*"))
    command = [sys.executable, str(SCRIPT), "--nni", str(checkout), "--fashion-mnist", str(images)]
    command += ["--only", "test_speedup_softmax"]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 passed" in done.stdout
    found = json.loads(out.read_text())
    assert (found["passed"], found["expected"], found["import_nni_topo"]) == (2, 2, True)
    assert found["files"][0]["failures"] == []
    assert sorted(checkout.rglob("*")) == before
    done = subprocess.run([*command, "--plain"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "1 of 2 passed" in done.stdout
    assert "FAILED test_speedup_softmax: test_finds_package" in done.stdout
