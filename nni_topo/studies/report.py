"""``report.html``: the contents of a run's folder in one self-contained file."""

from __future__ import annotations

import base64
import html
import io
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment

from nni_topo.disk import read_json, without_folders, write_text
from nni_topo.errors import DataError
from nni_topo.pruners.budget import BudgetOutcome
from nni_topo.runs.provenance import Record
from nni_topo.studies.pictures import comparison_figures
from nni_topo.studies.records import compared_records
from nni_topo.studies.tables import STEPS, grouped, in_short, tables_of, title_of, widths_of

_SOURCES = ("versions", "hardware", "revision")
_LONG = 40  # tables with more rows are folded


@dataclass(frozen=True)
class Part:
    """A part of a report: a table whose first ``text_columns`` columns hold text, a picture as HTML, or text."""

    title: str
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    text_columns: int = 1
    picture: str = ""
    text: str = ""
    folded: bool = False
    foot: str = ""  # below the table


def write_report(folder: str | Path) -> Path:
    """Write ``report.html`` from the files of a run's folder, also during the run; DataError if it has no files."""
    folder = Path(folder)
    parts = list(_parts(folder))
    if not parts:
        raise DataError(f"a report needs a run's files, got none in {folder} (results.jsonl or another .json)")
    environment = Environment(autoescape=True)
    environment.filters["without_folders"] = without_folders  # other people may read a report
    page = environment.from_string(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
    path = folder / "report.html"
    write_text(path, page.render(title=folder.resolve().name, parts=parts))
    return path


def prune_costs(record: Record) -> list[tuple[str, str, str]]:
    """Return a pruning's costs and accuracies as rows: name, before, after."""
    shown = [("MACs (M)", "flops", 1e-6, 2), ("parameters (k)", "params", 1e-3, 1)]
    if record["weights_left"] < record["params"]:
        shown.append(("nonzero weights (k)", "weights_left", 1e-3, 1))
    rows = [
        (label, f"{scale * record[f'{name}_before']:.{digits}f}", f"{scale * record[name]:.{digits}f}")
        for label, name, scale, digits in shown
    ]
    if "latency_ms" in record:
        times = f"{record['latency_before_ms']:.2f}", f"{record['latency_ms']:.2f}"
        rows.append((f"latency ms (batch of {record['latency_batch']})", *times))
    if "budget" in record:
        asked = BudgetOutcome(**record["budget"])
        label = f"{asked.kind} kept % ({100 * asked.asked:.4g} asked, {'met' if asked.is_met else 'missed'})"
        rows.append((label, "100.0", f"{100 * asked.left:.1f}"))
    for step, label in {**STEPS, "oneshot": "accuracy"}.items():
        if f"accuracy_{step}" in record:
            unpruned = f"{100 * record['accuracy_before']:.1f}" if step == "oneshot" else ""
            rows.append((f"{label} %", unpruned, f"{100 * record[f'accuracy_{step}']:.1f}"))
    return rows


def _parts(folder: Path) -> Iterator[Part]:
    # Records of studies, which have no target, are skipped: the study's JSON file has its findings.
    records = [
        {**record, **{key: without_folders(record[key]) for key in ("model", "data", "pruner")}}
        for record in compared_records(folder / "results.jsonl")
    ]
    figures = comparison_figures(records) if records else {}
    # First the answer, then its picture, then the tables with all columns.
    for group, rows in grouped(records).items():
        yield Part(title_of(group, rows), *in_short(rows), text_columns=2)
    for name, figure in figures.items():
        stream = io.BytesIO()
        figure.savefig(stream, dpi=130)
        yield _picture(name, stream.getvalue())
    for table in tables_of(records, widths=all("widths" in record for record in records)):
        title = f"all figures: {table.title}" if table.unpruned_first else str(table.title)
        yield Part(title, table.head, table.rows, foot=table.foot, folded=title.startswith("widths"))
    for path in sorted(folder.glob("*.json")):
        if path.stem == "results":
            continue
        document = read_json(path, "a run's file")
        if path.stem == "summary" and "flops_before" in document:  # of a single pruning run
            title = f"{document['model']} on {document['data']}, {document['pruner']}"
            yield Part(title, ("", "before", "after"), prune_costs(document))
            yield Part("widths", *widths_of({"after": {document["seed"]: document}}))
            if "compensation" in document:
                yield _table("recovery by layer", document["compensation"])
            yield from _sources([document])
        else:
            yield from _of_document(path.stem, document)
    for path in sorted(folder.glob("*.png")):
        if path.stem not in figures:
            yield _picture(path.stem, path.read_bytes())
    yield from _sources(records)


def _picture(name: str, content: bytes) -> Part:
    """Return a PNG file's content as a part."""
    data = base64.b64encode(content).decode()
    return Part(name, picture=f'<img alt="{html.escape(name)}" src="data:image/png;base64,{data}">')


def _of_document(title: str, document: Any) -> Iterator[Part]:
    """Yield the parts of any JSON document: lists of mappings as tables; long tables and nested values are folded."""
    if not isinstance(document, Mapping):
        document = {title: document}
    single = [(str(key), _shown(value)) for key, value in document.items() if _is_single(value)]
    if single:
        yield Part(title, rows=single, text_columns=2)
    for key, value in document.items():
        if _is_single(value) or key in _SOURCES:
            continue
        if isinstance(value, Mapping) and value and all(map(_is_single, value.values())):
            rows = [(str(name), _shown(item)) for name, item in value.items()]
            yield Part(str(key), rows=rows, folded=len(rows) > _LONG)
        elif entries_of(value):
            yield _table(str(key), entries_of(value))
        else:
            yield Part(str(key), text=json.dumps(value, indent=1), folded=True)
    if "versions" in document:
        yield from _sources([dict(document)])


def _table(title: str, entries: Sequence[Mapping[str, Any]]) -> Part:
    """Return entries as a table, with columns of text first and without columns of nested values."""
    names = dict.fromkeys(name for entry in entries for name in entry)
    shown = [name for name in names if all(_is_single(entry.get(name)) for entry in entries)]
    words = [name for name in shown if any(isinstance(entry.get(name), str) for entry in entries)]
    shown.sort(key=lambda name: name not in words)
    rows = [[_shown(entry.get(name)) for name in shown] for entry in entries]
    return Part(title, [name.replace("_", " ") for name in shown], rows, len(words), folded=len(rows) > _LONG)


def entries_of(value: Any) -> list[Mapping[str, Any]]:
    """Return a list of mappings, or a mapping of names to mappings, as rows; an empty list for other values."""
    if isinstance(value, Mapping) and all(isinstance(item, Mapping) for item in value.values()):
        return [{"name": name, **item} for name, item in value.items()]
    return value if isinstance(value, list) and all(isinstance(item, Mapping) for item in value) else []


def _is_single(value: Any) -> bool:
    return not isinstance(value, (Mapping, list)) or (
        isinstance(value, list) and len(value) <= 8 and not any(isinstance(item, (Mapping, list)) for item in value)
    )


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _sources(records: Sequence[Record]) -> Iterator[Part]:
    """Yield a part with the versions and the hardware of all records, each value once."""
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for record in records:
        for name in _SOURCES:
            value = record.get(name)
            for key, item in value.items() if isinstance(value, Mapping) else [(name, value)]:
                if item is not None:
                    found[key][str(item)] = None
    if found:
        rows = [(name, " / ".join(values)) for name, values in found.items()]
        yield Part("versions", rows=rows, text_columns=2, folded=True)
