"""How near to a budget a network comes: what was asked for and what is left, counted and timed on the dense network.

    python benchmarks/bench_budgets.py --out runs/budgets

shrinks networks of new weights by norm to shares of their MACs, parameters, memory and time. MACs, parameters and
bytes are counted on what comes out; time is that of a batch of 32 on one thread, in turns with the whole network, timed
anew behind the budget's own timings. Below the table stands what shrinking warned of. A line per figure goes to
``budgets.jsonl``; the same command goes on where it was stopped.

    python benchmarks/bench_budgets.py --heap

shows why passes are timed with the memory that they free kept: ResNet-20 and one of half its widths, beside different
blocks that lie on the heap, as glibc has it and kept.
"""

from __future__ import annotations

import argparse
import logging
import random
import resource
import statistics
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any

import torch
from torch import nn

import nni_topo
from nni_topo import zoo
from nni_topo.network.cost.cost import NetworkCost
from nni_topo.network.cost.measure import memory_kept, now, time_shares
from nni_topo.pruners.budget import BUDGETS
from nni_topo.studies.records import append_record, read_records
from nni_topo.studies.tables import markdown_table

# name, channels and side of its images
NETS = {
    "resnet20": (3, 32),
    "resnet56": (3, 32),
    "vgg16": (3, 32),
    "torchvision/mobilenet_v2": (3, 96),
    "vit_small": (1, 28),
}
SHARES = (0.5, 0.25)


def main() -> None:
    """Parse the command line, run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--heap", action="store_true", help="what the heap does to one pair of networks")
    parser.add_argument("--models", nargs="+", default=list(NETS), choices=NETS)
    parser.add_argument("--kinds", nargs="+", default=list(BUDGETS), choices=BUDGETS)
    parser.add_argument("--batch", type=int, default=32, help="of the images that are timed")
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="of passes for a time that isn't known to 1 %% before"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.heap:
        _print_heaps(options.batch)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "budgets.jsonl"
    done = {tuple(record["key"]) for record in read_records(path)}
    for key in [(model, kind, share) for model in options.models for kind in options.kinds for share in SHARES]:
        if key not in done:
            with _warnings() as told:
                left, off = _left(*key, options)
            append_record(path, {"key": key, "left": left, "off": off, "told": [each.getMessage() for each in told]})
    _print(read_records(path))


@contextmanager
def _warnings() -> Iterator[list[logging.LogRecord]]:
    """Collect what is warned of."""
    handler = BufferingHandler(1000)
    handler.setLevel(logging.WARNING)
    logging.getLogger("nni_topo").addHandler(handler)
    try:
        yield handler.buffer
    finally:
        logging.getLogger("nni_topo").removeHandler(handler)


def _left(name: str, kind: str, share: float, options: argparse.Namespace) -> tuple[float, float]:
    """Shrink a network of new weights to a share of a cost; return the share that is left and how far off it may be."""
    channels, side = NETS[name]
    net = zoo.create_model(name, num_classes=10, in_channels=channels, image_size=side, seed=0).eval()
    torch.manual_seed(0)
    images = torch.randn(options.batch, channels, side, side)
    small = nni_topo.shrink(net, [images], {kind: share}, pruner="l1", compensate=None, distill=False)
    if kind == "latency":
        return time_shares([small], net, images, precision=0.01, seconds=options.seconds)[0]
    return _cost(small, kind, images) / _cost(net, kind, images), 0.0


def _cost(net: nn.Module, kind: str, images: torch.Tensor) -> float:
    if kind == "memory":
        return NetworkCost.on(net, images[:1])({}).memory
    return zoo.count_macs(net, images[:1]) if kind == "flops" else zoo.count_params(net)


def _print_heaps(batch: int, passes: int = 20) -> None:
    """Print medians of a pass of two networks, and how many pages the system handed out for it."""
    images = torch.randn(batch, 3, 32, 32)
    make = partial(zoo.create_model, "resnet20", num_classes=10, in_channels=3, image_size=32)
    nets = [make(width=width).eval() for width in (1.0, 0.5)]
    generator, rows = random.Random(0), []
    for name in ("glibc's",) * 5 + ("kept",) * 5:
        alive = [bytearray(generator.randrange(1_000, 300_000)) for _ in range(2_000)]
        del alive[:: generator.choice((1, 2, 3))]
        with memory_kept(images) if name == "kept" else nullcontext(), torch.inference_mode():
            found = [_passes(net, images, passes) for net in nets]
        (whole, _), (half, _) = found
        cells = [f"{1000.0 * seconds:.1f} ({pages})" for seconds, pages in found]
        rows.append([name, *cells, f"{half / whole:.2f}"])
    print(markdown_table(["memory", "whole: ms (pages)", "half its widths: ms (pages)", "share"], rows))


def _passes(net: nn.Module, images: torch.Tensor, count: int) -> tuple[float, int]:
    """Return the median seconds, and pages, of a pass behind some that warm up."""
    taken = []
    for _ in range(count):
        pages, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, now(images)
        net(images)
        taken.append((now(images) - start, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - pages))
    seconds, pages = zip(*taken[count // 4 :], strict=True)
    return statistics.median(seconds), int(statistics.median(pages))


def _print(records: list[dict[str, Any]]) -> None:
    """Print the table: a row per network and share, a column per cost."""
    found = {tuple(record["key"]): record for record in records}
    rows = []
    for name, share in sorted({(name, share) for name, _, share in found}, key=lambda each: (each[0], -each[1])):
        cells = [found.get((name, kind, share)) for kind in BUDGETS]
        rows.append([name, f"{share:g}", *("" if each is None else _cell(each) for each in cells)])
    print(markdown_table(["network", "asked for", "MACs", "parameters", "time", "memory"], rows))
    for record in records:
        for told in record["told"]:
            print(f"- {record['key'][0]}: {told}")


def _cell(record: dict[str, Any]) -> str:
    return f"{record['left']:.3f}" + (f" ± {record['left'] * record['off']:.3f}" if record["off"] else "")


if __name__ == "__main__":
    main()
