"""Tables and a picture of what ``run.py`` recorded.

    python -m benchmarks.trained.report runs/trained
    python -m benchmarks.trained.report benchmarks/records/trained --into benchmarks/results/trained.md
    python -m benchmarks.trained.report benchmarks/records/trained --times docs/figures/minilm.png

The first writes ``report.md`` and ``agreement.png`` into the folder and prints the tables; ``--into`` replaces what a
page holds between the two comments that name this file; ``--times`` draws README's picture.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.tables import with_tables
from benchmarks.trained.run import (
    CRITERIA,
    EXTRA,
    LAYERS,
    OURS,
    SHRINK,
    SHRINK_MORE,
    UNIFORM,
    WHOLE_HEADS,
)
from nni_topo.disk import output_file
from nni_topo.studies.records import read_records
from nni_topo.studies.tables import interval, markdown_table

SOURCE = "benchmarks/trained/report.py"  # as the comments around a page's tables say
NETWORKS = ("efficientnet-lite0", "minilm")
TITLES = {
    "efficientnet-lite0": "EfficientNet-Lite0, {share:.0%} of the MACs",
    "minilm": "MiniLM-L6, {share:.0%} of the heads' channels and of the MLPs' neurons",
}
COLUMNS = ("top 1", "top 5", "KL", "cosine", "recall@10", "Spearman")
_DIGITS = {"KL": (1.0, 2), "cosine": (1.0, 3), "Spearman": (1.0, 3)}  # others are percentages
_CNN, _ENCODER = NETWORKS
_LONG = "compensate, distill in bfloat16"
ALLOCATED = {
    UNIFORM: '`allocation="uniform"`',
    "error": '`allocation="error"`',
    "auto": '`allocation="auto"`',
    "blocks": "uniform, `depth=True`",
    "blocks, distill": "uniform, `depth=True`, then `distill`",
}
DRAWN = {
    SHRINK_MORE: ("tab:red", "shrink, then distill: neurons"),
    WHOLE_HEADS: ("tab:orange", "least squares, whole heads"),
    OURS: ("tab:green", "least squares, narrower heads"),
    "l1": ("tab:gray", "L1, whole heads"),
    LAYERS: ("tab:blue", "three of six layers"),
}
ONE_CALL = {
    SHRINK: "one call of `shrink` on 4,096 sentences",
    SHRINK_MORE: "`shrink` on 1,024 sentences, then `distill` on all",
}
STEPS = {
    "none": ("x", "no recovery"),
    "compensate": ("s", "weight reconstruction"),
    "distill in bfloat16": ("^", "distillation"),
    "compensate, distill in bfloat16": ("o", "weight reconstruction, distillation"),
}
"""MiniLM's cells in README's picture, by color and marker."""
_MARKERS = dict(zip(CRITERIA, "xosD^*", strict=True))
MEASURED_ON = "processor, PyTorch, revision"
Record = dict[str, Any]


def read(folder: Path) -> list[Record]:
    """Return all records of a folder, network after network."""
    return [record for name in NETWORKS for record in read_records(folder / f"{name}.jsonl")]


def tables(records: Iterable[Record]) -> str:
    """Return Markdown: a table for each network and share, with what it was measured on."""
    groups: dict[tuple[str, float], dict[tuple[str, str], Record]] = {}
    few: dict[tuple[str, float], list[Record]] = {}
    widths: dict[str, list[Record]] = {}
    sizes: dict[str, Record] = {}
    for record in records:
        if "milliseconds" in record:
            sizes[record["key"][2]] = record
            continue
        if "images" in record:
            few.setdefault((record["network"], record["key"][1]), []).append(record)
            continue
        if "allocation" in record:
            widths.setdefault(record["network"], []).append(record)
            continue
        network, share, criterion, recovery = record["key"]
        groups.setdefault((network, share), {})[criterion, recovery] = record
    order = sorted(groups, key=lambda group: (NETWORKS.index(group[0]), -group[1]))
    found = []
    for group in order:
        found.append(_table(*group, groups[group], sizes if group[0] == _ENCODER else {}))
        if group in few:
            found.append(_by_images(*group, few[group]))
        is_last = [each for each in order if each[0] == group[0]][-1] == group
        if is_last and group[0] in widths:
            found.append(_by_allocation(group[0], widths[group[0]]))
    return "\n\n".join(found)


def _by_allocation(network: str, records: list[Record]) -> str:
    """Return the table of what `shrink` reaches with the widths of an allocation, and with blocks removed."""
    names = [name for name in COLUMNS if name in records[0]["figures"]]
    photo_by_photo = {tuple(record["key"][1:]): record["by_photo"] for record in records if "by_photo" in record}
    lines = []
    order = list(ALLOCATED)
    for record in sorted(records, key=lambda record: (-record["key"][1], order.index(record["allocation"]))):
        figures = [figure(name, record["figures"][name]) for name in names]
        sizes = [f"{100 * record[part]:.1f}" for part in ("macs", "params")]
        more = ""
        uniform = photo_by_photo.get((record["key"][1], OURS, f"widths, {UNIFORM}"))
        if record["allocation"] != UNIFORM and "by_photo" in record and uniform:
            pairs = zip(record["by_photo"], uniform, strict=True)
            found = interval([100 * (one - other) for one, other in pairs])
            more = f"{found.mean:+.1f} ± {found.half:.1f}"
        sizes.append(more)
        shown = ALLOCATED[record["allocation"]]
        line = [f"{record['key'][1]:.0%}", shown, *figures, *sizes, _steps(record), f"{record['seconds']:.0f}"]
        lines.append([*line, _measured_on(record)])
    head = ["MACs asked for", "widths", *map(title_of, names), "MACs %", "parameters %"]
    head += ["points of top 1 more than uniform", "steps", "CPU s", MEASURED_ON]
    shares = " ".join(f"{each:g}" for each in sorted({record["key"][1] for record in records}, reverse=True))
    command = (
        f"python -m benchmarks.trained.run {network} --out benchmarks/records/trained --shares {shares} --allocations"
    )
    names_of = " ".join(shlex.quote(name) for name in dict.fromkeys(record["allocation"] for record in records))
    title = "### EfficientNet-Lite0: `shrink` by the allocation of its budget, and with `depth=True`"
    return f"{title}\n\n{markdown_table(head, lines, text_columns=2)}\n\n`{command} {names_of}`"


def _by_images(network: str, share: float, records: list[Record]) -> str:
    """Return the table of what weight reconstruction gains from more images."""
    records = sorted(records, key=lambda record: record["images"])
    names = [name for name in COLUMNS if name in records[0]["figures"]]
    what = "sentences" if network == "minilm" else "crops"
    lines = []
    for record in records:
        line = [str(record["images"])]
        if network != "minilm":
            line.append(str(record["data"]["calibration"]["photos"]))
        line += [*(figure(name, record["figures"][name]) for name in names), f"{record['seconds']:.0f}"]
        lines.append([*line, _measured_on(record)])
    head = [
        f"calibration {what}",
        *(["photos"] if network != "minilm" else []),
        *map(title_of, names),
        "CPU s",
        MEASURED_ON,
    ]
    title = f"### {TITLES[network].format(share=share)}: `{OURS}` and `compensate` by number of {what}"
    counts = " ".join(str(record["images"]) for record in records)
    command = f"python -m benchmarks.trained.run {network} --out benchmarks/records/trained --images {counts}"
    return f"{title}\n\n{markdown_table(head, lines, text_columns=0)}\n\n`{command}`"


def _steps(record: Record) -> str:
    """Return how many steps a distillation took, and whether its weights were discarded."""
    if "steps" not in record:
        return ""
    return str(record["steps"]) if record["is_kept"] else f"{record['steps']}, discarded"


def _measured_on(record: Record) -> str:
    """Return processor, PyTorch's version and revision of a row."""
    return f"{record['hardware']['processor']}, {record['versions']['torch']}, {record['revision']}"


def _table(network: str, share: float, found: dict[tuple[str, str], Record], sizes: dict[str, Record]) -> str:
    """Return the table of one network at one share; the better end of each column of figures is bold.

    ``sizes`` has the times of networks by criterion; those that it doesn't name are as wide as that of L1.
    """
    first = next(iter(found.values()))
    names = [name for name in COLUMNS if name in first["figures"]]
    rows = [
        (criterion, recovery)
        for recovery in RECOVERED
        for criterion in (*CRITERIA, *EXTRA)
        if (criterion, recovery) in found
    ]
    best = {}
    for name in names:
        values = {row: found[row]["figures"][name]["value"] for row in rows}
        best[name] = (min if name == "KL" else max)(values, key=values.__getitem__)
    lines = []
    for row in rows:
        record = found[row]
        line = [ONE_CALL.get(row[0], row[0]), RECOVERED[row[1]]]
        for name in names:
            shown = figure(name, record["figures"][name])
            line.append(f"**{shown}**" if best[name] == row else shown)
        line += [f"{100 * record[part]:.1f}" for part in ("macs", "params")]
        line += [_steps(record), f"{record['seconds']:.0f}"]
        if sizes:
            size = sizes.get(SHRINK if row[0] == SHRINK_MORE else row[0], sizes["l1"])
            line += [f"{size['milliseconds']:.0f}", "yes" if size["loads"] else "no"]
        lines.append([*line, _measured_on(record)])
    head = ["criterion", "recovery", *map(title_of, names), "MACs %", "parameters %", "steps", "CPU s"]
    if sizes:
        timed_on = "; ".join(dict.fromkeys(_measured_on(size) for size in sizes.values()))
        head += [f"ms (unpruned {sizes['l1']['milliseconds_unpruned']:.0f}; {timed_on})", "`from_pretrained`"]
    head.append(MEASURED_ON)
    return (
        f"### {TITLES[network].format(share=share)}\n\n{markdown_table(head, lines, text_columns=2)}\n\n{_said(first)}"
    )


RECOVERED = {
    "none": "none",
    "batch norms": "batch norms recalibrated",
    "channel": '`compensate(method="channel")` (GRAIL)',
    "compensate": "`compensate`",
    "block": '`compensate(method="block")`',
    "distill": "`distill`",
    "new weights, distill": "new weights, then `distill`",
    "compensate, distill": "`compensate`, then `distill`",
    "block, distill": '`compensate(method="block")`, then `distill`',
    "distill in bfloat16": '`distill(precision="bfloat16")`',
    "compensate, distill in bfloat16": '`compensate`, then `distill(precision="bfloat16")`',
}


def title_of(name: str) -> str:
    """Return the title of a column of figures."""
    return name if name in _DIGITS else f"{name} %"


def figure(name: str, found: dict[str, float]) -> str:
    """Return a figure with its interval."""
    scale, digits = _DIGITS.get(name, (100.0, 1))
    value, half = scale * found["value"], scale * (found["high"] - found["low"]) / 2
    return f"{value:.{digits}f} ± {half:.{digits}f}"


def _said(record: Record) -> str:
    """Say what the figures were measured on, and the command."""
    data = record["data"]
    if record["network"] == "minilm":
        text = (
            f"{data['test']:,} test sentences; {data['calibration']:,} calibration sentences, {data['distillation']:,} "
        )
        text += f"for `distill`, {data['validation']:,} validation sentences."
    else:
        test, learned, more = data["test"], data["calibration"], data["distillation"]
        judges = data["validation"]
        text = f"{test['crops']:,} crops of {test['photos']} test photos, intervals over photos; "
        text += (
            f"{learned['crops']:,} crops of {learned['photos']} calibration photos, {more['crops']:,} for `distill`, "
        )
        text += f"{judges['crops']:,} of {judges['photos']} validation photos."
    command = f"python -m benchmarks.trained.run {record['network']} --out benchmarks/records/trained"
    return f"{text} One thread of a shared processor. `{command}`"


def picture(records: Sequence[Record], path: Path) -> None:
    """Draw what each criterion and recovery keeps, against the processor's seconds, a panel for each table."""
    records = [record for record in records if record["key"][3] in RECOVERED and record["key"][2] in CRITERIA]
    groups = sorted({(record["key"][0], record["key"][1]) for record in records}, key=lambda at: (at[0], -at[1]))
    drawn = Figure(figsize=(4.6 * len(groups), 3.8), layout="constrained")
    for axis, (network, share) in zip(drawn.subplots(1, len(groups), squeeze=False)[0], groups, strict=True):
        own = [record for record in records if record["key"][:2] == [network, share]]
        column = "recall@10" if network == "minilm" else "top 1"
        for criterion in CRITERIA:
            points = [record for record in own if record["key"][2] == criterion]
            if not points:
                continue
            points.sort(key=lambda record: list(RECOVERED).index(record["key"][3]))
            places = [list(RECOVERED).index(record["key"][3]) for record in points]
            values = [100 * record["figures"][column]["value"] for record in points]
            style = {"color": "tab:red", "linewidth": 2.0} if criterion == OURS else {"alpha": 0.7}
            axis.plot(places, values, marker=_MARKERS[criterion], label=criterion, **style)
        axis.set_xticks(range(len(RECOVERED)), RECOVERED, rotation=30, ha="right", fontsize="x-small")
        axis.set(ylabel=f"{column} %", ylim=(0, 100))
        axis.set_title(TITLES[network].format(share=share), fontsize="x-small")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="xx-small")
    drawn.savefig(output_file(path), dpi=110)


def times(records: Sequence[Record], path: Path) -> None:
    """Draw how much of MiniLM's embeddings remains, a line for each way to half of its MACs, with its time."""
    found = {tuple(record["key"][2:]): record for record in records if record["key"][:2] == [_ENCODER, 0.5]}
    drawn = Figure(figsize=(7.6, 3.3), layout="constrained")
    left, right = drawn.subplots(1, 2, sharey=True)
    labels = []
    for place, (criterion, (color, label)) in enumerate(DRAWN.items()):
        of_size = SHRINK if criterion == SHRINK_MORE else criterion
        size = found.get((of_size, "size"), found["l1", "size"])
        labels.append(f"{label}: {size['milliseconds']:.0f} ms")
        for recovery, (marker, _) in STEPS.items():
            if (criterion, recovery) in found:
                figures = found[criterion, recovery]["figures"]
                left.plot(figures["cosine"]["value"], place, marker, color=color)
                right.plot(100 * figures["recall@10"]["value"], place, marker, color=color)
    for marker, label in STEPS.values():
        left.plot([], [], marker, color="black", label=label)
    left.set(xlim=(0.5, 1.0), xlabel="cosine with the unpruned embeddings", ylim=(len(DRAWN) - 0.5, -0.5))
    left.set_yticks(range(len(DRAWN)), labels, fontsize="small")
    right.set(xlim=(25, 100), xlabel="% of the ten nearest neighbours")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    drawn.legend(loc="outside lower center", ncols=4, fontsize="small")
    unpruned = found["l1", "size"]["milliseconds_unpruned"]
    drawn.suptitle(
        f"all-MiniLM-L6-v2 with half of its MACs, recovered without labels; 64 sentences, unpruned {unpruned:.0f} ms",
        fontsize="small",
    )
    drawn.savefig(output_file(path), dpi=130)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and write what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the --out of run.py")
    parser.add_argument("--into", type=Path, help="a page that holds the tables")
    parser.add_argument("--times", type=Path, help="write README's picture here, and nothing else")
    options = parser.parse_args(arguments)
    records = read(options.folder)
    if not records:
        parser.error(f"the folder must hold records of run.py, got none ({options.folder})")
    if options.times is not None:
        times(records, options.times)
        return
    text = tables(records)
    if options.into is not None:
        page = options.into.read_text(encoding="utf-8")
        options.into.write_text(with_tables(page, SOURCE, text), encoding="utf-8")
        return
    picture(records, options.folder / "agreement.png")
    report = f"# Networks that were trained elsewhere\n\n![agreement by recovery](agreement.png)\n\n{text}\n"
    (options.folder / "report.md").write_text(report, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
