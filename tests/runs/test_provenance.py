"""Where the figures of a record came from."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata

import torch

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
