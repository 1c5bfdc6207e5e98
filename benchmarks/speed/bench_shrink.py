"""What ``shrink`` without distillation takes, as multiples of a pass over the data, and what of it each step takes.

    python benchmarks/speed/bench_shrink.py --trees BEFORE AFTER --rounds 3 --out OUT

Each network loses half of its multiply-accumulates with the defaults of each checkout, in turns, each time in a process
of its own with one thread: a pass (one forward and one backward run over all calibration batches), then ``shrink``.
Seconds are the processor's. A line for each run goes to OUT's ``shrink.jsonl``, with the checkout's commit. Kept in
benchmarks/records/ they make the table of a page:

    python benchmarks/speed/bench_shrink.py --into benchmarks/results/speed.md
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import nni_topo
from benchmarks.speed import bench_seconds
from benchmarks.tables import with_tables
from nni_topo.runs.measurements import Measurements
from nni_topo.runs.prepared import Prepared
from nni_topo.runs.provenance import provenance
from nni_topo.studies.records import append_record, read_records
from nni_topo.studies.tables import markdown_table

RECORDS = Path(__file__).parents[1] / "records" / "shrink.jsonl"
SOURCE = "benchmarks/speed/bench_shrink.py"  # as the comments around the page's table say
STEPS: dict[str, list[tuple[Any, str]]] = {  # the methods that each step of `shrink` runs in
    "selecting": [(Prepared, "select")],
    "reconstructing": [(Prepared, "reconstruct")],
    "comparing": [(Measurements, "__init__"), (Measurements, "add")],
}


def resnet18(images: int, side: int) -> tuple[nn.Module, list[Tensor]]:
    """Torchvision's ResNet-18."""
    import torchvision

    return torchvision.models.resnet18(num_classes=10), list(torch.randn(images, 3, side, side).split(64))


def resnet18_cifar(images: int) -> tuple[nn.Module, list[Tensor]]:
    """The same with a first convolution of 3x3 and stride 1, and without its pooling."""
    model, batches = resnet18(images, 32)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    return model, batches


def mobilenet(images: int) -> tuple[nn.Module, list[Tensor]]:
    """Torchvision's MobileNetV2."""
    import torchvision

    return torchvision.models.mobilenet_v2(num_classes=10), list(torch.randn(images, 3, 96, 96).split(64))


def vit(images: int) -> tuple[nn.Module, list[Tensor]]:
    """Torchvision's ViT-B/16."""
    import torchvision

    return torchvision.models.vit_b_16(), list(torch.randn(images, 3, 224, 224).split(8))


NETWORKS: dict[str, Callable[[], tuple[nn.Module, list[Any]]]] = {
    "ResNet-18, 512 images of 32 pixels": lambda: resnet18(512, 32),
    "ResNet-18 with CIFAR's first layer, 256 images of 32 pixels": lambda: resnet18_cifar(256),
    "MobileNetV2, 256 images of 96 pixels": lambda: mobilenet(256),
    "BERT of 4 layers of 128, 256 texts of 32 tokens": lambda: bench_seconds.bert(256),
    "1-D network with kernels of 512 and 64, 256 inputs": lambda: bench_seconds.pitch(256),
    "ViT-B/16, 16 images of 224 pixels": lambda: vit(16),
}


def measure(name: str) -> dict[str, Any]:
    """Return the seconds of a pass, and how many passes ``shrink`` and its steps take."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, batches = NETWORKS[name]()
    bench_seconds.settle_norms(model, batches)

    def backwards(some: list[Any]) -> None:
        for batch in some:
            bench_seconds.first_output(bench_seconds.called(model, batch)).square().mean().backward()

    backwards(batches[:1])
    began = time.process_time()
    backwards(batches)
    seconds = time.process_time() - began
    model.zero_grad()
    spent: dict[str, float] = defaultdict(float)
    for step, methods in STEPS.items():
        for owner, method in methods:
            setattr(owner, method, timed(getattr(owner, method), step, spent))
    began = time.process_time()
    small = nni_topo.shrink(model, batches, {"flops": 0.5}, distill=False, progress=False)
    total = time.process_time() - began
    return {
        "network": name,
        "commit": provenance()["revision"],
        "pass s": seconds,
        "shrink": total / seconds,
        **{step: spent[step] / seconds for step in STEPS},
        "network MiB": sum(value.nbytes for value in model.state_dict().values()) / 2**20,
        "peak GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "share of the MACs": small.report.stages[-1].macs / small.report.stages[0].macs,
    }


def timed(method: Callable[..., Any], step: str, spent: dict[str, float]) -> Callable[..., Any]:
    """Return a method that adds the seconds that it takes to those of a step."""

    @functools.wraps(method)
    def measured(*args: Any, **knobs: Any) -> Any:
        began = time.process_time()
        try:
            return method(*args, **knobs)
        finally:
            spent[step] += time.process_time() - began

    return measured


def table(records: list[dict[str, Any]]) -> str:
    """Return a row for each network and commit: least and median of its runs."""
    runs: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        runs[record["network"], record["commit"]].append(record)
    head = ["network", "commit", "runs", "a pass, CPU s", "shrink: passes", *STEPS, "network, MiB", "peak, GiB"]
    rows = []
    for name in NETWORKS:
        for (network, commit), of_both in runs.items():
            if network == name:
                cells = [least_and_median([run[column] for run in of_both]) for column in ("shrink", *STEPS)]
                seconds = f"{min(run['pass s'] for run in of_both):.2f}"
                sizes = f"{of_both[0]['network MiB']:.1f}", f"{max(run['peak GiB'] for run in of_both):.1f}"
                rows.append([name, commit, str(len(of_both)), seconds, *cells, *sizes])
    return markdown_table(head, rows)


def least_and_median(values: list[float]) -> str:
    """Return the least of some values and their median."""
    return f"{min(values):.2f}; {median(values):.2f}"


def main() -> None:
    """Measure in turns, or write the table of a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS), help="default: all")
    parser.add_argument("--trees", nargs="+", type=Path, default=[Path(__file__).parents[2]], help="checkouts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder for the records")
    parser.add_argument("--one", action="store_true", help="measure the first network in this process")
    parser.add_argument("--into", type=Path, metavar="PAGE", help="page whose table is replaced by that of the records")
    options = parser.parse_args()
    if options.into is not None:
        page = options.into.read_text(encoding="utf-8")
        options.into.write_text(with_tables(page, SOURCE, table(read_records(RECORDS))), encoding="utf-8")
        return
    if options.one:
        print(json.dumps(measure(options.networks[0])))
        return
    for name, _, tree in product(options.networks, range(options.rounds), options.trees):
        environment = os.environ | {"PYTHONPATH": str(tree.resolve()), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", __file__, "--one", "--networks", name]
        run = subprocess.run(command, env=environment, cwd=tree, stdout=subprocess.PIPE, text=True, check=True)
        record = json.loads(run.stdout.splitlines()[-1])
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            append_record(options.out / "shrink.jsonl", record)
        print(table([record]).splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
