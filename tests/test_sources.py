"""The table of systems on docs/sources.md: its tests, names, sections, commits and figures exist."""

from __future__ import annotations

import importlib
import re
import subprocess
from pathlib import Path

import pytest
from markdown_sections import sections

from nni_topo.cli import main

PROJECT = Path(__file__).parents[1]
PAGE = (PROJECT / "docs" / "sources.md").read_text(encoding="utf-8")
SYSTEMS = 15


def table(heading):
    """The rows of the first table below a heading, cells by column."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [dict(zip(map(str.strip, head), row, strict=True)) for row in rows]


ROWS = table("The systems")
by_system = pytest.mark.parametrize("row", ROWS, ids=lambda row: row["system"].split(" (")[0])


def test_there_is_a_row_per_system_and_no_other():
    assert len({row["system"] for row in ROWS}) == len(ROWS) == SYSTEMS


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


@by_system
def test_the_figures_of_a_row_stand_in_the_section_that_it_links(row):
    links = re.findall(r"benchmarks/(results/\w+\.md)(?:#([\w-]+))?\)", row["our figure"])
    text = "\n".join(sections(PROJECT / "benchmarks" / page)[anchor] for page, anchor in links)
    said = re.sub(r"\[.*?\]\(.*?\)|p = [\d.]+|at 0\.\d", "", row["our figure"])
    figures = re.findall(r"\d+\.\d+(?:e\+\d+)?(?: ± \d+\.\d+)?|-\d{4}", said)
    assert figures
    missing = [figure for figure in figures if not re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d)", text)]
    assert not missing, f"not in {links}: {', '.join(missing)}"


@by_system
def test_a_row_names_a_commit(row):
    assert re.fullmatch(r"[0-9a-f]{7,}", row["since"])
    shallow = subprocess.run(
        ["git", "-C", str(PROJECT), "rev-parse", "--is-shallow-repository"], capture_output=True, text=True
    )
    if shallow.stdout.strip() != "false":
        pytest.skip("needs the project's git history")
    found = subprocess.run(["git", "-C", str(PROJECT), "merge-base", "--is-ancestor", row["since"], "HEAD"])
    assert found.returncode == 0
