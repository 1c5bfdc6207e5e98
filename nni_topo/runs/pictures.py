"""Pictures of a comparison's records."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nni_topo.runs.records import Record
from nni_topo.runs.tables import grouped, interval

_MARKERS = "osD^vP*X<>"
_STEPS = ("oneshot", "compensated", "distilled", "retrained")


def plot_accuracy(records: Sequence[Record]) -> Figure:
    """Draw accuracy against MACs, with intervals: a panel per step of recovery, each with its own scale.

    A line of panels per model and data set; the dotted line is the unpruned network.

    Parameters
    ----------
    records : sequence of dict
        Records of finished cells, at least one.

    Returns
    -------
    matplotlib.figure.Figure
        Its ``axes`` are the panels.
    """
    groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        groups[record["model"], record["data"]].append(record)
    steps = [step for step in _STEPS if any(f"accuracy_{step}" in record for record in records)]
    figure = Figure(figsize=(4.2 * len(steps), 4.2 * len(groups)), layout="constrained")
    panels = figure.subplots(len(groups), len(steps), squeeze=False)
    for line, ((model, data), found) in zip(panels, groups.items(), strict=True):
        for axis, step in zip(line, steps, strict=True):
            title = f"{model} on {data}, {step.replace('oneshot', 'one-shot')}"
            axis.set(title=title, xlabel="MACs (millions)", ylabel="test accuracy (%)")
            axis.grid(alpha=0.3)
            _draw(axis, found, f"accuracy_{step}")
    panels[0][-1].legend(fontsize="small")
    return figure


def plot_convergence(records: Sequence[Record]) -> Figure | None:
    """Draw validation accuracy against the epochs of retraining: a line per row, the mean over the seeds.

    Parameters
    ----------
    records : sequence of dict
        Records of finished cells.

    Returns
    -------
    matplotlib.figure.Figure or None
        Its ``axes`` are the panels; None where nothing was retrained.
    """
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
            style: dict[str, Any] = {
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
    return figure


def comparison_figures(records: Sequence[Record]) -> dict[str, Figure]:
    """Return a comparison's pictures by the stems of their files."""
    convergence = plot_convergence(records)
    return {"accuracy": plot_accuracy(records)} | ({"convergence": convergence} if convergence else {})


def _draw(axis: Axes, records: list[Record], column: str) -> None:
    whole = 100 * float(np.mean([record["accuracy_before"] for record in records]))
    axis.axhline(whole, color="k", linestyle=":", label="unpruned")
    rows = list(dict.fromkeys(record["pruner"] for record in records))
    for index, row in enumerate(rows):
        targets: dict[str, list[Record]] = defaultdict(list)
        for record in records:
            if record["pruner"] == row and column in record:
                targets[record["target"]].append(record)
        macs = [interval([r["flops"] for r in runs]).mean / 1e6 for runs in targets.values()]
        # Rows of one target have the same MACs: a small step to the side keeps their markers apart.
        macs = [value + (index - (len(rows) - 1) / 2) * records[0]["flops_before"] / 2e8 for value in macs]
        points = [interval([100 * record[column] for record in runs]) for runs in targets.values()]
        marker, color = _MARKERS[index % len(_MARKERS)], f"C{index % 10}"
        halves = [np.nan_to_num(point.half) for point in points]
        axis.errorbar(
            macs, [point.mean for point in points], yerr=halves, marker=marker, color=color, linestyle="none", label=row
        )
