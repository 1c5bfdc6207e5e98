"""The weight-pruning genetic algorithm on the thesis' two nets: fitness, compression, accuracy, time.

An MLP 1024-2048-10 (layer 2048->10) and a CNN with convolutions of 32 and 64 filters, 576-200-10 (layer 200->10), both
with tanh, on MNIST or Fashion-MNIST scaled to 32x32 and 24x24; `--layer fc1` takes the layers 1024->2048 and 576->200.
The search sees validation images only; accuracy is reported on the test set, with NNI's LevelPruner at the same
sparsity beside it. Damage rates 10 to 90 %, both mutations at 10 and at 1 %. The time of a generation is compared with
a list-based pyeasyga run of the same algorithm. Prints Markdown, the thesis' tables 5.1 and 5.2 too, and how each
layer's weights are distributed; writes JSON and, for the first seed, the thesis' pictures. Networks that are in the
output folder already aren't trained again.

    python -m benchmarks.selection.bench_genetic --data fashion-mnist --data-dir DIR --out runs/genetic
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import tracemalloc
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import kurtosis
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import nni_topo
from benchmarks.selection.list_genes import list_based
from nni_topo import zoo
from nni_topo.maths.search.weights import GeneLayer, WeightGeneticAlgorithm, WeightSearch
from nni_topo.studies.analysis.evolution import EvolutionStudy, EvolutionTrial
from nni_topo.studies.study import save_figures
from nni_topo.studies.tables import interval

RATES = (0.1, 0.3, 0.5, 0.7, 0.9)
TERMINATIONS = (0.1, 0.01)


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


def trained(name: str, data: zoo.DataBundle, seed: int, options: argparse.Namespace) -> nn.Module:
    torch.manual_seed(seed)
    model = NETS[name][0]()
    path = options.out / f"{name}_{seed}.pt"
    if path.exists():
        zoo.load_checkpoint(path, model)
        return model.eval()
    recipe = zoo.Recipe(epochs=options.epochs, lr=0.02, batch_size=64)
    zoo.train(model, data, recipe, seed=seed)
    zoo.save_checkpoint(path, model, {"seed": seed})
    return model.eval()


@dataclass(frozen=True)
class Trial:
    """One search: of which net, with which damage and which rate of both mutations."""

    net: str
    seed: int
    termination: float
    rate: float
    layer: str = "fc2"


def search(trial: Trial, model: nn.Module, data: zoo.DataBundle, before: float, options: argparse.Namespace) -> Any:
    """Run one trial and return it with its record; ``before`` is the unpruned network's test accuracy."""
    batches = list(zip(*(part.split(1000) for part in data.validation.tensors), strict=True))
    pruner = nni_topo.GeneticWeightPruner(
        copy.deepcopy(model),
        [{"op_names": [trial.layer]}],
        validation=batches,
        search=WeightSearch(
            damage_rate=trial.rate,
            population_size=options.population,
            generations=options.generations,
            weakest_rate=trial.termination,
            random_rate=trial.termination,
        ),
        seed=trial.seed,
    )
    began = time.process_time()
    wrapped, _ = pruner.compress()
    seconds = time.process_time() - began
    final = pruner.history[pruner.history.generation == options.generations]
    best = final.loc[final.fitness.idxmax()]
    level = copy.deepcopy(model)
    baseline = nni_topo.create_pruner(
        "level", level, [{"op_names": [trial.layer], "sparse_ratio": float(best.compression)}]
    )
    baseline.compress()
    record = {
        **asdict(trial),
        "fitness": best.fitness,
        "fitness_mean": final.fitness.mean(),
        "compression": best.compression,
        "compression_mean": final.compression.mean(),
        "validation": best.accuracy,
        "validation_before": pruner.evolution.start_accuracy,
        "test": zoo.evaluate(wrapped, data.test),
        "test_before": before,
        "level_validation": zoo.evaluate(level, data.validation),
        "level_test": zoo.evaluate(level, data.test),
        "seconds_per_generation": seconds / (options.generations + 1),
    }
    pruner.unwrap_model()
    return EvolutionTrial.of(pruner), record


def list_seconds(name: str, model: nn.Module, data: zoo.DataBundle, options: argparse.Namespace) -> float:
    """CPU seconds of a generation of the list-based run, evaluation by the whole network included."""
    path = options.out / f"{name}_{options.layer}_lists.json"
    if path.exists():
        return float(json.loads(path.read_text(encoding="utf-8")))
    model = copy.deepcopy(model)
    layer = model.get_submodule(options.layer)
    weight = layer.weight.detach().clone()

    def fitness(genes: list[int]) -> float:
        layer.weight.data = weight * torch.tensor(genes, dtype=weight.dtype).view_as(weight)
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
    settings = WeightSearch(population_size=options.population)

    def made(traced: bool) -> list[float]:
        algorithm = WeightGeneticAlgorithm(
            [GeneLayer(magnitudes)],
            lambda population: np.array([float(row[0]) for row in population]),
            settings,
            seed=0,
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
        "net", "terminated %", "damage %", "fitness (mean)", "removed % (mean)", "validation %", "gain", "test %",
        "gain", "LevelPruner, test %", "over LevelPruner", "CPU s a generation", "as lists",
    )  # fmt: skip
    rows: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        rows[record["net"], record["termination"], record["rate"]].append(record)
    table = tabulated(head, [_cells(row, lists) for row in rows.values()])
    return f"{table}\n\nbookkeeping: {json.dumps(books)}"


def shapes(name: str, model: nn.Module) -> list[list[str]]:
    """Describe each linear layer's weights as the thesis does for its figures 5.1 and 5.8."""
    rows = []
    for layer, module in model.named_modules():
        if isinstance(module, nn.Linear):
            weights = module.weight.detach().double().numpy().ravel()
            small = np.abs(weights) < np.abs(weights).max() / 10
            rows.append(
                [
                    f"{name}, {layer}",
                    f"{module.in_features} -> {module.out_features}",
                    f"{weights.min():.3f} to {weights.max():.3f}",
                    f"{kurtosis(weights):.2f}",
                    f"{100 * small.mean():.1f}",
                ]
            )
    return rows


def tabulated(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ("---", *("---:",) * (len(head) - 1)), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(row: list[dict[str, Any]], lists: dict[str, float]) -> tuple[str, ...]:
    def mean(name: str, scale: float = 100, digits: int = 1) -> str:
        values = [scale * record[name] for record in row]
        return f"{np.mean(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"

    def gain(name: str, over: str) -> str:
        return interval([record[name] - record[over] for record in row]).show(100, sign=True)

    first = row[0]
    return (
        first["net"],
        f"{100 * first['termination']:g}",
        f"{100 * first['rate']:.0f}",
        f"{mean('fitness', 1, 2)} ({np.mean([record['fitness_mean'] for record in row]):.2f})",
        f"{mean('compression')} ({100 * np.mean([record['compression_mean'] for record in row]):.1f})",
        mean("validation"),
        gain("validation", "validation_before"),
        mean("test"),
        gain("test", "test_before"),
        mean("level_test"),
        gain("test", "level_test"),
        f"{np.median([record['seconds_per_generation'] for record in row]):.2f}",
        f"{lists[first['net']]:.1f}" if first["net"] in lists else "",
    )


def populations(name: str, trials: dict[str, EvolutionTrial]) -> str:
    """The thesis' tables 5.1 and 5.2 of one net: lowest, mean and highest of the first and the last population."""
    head, rows = [f"{name}, seed 0"], []
    for label, trial in trials.items():
        found = trial.summary()
        cells = {
            f"{column}, {end}": "{:.2f} {:.2f} {:.2f}".format(*(scale * values))
            for column, scale in (("fitness", 1), ("accuracy", 100), ("compression", 100))
            for end, values in found[column].iterrows()
        }
        head = [head[0], *cells]
        rows.append([label, *cells.values()])
    return tabulated(head, rows)


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
    parser.add_argument("--layer", default="fc2", choices=("fc1", "fc2"), help="whose weights are searched")
    parser.add_argument("--genes", type=int, default=2048 * 1024, help="of the bookkeeping's measurement")
    parser.add_argument("--lists", action="store_true", help="also time lists, of the bookkeeping too")
    parser.add_argument("--terminations", type=float, nargs="+", default=list(TERMINATIONS), help="of both mutations")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    raw = zoo.load_data(options.data, options.data_dir, limit=options.limit)
    records: list[dict[str, Any]] = []
    lists: dict[str, float] = {}
    books = bookkeeping(options.genes, options)
    tables = []
    weights: list[list[str]] = []
    for name in options.nets:
        data = resized(raw, NETS[name][1], options.images, options.test_images)
        for seed in range(options.seeds):
            model = trained(name, data, seed, options)
            before = zoo.evaluate(model, data.test)
            if not seed:
                weights += shapes(name, model)
            for termination in options.terminations:
                trials = {}
                for rate in options.rates:
                    trial = Trial(name, seed, termination, rate, options.layer)
                    trials[f"damage {100 * rate:.0f} %"], record = search(trial, model, data, before, options)
                    records.append(record)
                if not seed:
                    save_figures(
                        options.out / f"{name}_{options.layer}_{100 * termination:g}", EvolutionStudy(trials).figures()
                    )
                    tables.append(f"{100 * termination:g} % terminated:\n\n{populations(name, trials)}")
            if options.lists and not seed:
                lists[name] = list_seconds(name, model, data, options)
            content = {"records": records, "list_seconds": lists, "bookkeeping": books}
            (options.out / "genetic.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    head = ("weights, seed 0", "layer", "range", "excess kurtosis", "magnitudes in the lowest tenth %")
    print("\n\n".join([markdown(records, lists, books), *tables, tabulated(head, weights)]))


if __name__ == "__main__":
    main()
