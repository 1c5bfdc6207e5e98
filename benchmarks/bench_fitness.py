"""How much cheaper the fitness of a subset is than a Rips complex and a matching per individual.

Naive is what a genetic algorithm over neuron masks does first: for every individual GUDHI's Rips complex of the
kept points, its simplex tree and persistence, and GUDHI's bottleneck distance to the whole cloud's diagram,
which is computed once. Ours is `SubsetFitness` on populations of 50 that it hasn't seen. Both score the same
random subsets of half the points, in one thread, in turns; times are the process' own, so that other load on
the machine matters less.

    python benchmarks/bench_fitness.py --out fitness.json
    python benchmarks/bench_fitness.py --quick
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

import gudhi
import numpy as np
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

from nni_topo.topology import SubsetFitness, pairwise_distances, rips_diagram
from nni_topo.topology._kernels import numba_available

POPULATION = 50
# Points and features of VGG-16's 3x3 convolutions of that width, and the speed-ups aimed at.
H0_CASES = ((64, 576, 40, 100), (256, 2304, 250, 500), (512, 4608, 700, 1500))
H1_CASES = ((128, 1152, 15, 15), (256, 2304, 50, 50))
GROWTH = (128, 256, 512, 1024, 2048, 4096)


def seconds(function: Callable[[], Any]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def make_population(rng: np.random.Generator, points: int, count: int) -> np.ndarray:
    """Return subsets (count, points) of half the points."""
    return rng.permuted(np.tile(np.arange(points) < points // 2, (count, 1)), axis=1)


def naive_fitness(cloud: dict[str, np.ndarray], whole: np.ndarray, degree: int) -> float:
    """Score one subset, a GUDHI Rips complex from `points` or from `distance_matrix`."""
    tree = gudhi.RipsComplex(**cloud).create_simplex_tree(max_dimension=degree + 1)
    tree.persistence()
    return float(gudhi.bottleneck_distance(tree.persistence_intervals_in_dimension(degree), whole))


def compare(points: int, features: int, degree: int, repeats: int, naive_count: int) -> dict[str, Any]:
    """Time naive and ours in turns on the same clouds; medians, in seconds per individual."""
    rng = np.random.default_rng(points)
    cloud = rng.normal(size=(points, features))
    distances = pairwise_distances(cloud)
    whole = rips_diagram(distances=distances, dimension=degree)
    engines = {"numpy": False} | ({"compiled": True} if numba_available() else {})
    times: dict[str, list[float]] = {name: [] for name in ("naive", "naive_distances", *engines)}
    setup: dict[str, float] = {}
    fitness: dict[str, SubsetFitness] = {}
    for name, compiled in engines.items():
        for _ in range(2):  # the first compiles
            knobs = {"homology_dimensions": (degree,), "compiled": compiled}
            start = time.process_time()
            fitness[name] = SubsetFitness(pairwise_distances(cloud), "bottleneck", **knobs)
            setup[name] = time.process_time() - start
            fitness[name](make_population(rng, points, POPULATION))
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
        for name, score in fitness.items():
            times[name].append(seconds(lambda f=score, p=population: f(p)) / POPULATION)
        subset = np.flatnonzero(population[0])
        reference = naive_fitness({"points": cloud[subset]}, whole, degree)
        differences.append(max(abs(score(population[:1])[0] - reference) for score in fitness.values()))
    medians = {name: float(np.median(values)) for name, values in times.items()}
    return {
        "points": points,
        "features": features,
        "degree": degree,
        "seconds": medians,
        "setup_seconds": setup,
        "ratio": {name: medians["naive"] / medians[name] for name in engines},
        "ratio_to_naive_distances": {name: medians["naive_distances"] / medians[name] for name in engines},
        "largest_difference": max(differences),
    }


def growth(sizes: Sequence[int], repeats: int) -> dict[str, Any]:
    """Time H0 fitness over the number of points, and fit the exponent of its growth."""
    engines = {"numpy": False} | ({"compiled": True} if numba_available() else {})
    times: dict[str, list[float]] = {name: [] for name in engines}
    for points in sizes:
        rng = np.random.default_rng(points)
        distances = pairwise_distances(rng.normal(size=(points, 64)))
        for name, compiled in engines.items():
            fitness = SubsetFitness(distances, "bottleneck", compiled=compiled)
            fitness(make_population(rng, points, 2))
            count = POPULATION if points <= 1024 else 8
            populations = [make_population(rng, points, count) for _ in range(repeats)]
            values = [seconds(lambda f=fitness, p=p: f(p)) / count for p in populations]
            times[name].append(float(np.median(values)))
    slopes = {name: float(np.polyfit(np.log(sizes), np.log(values), 1)[0]) for name, values in times.items()}
    return {"points": list(sizes), "seconds": times, "exponent": slopes}


def peak_memory(points: int) -> dict[str, Any]:
    """Measure the peak memory of a distance matrix, a fitness and a population in a process of its own."""
    command = [sys.executable, __file__, "--peak-memory-of", str(points)]
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


def show(console: Console, rows: list[dict[str, Any]], goals: dict[tuple[int, int], tuple[int, int]]) -> None:
    table = Table(title="One fitness, ms; speed-up over naive (over naive with the distances given) [goal]")
    for heading in ("degree", "points", "features", "naive", "naive, distances", "numpy", "compiled"):
        table.add_column(heading, justify="right")
    table.add_column("largest difference", justify="right")
    for row in rows:
        cells = [f"H{row['degree']}", str(row["points"]), str(row["features"])]
        cells += [f"{1e3 * row['seconds'][name]:.2f}" for name in ("naive", "naive_distances")]
        for name, goal in zip(("numpy", "compiled"), goals[row["degree"], row["points"]], strict=True):
            if name not in row["ratio"]:
                cells.append("no numba")
                continue
            ratio, strict_ratio = row["ratio"][name], row["ratio_to_naive_distances"][name]
            cells.append(f"{1e3 * row['seconds'][name]:.4f}  {ratio:.0f}x ({strict_ratio:.0f}x) [{goal}x]")
        table.add_row(*cells, f"{row['largest_difference']:.1e}")
    console.print(table)


def show_growth(console: Console, result: dict[str, Any], memory: dict[str, Any]) -> None:
    table = Table(title="Growth of one H0 fitness, ms")
    table.add_column("points", justify="right")
    for name, exponent in result["exponent"].items():
        table.add_column(f"{name} (~ n^{exponent:.2f})", justify="right")
    for i, points in enumerate(result["points"]):
        table.add_row(str(points), *(f"{1e3 * values[i]:.4f}" for values in result["seconds"].values()))
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
    parser.add_argument("--peak-memory-of", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_memory_of:
        print_peak_memory(options.peak_memory_of)
        return
    repeats, sizes = (3, GROWTH[:4]) if options.quick else (options.repeats, GROWTH)
    cases = {(0, n): (f, goals) for n, f, *goals in H0_CASES[: 2 if options.quick else 3]}
    cases |= {(1, n): (f, goals) for n, f, *goals in H1_CASES[: 1 if options.quick else 2]}
    with threadpool_limits(1):
        rows = [
            compare(points, features, degree, repeats, options.naive)
            for (degree, points), (features, _) in cases.items()
        ]
        grown = growth(sizes, repeats)
    memory = peak_memory(sizes[-1])
    console = Console(width=150)
    show(console, rows, {case: tuple(goals) for case, (_, goals) in cases.items()})
    show_growth(console, grown, memory)
    if options.out:
        names = ["numpy", "scipy", "gudhi", *(["numba"] if numba_available() else [])]
        about = {"python": platform.python_version(), "processor": platform.processor() or platform.machine()}
        about |= {name: version(name) for name in names}
        figures = {"about": about, "fitness": rows, "growth": grown, "memory": memory}
        options.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
