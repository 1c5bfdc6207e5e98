"""The tables and pictures of `bench_subcluster`.

    python -m benchmarks.clustering.subcluster_report

writes the tables of ``records/subcluster_networks.jsonl`` and ``records/subcluster_parts.jsonl`` into
``results/clustering.md``, each between the two comments that name this file and the table.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from benchmarks.clustering.subcluster_rules import SOURCE as TEXT_NODES
from benchmarks.clustering.subcluster_rules import tables
from benchmarks.tables import with_tables
from nni_topo.studies.tables import interval, markdown_table

SOURCE = "benchmarks/clustering/subcluster_report.py"  # as the comments around a page's tables say
RECORDS = ("subcluster_networks.jsonl", "subcluster_parts.jsonl")
TEXT_REMOVED = {"lenet300": 76.8, "lenet5": 70.4, "lenet5_like": 90.1, "cnn12": 68.1, "vgg16_modified": 79.7}
"""Percentage of parameters that the text's tables 5.2 to 5.7 say are removed."""
TEXT_NODES_REMOVE = {"lenet300": 76.8, "lenet5": 70.5, "lenet5_like": 96.9, "cnn12": 91.6, "vgg16_modified": 95.7}
"""Percentage of parameters that are removed if the nodes of the same tables are kept."""
TEXT_EPOCHS = {"0.1": "2", "0.5": "11", "0.8": "> 25"}
"""Epochs of the text's table 5.8, LeNet-300-100 on MNIST."""


def report(records: list[dict[str, Any]], out: Path, most: Mapping[str, int]) -> None:
    """Print every table as Markdown and draw the pictures; ``most``: by net, the epochs that it had to come back."""
    frame = pd.DataFrame(records)
    for part, cells in frame.groupby("part", sort=False):
        print(f"\n**{part}**\n")
        if part == "rules":
            print("\n".join(tables([record for record in records if record["part"] == part])))
        elif part in PART_TABLES:
            print(PART_TABLES[str(part)](cells))
        else:
            print("\n".join(_rows(cells, most)))
    networks = frame[(frame["part"] == "networks") & (frame["seed"] == 0)]
    if len(networks):
        _curves(networks).savefig(out / "retraining.png", dpi=110)
    for part in ("algorithms", "survivors"):
        cells = frame[frame["part"] == part]
        if len(cells):
            _picture(cells).savefig(out / f"{part}.png", dpi=130)


def with_part_tables(page: str, records: list[dict[str, Any]]) -> str:
    """Return a page with the table of each part of some records."""
    for part, cells in pd.DataFrame(records).groupby("part", sort=False):
        page = with_tables(page, f"{SOURCE}, {part}", PART_TABLES[str(part)](cells))
        if part == "algorithms":
            page = with_tables(page, f"{SOURCE}, graphs", _graphs(cells))
    return page


def _networks(cells: pd.DataFrame) -> str:
    """Return a line for each network: nodes and removed parameters by run, accuracies as means with intervals."""
    steps = ("before", "pruned", "updated", "rebuilt", "retrained", "retrained_updated")
    lines = []
    for net, rows in cells.groupby("net", sort=False):
        runs = rows.to_dict("records")
        removed = ", ".join(f"{100 * (1 - run['params'] / run['params_before']):.1f}" for run in runs)
        text_nodes = "-".join(map(str, TEXT_NODES[str(net)][1]))
        line = [str(net), ", ".join(map(_nodes, runs)), text_nodes, removed]
        line += [f"{found[str(net)]}" for found in (TEXT_REMOVED, TEXT_NODES_REMOVE)]
        line += [interval([100 * run[step] for run in runs]).show() for step in steps]
        lines.append([*line, ", ".join(str(run["depth"]) for run in runs)])
    head = [
        "net",
        "nodes, by run",
        "the text: nodes",
        "parameters removed %, by run",
        "the text: removed %",
        "the text's nodes: removed %",
        "unpruned %",
        "no recovery %",
    ]
    head += ["updated %", "weight reconstruction %", "fine-tuned %", "updated, fine-tuned %", "most splits in a row"]
    return markdown_table(head, lines, text_columns=6)


def _choice(cells: pd.DataFrame) -> str:
    """Return a line for each network and statistic."""
    lines = []
    for record in cells.to_dict("records"):
        percents = [100 * (1 - record["params"] / record["params_before"])]
        percents += [100 * record[key] for key in ("validation", "pruned", "before")]
        line = [record["net"], record["label"], _nodes(record), *(f"{value:.1f}" for value in percents)]
        texts = [f"{found[record['net']]}" for found in (TEXT_REMOVED, TEXT_NODES_REMOVE)]
        lines.append([*line, str(record["depth"]), *texts])
    head = ["net", "statistic", "nodes", "parameters removed %", "validation %", "test %", "unpruned %"]
    head += ["most splits in a row", "the text: removed %", "the text's nodes: removed %"]
    return markdown_table(head, lines, text_columns=3)


def _statistics(cells: pd.DataFrame) -> str:
    """Return a line for each network and p, with three columns for each statistic."""
    cells = cells.assign(statistic=cells["label"].str.split().str[0], p=cells["label"].str.split().str[1])
    names = list(dict.fromkeys(cells["statistic"]))
    lines = []
    for (net, p), rows in cells.groupby(["net", "p"], sort=False):
        line = [str(net), str(p)]
        for name in names:
            (record,) = rows[rows["statistic"] == name].to_dict("records")
            removed = 100 * (1 - record["params"] / record["params_before"])
            line += [_nodes(record), f"{removed:.1f}", f"{100 * record['pruned']:.1f}"]
        lines.append(line)
    head = ["net", "p"]
    for name in names:
        head += [f"{name}: nodes", "removed %", "test %"]
    return markdown_table(head, lines, text_columns=2)


def _energies(cells: pd.DataFrame) -> str:
    """Return a line for each network and p, with fine-tuning."""
    lines = []
    for record in cells.to_dict("records"):
        removed = 100 * (1 - record["params"] / record["params_before"])
        line = [record["net"], record["label"], f"{removed:.1f}"]
        line += [f"{100 * record[key]:.1f}" for key in ("before", "pruned", "updated")]
        for row in ("", "_updated"):
            epochs = _epochs([record[f"epochs{row}"]], int(record["most"]))
            line.append(f"{100 * record[f'retrained{row}']:.1f} ({epochs})")
        lines.append([*line, TEXT_EPOCHS[record["label"]] if record["net"] == "lenet300" else ""])
    head = ["net", "p", "parameters removed %", "unpruned %", "no recovery %", "updated %", "fine-tuned % (epochs)"]
    return markdown_table([*head, "updated, fine-tuned % (epochs)", "the text: epochs"], lines, text_columns=2)


def _baselines(cells: pd.DataFrame) -> str:
    """Return a table for each network: means over its runs, epochs of each."""
    blocks = []
    for net, group in cells.groupby("net", sort=False):
        mine = group[group["label"] == "subcluster"].to_dict("records")
        nodes = ", ".join(_nodes(record) for record in mine)
        unpruned = 100 * group["before"].mean()
        lines = []
        for label, rows in group.groupby("label", sort=False):
            line = [str(label), *(f"{100 * rows[key].mean():.1f}" for key in ("pruned", "updated", "rebuilt"))]
            line += [f"{100 * rows[f'error_{key}'].mean():.1f}" for key in ("pruned", "updated", "rebuilt")]
            for row in ("", "_updated"):
                epochs = _epochs(rows[f"epochs{row}"], int(rows["most"].iloc[0]))
                line.append(f"{100 * rows[f'retrained{row}'].mean():.1f} ({epochs})")
            lines.append(line)
        head = ["pruner", "no recovery %", "updated %", "weight reconstruction %", "error %, no recovery", "updated"]
        head += ["weight reconstruction", "fine-tuned % (epochs, by run)", "updated, fine-tuned % (epochs)"]
        runs = f"{len(mine)} run{'s' if len(mine) > 1 else ''}, nodes {nodes}, unpruned {unpruned:.1f} %"
        blocks.append(f"**{net}, {runs}**\n\n{markdown_table(head, lines)}")
    return "\n\n".join(blocks)


def _by_ratio(cells: pd.DataFrame) -> str:
    """Return a line for each network and label, with two columns for each ratio; means over runs."""
    ratios = list(dict.fromkeys(cells["ratio"]))
    lines = []
    for (net, label), group in cells.groupby(["net", "label"], sort=False):
        line = [str(net), str(label)]
        for ratio in ratios:
            rows = group[group["ratio"] == ratio]
            line += [f"{100 * rows[key].mean():.1f}" for key in ("pruned", "updated")]
        lines.append(line)
    head = ["net", "by"]
    for ratio in ratios:
        head += [f"{ratio}: no recovery %", "updated %"]
    return markdown_table(head, lines, text_columns=2)


def _graphs(cells: pd.DataFrame) -> str:
    """Return a line for each graph of spectral clustering, and k-means: accuracies on validation images, no recovery.

    Three columns and their mean for each network; means over runs.
    """
    graphs = [label for label in dict.fromkeys(cells["label"]) if label.startswith("spectral")]
    lines = []
    for label in [*graphs, "kmeans"]:
        line = [label.removeprefix("spectral, ")]
        for _, rows in cells[cells["label"] == label].groupby("net", sort=False):
            means = 100 * rows.groupby("ratio", sort=False)["validation"].mean()
            line += [*(f"{mean:.1f}" for mean in means), f"{means.mean():.1f}"]
        lines.append(line)
    head = ["graph"]
    for net, rows in cells.groupby("net", sort=False):
        ratios = list(dict.fromkeys(rows["ratio"]))
        head += [f"{net}: {ratios[0]}", *map(str, ratios[1:]), "mean"]
    return markdown_table(head, lines)


PART_TABLES: dict[str, Callable[[pd.DataFrame], str]] = {
    "networks": _networks,
    "choice": _choice,
    "statistics": _statistics,
    "energy": _energies,
    "baselines": _baselines,
    "algorithms": _by_ratio,
    "survivors": _by_ratio,
}


def _nodes(record: Mapping[str, Any]) -> str:
    """Return how many nodes the pruned layers keep."""
    return "-".join(str(count) for layer, count in record["widths"].items() if layer in record["initial"])


def _epochs(found: Iterable[Any], limit: int) -> str:
    """Return epochs by run; ``> limit`` where the accuracy didn't come back."""
    return ", ".join(f"> {limit}" if pd.isna(epochs) else str(int(epochs)) for epochs in found)


def _rows(cells: pd.DataFrame, most: Mapping[str, int]) -> Iterator[str]:
    """Yield the lines of a table of everything that was measured."""
    shown = {
        "before": "unpruned %",
        "validation": "no recovery, validation %",
        "pruned": "no recovery %",
        "updated": "updated %",
        "rebuilt": "weight reconstruction %",
    }
    shown |= {"retrained": "fine-tuned %", "retrained_updated": "updated, fine-tuned %"}
    heads = ["net", "row", "runs", "nodes", "parameters removed %", *shown.values(), "epochs", "epochs, updated"]
    yield f"| {' | '.join(heads)} |"
    yield "|---|---|" + "---:|" * (len(heads) - 2)
    for (net, label), group in cells.groupby(["net", "label"], sort=False):
        removed = 1 - (group["params"] / group["params_before"]).mean()
        row = [net, label, len(group), _nodes(group.iloc[0]), f"{100 * removed:.1f}"]
        row += [f"{100 * group[key].mean():.1f}" if key in group and group[key].notna().any() else "" for key in shown]
        for key in ("epochs", "epochs_updated"):
            measured = key in group and "retrained" in group and group["retrained"].notna().any()
            # the part on epochs gives each network more of them than the others do
            limit = int(group["most"].iloc[0]) if "most" in group and group["most"].notna().all() else most[net]
            row.append(_epochs(group[key].tolist(), limit) if measured else "")
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


def main() -> None:
    """Write the tables into the page."""
    folder = Path(__file__).parents[1]
    page = folder / "results" / "clustering.md"
    text = page.read_text(encoding="utf-8")
    for name in RECORDS:
        lines = (folder / "records" / name).read_text(encoding="utf-8").splitlines()
        text = with_part_tables(text, [json.loads(line) for line in lines])
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
