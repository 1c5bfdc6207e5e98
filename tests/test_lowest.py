"""The pins of `make test-lowest` are the lower bounds of setup.cfg."""

from __future__ import annotations

import importlib.util
from importlib import metadata
from pathlib import Path

import pytest
from packaging.version import Version

PROJECT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("lowest", PROJECT / "tools" / "lowest.py")
lowest = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lowest)

CONFIG = """
[options]
install_requires =
    torch>=2.11,<2.16
    # a comment with >=
    setuptools<82

[options.extras_require]
fast =
    numba >= 0.60
test =
    %(fast)s
    dask[distributed]<2026,>=2024.8; python_version < "4"
other =
    never>=1
"""


def test_lower_bounds_of_the_package_and_the_extras_asked_for(tmp_path):
    path = tmp_path / "setup.cfg"
    path.write_text(CONFIG)
    assert lowest.constraints(path, ["test"]) == ["torch==2.11", "numba==0.60", "dask==2024.8"]
    assert lowest.constraints(path, []) == ["torch==2.11"]


def test_what_is_installed_is_not_older():
    pins = dict(line.split("==") for line in lowest.constraints(PROJECT / "setup.cfg", ["test"]))
    assert {"torch", "nni", "numpy", "pytest", "transformers"} < set(pins)
    older = [name for name, version in pins.items() if Version(metadata.version(name)) < Version(version)]
    assert older == []


@pytest.mark.parametrize("words", ["numpy", "setuptools<82"])
def test_without_a_lower_bound_there_is_no_pin(words):
    assert lowest.lowest(words) is None
