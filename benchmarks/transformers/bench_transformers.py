"""Heads and neurons of transformers: what each criterion keeps, and what each method recovers without a label.

    python -m benchmarks.transformers.bench_transformers vit_small --data-dir DIR --out runs/transformers

trains a net of the zoo for each seed (``bert_small``, and ``gpt_small``, which needs no folder, alike), keeps half, a
third and a sixth of the heads of every layer with half, a quarter and an eighth of the MLP's neurons, chosen by each
criterion, and recovers each by each method from the same unlabelled rows; 256 more judge what is distilled.
``--retrained`` fine-tunes for an epoch with labels after no recovery and after distillation, or after one of the two. A
line per figure goes to ``transformers.jsonl``, nets to files beside it; the same command goes on where it was stopped.
Of 2,000 test images the accuracy in percent, of 256 rows of text bits per byte; differences are paired by net. Dense
nets are timed in turns with the unpruned one.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks.recovery import recovery_rules  # noqa: F401  (it registers methods by name)
from nni_topo import compensate, create_pruner, dependency_groups, distill, to_dense, zoo
from nni_topo.network.speedup.analysis import Analysis
from nni_topo.runs.run import Start, pruner_knobs
from nni_topo.studies.baselines import baseline_masks, is_baseline
from nni_topo.studies.records import append_record, read_records
from nni_topo.studies.tables import interval
from nni_topo.zoo.evaluation import bits
from nni_topo.zoo.transformers import SelfAttention

SHARES = ((1 / 2, 1 / 2), (1 / 3, 1 / 4), (1 / 6, 1 / 8))
LEFT = dict(zip(("half", "third", "sixth"), SHARES, strict=True))
CHOICES = {
    "random": "random",
    "norm": "l1",
    "Taylor": "taylor",
    "functional cloud": "topological",
    "reconstruction": "reconstruction",
    "Torch-Pruning": "torch-pruning",
}
_NOT_GPT = "Torch-Pruning"  # because it shares keys and values, and has rotary positions
_TIMED = "norm"
METHODS = {
    "mean into bias": "mean",
    "scalar per channel": "scalar",
    "scalar per head": "head",
    "channel ridge": "channel",
    "solved": "reconstruct",
}
RULES = ("as shipped", *METHODS, "solved, distilled")
RETRAINED = ("as shipped", "solved, distilled")
TITLES = {"as shipped": "no recovery", "solved": "weight reconstruction", "retrained": "fine-tuned"}
"""What tables print for words of a rule's name, which command lines and records have had since the first runs."""
_LOOKED_AT = 512
_JUDGING = 256


def main() -> None:
    """Parse the command line, run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("vit_small", "bert_small", "gpt_small"))
    parser.add_argument("--data-dir", type=Path, help="folder of Fashion-MNIST's files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--choices", nargs="+", choices=CHOICES, help="default: all that take the net")
    parser.add_argument("--left", nargs="+", choices=LEFT, default=list(LEFT), help="of the heads, default: all three")
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=RULES, help="default: all")
    parser.add_argument("--rows", type=int, default=1024, help="unlabelled")
    parser.add_argument("--steps", type=int, default=300, help="of distillation")
    parser.add_argument("--epochs", type=int, help="of training (default: the recipe's)")
    parser.add_argument("--limit", type=int, default=10_000, help="rows to train on")
    parser.add_argument(
        "--retrained",
        nargs="*",
        choices=RETRAINED,
        help="also fine-tune for an epoch with labels after these (default: both)",
    )
    options = parser.parse_args()
    options.choices = options.choices or [
        choice for choice in CHOICES if not (choice == _NOT_GPT and options.model == "gpt_small")
    ]
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "transformers.jsonl"
    name = "python-stdlib" if options.model == "gpt_small" else "fashion-mnist"
    data = zoo.load_data(name, options.data_dir, limit=options.limit, validation=0.0)
    for seed in options.seeds:
        _run(options, _trained(options, data, seed), path)
    _print([record for record in read_records(path) if record["key"][0] == options.model])


def _run(options: argparse.Namespace, start: Start, path: Path) -> None:
    """Measure all that is missing of one net."""
    done = {tuple(record["key"]) for record in read_records(path)}
    retrained = RETRAINED if options.retrained == [] else options.retrained or ()
    rules = (*options.rules, *(f"{rule}, retrained" for rule in retrained))
    whole = cache(lambda: _worth(start.net, start.data))
    for heads, neurons in (LEFT[left] for left in options.left):
        for choice in options.choices:
            found = _Recovered(options, start, choice, heads, neurons)
            for rule in rules:
                key = (options.model, start.seed, heads, neurons, choice, rule)
                if key in done:
                    continue
                dense, seconds = found.by(rule)
                worth = _worth(dense, start.data)
                shares = _times(start, dense) if rule == "as shipped" and choice == _TIMED else {}
                append_record(path, {"key": key, "whole": whole(), "worth": worth, "seconds": seconds, **shares})
                print(*key, f"{worth:.4f} of {whole():.4f}, {seconds:.1f} s", flush=True)


def _trained(options: argparse.Namespace, data: zoo.DataBundle, seed: int) -> Start:
    sizes = {"num_classes": data.num_classes, "in_channels": data.in_channels, "image_size": data.image_size}
    net, path = zoo.create_model(options.model, **sizes, seed=seed), options.out / f"{options.model}-{seed}.pt"
    recipe = zoo.default_recipe(options.model, data.name)
    recipe = replace(recipe, epochs=options.epochs or recipe.epochs)
    if path.exists():
        zoo.load_checkpoint(path, net)
    else:
        log = zoo.train(net, data, recipe, seed=seed)
        print(f"{options.model}, seed {seed}: {_worth(net, data):.4f} after {log.seconds:.0f} s", flush=True)
        zoo.save_checkpoint(path, net, {"seconds": log.seconds})
    return Start(net.eval(), data, recipe, seed)


def _worth(net: nn.Module, data: zoo.DataBundle) -> float:
    """Return the accuracy on the test set, of text bits per byte."""
    rows = 256 if data.is_text else 2000
    loss, accuracy = zoo.loss_and_accuracy(net, TensorDataset(*(part[:rows] for part in data.test.tensors)))
    return bits(loss) if data.is_text else accuracy


class _Recovered:
    """Dense nets of one choice, by each rule, made when they are asked for."""

    def __init__(self, options: argparse.Namespace, start: Start, choice: str, heads: float, neurons: float) -> None:
        self._options, self._start = options, start
        self._choice, self._heads, self._neurons = choice, heads, neurons
        self._rows = start.data.train.tensors[0][: options.rows]
        self.by = cache(self._made)

    def _made(self, rule: str) -> tuple[nn.Module, float]:
        """Return the dense net and the CPU seconds that its recovery took."""
        start, batches = self._start, list(self._rows.split(128))
        knobs = {"steps": self._options.steps, "objective": "kl", "seed": start.seed}
        before, _, last = rule.rpartition(", ")
        dense, seconds = self.by(before) if before else (start.net, 0.0)
        masks, began = self._masks(), time.process_time()
        if last == "distilled":
            # Of rows that compensation had it looks better than it is.
            judging = start.images(_JUDGING, skip=self._options.rows)
            dense = distill(dense, start.net, batches, held_out=judging, **knobs)
        elif last == "retrained":
            dense = copy.deepcopy(dense)
            zoo.train(dense, start.data, start.recipe.for_retraining(1), seed=start.seed)
        else:
            method: Any = METHODS.get(rule)
            net = compensate(start.net, masks, batches, method=method, seed=start.seed) if method else start.net
            dense = to_dense(net, self._rows[:2], masks)
        return dense, seconds + time.process_time() - began

    @cache  # noqa: B019
    def _masks(self) -> Any:
        net, pruner = copy.deepcopy(self._start.net), CHOICES[self._choice]
        if is_baseline(pruner):
            return self._baseline_masks(net)
        heads = {"op_names_re": [r".*\.attention"], "granularity": "head", "sparse_ratio": 1.0 - self._heads}
        neurons = {"op_names_re": [r".*\.mlp\.(fc1|gate_proj|up_proj)"], "sparse_ratio": 1.0 - self._neurons}
        groups = list(dependency_groups(net, self._rows[:2], [heads, neurons]))
        looks = pruner in ("topological", "reconstruction")
        knobs = pruner_knobs(pruner, net, self._start, _LOOKED_AT if looks else 0)
        return create_pruner(pruner, net, groups, **knobs).compress()[1]

    def _baseline_masks(self, net: nn.Module) -> Any:
        attention = [name for name, part in net.named_modules() if isinstance(part, SelfAttention)]
        heads = [f"{name}.{each}_proj" for name in attention for each in "qkv"]
        inner = [name for name, _ in net.named_modules() if name.endswith(".mlp.fc1")]
        ratios = dict.fromkeys(heads, 1.0 - self._heads) | dict.fromkeys(inner, 1.0 - self._neurons)
        return baseline_masks(CHOICES[self._choice], Analysis.on(net, self._rows[:2]), ratios)[0]


def _times(start: Start, dense: nn.Module) -> dict[str, float]:
    """Return a dense net's MACs and time, one thread and 64 rows, as shares of the unpruned one's."""
    rows, nets = start.data.test.tensors[0][:64], {"unpruned": start.net, "dense": dense}
    macs = {name: zoo.count_macs(net, rows[:1]) for name, net in nets.items()}
    times = zoo.latencies(nets, rows, runs=20)
    return {"macs": macs["dense"] / macs["unpruned"], "latency": times["dense"] / times["unpruned"]}


def _print(records: list[dict[str, Any]]) -> None:
    """Print in Markdown what is lost beside the unpruned nets and by how much less than by norm, with intervals."""
    is_text = records[0]["key"][0] == "gpt_small"
    scale, digits, better = (1, 3, -1) if is_text else (100, 1, 1)
    lost: dict[tuple[Any, ...], dict[int, float]] = defaultdict(dict)
    for record in records:
        _, seed, heads, _, choice, rule = record["key"]
        lost[choice, rule, heads][seed] = better * (record["whole"] - record["worth"])
    shares = [heads for heads, _ in SHARES]
    nets = {record["key"][1]: record["whole"] for record in records}
    print(f"\nunpruned: {interval(list(nets.values())).show(scale, digits)}\n")
    kept = "half | a third | a sixth"
    lost_titles = kept.replace("half", "half kept")
    print(f"| criterion | method | {lost_titles} | less than by norm: {kept} | CPU s |\n|---|---|{'---:|' * 7}")
    every = [*RULES, *(f"{rule}, retrained" for rule in RETRAINED)]
    order = [(c, r) for c in CHOICES for r in every if any((c, r) == (choice, rule) for choice, rule, _ in lost)]
    for choice, rule in order:
        cells = [lost[choice, rule, heads] for heads in shares]
        norms = [lost["norm", rule, heads] for heads in shares]
        shown = [_show(cell.values(), scale, digits) for cell in cells]
        apart = [
            _show([norm[seed] - cell[seed] for seed in cell.keys() & norm.keys()], scale, digits, sign=True)
            for cell, norm in zip(cells, norms, strict=True)
        ]
        seconds = [record["seconds"] for record in records if tuple(record["key"][4:]) == (choice, rule)]
        method = ", ".join(TITLES.get(word, word) for word in rule.split(", "))
        print(f"| {choice} | {method} | {' | '.join((*shown, *apart))} | {sum(seconds) / len(seconds):.0f} |")
    for heads in shares:
        timed = [record for record in records if "macs" in record and record["key"][2:5:2] == [heads, _TIMED]]
        parts = [
            f"{key} {interval([each[key] for each in timed]).show(digits=3)}" for key in ("macs", "latency") if timed
        ]
        if parts:
            print(f"{_TIMED}, 1/{round(1 / heads)} of the heads, share of the unpruned net's: {', '.join(parts)}")


def _show(values: Iterable[float], scale: float, digits: int, *, sign: bool = False) -> str:
    """Return a mean and its interval, nothing of no value."""
    found = list(values)
    return interval(found).show(scale, digits, sign=sign) if found else ""


if __name__ == "__main__":
    main()
