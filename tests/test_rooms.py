"""The floor plan: which part of the package may know which; CONTRIBUTING.md draws it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import nni_topo

PACKAGE = Path(nni_topo.__file__).parent
MOST_ROOMS, MOST_FLOORS = 19, 10


def imported(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "nni_topo":
            yield from (f"nni_topo.{name.name}" for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@cache
def plan() -> dict[str, set[str]]:
    """Rooms, the files and folders at the top of the package, and those that each one imports."""
    rooms: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        parts = [name.split(".") for name in imported(path) if name.split(".")[0] == "nni_topo"]
        rooms.setdefault(room, set()).update(part[1] if len(part) > 1 else "__init__" for part in parts)
    known = rooms.keys()
    return {
        room: {other if other in known else "__init__" for other in found} - {room} for room, found in rooms.items()
    }


def test_rooms_and_floors_are_few_and_no_import_goes_in_a_circle():
    rooms = plan()
    climbing: list[str] = []

    @cache
    def floor(room: str) -> int:
        assert room not in climbing, f"a circle: {' -> '.join([*climbing, room])}"
        climbing.append(room)
        found = 1 + max(map(floor, rooms[room]), default=0)
        climbing.pop()
        return found

    assert len(rooms) <= MOST_ROOMS
    assert max(map(floor, rooms)) <= MOST_FLOORS


@pytest.mark.parametrize(
    ("room", "strangers"),
    [
        ("compat", {"maths", "network", "recovery", "pruners", "zoo", "runs", "studies", "cli"}),
        ("maths", {"compat", "network", "recovery", "pruners", "zoo", "runs", "studies", "cli"}),
        ("network", {"recovery", "pruners", "zoo", "runs", "studies", "cli"}),
        ("recovery", {"pruners", "zoo", "runs", "studies", "cli"}),
        ("zoo", {"recovery", "pruners", "runs", "studies", "cli"}),
        ("pruners", {"zoo", "runs", "studies", "cli"}),
        ("runs", {"studies", "cli"}),
        ("studies", {"cli"}),
    ],
)
def test_a_room_knows_nobody_above_it(room, strangers):
    assert not plan()[room] & strangers


FOLDERS = ["runtime", "layers", "attention", "graph", "channels", "speedup", "cost", "io"]


def test_each_folder_of_network_imports_only_those_before_it():
    network = PACKAGE / "network"
    assert sorted(path.name for path in network.iterdir() if path.name not in ("__init__.py", "__pycache__")) == sorted(
        FOLDERS
    )
    for path in network.rglob("*.py"):
        folder = path.relative_to(network).parts[0]
        for name in imported(path) if folder in FOLDERS else ():
            parts = name.split(".")
            if parts[:2] != ["nni_topo", "network"] or len(parts) < 3 or parts[2] == folder:
                continue
            assert FOLDERS.index(parts[2]) < FOLDERS.index(folder), f"{path.name} imports {name}"
