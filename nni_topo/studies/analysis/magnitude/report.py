"""Figures and tables of the magnitude study."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nni_topo.runs.provenance import Record
from nni_topo.studies.pictures import finish
from nni_topo.studies.tables import markdown_table

_WAYS = {"direct": "-", "direct, retrained": "--", "iterative": ":"}
WORDS = {"direct": "direct", "direct, retrained": "direct, fine-tuned", "iterative": "iterative"}
"""The ways, named as in the records, in the words of figures and tables."""
_PARTS = {("level", "all"): "C0", ("level", "conv"): "C1", ("level", "dense"): "C2", ("matrix", "all"): "C3"}


def magnitude_figure(document: Record) -> Figure:
    """Draw accuracy, each layer's sensitivity, parameters, bytes and time against the ratio."""
    figure = Figure(figsize=(15.0, 8.0), layout="constrained")
    (accuracy, alone, params), (disk, time, spare) = figure.subplots(2, 3)
    spare.remove()
    rows, baseline = document["rows"], document["baseline"]
    for (pruner, part), color in _PARTS.items():
        for way, style in _WAYS.items():
            points = [(row["ratio"], row["accuracy"]) for row in _chosen(rows, pruner, part, way)]
            _line(accuracy, points, style, color, f"{pruner}, {part}, {WORDS[way]}")
    for pruner, color in (("level", "C0"), ("matrix", "C3")):
        chosen = _chosen(rows, pruner, "all", "direct")
        _line(params, [(row["ratio"], row["params"]) for row in chosen], ".-", color, pruner)
        for name, style in zip(baseline["bytes"], ("-", "--", ":", "-.", ".-"), strict=True):
            _line(disk, [(row["ratio"], row["bytes"][name]) for row in chosen], style, color, f"{pruner}, {name}")
        for name, shares in _shares(chosen).items():
            points = [(row["ratio"], share) for row, share in zip(chosen, shares, strict=True)]
            _line(time, points, "--" if name == "zeros" else "-", color, f"{pruner}, {name}")
    for index, curve in enumerate(document["sensitivity"]["curves"]):
        points = [(float(ratio), value) for ratio, value in curve["accuracy"].items()]
        _line(alone, points, ".-", f"C{index % 10}", "+".join(curve["layers"]))
    for axis, label, unpruned in (
        (accuracy, "accuracy", baseline["accuracy"]),
        (alone, "accuracy, one layer pruned", baseline["accuracy"]),
        (params, "nonzero parameters", baseline["params"]),
        (disk, "bytes on disk", baseline["bytes"]["dense"]),
        (time, "time / unpruned network's time", 1.0),
    ):
        axis.axhline(unpruned, color="0.5", linewidth=0.8)
        finish(axis, "ratio", label, yscale="log" if axis in (params, disk) else "linear")
    return figure


def markdown_magnitude(document: Record) -> str:
    """Return the study's tables: accuracies by way and by layer, then parameters, bytes and times by ratio."""
    rows, baseline = document["rows"], document["baseline"]
    ratios = sorted({row["ratio"] for row in rows})
    head = [f"{ratio:g}" for ratio in ratios]
    accuracies = []
    for (pruner, part), way in itertools.product(_PARTS, _WAYS):
        found = {row["ratio"]: row["accuracy"] for row in _chosen(rows, pruner, part, way)}
        if found:
            accuracies.append([pruner, part, WORDS[way], *(_percent(found.get(ratio)) for ratio in ratios)])
    costs = []
    for pruner in ("level", "matrix"):
        chosen = _chosen(rows, pruner, "all", "direct")
        if not chosen:
            continue
        costs.append([pruner, "parameters (k)", *_thousands([baseline["params"], *(row["params"] for row in chosen)])])
        for name, size in baseline["bytes"].items():
            costs.append([pruner, f"{name} (kB)", *_thousands([size, *(row["bytes"][name] for row in chosen)])])
        for name, shares in _shares(chosen).items():
            shown = (f"{share:.2f}" for share in (1.0, *shares))
            costs.append([pruner, f"{name}: time / unpruned network's time", *shown])
    curves = document["sensitivity"]["curves"]
    alone = [["+".join(c["layers"]), *(_percent(c["accuracy"].get(str(ratio))) for ratio in ratios)] for c in curves]
    return "\n\n".join(
        (
            f"Unpruned: {_percent(baseline['accuracy'])} %, {baseline['latency_ms']:.2f} ms for 64 images.",
            markdown_table(["pruner", "layers", "way", *head], accuracies),
            markdown_table(["layer alone", *head], alone),
            markdown_table(["pruner", "what", "0", *head], costs),
        )
    )


def _chosen(rows: Sequence[Record], pruner: str, part: str, way: str) -> list[Record]:
    wanted = {"pruner": pruner, "part": part, "way": way}
    return sorted((row for row in rows if wanted.items() <= row.items()), key=lambda row: row["ratio"])


def _shares(rows: Sequence[Record]) -> dict[str, list[float]]:
    """Return each network's times over those of the unpruned network, which was timed in turns with it."""
    timed = [row["latency_ms"] for row in rows]
    names = [name for name in timed[0] if name != "unpruned"] if timed else []
    return {name: [times[name] / times["unpruned"] for times in timed] for name in names}


def _line(axis: Axes, points: Sequence[tuple[float, float]], style: str, color: str, label: str) -> None:
    if points:
        axis.plot(*zip(*points, strict=True), style, color=color, label=label)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _thousands(values: Sequence[float]) -> list[str]:
    return [f"{value / 1e3:.1f}" for value in values]
