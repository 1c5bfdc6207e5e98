"""How much cheaper the fitness of a subset is than a Rips complex and a matching per individual.

Naive is what a genetic algorithm over neuron masks does first: for every individual GUDHI's Rips complex of the
kept points, its simplex tree and persistence, and GUDHI's bottleneck distance to the whole cloud's diagram,
which is computed once. Ours is `SubsetFitness` on populations of 50 that it hasn't seen. Both score the same
random subsets of half the points, in one thread, in turns; times are the process' own, so that other load on
the machine matters less.

The whole search is 50 individuals in 20 generations: `naive_search.py` on pyeasyga's lists against
`SubsetGeneticAlgorithm`, both from the points on. Naive runs fewer generations on large clouds, and its time is
scaled: every generation evaluates the same number of subsets of the same size.

    python -m benchmarks.speed.bench_fitness --out fitness.json
    python -m benchmarks.speed.bench_fitness --quick
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

from benchmarks.speed.naive_search import naive_fitness, naive_search
from nni_topo.maths.search.subsets import GeneticSearch, SubsetGeneticAlgorithm
from nni_topo.topology import SubsetFitness, pairwise_distances, rips_diagram

POPULATION = 50
# Points and features of VGG-16's 3x3 convolutions of that width, and the speed-up aimed at.
H0_CASES = ((64, 576, 40), (256, 2304, 250), (512, 4608, 700))
H1_CASES = ((128, 1152, 15), (256, 2304, 50))
# Points, features, speed-up of the whole search aimed at, and the generations that naive runs.
SEARCH_CASES = ((64, 576, 60, 20), (256, 2304, 350, 4), (512, 4608, 750, 1))
GENERATIONS = 20
PARTS = ("h0", "h1", "search", "growth")
GROWTH = (128, 256, 512, 1024, 2048, 4096)


def seconds(function: Callable[[], Any]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def make_population(rng: np.random.Generator, points: int, count: int) -> np.ndarray:
    """Return subsets (count, points) of half the points."""
    return rng.permuted(np.tile(np.arange(points) < points // 2, (count, 1)), axis=1)


def compare(points: int, features: int, degree: int, repeats: int, naive_count: int) -> dict[str, Any]:
    """Time naive and ours in turns on the same clouds; medians, in seconds per individual."""
    rng = np.random.default_rng(points)
    cloud = rng.normal(size=(points, features))
    distances = pairwise_distances(cloud)
    whole = rips_diagram(distances=distances, dimension=degree)
    times: dict[str, list[float]] = {name: [] for name in ("naive", "naive_distances", "ours")}
    start = time.process_time()
    score = SubsetFitness(pairwise_distances(cloud), "bottleneck", homology_dimensions=(degree,))
    setup = time.process_time() - start
    score(make_population(rng, points, POPULATION))
    differences = []
    for _ in range(repeats):
        population = make_population(rng, points, POPULATION)
        for subset in population[:naive_count]:
            kept = np.flatnonzero(subset)
            near = distances[np.ix_(kept, kept)]
            times["naive"].append(seconds(lambda k=kept: naive_fitness({"points": cloud[k]}, whole, degree)))
            times["naive_distances"].append(
                seconds(lambda d=near: naive_fitness({"distance_matrix": d}, whole, degree))
            )
        times["ours"].append(seconds(lambda p=population: score(p)) / POPULATION)
        subset = np.flatnonzero(population[0])
        reference = naive_fitness({"points": cloud[subset]}, whole, degree)
        differences.append(abs(score(population[:1])[0] - reference))
    medians = {name: float(np.median(values)) for name, values in times.items()}
    return {
        "points": points,
        "features": features,
        "degree": degree,
        "seconds": medians,
        "setup_seconds": setup,
        "ratio": medians["naive"] / medians["ours"],
        "ratio_to_naive_distances": medians["naive_distances"] / medians["ours"],
        "largest_difference": max(differences),
    }


def compare_search(points: int, features: int, goal: int, naive_generations: int, repeats: int) -> dict[str, Any]:
    """Time the whole genetic algorithm, naive and ours; seconds of 20 generations of 50."""
    cloud = np.random.default_rng(points).normal(size=(points, features))
    whole = rips_diagram(cloud)
    naive = seconds(lambda: naive_search(cloud, whole, POPULATION, naive_generations, seed=0))
    naive = naive * GENERATIONS / naive_generations
    runs = [our_search(cloud, seed) for seed in range(repeats)]
    ours, search = (float(np.median(times)) for times in zip(*runs, strict=True))
    return {
        "points": points,
        "features": features,
        "goal": goal,
        "naive_generations": naive_generations,
        "seconds": {"naive": naive, "ours": ours},
        "search_seconds": search,
        "ratio": naive / ours,
        "search_ratio": naive / search,
    }


def our_search(cloud: np.ndarray, seed: int) -> tuple[float, float]:
    """Time one search from the points on, and its part once the distances are there."""
    start = time.process_time()
    distances = pairwise_distances(cloud)
    middle = time.process_time()
    fitness = SubsetFitness(distances, "bottleneck")
    settings = GeneticSearch(population_size=POPULATION, generations=GENERATIONS)
    SubsetGeneticAlgorithm(len(cloud), len(cloud) // 2, fitness, settings, seed=seed).run()
    end = time.process_time()
    return end - start, end - middle


def growth(sizes: Sequence[int], repeats: int) -> dict[str, Any]:
    """Time H0 fitness over the number of points, and fit the exponent of its growth."""
    times = []
    for points in sizes:
        rng = np.random.default_rng(points)
        fitness = SubsetFitness(pairwise_distances(rng.normal(size=(points, 64))), "bottleneck")
        fitness(make_population(rng, points, 2))
        count = POPULATION if points <= 1024 else 8
        populations = [make_population(rng, points, count) for _ in range(repeats)]
        values = [seconds(lambda f=fitness, p=p: f(p)) / count for p in populations]
        times.append(float(np.median(values)))
    return {"points": list(sizes), "seconds": times, "exponent": float(np.polyfit(np.log(sizes), np.log(times), 1)[0])}


def peak_memory(points: int) -> dict[str, Any]:
    """Measure the peak memory of a distance matrix, a fitness and a population in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.speed.bench_fitness", "--peak-memory-of", str(points)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return {"points": points, **json.loads(result.stdout)}


def peak_resident_bytes() -> int:
    """Read the largest resident size so far; `resource` would count the parent's before the fork."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def print_peak_memory(points: int) -> None:
    cloud = np.random.default_rng(0).normal(size=(points, 64))
    before = peak_resident_bytes()
    fitness = SubsetFitness(pairwise_distances(cloud), "bottleneck")
    fitness(make_population(np.random.default_rng(1), points, POPULATION))
    print(json.dumps({"bytes_before": before, "bytes_added": peak_resident_bytes() - before}))


def show(console: Console, rows: list[dict[str, Any]], goals: dict[tuple[int, int], int]) -> None:
    table = Table(title="One fitness, ms; speed-up over naive (over naive with the distances given) [goal]")
    for heading in ("degree", "points", "features", "naive", "naive, distances", "ours", "largest difference"):
        table.add_column(heading, justify="right")
    for row in rows:
        cells = [f"H{row['degree']}", str(row["points"]), str(row["features"])]
        cells += [f"{1e3 * row['seconds'][name]:.2f}" for name in ("naive", "naive_distances")]
        ratio, strict_ratio, goal = row["ratio"], row["ratio_to_naive_distances"], goals[row["degree"], row["points"]]
        cells.append(f"{1e3 * row['seconds']['ours']:.4f}  {ratio:.0f}x ({strict_ratio:.0f}x) [{goal}x]")
        table.add_row(*cells, f"{row['largest_difference']:.1e}")
    console.print(table)


def show_searches(console: Console, rows: list[dict[str, Any]]) -> None:
    table = Table(title="The whole search, 50 x 20, s; speed-up over naive (with the distances given) [goal]")
    for heading in ("points", "features", "naive", "ours"):
        table.add_column(heading, justify="right")
    for row in rows:
        cells = [str(row["points"]), str(row["features"]), f"{row['seconds']['naive']:.2f}"]
        if row["naive_generations"] < GENERATIONS:
            cells[-1] += f" (scaled from {row['naive_generations']})"
        ratios = f"{row['ratio']:.0f}x ({row['search_ratio']:.0f}x)"
        table.add_row(*cells, f"{row['seconds']['ours']:.4f}  {ratios} [{row['goal']}x]")
    console.print(table)


def show_growth(console: Console, result: dict[str, Any], memory: dict[str, Any]) -> None:
    table = Table(title="Growth of one H0 fitness, ms")
    table.add_column("points", justify="right")
    table.add_column(f"ms (~ n^{result['exponent']:.2f})", justify="right")
    for points, taken in zip(result["points"], result["seconds"], strict=True):
        table.add_row(str(points), f"{1e3 * taken:.4f}")
    console.print(table)
    console.print(
        f"Peak memory at {memory['points']} points: {memory['bytes_added'] / 2**20:.0f} MiB "
        f"on top of the interpreter's {memory['bytes_before'] / 2**20:.0f} MiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--repeats", type=int, default=7, help="populations per figure (default: 7)")
    parser.add_argument("--naive", type=int, default=5, help="naive evaluations per population (default: 5)")
    parser.add_argument("--quick", action="store_true", help="smaller clouds, fewer repeats")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)")
    parser.add_argument("--peak-memory-of", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_memory_of:
        print_peak_memory(options.peak_memory_of)
        return
    repeats, sizes = (3, GROWTH[:4]) if options.quick else (options.repeats, GROWTH)
    h0 = H0_CASES[: 2 if options.quick else 3] if "h0" in options.parts else ()
    h1 = H1_CASES[: 1 if options.quick else 2] if "h1" in options.parts else ()
    cases = {(degree, n): (f, goal) for degree, group in enumerate((h0, h1)) for n, f, goal in group}
    console = Console(width=150)
    figures: dict[str, Any] = {}
    with threadpool_limits(1):
        if cases:
            figures["fitness"] = [
                compare(points, features, degree, repeats, options.naive)
                for (degree, points), (features, _) in cases.items()
            ]
            show(console, figures["fitness"], {case: goal for case, (_, goal) in cases.items()})
        if "search" in options.parts:
            chosen = SEARCH_CASES[: 1 if options.quick else 3]
            figures["searches"] = [compare_search(*case, repeats) for case in chosen]
            show_searches(console, figures["searches"])
        if "growth" in options.parts:
            figures |= {"growth": growth(sizes, repeats), "memory": peak_memory(sizes[-1])}
            show_growth(console, figures["growth"], figures["memory"])
    if options.out:
        about = {"python": platform.python_version(), "processor": platform.processor() or platform.machine()}
        about |= {name: version(name) for name in ("numpy", "scipy", "gudhi")}
        options.out.write_text(json.dumps({"about": about, **figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
