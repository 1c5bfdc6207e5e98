"""Tables and figures of the study of iterative magnitude pruning with and without spanning trees."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nni_topo.runs.provenance import Record
from nni_topo.studies.pictures import finish, panels
from nni_topo.studies.tables import Interval, NumberTable, interval, show_accuracies

_COLORS = {"IMP": "C1", "T-IMP": "C0", "IMP capped": "C2"}


def rounds_tables(records: Iterable[Record]) -> Iterator[NumberTable]:
    """Yield a table per model, then one of the overlap of each trained linear layer, with its bound.

    A model's table has a row per sparsity: accuracy, weights kept and connectivity of each method, and the differences
    of T-IMP, rewound or not, to the methods that it is compared with, paired by seed.
    """
    for model, methods in _by_model(records).items():
        runs = next(iter(methods.values()))
        pairs = []
        for ours in methods:
            if ours.startswith("T-IMP"):
                compared = [ours.replace("T-IMP", name) for name in ("IMP", "IMP capped")]
                pairs += [(ours, baseline) for baseline in methods if baseline in compared]
        head = ["target sparsity %"]
        for method in methods:
            head += [f"{method}: kept %", "accuracy %", "channels connected %", "outputs reached %"]
        head += [f"T-IMP - {baseline.partition(',')[0]}" for _, baseline in pairs]
        rows = []
        for index, entry in enumerate(runs[0]["rounds"]):
            cells = [f"{100 * entry['target']:g}"]
            accuracies: dict[str, dict[int, float]] = {}
            for method, each in methods.items():
                means = {
                    key: 100 * float(np.mean([run["rounds"][index][key] for run in each]))
                    for key in ("kept", "channels_connected", "outputs_reached")
                }
                accuracies[method] = {run["seed"]: run["rounds"][index]["accuracy"] for run in each}
                cells += [f"{means['kept']:.2f}", show_accuracies(list(accuracies[method].values()))]
                cells += [f"{means[key]:.1f}" for key in ("channels_connected", "outputs_reached")]
            for ours, baseline in pairs:
                seeds = sorted(accuracies[ours].keys() & accuracies[baseline].keys())
                gains = [accuracies[ours][seed] - accuracies[baseline][seed] for seed in seeds]
                cells.append(interval(gains).show(100, sign=True))
            rows.append(cells)
        before = show_accuracies([run["accuracy_before"] for run in runs])
        what = f"{runs[0]['images']} images, {len(runs)} seed{'s' * (len(runs) > 1)}"
        yield NumberTable(f"{model} on {runs[0]['data']}, {what}; dense {before} %", head, rows)
    overlaps = [
        [model, name, measured.show(100), f"{100 * bound:.1f}"]
        for model, layers in _overlaps(records).items()
        for name, (measured, bound) in layers.items()
    ]
    yield NumberTable(None, ["net", "layer", "overlap measured %", "bound %"], overlaps, text_columns=2)


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


def _draw(axis: Axes, runs: list[Record], key: str, label: str, style: str) -> None:
    targets = [1.0 / (1.0 - level) for level in runs[0]["sparsities"]]
    values = 100 * np.array([[entry[key] for entry in run["rounds"]] for run in runs])
    options: dict[str, Any] = {"color": _COLORS.get(re.split("[:,]", label)[0])}
    axis.plot(targets, values.mean(0), style, marker=".", label=label, **options)
    if len(runs) > 1:
        axis.fill_between(targets, values.min(0), values.max(0), alpha=0.15, linewidth=0, **options)
