"""Whether blocks that learn by gradients replace distillation after weight reconstruction: accuracy and seconds.

    python benchmarks/transformers/bench_block.py --data-dir DIR --out runs/block

trains small transformers of the zoo for each seed (a ViT and a BERT on Fashion-MNIST at 14 pixels, a GPT on texts of 32
bytes) and a ResNet-20, and keeps half, a third and a sixth of their heads and half, a quarter and an eighth of their
neurons by norm; of the ResNet-20 half, a third and a sixth of the channels within blocks. Each is recovered in several
ways from the same unlabelled rows, one after the other in one process on one thread; 256 more rows judge what is
distilled. A line per figure goes to ``block.jsonl``, nets to files beside it; the same command goes on where it was
stopped. Of 2,000 test images the accuracy in percent and the share of answers that are the unpruned network's, of 512
rows of text bits per byte; differences are paired by network.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn
from torch.nn.functional import avg_pool2d
from torch.utils.data import TensorDataset

from nni_topo import compensate, create_pruner, dependency_groups, distill, to_dense, zoo
from nni_topo.network.runtime.reports import markdown_table
from nni_topo.recovery.lesson import judged
from nni_topo.studies.records import append_record, read_records
from nni_topo.studies.tables import interval
from nni_topo.zoo.evaluation import bits

NETS = ("vit_small", "bert_small", "gpt_small", "resnet20")
LEFT = {"half": (1 / 2, 1 / 2), "third": (1 / 3, 1 / 4), "sixth": (1 / 6, 1 / 8)}
"""Shares of the heads, and of the neurons; of a ResNet's channels the first."""
WAYS = ("none", "reconstruct", "block", "reconstruct, distilled", "block, distilled")
TITLES = {
    "none": "no recovery",
    "reconstruct": "weight reconstruction",
    "block": "`block`",
    "reconstruct, distilled": "weight reconstruction, distilled",
    "block, distilled": "`block`, distilled",
}
DISTILLED = "reconstruct, distilled"
ROWS, JUDGING, BATCH, STEPS = 512, 256, 64, 300
EPOCHS = {"gpt_small": 2}  # of training; four of the others


class TrainedNet:
    """A trained network and its rows."""

    def __init__(self, name: str, seed: int, options: argparse.Namespace) -> None:
        is_text = name == "gpt_small"
        source = "python-stdlib" if is_text else "fashion-mnist"
        data = zoo.load_data(source, None if is_text else options.data_dir, limit=options.limit, validation=0.0)
        self.data = replace(data, train=_smaller(data.train, is_text), test=_smaller(data.test, is_text))
        self.name, self.seed, self.is_text = name, seed, is_text
        size = self.data.train.tensors[0].shape[-1]
        sizes = {"num_classes": data.num_classes, "in_channels": data.in_channels, "image_size": size}
        self.net = zoo.create_model(name, **sizes, seed=seed)
        path = options.out / f"{name}-{seed}.pt"
        if path.exists():
            zoo.load_checkpoint(path, self.net)
        else:
            zoo.train(self.net, self.data, self.recipe(), seed=seed)
            zoo.save_checkpoint(path, self.net, {"seconds": 0.0})
        self.net.eval()
        images = self.data.train.tensors[0]
        self.batches = list(images[:ROWS].split(BATCH))
        self.judging = list(images[ROWS : ROWS + JUDGING].split(BATCH))
        self.unpruned = self.worth(self.net)

    def recipe(self) -> zoo.Recipe:
        """Return how the network is trained."""
        return replace(zoo.default_recipe(self.name, self.data.name), epochs=EPOCHS.get(self.name, 4))

    def worth(self, net: nn.Module) -> float:
        """Return the accuracy on test images, or bits per byte."""
        tested = TensorDataset(*(part[: 512 if self.is_text else 2000] for part in self.data.test.tensors))
        loss, accuracy = zoo.loss_and_accuracy(net, tested)
        return bits(loss) if self.is_text else accuracy

    def agreement(self, net: nn.Module) -> float:
        """Return the share of test rows' answers that are the unpruned network's."""
        rows = self.data.test.tensors[0][: 512 if self.is_text else 2000]
        return judged(self.net, [net], list(rows.split(256)))[0].agreement

    def masks(self, left: str, choice: str) -> Any:
        """Prune by a criterion."""
        heads, neurons = LEFT[left]
        config: list[dict[str, Any]] = [
            {"op_names_re": [r".*\.attention"], "granularity": "head", "sparse_ratio": 1.0 - heads},
            {"op_names_re": [r".*\.mlp\.(fc1|gate_proj|up_proj)"], "sparse_ratio": 1.0 - neurons},
        ]
        if self.name == "resnet20":
            config = [{"op_names_re": [r".*\.conv1"], "sparse_ratio": 1.0 - heads}]
        net = copy.deepcopy(self.net)
        knobs: dict[str, Any] = {}
        if choice == "reconstruction":
            knobs = {"calibration": self.batches, "example_inputs": self.batches[0][:2]}
        groups = list(dependency_groups(net, self.batches[0][:2], config))
        return create_pruner(choice, net, groups, **knobs).compress()[1]

    def recovered(self, masks: Any, way: str, method: Any = None) -> tuple[nn.Module, float]:
        """Return the dense network of a way without distillation, and its CPU seconds."""
        began = time.process_time()
        net = self.net
        if way != "none":
            net = compensate(net, masks, self.batches, method=method or way, seed=self.seed, progress=False)
        dense = to_dense(net, self.batches[0][:2], masks, check=False)
        return dense, time.process_time() - began

    def distilled(self, dense: nn.Module) -> tuple[nn.Module, float]:
        """Distil a dense network; return it and the CPU seconds."""
        began = time.process_time()
        knobs: dict[str, Any] = {"steps": STEPS, "objective": "kl", "seed": self.seed, "progress": False}
        found = distill(dense, self.net, self.batches, held_out=self.judging, **knobs)
        return found, time.process_time() - began


def main() -> None:
    """Parse the command line, run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="folder of Fashion-MNIST's files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=NETS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--left", nargs="+", default=list(LEFT), choices=LEFT)
    parser.add_argument("--choices", nargs="+", default=["l1"], help="selection criteria")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--limit", type=int, default=4_000, help="rows to train on")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])  # the first optimizer of a process loads modules for two seconds
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "block.jsonl"
    for left in options.left:
        for seed in options.seeds:
            for name in options.nets:
                _run(name, seed, left, options, path)
    print(table(read_records(path)))


def _run(name: str, seed: int, left: str, options: argparse.Namespace, path: Path) -> None:
    done = {tuple(record["key"]) for record in read_records(path)}
    wanted = [(name, seed, left, choice, way) for choice in options.choices for way in options.ways]
    if all(key in done for key in wanted):
        return
    start = TrainedNet(name, seed, options)
    for choice in options.choices:
        masks = start.masks(left, choice)
        made: dict[str, tuple[nn.Module, float]] = {}
        for key in wanted:
            way = key[4]
            if key in done or key[3] != choice:
                continue
            before = way.rpartition(", ")[0]
            first = before or way
            if first not in made:
                made[first] = start.recovered(masks, first)
            dense, seconds = made[first]
            if before:
                dense, more = start.distilled(dense)
                seconds += more
            record = {"key": key, "unpruned": start.unpruned, "worth": start.worth(dense), "seconds": seconds}
            append_record(path, {**record, "agreement": start.agreement(dense)})
            print(*key, f"{record['worth']:.4f} of {start.unpruned:.4f}, {seconds:.1f} s", flush=True)


def _smaller(rows: TensorDataset, is_text: bool) -> TensorDataset:
    """Return texts of 32 bytes, or images at half of their resolution."""
    inputs, targets = rows.tensors
    if is_text:
        return TensorDataset(inputs[:, :32], targets[:, :32])
    return TensorDataset(avg_pool2d(inputs, 2), targets)


def table(records: list[dict[str, Any]]) -> str:
    """Return in Markdown what is lost, by network and way, with paired differences and seconds."""
    rows: list[tuple[str, ...]] = []
    by_key = {tuple(record["key"]): record for record in records}
    for net in NETS:
        for choice in dict.fromkeys(key[3] for key in by_key):
            for way in WAYS:
                row = _row(by_key, net, choice, way)
                if row is not None:
                    rows.append(row)
    kept = [f"{left}: {title}" for left in _shown(by_key) for title in ("lost", "less than distilled", "CPU s")]
    by_share = markdown_table(("network", "criterion", "recovery", *kept), rows, text_columns=3)
    head = ("network", "criterion", "networks", "`block`: share of distillation's CPU s", "less lost than distilled")
    return f"{by_share}\n\n{markdown_table(head, _means(by_key), text_columns=2)}"


def _means(by_key: dict[tuple[Any, ...], dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return, of each kind of network, what `block` takes and loses beside distillation: means over the shares kept."""
    rows: list[tuple[str, ...]] = []
    for choice in dict.fromkeys(key[3] for key in by_key):
        of_all: list[float] = []
        for net in NETS:
            scale, digits = (-1, 3) if net == "gpt_small" else (100, 1)
            seconds, apart = list[float](), list[float]()
            for seed in dict.fromkeys(key[1] for key in by_key if key[0] == net):
                lefts = [left for left in LEFT if (net, seed, left, choice, "block") in by_key]
                pairs = [
                    (by_key[net, seed, left, choice, "block"], by_key.get((net, seed, left, choice, DISTILLED)))
                    for left in lefts
                ]
                both = [(mine, other) for mine, other in pairs if other is not None]
                if both:
                    seconds.append(fmean(mine["seconds"] / other["seconds"] for mine, other in both))
                    apart.append(scale * fmean(mine["worth"] - other["worth"] for mine, other in both))
            if len(seconds) > 1:
                of_all += seconds
                shown = interval(apart).show(1, digits, sign=True)
                rows.append((net, choice, str(len(seconds)), interval(seconds).show(1, 2), shown))
        if of_all:
            rows.append(("all", choice, str(len(of_all)), interval(of_all).show(1, 2), ""))
    return rows


def _shown(by_key: Iterable[tuple[Any, ...]]) -> list[str]:
    """Return the shares kept that records have."""
    return [left for left in LEFT if any(key[2] == left for key in by_key)]


def _row(by_key: dict[tuple[Any, ...], dict[str, Any]], net: str, choice: str, way: str) -> tuple[str, ...] | None:
    is_text = net == "gpt_small"
    scale, digits = (-1, 3) if is_text else (100, 1)
    cells: list[str] = []
    for left in _shown(by_key):
        seeds = [key[1] for key in by_key if key[0] == net and key[2:] == (left, choice, way)]
        found = [by_key[net, seed, left, choice, way] for seed in seeds]
        if not found:
            cells += ["", "", ""]
            continue
        lost = [scale * (record["unpruned"] - record["worth"]) for record in found]
        distilled = [by_key.get((net, seed, left, choice, DISTILLED)) for seed in seeds]
        apart = [
            scale * (record["worth"] - other["worth"]) for record, other in zip(found, distilled, strict=True) if other
        ]
        is_itself = way == DISTILLED
        cells.append(interval(lost).show(1, digits))
        cells.append("" if is_itself or not apart else interval(apart).show(1, digits, sign=True))
        cells.append(interval([record["seconds"] for record in found]).show(1, 0))
    return (net, choice, TITLES[way], *cells) if any(cells) else None


if __name__ == "__main__":
    main()
