"""What carries a recovery without labels: cloud x criterion x solver x compensation, calibration images, seconds.

    python -m benchmarks.recovery.bench_recovery ablation --data-dir DIR --out runs/recovery
    python -m benchmarks.recovery.bench_recovery images --data-dir DIR --out runs/recovery
    python -m benchmarks.recovery.bench_recovery choice --data-dir DIR --out runs/recovery --flops 0.1 --seeds 5
    python -m benchmarks.recovery.bench_recovery cost --out runs/recovery

``choice`` compares which of 5,000 images are taken: random ones (three draws), and, of as many clusters of the
images' features as images are asked for, the one nearest to each mean.
``ablation``, ``images`` and ``choice`` take LeNet-5-like nets trained on 20,000 images of Fashion-MNIST for five epochs
(trained first where ``--out`` has no checkpoints of them) and write a line per figure to ``ablation.jsonl``,
``images.jsonl`` and ``choice.jsonl``; the same command goes on where it was stopped. ``cost`` measures seconds and peak
memory of compensating VGG-16 and ResNet-50, each in a process of its own and on one thread, beside one epoch of
training.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import nni_topo
from benchmarks.recovery import recovery_rules  # noqa: F401  (registers methods by name)
from nni_topo import zoo
from nni_topo.maths.clustering import partition
from nni_topo.runs.choices import DataChoice, ModelChoice, PrunerChoice, Target
from nni_topo.runs.widths import inner_layers, pruning_config
from nni_topo.studies.cells import shared_ratios, start_of
from nni_topo.studies.plan import ComparisonPlan
from nni_topo.studies.records import append_record, read_records
from nni_topo.studies.tables import interval

CLOUDS = ("weight", "functional")
CRITERIA = ("hausdorff", "cover", "bottleneck", "wasserstein")
SOLVERS = ("greedy", "genetic")
METHODS = ("pair", "channel", "reconstruct")
COUNTS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
POOL = 5_000
FEW = (16, 32, 64, 128)
CHOICES = ("random, draw 0", "random, draw 1", "random, draw 2", "kmeans")
NETS = {"vgg16": (3, 32, 1024), "torchvision/resnet50": (3, 224, 256)}


def main() -> None:
    """Parse the command line and run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("ablation", "images", "choice", "cost"))
    parser.add_argument("--data-dir", type=Path, help="folder of Fashion-MNIST's files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--flops", type=float, default=0.03, help="share of the MACs to keep (default 0.03)")
    parser.add_argument("--net", choices=tuple(NETS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.part == "cost":
        _cost(options) if options.net is None else print(json.dumps(_cost_of(options.net)))
        return
    run = {"ablation": _ablation, "images": _images, "choice": _choice}[options.part]
    path = options.out / f"{options.part}.jsonl"
    done = {tuple(record["key"]) for record in read_records(path)}
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for record in run(_Net(options, seed), done):
            append_record(path, record)
    _print(read_records(path), options.part)


class _Net:
    """A trained net, its data, and the widths that all rows share."""

    def __init__(self, options: argparse.Namespace, seed: int) -> None:
        plan = ComparisonPlan(
            models=(ModelChoice("lenet5_like"),),
            data=(DataChoice("fashion-mnist", str(options.data_dir), limit=20000),),
            pruners=(PrunerChoice("l1"),),
            targets=(Target("flops", options.flops),),
            first_seed=seed,
            train={"epochs": 5},
        )
        (cell,) = plan.cells()
        self.seed, self.flops = seed, options.flops
        self.start = start_of(cell, options.out)
        self.data, self.model, self.accuracy = self.start.data, self.start.net, self.start.accuracy
        self.example = self.start.example
        self.ratios = shared_ratios(cell, self.start, options.out)
        self.digits = zoo.load_data("digits", None).train.tensors[0]

    def masks(self, name: str, **knobs: Any) -> Any:
        """Prune to the shared widths."""
        victim = zoo.create_model("lenet5_like", num_classes=10, in_channels=1, image_size=28, seed=0)
        victim.load_state_dict(self.model.state_dict())
        config_list = pruning_config(victim, self.example, self.ratios)
        return nni_topo.create_pruner(name, victim.eval(), config_list, **knobs).compress()[1]

    def accuracy_of(self, model: nn.Module, masks: Any) -> float:
        """Test accuracy of the dense net."""
        return zoo.evaluate(nni_topo.to_dense(model, self.example, masks), self.data.test)

    def images(self, kind: str, count: int) -> list[Tensor]:
        """Calibration images: the net's own, noise of the same mean and variance pixel by pixel, or enlarged digits."""
        own = self.data.train.tensors[0]
        generator = torch.Generator().manual_seed(self.seed)
        if kind == "noise":
            drawn = torch.randn(count, *own.shape[1:], generator=generator)
            return list((drawn * own[:4096].std(0) + own[:4096].mean(0)).split(128))
        if kind == "digits":
            large = nn.functional.interpolate(self.digits, size=own.shape[2:], mode="bilinear")
            scaled = (large - large.mean()) / large.std() * own[:4096].std() + own[:4096].mean()
            return list(scaled[torch.arange(count) % len(scaled)].split(128))
        return list(own[:count].split(128))


def _ablation(net: _Net, done: set[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    calibration = net.start.images(1024)
    for label, name, knobs in _rows():
        key = (net.seed, net.flops, label)
        if key in done:
            continue
        given = dict(knobs)
        if name in ("topological", "reconstruction"):
            given |= {"calibration": calibration, "example_inputs": net.example}
        began = time.perf_counter()
        masks = net.masks(name, **given)
        record = {"key": key, "row": label, "seconds": time.perf_counter() - began, "before": net.accuracy}
        record["none"] = net.accuracy_of(net.model, masks)
        for method in METHODS:
            record[method] = net.accuracy_of(nni_topo.compensate(net.model, masks, calibration, method=method), masks)
        print(json.dumps(record), flush=True)
        yield record


def _rows() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for name in ("random", "l1", "l2", "fpgm"):
        yield name, name, {}
    for cloud in CLOUDS:
        for criterion in CRITERIA:
            for solver in SOLVERS if criterion in ("hausdorff", "cover") else SOLVERS[1:]:
                knobs = {"cloud": cloud, "criterion": criterion, "solver": solver}
                yield f"{cloud}, {criterion}, {solver}", "topological", knobs
    for order in ("parallel", "sequential"):
        yield f"reconstruction, greedy, {order}", "reconstruction", {"sequential": order == "sequential"}


def _images(net: _Net, done: set[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    masks = net.masks("l2")
    for kind in ("own", "noise", "digits"):
        for count in COUNTS if kind == "own" else (1024,):
            for method in METHODS:
                key = (net.seed, net.flops, kind, count, method)
                if key in done:
                    continue
                began = time.perf_counter()
                model = nni_topo.compensate(net.model, masks, net.images(kind, count), method=method)
                seconds = time.perf_counter() - began
                row = f"{kind}, {count} images"
                record = {"key": key, "row": row, "method": method, "seconds": seconds, "before": net.accuracy}
                yield {**record, method: net.accuracy_of(model, masks)}


def _choice(net: _Net, done: set[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """Compensate with few images of a pool, chosen in several ways; the time is that of the choice."""
    masks = net.masks("l2")
    pool = net.data.train.tensors[0][:POOL]
    for count in FEW:
        for row in CHOICES:
            key = (net.seed, net.flops, row, count)
            if key in done:
                continue
            began = time.perf_counter()
            images = _chosen(net.model, pool, row, count, net.seed)
            seconds = time.perf_counter() - began
            model = nni_topo.compensate(net.model, masks, images)
            record = {"key": key, "row": f"{row.split(',')[0]}, {count} images", "count": count, "seconds": seconds}
            dense = nni_topo.to_dense(model, net.example, masks)
            record |= {"before": net.accuracy, "reconstruct": zoo.evaluate(dense, net.data.test)}
            yield {**record, "validation": zoo.evaluate(dense, net.data.validation)}


def _chosen(model: nn.Module, pool: Tensor, row: str, count: int, seed: int) -> Any:
    """Choose images of a pool."""
    if row.startswith("random"):
        generator = torch.Generator().manual_seed(100 * seed + int(row[-1]))
        return [pool[torch.randperm(len(pool), generator=generator)[:count]]]
    with torch.no_grad():
        features = torch.cat([_before_the_head(model, part) for part in pool.split(256)]).double().numpy()
    labels = partition(features, count, seed=seed)
    found = []
    for label in range(int(labels.max()) + 1):  # of equal images there are fewer clusters
        (members,) = np.nonzero(labels == label)
        off = np.square(features[members] - features[members].mean(axis=0)).sum(axis=1)
        found.append(int(members[off.argmin()]))
    return [pool[found]]


def _before_the_head(model: nn.Module, images: Tensor) -> Tensor:
    """Return what enters the last linear layer, (images, features)."""
    entered: list[Tensor] = []
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    handle = last.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    model.eval()(images)
    handle.remove()
    return entered[0]


def _print(records: Iterable[dict[str, Any]], part: str) -> None:
    """Print a Markdown table: mean over seeds with 95 % intervals."""
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        rows[record["row"]].append(record)
    columns = {"ablation": ("none", *METHODS), "images": METHODS, "choice": ("reconstruct", "validation")}[part]
    print(f"\n| {part} | {' | '.join(columns)} | s |\n|---|{'---:|' * (len(columns) + 1)}")
    for row, found in rows.items():
        cells = []
        for column in columns:
            values = [100 * record[column] for record in found if column in record]
            cells.append(interval(values).show())
        seconds = interval([record["seconds"] for record in found]).mean
        print(f"| {row} | {' | '.join(cells)} | {seconds:.1f} |")


def _cost(options: argparse.Namespace) -> None:
    """Measure every net in a process of its own."""
    print("| net | images | compensate, CPU s | peak memory, MiB | one epoch of training on as many images, CPU s |")
    print("|---|---:|---:|---:|---:|")
    for net in NETS:
        command = [sys.executable, __file__, "cost", "--out", str(options.out), "--net", net]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        (options.out / f"cost_{net.replace('/', '_')}.json").write_text(json.dumps(found) + "\n")
        print(
            f"| {net} | {found['images']} | {found['compensate_seconds']:.0f} | {found['peak_mib']:.0f} | "
            f"{found['epoch_seconds']:.0f} |",
            flush=True,
        )


def _cost_of(name: str) -> dict[str, Any]:
    """Compensate a net with half of its channels gone; seconds, peak memory, seconds to train on the images once."""
    torch.set_num_threads(1)
    channels, size, count = NETS[name]
    torch.manual_seed(0)
    model = zoo.create_model(name, num_classes=10, in_channels=channels, image_size=size, seed=0).eval()
    images = torch.randn(count, channels, size, size)
    victim = zoo.create_model(name, num_classes=10, in_channels=channels, image_size=size, seed=0).eval()
    entries = [{"op_names": inner_layers(model, images[:2]), "sparse_ratio": 0.5}]
    config_list = nni_topo.dependency_groups(model, images[:2], entries)
    masks = nni_topo.create_pruner("l1", victim, config_list).compress()[1]
    del victim
    batches = list(images.split(64))
    began = time.process_time()
    nni_topo.compensate(model, masks, batches)
    compensate_seconds = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model.train()
    began = time.process_time()
    for batch in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch), torch.zeros(len(batch), dtype=torch.long)).backward()
        optimizer.step()
    epoch = time.process_time() - began
    return {"images": count, "compensate_seconds": compensate_seconds, "peak_mib": peak, "epoch_seconds": epoch}


if __name__ == "__main__":
    main()
