"""Tables of an energy study on the terminal."""

from __future__ import annotations

from collections.abc import Callable

from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from nni_topo.runs.records import Record


def print_energy(record: Record, console: Console, *, markdown: bool = False) -> None:
    """Print what :func:`~nni_topo.analysis.energy.run.energy_study` returns."""
    _show(_layer_table(record), console, markdown)
    _show(_loss_table(record), console, markdown)
    for verdict in ("saturated", "redundant"):
        names = [_name(layer) for layer in record["layers"] if layer["verdict"] == verdict]
        console.print(f"{verdict}: {', '.join(names) or 'none'}", markup=False)
    if "suggested" in record:
        suggested = record["suggested"]
        quality = _percent(suggested["quality"])
        console.print(f"suggested, all at once: {quality} at {100 * suggested['macs']:.1f} % of the MACs", markup=False)
    for part, show in _PARTS.items():
        if part in record:
            _show(show(record[part]), console, markdown)
    if not markdown:
        console.print("written:", ", ".join(record["files"]), markup=False)


def _show(table: Table, console: Console, markdown: bool) -> None:
    """Print a table's title on a line of its own: above a narrow table it would be folded."""
    console.print(str(table.title), style="italic", markup=False, highlight=False)
    table.title = None
    if markdown:
        table.box = MARKDOWN
        for row in table.rows:  # a line between rows would end the table
            row.end_section = False
    console.print(table)


def _layer_table(record: Record) -> Table:
    base = record["baseline"]
    title = (
        f"{record['model']} on {record['data']}: {_percent(base)}, loss {base['loss']:.3f}; filters removed: accuracy %"
    )
    table = Table("layer", "filters", title=title)
    for threshold in record["thresholds"]:
        table.add_column(f"{100 * threshold:g} %", justify="right")
    for layer in record["layers"]:
        cells = [
            f"{layer['removed'][str(t)]}: {100 * layer['alone'][str(t)]['accuracy']:.1f}" for t in record["thresholds"]
        ]
        table.add_row(_name(layer), str(layer["filters"]), *cells)
    whole = [record["together"][str(t)] for t in record["thresholds"]]
    table.add_section()
    cells = [f"{row['removed']}: {100 * row['quality']['accuracy']:.1f}" for row in whole]
    table.add_row("all at once", str(sum(layer["filters"] for layer in record["layers"])), *cells)
    table.add_row("MACs left %", "", *(f"{100 * row['macs']:.1f}" for row in whole))
    return table


def _loss_table(record: Record) -> Table:
    thresholds = [str(t) for t in record["thresholds"]]
    table = Table("layer", title="loss (nats), this layer alone pruned")
    for threshold in record["thresholds"]:
        table.add_column(f"{100 * threshold:g} %", justify="right")
    for layer in record["layers"]:
        table.add_row(_name(layer), *(f"{layer['alone'][t]['loss']:.3f}" for t in thresholds))
    table.add_section()
    table.add_row("all at once", *(f"{record['together'][t]['quality']['loss']:.3f}" for t in thresholds))
    return table


def _dropout_table(part: Record) -> Table:
    rates = list(part["unpruned"])
    table = Table("accuracy % at dropout rate", *rates, title="dropout at test time")
    table.add_row("unpruned", *(f"{100 * part['unpruned'][rate]['accuracy']:.1f}" for rate in rates))
    for threshold, layers in part.items():
        if threshold == "unpruned":
            continue
        means = [sum(layer[rate]["accuracy"] for layer in layers.values()) / len(layers) for rate in rates]
        table.add_row(f"one layer at {threshold}, mean", *(f"{100 * mean:.1f}" for mean in means))
    return table


def _accumulated_table(part: Record) -> Table:
    title = f"accumulated at {100 * part['threshold']:g} % of the energy, without retraining"
    table = Table("after layer", "removed", "accuracy %", "loss", title=title)
    for step in part["steps"]:
        quality = step["quality"]
        removed = str(step["removed"])
        table.add_row(_name(step), removed, f"{100 * quality['accuracy']:.1f}", f"{quality['loss']:.3f}")
    return table


def _replacement_table(part: Record) -> Table:
    title = f"{part['filters']} filters of {part['layer']} replaced"
    table = Table("filters", "accuracy %", "re-calibrated %", "energy %", "likeness", title=title)
    for kind, made in part["kinds"].items():
        table.add_row(
            kind,
            f"{100 * made['quality']['accuracy']:.1f}",
            f"{100 * made['repaired']['accuracy']:.1f}",
            f"{100 * made['energy']:.1f}",
            f"{made['similarity']:.2f}",
        )
    return table


def _selection_table(part: Record) -> Table:
    title = f"half of the {part['filters']} filters of {part['layer']}, chosen by"
    table = Table("", "accuracy %", "loss", "energy lost %", "Taylor", "seconds", title=title)
    for name, made in part["methods"].items():
        quality = made["quality"]
        numbers = f"{100 * quality['accuracy']:.1f}", f"{quality['loss']:.3f}", f"{100 * made['energy']:.1f}"
        table.add_row(name, *numbers, f"{made['taylor']:.4f}", f"{made['seconds']:.2f}")
    return table


def _schedules_table(part: Record) -> Table:
    title = f"{100 * part['ratio']:g} % of every layer, {part['epochs']} epochs in all"
    table = Table("schedule", "accuracy %", "loss", title=title)
    for schedule in ("one-shot", "linear", "agp"):
        table.add_row(schedule, f"{100 * part[schedule]['accuracy']:.1f}", f"{part[schedule]['loss']:.3f}")
    return table


_PARTS: dict[str, Callable[[Record], Table]] = {
    "dropout": _dropout_table,
    "accumulated": _accumulated_table,
    "replacement": _replacement_table,
    "selection": _selection_table,
    "schedules": _schedules_table,
}


def _name(layer: Record) -> str:
    names = layer["layers"]
    return f"{names[0]} +{len(names) - 1}" if len(names) > 1 else str(names[0])


def _percent(quality: Record) -> str:
    return f"{100 * quality['accuracy']:.1f} %"
