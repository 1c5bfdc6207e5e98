"""The pages of results: their tables are what records make, and figures that other pages quote stand in them."""

from __future__ import annotations

import csv
import importlib
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from markdown_sections import sections, sections_of

from nni_topo.cli import main
from nni_topo.studies.tables import as_markdown, interval, tables_of

PROJECT = Path(__file__).parents[1]
BENCHMARKS = PROJECT / "benchmarks"
RECORDS = BENCHMARKS / "records"
sys.path.insert(0, str(BENCHMARKS))
import tables  # noqa: E402

sys.path.remove(str(BENCHMARKS))
FRONT = BENCHMARKS / "RESULTS.md"
RESULTS = sorted((BENCHMARKS / "results").glob("*.md"))
ARCHIVE = BENCHMARKS / "archive" / "README.md"
ARCHIVED = sorted({*(BENCHMARKS / "archive").glob("*.md")} - {ARCHIVE})
PAGES = [*RESULTS, *ARCHIVED]
SOURCES = PROJECT / "docs" / "sources.md"
FIRST = [PROJECT / "README.md", PROJECT / "docs" / "choosing.md", PROJECT / "docs" / "index.md", FRONT]
QUOTING = [*FIRST, PROJECT / "docs" / "topology_in_pruning.md", ARCHIVE]
OTHERS = sorted({*PROJECT.glob("docs/*.md")} - {*QUOTING, SOURCES})
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: f"{path.parent.name}/{path.stem}")


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def recorded(name: str) -> list[dict]:
    return [json.loads(line) for line in text_of(RECORDS / f"{name}.jsonl").splitlines()]


# Quoted figures: tests/test_quotes.py recomputes those of the first pages; here the links beside figures lead to the
# tables that hold them.

NUMBER = r"(?<![\w.+-])[-+]?\d[\d,]*(?:\.\d+)?"
# what a sentence claims: numbers with an interval, with decimals, with a unit, or in a list before one ("18 to 47 %")
CLAIM = re.compile(
    rf"{NUMBER} ± {NUMBER}|(?<![\w.+-])[-+]?\d+\.\d+(?:e\+\d+)?"
    rf"|{NUMBER}(?=(?:(?:,| to| and| against| or) {NUMBER})* ?(?:%|x\b|points|times|seconds))"
)


def blocks(page):
    """The paragraphs, the points of lists and the rows of tables, each in one line."""
    text = re.sub(r"```.*?```", "", text_of(page), flags=re.S)
    pieces = re.split(r"\n\s*\n|\n(?=\s*[-*|] ?)|\n(?=#)", text)
    return [" ".join(piece.split()) for piece in pieces]


def linked(block, page):
    """The sections of results, or of the archive, that a block links to."""
    links = re.findall(r"\]\(([\w./]*(?:results|archive)/\w+\.md)(?:#([\w-]+))?\)", block)
    if page == ARCHIVE:
        links += re.findall(r"\]\((\w+\.md)(?:#([\w-]+))?\)", block)
    return [((page.parent / target).resolve(), anchor) for target, anchor in links]


def quoted(block):
    """The figures of a block, without those in code and in the targets of links."""
    return CLAIM.findall(re.sub(r"`[^`]*`|\]\([^)]*\)|nni_topo \d\S*", "", block))


def stands(figure, text):
    """Whether a figure stands in a text as a number of its own."""
    return re.search(rf"(?<![\w.]){re.escape(figure)}(?!\.?\d)", text) is not None


@cache
def made_sections(path):
    """The sections of a page of results as its records make it."""
    return sections_of(tables.made_anew(path, text_of(path)))


def tables_of_block(block, page):
    """The rows of the tables that a block links to, and their titles, as the records make them."""
    lines = [line.strip() for path, anchor in linked(block, page) for line in made_sections(path)[anchor].splitlines()]
    return "\n".join(line for line in lines if line.startswith(("|", "**", "#")))


@pytest.mark.parametrize("page", QUOTING, ids=lambda page: page.stem)
def test_the_figures_of_a_page_stand_in_the_tables_that_it_links(page):
    checked = 0
    for block in blocks(page):
        links = linked(block, page)
        assert page not in FIRST or not {path for path, _ in links} & {*ARCHIVED}, "a table without raw runs"
        if not links:
            assert " ± " not in block, f"{page.name}: a figure without a link to its table: {block}"
            continue
        text = tables_of_block(block, page)
        missing = [figure for figure in quoted(block) if not stands(figure, text)]
        assert not missing, f"{page.name}: not in the linked tables: {missing}: {block}"
        checked += len(quoted(block))
    assert checked or page.stem == "index"


@pytest.mark.parametrize("page", OTHERS, ids=lambda page: page.stem)
def test_figures_with_intervals_on_the_other_pages_stand_in_the_tables_that_they_link(page):
    for block in blocks(page):
        text = tables_of_block(block, page)
        missing = [each for each in quoted(block) if " ± " in each and not stands(each, text)]
        assert not missing, f"{page.name}: not in the linked tables: {missing}: {block}"


LIVE = [*FIRST, *RESULTS, *PROJECT.glob("docs/*.md")]


@pytest.mark.parametrize("page", LIVE, ids=lambda page: f"{page.parent.name}/{page.stem}")
def test_who_says_that_a_difference_is_not_significant_says_its_interval(page):
    bare = [
        block
        for block in blocks(page)
        if re.search(r"(\bno\b|\bnot\b|n't|\bneither\b|\bnone\b)[^.]*significan", block, re.I)
        and " ± " not in block
        and '"No significant difference" means' not in block
    ]
    assert bare == []


def test_a_figure_that_was_altered_is_noticed():
    table = "| reconstruction | 75.5 ± 0.9 | +8.6 ± 4.7 | 3 % |"
    figures = quoted("least squares is ahead by +8.6 ± 4.7 points with 3 % of the MACs (75.5 ± 0.9 %)")
    assert figures == ["+8.6 ± 4.7", "3", "75.5 ± 0.9"]
    assert all(stands(figure, table) for figure in figures)
    for altered in ("+8.5 ± 4.7", "-8.6 ± 4.7", "8.6 ± 4", "75.5 ± 0.8", "5.5 ± 0.9", "75", "5"):
        assert not stands(altered, table), altered


def test_the_front_page_leads_to_every_page_and_counts_the_comparisons():
    for page, pages in ((FRONT, RESULTS), (ARCHIVE, ARCHIVED)):
        found = {path for block in blocks(page) for path, _ in linked(block, page)}
        assert found - {ARCHIVE} >= {*pages}
    count = 0
    for page in RESULTS:
        head = None
        for line in text_of(page).splitlines():
            if not line.strip().startswith("|"):
                head = None
                continue
            cells = line.strip().strip("|").split("|")
            head = head or cells
            count += sum("vs best baseline" in name and " ± " in cell for name, cell in zip(head, cells, strict=False))
    assert f"The tables hold {count} such differences" in text_of(FRONT)


# Links


@pytest.mark.parametrize("page", [FRONT, BENCHMARKS / "README.md", ARCHIVE, *PAGES], ids=str)
def test_links_and_pictures_of_results_exist(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)]*)\)", text_of(page)):
        place = page.parent / target if target else page
        assert place.exists(), target
        assert not anchor or anchor in sections(place), f"{target}#{anchor}"


def test_scripts_and_pages_of_the_benchmarks_are_named_and_exist():
    named = text_of(BENCHMARKS / "README.md")
    assert [path.name for path in BENCHMARKS.glob("*.py") if f"`{path.name}`" not in named] == []
    listed = subprocess.run(["git", "-C", str(PROJECT), "ls-files"], capture_output=True, text=True, check=True)
    for name in listed.stdout.split():
        if name.endswith((".py", ".md", ".yml", ".yaml", "Makefile")) and (PROJECT / name).exists():
            for page in re.findall(r"benchmarks/((?:results|archive)/\w+\.(?:md|csv))", text_of(PROJECT / name)):
                assert (BENCHMARKS / page).exists(), f"{name}: {page}"


@cache
def commits() -> list[str]:
    """All commits before this one; none where the history is cut off."""
    git = ["git", "-C", str(PROJECT)]
    shallow = subprocess.run([*git, "rev-parse", "--is-shallow-repository"], capture_output=True, text=True)
    if shallow.stdout.strip() != "false":
        pytest.skip("needs the project's git history")
    return subprocess.run([*git, "rev-list", "HEAD"], capture_output=True, text=True, check=True).stdout.split()


@by_page
def test_a_page_says_when_its_figures_were_recorded_and_which_commit_brought_them(page):
    said = re.findall(r"Recorded: (2026-\d\d-\d\d)(?: to 2026-\d\d-\d\d)? \(([0-9a-f, ]+)\)", text_of(page))
    assert said
    for commit in {each for _, found in said for each in found.split(", ")}:
        assert any(each.startswith(commit) for each in commits()), commit


# Tables of records


RECOMPUTED = {
    "printed/cnn_by_budget/vgg_16_at_a_quarter_of.csv",
    "printed/cnn_by_budget/vgg_16_at_a_quarter_of_2.csv",
    "printed/cnn_by_budget/vgg_16_at_its_full_width.csv",
    "printed/cnn_by_budget/vgg_16_at_its_full_width_2.csv",
    "printed/recovery/distillation_a_range_test_and_an.csv",
    "printed/recovery/which_images_of_many.csv",
    "printed/zoo/half_of_the_channels_of_every.csv",
    "printed/zoo/networks_of_transformers.csv",
    "printed/speed/cost_of_each_step.csv",
}
"""Printed cells on the pages of results: but for the last, tests below recompute them."""


@by_page
@pytest.mark.quick_every(2)
def test_a_page_is_what_its_records_make(page):
    assert tables.made_anew(page, text_of(page)) == text_of(page), "run make tables"


@by_page
def test_every_table_names_its_source(page):
    source, unnamed = None, []
    for line in text_of(page).splitlines():
        marker = re.fullmatch(r"<!-- (.+): (begin|end) -->", line)
        if marker:
            source = marker[1] if marker[2] == "begin" else None
        elif line.lstrip().startswith("|") and source is None:
            unnamed.append(line)
    assert unnamed == []
    assert page in ARCHIVED or {*tables.PRINTED.findall(text_of(page))} <= RECOMPUTED


def test_a_printed_table_is_on_a_page_and_keeps_its_cells(tmp_path):
    named = [file for path in PAGES for file in tables.PRINTED.findall(text_of(path))]
    there = (RECORDS / "printed").rglob("*.csv")
    assert sorted(named) == sorted(path.relative_to(RECORDS).as_posix() for path in there)
    file = tmp_path / "some.csv"
    file.write_text('net,|w|,found\n"a, large",-1.5 ± 0.2,yes\nb,**2**,\n', encoding="utf-8")
    assert tables.printed_table(file).splitlines() == [
        r"| net | \|w\| | found |",
        "|---|---:|---|",
        "| a, large | -1.5 ± 0.2 | yes |",
        "| b | **2** |  |",
    ]


@pytest.mark.parametrize(
    ("records", "heading", "rows"),
    [
        ("convergence", "VGG-16 at a quarter of its width: convergence", 7),
        ("convergence_full_width", "VGG-16 at its full width: convergence", 4),
    ],
)
def test_the_tables_of_convergence_are_those_of_their_records(records, heading, rows):
    page = text_of(BENCHMARKS / "results" / "cnn_by_budget.md")
    section = page.split(f"## {heading}")[1].split("\n## ")[0]
    table = as_markdown(tables_of(recorded(records)))
    found = [line for line in table.splitlines() if line.startswith("|")]
    assert len(found) == 2 * rows + 5  # two tables, the unpruned network in the first, and the heads
    assert found == [line for line in section.splitlines() if line.startswith("|")]


def test_the_table_of_chosen_images_is_that_of_its_records():
    page = text_of(BENCHMARKS / "results" / "recovery.md")
    section = page.split("## Which images of many")[1].split("\n## ")[0]
    found: dict[tuple[int, str], dict[int, list[float]]] = {}
    for record in recorded("choice"):
        seed, _, row, count = record["key"]
        runs = found.setdefault((count, row.split(",")[0]), {})
        runs.setdefault(seed, []).append(100 * record["reconstruct"])
    for count in (16, 32, 64, 128):
        means = {way: [np.mean(found[count, way][seed]) for seed in range(5)] for way in ("random", "kmeans", "cover")}
        cells = [str(count), *(interval(means[way]).show() for way in means)]
        for way in ("kmeans", "cover"):
            gain = interval(np.subtract(means[way], means["random"]))
            cells.append(f"{gain.mean:+.1f} ± {gain.show().split('± ')[1]}")
        assert f"| {' | '.join(cells)} |" in section


def test_the_table_of_distillation_is_that_of_its_records():
    records, page = recorded("distillation"), text_of(BENCHMARKS / "results" / "recovery.md")
    gains: dict[tuple[str, int], list[float]] = {}
    for net, share in sorted({(record["net"], record["flops"]) for record in records}):
        runs = [record for record in records if (record["net"], record["flops"]) == (net, share)]
        columns = [[100 * run[step] for run in runs] for step in ("reconstruct", "before", "after")]
        differences = [after - before for before, after in zip(columns[1], columns[2], strict=True)]
        for run, difference in zip(runs, differences, strict=True):
            gains.setdefault((net, run["seed"]), []).append(difference)
        gain = interval(differences)
        cells = [f"{net}, {100 * share:g} %"]
        cells += [f"{each.mean:.1f} ± {each.half:.1f}" for each in map(interval, columns)]
        cells += [f"{gain.mean:+.1f} ± {gain.half:.1f}"]
        cells += [f"{np.mean([run[step] for run in runs]):.0f}" for step in ("before_s", "after_s")]
        assert f"| {' | '.join(cells)} |" in page
    over_all = interval([float(np.mean(each)) for each in gains.values()])
    said = f"Over the six networks (mean of both costs) the change gains {over_all.mean:.1f} ± {over_all.half:.1f}"
    assert said in page


def rows_of(name: str) -> list[dict[str, str]]:
    with (BENCHMARKS / "results" / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_short_tables_of_the_zoo_follow_from_all_rows():
    text = text_of(BENCHMARKS / "results" / "zoo.md")
    families: dict[str, list[dict[str, str]]] = {}
    for row in rows_of("zoo.csv"):
        families.setdefault(row["network"].split("/")[0], []).append(row)
    for family, found in families.items():
        least = min(found, key=lambda row: float(row["channels removed"]))
        half = sum(float(row["channels removed"]) >= 0.5 for row in found)
        largest = max(float(row["equal to"]) for row in found)
        short = f"{least['channels removed']} (`{least['network'].split('/')[1]}`)"
        assert f"| {family} | {len(found)} | {half} | {short} | {largest:.0e} |" in text
    assert f"Of the {len(rows_of('zoo.csv'))} networks" in text
    for row in rows_of("zoo_transformers.csv"):
        line = f"| {row['network'].split('/')[1]} | {row['channels removed']} | {row['unpruned layers']} |"
        assert (line in text) == (float(row["channels removed"]) < 0.5)


OLD = 100
"""Commits of compat and network after which a run of NNI's own tests says little about the code."""


def test_an_old_run_of_nnis_own_tests_is_dated_on_the_readme():
    upstream = importlib.import_module("tools.upstream.run")
    records = json.loads(text_of(RECORDS / "upstream.json"))
    assert all(record["files"] == upstream.TESTS for record in records.values())
    assert {record["expected"] for record in records.values()} == {sum(upstream.TESTS.values())}
    assert commits()
    ages = {version: upstream.commits() - record["commits"] for version, record in records.items()}
    hint = "make upstream UPSTREAM=--record"
    assert min(ages.values()) <= OLD, f"commits of compat and network since NNI's own tests ran: {ages}: {hint}"
    for version, age in ages.items():
        dated = f"on {version} all {records[version]['passed']} did in the run of {records[version]['date']}"
        assert age <= OLD or dated in text_of(PROJECT / "README.md"), f"README.md must say: {dated}, or {hint}"


# The table of systems on docs/sources.md


def systems() -> list[dict[str, str]]:
    """The rows of the table, cells by column."""
    section = text_of(SOURCES).split("\n## The systems\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [dict(zip(head, row, strict=True)) for row in rows]


by_system = pytest.mark.parametrize("row", systems(), ids=lambda row: row["system"].split(" (")[0])


@by_system
def test_a_row_names_what_there_is(row, capsys):
    (path,) = re.findall(r"`(tests/[\w/]+\.py)`", row["test"])
    assert "\ndef test_" in text_of(PROJECT / path)
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


@by_system
def test_the_figures_of_a_row_stand_in_the_section_that_it_links(row):
    links = re.findall(r"benchmarks/((?:results|archive)/\w+\.md)(?:#([\w-]+))?\)", row["our figure"])
    text = "\n".join(sections(BENCHMARKS / page)[anchor] for page, anchor in links)
    figures = FIGURE.findall(NO_RESULT.sub("", row["our figure"]))
    assert figures
    for figure in figures:
        assert re.search(rf"(?<![\d.,]){re.escape(figure)}(?!\d|[.,]\d|-\d)", text), figure
