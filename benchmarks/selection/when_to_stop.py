"""The plan of README.md beside this file: when the selection may stop, and where refining helps.

    python -m benchmarks.selection.when_to_stop --images runs/fresh/images.npz --out benchmarks/records/selection.jsonl

trains the networks, makes them smaller in every way, and appends a line of JSON for each way; the same command goes on
where it was stopped. ``images.npz`` is made by ``benchmarks/fresh_networks/split.py``.

    python -m benchmarks.selection.when_to_stop --out benchmarks/records/selection.jsonl --into PAGE

writes the tables of the records into a page, between the two comments that name this file.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torchvision
from torch import nn

import nni_topo
from benchmarks.recovery_nets import mobilenet_like
from benchmarks.tables import with_tables
from nni_topo import zoo
from nni_topo.maths.least_squares import greedy
from nni_topo.runs.provenance import provenance
from nni_topo.studies.records import append_record, read_records
from nni_topo.studies.tables import interval, markdown_table

SOURCE = "benchmarks/selection/when_to_stop.py"  # as the comments around a page's tables say
RESNET, VGG = "ResNet-18", "VGG-16, a quarter of its width"
KINDS = ("LeNet-5-like", "ResNet-20", "MobileNetV2, small", "ViT, small", VGG, RESNET)
SEEDS = range(700, 705)
SHARES = (0.5, 0.25, 0.1)
BASE, UNREFINED = "no stop", "no refining"
STOPS = {BASE: 0.0, "stop 1e-4": 1e-4, "stop 1e-3": 1e-3, "stop 1e-2": 1e-2, UNREFINED: 0.0}
IMAGES = {RESNET: 512}  # 1,024 otherwise
SIDES = {VGG: 32}  # pixels to which images are padded with black; 28 otherwise

Record = dict[str, Any]


def untrained(kind: str, seed: int) -> tuple[nn.Module, zoo.Recipe]:
    """Return a network of a kind, and how it is trained."""
    torch.manual_seed(seed)
    sizes = {"num_classes": 10, "in_channels": 1, "image_size": SIDES.get(kind, 28)}
    if kind == "MobileNetV2, small":
        return mobilenet_like(num_classes=10, in_channels=1), zoo.Recipe(epochs=10, lr=0.1)
    if kind == RESNET:
        model = torchvision.models.resnet18(num_classes=10)
        model.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
        return model, zoo.Recipe(epochs=10, lr=0.1)
    names = {"LeNet-5-like": "lenet5_like", "ResNet-20": "resnet20", "ViT, small": "vit_small"}
    name = names.get(kind, "vgg16")
    width = 0.25 if name == "vgg16" else 1.0
    recipe = zoo.default_recipe(name, "fashion-mnist")
    return zoo.create_model(name, **sizes, width=width), replace(recipe, epochs=10)


def measure(images: Path, out: Path) -> None:
    """Measure the rows that aren't there yet."""
    measured = {tuple(record["key"]) for record in read_records(out)} if out.exists() else set()
    for seed, kind in product(SEEDS, KINDS):
        missing = [key for key in product([kind], [seed], SHARES, STOPS) if key not in measured]
        if not missing:
            continue
        data = zoo.load_data(str(images), limit=5_000, pad_to=SIDES.get(kind))
        model, recipe = untrained(kind, seed)
        zoo.train(model, data, recipe, seed=seed, device=torch.device("cpu"), progress=False)
        model.eval()
        unpruned = zoo.evaluate(model, data.test)
        calibration = list(data.train[: IMAGES.get(kind, 1024)][0].split(128))
        for key in missing:
            append_record(out, {"key": key, "unpruned": unpruned, **row(model, calibration, data, key)})
            print(*key, flush=True)


def row(model: nn.Module, calibration: list[torch.Tensor], data: zoo.DataBundle, key: tuple[Any, ...]) -> Record:
    """Make a network smaller in one way, and measure it."""
    _, seed, share, way = key
    compensate = nni_topo.recovery.Reconstruct(refine=0) if way == UNREFINED else "reconstruct"
    began = time.process_time()
    greedy.STOP = STOPS[way]
    try:
        small = nni_topo.shrink(
            model, calibration, {"flops": share}, compensate=compensate, distill=False, seed=seed, progress=False
        )
    finally:
        greedy.STOP = 0.0
    stages = {stage.network: stage for stage in small.report.stages}
    return {
        "accuracy": zoo.evaluate(small, data.test),
        "distance": stages["reconstructed"].distance,
        "share of the MACs": small.report.stages[-1].macs / small.report.stages[0].macs,
        "seconds": time.process_time() - began,
        "revision": provenance()["revision"],
    }


def main() -> None:
    """Parse the command line; measure, or write the tables into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="the .npz file of images; without it nothing is measured")
    parser.add_argument("--out", type=Path, required=True, help="lines of finished rows")
    parser.add_argument("--into", type=Path, metavar="PAGE", help="page whose tables are replaced")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.images is not None:
        measure(options.images, options.out)
    if options.into is not None:
        page = options.into.read_text(encoding="utf-8")
        options.into.write_text(with_tables(page, SOURCE, tables(read_records(options.out))), encoding="utf-8")


def tables(records: Iterable[Record]) -> str:
    """Return the tables of the decision and of the kinds."""
    accuracies: dict[tuple[str, int, float], dict[str, float]] = defaultdict(dict)
    seconds: dict[tuple[str, float, str], list[float]] = defaultdict(list)
    for record in records:
        kind, seed, share, way = record["key"]
        accuracies[kind, seed, share][way] = record["accuracy"]
        seconds[kind, share, way].append(record["seconds"])
    complete = {key: ways for key, ways in accuracies.items() if len(ways) == len(STOPS)}
    verdict_rows, kind_rows = [], []
    for way, share in product([way for way in STOPS if way != BASE], SHARES):
        by_kind = {}
        for kind in KINDS:
            gains = [ways[way] - ways[BASE] for key, ways in complete.items() if key[0] == kind and key[2] == share]
            if gains:
                by_kind[kind] = gains
        if len(by_kind) < 2:
            continue
        means = {kind: fmean(gains) for kind, gains in by_kind.items()}
        over_kinds = interval(list(means.values()))
        over_networks = interval([gain for gains in by_kind.values() for gain in gains])
        lowest = over_kinds.mean - over_kinds.half
        passes = 100 * lowest > -0.3 and 100 * min(means.values()) > -0.5
        count = sum(map(len, by_kind.values()))
        verdict_rows.append(
            [
                way,
                f"{share:.0%}",
                f"{count}",
                over_kinds.show(100, 2, sign=True),
                over_networks.show(100, 2, sign=True),
                f"{100 * min(means.values()):+.2f}",
                "yes" if passes else "no",
            ]
        )
    for kind, share in product(KINDS, SHARES):
        ways = [ways for key, ways in complete.items() if key[0] == kind and key[2] == share]
        if ways:
            cells = [
                f"{100 * fmean(each[way] for each in ways):.1f} ({fmean(seconds[kind, share, way]):.1f} s)"
                for way in STOPS
            ]
            kind_rows.append([kind, f"{share:.0%}", f"{len(ways)}", *cells])
    head = ["row", "MACs", "networks", "points, over kinds", "over networks", "worst kind", "within the bar"]
    return "\n\n".join(
        [markdown_table(head, verdict_rows), markdown_table(["kind", "MACs", "networks", *STOPS], kind_rows)]
    )


if __name__ == "__main__":
    main()
