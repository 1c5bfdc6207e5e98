"""How fast pruned networks are in the runtimes that deploy them, and which numbers of channels each runtime likes.

    python -m benchmarks.export.bench_runtimes --out runs/runtimes

times networks of new weights, unpruned and with a quarter of the MACs kept by L1, the channels rounded to multiples of
1, 8 and 16, in every runtime whose package is installed; and two convolutions of 49 to 64 channels. The files of a
network take turns on one thread, and are loaded anew five times, for where they come to lie in memory changes their
times. A line per network goes to ``runtimes.jsonl``, one per width to
``widths.jsonl``; what is there isn't measured again, so that environments with other runtimes add their lines.

    python -m benchmarks.export.bench_runtimes --out benchmarks/records/runtimes --into benchmarks/results/export.md

writes the tables of the records into a page, between the two comments that name this file.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

import nni_topo
from benchmarks.export.runtimes import RUNTIMES, Runtime
from benchmarks.tables import with_tables
from nni_topo import zoo
from nni_topo.runs.provenance import provenance
from nni_topo.studies.records import append_record, read_records
from nni_topo.studies.tables import interval, markdown_table

SOURCE = "benchmarks/export/bench_runtimes.py"
SHARE = 0.25
BATCH = 8
ROUNDS = (1, 8, 16)  # multiples of channels
WIDTHS = range(49, 65)
LOADS = 5  # times that a file is loaded anew
ENOUGH = 20  # rounds after each, at least
PACKAGES = ("torch", "onnxruntime", "openvino", "executorch", "ai-edge-litert")


def resnet20() -> nn.Module:
    """Return a ResNet-20 for images of one channel, 28 by 28."""
    return zoo.create_model("resnet20", num_classes=10, in_channels=1, image_size=28, seed=0)


def resnet18() -> nn.Module:
    """Return torchvision's ResNet-18."""
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=10)


def mobilenet_v2() -> nn.Module:
    """Return torchvision's MobileNetV2."""
    torch.manual_seed(0)
    return torchvision.models.mobilenet_v2(num_classes=10)


NETWORKS = {
    "ResNet-20, 28 x 28": (resnet20, 1, 28),
    "ResNet-18, 64 x 64": (resnet18, 3, 64),
    "MobileNetV2, 64 x 64": (mobilenet_v2, 3, 64),
}


def main() -> None:
    """Parse the command line; measure what is missing and print the tables, or write them into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--into", type=Path, metavar="PAGE", help="page whose tables are replaced; nothing is run")
    options = parser.parse_args()
    if options.into is not None:
        page = options.into.read_text(encoding="utf-8")
        options.into.write_text(with_tables(page, SOURCE, tables(options.out)), encoding="utf-8")
        return
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        # ExecuTorch has no setting for the number of threads: it takes one per core that the process may use.
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    options.out.mkdir(parents=True, exist_ok=True)
    for runtime in RUNTIMES:
        if importlib.util.find_spec(runtime.package) is None:
            print(f"{runtime.name} isn't installed")
            continue
        for name in NETWORKS:
            measure_network(name, runtime, options.out / "runtimes.jsonl")
        measure_widths(runtime, options.out / "widths.jsonl")
    print(tables(options.out))


def measure_network(name: str, runtime: Runtime, path: Path) -> None:
    """Time a network, unpruned and pruned to several multiples, in a runtime."""
    if [name, runtime.name] in [record["key"] for record in read_records(path)]:
        return
    make, channels, size = NETWORKS[name]
    images = torch.randn(32, channels, size, size, generator=torch.Generator().manual_seed(0))
    net = make().eval()
    networks, shares = [net], [1.0]
    for multiple in ROUNDS:
        small = nni_topo.shrink(
            net, [images], {"flops": SHARE}, pruner="l1", compensate=None, distill=False, round_to=multiple
        ).eval()
        networks.append(small)
        shares.append(zoo.count_macs(small, images[:1]) / zoo.count_macs(net, images[:1]))
    times, errors = timed(networks, images[:BATCH], runtime)
    labels = ["unpruned", *(str(multiple) for multiple in ROUNDS)]
    record = {
        "key": [name, runtime.name],
        "ms": dict(zip(labels, times, strict=True)),
        "macs": dict(zip(labels, shares, strict=True)),
        "error": max(errors),
        "version": version(),
        **provenance(),
    }
    append_record(path, record)
    print(record["key"], record["ms"], flush=True)


def measure_widths(runtime: Runtime, path: Path) -> None:
    """Time two convolutions of every width in a runtime."""
    if runtime.name in [record["key"][0] for record in read_records(path)]:
        return
    torch.manual_seed(0)
    networks: list[nn.Module] = []
    for width in WIDTHS:
        entry, inner = nn.Conv2d(3, width, 1), [nn.Conv2d(width, width, 3, padding=1) for _ in range(2)]
        networks.append(nn.Sequential(entry, nn.ReLU(), inner[0], nn.ReLU(), inner[1]).eval())
    times, errors = timed(networks, torch.randn(BATCH, 3, 28, 28), runtime)
    for width, milliseconds, error in zip(WIDTHS, times, errors, strict=True):
        record = {"key": [runtime.name, width], "ms": milliseconds, "error": error, "version": version()}
        append_record(path, {**record, **provenance()})


def timed(networks: Sequence[nn.Module], images: Tensor, runtime: Runtime) -> tuple[list[list[float]], list[float]]:
    """Return each network's median milliseconds after each time it was loaded, and its largest relative error.

    All networks take turns.
    """
    errors, medians = list[float](), [list[float]() for _ in networks]
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / str(number) for number in range(len(networks))]
        for net, place in zip(networks, places, strict=True):
            place.mkdir()
            runtime.write(net, images, place)
        for _ in range(LOADS):
            runs = [runtime.load(place, images) for place in places]
            found = [list[float]() for _ in runs]
            until = time.perf_counter() + len(runs) / 4
            while len(found[0]) < ENOUGH or time.perf_counter() < until:
                for run, times in zip(runs, found, strict=True):
                    began = time.perf_counter()
                    run()
                    times.append(1e3 * (time.perf_counter() - began))
            for own, times in zip(medians, found, strict=True):
                own.append(statistics.median(times))
        for net, run in zip(networks, runs, strict=True):
            with torch.no_grad():
                expected = net(images).numpy(force=True)
            errors.append(float(np.abs(run() - expected).max() / np.abs(expected).max()))
    return medians, errors


def version() -> dict[str, str]:
    """Return the versions of the runtimes' packages."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def tables(folder: Path) -> str:
    """Return the tables of the records: networks by multiple, and widths."""
    records = read_records(folder / "runtimes.jsonl")
    lines = []
    for name in NETWORKS:
        for runtime in RUNTIMES:
            for record in records:
                if record["key"] != [name, runtime.name]:
                    continue
                whole = record["ms"]["unpruned"]
                cells = [name, runtime.name, f"{record['error']:.0e}", f"{statistics.median(whole):.2f}"]
                for multiple in map(str, ROUNDS):
                    faster = [one / other for one, other in zip(whole, record["ms"][multiple], strict=True)]
                    cells.append(f"{interval(faster).show()} ({record['macs'][multiple]:.2f})")
                free, eights = (record["ms"][multiple] for multiple in ("1", "8"))
                cells.append(interval([one / other for one, other in zip(free, eights, strict=True)]).show(digits=2))
                lines.append(cells)
    titles = ["network", "runtime", "largest relative error", "unpruned, ms"]
    titles += [f"times as fast (MACs), multiples of {multiple}" for multiple in ROUNDS]
    titles.append("multiples of 8 against 1")
    networks = markdown_table(titles, lines, text_columns=2)
    times: dict[str, dict[int, float]] = defaultdict(dict)
    for record in read_records(folder / "widths.jsonl"):
        times[record["key"][0]][record["key"][1]] = statistics.median(record["ms"])
    lines = []
    for runtime in RUNTIMES:
        if runtime.name in times:
            lines.append([runtime.name, *(f"{each:.2f}" for each in cost_by_multiple(times[runtime.name]))])
    kinds = ["of 16", "of 8", "of 4", "of 2", "odd"]
    return (
        networks
        + "\n\n**Time per MAC by number of channels, that of 64 is 1**\n\n"
        + markdown_table(["runtime", *kinds], lines)
    )


def cost_by_multiple(times: dict[int, float]) -> list[float]:
    """Return the mean time per MAC, in that of 64 channels, of widths by the largest of 16, 8, 4, 2, 1 in them."""
    groups: dict[int, list[float]] = defaultdict(list)
    for width, milliseconds in times.items():
        divisor = next(each for each in (16, 8, 4, 2, 1) if width % each == 0)
        macs = 3 * width + 2 * 9 * width**2
        groups[divisor].append(milliseconds / macs)
    (one,) = groups[16]
    return [statistics.mean(groups[divisor]) / one for divisor in (16, 8, 4, 2, 1)]


if __name__ == "__main__":
    main()
