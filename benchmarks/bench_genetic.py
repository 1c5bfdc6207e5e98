"""The weight-pruning genetic algorithm on the thesis' two nets: fitness, compression, accuracy, time.

An MLP 1024-2048-10 (layer 2048->10) and a CNN with convolutions of 32 and 64 filters, 576-200-10 (layer 200->10), both
with tanh, on MNIST or Fashion-MNIST scaled to 32x32 and 24x24. The search sees validation images only; accuracy is
reported on the test set, with NNI's LevelPruner at the same sparsity beside it. Damage rates 10 to 90 %. The time of a
generation is compared with a list-based pyeasyga run of the same algorithm. Prints Markdown; writes JSON and pictures.
What is in the output folder already isn't run again, a stopped search goes on.

    python benchmarks/bench_genetic.py --data fashion-mnist --data-dir DIR --out runs/genetic
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import tracemalloc
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from list_genes import list_based
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import nni_topo
from nni_topo import zoo
from nni_topo.analysis.evolution import EvolutionTrial, plot_evolution
from nni_topo.maths.search.gene_layers import Layer
from nni_topo.maths.search.weights import WeightEvolutionSettings, WeightGeneticAlgorithm

RATES = (0.1, 0.3, 0.5, 0.7, 0.9)


def mlp() -> nn.Module:
    layers = (("flat", nn.Flatten()), ("fc1", nn.Linear(1024, 2048)), ("tanh", nn.Tanh()), ("fc2", nn.Linear(2048, 10)))
    return nn.Sequential(OrderedDict[str, nn.Module](layers))


def cnn() -> nn.Module:
    layers: tuple[tuple[str, nn.Module], ...] = (
        ("conv1", nn.Conv2d(1, 32, 5)),
        ("tanh1", nn.Tanh()),
        ("pool1", nn.MaxPool2d(2)),
        ("conv2", nn.Conv2d(32, 64, 5)),
        ("tanh2", nn.Tanh()),
        ("pool2", nn.MaxPool2d(2)),
        ("flat", nn.Flatten()),
        ("fc1", nn.Linear(576, 200)),
        ("tanh3", nn.Tanh()),
        ("fc2", nn.Linear(200, 10)),
    )
    return nn.Sequential(OrderedDict(layers))


NETS = {"mlp": (mlp, 32), "cnn": (cnn, 24)}


def resized(data: zoo.DataBundle, side: int, images: int, test_images: int | None) -> zoo.DataBundle:
    """Scale all images; keep so many for validation and for the test."""

    def scaled(part: TensorDataset, count: int | None = None) -> TensorDataset:
        pictures, labels = part.tensors
        size = (side, side)
        found = functional.interpolate(pictures[:count], size, mode="bilinear", align_corners=False)
        return TensorDataset(found, labels[:count])

    parts = {
        "train": scaled(data.train),
        "validation": scaled(data.validation, images),
        "test": scaled(data.test, test_images),
    }
    return replace(data, **parts, image_size=side)


def trained(name: str, data: zoo.DataBundle, options: argparse.Namespace) -> nn.Module:
    torch.manual_seed(options.seed)
    model = NETS[name][0]()
    path = options.out / f"{name}.pt"
    if path.exists():
        zoo.load_checkpoint(path, model)
        return model.eval()
    recipe = zoo.Recipe(epochs=options.epochs, lr=0.02, batch_size=64)
    zoo.train(model, data, recipe, seed=options.seed)
    zoo.save_checkpoint(path, model, {"seed": options.seed})
    return model


def search(
    name: str, model: nn.Module, data: zoo.DataBundle, rate: float, before: float, options: argparse.Namespace
) -> Any:
    """Run one trial and return it with its record; ``before`` is the unpruned network's test accuracy."""
    batches = list(zip(*(part.split(1000) for part in data.validation.tensors), strict=True))
    cell = options.out / f"{name}_{100 * rate:.0f}"
    clock = cell.with_suffix(".json")
    times = json.loads(clock.read_text(encoding="utf-8")) if clock.exists() else []
    began = time.process_time()

    def note(algorithm: WeightGeneticAlgorithm) -> None:
        nonlocal began
        times.append(time.process_time() - began)
        clock.write_text(json.dumps(times), encoding="utf-8")
        began = time.process_time()

    pruner = nni_topo.GeneticWeightPruner(
        copy.deepcopy(model),
        [{"op_names": ["fc2"]}],
        validation=batches,
        damage_rate=rate,
        population_size=options.population,
        generations=options.generations,
        state=cell.with_suffix(".npz"),
        on_generation=note,
        seed=options.seed,
    )
    wrapped, _ = pruner.compress()
    final = pruner.history[pruner.history.generation == options.generations]
    best = final.loc[final.fitness.idxmax()]
    level = copy.deepcopy(model)
    rival = nni_topo.create_pruner("level", level, [{"op_names": ["fc2"], "sparse_ratio": float(best.compression)}])
    rival.compress()
    record = {
        "net": name,
        "damage_rate": rate,
        "fitness": best.fitness,
        "fitness_mean": final.fitness.mean(),
        "compression": best.compression,
        "compression_mean": final.compression.mean(),
        "validation": best.accuracy,
        "validation_before": pruner.search.start_accuracy,
        "test": zoo.evaluate(wrapped, data.test),
        "test_before": before,
        "level_validation": zoo.evaluate(level, data.validation),
        "level_test": zoo.evaluate(level, data.test),
        "seconds_per_generation": float(np.median(times[1:])),
    }
    pruner.unwrap_model()
    return EvolutionTrial.of(pruner), record


def list_seconds(name: str, model: nn.Module, data: zoo.DataBundle, options: argparse.Namespace) -> float:
    """CPU seconds of a generation of the list-based run, evaluation by the whole network included."""
    path = options.out / f"{name}_lists.json"
    if path.exists():
        return float(json.loads(path.read_text(encoding="utf-8")))
    model = copy.deepcopy(model)
    weight = model.fc2.weight.detach().clone()

    def fitness(genes: list[int]) -> float:
        model.fc2.weight.data = weight * torch.tensor(genes, dtype=weight.dtype).view_as(weight)
        return 100 * zoo.evaluate(model, data.validation) + 1 - sum(genes) / len(genes)

    magnitudes = weight.abs().flatten().tolist()
    algorithm = list_based(magnitudes, fitness, population_size=options.population, generations=2, damage_rate=0.1)
    algorithm.create_first_generation()
    began = time.process_time()
    algorithm.create_next_generation()
    seconds = time.process_time() - began
    path.write_text(json.dumps(seconds), encoding="utf-8")
    return seconds


def bookkeeping(genes: int, options: argparse.Namespace) -> dict[str, float]:
    """CPU seconds and bytes of breeding and replacing a population, evaluation left out; lists beside packed bits."""
    path = options.out / f"bookkeeping_{genes}{'_lists' if options.lists else ''}.json"
    if path.exists():
        return dict(json.loads(path.read_text(encoding="utf-8")))
    magnitudes = np.abs(np.random.default_rng(0).laplace(size=genes)).astype(np.float32)
    settings = WeightEvolutionSettings(population_size=options.population)

    def made(traced: bool) -> list[float]:
        algorithm = WeightGeneticAlgorithm(
            [Layer(magnitudes)], lambda population: np.array([float(row[0]) for row in population]), settings, seed=0
        )
        if traced:
            tracemalloc.start()
        algorithm.create_first_generation()
        times = []
        for _ in range(3 if traced else 10):
            began = time.process_time()
            algorithm.create_next_generation()
            times.append(time.process_time() - began)
        return times

    times = made(traced=False)
    made(traced=True)
    record = {"genes": genes, "seconds": float(np.median(times)), "seconds_worst": max(times)}
    record["bytes"] = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    if options.lists:
        algorithm = list_based(
            magnitudes.tolist(), lambda genes: genes[0], population_size=options.population, generations=2,
            damage_rate=0.1,
        )  # fmt: skip
        algorithm.create_first_generation()
        began = time.process_time()
        algorithm.create_next_generation()
        record["list_seconds"] = time.process_time() - began
    path.write_text(json.dumps(record), encoding="utf-8")
    return record


def markdown(records: list[dict[str, Any]], lists: dict[str, float], books: dict[str, float]) -> str:
    head = (
        "net", "damage %", "fitness (mean)", "removed % (mean)", "validation %", "test %", "LevelPruner, validation %",
        "LevelPruner, test %", "CPU s a generation", "as lists",
    )  # fmt: skip
    lines = [head, ("---", *("---:",) * (len(head) - 1)), *(_cells(record, lists) for record in records)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\nbookkeeping: {json.dumps(books)}"


def _cells(record: dict[str, Any], lists: dict[str, float]) -> tuple[str, ...]:
    shares = ("validation_before", "validation", "test_before", "test", "level_validation", "level_test")
    percent = {name: f"{100 * record[name]:.2f}" for name in shares}
    return (
        record["net"],
        f"{100 * record['damage_rate']:.0f}",
        f"{record['fitness']:.3f} ({record['fitness_mean']:.2f})",
        f"{100 * record['compression']:.1f} ({100 * record['compression_mean']:.1f})",
        f"{percent['validation_before']} -> {percent['validation']}",
        f"{percent['test_before']} -> {percent['test']}",
        percent["level_validation"],
        percent["level_test"],
        f"{record['seconds_per_generation']:.2f}",
        f"{lists[record['net']]:.1f}" if record["net"] in lists else "",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion-mnist", help="mnist or fashion-mnist")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument("--limit", type=int, default=10_000, help="training images")
    parser.add_argument("--images", type=int, default=3_000, help="validation images that the search sees")
    parser.add_argument("--test-images", type=int, help="default all")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--population", type=int, default=50)
    parser.add_argument("--generations", type=int, default=20)
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    parser.add_argument("--genes", type=int, default=2048 * 1024, help="of the bookkeeping's measurement")
    parser.add_argument("--lists", action="store_true", help="also time lists, of the bookkeeping too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    raw = zoo.load_data(options.data, options.data_dir, limit=options.limit)
    records: list[dict[str, Any]] = []
    lists: dict[str, float] = {}
    books = bookkeeping(options.genes, options)
    for name in options.nets:
        data = resized(raw, NETS[name][1], options.images, options.test_images)
        model = trained(name, data, options)
        trials, before = {}, zoo.evaluate(model, data.test)
        for rate in options.rates:
            trials[f"damage {100 * rate:.0f} %"], record = search(name, model, data, rate, before, options)
            records.append(record)
        plot_evolution(trials, options.out / name)
        if options.lists:
            lists[name] = list_seconds(name, model, data, options)
        content = {"records": records, "list_seconds": lists, "bookkeeping": books}
        (options.out / "genetic.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(markdown(records, lists, books))


if __name__ == "__main__":
    main()
