"""Recompute from raw records every figure that README, choosing.md, index.md and RESULTS.md quote.

    python benchmarks/quotes.py          # a line for each figure; exit code 1 if one isn't what its records make

The pages of ``results/`` are made anew in memory from ``records/``, means and intervals included. A figure on one of
the four pages must stand in a table of the section that its sentence links to. It takes some seconds.
"""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path

import tables

BENCHMARKS = Path(__file__).resolve().parent
PROJECT = BENCHMARKS.parent
sys.path.append(str(PROJECT / "tests"))
from markdown_sections import sections_of  # noqa: E402

ARCHIVE = BENCHMARKS / "archive" / "README.md"
FIRST = (
    PROJECT / "README.md",
    PROJECT / "docs" / "choosing.md",
    PROJECT / "docs" / "index.md",
    BENCHMARKS / "RESULTS.md",
)
NUMBER = r"(?<![\w.+-])[-+]?\d[\d,]*(?:\.\d+)?"
# what a sentence claims: numbers with an interval, with decimals, with a unit, or in a list before one ("18 to 47 %")
FIGURE = re.compile(
    rf"{NUMBER} ± {NUMBER}|(?<![\w.+-])[-+]?\d+\.\d+(?:e\+\d+)?"
    rf"|{NUMBER}(?=(?:(?:,| to| and| against| or) {NUMBER})* ?(?:%|x\b|points|times|seconds))"
)


def blocks(page: Path) -> list[str]:
    """Return the paragraphs, the points of lists and the rows of tables, each in one line."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    pieces = re.split(r"\n\s*\n|\n(?=\s*[-*|] ?)|\n(?=#)", text)
    return [" ".join(piece.split()) for piece in pieces]


def linked(block: str, page: Path) -> list[tuple[Path, str]]:
    """Return the sections of results, or of the archive, that a block links to."""
    links = re.findall(r"\]\(([\w./]*(?:results|archive)/\w+\.md)(?:#([\w-]+))?\)", block)
    if page == ARCHIVE:
        links += re.findall(r"\]\((\w+\.md)(?:#([\w-]+))?\)", block)
    return [((page.parent / target).resolve(), anchor) for target, anchor in links]


def quoted(block: str) -> list[str]:
    """Return the figures of a block, without those in code and in the targets of links."""
    return FIGURE.findall(re.sub(r"`[^`]*`|\]\([^)]*\)|nni_topo \d\S*", "", block))


def stands(figure: str, text: str) -> bool:
    """Return whether a figure stands in a text as a number of its own."""
    return re.search(rf"(?<![\w.]){re.escape(figure)}(?!\.?\d)", text) is not None


@cache
def made_sections(path: Path) -> dict[str, str]:
    """Return the sections of a page of results as its records make it."""
    return sections_of(tables.made_anew(path, path.read_text(encoding="utf-8")))


def tables_of(block: str, page: Path) -> str:
    """Return the rows of the tables that a block links to, and their titles, as the records make them."""
    lines = [line.strip() for path, anchor in linked(block, page) for line in made_sections(path)[anchor].splitlines()]
    return "\n".join(line for line in lines if line.startswith(("|", "**")))


def main() -> int:
    """Print each figure with the table that it is in; return how many are in none."""
    missing = 0
    for page in FIRST:
        for block in blocks(page):
            links = linked(block, page)
            text = tables_of(block, page)
            for figure in quoted(block) if links else ():
                found = stands(figure, text)
                missing += not found
                places = ", ".join(f"{path.name}#{anchor}" if anchor else path.name for path, anchor in links)
                print(f"{'ok' if found else 'NOT FOUND'}  {page.name}  {figure}  {places}")
    print(f"{missing} figures aren't what the records make")
    return int(missing > 0)


if __name__ == "__main__":
    sys.exit(main())
