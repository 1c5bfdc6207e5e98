"""The lowest versions that setup.cfg allows, as constraints for pip: ``python tools/lowest.py test > constraints.txt``.

It runs before anything is installed, so it needs Python alone.
"""

from __future__ import annotations

import re
import sys
from configparser import ConfigParser
from pathlib import Path

REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9._-]+)(?:\[[^]]*])?\s*(?P<bounds>[^;]*)")


def lowest(requirement: str) -> str | None:
    """The requirement at its lower bound; None where it has none.

    >>> lowest("dask[distributed]>=2024.8,<2026")
    'dask==2024.8'
    >>> lowest("setuptools<82")
    """
    parts = REQUIREMENT.match(requirement)
    assert parts is not None, requirement
    bound = re.search(r">=\s*([^\s,]+)", parts["bounds"])
    return f"{parts['name']}=={bound[1]}" if bound else None


def constraints(config: Path, extras: list[str]) -> list[str]:
    """One line for each requirement of the package and of its ``extras`` that has a lower bound."""
    setup = ConfigParser()
    setup.read_string(config.read_text())
    blocks = [setup["options"]["install_requires"], *(setup["options.extras_require"][extra] for extra in extras)]
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [pin for line in lines if line and (pin := lowest(line))]


if __name__ == "__main__":
    print("\n".join(constraints(Path(__file__).parents[1] / "setup.cfg", sys.argv[1:])))
