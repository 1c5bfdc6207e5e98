"""Heads and neurons of transformers: what is left by each choice, and what each rule recovers without a label.

    python benchmarks/bench_transformers.py vit_small --data-dir DIR --out runs/transformers

trains a net of the zoo by its recipe (``bert_small``, and ``gpt_small``, which needs no folder, alike; ``--epochs`` and
``--limit`` make it shorter), keeps half, a third and a sixth of the heads of every layer with half, a quarter and an
eighth of the MLP's neurons, chosen by each pruner, and recovers each by each rule from the same unlabelled rows. A line
per figure goes to ``transformers.jsonl``; the same command goes on where it was stopped. Of 2,000 test images the
accuracy in percent, of 256 rows of text bits per byte.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from nni_topo import compensate, create_pruner, dependency_groups, distill, to_dense, zoo
from nni_topo.runs.records import append_record, read_records
from nni_topo.runs.tables import interval
from nni_topo.zoo.evaluation import bits

SHARES = ((1 / 2, 1 / 2), (1 / 3, 1 / 4), (1 / 6, 1 / 8))
CHOICES = {"random": "random", "norm": "l1", "functional cloud": "topological", "reconstruction": "reconstruction"}
RULES = {
    "as shipped": None,
    "mean into bias": "mean",
    "scalar per channel": "scalar",
    "channel ridge": "channel",
    "solved": "reconstruct",
    "solved, distilled": "reconstruct",
}
_LOOKED_AT = 512


def main() -> None:
    """Parse the command line, run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("vit_small", "bert_small", "gpt_small"))
    parser.add_argument("--data-dir", type=Path, help="folder of Fashion-MNIST's files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=1024, help="unlabelled")
    parser.add_argument("--epochs", type=int, help="of training (default: the recipe's)")
    parser.add_argument("--limit", type=int, default=20_000, help="rows to train on")
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = options.out / "transformers.jsonl"
    for seed in options.seeds:
        _run(options, seed, path)
    _print([record for record in read_records(path) if record["key"][0] == options.model])


def _run(options: argparse.Namespace, seed: int, path: Path) -> None:
    """Measure all that is missing of one net."""
    name = "python-stdlib" if options.model == "gpt_small" else "fashion-mnist"
    data = zoo.load_data(name, options.data_dir, limit=options.limit)
    original = _trained(options, data, seed)
    whole, rows = _worth(original, data), data.train.tensors[0][: options.rows]
    done = {tuple(record["key"]) for record in read_records(path)}
    for heads, neurons in SHARES:
        for choice, pruner in CHOICES.items():
            keys = {rule: (options.model, seed, heads, neurons, choice, rule) for rule in RULES}
            if done.issuperset(keys.values()):
                continue
            masks = _masks(original, pruner, heads, neurons, rows, seed)
            made: dict[str, tuple[nn.Module, float]] = {}
            for rule, key in keys.items():
                made[rule] = _recovered(original, masks, rule, rows, seed, made)
                if key not in done:
                    worth, seconds = _worth(made[rule][0], data), made[rule][1]
                    append_record(path, {"key": key, "whole": whole, "worth": worth, "seconds": seconds})
                    print(*key, f"{worth:.4f} of {whole:.4f}, {seconds:.1f} s", flush=True)


def _trained(options: argparse.Namespace, data: zoo.DataBundle, seed: int) -> nn.Module:
    sizes = {"num_classes": data.num_classes, "in_channels": data.in_channels, "image_size": data.image_size}
    net, path = zoo.create_model(options.model, **sizes, seed=seed), options.out / f"{options.model}-{seed}.pt"
    if path.exists():
        zoo.load_checkpoint(path, net)
        return net.eval()
    recipe = zoo.default_recipe(options.model, data.name)
    log = zoo.train(net, data, replace(recipe, epochs=options.epochs or recipe.epochs), seed=seed)
    print(f"{options.model}, seed {seed}: {_worth(net, data):.4f} after {log.seconds:.0f} s", flush=True)
    zoo.save_checkpoint(path, net, {"seconds": log.seconds})
    return net


def _worth(net: nn.Module, data: zoo.DataBundle) -> float:
    """Return the accuracy on the test set, of text bits per byte."""
    rows = 256 if data.is_text else 2000
    loss, accuracy = zoo.loss_and_accuracy(net, TensorDataset(*(part[:rows] for part in data.test.tensors)))
    return bits(loss) if data.is_text else accuracy


def _masks(original: nn.Module, pruner: str, heads: float, neurons: float, rows: torch.Tensor, seed: int) -> Any:
    net = copy.deepcopy(original)
    config = [
        {"op_names_re": [r".*\.attention"], "granularity": "head", "sparse_ratio": 1.0 - heads},
        {"op_names_re": [r".*\.mlp\.(fc1|gate_proj|up_proj)"], "sparse_ratio": 1.0 - neurons},
    ]
    groups = list(dependency_groups(net, rows[:2], config))
    knobs: dict[str, Any] = {"seed": seed} if pruner == "random" else {}
    if pruner in ("topological", "reconstruction"):
        knobs["calibration"] = list(rows[:_LOOKED_AT].split(128))
    return create_pruner(pruner, net, groups, **knobs).compress()[1]


def _recovered(
    original: nn.Module,
    masks: Any,
    rule: str,
    rows: torch.Tensor,
    seed: int,
    made: Mapping[str, tuple[nn.Module, float]],
) -> tuple[nn.Module, float]:
    """Return the dense net and the CPU seconds that its recovery took."""
    began, batches, method = time.process_time(), list(rows.split(128)), RULES[rule]
    if rule == "solved, distilled":
        dense, before = made["solved"]
        learned = distill(dense, original, batches, objective="kl", seed=seed)
        return learned, before + time.process_time() - began
    net = original if method is None else compensate(original, masks, batches, method=method, seed=seed)  # type: ignore[arg-type]
    dense = to_dense(net, rows[:2], masks)
    return dense, time.process_time() - began


def _print(records: list[dict[str, Any]]) -> None:
    """Print a Markdown table: a row for each choice and rule, means and 95 % intervals over the nets."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        _, _, heads, _, choice, rule = record["key"]
        found[choice, rule, heads].append(record)
    shares = sorted({heads for _, _, heads in found}, reverse=True)
    scale = 1 if records[0]["key"][0] == "gpt_small" else 100
    whole = interval([record["whole"] for record in next(iter(found.values()))]).show(scale)
    titles = [f"1/{round(1 / each)} of the heads" for each in shares]
    print(f"\nwhole: {whole}\n\n| choice | rule | {' | '.join(titles)} | CPU s |")
    print("|---|---|" + "---:|" * (len(shares) + 1))
    for choice in CHOICES:
        for rule in RULES:
            cells = [found[choice, rule, heads] for heads in shares]
            values = [interval([each["worth"] for each in cell]).show(scale) if cell else "" for cell in cells]
            seconds = [each["seconds"] for cell in cells for each in cell]
            mean = f"{sum(seconds) / len(seconds):.0f}" if seconds else ""
            print(f"| {choice} | {rule} | {' | '.join(values)} | {mean} |")


if __name__ == "__main__":
    main()
