"""Where the figures of a record came from: versions, git revision, hardware."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

Record = dict[str, Any]
"""Measured values by name, as in a JSON file."""
_PACKAGES = ["nni_topo", "nni", "torch", "torchvision", "gudhi", "pyeasyga", "numpy", "scikit-learn", "torch-pruning"]


def provenance() -> Record:
    """Return versions, git revision and hardware of this process.

    The revision is of the checkout from which this package runs, with ``+`` appended if files differ; None without
    a checkout.
    """
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    git = ["git", "-C", str(Path(__file__).resolve().parents[1])]
    revision = None
    with suppress(OSError, subprocess.CalledProcessError):
        head = subprocess.check_output([*git, "rev-parse", "--short=12", "HEAD"], stderr=subprocess.DEVNULL, text=True)
        status = [*git, "status", "--porcelain", "--untracked-files=no", "."]
        differs = subprocess.check_output(status, stderr=subprocess.DEVNULL, text=True).strip()
        revision = head.strip() + ("+" if differs else "")
    processor = platform.processor()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    hardware = {
        "machine": platform.machine(),
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    return {"versions": versions, "revision": revision, "hardware": hardware}
