"""The wheel and the source distribution, built and installed in a fresh folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent
PIP = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
PROGRAM = """
import json, pathlib, nni_topo
folder = pathlib.Path(nni_topo.__file__).parent
files = [path.relative_to(folder).as_posix() for path in folder.rglob("*.*") if path.parent.name != "__pycache__"]
print(json.dumps([str(folder), nni_topo.__version__, files]))
"""


def run(words, **settings):
    done = subprocess.run(words, capture_output=True, text=True, check=False, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with both, built from a copy, for a build writes beside the sources."""
    source, made = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("nni_topo_command.py", "pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(PROJECT / name, source)
    shutil.copytree(PROJECT / "nni_topo", source / "nni_topo", ignore=shutil.ignore_patterns("__pycache__"))
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(made), str(source)])
    return made


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["*.whl", "*.tar.gz"])
def test_what_is_built_installs_and_runs_in_a_fresh_folder(pattern, built, tmp_path):
    (package,) = built.glob(pattern)
    installed, empty = tmp_path / "installed", tmp_path / "empty"
    empty.mkdir()
    run([*PIP, "--target", str(installed), str(package)])
    here = {"cwd": empty, "env": {**os.environ, "PYTHONPATH": str(installed)}}
    folder, version, files = json.loads(run([sys.executable, "-c", PROGRAM], **here))
    assert Path(folder) == installed / "nni_topo"
    wanted = [path.relative_to(PROJECT / "nni_topo").as_posix() for path in (PROJECT / "nni_topo").rglob("*.*")]
    assert sorted(files) == sorted(each for each in wanted if "__pycache__/" not in each)
    assert version in package.name
    assert "shrink" in run([sys.executable, str(installed / "bin" / "nni-topo"), "--help"], **here)
    assert not list(empty.iterdir())
