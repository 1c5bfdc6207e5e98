"""The tables and pictures of `bench_subcluster`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from subcluster_rules import SOURCE, tables


def report(records: list[dict[str, Any]], out: Path, most: Mapping[str, int]) -> None:
    """Print every table as Markdown and draw the pictures; ``most``: by net, the epochs that it had to come back."""
    frame = pd.DataFrame(records)
    for part, cells in frame.groupby("part", sort=False):
        print(f"\n**{part}**\n")
        if part == "rules":
            print("\n".join(tables([record for record in records if record["part"] == part])))
            continue
        for line in _layers(cells, most) if part == "networks" else _rows(cells, most):
            print(line)
        for line in unrisen(cells) if part == "statistics" else ():
            print(line)
    networks = frame[(frame["part"] == "networks") & (frame["seed"] == 0)]
    if len(networks):
        _curves(networks).savefig(out / "retraining.png", dpi=110)
    for part in ("algorithms", "survivors"):
        cells = frame[frame["part"] == part]
        if len(cells):
            _picture(cells).savefig(out / f"{part}.png", dpi=130)


def _layers(cells: pd.DataFrame, most: Mapping[str, int]) -> Iterator[str]:
    yield "| net | layer | before | initial | after, by run | the text's share % | share, by run % |"
    yield "|---|---|---:|---:|---:|---:|---:|"
    for net, runs in cells.groupby("net", sort=False):
        first = runs.iloc[0]
        layers = [layer for layer in first["widths_before"] if layer in first["initial"]]
        for layer, whole, after in zip(layers, *SOURCE[str(net)], strict=True):
            before = first["widths_before"][layer]
            kept = [widths[layer] for widths in runs["widths"]]
            shares = ", ".join(f"{100 * nodes / before:.0f}" for nodes in kept)
            nodes = ", ".join(map(str, kept))
            row = (net, layer, before, first["initial"][layer], nodes, f"{100 * after / whole:.0f}", shares)
            yield f"| {' | '.join(map(str, row))} |"
    yield ""
    yield from _rows(cells, most)


def _rows(cells: pd.DataFrame, most: Mapping[str, int]) -> Iterator[str]:
    shown = {
        "before": "before %",
        "validation": "no recovery, validation %",
        "pruned": "no recovery %",
        "updated": "updated %",
        "rebuilt": "weight reconstruction %",
    }
    shown |= {"retrained": "fine-tuned %", "retrained_updated": "updated, fine-tuned %"}
    shown |= {f"error_{row}": f"error, {shown[row]}" for row in ("pruned", "updated", "rebuilt")}
    heads = ["net", "row", "ratio", "runs", "nodes", "parameters removed %", *shown.values()]
    heads += ["epochs", "epochs, updated", "prune s"]
    yield f"| {' | '.join(heads)} |"
    yield "|---|---|" + "---:|" * (len(heads) - 2)
    for (net, label, ratio), group in cells.groupby(["net", "label", "ratio"], sort=False):
        gone = 1 - (group["params"] / group["params_before"]).mean()
        nodes = "-".join(map(str, list(group.iloc[0]["widths"].values())[:-1]))  # of the first run, without the output
        row = [net, label, ratio, len(group), nodes, f"{100 * gone:.1f}"]
        row += [f"{100 * group[key].mean():.1f}" if key in group and group[key].notna().any() else "" for key in shown]
        for key in ("epochs", "epochs_updated"):
            measured = key in group and "retrained" in group and group["retrained"].notna().any()
            runs = group[key].tolist() if measured else []
            # the part on epochs gives each network more of them than the others do
            limit = int(group["most"].iloc[0]) if "most" in group and group["most"].notna().all() else most[net]
            row.append(", ".join(f"> {limit}" if pd.isna(epochs) else str(int(epochs)) for epochs in runs))
        row.append(f"{group['prune_seconds'].mean():.2f}")
        yield f"| {' | '.join(map(str, row))} |"


def _curves(cells: pd.DataFrame) -> Figure:
    """Figures 5.2 to 5.11: loss and accuracy while the pruned networks are fine-tuned."""
    figure = Figure(figsize=(3.2 * len(cells), 5.0), layout="constrained")
    axes = figure.subplots(2, len(cells), squeeze=False, sharex="col")
    for column, cell in zip(axes.T, cells.to_dict("records"), strict=True):
        for part, values in cell["curves"].items():
            loss, accuracy = zip(*values, strict=True)
            column[0].plot(loss, marker="o", markersize=3, label=part)
            column[1].plot([100 * value for value in accuracy], marker="o", markersize=3, label=part)
        column[1].axhline(100 * cell["before"], color="k", linestyle=":", linewidth=0.8)
        column[0].set(title=cell["net"], ylabel="loss")
        column[1].set(xlabel="epochs", ylabel="accuracy, %")
    axes[0, 0].legend(fontsize="x-small")
    return figure


def _picture(cells: pd.DataFrame) -> Figure:
    """Accuracy with the update against the share of kept parameters, a line per row, a panel per net."""
    nets = list(dict.fromkeys(cells["net"]))
    figure = Figure(figsize=(5.5 * len(nets), 4.0), layout="constrained")
    for axis, net in zip(figure.subplots(1, len(nets), squeeze=False)[0], nets, strict=True):
        for label, group in cells[cells["net"] == net].groupby("label", sort=False):
            means = group.assign(left=100 * group["params"] / group["params_before"], accuracy=100 * group["updated"])
            means = means.groupby("ratio")[["left", "accuracy"]].mean()
            axis.plot(means["left"], means["accuracy"], "o-", markersize=3, label=str(label))
        axis.set(xlabel="parameters kept %", ylabel="test accuracy %, updated, not fine-tuned", title=net)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="xx-small")
    return figure


def unrisen(cells: pd.DataFrame) -> Iterator[str]:
    """Name the layers in which more energy leaves more nodes."""
    cells = cells.assign(statistic=cells["label"].str.split().str[0])
    for (net, statistic), group in cells.groupby(["net", "statistic"], sort=False):
        for before, after in itertools.pairwise(group.to_dict("records")):
            grown = [name for name, count in after["widths"].items() if count > before["widths"][name]]
            if grown:
                step = f"{before['label'].split()[1]} to {after['label'].split()[1]}"
                yield f"{net}, {statistic}, {step}: more nodes in {', '.join(grown)}"
