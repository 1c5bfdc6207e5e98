"""Pruning as an optimisation of Net Deviation: half of LeNet-300-100's first hidden layer by genetic search.

    python -m benchmarks.clustering.bench_deviation_search --data-dir FASHION_MNIST --out DIR

The search minimises (3.12), its share of the bound, or the error alone, on 32 training images; random selection and the
L1 norm stand beside it. Networks are trained as in ``bench_subcluster.py``, with the same folder of checkpoints.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.clustering.bench_subcluster import Bench
from nni_topo import zoo
from nni_topo.analysis import NetDeviation, net_deviation
from nni_topo.maths.search.subsets import GeneticSearch, SubsetGeneticAlgorithm
from nni_topo.maths.ties import descending
from nni_topo.studies.tables import interval, markdown_table, show_accuracies

NET, LAYER = "lenet300", "fc1"
IMAGES = 32
KEPT = 0.5
SEARCH = GeneticSearch(population_size=12, generations=8)
ITERATIONS = 5
OBJECTIVES: dict[str, Callable[[NetDeviation], float]] = {
    "dev (3.12)": lambda found: found.dev,
    "dev / bound": lambda found: found.relative,
    "error": lambda found: found.error,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion-mnist", help="digits, mnist or fashion-mnist (default)")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(options.out, options.data_dir, options.data)
    runs: dict[str, list[dict[str, float]]] = {}
    for seed in range(options.seeds):
        model, data, before = bench.trained(NET, seed)
        runs.setdefault("unpruned", []).append({"accuracy": before})
        images = data.train.tensors[0][:IMAGES]
        for row, kept in selections(model, images, seed).items():
            pruned = without(model, LAYER, kept)
            found = net_deviation(model, pruned, images, iterations=100)
            record = {"error": found.error, "bound": found.bound, "dev": found.dev, "relative": found.relative}
            runs.setdefault(row, []).append(record | {"accuracy": zoo.evaluate(pruned, data.test)})
            print(seed, row, f"{found.error:.1f} {found.bound:.0f}", flush=True)
    print(markdown_table(*table(runs)))


def selections(model: nn.Module, images: Tensor, seed: int) -> dict[str, np.ndarray]:
    """Return the neurons that each way keeps, boolean."""
    weight = model.get_submodule(LAYER).weight.detach()
    size = len(weight)
    keep = round(KEPT * size)
    found = {"random": np.zeros(size, dtype=np.bool_), "l1": np.zeros(size, dtype=np.bool_)}
    found["random"][np.random.default_rng(seed).permutation(size)[:keep]] = True
    found["l1"][descending(weight.abs().sum(1).double().numpy())[:keep]] = True
    for row, objective in OBJECTIVES.items():
        found[row] = searched(model, LAYER, images, keep, objective, seed)
    return found


def searched(
    model: nn.Module,
    layer: str,
    images: Tensor,
    keep: int,
    objective: Callable[[NetDeviation], float],
    seed: int,
    settings: GeneticSearch = SEARCH,
) -> np.ndarray:
    """Return the subset of a layer's neurons with the smallest objective that a genetic search finds."""

    def fitness(population: np.ndarray) -> np.ndarray:
        networks = (without(model, layer, kept) for kept in population)
        return np.array([objective(net_deviation(model, net, images, iterations=ITERATIONS)) for net in networks])

    size = len(model.get_submodule(layer).weight)
    search = SubsetGeneticAlgorithm(size, keep, fitness, settings, seed=seed)
    search.run()
    best: np.ndarray = search.current_generation[0].genes
    return best


def without(model: nn.Module, layer: str, kept: np.ndarray) -> nn.Module:
    """Return a copy with the other neurons of a linear layer, and their biases, set to zero."""
    pruned = copy.deepcopy(model)
    module: Any = pruned.get_submodule(layer)
    rows = torch.from_numpy(kept).to(module.weight)
    module.weight.data *= rows[:, None]
    module.bias.data *= rows
    return pruned


def table(runs: dict[str, list[dict[str, float]]]) -> tuple[list[str], list[list[str]]]:
    """Return a row per way, means and intervals over seeds."""
    head = ["neurons selected by", "error", "bound (3.9)", "dev (3.12)", "dev / bound", "no recovery %"]
    rows = []
    for row, found in runs.items():
        cells = [row]
        for key, digits in (("error", 1), ("bound", 0), ("dev", 0), ("relative", 4)):
            cells.append(interval([run[key] for run in found]).show(digits=digits) if key in found[0] else "")
        rows.append([*cells, show_accuracies([run["accuracy"] for run in found])])
    return head, rows


if __name__ == "__main__":
    main()
