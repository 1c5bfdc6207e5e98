"""Pictures and tables of the magnitude study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Row = dict[str, Any]
_WAYS = {"direct": "-", "direct, retrained": "--", "iterative": ":"}
_PARTS = {("level", "all"): "C0", ("level", "conv"): "C1", ("level", "dense"): "C2", ("matrix", "all"): "C3"}


def plot_magnitude(document: dict[str, Any], folder: str | Path) -> list[Path]:
    """Draw accuracy, each layer's sensitivity, parameters, bytes and time against the ratio: ``magnitude.png``."""
    figure = Figure(figsize=(15.0, 8.0), layout="constrained")
    (accuracy, alone, params), (disk, time, spare) = figure.subplots(2, 3)
    spare.remove()
    rows, baseline = document["rows"], document["baseline"]
    for (pruner, part), color in _PARTS.items():
        for way, style in _WAYS.items():
            _line(accuracy, _chosen(rows, pruner, part, way), "accuracy", style, color, f"{pruner}, {part}, {way}")
    for pruner, color in (("level", "C0"), ("matrix", "C3")):
        chosen = _chosen(rows, pruner, "all", "direct")
        _line(params, chosen, "params", ".-", color, pruner)
        for index, name in enumerate(baseline["bytes"]):
            style = ("-", "--", ":", "-.", ".-")[index % 5]
            _line(
                disk, [{**row, "size": row["bytes"][name]} for row in chosen], "size", style, color, f"{pruner}, {name}"
            )
        for name in _timed(chosen):
            # shares of the unpruned network's time: it was timed in turns with the others
            timed = [{**row, "share": share} for row, share in zip(chosen, _shares(chosen, name), strict=True)]
            _line(time, timed, "share", "--" if name == "zeros" else "-", color, f"{pruner}, {name}")
    for index, curve in enumerate(document["sensitivity"]["curves"]):
        points = [{"ratio": float(ratio), "accuracy": value} for ratio, value in curve["accuracy"].items()]
        _line(alone, points, "accuracy", ".-", f"C{index % 10}", "+".join(curve["layers"]))
    for axis in (accuracy, alone):
        axis.axhline(baseline["accuracy"], color="0.5", linewidth=0.8)
    params.axhline(baseline["params"], color="0.5", linewidth=0.8)
    disk.axhline(baseline["bytes"]["dense"], color="0.5", linewidth=0.8)
    time.axhline(1.0, color="0.5", linewidth=0.8)
    labels = (
        (accuracy, "accuracy"),
        (alone, "accuracy, one layer pruned"),
        (params, "parameters left"),
        (disk, "bytes on disk"),
        (time, "time, of the unpruned network's"),
    )
    for axis, label in labels:
        axis.set(xlabel="ratio", ylabel=label)
        axis.legend(fontsize="xx-small")
        axis.grid(alpha=0.3)
    disk.set_yscale("log")
    params.set_yscale("log")
    path = Path(folder) / "magnitude.png"
    figure.savefig(path, dpi=130)
    return [path]


def markdown_magnitude(document: dict[str, Any]) -> str:
    """Return the study's tables: accuracies by way and by layer, then what is left of parameters, bytes and time."""
    rows, baseline = document["rows"], document["baseline"]
    ratios = sorted({row["ratio"] for row in rows})
    head = [f"{ratio:g}" for ratio in ratios]
    accuracies = [["pruner", "layers", "way", *head]]
    for pruner, part in _PARTS:
        for way in _WAYS:
            found = {row["ratio"]: row["accuracy"] for row in _chosen(rows, pruner, part, way)}
            if found:
                accuracies.append([pruner, part, way, *(_percent(found.get(ratio)) for ratio in ratios)])
    costs = [["pruner", "what", "0", *head]]
    for pruner in ("level", "matrix"):
        chosen = {row["ratio"]: row for row in _chosen(rows, pruner, "all", "direct")}
        if not chosen:
            continue
        by_ratio = [chosen[ratio] for ratio in ratios]
        costs.append([pruner, "parameters (k)", *_scaled([baseline["params"], *(row["params"] for row in by_ratio)])])
        for name, size in baseline["bytes"].items():
            costs.append([pruner, f"{name} (kB)", *_scaled([size, *(row["bytes"][name] for row in by_ratio)])])
        for name in _timed(by_ratio):
            shares = [1.0, *_shares(by_ratio, name)]
            costs.append([pruner, f"{name}: time, of the unpruned network's", *(f"{share:.2f}" for share in shares)])
    found = document["sensitivity"]["curves"]
    alone = [["+".join(c["layers"]), *(_percent(c["accuracy"].get(str(ratio))) for ratio in ratios)] for c in found]
    curves = [["layer alone", *head], *alone]
    whole = f"Unpruned: {_percent(baseline['accuracy'])} %, {baseline['latency_ms']:.2f} ms for 64 images."
    return "\n\n".join((whole, *map(_table, (accuracies, curves, costs))))


def _chosen(rows: Sequence[Row], pruner: str, part: str, way: str) -> list[Row]:
    wanted = {"pruner": pruner, "part": part, "way": way}
    return sorted((row for row in rows if wanted.items() <= row.items()), key=lambda row: row["ratio"])


def _timed(rows: Sequence[Row]) -> list[str]:
    return [name for name in rows[0]["latency_ms"] if name != "unpruned"] if rows else []


def _shares(rows: Sequence[Row], name: str) -> list[float]:
    return [row["latency_ms"][name] / row["latency_ms"]["unpruned"] for row in rows]


def _line(axis: Axes, rows: Sequence[Row], key: str, style: str, color: str, label: str) -> None:
    if rows:
        axis.plot([row["ratio"] for row in rows], [row[key] for row in rows], style, color=color, label=label)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _scaled(values: Sequence[float]) -> list[str]:
    return [f"{value / 1e3:.1f}" for value in values]


def _table(rows: list[list[str]]) -> str:
    head, *body = rows
    rule = ["---" if index < 1 else "---:" for index in range(len(head))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *body))
