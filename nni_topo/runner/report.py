"""Tables and pictures of a comparison's records."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from scipy import stats

from nni_topo.registry import list_pruners, pruner_info
from nni_topo.runner.records import Record

Group = tuple[str, str, str]
COLUMNS = (
    "method",
    "MACs (M)",
    "parameters (k)",
    "before %",
    "one-shot %",
    "BN recal. %",
    "retrained %",
    "vs best rival",
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
    """Return the mean of values and half its 95 % interval.

    Parameters
    ----------
    values : sequence of float
        At least one.

    Examples
    --------
    >>> interval([1.0, 2.0, 3.0]).show(digits=2)
    '2.00 ± 2.48'
    """
    array = np.asarray(values, dtype=np.float64)
    if len(array) < 2:
        return Interval(float(array.mean()), float("nan"))
    half = stats.t.ppf(0.975, len(array) - 1) * array.std(ddof=1) / np.sqrt(len(array))
    return Interval(float(array.mean()), float(half))


def grouped(records: Iterable[Record]) -> dict[Group, dict[str, dict[int, Record]]]:
    """Sort records by model, data and target, then by pruner, then by seed."""
    groups: dict[Group, dict[str, dict[int, Record]]] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        groups[record["model"], record["data"], record["target"]][record["pruner"]][record["seed"]] = record
    return groups


def paired_difference(ours: dict[int, Record], theirs: dict[int, Record], column: str) -> Interval:
    """Return the difference of a column over the seeds that both rows have."""
    seeds = sorted(set(ours) & set(theirs))
    return interval([ours[seed][column] - theirs[seed][column] for seed in seeds])


def best_rival(rows: dict[str, dict[int, Record]], column: str) -> str | None:
    """Return the row with the highest mean among the pruners that aren't this package's."""
    own = {name for name in list_pruners() if pruner_info(name).origin == "nni_topo"}
    rivals = [row for row, runs in rows.items() if next(iter(runs.values()))["pruner_name"] not in own]
    return max(rivals, key=lambda row: float(np.mean([r[column] for r in rows[row].values()])), default=None)


def print_report(records: Iterable[Record], console: Console) -> None:
    """Print one table per model, data set and target.

    Parameters
    ----------
    records : iterable of dict
        Records of finished cells.
    console : rich.console.Console
        Where to.
    """
    for group, rows in grouped(records).items():
        table = Table(title=_title(group, rows), title_justify="left")
        for index, name in enumerate(COLUMNS):
            table.add_column(name, justify="right" if index else "left")
        for index, cells in enumerate(_table(rows)):
            table.add_row(*cells, end_section=index == 0)
        console.print(table)


def print_widths(records: Iterable[Record], console: Console) -> None:
    """Print the mean number of output channels of every layer, one table per model, data set and target.

    Parameters
    ----------
    records : iterable of dict
        Records of finished cells.
    console : rich.console.Console
        Where to.
    """
    for group, rows in grouped(records).items():
        table = Table("layer", title=f"widths: {_title(group, rows)}", title_justify="left")
        for row in rows:
            table.add_column(row, justify="right")
        for layer in next(iter(next(iter(rows.values())).values()))["widths"]:
            widths = (interval([record["widths"][layer] for record in runs.values()]).mean for runs in rows.values())
            table.add_row(layer, *(f"{width:g}" for width in widths))
        console.print(table)


def markdown_report(records: Iterable[Record]) -> str:
    """Return one Markdown table per model, data set and target.

    Parameters
    ----------
    records : iterable of dict
        Records of finished cells.
    """
    lines = []
    for group, rows in grouped(records).items():
        lines += [f"**{_title(group, rows)}**", "", f"| {' | '.join(COLUMNS)} |"]
        lines.append("|---|" + "---:|" * (len(COLUMNS) - 1))
        lines += [f"| {' | '.join(cells)} |" for cells in _table(rows)]
        lines.append("")
    return "\n".join(lines)


def _title(group: Group, rows: dict[str, dict[int, Record]]) -> str:
    model, data, target = group
    seeds = max(len(runs) for runs in rows.values())
    return f"{model} on {data}, {target} ({seeds} seed{'s' if seeds > 1 else ''})"


def _table(rows: dict[str, dict[int, Record]]) -> list[list[str]]:
    """Cells of a table: the unpruned network, then a line per pruner."""
    rival = best_rival(rows, "accuracy_retrained")
    first = next(iter(next(iter(rows.values())).values()))
    before = _column(next(iter(rows.values())))
    macs, params = f"{first['flops_before'] / 1e6:.2f}", f"{first['params_before'] / 1e3:.1f}"
    accuracy, latency = before("accuracy_before").show(100), before("latency_before_ms").show(digits=2)
    table = [["unpruned", macs, params, accuracy, "", "", "", "", latency, ""]]
    for row, runs in rows.items():
        cell = _column(runs)
        versus = "" if rival is None else "best rival"
        if rival is not None and row != rival:
            versus = paired_difference(runs, rows[rival], "accuracy_retrained").show(100, sign=True)
        table.append(
            [
                row,
                f"{cell('flops').mean / 1e6:.2f}",
                f"{cell('params').mean / 1e3:.1f}",
                cell("accuracy_before").show(100),
                cell("accuracy_oneshot").show(100),
                cell("accuracy_recalibrated").show(100),
                cell("accuracy_retrained").show(100),
                versus,
                cell("latency_ms").show(digits=2),
                f"{cell('prune_seconds').mean:.2f}",
            ]
        )
    return table


def _column(runs: dict[int, Record]) -> Callable[[str], Interval]:
    return lambda name: interval([record[name] for record in runs.values()])


def plot_accuracy(records: Sequence[Record], path: str | Path) -> Path:
    """Draw accuracy against MACs: hollow markers one-shot, filled ones retrained, one panel per model and data set.

    Parameters
    ----------
    records : sequence of dict
        Records of finished cells, at least one.
    path : str or Path
        Where to write; the ending says the format.

    Returns
    -------
    Path
        The file.
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
    axes[0].legend(fontsize="small", title="filled: retrained, hollow: one-shot", title_fontsize="small")
    figure.savefig(path, dpi=150)
    return Path(path)


def _draw(axis: object, records: list[Record]) -> None:
    markers = "osD^vP*X<>"
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
        shared = {"marker": markers[index % len(markers)], "color": f"C{index % 10}", "linestyle": "none"}
        for column, style in (
            ("accuracy_oneshot", {"markerfacecolor": "none"}),
            ("accuracy_retrained", {"label": row}),
        ):
            points = [interval([r[column] for r in runs]) for runs in targets.values()]
            heights, halves = [100 * p.mean for p in points], [100 * np.nan_to_num(p.half) for p in points]
            axis.errorbar(macs, heights, yerr=halves, **shared, **style)  # type: ignore[attr-defined]
