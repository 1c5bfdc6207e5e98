"""What the mutants' runs have come to: the survivors with their lines, and a table by folder."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

EQUIVALENT = Path(__file__).with_name("equivalent.txt")
"""Mutants that no test can kill, looked at by hand: a key and the reason on each line."""

CHANCE = 0.05
"""Probability below which a low score isn't put down to the draw."""

KILLED = ("killed", "timeout", "died")
_ROW = "{:24} {:>8} {:>8} {:>9} {:>11} {:>7}"


def records(log: Path) -> dict[str, dict[str, Any]]:
    """Read the results; of two of one mutant the later one counts."""
    lines = log.read_text().splitlines() if log.exists() else []
    return {record["key"]: record for record in map(json.loads, lines)}


def equivalents() -> dict[str, str]:
    """Read which mutants no test can kill, and why."""
    lines = EQUIVALENT.read_text().splitlines()
    return dict(line.split(maxsplit=1) for line in lines if line and not line.startswith("#"))


def report(found: Mapping[str, Mapping[str, Any]], known: Mapping[str, str]) -> str:
    """Return the survivors that aren't known to be equivalent, and the table."""
    every = sorted(found.values(), key=lambda record: (record["path"], record["line"]))
    survivors = [_survivor(r) for r in every if r["state"] not in KILLED and r["key"] not in known]
    folders = sorted({_folder(record) for record in every})
    rows = [_row(folder, [r for r in every if _folder(r) == folder], known) for folder in folders]
    header = _ROW.format("folder", "mutants", "killed", "survived", "equivalent", "score")
    return "\n".join([*survivors, "", header, *rows, _row("all", every, known)])


def shortfalls(found: Mapping[str, Mapping[str, Any]], known: Iterable[str], least: float) -> list[str]:
    """Return the packages whose tests notice less than ``least`` per cent, each with its score.

    A package is listed if a draw of as many mutants with so few of them killed has a probability below ``CHANCE``
    where ``least`` per cent of all its mutants are killed.
    """
    known = set(known)
    below = []
    for package in sorted({_package(record) for record in found.values()}):
        some = _mortal((record for record in found.values() if _package(record) == package), known)
        killed = sum(record["state"] in KILLED for record in some)
        if _probability_of_at_most(killed, len(some), least / 100) < CHANCE:
            below.append(f"{package}: {killed / len(some):.1%}, which is below {least:g} %")
    return below


def _probability_of_at_most(killed: int, drawn: int, share: float) -> float:
    """Return the binomial probability of that many killed mutants or fewer."""
    return sum(math.comb(drawn, k) * share**k * (1 - share) ** (drawn - k) for k in range(killed + 1))


def _package(record: Mapping[str, Any]) -> str:
    """Return the package of a mutated file, as nni_topo/network."""
    return "/".join(Path(record["path"]).parts[:2])


def _mortal(some: Iterable[Mapping[str, Any]], known: Iterable[str]) -> list[Mapping[str, Any]]:
    """Return the mutants that a test can kill."""
    return [record for record in some if record["state"] in KILLED or record["key"] not in known]


def _score(some: Sequence[Mapping[str, Any]], known: Iterable[str]) -> float:
    """Return the killed share of the mutants that a test can kill; 1 without any."""
    mortal = _mortal(some, known)
    killed = sum(record["state"] in KILLED for record in mortal)
    return killed / len(mortal) if mortal else 1.0


def _folder(record: Mapping[str, Any]) -> str:
    """Return the folder of a mutated file."""
    return str(Path(record["path"]).parent)


def _row(name: str, some: Sequence[Mapping[str, Any]], known: Iterable[str]) -> str:
    """Return a line of the table; the score leaves the equivalent mutants out."""
    killed = sum(r["state"] in KILLED for r in some)
    same = sum(r["state"] not in KILLED and r["key"] in known for r in some)
    return _ROW.format(name, len(some), killed, len(some) - killed - same, same, f"{_score(some, known):.1%}")


def _survivor(record: Mapping[str, Any]) -> str:
    """Return where a survivor is, how well it was looked for, and its lines."""
    left = f", {record['left_out']} left out" if record["left_out"] else ""
    looked = "no test runs it" if record["state"] == "untested" else f"{record['tests']} tests{left}"
    place = f"{record['path']}:{record['line']} {record['function']} {record['key']} ({looked})"
    return "\n".join([place, *(f"    {line}" for line in record["diff"])])
