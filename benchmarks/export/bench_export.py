r"""A network carried away: whole, pruned without labels, and both in INT8, in the same onnxruntime.

    python benchmarks/export/bench_export.py --plan configs/recover_fashion_mnist_resnet20.yaml --data-dir DIR \
        --out runs/export_resnet20

takes model, data and recipes from a comparison's plan and its trained nets from ``checkpoints`` in the folder (trained
first where they are missing). Each is pruned by ``ReconstructionPruner`` to a share of the MACs, compensated and
distilled, all on the same unlabelled training images, on which INT8 is calibrated, too. A line per file goes to
``export.jsonl``. Times are medians over rounds in which all files of a seed take turns, on one thread, by that
thread's clock, so that other programs on the machine don't count.

    python benchmarks/export/bench_export.py --shapes --out runs/export_shapes

times ResNets of new weights instead, narrower and shorter than ResNet-20: what any way of pruning it could gain.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor

import nni_topo
from nni_topo.runs.choices import Cell, CompensationChoice, DistillationChoice, PrunerChoice, Target
from nni_topo.runs.provenance import provenance
from nni_topo.runs.run import Start, distilled, made_dense
from nni_topo.studies.cells import pruned_cell, shared_ratios, start_of
from nni_topo.studies.plan import load_plan
from nni_topo.studies.records import append_record, read_records
from nni_topo.studies.tables import interval, markdown_table, show_accuracies
from nni_topo.zoo import count_macs
from nni_topo.zoo.resnet import SmallImageResNet

BATCHES = (1, 64)
# channels of the three stages, and blocks in each
SHAPES = (((16, 32, 64), 3), ((8, 16, 32), 3), ((5, 10, 20), 3), ((16, 32, 64), 1), ((8, 16, 32), 1), ((8, 8, 8), 1))
FILES = ("whole", "whole, INT8", "pruned", "pruned, INT8")


def main() -> None:
    """Parse the command line, run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, help="a comparison's plan; its pruners aren't looked at")
    parser.add_argument("--shapes", action="store_true", help="networks of new weights instead")
    parser.add_argument("--data-dir", type=Path, help="folder of the data set's files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--flops", type=float, default=0.1, help="share of the MACs to keep")
    parser.add_argument("--images", type=int, default=1024, help="unlabelled, for all steps")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.shapes:
        _print_shapes(options)
        return
    if options.plan is None:
        parser.error("--plan or --shapes must be given")
    path = options.out / "export.jsonl"
    done = {record["seed"] for record in read_records(path)}
    for cell in _cells(options):
        if cell.seed not in done:
            for record in _exported(cell, options):
                append_record(path, record)
    _print(read_records(path))


def _cells(options: argparse.Namespace) -> list[Cell]:
    plan = load_plan(options.plan)
    folder = None if options.data_dir is None else str(options.data_dir)
    data = tuple(replace(choice, data_dir=folder) for choice in plan.data)
    pruners = (PrunerChoice("reconstruction", calibration=options.images),)
    targets = (Target("flops", options.flops),)
    return list(replace(plan, data=data, pruners=pruners, targets=targets, seeds=options.seeds).cells())


def _exported(cell: Cell, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Write a seed's four files and measure them."""
    start = start_of(cell, options.out)
    masks = pruned_cell(cell, start, shared_ratios(cell, start, options.out)).masks
    dense, _ = made_dense(start, masks, CompensationChoice(options.images))
    dense = distilled(start, dense, DistillationChoice(options.images)).model
    images, records = start.images(options.images), []
    for label in FILES:
        path = options.out / f"{cell.seed}-{label.replace(', ', '-')}.onnx"
        net = start.net if label.startswith("whole") else dense
        done = nni_topo.export(net, path, start.example, int8=images if "INT8" in label else None)
        accuracy = _accuracy(_session(path), start)
        figures = {"size": done.size, "error": done.error, "accuracy": accuracy, "torch_accuracy": start.tested(net)}
        records.append({"seed": cell.seed, "file": label, "path": str(path), **figures, **provenance()})
    for batch in BATCHES:
        inputs = start.data.test.tensors[0][:batch]
        for record, milliseconds in zip(records, _times(records, inputs, options.rounds), strict=True):
            record[f"ms_{batch}"] = milliseconds
    return records


def _session(path: str | Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _answers(session: onnxruntime.InferenceSession, images: Tensor) -> Tensor:
    (name,) = [each.name for each in session.get_inputs()]
    return torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def _accuracy(session: onnxruntime.InferenceSession, start: Start) -> float:
    images, labels = start.data.test.tensors
    found = torch.cat([_answers(session, batch).argmax(1) for batch in images.split(100)])
    return float((found == labels).double().mean())


def _times(records: list[dict[str, Any]], inputs: Tensor, rounds: int) -> list[float]:
    """Return each file's median milliseconds of the one thread, all in turns."""
    sessions = [_session(record["path"]) for record in records]
    found: list[list[float]] = [[] for _ in sessions]
    for turn in range(rounds + 5):
        for session, times in zip(sessions, found, strict=True):
            began = time.thread_time()
            _answers(session, inputs)
            if turn >= 5:
                times.append(1e3 * (time.thread_time() - began))
    return [statistics.median(times) for times in found]


def _print_shapes(options: argparse.Namespace) -> None:
    """Print how much faster networks of new weights are than the first, in floats and in INT8."""
    images = torch.rand(BATCHES[-1], 1, 28, 28)
    records = []
    for channels, blocks in SHAPES:
        net = SmallImageResNet(blocks, 10, 1, 1.0, channels).eval()
        for is_int8 in (False, True):
            path = options.out / f"{'-'.join(map(str, channels))}-{blocks}{'-int8' * is_int8}.onnx"
            nni_topo.export(net, path, images[:2], int8=[images] if is_int8 else None)
            records.append({"path": str(path), "macs": count_macs(net, images[:1])})
    times = _times(records, images, options.rounds)
    lines = []
    for (channels, blocks), floats, integers, record in zip(SHAPES, times[::2], times[1::2], records[::2], strict=True):
        share = f"{record['macs'] / records[0]['macs']:.2f}"
        figures = [text for ms in (floats, integers) for text in (f"{ms:.2f}", f"{times[0] / ms:.1f}")]
        lines.append([", ".join(map(str, channels)), str(blocks), share, *figures])
    titles = ["channels", "blocks a stage", "MACs", "ms", "times as fast", "INT8: ms", "times as fast"]
    print(markdown_table(titles, lines))


def _print(records: list[dict[str, Any]]) -> None:
    rows: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for record in records:
        rows[record["file"]][record["seed"]] = record
    whole, lines = rows["whole"], []
    for label, runs in rows.items():
        lost = [whole[seed]["accuracy"] - run["accuracy"] for seed, run in runs.items()]
        cells = [label, f"{interval([run['size'] / 1e3 for run in runs.values()]).mean:.0f}"]
        for batch in BATCHES:
            column = f"ms_{batch}"
            cells.append(interval([run[column] for run in runs.values()]).show(digits=2))
            cells.append(interval([whole[seed][column] / run[column] for seed, run in runs.items()]).show())
        cells += [show_accuracies([run["accuracy"] for run in runs.values()]), interval(lost).show(100)]
        lines.append(cells)
    times = [name for batch in BATCHES for name in (f"ms, batch of {batch}", "times as fast")]
    print(markdown_table(["file", "size (kB)", *times, "accuracy %", "points lost"], lines))
    first = records[0]
    hardware = first["hardware"]["processor"]
    print(
        f"\n{hardware}, onnxruntime {onnxruntime.__version__}, torch {first['versions']['torch']}, {len(whole)} seeds"
    )


if __name__ == "__main__":
    main()
