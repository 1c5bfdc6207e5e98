"""The pages of results: links, what they must say, and the figures that other pages quote from them."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from markdown_sections import sections

import nni_topo

PROJECT = Path(__file__).parents[1]
BENCHMARKS = PROJECT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from quotes import ARCHIVE, FIRST, blocks, linked, main, quoted, stands, tables_of  # noqa: E402

sys.path.remove(str(BENCHMARKS))
FRONT = BENCHMARKS / "RESULTS.md"
RESULTS = sorted((BENCHMARKS / "results").glob("*.md"))
ARCHIVED = sorted({*(BENCHMARKS / "archive").glob("*.md")} - {ARCHIVE})
QUOTING = [*FIRST, PROJECT / "docs" / "topology_in_pruning.md", ARCHIVE]
# the rows of sources.md have a test of their own, tests/test_sources.py
OTHERS = sorted({*PROJECT.glob("docs/*.md")} - {*QUOTING, PROJECT / "docs" / "sources.md"})


@pytest.mark.parametrize("page", QUOTING, ids=lambda page: page.stem)
def test_the_figures_of_a_page_stand_in_the_tables_that_it_links(page):
    checked = 0
    for block in blocks(page):
        links = linked(block, page)
        figures = quoted(block)
        if not links:
            assert " ± " not in block, f"{page.name}: a figure without a link to its table: {block}"
            continue
        text = tables_of(block, page)
        missing = [figure for figure in figures if not stands(figure, text)]
        assert not missing, f"{page.name}: not in the linked tables: {missing}: {block}"
        checked += len(figures)
    assert checked or page.stem == "index"


@pytest.mark.parametrize("page", FIRST, ids=lambda page: page.stem)
def test_the_pages_that_are_read_first_quote_no_table_without_raw_runs(page):
    assert not {path for block in blocks(page) for path, _ in linked(block, page)} & {*ARCHIVED}


def test_the_script_for_readers_finds_every_figure(capsys):
    assert main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 80
    assert "ok  README.md  0.946  trained.md" in lines


@pytest.mark.parametrize("page", OTHERS, ids=lambda page: page.stem)
def test_figures_with_intervals_on_the_other_pages_stand_in_the_tables_that_they_link(page):
    for block in blocks(page):
        text = tables_of(block, page)
        missing = [figure for figure in quoted(block) if " ± " in figure and not stands(figure, text)]
        assert not missing, f"{page.name}: not in the linked tables: {missing}: {block}"


def test_a_figure_that_was_altered_is_noticed():
    table = "| reconstruction | 75.5 ± 0.9 | +8.6 ± 4.7 | 3 % |"
    sentence = "least squares is ahead by +8.6 ± 4.7 points with 3 % of the MACs (75.5 ± 0.9 %)"
    figures = quoted(sentence)
    assert figures == ["+8.6 ± 4.7", "3", "75.5 ± 0.9"]
    assert all(stands(figure, table) for figure in figures)
    assert quoted("from 18 to 47 % and 2.7 times, a cosine of 0.923, on ResNet-20") == ["18", "47", "2.7", "0.923"]
    for altered in ("+8.5 ± 4.7", "-8.6 ± 4.7", "8.6 ± 4", "75.5 ± 0.8", "5.5 ± 0.9", "75", "5"):
        assert not stands(altered, table), altered


def test_most_figures_of_the_pages_would_be_noticed_if_their_last_digit_changed():
    noticed = []
    for page in QUOTING:
        for block in blocks(page):
            text = tables_of(block, page)
            changed = [f"{figure[:-1]}{(int(figure[-1]) + 3) % 10}" for figure in quoted(block) if text]
            noticed += [not stands(figure, text) for figure in changed]
    assert len(noticed) > 100
    assert sum(noticed) > 0.85 * len(noticed)


@pytest.mark.parametrize("page", [FRONT, BENCHMARKS / "README.md", ARCHIVE, *RESULTS, *ARCHIVED], ids=str)
def test_links_and_pictures_of_results_exist(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)]*)\)", page.read_text(encoding="utf-8")):
        place = page.parent / target if target else page
        assert place.exists(), target
        assert not anchor or anchor in sections(place), f"{target}#{anchor}"


def test_the_page_of_the_benchmarks_names_every_script():
    text = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in BENCHMARKS.glob("*.py") if f"`{path.name}`" not in text] == []


def test_files_that_name_a_page_of_results_name_one_that_exists():
    listed = subprocess.run(["git", "-C", str(PROJECT), "ls-files"], capture_output=True, text=True, check=True)
    ends = (".py", ".md", ".yml", ".yaml", ".cff", "Makefile")
    for name in listed.stdout.split():
        path = PROJECT / name
        if not name.endswith(ends) or not path.exists() or path == Path(__file__):
            continue
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"RESULTS\.md#(?!(?:how-to-read|eight-q|what-didn|all-tables|adding))", text), name
        for page in re.findall(r"benchmarks/((?:results|archive)/\w+\.(?:md|csv))", text):
            assert (BENCHMARKS / page).exists(), f"{name}: {page}"


def test_the_front_page_is_short_and_leads_to_every_page():
    text = FRONT.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    for page, pages in ((FRONT, RESULTS), (ARCHIVE, ARCHIVED)):
        found = {path for block in blocks(page) for path, _ in linked(block, page)}
        assert found - {ARCHIVE} >= {*pages}
    (questions,) = (part for head, part in sections(FRONT).items() if head == "eight-questions")
    assert len([line for line in questions.splitlines() if line.startswith("|")]) == 2 + 8


def test_the_front_page_counts_the_comparisons():
    count = 0
    for page in RESULTS:
        head = None
        for line in page.read_text(encoding="utf-8").splitlines():
            if not line.strip().startswith("|"):
                head = None
                continue
            cells = line.strip().strip("|").split("|")
            head = head or cells
            count += sum("vs best baseline" in name and " ± " in cell for name, cell in zip(head, cells, strict=False))
    assert f"The tables hold {count} such differences" in FRONT.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", [*RESULTS, *ARCHIVED], ids=str)
@pytest.mark.quick_every(3)
def test_a_page_says_when_its_figures_were_recorded_and_which_commit_brought_them(page):
    said = re.findall(
        r"Recorded: (2026-\d\d-\d\d)(?: to 2026-\d\d-\d\d)? \(([0-9a-f, ]+)\)", page.read_text(encoding="utf-8")
    )
    assert said
    shallow = subprocess.run(
        ["git", "-C", str(PROJECT), "rev-parse", "--is-shallow-repository"], capture_output=True, text=True
    )
    if shallow.stdout.strip() != "false":
        pytest.skip("needs the project's git history")
    for commit in {each for _, commits in said for each in commits.split(", ")}:
        found = subprocess.run(["git", "-C", str(PROJECT), "merge-base", "--is-ancestor", commit, "HEAD"])
        assert found.returncode == 0, commit


def rows(name: str) -> list[dict[str, str]]:
    with (BENCHMARKS / "results" / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_short_tables_of_the_zoo_follow_from_all_rows():
    text = (BENCHMARKS / "results" / "zoo.md").read_text(encoding="utf-8")
    families: dict[str, list[dict[str, str]]] = {}
    for row in rows("zoo.csv"):
        families.setdefault(row["network"].split("/")[0], []).append(row)
    for family, found in families.items():
        least = min(found, key=lambda row: float(row["channels removed"]))
        half = sum(float(row["channels removed"]) >= 0.5 for row in found)
        largest = max(float(row["equal to"]) for row in found)
        short = f"{least['channels removed']} (`{least['network'].split('/')[1]}`)"
        assert f"| {family} | {len(found)} | {half} | {short} | {largest:.0e} |" in text
    assert f"Of the {len(rows('zoo.csv'))} networks" in text
    for row in rows("zoo_transformers.csv"):
        line = f"| {row['network'].split('/')[1]} | {row['channels removed']} | {row['unpruned layers']} |"
        assert (line in text) == (float(row["channels removed"]) < 0.5)


WORDS = r"\b[Gg]oals?\b|\b[Aa]imed\b|were allowed|before a version|[Rr]ead honestly|by a hair|were to go"


@pytest.mark.parametrize("page", [FRONT, *RESULTS, *ARCHIVED], ids=str)
def test_results_speak_of_what_was_measured_and_not_of_what_was_planned(page):
    text = re.sub(r"`[^`]*`", "", page.read_text(encoding="utf-8"))
    assert not re.search(WORDS, text)


def test_the_citation_names_the_version_of_the_package():
    cited = yaml.safe_load((PROJECT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == nni_topo.__version__
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()
