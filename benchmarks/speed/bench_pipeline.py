"""What pruning costs, step by step, beside other tools and a training step, before and after a change of the code.

    python benchmarks/speed/bench_pipeline.py --nets resnet18:8 resnet20:512 --before ../old --out runs/pipeline.jsonl
    python benchmarks/speed/bench_pipeline.py --nets resnet50:64 resnet50:256 --out runs/pipeline.jsonl --timeout 3600
    python benchmarks/speed/bench_pipeline.py --nets resnet20:128 resnet20:512 resnet20x2:128 resnet56:128 --out FILE
    python benchmarks/speed/bench_pipeline.py --out runs/pipeline.jsonl            # the table of what is there

A net, a factor on its width if any, and its number of images, random ones, in batches of at most 64: half of all
convolutions' channels go by `ReconstructionPruner`, then `compensate`, then `to_dense`. Seconds are those of the
processor, on one thread; both trees take turns, a process each. A line a run goes to the file, from which the table is
printed: least of all runs; and, where nets differ in nothing but the number of images, the width or the depth, the
power of it with which seconds grow.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import os
import re
import resource
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

# others: torchvision's, 3 channels, 224 pixels
SIZES = {"lenet5_like": (1, 28), "resnet20": (3, 28), "resnet56": (3, 28), "vgg16": (3, 32)}
STEPS = ("groups", "choose", "compensate", "dense", "whole")
OTHERS = ("torch-pruning", "nni fpgm", "nni speedup", "training step", "training epoch")


def measure(name: str, width: float, images: int) -> dict[str, Any]:
    """Time every step on one network, in this process."""
    import torch
    import torchvision

    import nni_topo
    from nni_topo import zoo

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    channels, side = SIZES.get(name, (3, 224))
    if name in SIZES:
        net = zoo.create_model(name, num_classes=10, in_channels=channels, image_size=side, width=width, seed=0)
    else:
        net = getattr(torchvision.models, name)(weights=None)
    batches = list(torch.randn(images, channels, side, side).split(64))
    net.eval()
    asked = [{"op_types": ["Conv2d"] if name != "vit_b_16" else ["Linear"], "sparse_ratio": 0.5}]
    record: dict[str, Any] = {}

    def timed(step: str, work: Callable[[], Any]) -> Any:
        start = time.process_time()
        found = work()
        record[step] = time.process_time() - start
        record[f"{step} GiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        return found

    def chosen() -> Any:
        pruner = nni_topo.ReconstructionPruner(net, groups, calibration=batches)
        _, masks = pruner.compress()
        pruner.unwrap_model()
        return masks

    groups = timed("groups", lambda: nni_topo.dependency_groups(net, batches[0][:1], asked))
    masks = timed("choose", chosen)
    compensated = timed("compensate", lambda: nni_topo.compensate(net, masks, batches))
    timed("dense", lambda: nni_topo.to_dense(compensated, batches[0][:1], masks))
    record["whole"] = sum(record[step] for step in STEPS[:-1])
    timed("training epoch", lambda: train(copy.deepcopy(net), batches))
    record["training step"] = record["training epoch"] / len(batches)
    baselines(copy.deepcopy(net), groups, masks, batches[0][:1], timed)
    return record


def train(net: Any, batches: list[Any]) -> None:
    """Take one step of gradient descent a batch."""
    import torch

    net.train()
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    for batch in batches:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(batch), torch.zeros(len(batch), dtype=torch.long)).backward()
        optimizer.step()


def baselines(net: Any, groups: Any, masks: Any, example: Any, timed: Callable[..., Any]) -> None:
    """Time Torch-Pruning's whole pruning, NNI's FPGM and NNI's own speedup, as far as they take the network."""
    import torch_pruning
    from nni.compression.pruning import FPGMPruner
    from nni.compression.speedup import ModelSpeedup

    def fpgm() -> None:
        pruner = FPGMPruner(net, groups)
        pruner.compress()
        pruner.unwrap_model()

    def by_groups() -> None:
        importance = torch_pruning.importance.GroupMagnitudeImportance()
        torch_pruning.pruner.BasePruner(copy.deepcopy(net), example, importance, pruning_ratio=0.5).step()

    speedup = lambda: ModelSpeedup(copy.deepcopy(net), example, masks).speedup_model()  # noqa: E731
    for step, work in (("nni fpgm", fpgm), ("torch-pruning", by_groups), ("nni speedup", speedup)):
        try:
            timed(step, work)
        except Exception as error:  # the table has no figure then
            print(f"{step}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)


def measured(tree: Path, net: str, timeout: float) -> dict[str, Any]:
    """Measure in a process of its own, with the package of a tree."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--measure", net]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"failed": f"more than {timeout:g} s by the clock"}
    lines = done.stdout.splitlines()
    return json.loads(lines[-1]) if done.returncode == 0 else {"failed": done.stderr.strip().splitlines()[-1][:200]}


def print_table(records: list[dict[str, Any]]) -> None:
    """Print the least seconds of all runs, and the memory up to the end of a step, as Markdown."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        found[record["net"], record["tree"]].append(record)
    print("| net:images | step | before s | after s | before / after | training steps | GiB before | GiB after |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for net in dict.fromkeys(net for net, _ in found):
        runs = {tree: [run for run in found[net, tree] if "failed" not in run] for tree in ("before", "after")}

        def least(tree: str, key: str, runs: dict[str, list[dict[str, Any]]] = runs) -> float | None:
            return min((run[key] for run in runs[tree] if key in run), default=None)

        for step in (*STEPS, *OTHERS):
            before, after = least("before", step), least("after", step)
            unit = least("after", "training step")
            ratios = [one / other if one and other else None for one, other in ((before, after), (after, unit))]
            memory = [least(tree, f"{step} GiB") for tree in ("before", "after")]
            shown = ["" if cell is None else f"{cell:.2f}" for cell in (before, after, *ratios, *memory)]
            print(f"| {net} | {step} | {' | '.join(shown)} |")
        for tree in ("before", "after"):
            for failed in {run["failed"] for run in found[net, tree] if "failed" in run}:
                print(f"| {net} | {tree}: {failed} | | | | | | |")


def table(records: list[dict[str, Any]]) -> str:
    """Return a row for each net: least CPU seconds of the runs of this checkout, and the memory up to a dense net."""
    from nni_topo.studies.tables import markdown_table

    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        if record["tree"] == "after" and "failed" not in record:
            runs[record["net"]].append(record)
    columns = (*STEPS, "torch-pruning", "nni fpgm", "nni speedup", "training step", "training epoch", "dense GiB")
    rows = []
    for net, found in runs.items():
        least = [min((run[column] for run in found if column in run), default=None) for column in columns]
        rows.append([net, *("no" if value is None else f"{value:.2f}" for value in least)])
    head = ["net:images", "groups", "select", "compensate", "dense", "all four", "Torch-Pruning", "NNI's FPGM"]
    return markdown_table([*head, "NNI's speedup", "a training step", "an epoch", "GiB"], rows)


def parsed(net: str) -> tuple[str, float, int]:
    """Return a net's name, the factor on its width and its number of images."""
    name, width, images = re.fullmatch(r"(\w+?)(?:x([\d.]+))?:(\d+)", net).groups()  # type: ignore[union-attr]
    return name, float(width or 1.0), int(images)


def print_scaling(records: list[dict[str, Any]]) -> None:
    """Print the powers of images, width and depth with which seconds grow from the smallest net to the largest."""
    found: dict[tuple[str, float, int], list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        if record["tree"] == "after" and "failed" not in record:
            found[parsed(record["net"])].append(record)
    least = {net: {step: min(run[step] for run in runs) for step in STEPS} for net, runs in found.items()}
    for what, size in (("images", 2), ("width", 1), ("depth", 0)):
        alike = defaultdict(list)
        for net in least:
            kind, depth = re.fullmatch(r"(\D+)(\d*).*", net[0]).groups()  # type: ignore[union-attr]
            sizes = [int(depth or 0), *net[1:]]
            own = sizes.pop(size)
            alike[(kind, *sizes)].append((own, net))
        for nets in alike.values():
            (low, first), (high, last) = min(nets), max(nets)
            if high > low:
                powers = [math.log(least[last][step] / least[first][step]) / math.log(high / low) for step in STEPS]
                print(f"| {what} {low:g} to {high:g}, {first[0]} | {' | '.join(f'{each:.2f}' for each in powers)} |")


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="*", default=(), help="NET:IMAGES")
    parser.add_argument("--before", type=Path, help="checkout of the code to compare with")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each tree, in turns, default 1")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds a run, by the clock, default 1800")
    parser.add_argument("--out", type=Path, help="lines of finished runs")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        name, width, images = parsed(options.measure)
        print(json.dumps(measure(name, width, images)))
        return
    options.out.parent.mkdir(parents=True, exist_ok=True)
    trees = {"before": options.before, "after": Path(__file__).resolve().parents[2]}
    for net in options.nets:
        for _ in range(options.repeats):
            for label, tree in trees.items():
                if tree is not None:
                    record = {"net": net, "tree": label, **measured(tree.resolve(), net, options.timeout)}
                    with options.out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(record) + "\n")
    records = [json.loads(line) for line in options.out.read_text(encoding="utf-8").splitlines()]
    print_table(records)
    print(f"\n| power of | {' | '.join(STEPS)} |\n|---|{'---:|' * len(STEPS)}")
    print_scaling(records)


if __name__ == "__main__":
    main()
