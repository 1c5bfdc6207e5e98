"""Tables of an energy study, from its record."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from rich.console import RenderableType

from nni_topo.network.runtime.reports import markdown_table
from nni_topo.runs.provenance import Record
from nni_topo.studies.tables import as_table


class _Table(NamedTuple):
    """A table of texts; ``totals``: rows set apart at its end."""

    title: str
    head: list[str]
    rows: list[list[str]]
    totals: list[list[str]]
    text_columns: int = 1


def show_energy(record: Record, *, markdown: bool = False) -> Iterator[RenderableType]:
    """Yield the tables and lines of a study's record, for the terminal or in Markdown."""
    yield from _shown(_layer_table(record), markdown)
    yield from _shown(_loss_table(record), markdown)
    for verdict in ("saturated", "redundant"):
        names = [_name(layer) for layer in record["layers"] if layer["verdict"] == verdict]
        yield f"{verdict}: {', '.join(names) or 'none'}"
    if "suggested" in record:
        suggested = record["suggested"]
        accuracy = f"{100 * suggested['quality']['accuracy']:.1f} %"
        yield f"suggested, all at once: {accuracy} at {100 * suggested['macs']:.1f} % of the MACs"
    for part, table in _PARTS.items():
        if part in record:
            yield from _shown(table(record[part]), markdown)


def _shown(table: _Table, markdown: bool) -> Iterator[RenderableType]:
    """Yield a title as a line of its own, because a narrow table would wrap it, and the table."""
    title, head, rows, totals, text_columns = table
    yield f"{title}\n" if markdown else title
    if markdown:
        yield markdown_table(head, rows + totals, text_columns=text_columns) + "\n"
    else:
        yield as_table(None, head, rows, text_columns=text_columns, totals=totals)


def _layer_table(record: Record) -> _Table:
    base, thresholds = record["baseline"], record["thresholds"]
    before = f"{_percent(base)} %, loss {base['loss']:.3f}"
    rows = [
        [
            _name(layer),
            str(layer["filters"]),
            *(f"{layer['removed'][str(t)]}: {_percent(layer['alone'][str(t)])}" for t in thresholds),
        ]
        for layer in record["layers"]
    ]
    together = [record["together"][str(t)] for t in thresholds]
    filters = str(sum(layer["filters"] for layer in record["layers"]))
    return _Table(
        f"{record['model']} on {record['data']}: {before}; filters removed: accuracy %",
        ["layer", "filters", *_shares(thresholds)],
        rows,
        [
            ["all at once", filters, *(f"{row['removed']}: {_percent(row['quality'])}" for row in together)],
            ["MACs kept %", "", *(f"{100 * row['macs']:.1f}" for row in together)],
        ],
        text_columns=2,
    )


def _loss_table(record: Record) -> _Table:
    thresholds = [str(t) for t in record["thresholds"]]
    rows = [[_name(layer), *(f"{layer['alone'][t]['loss']:.3f}" for t in thresholds)] for layer in record["layers"]]
    total = ["all at once", *(f"{record['together'][t]['quality']['loss']:.3f}" for t in thresholds)]
    return _Table("loss (nats), this layer alone pruned", ["layer", *_shares(record["thresholds"])], rows, [total])


def _dropout_table(part: Record) -> _Table:
    rates = list(part["unpruned"])
    rows = [["unpruned", *(_percent(part["unpruned"][rate]) for rate in rates)]]
    for threshold, layers in part.items():
        if threshold != "unpruned":
            means = [sum(layer[rate]["accuracy"] for layer in layers.values()) / len(layers) for rate in rates]
            rows.append([f"one layer at {threshold}, mean", *(f"{100 * mean:.1f}" for mean in means)])
    return _Table("dropout at test time", ["accuracy % at dropout rate", *rates], rows, [])


def _accumulated_table(part: Record) -> _Table:
    title = f"accumulated at {100 * part['threshold']:g} % of the energy, without fine-tuning"
    rows = [[_name(step), str(step["removed"]), *_quality(step["quality"])] for step in part["steps"]]
    return _Table(title, ["after layer", "removed", "accuracy %", "loss"], rows, [])


def _iterative_table(part: Record) -> _Table:
    share, epochs = f"{100 * part['threshold']:g} %", part["epochs"]
    title = f"one layer after the other at {share} of its energy; {epochs} epochs of fine-tuning in all"
    rows = []
    for without, step in zip(part["none"], part["between"], strict=True):
        alone = [_name(without), str(without["removed"]), _percent(without["quality"])]
        rows.append([*alone, str(step["removed"]), *_quality(step["quality"])])
    head = ["after layer", "removed", "accuracy %", "an epoch after each: removed", "accuracy %", "loss"]
    after = [f"the first, then {epochs} epochs", "", _percent(part["after"]), "", "", ""]
    return _Table(title, head, rows, [after])


def _replacement_table(part: Record) -> _Table:
    rows = [
        [
            kind,
            _percent(made["quality"]),
            _percent(made["repaired"]),
            f"{100 * made['energy']:.1f}",
            f"{made['similarity']:.2f}",
        ]
        for kind, made in part["kinds"].items()
    ]
    head = ["filters", "accuracy %", "re-calibrated %", "energy %", "similarity"]
    return _Table(f"{part['filters']} filters of {part['layer']} replaced", head, rows, [])


def _selection_table(part: Record) -> _Table:
    rows = [
        [
            name,
            *_quality(made["quality"]),
            f"{100 * made['energy']:.1f}",
            f"{made['taylor']:.4f}",
            f"{made['seconds']:.2f}",
        ]
        for name, made in part["methods"].items()
    ]
    head = ["", "accuracy %", "loss", "energy lost %", "Taylor", "seconds"]
    return _Table(f"half of the {part['filters']} filters of {part['layer']}, selected by", head, rows, [])


def _schedules_table(part: Record) -> _Table:
    title = f"{100 * part['ratio']:g} % of every layer, {part['epochs']} epochs in all"
    rows = [[schedule, *_quality(part[schedule])] for schedule in ("one-shot", "linear", "agp")]
    return _Table(title, ["schedule", "accuracy %", "loss"], rows, [])


_PARTS: dict[str, Callable[[Record], _Table]] = {
    "dropout": _dropout_table,
    "accumulated": _accumulated_table,
    "iterative": _iterative_table,
    "replacement": _replacement_table,
    "selection": _selection_table,
    "schedules": _schedules_table,
}


def _shares(thresholds: list[float]) -> list[str]:
    return [f"{100 * threshold:g} %" for threshold in thresholds]


def _quality(quality: Record) -> tuple[str, str]:
    return _percent(quality), f"{quality['loss']:.3f}"


def _percent(quality: Record) -> str:
    return f"{100 * quality['accuracy']:.1f}"


def _name(layer: Record) -> str:
    names = layer["layers"]
    return f"{names[0]} +{len(names) - 1}" if len(names) > 1 else str(names[0])
