"""Write the tables of benchmarks/results/ and benchmarks/archive/ from the records, and draw the forest plot.

    python benchmarks/tables.py          # or: make tables
    python benchmarks/tables.py --check  # write nothing; exit code 1 if a page isn't what its records make

Each table of a page stands between two comments that name its source: the benchmark that makes it from records, or a
file of ``records/printed/``. Those hold the cells of tables whose runs kept no records, as the benchmark printed them;
such tables are in the archive.
"""

from __future__ import annotations

import argparse
import csv
import functools
import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

from nni_topo.studies.records import Record, read_records
from nni_topo.studies.tables import Interval

BENCHMARKS = Path(__file__).parent
RESULTS, ARCHIVE, RECORDS = (BENCHMARKS / name for name in ("results", "archive", "records"))
PRINTED = re.compile(r"<!-- benchmarks/records/(printed/[\w/]+\.csv): begin -->")
LEVEL = 0.05  # of p-values
WIDE = 1.0  # points: half of an interval that leaves a question open and is longer than this is called wide
_NUMBER = re.compile(r"[*+<-]*\d|$")
HYPOTHESES = (
    "which_filters",
    "which_filters_exact",
    "which_images",
    "how_many_filters",
    "which_widths",
    "which_blocks",
    "which_blocks_zigzag",
    "which_ratio",
    "which_ratio_scenes",
    "which_loss",
    "which_clouds",
    "which_estimate",
)


def main() -> int:
    """Write the pages, or name those that differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    differ = 0
    for path in [*sorted(RESULTS.glob("*.md")), *sorted(ARCHIVE.glob("*.md"))]:
        page = path.read_text(encoding="utf-8")
        made = made_anew(path, page)
        if made != page:
            differ += 1
            print(f"{'differs' if options.check else 'written'}: {path.relative_to(BENCHMARKS.parent)}")
            if not options.check:
                path.write_text(made, encoding="utf-8")
    forest = module_of("selection/forest.py")
    if not forest.is_current():
        differ += 1
        print(f"{'differs' if options.check else 'drawn'}: {forest.PICTURE.relative_to(BENCHMARKS.parent)}")
        if not options.check:
            forest.draw()
    return int(options.check and differ > 0)


def made_anew(path: Path, page: str) -> str:
    """Return the text of a page with all its tables made from their records."""
    for file in PRINTED.findall(page):
        page = with_tables(page, f"benchmarks/records/{file}", printed_table(RECORDS / file))
    if path.parent == RESULTS and path.stem in _MAKERS:
        for make in _MAKERS[path.stem]():
            page = make(page)
    return page


def with_tables(page: str, source: str, tables: str) -> str:
    """Return a page with new text between the two comments that name a source; ValueError if there are none."""
    begin, end = (f"<!-- {source}: {word} -->" for word in ("begin", "end"))
    before, _, rest = page.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"a page must have {begin} and {end}")
    return f"{before}{begin}\n\n{tables}\n\n{end}{after}"


def holm(values: Sequence[float]) -> list[float]:
    """Return p-values corrected by Holm's method, in the order given."""
    order = sorted(range(len(values)), key=values.__getitem__)
    corrected = [1.0] * len(values)
    largest = 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - rank) * values[place]))
        corrected[place] = largest
    return corrected


def outcome(points: Interval, p: float, ahead: str = "win", behind: str = "loss") -> str:
    """Return the outcome of a comparison from its interval in points and its corrected p-value."""
    if p < LEVEL:
        return ahead if points.mean > 0 else behind
    return "open, wide" if points.half > WIDE else "open"


def printed_table(path: Path) -> str:
    """Return a table of the cells in a file, columns of numbers on the right."""
    with path.open(encoding="utf-8", newline="") as lines:
        head, *rows = ([cell.replace("|", r"\|") for cell in line] for line in csv.reader(lines))
    rule = []
    for column in zip(*rows, strict=True):
        numbers = sum(_NUMBER.match(cell) is not None for cell in column)
        rule.append("---:" if 2 * numbers > len(column) else "---")
    return "\n".join([f"| {' | '.join(head)} |", f"|{'|'.join(rule)}|", *(f"| {' | '.join(row)} |" for row in rows)])


def module_of(path: str) -> ModuleType:
    """Return a benchmark's module; others that it imports lie beside it or in benchmarks/."""
    file = BENCHMARKS / path
    name = "tables_" + re.sub(r"\W", "_", path)
    if name not in sys.modules:
        before = list(sys.path)
        sys.path[:0] = [str(file.parent), str(BENCHMARKS), str(BENCHMARKS.parent)]
        try:
            spec = importlib.util.spec_from_file_location(name, file)
            assert spec is not None
            assert spec.loader is not None
            sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])
        finally:
            sys.path[:] = before
    return sys.modules[name]


def _of_jsonl(path: str, file: str, table: str = "table", title: str = "") -> Callable[[str], str]:
    """Return what writes a benchmark's table of all records in a file into a page, under the name of its source."""
    module, source = module_of(path), f"benchmarks/{path}" + (f", {title}" if title else "")
    records = functools.partial(read_records, RECORDS / file)
    return lambda page: with_tables(page, source, getattr(module, table)(records()))


def _clustering() -> Iterator[Callable[[str], str]]:
    def records(*names: str) -> list[Record]:
        return [record for name in names for record in read_records(RECORDS / f"{name}.jsonl")]

    rules = module_of("clustering/subcluster_rules.py")
    yield lambda page: with_tables(
        page, "benchmarks/clustering/subcluster_rules.py", "\n".join(rules.tables(records("subcluster_rules")))
    )
    parts, bounds = module_of("clustering/subcluster_report.py"), module_of("clustering/bounds_report.py")
    yield lambda page: parts.with_part_tables(page, records("subcluster_networks", "subcluster_parts"))
    yield lambda page: bounds.with_bounds(page, records("bounds"))


def _criteria() -> Iterator[Callable[[str], str]]:
    module = module_of("selection/forest.py")
    yield lambda page: with_tables(page, module.SOURCE, module.tables())


def _export() -> Iterator[Callable[[str], str]]:
    module = module_of("export/bench_runtimes.py")
    yield lambda page: with_tables(page, module.SOURCE, module.tables(RECORDS / "runtimes"))
    yield _of_jsonl("export/bench_int8.py", "int8.jsonl", "tables")
    yield _of_jsonl("export/zoo_imports.py", "zoo_imports.jsonl")
    yield _of_jsonl("files/vendors.py", "vendors.jsonl")
    yield _of_jsonl("export/bench_multiples.py", "multiples.jsonl")


def _fresh_networks() -> Iterator[Callable[[str], str]]:
    module = module_of("fresh_networks/report.py")
    yield lambda page: with_tables(page, module.SOURCE, module.tables(module.read()))


def _gpu() -> Iterator[Callable[[str], str]]:
    module = module_of("speed/bench_cuda.py")
    documents = json.loads((RECORDS / "cuda.json").read_text(encoding="utf-8"))
    yield lambda page: with_tables(page, module.SOURCE, module.page_tables(documents))


def _named_pruners() -> Iterator[Callable[[str], str]]:
    module = module_of("selection/bench_named.py")
    yield lambda page: with_tables(page, module.SOURCE, module.tables())


def _packages() -> Iterator[Callable[[str], str]]:
    module = module_of("packages/report.py")
    for name in ("first", "last"):
        made = module.tables(module.of_file(f"{name}.jsonl"), module.signed() if name == "last" else {})
        yield lambda page, made=made, name=name: with_tables(page, f"{module.SOURCE}, {name}", made)
    built = module.not_built(module.of_file("last.jsonl"))
    yield lambda page: with_tables(page, f"{module.SOURCE}, not built", built)


def _topology() -> Iterator[Callable[[str], str]]:
    for name in HYPOTHESES:
        yield _of_jsonl(f"topology/{name}.py", f"topology/{name}.jsonl", "tables")


def _trained() -> Iterator[Callable[[str], str]]:
    module = module_of("trained/report.py")
    yield lambda page: with_tables(page, module.SOURCE, module.tables(module.read(RECORDS / "trained")))
    yield _of_jsonl("trained/longer.py", "trained/longer.jsonl")
    yield _of_jsonl("trained/vocabulary.py", "trained/vocabulary.jsonl")


_MAKERS: dict[str, Callable[[], Iterator[Callable[[str], str]]]] = {
    "budgets": lambda: iter(
        [
            _of_jsonl("budgets/bench_depth.py", "depth.jsonl"),
            _of_jsonl("budgets/bench_eight.py", "eight.jsonl"),
            _of_jsonl("budgets/bench_tolerance.py", "tolerance.jsonl", title="search"),
            _of_jsonl("budgets/bench_tolerance.py", "tolerance.jsonl", "table_of_families", "frontier"),
            _of_jsonl("budgets/bench_tolerance.py", "tolerance_by_network.jsonl", "table_by_network", "five kinds"),
            _of_jsonl("trained/tolerance.py", "tolerance_trained.jsonl"),
            _of_jsonl("budgets/bench_equal_time.py", "equal_time.jsonl"),
        ]
    ),
    "clustering": _clustering,
    "criteria": _criteria,
    "export": _export,
    "fresh_networks": _fresh_networks,
    "gpu": _gpu,
    "named_pruners": _named_pruners,
    "packages": _packages,
    "norms": lambda: iter(
        [
            _of_jsonl("norms/under_masks.py", "norms_left.jsonl", "table_of_norms", "norms"),
            _of_jsonl("norms/under_masks.py", "under_masks.jsonl"),
            _of_jsonl("trained/width.py", "trained/width.jsonl"),
            _of_jsonl("norms/over_channels.py", "over_channels.jsonl"),
            _of_jsonl("norms/gpt_width.py", "gpt_width.jsonl"),
            _of_jsonl("export/zoo_exports.py", "zoo_exports.jsonl"),
            _of_jsonl("export/zoo_exports.py", "zoo_exports_before.jsonl", title="before"),
        ]
    ),
    "recovery": lambda: iter(
        [
            _of_jsonl("recovery/bench_course.py", "course.jsonl"),
            _of_jsonl("recovery/bench_without_data.py", "without_data.jsonl"),
        ]
    ),
    "speed": lambda: iter(
        [
            _of_jsonl("speed/bench_time.py", "time.jsonl"),
            _of_jsonl("speed/bench_pipeline.py", "steps.jsonl"),
            _of_jsonl("selection/when_to_stop.py", "selection.jsonl", "tables"),
            _of_jsonl("speed/bench_seconds.py", "seconds.jsonl"),
            _of_jsonl("speed/bench_shrink.py", "shrink.jsonl"),
            _of_jsonl("speed/bench_tones.py", "tones.jsonl"),
            _of_jsonl("speed/bench_precision.py", "precision.jsonl"),
            _of_jsonl("speed/quick.py", "quick.jsonl"),
        ]
    ),
    "topology": _topology,
    "trained": _trained,
    "transformers": lambda: iter(
        [
            _of_jsonl("transformers/bench_equal_blocks.py", "equal_blocks.jsonl"),
            _of_jsonl("transformers/bench_streaming.py", "streaming.jsonl"),
        ]
    ),
}
"""By page, what writes the tables that benchmarks make from records."""

if __name__ == "__main__":
    sys.exit(main())
