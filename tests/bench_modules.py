"""Modules of ``benchmarks/``, which is not a package, for the tests of one file."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@contextmanager
def imported(folder: Path, name: str) -> Iterator[ModuleType]:
    """Import a module of a folder, and forget it afterwards: another folder may have one of that name."""
    sys.path.insert(0, str(folder))
    try:
        yield importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop(name, None)
