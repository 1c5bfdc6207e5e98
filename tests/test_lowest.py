"""The pins of `make test-lowest` are the lower bounds of setup.cfg."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from packaging.version import Version

from tools import lowest

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
    pins = dict(line.split("==") for line in lowest.constraints(Path(__file__).parents[1] / "setup.cfg", ["test"]))
    assert {"torch", "nni", "numpy", "pytest", "transformers"} < set(pins)
    older = [name for name, version in pins.items() if Version(metadata.version(name)) < Version(version)]
    assert older == []
