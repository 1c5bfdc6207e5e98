"""The table of systems on docs/sources.md: its tests, names, sections, commits and figures exist."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
from markdown_sections import sections

from nni_topo.cli import main

PROJECT = Path(__file__).parents[1]
PAGE = (PROJECT / "docs" / "sources.md").read_text(encoding="utf-8")


def table(heading):
    """The rows of the first table below a heading, cells by column."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [dict(zip(map(str.strip, head), row, strict=True)) for row in rows]


ROWS = table("The systems")
by_system = pytest.mark.parametrize("row", ROWS, ids=lambda row: row["system"].split(" (")[0])


@by_system
def test_a_row_names_a_test_that_exists(row):
    (path,) = re.findall(r"`(tests/[\w/]+\.py)`", row["test"])
    assert "\ndef test_" in (PROJECT / path).read_text(encoding="utf-8")


@by_system
def test_a_row_names_what_there_is(row, capsys):
    names = re.findall(r"`([^`]+)`", row["here"])
    assert names
    for name in names:
        if name.startswith("nni-topo "):
            with pytest.raises(SystemExit) as left:
                main([*name.split()[1:], "--help"])
            assert left.value.code == 0
            assert name.split()[-1] in capsys.readouterr().out
            continue
        found = importlib.import_module("nni_topo")
        for part in name.removeprefix("nni_topo.").split("."):
            found = getattr(found, part)
        assert callable(found)


# Links, settings and the numbers in names (LeNet-300-100, 12-layer) aren't results.
NO_RESULT = re.compile(r"\[.*?\]\(.*?\)|p = [\d.]+|at 0\.\d|[A-Za-z]+-\d+(?:-\d+)*|\d+-layer")
# Decimals, with their interval; layers' widths, such as 64-27; whole numbers.
FIGURE = re.compile(r"\d+\.\d+(?:e\+\d+)?(?: ± \d+\.\d+)?|\d+(?:-\d+)+|-?\d+(?!\.?\d)")


def linked(cell):
    """The text of the sections of results that a cell links to."""
    links = re.findall(r"benchmarks/((?:results|archive)/\w+\.md)(?:#([\w-]+))?\)", cell)
    return "\n".join(sections(PROJECT / "benchmarks" / page)[anchor] for page, anchor in links)


def missing_figures(cell, text):
    """The figures of a cell that don't stand in a text as numbers of their own."""
    figures = FIGURE.findall(NO_RESULT.sub("", cell))
    assert figures
    found = [re.search(rf"(?<![\d.,]){re.escape(figure)}(?!\d|[.,]\d|-\d)", text) for figure in figures]
    return [figure for figure, place in zip(figures, found, strict=True) if place is None]


@by_system
def test_the_figures_of_a_row_stand_in_the_section_that_it_links(row):
    assert missing_figures(row["our figure"], linked(row["our figure"])) == []
