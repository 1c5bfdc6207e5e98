"""The pruners of the package beside the baselines on six networks: sizes, times, records and tables of one plan.

    python -m benchmarks.selection.bench_named size --network resnet20 --data-dir DIR
    nni-topo compare --plan configs/compare_named.yaml --network resnet20 --data-dir DIR --out runs/named/resnet20
    python -m benchmarks.selection.bench_named speedups --network resnet20 --data-dir DIR --out runs/named/resnet20
    python -m benchmarks.selection.bench_named times --network resnet20 --data-dir DIR --out runs/named/resnet20
    python -m benchmarks.selection.bench_named keep --network resnet20 --out runs/named/resnet20
    python -m benchmarks.selection.bench_named tables --into benchmarks/results/named_pruners.md

``size`` measures one cell of each row, and says how many CPU hours the network takes. ``speedups`` measures, for the
first network, both ways from masks to a dense network; ``times`` the dense network in PyTorch and onnxruntime, on an
idle machine only. ``keep`` adds what the tables need of a comparison to ``benchmarks/records/named``; a
file there, copied to OUT as ``results.jsonl``, is where the same comparison goes on. ``tables`` also draws a picture
with ``--picture``. The networks' own modules need PYTHONPATH=benchmarks.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from nni.compression.speedup import ModelSpeedup

from benchmarks.export.bench_runtimes import timed
from benchmarks.export.runtimes import RUNTIMES
from benchmarks.tables import with_tables
from nni_topo.disk import output_file, read_json, write_figure
from nni_topo.runs.provenance import Record, provenance
from nni_topo.runs.run import made_dense
from nni_topo.studies.cells import pruned_cell, run_cell, shared_ratios, start_of
from nni_topo.studies.pictures import comparison_figures
from nni_topo.studies.plan import ComparisonPlan, load_plan
from nni_topo.studies.records import UNPRUNED, append_record, check_unpruned, read_records
from nni_topo.studies.tables import cells_of, grouped, interval, markdown_table, title_of

SOURCE = "benchmarks/selection/bench_named.py"  # as the comments around a page's tables say
PLAN = Path(__file__).parents[2] / "configs" / "compare_named.yaml"
RECORDS = Path(__file__).parents[1] / "records" / "named"
NETWORKS = ("small_cnn", "lenet5_like", "resnet20", "vgg16_quarter", "mobilenet_like", "vit_small")
SIZED = "reconstruction"  # the row whose recovery stands for all rows: their networks have the same widths
SIZING_SEED = 490
FEW = 5  # networks; intervals over fewer are wide
_BUSY = 1.5  # processes that want to compute
_NOT_KEPT = {"widths_before", "whole", "hardware", "versions", "sparse_ratios", "curve", "epoch_seconds", "budget"}
_NOT_SHOWN = ("before %", "latency ms", "prune s")  # the same in all rows, or times
_STEPS = {"prune": "selection", "compensate": "weight reconstruction", "distill": "distillation"}
_STEPS["retrain"] = "fine-tuning"


def main() -> None:
    """Parse the command line, and do what it says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("size", "speedups", "times", "keep", "tables"))
    parser.add_argument("--network", choices=NETWORKS, help="of the plan")
    parser.add_argument("--data-dir", help="folder of Fashion-MNIST's files")
    parser.add_argument("--out", type=Path, default=Path("runs/named/sizes"), help="folder of the comparison")
    parser.add_argument("--into", type=Path, metavar="PAGE", help="page whose tables are replaced")
    parser.add_argument("--picture", type=Path, help="file for a picture of the complete networks")
    options = parser.parse_args()
    if options.what == "tables":
        if options.picture is not None:
            draw(options.picture)
        if options.into is None:
            print(tables())
        else:
            page = options.into.read_text(encoding="utf-8")
            options.into.write_text(with_tables(page, SOURCE, tables()), encoding="utf-8")
        return
    if options.network is None:
        parser.error(f"--network is needed to {options.what}")
    torch.set_num_threads(1)
    work: dict[str, Callable[[str, str | None, Path], None]] = {
        "size": size,
        "speedups": speedups,
        "times": times,
        "keep": keep,
    }
    work[options.what](options.network, options.data_dir, options.out)


def plan_of(network: str, data_dir: str | None = None) -> ComparisonPlan:
    """Return the plan of a network."""
    plan = load_plan(PLAN, network)
    return replace(plan, data=tuple(replace(choice, data_dir=data_dir) for choice in plan.data))


def size(network: str, data_dir: str | None, out: Path) -> None:
    """Measure one cell of each row, with a network of one epoch, and keep the CPU hours of all cells."""
    plan = plan_of(network, data_dir)
    short = {**plan.train, "epochs": 1}
    cells = list(replace(plan, seeds=1, first_seed=SIZING_SEED, train=short, targets=plan.targets[:1]).cells())
    epochs, began = next(plan.cells()).train.epochs, time.process_time()
    start = start_of(cells[0], out)
    epoch = time.process_time() - began
    ratios = shared_ratios(cells[0], start, out)
    selection: dict[str, float] = {}
    refused: dict[str, str] = {}
    recovery: dict[str, float] = {}
    rest = 0.0
    for cell in cells:
        began = time.process_time()
        try:
            if cell.pruner.row == SIZED:
                recovery = run_cell(cell, out)["cpu_seconds"]
                rest = time.process_time() - began - recovery["prune"]
                selection[cell.pruner.row] = recovery["prune"]
            else:
                pruned_cell(cell, start, ratios)
                selection[cell.pruner.row] = time.process_time() - began
        except Exception as error:  # a row that doesn't apply takes no time
            refused[cell.pruner.row] = f"{type(error).__name__}: {error}"
        print(cell.pruner.row, round(time.process_time() - began, 1), refused.get(cell.pruner.row, ""), flush=True)
    per_network = epochs * epoch + len(plan.targets) * (sum(selection.values()) + len(selection) * rest)
    record = {"key": [network], "epoch": epoch, "selection": selection, "recovery": recovery, "rest": rest}
    record |= {"refused": refused, "cells": len(list(plan.cells())), "hours": plan.seeds * per_network / 3600}
    append_record(RECORDS / "sizes.jsonl", {**record, "revision": provenance()["revision"]})
    print(f"{network}: {record['cells']} cells, about {record['hours']:.1f} CPU hours")


def speedups(network: str, data_dir: str | None, out: Path) -> None:
    """Measure `to_dense` and NNI's own speed-up on the masks of each row, and keep the lines."""
    path = out / "speedups.jsonl"
    known = {tuple(record["key"]) for record in read_records(path)}
    for cell in replace(plan_of(network, data_dir), seeds=1).cells():
        key = (network, cell.target.label, cell.pruner.row)
        if key in known:
            continue
        record: Record = {"key": key}
        try:
            start = start_of(cell, out)
            masks = pruned_cell(cell, start, shared_ratios(cell, start, out)).masks
            began = time.process_time()
            dense, _ = made_dense(start, masks)
            record["dense_cpu_seconds"] = time.process_time() - began
            began = time.process_time()
            other = ModelSpeedup(copy.deepcopy(start.net), start.example, masks).speedup_model().eval()
            record["nni_cpu_seconds"] = time.process_time() - began
            with torch.no_grad():
                expected, found = dense(start.timing_batch), other(start.timing_batch)
            record["difference"] = float((found - expected).abs().max() / expected.abs().max())
        except Exception as error:  # NNI's speed-up has no kind of error of its own
            record["error"] = f"{type(error).__name__}: {error}"[:300]
        append_record(path, {**record, "revision": provenance()["revision"]})
        print(*key, record.get("error", record.get("difference")), flush=True)


def times(network: str, data_dir: str | None, out: Path) -> None:
    """Time the first row's dense network in both runtimes: all rows have its widths. On an idle machine only."""
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > _BUSY:
        raise SystemExit(f"times need an idle machine, got a load of {os.getloadavg()[0]:.1f}")
    path = out / "times.jsonl"
    plan = plan_of(network, data_dir)
    for cell in replace(plan, seeds=1, pruners=plan.pruners[:1]).cells():
        start = start_of(cell, out)
        dense, _ = made_dense(start, pruned_cell(cell, start, shared_ratios(cell, start, out)).masks)
        record: Record = {"key": (network, cell.target.label), "ms": {}, **provenance()}
        for runtime in RUNTIMES:
            if runtime.name not in ("PyTorch", "onnxruntime"):
                continue
            for batch in (1, len(start.timing_batch)):
                medians, _ = timed([start.net, dense], start.timing_batch[:batch].contiguous(), runtime)
                record["ms"][f"{runtime.name}, {batch}"] = [statistics.median(each) for each in medians]
        append_record(path, record)
        print(*record["key"], record["ms"], flush=True)


def keep(network: str, data_dir: str | None, out: Path) -> None:
    """Keep a comparison's records, without what the tables don't need, its failures and its times."""
    for name, suffix in (("results", ""), ("speedups", "_speedups"), ("times", "_times")):
        path = RECORDS / f"{network}{suffix}.jsonl"
        kept = {json.dumps(record["key"]): record for record in read_records(path)}
        for record in read_records(out / f"{name}.jsonl"):
            slim = {key: value for key, value in record.items() if key not in _NOT_KEPT}
            kept[json.dumps(record["key"])] = slim
            for row in kept.values():
                if row.get("seed") == slim.get("seed"):
                    check_unpruned(slim, row, path)
        if kept:
            lines = [json.dumps(record, sort_keys=True) for record in kept.values()]
            output_file(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
            print(f"{len(lines)} records: {path}")
    failures = [
        {**each, "reason": each["reason"].strip().splitlines()[-1]} for each in read_json(out / "failures.json") or []
    ]
    if failures:
        output_file(RECORDS / f"{network}_failures.json").write_text(
            json.dumps(failures, indent=1) + "\n", encoding="utf-8"
        )


def records_of(network: str) -> tuple[list[Record], list[Record], int]:
    """Return the records of a network, its failed cells, and how many cells it has."""
    cells = list(plan_of(network).cells())
    by_key = {record["key"]: record for record in read_records(RECORDS / f"{network}.jsonl")}
    # in the plan's order, and of this plan alone
    found = [by_key[cell.key] for cell in cells if cell.key in by_key]
    failed = [each for each in read_json(RECORDS / f"{network}_failures.json") or [] if each["key"] not in by_key]
    return found, failed, len(cells)


def complete() -> dict[str, tuple[list[Record], list[Record]]]:
    """Return records and failures by network of those all of whose cells ran."""
    found = {network: records_of(network) for network in NETWORKS}
    return {name: (done, failed) for name, (done, failed, cells) in found.items() if len(done) + len(failed) == cells}


def draw(path: Path) -> None:
    """Draw accuracy after weight reconstruction and after fine-tuning against MACs, of the complete networks."""
    left_out = ("accuracy_oneshot", "accuracy_distilled")
    records = [record for done, _ in complete().values() for record in done]
    shown = [{key: value for key, value in record.items() if key not in left_out} for record in records]
    for record in shown:
        record["model"] = record["model"].rpartition(":")[2]  # without the module of a network that isn't built in
    write_figure(path, comparison_figures(shown)["accuracy"], dpi=110)


def tables() -> str:
    """Return Markdown: how much was run and what it takes, then the complete networks, and both ways to dense ones."""
    head = ["network", "records", "rows that don't apply", "cells", "CPU hours"]
    sizes = {record["key"][0]: record for record in read_records(RECORDS / "sizes.jsonl")}
    lines, total = [], 0.0
    for network in NETWORKS:
        done, failed, cells = records_of(network)
        hours = sum(sum(record["cpu_seconds"].values()) for record in done) / 3600
        total += hours
        lines.append([network, str(len(done)), str(len(failed)), str(cells), f"{hours:.1f}"])
    lines.append(["all", *(str(sum(int(line[column]) for line in lines)) for column in (1, 2, 3)), f"{total:.1f}"])
    blocks = ["**How much was run**", markdown_table(head, lines)]
    if sizes:
        blocks += ["**CPU seconds of one cell**", sizing(sizes)]
    for network, record in sizes.items():
        blocks += [f"{network}: `{row}` doesn't apply. {reason}" for row, reason in record["refused"].items()]
    for done, failed in complete().values():
        for group, rows in grouped(done).items():
            blocks += [f"**{title_of(group, rows)}**", accuracies(rows), *notes(rows)]
        reasons = {each["pruner"]: each["reason"] for each in failed}
        blocks += [f"`{pruner}` doesn't apply: {reason}" for pruner, reason in reasons.items()]
    for kind, title, table in (
        ("speedups", "From masks to a dense network", both_ways),
        ("times", "Milliseconds of a batch", latencies),
    ):
        measured = [record for network in NETWORKS for record in read_records(RECORDS / f"{network}_{kind}.jsonl")]
        if measured:
            blocks += [f"**{title}**", table(measured)]
    return "\n\n".join(blocks)


def sizing(sizes: dict[str, Record]) -> str:
    """Return the table of what one cell takes: an epoch of training, each step of recovery, and the dearest pruners."""
    head = ["network", "an epoch of training", *list(_STEPS.values())[1:], "dearest selections"]
    lines = []
    for network, record in sizes.items():
        steps = [f"{record['recovery'][step]:.1f}" for step in list(_STEPS)[1:]]
        dearest = sorted(record["selection"].items(), key=lambda item: -item[1])[:3]
        shown = ", ".join(f"{row} {seconds:.1f}" for row, seconds in dearest)
        lines.append([network, f"{record['epoch']:.1f}", *steps, shown])
    return markdown_table(head, lines)


def accuracies(rows: dict[str, dict[int, Record]]) -> str:
    """Return the table of a network and target: accuracies after each step, and CPU seconds of each."""
    head, lines = cells_of(rows)
    shown = [index for index, name in enumerate(head) if name not in _NOT_SHOWN]
    before = lines[0][head.index("before %")]
    table = [[line[index] for index in shown] for line in lines]
    table[0][0] = f"unpruned: {before} %"
    for line, runs in zip(table, [None, *rows.values()], strict=True):
        for step in _STEPS:
            seconds = [] if runs is None else [record["cpu_seconds"][step] for record in runs.values()]
            line.append(f"{interval(seconds).mean:.1f}" if seconds else "")
    return markdown_table([*(head[index] for index in shown), *(f"{name}, CPU s" for name in _STEPS.values())], table)


def notes(rows: dict[str, dict[int, Record]]) -> list[str]:
    """Return what a reader must know of a table: few networks, and a seed whose rows are of two networks."""
    seeds = sorted({seed for runs in rows.values() for seed in runs})
    sentences = []
    if len(seeds) < FEW:
        sentences.append(
            f"{len(seeds)} networks: the intervals are wide, and a difference whose interval holds zero is open."
        )
    for seed in seeds:
        networks: dict[tuple[float, ...], list[str]] = {}
        for row, runs in rows.items():
            if seed in runs:
                networks.setdefault(tuple(runs[seed][name] for name in UNPRUNED if name in runs[seed]), []).append(row)
        if len(networks) > 1:
            parts = []
            for unpruned, names in networks.items():
                accuracies_of = ", ".join(f"{100 * value:.2f}" for value in unpruned)
                parts.append(f"{', '.join(f'`{name}`' for name in names)} of one with {accuracies_of} %")
            sentences.append(
                f"**The rows of seed {seed} are of {len(networks)} networks**, unpruned on test and validation images: "
                f"{'; '.join(parts)}. Differences between these groups of rows are no paired ones there."
            )
    return [" ".join(sentences)] if sentences else []


def both_ways(measured: list[Record]) -> str:
    """Return the table of `to_dense` beside NNI's own speed-up, means over the rows of a network and target."""
    lines = []
    for network, target in dict.fromkeys((record["key"][0], record["key"][1]) for record in measured):
        mine = [record for record in measured if record["key"][:2] == [network, target]]
        both = [record for record in mine if "difference" in record]
        errors = "; ".join(sorted({f"{each['key'][2]}: {each['error']}" for each in mine if "error" in each}))
        line = [network, target, f"{len(both)} of {len(mine)}"]
        if both:
            dense, other = ([record[f"{way}_cpu_seconds"] for record in both] for way in ("dense", "nni"))
            line += [f"{interval(dense).mean:.2f}", f"{interval(other).mean:.2f}"]
            line.append(f"{max(record['difference'] for record in both):.0e}")
        else:
            line += [""] * 3
        lines.append([*line, errors])
    head = ["network", "target", "rows that both take", "`to_dense`, CPU s", "`ModelSpeedup`, CPU s"]
    return markdown_table([*head, "largest relative difference", "not taken"], lines, text_columns=2)


def latencies(measured: list[Record]) -> str:
    """Return the table of times in both runtimes, unpruned and pruned, by batch."""
    columns = list(measured[0]["ms"])
    lines = []
    for record in measured:
        shown = [f"{before:.2f}, {after:.2f}" for before, after in (record["ms"][name] for name in columns)]
        lines.append([*record["key"], *shown])
    head = ["network", "target", *(f"{name}: unpruned, pruned" for name in columns)]
    return markdown_table(head, lines, text_columns=2)


if __name__ == "__main__":
    main()
