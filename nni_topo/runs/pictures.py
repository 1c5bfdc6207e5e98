"""Pictures: one panel or several, what all panels have, and those of a comparison's records."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nni_topo.runs.records import Record
from nni_topo.runs.tables import grouped, interval

_MARKERS = "osD^vP*X<>"
_ONE_SHOT = ("oneshot",)
_RECOVERED = ("retrained", "distilled", "compensated", "oneshot")
_Item = TypeVar("_Item")


def single(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a figure of a size in inches with one panel."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def finish(axis: Axes, xlabel: str = "", ylabel: str = "", *, columns: int = 1, **settings: Any) -> None:
    """Label a panel, put a grid under it and, where lines have labels, a legend of so many columns on it."""
    axis.set(xlabel=xlabel, ylabel=ylabel, **settings)
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize="xx-small", ncols=columns)


def panels(
    items: Iterable[tuple[str, _Item]],
    draw: Callable[[Axes, _Item], None],
    *,
    size: tuple[float, float] = (4.2, 3.4),
    columns: int = 3,
) -> Figure:
    """Draw each item in a panel of a size in inches, its name above it, so many beside each other."""
    named = list(items)
    across = min(columns, len(named))
    down = -(-len(named) // across)
    figure = Figure(figsize=(size[0] * across, size[1] * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).ravel()
    for axis, (name, item) in zip(axes, named, strict=False):
        draw(axis, item)
        axis.set_title(name, fontsize="small")
    for axis in axes[len(named) :]:
        axis.remove()
    return figure


def plot_accuracy(records: Sequence[Record], path: str | Path) -> Path:
    """Draw accuracy against MACs of at least one record, a panel per model and data set; return the picture's file.

    Hollow markers are one-shot, filled ones after retraining or, without, after distillation or compensation.
    """
    found: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        found[f"{record['model']} on {record['data']}"].append(record)
    return _saved(panels(found.items(), _draw_accuracy, size=(5.5, 4.2)), path)


def plot_convergence(records: Sequence[Record], path: str | Path) -> Path | None:
    """Draw validation accuracy against the epochs of retraining, a line per row; None where nothing was retrained."""
    groups = grouped(record for record in records if len(record.get("curve", ())) > 1)
    if not groups:
        return None
    named = ((f"{model} on {data},\n{target}", rows) for (model, data, target), rows in groups.items())
    return _saved(panels(named, _draw_convergence, size=(5.5, 4.2)), path)


def _saved(figure: Figure, path: str | Path) -> Path:
    figure.savefig(path, dpi=150)
    return Path(path)


def _draw_accuracy(axis: Axes, records: list[Record]) -> None:
    first, groups = records[0], grouped(records)
    axis.plot(first["flops_before"] / 1e6, 100 * first["accuracy_before"], "kh", label="unpruned")
    names = list(dict.fromkeys(record["pruner"] for record in records))
    for index, name in enumerate(names):
        targets = [list(rows[name].values()) for rows in groups.values() if name in rows]
        # Rows of one target have the same MACs: a small step to the side keeps their markers apart.
        step = (index - (len(names) - 1) / 2) * first["flops_before"] / 1e8
        macs = [interval([run["flops"] for run in runs]).mean / 1e6 + step for runs in targets]
        shared: dict[str, Any] = {"marker": _MARKERS[index % len(_MARKERS)], "color": f"C{index % 10}", "linestyle": ""}
        for steps, style in ((_ONE_SHOT, {"markerfacecolor": "none"}), (_RECOVERED, {"label": name})):
            points = [interval([100 * _accuracy(run, steps) for run in runs]) for runs in targets]
            heights, halves = [point.mean for point in points], [np.nan_to_num(point.half) for point in points]
            axis.errorbar(macs, heights, yerr=halves, **shared, **style)
    finish(axis, "MACs (millions)", "test accuracy % (filled: recovered, hollow: one-shot)")


def _accuracy(record: Record, steps: Sequence[str]) -> float:
    """Return the accuracy after the first of some steps that was done."""
    return float(next((record[f"accuracy_{step}"] for step in steps if f"accuracy_{step}" in record), np.nan))


def _draw_convergence(axis: Axes, rows: dict[str, dict[int, Record]]) -> None:
    before = 100 * float(np.mean([run["validation_before"] for runs in rows.values() for run in runs.values()]))
    axis.axhline(before, color="k", linestyle=":", label="unpruned")
    means = [100 * np.array([run["curve"] for run in runs.values()]).mean(axis=0) for runs in rows.values()]
    for index, (name, curve) in enumerate(zip(rows, means, strict=True)):
        line = f"{_MARKERS[index % len(_MARKERS)]}{'-' if index < 10 else '--'}"
        axis.plot(curve, line, markersize=4, color=f"C{index % 10}", label=name)
    # pruned networks often begin at chance, far below all that follows
    low, high = min(curve[1:].min() for curve in means), max(before, *(curve[1:].max() for curve in means))
    margin = 0.1 * (high - low)
    finish(axis, "epochs of retraining", "validation accuracy %", ylim=(low - margin, high + margin))
