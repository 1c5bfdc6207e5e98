"""Figures of one or several panels, and the figures of a comparison's records."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nni_topo.recovery.verdict import Verdict
from nni_topo.runs.provenance import Record
from nni_topo.runs.report import ShrinkReport
from nni_topo.studies.tables import STEPS, grouped, interval

_MARKERS = "osD^vP*X<>"
_Item = TypeVar("_Item")


def single(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a figure with one panel; sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def finish(
    axis: Axes, xlabel: str = "", ylabel: str = "", *, columns: int = 1, legend: bool = True, **settings: Any
) -> None:
    """Label a panel and add a grid; if its lines have labels, add a legend with ``columns`` columns."""
    axis.set(xlabel=xlabel, ylabel=ylabel, **settings)
    axis.grid(alpha=0.3)
    if legend and axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize="xx-small", ncols=columns)


def panels(
    contents: Iterable[tuple[str, _Item]],
    draw: Callable[[Axes, _Item], None],
    *,
    size: tuple[float, float] = (4.2, 3.4),
    columns: int = 3,
) -> Figure:
    """Draw named contents, each in a panel of ``size`` inches under its name, ``columns`` panels in a row."""
    named = list(contents)
    across = min(columns, len(named))
    down = -(-len(named) // across)
    figure = Figure(figsize=(size[0] * across, size[1] * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).ravel()
    for axis, (name, content) in zip(axes, named, strict=False):
        draw(axis, content)
        axis.set_title(name, fontsize="small")
    for axis in axes[len(named) :]:
        axis.remove()
    return figure


def comparison_figures(records: Sequence[Record]) -> dict[str, Figure]:
    """Return the figures of at least one record: ``accuracy``, and ``convergence`` if networks were fine-tuned.

    ``accuracy`` shows test accuracy against MACs with 95 % intervals, a panel per model, data set and step of recovery;
    ``convergence`` shows mean validation accuracy by epoch, with bands from the lowest to the highest seed.
    """
    by_task: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_task[f"{record['model']} on {record['data']}"].append(record)
    steps = [step for step in STEPS if any(f"accuracy_{step}" in record for record in records)]
    named = [(f"{name}, {STEPS[step]}", (runs, f"accuracy_{step}")) for name, runs in by_task.items() for step in steps]
    is_many = len(by_task) > 2
    pruners = list(dict.fromkeys(record["pruner"] for record in records))
    draw = partial(_draw_accuracy, pruners=pruners)
    size, columns = ((3.4, 3.0), 2 * len(steps)) if is_many else ((4.2, 4.2), len(steps))
    figures = {"accuracy": panels(named, draw, size=size, columns=columns)}
    groups = grouped(record for record in records if len(record.get("curve", ())) > 1)
    if groups:
        titled = ((f"{model} on {data},\n{target}", rows) for (model, data, target), rows in groups.items())
        figures["convergence"] = panels(titled, _draw_convergence, size=(5.5, 4.2))
    for figure in figures.values():
        # one legend for all panels, below them
        handles: dict[str, Artist] = {}
        for axis in figure.axes:
            for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        columns = max(2, round(figure.get_figwidth() / 1.8))
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", fontsize="small", ncols=columns)
    return figures


def plot_gain(report: ShrinkReport) -> Figure:
    """Draw the accuracy after each step, in percent, and the milliseconds of a batch, which must have been measured."""
    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = [row["network"] for row in report.to_dict()["steps"]]
    colors = ["0.6", "C3", "C1", "C2"][: len(names)]
    # The networks after pruning have the same layers, so that one time is that of all.
    times = [report.time.unpruned_ms[0], *[report.time.ms[0]] * (len(names) - 1)] if report.time else []
    for axis, title, values in (
        (left, "test accuracy %", [100.0 * stage.accuracy for stage in report.stages]),
        (right, f"ms for {report.time.samples if report.time else 0} images", times),
    ):
        bars = axis.barh(names[: len(values)], values, color=colors)
        axis.bar_label(bars, fmt="%.3g", padding=3)
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.set_title(title, fontsize="medium")
    return figure


def plot_distillation(verdict: Verdict) -> Figure:
    """Draw the held-out loss before and during a distillation, and below it the learning rate."""
    figure = Figure(figsize=(5.5, 4.4), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    steps = [look.step for look in verdict.curve]
    above.plot(steps, [look.loss for look in verdict.curve], "o-", markersize=3, label="during distillation")
    above.axhline(verdict.loss_before, color="k", linestyle=":", label="before")
    finish(above, ylabel=f"held-out loss ({verdict.objective})", yscale="log")
    below.plot(steps, [look.lr for look in verdict.curve], color="C1")
    finish(below, "steps", "learning rate")
    return figure


def _draw_accuracy(axis: Axes, panel: tuple[list[Record], str], pruners: list[str]) -> None:
    records, column = panel
    groups = grouped(records)
    axis.axhline(100 * interval([run["accuracy_before"] for run in records]).mean, color="k", ls=":", label="unpruned")
    for index, name in enumerate(pruners):  # over all panels, so that a pruner keeps its color
        targets = [[run for run in rows.get(name, {}).values() if column in run] for rows in groups.values()]
        targets = [runs for runs in targets if runs]
        if not targets:
            continue
        # Networks of one target have the same MACs; a small horizontal shift separates their markers.
        step = (index - (len(pruners) - 1) / 2) * records[0]["flops_before"] / 2e8
        macs = [interval([run["flops"] for run in runs]).mean / 1e6 + step for runs in targets]
        points = [interval([100 * run[column] for run in runs]) for runs in targets]
        heights, halves = [point.mean for point in points], [np.nan_to_num(point.half) for point in points]
        # After ten pruners the colors repeat, with other markers.
        marker, color = _MARKERS[(index + index // 10) % len(_MARKERS)], f"C{index % 10}"
        axis.errorbar(macs, heights, yerr=halves, marker=marker, color=color, linestyle="", label=name)
    finish(axis, "MACs (millions)", "test accuracy %", legend=False, xlim=(0, 1.08 * axis.dataLim.x1))
    axis.locator_params(axis="x", nbins=4)


def _draw_convergence(axis: Axes, rows: dict[str, dict[int, Record]]) -> None:
    runs = [run for runs_by_seed in rows.values() for run in runs_by_seed.values()]
    before = 100 * float(np.mean([run["validation_before"] for run in runs]))
    axis.axhline(before, color="k", linestyle=":", label="unpruned")
    for until in sorted({run["until"] for run in runs if run.get("until", 1.0) < 1.0}):
        axis.axhline(until * before, color="0.5", linestyle=":", label=f"{100 * until:g} % of it")
    seen: list[float] = []  # values that set the axis limits; without the first, which is often at chance level
    for index, (name, runs_by_seed) in enumerate(rows.items()):
        curves = [run["curve"] for run in runs_by_seed.values()]
        longest = max(map(len, curves))
        # seeds x epochs
        extended = [[*curve, *[curve[-1]] * (longest - len(curve))] for curve in curves]
        percent = 100 * np.array(extended)
        means = percent.mean(axis=0)
        dashes = "-" if index < 10 else "--"
        line = f"{_MARKERS[index % len(_MARKERS)]}{dashes}"
        color = f"C{index % 10}"
        axis.plot(means, line, markersize=4, color=color, label=name)
        axis.fill_between(range(longest), percent.min(axis=0), percent.max(axis=0), color=color, alpha=0.1, lw=0)
        seen += means[1:].tolist()
    low, high = min(seen), max(before, *seen)
    margin = 0.1 * (high - low) or 1.0
    limits = (low - margin, high + margin)
    finish(axis, "epochs of fine-tuning", "validation accuracy %", legend=False, ylim=limits)
