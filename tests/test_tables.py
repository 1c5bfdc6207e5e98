"""The tables of the results' pages are those of their records."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
RESULTS = sorted((BENCHMARKS / "results").glob("*.md"))
PAGES = [*RESULTS, *sorted({*(BENCHMARKS / "archive").glob("*.md")} - {BENCHMARKS / "archive" / "README.md"})]
NAMES = [f"{path.parent.name}/{path.stem}" for path in PAGES]
RECORDED = {
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
"""Printed cells on the pages of results: but for the last, tests/test_records.py and test_results.py recompute them."""


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("tables")


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
@pytest.mark.quick_every(2)
def test_a_page_is_what_its_records_make(tables: ModuleType, path: Path) -> None:
    page = path.read_text(encoding="utf-8")
    assert tables.made_anew(path, page) == page, "run make tables"


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_every_table_names_its_source(path: Path) -> None:
    source, unnamed = None, []
    for line in path.read_text(encoding="utf-8").splitlines():
        marker = re.fullmatch(r"<!-- (.+): (begin|end) -->", line)
        if marker:
            source = marker[1] if marker[2] == "begin" else None
        elif line.lstrip().startswith("|") and source is None:
            unnamed.append(line)
    assert unnamed == []


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_tables_without_raw_runs_are_in_the_archive(tables: ModuleType, path: Path) -> None:
    assert {*tables.PRINTED.findall(path.read_text(encoding="utf-8"))} <= RECORDED


def test_every_printed_table_is_on_a_page(tables: ModuleType) -> None:
    named = [file for path in PAGES for file in tables.PRINTED.findall(path.read_text(encoding="utf-8"))]
    there = (BENCHMARKS / "records" / "printed").rglob("*.csv")
    assert sorted(named) == sorted(path.relative_to(BENCHMARKS / "records").as_posix() for path in there)


def test_a_printed_table_keeps_its_cells(tables: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "some.csv"
    file.write_text('net,|w|,found\n"a, large",-1.5 ± 0.2,yes\nb,**2**,\n', encoding="utf-8")
    assert tables.printed_table(file).splitlines() == [
        r"| net | \|w\| | found |",
        "|---|---:|---|",
        "| a, large | -1.5 ± 0.2 | yes |",
        "| b | **2** |  |",
    ]
