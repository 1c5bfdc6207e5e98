"""``report.html``: the contents of a run's folder in one self-contained file."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nni_topo.disk import read_json, without_folders, write_text
from nni_topo.errors import DataError
from nni_topo.pruners.budget import BudgetOutcome
from nni_topo.runs.experiment.results import BEST, TRIALS
from nni_topo.runs.headline import headline_of_records
from nni_topo.runs.page import (
    LONG,
    Part,
    html_page,
    is_single,
    name_in_words,
    picture_part,
    table_part,
    value_in_words,
)
from nni_topo.runs.provenance import Record
from nni_topo.runs.report import parts_of
from nni_topo.studies.pictures import comparison_figures
from nni_topo.studies.records import compared_records
from nni_topo.studies.tables import STEPS, best_method, grouped, in_short, tables_of, title_of, widths_of

GAIN = "gain.png"
"""The demonstration's picture of what a shrink gains."""
_SOURCES = ("versions", "hardware", "revision")


def write_report(folder: str | Path) -> Path:
    """Write ``report.html`` from the files of a run's folder, also during the run; DataError if it has no files."""
    folder = Path(folder)
    sentences, parts = _contents(folder)
    if not parts:
        raise DataError(f"a report needs a run's files, got none in {folder} (results.jsonl or another .json)")
    path = folder / "report.html"
    write_text(path, html_page(folder.resolve().name, sentences, parts))
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
        outcome = BudgetOutcome(**record["budget"])
        verdict = "met" if outcome.is_met else "missed"
        label = f"{outcome.kind} kept % ({100 * outcome.asked:.4g} asked, {verdict})"
        rows.append((label, "100.0", f"{100 * outcome.left:.1f}"))
    for step, label in {**STEPS, "oneshot": "accuracy"}.items():
        if f"accuracy_{step}" in record:
            unpruned = f"{100 * record['accuracy_before']:.1f}" if step == "oneshot" else ""
            rows.append((f"{label} %", unpruned, f"{100 * record[f'accuracy_{step}']:.1f}"))
    return rows


def _contents(folder: Path) -> tuple[list[str], list[Part]]:
    """Return the first sentences of a folder's report, and its parts."""
    # Records of studies, which have no target, are skipped: the study's JSON file has its findings.
    records = [
        {**record, **{key: without_folders(record[key]) for key in ("model", "data", "pruner")}}
        for record in compared_records(folder / "results.jsonl")
    ]
    figures = comparison_figures(records) if records else {}
    sentences, parts = list[str](), list[Part]()
    shrunk = read_json(folder / "shrink.json", "a run's file") or {}
    if "sentence" in shrunk:
        sentences.append(shrunk["sentence"])
        steps, *details = parts_of(shrunk)
        parts.append(steps)
        if (folder / GAIN).exists():
            parts.append(picture_part("Accuracy and time", (folder / GAIN).read_bytes()))
        settings = {key: shrunk.get(key) for key in ("model", "data", "pruner", "method", "budget")}
        parts += [*details, Part("How it was run", rows=_as_rows(settings), text_columns=2, folded=True)]
        parts += _sources([shrunk])
    sentences += sentences_of(records)
    # First the answer, then its picture, then the tables with all columns.
    for group, rows in grouped(records).items():
        parts.append(Part(title_of(group, rows), *in_short(rows), text_columns=2))
    parts += [picture_part(name, figure) for name, figure in figures.items()]
    for table in tables_of(records, widths=all("widths" in record for record in records)):
        title = f"all figures: {table.title}" if table.unpruned_first else str(table.title)
        parts.append(Part(title, table.head, table.rows, foot=table.foot, folded=title.startswith("widths")))
    for path in sorted(folder.glob("*.json")):
        if path.stem == "results" or (path.stem == "shrink" and shrunk):
            continue
        document = read_json(path, "a run's file")
        if path.stem == "summary" and "flops_before" in document:  # of a single pruning run
            sentences.append(headline_of_records([document]))
            title = f"{document['model']} on {document['data']}, {document['pruner']}"
            parts.append(Part(title, ("", "before", "after"), prune_costs(document)))
            parts.append(Part("Widths", *widths_of({"after": {document["seed"]: document}})))
            if "compensation" in document:
                parts.append(table_part("Recovery by layer", document["compensation"]))
            parts += _sources([document])
        elif path.name == BEST:
            sentences.append(document["sentence"])
            parts.append(Part("Best trial", rows=_as_rows(_of_trial(document)), text_columns=2))
        elif path.name == TRIALS:
            parts.append(table_part("Trials", list(map(_of_trial, document))))
        else:
            parts += _of_document(path.stem, document)
    for path in sorted(folder.glob("*.png")):
        if path.stem not in figures and path.name != GAIN:
            parts.append(picture_part(path.stem, path.read_bytes()))
    return sentences, [*parts, *_sources(records)]


def sentences_of(records: Sequence[Record]) -> list[str]:
    """Return for each model, data set and target of a comparison a sentence on the best method without labels."""
    sentences = []
    for group, rows in grouped(records).items():
        best = best_method(rows)
        if best is not None:
            gain = headline_of_records(best.records, step=best.step)
            sentences.append(f"{title_of(group, rows)}, {best.name}, {STEPS[best.step]}: {gain}")
    return sentences


def _of_trial(trial: Mapping[str, Any]) -> dict[str, Any]:
    """Return a trial as a row: its results and its parameters."""
    results = dict(trial.get("result") or {})
    row = {
        "trial": str(trial.get("number")),
        "status": str(trial.get("status")).lower(),
        "score": results.pop("default", None),
        **results,
    }
    metrics = trial.get("metrics") or {}
    row |= {name: metrics[name] for name in ("test_accuracy", "test_accuracy_before") if name in metrics}
    return {**row, **(trial.get("parameters") or {}), "error": trial.get("error") or None}


def _as_rows(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return named values as rows of a table; nested values as JSON, and none without a value."""
    rows = []
    for name, value in values.items():
        if value is not None:
            text = value_in_words(value) if is_single(value) else json.dumps(value)
            rows.append((name_in_words(name), text))
    return rows


def _of_document(title: str, document: Any) -> Iterator[Part]:
    """Yield the parts of any JSON document: lists of mappings as tables; long tables and nested values are folded."""
    if not isinstance(document, Mapping):
        document = {title: document}
    single = {str(key): value for key, value in document.items() if is_single(value)}
    if single:
        rows = [(name_in_words(key), value_in_words(value)) for key, value in single.items()]
        yield Part(title, rows=rows, text_columns=2)
    for key, value in document.items():
        if is_single(value) or key in _SOURCES:
            continue
        if isinstance(value, Mapping) and value and all(map(is_single, value.values())):
            rows = [(name_in_words(name), value_in_words(number)) for name, number in value.items()]
            yield Part(name_in_words(key), rows=rows, folded=len(rows) > LONG)
        elif entries_of(value):
            yield table_part(name_in_words(key), entries_of(value))
        else:
            yield Part(name_in_words(key), text=json.dumps(value, indent=1), folded=True)
    if "versions" in document:
        yield from _sources([dict(document)])


def entries_of(value: Any) -> list[Mapping[str, Any]]:
    """Return a list of mappings, or a mapping of names to mappings, as rows; an empty list for other values."""
    if isinstance(value, Mapping) and all(isinstance(row, Mapping) for row in value.values()):
        return [{"name": name, **row} for name, row in value.items()]
    if isinstance(value, list) and all(isinstance(row, Mapping) for row in value):
        return value
    return []


def _sources(records: Sequence[Record]) -> Iterator[Part]:
    """Yield a part with the versions and the hardware of all records, each value once."""
    values_by_name: dict[str, dict[str, None]] = defaultdict(dict)
    for record in records:
        for name in _SOURCES:
            value = record.get(name)
            named_values = value if isinstance(value, Mapping) else {name: value}
            for key, datum in named_values.items():
                if datum is not None:
                    values_by_name[key][str(datum)] = None
    if values_by_name:
        rows = [(name, " / ".join(values)) for name, values in values_by_name.items()]
        yield Part("versions", rows=rows, text_columns=2, folded=True)
