"""T2 of HYPOTHESES.md: how many different filters a layer has, told from its weights alone.

    python benchmarks/topology/how_many_filters.py --images runs/fresh/images.npz --out runs/topology

Plants noisy copies in the layers of trained networks (those of ``which_filters.py``), estimates the number of
different filters by each method, and writes a line per layer to ``how_many_filters.jsonl``. The same command goes on
where it was stopped. ``images.npz`` is made by ``benchmarks/fresh_networks/split.py``.

    python benchmarks/topology/how_many_filters.py --out benchmarks/records/topology \
        --into benchmarks/results/topology.md

writes the tables of the records into a page, between the two comments that name this file.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from registered import CONFIRMATION, EXPLORATION, benchmark, difference_row
from scipy.cluster.hierarchy import fcluster, linkage
from sklearn.metrics import silhouette_score
from sklearn.mixture import GaussianMixture
from torch import nn
from which_filters import trained

import nni_topo
from nni_topo import zoo
from nni_topo.studies.records import append_record, read_records
from nni_topo.studies.tables import interval, markdown_table

SOURCE = "benchmarks/topology/how_many_filters.py"  # as the comments around a page's tables say
NOISE = (0.05, 0.7)  # of a copy, over the norm of its filter; log-uniform
KINDS = (0.25, 1.0)  # share of a layer's filters that are kept as different ones; uniform
TIMES = 2  # so many times the layer's filters there are with the copies
ENERGY = 0.99

Record = dict[str, Any]
Points = NDArray[np.float64]


def main() -> None:
    """Parse the command line; run what is missing and print the tables."""
    benchmark(__doc__, SOURCE, tables, measure)


def measure(images: Path, out: Path, path: Path) -> None:
    """Estimate the numbers of filters that aren't there yet."""
    data = zoo.load_data(str(images), limit=5_000)
    for seed in (*EXPLORATION, *CONFIRMATION):
        run(seed, data, out, path)


def run(seed: int, data: zoo.DataBundle, out: Path, path: Path) -> None:
    """Estimate the number of different filters of every layer of the network of a seed that isn't there yet."""
    known = {tuple(record["key"]) for record in read_records(path)}
    model = trained(seed, data, out)
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    for place, layer in enumerate(layers):
        if (seed, place) in known:
            continue
        filters = layer.weight.detach().flatten(1).double().numpy()
        points, kinds, noise = planted(filters, np.random.default_rng([seed, place]))
        estimates = {name: method(points) for name, method in METHODS.items()}
        record = {"key": [seed, place], "filters": len(points), "kinds": kinds, "noise": noise, "estimates": estimates}
        append_record(path, record)
        print(*record["key"], kinds, estimates, flush=True)


def planted(filters: Points, generator: np.random.Generator) -> tuple[Points, int, float]:
    """Return some of the filters and noisy copies of them in random order, how many there were, and the noise."""
    total = TIMES * len(filters)
    kinds = round(generator.uniform(*KINDS) * len(filters))
    chosen = filters[generator.permutation(len(filters))[:kinds]]
    noise = float(np.exp(generator.uniform(*np.log(NOISE))))
    copied = chosen[generator.integers(kinds, size=total - kinds)]
    norms = np.linalg.norm(copied, axis=1, keepdims=True)
    directions = generator.standard_normal(copied.shape)
    copies = copied + noise * norms * directions / np.linalg.norm(directions, axis=1, keepdims=True)
    points = np.concatenate([chosen, copies])
    return points[generator.permutation(total)], kinds, noise


def by_largest_ratio(points: Points) -> int:
    """Return the number of components where the ratio between neighbouring H0 death times is largest."""
    deaths = _deaths(points)
    return int(np.argmax(deaths[:-1] / deaths[1:])) + 2


def by_largest_difference(points: Points) -> int:
    """Return the number of components where the difference between neighbouring H0 death times is largest."""
    deaths = _deaths(points)
    return int(np.argmax(deaths[:-1] - deaths[1:])) + 2


def _deaths(points: Points) -> Points:
    """Return the finite H0 death times of a cloud, longest first; those of equal points are a little above zero."""
    deaths = np.sort(nni_topo.topology.h0_deaths(nni_topo.topology.pairwise_distances(points)))[::-1]
    return np.maximum(deaths, 1e-12 * deaths[0])


def by_bic(points: Points) -> int:
    """Return the number of spherical Gaussians whose mixture has the lowest BIC, among 1, 2, ... half of the points."""
    scores = []
    for count in range(1, len(points) // 2 + 1):
        mixture = GaussianMixture(count, covariance_type="spherical", random_state=0, reg_covar=1e-6 * points.var())
        scores.append(mixture.fit(points).bic(points))
    return int(np.argmin(scores)) + 1


def by_silhouette(points: Points) -> int:
    """Return the number of Ward's clusters with the highest mean silhouette, among 2, 3, ... all but one."""
    tree = linkage(points, "ward")
    scores = [silhouette_score(points, fcluster(tree, count, "maxclust")) for count in range(2, len(points))]
    return int(np.argmax(scores)) + 2


def by_energy(points: Points) -> int:
    """Return how many principal components, not centred, hold 99 % of the energy."""
    energies = np.square(np.linalg.svd(points, compute_uv=False))
    return int(np.searchsorted(np.cumsum(energies) / energies.sum(), ENERGY)) + 1


def half(points: Points) -> int:
    """Return half of the filters."""
    return len(points) // 2


SILHOUETTE = "silhouette of Ward's clusters"
RATIO, DIFFERENCE = "largest ratio of H0 death times", "largest difference of H0 death times"
METHODS: dict[str, Callable[[Points], int]] = {
    RATIO: by_largest_ratio,
    DIFFERENCE: by_largest_difference,
    "mixtures by BIC": by_bic,
    "principal components, 99 %": by_energy,
    "half of the layer": half,
    SILHOUETTE: by_silhouette,  # added after the first run
}
GAPS = (RATIO, DIFFERENCE)
BASELINES = ("mixtures by BIC", "principal components, 99 %", "half of the layer")


def tables(records: list[Record]) -> str:
    """Return Markdown: the mean relative errors, and the difference that the hypothesis is about."""
    explored, fresh = errors(records, EXPLORATION), errors(records, CONFIRMATION)
    sets = [(name, found) for name, found in (("exploration", explored), ("confirmation", fresh)) if found]
    rows = [[method, *(interval(list(found[method].values())).show(100) for _, found in sets)] for method in METHODS]
    head = ["method", *(f"{name}, {len(found[RATIO])} layers" for name, found in sets)]
    blocks = ["**Mean relative error of the number of different filters, %**", markdown_table(head, rows)]
    if fresh:
        best, ours = (lowest(names, explored) for names in (BASELINES, GAPS))
        lines = []
        for baseline in (*sorted(BASELINES, key=lambda name: name != best), SILHOUETTE):
            label = f"{baseline} (best baseline)" if baseline == best else baseline
            lines.append([label, *difference_row(fresh[ours], fresh[baseline])])
        title = f"**Differences on {len(fresh[ours])} fresh layers**"
        blocks += [title, markdown_table([f"{ours} against", "difference, points", "p"], lines)]
    return "\n\n".join(blocks)


def lowest(names: tuple[str, ...], explored: dict[str, dict[int, float]]) -> str:
    """Return the method with the lowest mean error over the layers of exploration; of equal ones the first."""
    return min(names, key=lambda name: float(np.mean(list(explored[name].values()))))


def errors(records: list[Record], seeds: range) -> dict[str, dict[int, float]]:
    """Return the relative error of each method by layer of the networks of some seeds; empty without records."""
    found: dict[str, dict[int, float]] = {}
    for record in records:
        seed, place = record["key"]
        if seed in seeds:
            for method, estimate in record["estimates"].items():
                off = abs(estimate - record["kinds"]) / record["kinds"]
                found.setdefault(method, {})[100 * seed + place] = off
    return found


if __name__ == "__main__":
    main()
