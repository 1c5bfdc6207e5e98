"""Where the figures of a record came from."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib import metadata, util
from pathlib import Path

import torch

from nni_topo.runs import provenance as module
from nni_topo.runs.provenance import provenance


def test_a_record_names_versions_and_hardware(monkeypatch):
    found = provenance()
    assert found.keys() == {"versions", "revision", "hardware"}
    versions = found["versions"]
    assert versions["python"] == platform.python_version()
    for name in ("nni", "torch", "gudhi", "numpy", "scikit-learn"):
        assert versions[name] == metadata.version(name)
    hardware = found["hardware"]
    assert (hardware["machine"], hardware["cores"]) == (platform.machine(), os.cpu_count())
    assert hardware["threads"] == torch.get_num_threads()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert provenance()["hardware"]["gpu"] is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert provenance()["hardware"]["gpu"] == "a GPU"


def test_the_revision_is_that_of_a_checkout():
    found = provenance()["revision"]
    assert found is None or re.fullmatch(r"[0-9a-f]{12}\+?", found)


def test_a_changed_file_anywhere_in_the_package_marks_the_revision(tmp_path):
    """The package is ``package``, and its ``runs`` holds the module as the real one does."""
    place, elsewhere = tmp_path / "package" / "runs" / "provenance.py", tmp_path / "package" / "maths.py"
    place.parent.mkdir(parents=True)
    place.write_bytes(Path(module.__file__).read_bytes())
    elsewhere.write_text("x = 1\n", encoding="utf-8")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], check=True)
    spec = util.spec_from_file_location("copied_provenance", place)
    copied = util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    assert re.fullmatch("[0-9a-f]{12}", copied.provenance()["revision"])
    elsewhere.write_text("x = 2\n", encoding="utf-8")
    assert re.fullmatch(r"[0-9a-f]{12}\+", copied.provenance()["revision"])
