"""Tables and figures of the study of iterative magnitude pruning with and without spanning trees."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nni_topo.network.runtime.reports import markdown_table
from nni_topo.runs.provenance import Record
from nni_topo.studies.pictures import finish, panels
from nni_topo.studies.tables import Interval, interval, show_accuracies

_COLORS = {"IMP": "C1", "T-IMP": "C0", "IMP capped": "C2"}


def markdown_rounds(records: Iterable[Record]) -> str:
    """Return a Markdown table per model: a row per sparsity, accuracy, weights kept and connectivity per method."""
    parts = []
    for model, methods in _by_model(records).items():
        runs = next(iter(methods.values()))
        before = show_accuracies([run["accuracy_before"] for run in runs])
        what = f"{runs[0]['images']} images, {len(runs)} seed{'s' * (len(runs) > 1)}"
        head = ["target sparsity %"]
        for method in methods:
            head += [f"{method}: kept %", "accuracy %", "channels connected %", "outputs reached %"]
        head += [f"T-IMP - {baseline.partition(',')[0]}" for _, baseline in _baselines(methods)]
        rows = [_row(methods, index) for index in range(len(runs[0]["rounds"]))]
        parts.append(f"**{model} on {runs[0]['data']}, {what}; dense {before} %**\n\n")
        parts[-1] += markdown_table(head, rows, text_columns=0) + "\n"
    return "\n".join(parts)


def markdown_overlap(records: Iterable[Record]) -> str:
    """Return a Markdown table: the overlap of each trained linear layer, with its bound."""
    rows = [
        (model, name, measured.show(100), f"{100 * bound:.1f}")
        for model, layers in _overlaps(records).items()
        for name, (measured, bound) in layers.items()
    ]
    return markdown_table(("net", "layer", "overlap measured %", "bound %"), rows, text_columns=2)


def rounds_figure(records: Iterable[Record]) -> Figure:
    """Draw accuracy and connectivity over the target sparsity, a column per model."""
    models = _by_model(records)
    figure = Figure(figsize=(4.2 * len(models), 6.4), layout="constrained")
    axes = figure.subplots(2, len(models), squeeze=False, sharex="col")
    for (upper, lower), (model, methods) in zip(axes.T, models.items(), strict=True):
        for method, runs in methods.items():
            _draw(upper, runs, "accuracy", method, "-")
            _draw(lower, runs, "channels_connected", f"{method}: channels connected", "-")
            _draw(lower, runs, "outputs_reached", f"{method}: outputs reached", ":")
        critical = [min(entry["kept"] for entry in runs[0]["rounds"]) for m, runs in methods.items() if "T-IMP" in m]
        for axis in (upper, lower):
            for kept in critical:
                axis.axvline(1.0 / kept, color="black", linewidth=0.7, linestyle="--")
        finish(upper, "", "accuracy %", title=f"{model}\ndashed: critical compression", xscale="log")
        finish(lower, "target compression (weights / weights kept)", "%")
    return figure


def overlap_figure(records: Iterable[Record]) -> Figure:
    """Draw the overlap of each trained linear layer beside its bound, a panel per model."""

    def draw(axis: Axes, layers: dict[str, tuple[Interval, float]]) -> None:
        places = np.arange(len(layers))
        means = [100 * measured.mean for measured, _ in layers.values()]
        halves = [100 * np.nan_to_num(measured.half) for measured, _ in layers.values()]
        axis.bar(places - 0.2, means, 0.4, yerr=halves, label="measured, trained")
        axis.bar(places + 0.2, [100 * bound for _, bound in layers.values()], 0.4, label="lower bound")
        finish(axis, ylabel="tree among the largest weights, %")
        axis.set_xticks(places, [name.rpartition(".")[2] for name in layers], fontsize="small")

    return panels(_overlaps(records).items(), draw, size=(3.6, 3.6))


def _by_model(records: Iterable[Record]) -> dict[str, dict[str, list[Record]]]:
    models: dict[str, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        models[record["model"]][record["method"]].append(record)
    return models


def _overlaps(records: Iterable[Record]) -> dict[str, dict[str, tuple[Interval, float]]]:
    """Return per model and layer the interval of the measured overlap over the seeds, and the bound."""
    found: dict[str, dict[str, tuple[Interval, float]]] = {}
    for model, methods in _by_model(records).items():
        runs = next(iter(methods.values()))
        found[model] = {
            name: (interval([run["overlap"][name]["measured"] for run in runs]), first["bound"])
            for name, first in runs[0]["overlap"].items()
        }
    return found


def _row(methods: dict[str, list[Record]], index: int) -> list[str]:
    cells = [f"{100 * next(iter(methods.values()))[0]['rounds'][index]['target']:g}"]
    for runs in methods.values():
        cells.append(f"{100 * _mean(runs, index, 'kept'):.2f}")
        cells.append(show_accuracies([run["rounds"][index]["accuracy"] for run in runs]))
        cells += [f"{100 * _mean(runs, index, key):.1f}" for key in ("channels_connected", "outputs_reached")]
    by_seed = {m: {run["seed"]: run["rounds"][index]["accuracy"] for run in runs} for m, runs in methods.items()}
    for ours, baseline in _baselines(methods):
        seeds = sorted(by_seed[ours].keys() & by_seed[baseline].keys())
        gains = [by_seed[ours][seed] - by_seed[baseline][seed] for seed in seeds]
        cells.append(interval(gains).show(100, sign=True))
    return cells


def _baselines(methods: dict[str, list[Record]]) -> list[tuple[str, str]]:
    """Return T-IMP, rewound or not, with each method that it is compared with."""
    pairs = []
    for ours in methods:
        if not ours.startswith("T-IMP"):
            continue
        compared = [ours.replace("T-IMP", name) for name in ("IMP", "IMP capped")]
        pairs += [(ours, baseline) for baseline in methods if baseline in compared]
    return pairs


def _mean(runs: list[Record], index: int, key: str) -> float:
    return float(np.mean([run["rounds"][index][key] for run in runs]))


def _draw(axis: Axes, runs: list[Record], key: str, label: str, style: str) -> None:
    targets = [1.0 / (1.0 - level) for level in runs[0]["sparsities"]]
    values = 100 * np.array([[entry[key] for entry in run["rounds"]] for run in runs])
    options: dict[str, Any] = {"color": _COLORS.get(re.split("[:,]", label)[0])}
    axis.plot(targets, values.mean(0), style, marker=".", label=label, **options)
    if len(runs) > 1:
        axis.fill_between(targets, values.min(0), values.max(0), alpha=0.15, linewidth=0, **options)
