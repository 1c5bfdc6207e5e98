"""The plan of README.md beside this file: when the selection may stop, where refining helps, how many rows it takes.

    python -m benchmarks.selection.when_to_stop --images runs/fresh/images.npz --out benchmarks/records/selection.jsonl

trains the networks, makes them smaller in every way, and appends a line of JSON for each way; the same command goes on
where it was stopped. ``images.npz`` is made by ``benchmarks/fresh_networks/split.py``. With ``--kinds`` several
processes share the work, each with a file of its own.

    python -m benchmarks.selection.when_to_stop --out benchmarks/records/selection.jsonl --into PAGE

writes the tables of the records into a page, between the two comments that name this file.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
from nni_topo.pruners.reconstruction import readings
from nni_topo.recovery import samples
from nni_topo.runs.provenance import provenance
from nni_topo.studies.records import append_record, read_records
from nni_topo.studies.tables import interval, markdown_table

SOURCE = "benchmarks/selection/when_to_stop.py"  # as the comments around a page's tables say
RESNET, VGG = "ResNet-18", "VGG-16, a quarter of its width"
KINDS = ("LeNet-5-like", "ResNet-20", "MobileNetV2, small", "ViT, small", VGG, RESNET)
SEEDS = range(700, 705)
SHARES = (0.5, 0.25, 0.1)
FEW_ROWS = 512  # least number of rows of a layer, where the number of rows is varied
ROWS_SHARE = 0.25  # of the MACs, where the number of rows is varied


@dataclass(frozen=True)
class Way:
    """A way to select channels and to reconstruct weights."""

    stop: float = 1e-5  # share of the reduction so far: a step that reduces less ends the selection
    refine: int = 2  # steps of refining before a ReLU
    rows: int | None = None  # rows per column; None: as many as the package takes
    shares: tuple[float, ...] = SHARES


BASE, UNREFINED = "no stop", "no refining"
STOPS = {f"stop {digits}": Way(stop=float(digits)) for digits in ("1e-4", "1e-3", "1e-2")}
ROWS = {f"{rows} rows per column": Way(rows=rows, shares=(ROWS_SHARE,)) for rows in (8, 4, 2, 1)}
WAYS = {BASE: Way(), **STOPS, UNREFINED: Way(refine=0), **ROWS}
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


def measure(images: Path, out: Path, kinds: Sequence[str] = KINDS) -> None:
    """Measure the rows that aren't there yet."""
    measured = {tuple(record["key"]) for record in read_records(out)} if out.exists() else set()
    for seed, kind in product(SEEDS, kinds):
        keys = [(kind, seed, share, name) for share in SHARES for name, way in WAYS.items() if share in way.shares]
        missing = [key for key in keys if key not in measured]
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
    _, seed, share, name = key
    way = WAYS[name]
    compensate = nni_topo.recovery.Reconstruct(refine=way.refine)
    began = time.process_time()
    with settings_of(way):
        small = nni_topo.shrink(
            model, calibration, {"flops": share}, compensate=compensate, distill=False, seed=seed, progress=False
        )
    stages = {stage.network: stage for stage in small.report.stages}
    return {
        "accuracy": zoo.evaluate(small, data.test),
        "distance": stages["reconstructed"].distance,
        "share of the MACs": small.report.stages[-1].macs / small.report.stages[0].macs,
        "seconds": time.process_time() - began,
        "revision": provenance()["revision"],
    }


@contextmanager
def settings_of(way: Way) -> Iterator[None]:
    """Give the package the stop and the rows of a way."""
    settings: list[tuple[Any, str, float]] = [(greedy, "STOP", way.stop)]
    if way.rows is not None:
        for module, factor in ((readings, "_SAMPLES_PER_COLUMN"), (samples, "_SAMPLES_PER_UNKNOWN")):
            settings += [(module, "_LEAST_SAMPLES", FEW_ROWS), (module, factor, way.rows)]
    before = [getattr(module, name) for module, name, _ in settings]
    for module, name, value in settings:
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name, _), value in zip(settings, before, strict=True):
            setattr(module, name, value)


def main() -> None:
    """Parse the command line; measure, or write the tables into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="the .npz file of images; without it nothing is measured")
    parser.add_argument("--out", type=Path, required=True, help="lines of finished rows")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="default: all")
    parser.add_argument("--into", type=Path, metavar="PAGE", help="page whose tables are replaced")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.images is not None:
        measure(options.images, options.out, options.kinds)
    if options.into is not None:
        page = options.into.read_text(encoding="utf-8")
        options.into.write_text(with_tables(page, SOURCE, tables(read_records(options.out))), encoding="utf-8")


def tables(records: Iterable[Record]) -> str:
    """Return the tables of the decision and of the kinds."""
    accuracies: dict[tuple[str, int, float], dict[str, float]] = defaultdict(dict)
    seconds: dict[tuple[str, float, str], list[float]] = defaultdict(list)
    for record in records:
        kind, seed, share, name = record["key"]
        accuracies[kind, seed, share][name] = record["accuracy"]
        seconds[kind, share, name].append(record["seconds"])
    verdicts = []
    for name, way in WAYS.items():
        for share in way.shares if name != BASE else ():
            gains: dict[str, list[float]] = defaultdict(list)
            for (kind, _, network_share), of_network in accuracies.items():
                if network_share == share and {name, BASE} <= of_network.keys():
                    gains[kind].append(of_network[name] - of_network[BASE])
            if len(gains) > 1:
                verdicts.append(verdict(name, share, gains))
    shown = []
    for kind, share in product(KINDS, SHARES):
        networks = [names for key, names in accuracies.items() if key[0] == kind and key[2] == share and BASE in names]
        if networks:
            cells = []
            for name in WAYS:
                values = [names[name] for names in networks if name in names]
                time_taken = f"{fmean(seconds[kind, share, name]):.1f} s" if values else ""
                cells.append(f"{100 * fmean(values):.1f} ({time_taken})" if values else "")
            shown.append([kind, f"{share:.0%}", f"{len(networks)}", *cells])
    head = ["way", "MACs", "networks, kinds", "points, over kinds", "over networks", "worst kind", "within the bar"]
    return "\n\n".join([markdown_table(head, verdicts), markdown_table(["kind", "MACs", "networks", *WAYS], shown)])


def verdict(name: str, share: float, gains: dict[str, list[float]]) -> list[str]:
    """Return the cells of a way at a share of the MACs, from its gains over ``no stop`` by kind."""
    worst = min(map(fmean, gains.values()))
    over_kinds = interval(list(map(fmean, gains.values())))
    over_networks = interval([gain for of_kind in gains.values() for gain in of_kind])
    passes = 100 * (over_kinds.mean - over_kinds.half) > -0.3 and 100 * worst > -0.5
    return [
        name,
        f"{share:.0%}",
        f"{sum(map(len, gains.values()))}, {len(gains)}",
        over_kinds.show(100, 2, sign=True),
        over_networks.show(100, 2, sign=True),
        f"{100 * worst:+.2f}",
        "yes" if passes else "no",
    ]


if __name__ == "__main__":
    main()
