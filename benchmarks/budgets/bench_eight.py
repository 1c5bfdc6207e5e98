"""A share of the time: what networks lose if channels alone, or blocks and channels, are removed.

    python -m benchmarks.budgets.bench_eight --data-dir DIR --out runs/eight

trains ResNet-20 on 5,000 images of Fashion-MNIST, asks `shrink` for an eighth of the time, which it measures in PyTorch
on one thread, with and without ``depth=True``, and exports the networks to ONNX. ``--net`` and ``--share`` take another
network and share. Calibration data are 1,024 of the training images without labels, or ``--images``. Accuracy is that
of the test images; times are those of onnxruntime on one thread, the least of 50 runs of each network in turns, for one
image and for 16. A line per network goes to ``eight.jsonl``; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import nni_topo
from benchmarks.budgets.bench_depth import BATCH, CALIBRATED, TRAINED, trained_net
from nni_topo import zoo
from nni_topo.studies.records import append_record, read_records
from nni_topo.studies.tables import interval, markdown_table

NET, SHARE, SEEDS, RUNS, BATCHES = "resnet20", 1 / 8, (0, 1, 2, 3, 4), 50, (1, 16)
WAYS = {"channels": "channels", "both": "blocks and channels"}


def main() -> None:
    """Parse the command line, run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--net", default=NET, help="of the zoo")
    parser.add_argument("--share", type=float, default=SHARE, help="of the time")
    parser.add_argument("--images", type=int, default=CALIBRATED, help="for calibration, without labels")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "eight.jsonl"
    done = {tuple(record["key"]) for record in read_records(path)}
    data = zoo.load_data("fashion-mnist", options.data_dir, limit=TRAINED)
    for seed in options.seeds:
        keys = {way: (options.net, options.share, options.images, seed, way) for way in options.ways}
        if all(key in done for key in keys.values()):
            continue
        net = trained_net(options.net, seed, data, options.out)
        images = list(data.train[: options.images][0].split(BATCH))
        for way, key in keys.items():
            if key not in done:
                began = time.process_time()
                budget = {"latency": options.share}
                small = nni_topo.shrink(net, images, budget, depth=way == "both", progress=False)
                report: Any = small.report
                record = {
                    "key": key,
                    "seconds": time.process_time() - began,
                    "left": zoo.count_macs(small, images[0][:1]) / zoo.count_macs(net, images[0][:1]),
                    "unpruned": zoo.evaluate(net, data.test),
                    "accuracy": zoo.evaluate(small, data.test),
                    "removed": [each.name for each in report.depth.removed] if report.depth else [],
                    "faster": [times_faster(net, small, images[0][:count], options.out) for count in BATCHES],
                }
                append_record(path, record)
                print(record, flush=True)
    print(table(read_records(path)))


def times_faster(net: nn.Module, small: nn.Module, images: Tensor, folder: Path) -> float:
    """Return how many times as fast a small network is in onnxruntime."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    sessions = []
    for name, each in (("net", net), ("small", small)):
        file = folder / f"{name}.onnx"
        nni_topo.export(each, file, images[:1])
        sessions.append(onnxruntime.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"]))
        file.unlink()
    feed = {sessions[0].get_inputs()[0].name: images.numpy()}
    least = [float("inf")] * 2
    for _ in range(RUNS):
        for index, session in enumerate(sessions):
            began = time.perf_counter()
            session.run(None, feed)
            least[index] = min(least[index], time.perf_counter() - began)
    return least[0] / least[1]


def table(records: list[dict[str, Any]]) -> str:
    """Return a row for each network, time, number of images and way, with means over the seeds and 95 % intervals."""
    rows = []
    for net, share, images in dict.fromkeys(tuple(record["key"][:3]) for record in records):
        by_way: dict[str, dict[int, float]] = {}
        for way, title in WAYS.items():
            found = [
                record for record in records if record["key"][:3] == [net, share, images] and record["key"][4] == way
            ]
            if not found:
                continue
            columns = [[record["faster"][index] for record in found] for index in range(len(BATCHES))]
            lost = {record["key"][3]: 100 * (record["unpruned"] - record["accuracy"]) for record in found}
            columns += [
                [100 * record["left"] for record in found],
                [100 * record["unpruned"] for record in found],
                list(lost.values()),
                [float(len(record["removed"])) for record in found],
                [record["seconds"] for record in found],
            ]
            by_way[way] = lost
            less = [by_way["channels"][seed] - lost[seed] for seed in lost if seed in by_way.get("channels", {})]
            paired = _shown(less) if less and way != "channels" else ""
            first = [net, f"{100 * share:g} %", f"{images:,}", title, str(len(found))]
            rows.append([*first, *(_shown(column) for column in columns), paired])
    head = [
        "network",
        "time asked",
        "images",
        "what is removed",
        "seeds",
        "times faster: 1 image",
        "16 images",
        "MACs kept %",
    ]
    head += ["unpruned %", "points lost", "blocks removed", "CPU s", "points less than by channels"]
    return markdown_table(head, rows, text_columns=4)


def _shown(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.1f}"
    found = interval(values)
    return f"{found.mean:.1f} ± {found.half:.1f}"


if __name__ == "__main__":
    main()
