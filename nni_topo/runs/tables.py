"""Tables and pictures of a comparison's records.

Rivals are the pruners that aren't this package's own, and random choice, which is nobody's.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text
from scipy import special, stats

from nni_topo.pruners.registry import list_pruners, pruner_info
from nni_topo.runs.plan import SCRATCH
from nni_topo.runs.records import Record

Group = tuple[str, str, str]
_MARKERS = "osD^vP*X<>"
_NEAREST = 1e-3
COLUMNS = (
    "method",
    "MACs (M)",
    "parameters (k)",
    "not zero (k)",
    "before %",
    "one-shot %",
    "BN recal. %",
    "compensated %",
    "vs best rival, compensated",
    "distilled %",
    "vs best rival, distilled",
    "retrained %",
    "vs best rival",
    "epochs until back",
    "latency ms",
    "prune s",
)


@dataclass(frozen=True)
class Interval:
    """A mean and half the width of its 95 % interval (Student's t); ``nan`` with one value."""

    mean: float
    half: float

    def show(self, scale: float = 1.0, digits: int = 1, *, sign: bool = False) -> str:
        """Return ``mean ± half``, or the mean alone where there is one value."""
        mean = f"{scale * self.mean:{'+' if sign else ''}.{digits}f}"
        return mean if np.isnan(self.half) else f"{mean} ± {scale * self.half:.{digits}f}"


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of at least one value, and half its 95 % interval.

    >>> interval([1.0, 2.0, 3.0]).show(digits=2)
    '2.00 ± 2.48'
    """
    array = np.asarray(values, dtype=np.float64)
    if len(array) < 2:
        return Interval(float(array.mean()), float("nan"))
    half = stats.t.ppf(0.975, len(array) - 1) * array.std(ddof=1) / np.sqrt(len(array))
    return Interval(float(array.mean()), float(half))


def show_accuracies(values: Sequence[float]) -> str:
    """Return the mean of accuracies in [0, 1] and its 95 % interval, in percent and within 0 and 100.

    Where Student's interval leaves that range, the interval is that of the log-odds, shown by its ends; values within
    0.001 of 0 or 1 count as that far away.

    >>> show_accuracies([0.5, 0.6, 0.7]), show_accuracies([0.1, 0.2, 0.9])
    ('60.0 ± 24.8', '40.0 (0.2 to 99.5)')
    """
    found = interval(values)
    if np.isnan(found.half) or 0.0 <= found.mean - found.half <= found.mean + found.half <= 1.0:
        return found.show(100)
    odds = interval(special.logit(np.clip(values, _NEAREST, 1.0 - _NEAREST)).tolist())
    low, high = special.expit([odds.mean - odds.half, odds.mean + odds.half])
    return f"{100 * found.mean:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def epochs_until_back(record: Record) -> int | None:
    """Return the epochs of retraining until the validation accuracy of before pruning is back, None if it wasn't."""
    return next((epoch for epoch, now in enumerate(record["curve"]) if now >= record["validation_before"]), None)


def grouped(records: Iterable[Record]) -> dict[Group, dict[str, dict[int, Record]]]:
    """Sort records by model, data and target, then by pruner, then by seed."""
    groups: dict[Group, dict[str, dict[int, Record]]] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        groups[record["model"], record["data"], record["target"]][record["pruner"]][record["seed"]] = record
    return groups


def paired_difference(ours: dict[int, Record], theirs: dict[int, Record], column: str) -> Interval:
    """Return the difference of a column over the seeds that both rows have."""
    seeds = sorted(seed for seed in set(ours) & set(theirs) if column in ours[seed] and column in theirs[seed])
    return interval([ours[seed][column] - theirs[seed][column] for seed in seeds])


def best_rival(rows: dict[str, dict[int, Record]], column: str) -> str | None:
    """Return the row with the highest mean among the rivals: the pruners of others, and random choice."""
    own = {name for name in list_pruners() if pruner_info(name).origin == "nni_topo"} - {"random"} | {SCRATCH}
    means = {}
    for row, runs in rows.items():
        values = [record[column] for record in runs.values() if column in record]
        if values and next(iter(runs.values()))["pruner_name"] not in own:
            means[row] = float(np.mean(values))
    return max(means, key=means.__getitem__, default=None)


def as_table(
    title: str | None,
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    left: int = 1,
    totals: Iterable[Sequence[str]] = (),
) -> Table:
    """Return a table for the terminal: its ``left`` first columns of words, others of numbers; ``totals`` set apart."""
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(head):
        table.add_column(name, justify="left" if index < left else "right")
    for row in rows:
        table.add_row(*map(Text, row))
    table.add_section()
    for row in totals:
        table.add_row(*map(Text, row))
    return table


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> str:
    """Return a table in Markdown, its ``left`` first columns of words, others of numbers."""
    rule = "|" + "---|" * left + "---:|" * (len(head) - left)
    return "\n".join((f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)))


def print_report(records: Iterable[Record], console: Console) -> None:
    """Print one table of records per model, data set and target."""
    for group, rows in grouped(records).items():
        columns, lines = _table(rows)
        table = as_table(_title(group, rows), columns, lines)
        table.rows[0].end_section = True
        console.print(table)


def print_widths(records: Iterable[Record], console: Console) -> None:
    """Print the mean number of output channels of every layer, one table per model, data set and target."""
    for group, rows in grouped(records).items():
        lines = []
        for layer in next(iter(next(iter(rows.values())).values()))["widths"]:
            widths = (interval([record["widths"][layer] for record in runs.values()]).mean for runs in rows.values())
            lines.append([layer, *(f"{width:g}" for width in widths)])
        console.print(as_table(f"widths: {_title(group, rows)}", ["layer", *rows], lines))


def markdown_report(records: Iterable[Record]) -> str:
    """Return one Markdown table of records per model, data set and target."""
    lines = []
    for group, rows in grouped(records).items():
        lines += [f"**{_title(group, rows)}**", "", markdown_table(*_table(rows)), ""]
    return "\n".join(lines)


def _title(group: Group, rows: dict[str, dict[int, Record]]) -> str:
    model, data, target = group
    seeds = max(len(runs) for runs in rows.values())
    return f"{model} on {data}, {target} ({seeds} seed{'s' if seeds > 1 else ''})"


def _table(rows: dict[str, dict[int, Record]]) -> tuple[list[str], list[list[str]]]:
    """Columns that hold anything, and cells of a table: the unpruned network, then a line per pruner."""
    rows = _timed_together(rows)
    first = next(iter(next(iter(rows.values())).values()))
    before = _column(next(iter(rows.values())))
    macs, params = f"{first['flops_before'] / 1e6:.2f}", f"{first['params_before'] / 1e3:.1f}"
    table = [
        ["unpruned", macs, params, "", before("accuracy_before"), *[""] * 9, before("latency_before_ms", 1, 2), ""]
    ]
    for row, runs in rows.items():
        cell = _column(runs)
        table.append(
            [
                row,
                cell("flops", 1e-6, 2, spread=False),
                cell("params", 1e-3, spread=False),
                cell("weights_left", 1e-3, spread=False) if _has_zeros(runs) else "",
                cell("accuracy_before"),
                cell("accuracy_oneshot"),
                cell("accuracy_recalibrated"),
                cell("accuracy_compensated"),
                _versus(rows, row, "accuracy_compensated"),
                cell("accuracy_distilled"),
                _versus(rows, row, "accuracy_distilled"),
                cell("accuracy_retrained"),
                _versus(rows, row, "accuracy_retrained"),
                _convergence(runs),
                cell("latency_ms", 1, 2),
                cell("prune_seconds", 1, 2, spread=False),
            ]
        )
    used = [index for index in range(len(COLUMNS)) if any(line[index] for line in table)]
    return [COLUMNS[index] for index in used], [[line[index] for index in used] for line in table]


def _timed_together(rows: dict[str, dict[int, Record]]) -> dict[str, dict[int, Record]]:
    """Give networks of equal widths one latency, the median of those measured in a seed's rows, one after the other."""
    # Equal networks take equal time: what lies between their rows is what else the machine had to do.
    found: dict[tuple[str, int, str], list[float]] = defaultdict(list)

    def each(seed: int, record: Record) -> Iterator[tuple[str, tuple[str, int, str]]]:
        for name, widths in (
            ("latency_before_ms", ""),
            ("latency_ms", json.dumps(record.get("widths"), sort_keys=True)),
        ):
            if name in record:
                yield name, (name, seed, widths)

    for runs in rows.values():
        for seed, record in runs.items():
            for name, key in each(seed, record):
                found[key].append(record[name])
    medians = {key: statistics.median(values) for key, values in found.items()}
    return {
        row: {seed: record | {n: medians[key] for n, key in each(seed, record)} for seed, record in runs.items()}
        for row, runs in rows.items()
    }


def _has_zeros(runs: dict[int, Record]) -> bool:
    """Say whether single weights were pruned: networks of one width have many that are zero."""
    return any(record.get("weights_left", record["params"]) < 0.999 * record["params"] for record in runs.values())


def _column(runs: dict[int, Record]) -> Callable[..., str]:
    """Return a function that shows a column's mean and interval over a row's seeds; nothing where it has no value."""

    def show(name: str, scale: float = 100, digits: int = 1, *, spread: bool = True) -> str:
        values = [record[name] for record in runs.values() if name in record]
        if not values:
            return ""
        if name.startswith("accuracy"):
            return show_accuracies(values)
        found = interval(values)
        return found.show(scale, digits) if spread else f"{scale * found.mean:.{digits}f}"

    return show


def _convergence(runs: dict[int, Record]) -> str:
    """Median, lowest and highest number of epochs until the accuracy is back; nothing behind two epochs or fewer."""
    records = [record for record in runs.values() if len(record.get("curve", ())) > 3]
    if not records:
        return ""
    last = len(records[0]["curve"]) - 1
    found = sorted(last + 1 if epochs is None else epochs for epochs in map(epochs_until_back, records))
    names = [f"> {last}" if epochs > last else str(epochs) for epochs in found]
    middle = names[(len(names) - 1) // 2]
    return middle if names[0] == names[-1] else f"{middle} [{names[0]}, {names[-1]}]"


def _versus(rows: dict[str, dict[int, Record]], row: str, column: str) -> str:
    """Show a row's paired difference to the best rival in a column."""
    rival = best_rival(rows, column)
    if rival is None or not any(column in record for record in rows[row].values()):
        return ""
    return "best rival" if row == rival else paired_difference(rows[row], rows[rival], column).show(100, sign=True)


def plot_accuracy(records: Sequence[Record], path: str | Path) -> Path:
    """Draw accuracy against MACs of at least one record, a panel per model and data set; return the picture's file.

    Hollow markers are one-shot, filled ones after retraining or, without, after distillation or compensation.
    """
    panels: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        panels[record["model"], record["data"]].append(record)
    figure = Figure(figsize=(5.5 * len(panels), 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, ((model, data), found) in zip(axes, panels.items(), strict=True):
        axis.set(title=f"{model} on {data}", xlabel="MACs (millions)", ylabel="test accuracy (%)")
        axis.grid(alpha=0.3)
        _draw(axis, found)
    axes[0].legend(fontsize="small", title="filled: recovered, hollow: one-shot", title_fontsize="small")
    figure.savefig(path, dpi=150)
    return Path(path)


def plot_convergence(records: Sequence[Record], path: str | Path) -> Path | None:
    """Draw validation accuracy against the epochs of retraining, a line per row; None where nothing was retrained."""
    groups = grouped(record for record in records if len(record.get("curve", ())) > 1)
    if not groups:
        return None
    figure = Figure(figsize=(5.5 * len(groups), 4.2), layout="constrained")
    axes = figure.subplots(1, len(groups), squeeze=False)[0]
    for axis, ((model, data, target), rows) in zip(axes, groups.items(), strict=True):
        axis.set(title=f"{model} on {data},\n{target}", xlabel="epochs of retraining", ylabel="validation accuracy (%)")
        before = [record["validation_before"] for runs in rows.values() for record in runs.values()]
        axis.axhline(100 * float(np.mean(before)), color="k", linestyle=":", label="unpruned")
        means: list[np.ndarray] = []
        for index, (row, runs) in enumerate(rows.items()):
            curves = 100 * np.array([record["curve"] for record in runs.values()])
            style = {
                "linestyle": "-" if index < 10 else "--",
                "marker": _MARKERS[index % len(_MARKERS)],
                "markersize": 4,
            }
            axis.plot(curves.mean(axis=0), **style, color=f"C{index % 10}", label=row)
            means.append(curves.mean(axis=0)[1:])
        # pruned networks often begin at chance, far below all that follows
        low, high = np.min(means), max(np.max(means), 100 * float(np.mean(before)))
        axis.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="x-small", loc="lower right")
    figure.savefig(path, dpi=150)
    return Path(path)


def _draw(axis: object, records: list[Record]) -> None:
    first = records[0]
    axis.plot(first["flops_before"] / 1e6, 100 * first["accuracy_before"], "kh", label="unpruned")  # type: ignore[attr-defined]
    rows = list(dict.fromkeys(record["pruner"] for record in records))
    for index, row in enumerate(rows):
        targets: dict[str, list[Record]] = defaultdict(list)
        for record in records:
            if record["pruner"] == row:
                targets[record["target"]].append(record)
        macs = [interval([r["flops"] for r in runs]).mean / 1e6 for runs in targets.values()]
        # Rows of one target have the same MACs: a small step to the side keeps their markers apart.
        macs = [value + (index - (len(rows) - 1) / 2) * first["flops_before"] / 1e8 for value in macs]
        shared = {"marker": _MARKERS[index % len(_MARKERS)], "color": f"C{index % 10}", "linestyle": "none"}
        for column, style in (("oneshot", {"markerfacecolor": "none"}), ("best", {"label": row})):
            points = [interval([100 * _accuracy(record, column) for record in runs]) for runs in targets.values()]
            heights, halves = [point.mean for point in points], [np.nan_to_num(point.half) for point in points]
            axis.errorbar(macs, heights, yerr=halves, **shared, **style)  # type: ignore[attr-defined]


def _accuracy(record: Record, column: str) -> float:
    """Accuracy as shipped, or after the last step that was done: retraining, else compensation."""
    steps = ("oneshot",) if column == "oneshot" else ("retrained", "distilled", "compensated", "oneshot")
    found = (record[f"accuracy_{step}"] for step in steps if f"accuracy_{step}" in record)
    return float(next(found, np.nan))
