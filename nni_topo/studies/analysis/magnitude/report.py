"""Figures and tables of the magnitude study: means over the seeds, with the lowest and the highest."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from operator import getitem
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nni_topo.runs.provenance import Record
from nni_topo.studies.pictures import finish
from nni_topo.studies.tables import NumberTable, show_range

_WAYS = {"direct": "-", "direct, retrained": "--", "iterative": ":"}
WORDS = {"direct": "direct", "direct, retrained": "direct, fine-tuned", "iterative": "iterative"}
"""The ways, named as in the records, in the words of figures and tables."""
_PARTS = {("level", "all"): "C0", ("level", "conv"): "C1", ("level", "dense"): "C2", ("matrix", "all"): "C3"}
_AGAIN = "unpruned"  # the copy of the unpruned network among the timed ones
_SHARE = "time / unpruned network's time"

PerSeed = Mapping[float, Sequence[float]]
"""By ratio the values of all seeds."""


def magnitude_figure(document: Record) -> Figure:
    """Draw accuracy, each layer's sensitivity, parameters, bytes and time against the ratio."""
    figure = Figure(figsize=(15.0, 8.0), layout="constrained")
    (accuracy, alone, params), (disk, time, spare) = figure.subplots(2, 3)
    spare.remove()
    rows, baselines = document["rows"], document["baselines"]
    for (pruner, part), color in _PARTS.items():
        for way, style in _WAYS.items():
            found = _by_ratio(_chosen(rows, pruner, part, way), "accuracy")
            _line(accuracy, found, style, color, f"{pruner}, {part}, {WORDS[way]}")
    for pruner, color in (("level", "C0"), ("matrix", "C3")):
        chosen = _chosen(rows, pruner)
        if not chosen:
            continue
        _line(params, _by_ratio(chosen, "params"), ".-", color, pruner)
        for name, style in zip(baselines[0]["bytes"], ("-", "--", ":", "-.", ".-"), strict=True):
            _line(disk, _by_ratio(chosen, "bytes", name), style, color, f"{pruner}, {name}")
        for name in chosen[0]["time_shares"]:
            style = {"zeros": "--", _AGAIN: ":"}.get(name, "-")
            _line(time, _by_ratio(chosen, "time_shares", name, "median"), style, color, f"{pruner}, {name}")
    for index, (layers, found) in enumerate(_alone(document).items()):
        _line(alone, found, ".-", f"C{index % 10}", layers)
    for axis, label, unpruned in (
        (accuracy, "accuracy", [base["accuracy"] for base in baselines]),
        (alone, "accuracy, one layer pruned", [base["accuracy"] for base in baselines]),
        (params, "nonzero parameters", [base["params"] for base in baselines]),
        (disk, "bytes on disk", [base["bytes"]["dense"] for base in baselines]),
        (time, _SHARE, 1.0),
    ):
        axis.axhline(float(np.mean(unpruned)), color="0.5", linewidth=0.8)
        finish(axis, "ratio", label, yscale="log" if axis in (params, disk) else "linear")
    return figure


def magnitude_tables(document: Record) -> Iterator[NumberTable | str]:
    """Yield the study's tables: accuracies by way and by layer, then parameters, bytes and times by ratio."""
    rows, baselines = document["rows"], document["baselines"]
    ratios = sorted({row["ratio"] for row in rows})
    heads = [f"{ratio:g}" for ratio in ratios]

    def cells(found: PerSeed, scale: float, digits: int = 1) -> list[str]:
        return [show_range(found[ratio], scale, digits) if ratio in found else "" for ratio in ratios]

    accuracies = []
    for (pruner, part), way in itertools.product(_PARTS, _WAYS):
        found = _by_ratio(_chosen(rows, pruner, part, way), "accuracy")
        if found:
            accuracies.append([pruner, part, WORDS[way], *cells(found, 100)])
    alone = [[layers, *cells(found, 100)] for layers, found in _alone(document).items()]
    costs, noise, halves = [], [], []
    for pruner in ("level", "matrix"):
        chosen = _chosen(rows, pruner)
        if not chosen:
            continue
        unpruned = show_range([base["params"] for base in baselines], 1e-3)
        costs.append([pruner, "parameters (k)", unpruned, *cells(_by_ratio(chosen, "params"), 1e-3)])
        for name in baselines[0]["bytes"]:
            unpruned = show_range([base["bytes"][name] for base in baselines], 1e-3)
            costs.append([pruner, f"{name} (kB)", unpruned, *cells(_by_ratio(chosen, "bytes", name), 1e-3)])
        for name in chosen[0]["time_shares"]:
            found = _by_ratio(chosen, "time_shares", name, "median")
            timed = "copy of the unpruned network" if name == _AGAIN else name
            costs.append([pruner, f"{timed}: {_SHARE}", "1", *cells(found, 1, 2)])
            halves += [row["time_shares"][name]["half"] for row in chosen]
        noise += [row["time_shares"][_AGAIN]["median"] for row in chosen]
    accuracy = show_range([base["accuracy"] for base in baselines], 100)
    first, milliseconds = baselines[0], show_range([base["latency_ms"] for base in baselines])
    yield f"Unpruned: {accuracy} %, {milliseconds} ms for {first['batch']} images. Seeds: {len(baselines)}."
    yield NumberTable(None, ["pruner", "layers", "way", *heads], accuracies, text_columns=3)
    yield NumberTable(None, ["layer alone", *heads], alone)
    yield NumberTable(None, ["pruner", "what", "0", *heads], costs, text_columns=2)
    yield (
        f"Noise of the times: a copy of the unpruned network takes {show_range(noise, 1, 3)} of its time. "
        f"Each is the median of many rounds, whose 95 % interval is on average {100 * float(np.mean(halves)):.1f} % of "
        f"it to either side, at most {100 * max(halves):.1f} %."
    )


def _chosen(rows: Sequence[Record], pruner: str, part: str = "all", way: str = "direct") -> list[Record]:
    wanted = {"pruner": pruner, "part": part, "way": way}
    return sorted((row for row in rows if wanted.items() <= row.items()), key=lambda row: row["ratio"])


def _by_ratio(rows: Iterable[Record], *keys: str) -> PerSeed:
    """Return what lies under the keys in records of several seeds."""
    found = defaultdict[float, list[float]](list)
    for row in rows:
        value: Any = reduce(getitem, keys, row)
        found[row["ratio"]].append(float(value))
    return found


def _alone(document: Record) -> Mapping[str, PerSeed]:
    """Return the accuracies with one layer pruned, by the names of coupled layers."""
    found: dict[str, dict[float, list[float]]] = {}
    for study in document["sensitivities"]:
        for curve in study["curves"]:
            accuracies = found.setdefault("+".join(curve["layers"]), {})
            for ratio, value in curve["accuracy"].items():
                accuracies.setdefault(float(ratio), []).append(value)
    return found


def _line(axis: Axes, found: PerSeed, style: str, color: str, label: str) -> None:
    """Draw the means, and a band from the lowest to the highest where there are several seeds."""
    if not found:
        return
    ratios = list(found)
    axis.plot(ratios, [float(np.mean(found[ratio])) for ratio in ratios], style, color=color, label=label)
    if max(map(len, found.values())) > 1:
        lowest, highest = [min(found[ratio]) for ratio in ratios], [max(found[ratio]) for ratio in ratios]
        axis.fill_between(ratios, lowest, highest, alpha=0.1, linewidth=0, color=color)
