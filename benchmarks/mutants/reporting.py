"""What the mutants' runs have come to: the survivors with their lines, and a table by folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

EQUIVALENT = Path(__file__).with_name("equivalent.txt")
"""Mutants that no test can kill, looked at by hand: a key and the reason on each line."""

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
    """Return the packages, with their scores in per cent, whose score is below ``least``."""
    known = set(known)
    below = []
    for package in sorted({_package(record) for record in found.values()}):
        some = [record for record in found.values() if _package(record) == package]
        score = 100 * _score(some, known)
        if score < least:
            below.append(f"{package}: {score:.1f} %, which is below {least:g}")
    return below


def _package(record: Mapping[str, Any]) -> str:
    """Return the package of a mutated file, as nni_topo/network."""
    return "/".join(Path(record["path"]).parts[:2])


def _score(some: Sequence[Mapping[str, Any]], known: Iterable[str]) -> float:
    """Return the killed share of the mutants that a test can kill; 1 without any."""
    mortal = [record for record in some if record["state"] in KILLED or record["key"] not in known]
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
