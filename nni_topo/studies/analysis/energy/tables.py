"""Tables of an energy study, from its record."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from nni_topo.runs.provenance import Record
from nni_topo.studies.tables import NumberTable, as_table

_Titled = tuple[str, NumberTable]


def _titled(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], **more: Any) -> _Titled:
    return title, as_table(None, head, rows, **more)


def show_energy(record: Record) -> Iterator[NumberTable | str]:
    """Yield the tables and lines of a study's record; a title is a line of its own, as a narrow table would wrap it."""
    yield from _layer_table(record)
    yield from _loss_table(record)
    for verdict in ("saturated", "redundant"):
        names = [_name(layer) for layer in record["layers"] if layer["verdict"] == verdict]
        yield f"{verdict}: {', '.join(names) or 'none'}"
    if "suggested" in record:
        suggested = record["suggested"]
        accuracy = f"{100 * suggested['quality']['accuracy']:.1f} %"
        yield f"suggested, all at once: {accuracy} at {100 * suggested['macs']:.1f} % of the MACs"
    for part, table in _PARTS.items():
        if part in record:
            yield from table(record[part])


def _layer_table(record: Record) -> _Titled:
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
    return _titled(
        f"{record['model']} on {record['data']}: {before}; filters removed: accuracy %",
        ["layer", "filters", *_shares(thresholds)],
        rows,
        totals=[
            ["all at once", filters, *(f"{row['removed']}: {_percent(row['quality'])}" for row in together)],
            ["MACs kept %", "", *(f"{100 * row['macs']:.1f}" for row in together)],
        ],
        text_columns=2,
    )


def _loss_table(record: Record) -> _Titled:
    thresholds = [str(t) for t in record["thresholds"]]
    rows = [[_name(layer), *(f"{layer['alone'][t]['loss']:.3f}" for t in thresholds)] for layer in record["layers"]]
    total = ["all at once", *(f"{record['together'][t]['quality']['loss']:.3f}" for t in thresholds)]
    return _titled(
        "loss (nats), this layer alone pruned", ["layer", *_shares(record["thresholds"])], rows, totals=[total]
    )


def _dropout_table(part: Record) -> _Titled:
    rates = list(part["unpruned"])
    rows = [["unpruned", *(_percent(part["unpruned"][rate]) for rate in rates)]]
    for threshold, layers in part.items():
        if threshold != "unpruned":
            means = [sum(layer[rate]["accuracy"] for layer in layers.values()) / len(layers) for rate in rates]
            rows.append([f"one layer at {threshold}, mean", *(f"{100 * mean:.1f}" for mean in means)])
    return _titled("dropout at test time", ["accuracy % at dropout rate", *rates], rows)


def _accumulated_table(part: Record) -> _Titled:
    title = f"accumulated at {100 * part['threshold']:g} % of the energy, without fine-tuning"
    rows = [[_name(step), str(step["removed"]), *_quality(step["quality"])] for step in part["steps"]]
    return _titled(title, ["after layer", "removed", "accuracy %", "loss"], rows)


def _iterative_table(part: Record) -> _Titled:
    share, epochs = f"{100 * part['threshold']:g} %", part["epochs"]
    title = f"one layer after the other at {share} of its energy; {epochs} epochs of fine-tuning in all"
    rows = []
    for without, step in zip(part["none"], part["between"], strict=True):
        alone = [_name(without), str(without["removed"]), _percent(without["quality"])]
        rows.append([*alone, str(step["removed"]), *_quality(step["quality"])])
    head = ["after layer", "removed", "accuracy %", "an epoch after each: removed", "accuracy %", "loss"]
    after = [f"the first, then {epochs} epochs", "", _percent(part["after"]), "", "", ""]
    return _titled(title, head, rows, totals=[after])


def _replacement_table(part: Record) -> _Titled:
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
    return _titled(f"{part['filters']} filters of {part['layer']} replaced", head, rows)


def _selection_table(part: Record) -> _Titled:
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
    return _titled(f"half of the {part['filters']} filters of {part['layer']}, selected by", head, rows)


def _schedules_table(part: Record) -> _Titled:
    title = f"{100 * part['ratio']:g} % of every layer, {part['epochs']} epochs in all"
    rows = [[schedule, *_quality(part[schedule])] for schedule in ("one-shot", "linear", "agp")]
    return _titled(title, ["schedule", "accuracy %", "loss"], rows)


_PARTS: dict[str, Callable[[Record], _Titled]] = {
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
