"""The floor plan that CONTRIBUTING.md draws: no package and no folder of `network` imports one above it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import nni_topo

PACKAGE = Path(nni_topo.__file__).parent
ABOVE = {
    "compat": {"maths", "network", "recovery", "pruners", "zoo", "runs", "studies", "cli"},
    "maths": {"compat", "network", "recovery", "pruners", "zoo", "runs", "studies", "cli"},
    "network": {"recovery", "pruners", "zoo", "runs", "studies", "cli"},
    "recovery": {"pruners", "zoo", "runs", "studies", "cli"},
    "zoo": {"recovery", "pruners", "runs", "studies", "cli"},
    "pruners": {"zoo", "runs", "studies", "cli"},
    "runs": {"studies", "cli"},
    "studies": {"cli"},
}
FOLDERS = ["runtime", "layers", "attention", "graph", "channels", "speedup", "cost", "io"]


def imported(folder: Path, place: int) -> Iterator[str]:
    """What the files of a folder import, wherever in them: the names' parts at a place."""
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{name.name}" for name in node.names]
            for parts in (name.split(".") for name in names):
                if parts[0] == "nni_topo" and len(parts) > place:
                    yield parts[place]


@pytest.mark.parametrize("package", ABOVE)
def test_a_package_imports_none_above_it(package):
    found = {*imported(PACKAGE / package, 1)}
    assert found - {package}
    assert not found & ABOVE[package]


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_of_network_imports_only_those_before_it(folder):
    assert not {*imported(PACKAGE / "network" / folder, 2)} & {*FOLDERS[FOLDERS.index(folder) + 1 :]}
