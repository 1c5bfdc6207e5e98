"""Where the figures of a record came from."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib import metadata
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


def test_packages_that_are_not_there_are_left_out(monkeypatch):
    monkeypatch.setattr(module, "_PACKAGES", ["torch", "surely-not-there", "numpy"])
    assert provenance()["versions"].keys() == {"python", "torch", "numpy"}


def test_the_processor_is_that_of_the_first_core(monkeypatch):
    texts = {"first": "processor: 0\nmodel name\t: One: 3 GHz \nmodel name: Two\n", "none": "processor: 0\n"}
    for text, wanted in ((texts["first"], "One: 3 GHz"), (texts["none"], "")):
        monkeypatch.setattr(Path, "read_text", lambda path, text=text, **knobs: text)
        assert module._processor() == wanted

    def missing(path, **knobs):
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", missing)
    assert module._processor() == platform.processor()


def test_the_revision_says_whether_files_differ(monkeypatch):
    def git(status):
        def run(command, **knobs):
            if status is None:
                raise subprocess.CalledProcessError(128, command)
            text = "0123456789ab\n" if "rev-parse" in command else status
            return subprocess.CompletedProcess(command, 0, text, "")

        return run

    for status, wanted in (("", "0123456789ab"), (" M run.py\n", "0123456789ab+"), (None, None)):
        monkeypatch.setattr(subprocess, "run", git(status))
        assert module._revision() == wanted
    monkeypatch.undo()
    found = module._revision()
    assert found is None or re.fullmatch(r"[0-9a-f]{12}\+?", found)
