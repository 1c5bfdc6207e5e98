"""Ordinary ways of working, each with a check of its own: jobs on networks of public packages and published papers.

Each topic is a file `roads_TOPIC.py` in this folder with a list `ROADS`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from reliability.serving import Outcome, outcome_of


@dataclass(frozen=True)
class Road:
    """A job and the check of its result.

    ``run`` returns if the result is right. It raises a WrongError, UnsaidError or ChangedError if it isn't, a
    WholeError if nothing was removed and a reason is given; an error of the package counts as refused.
    """

    topic: str
    name: str
    run: Callable[[], None]


def all_roads() -> list[Road]:
    """Return the roads of all topics."""
    files = sorted(Path(__file__).parent.glob("roads_*.py"))
    return [road for file in files for road in importlib.import_module(f"reliability.{file.stem}").ROADS]


def follow(road: Road, *, seconds: int = 120) -> Outcome:
    """Do a road's job; return what came of it."""
    kind, text = outcome_of(road.run, seconds)
    return Outcome(road.topic, road.name, kind, " ".join(text.split())[:600])
