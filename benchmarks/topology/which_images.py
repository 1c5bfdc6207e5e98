"""T1 of HYPOTHESES.md: which images weight reconstruction should use, when there is room for few.

    PYTHONPATH=benchmarks python benchmarks/topology/which_images.py --images runs/fresh/images.npz --out runs/topology

Trains networks of two kinds, removes three quarters of every layer by L1, chooses 16 to 128 of the 5,000 training
images by each method, reconstructs the weights with them (``compensate``), and writes a line per network, number of
images and method to ``which_images.jsonl``. The same command goes on where it was stopped. ``images.npz`` is made by
``benchmarks/fresh_networks/split.py``.

    PYTHONPATH=benchmarks python benchmarks/topology/which_images.py --out benchmarks/records/topology \
        --into benchmarks/results/topology.md

writes the tables of the records into a page, between the two comments that name this file.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from registered import CONFIRMATION, EXPLORATION, benchmark, best_of, difference_row
from torch import Tensor, nn

import nni_topo
from nni_topo import zoo
from nni_topo.runs.choices import DataChoice, ModelChoice, PrunerChoice, Target
from nni_topo.runs.run import Start, prune_to_ratios, trained
from nni_topo.runs.widths import layer_ratios
from nni_topo.studies.records import append_record, read_records
from nni_topo.studies.tables import markdown_table, show_accuracies

SOURCE = "benchmarks/topology/which_images.py"  # as the comments around a page's tables say
POOL = 5_000
COUNTS = (16, 32, 64, 128)
PRIMARY = 32
RATIO = 0.75  # of every layer, removed by L1
DRAWS = 3  # of a method that draws images at random
ISOLATED = 0.2  # share of the images that are dropped before the others are covered
NETWORKS = {
    "LeNet-5-like": (ModelChoice("lenet5_like"), zoo.Recipe(epochs=6)),
    "MobileNetV2, small": (ModelChoice("recovery_nets:mobilenet_like"), zoo.Recipe(epochs=10, lr=0.1)),
}

Record = dict[str, Any]
Points = NDArray[np.float64]
Indices = NDArray[np.intp]


def main() -> None:
    """Parse the command line; run what is missing and print the tables."""
    benchmark(__doc__, SOURCE, tables, measure)


def measure(images: Path, out: Path, path: Path) -> None:
    """Measure every method on the networks that aren't there yet; first the number of images that decides."""
    others = [count for count in COUNTS if count != PRIMARY]
    for counts in ([PRIMARY], others):
        for seed in (*EXPLORATION, *CONFIRMATION):
            for kind in NETWORKS:
                run(kind, seed, counts, images, out, path)


def run(kind: str, seed: int, counts: list[int], images: Path, out: Path, path: Path) -> None:
    """Measure every method on the network of a kind and a seed, and keep what isn't there yet."""
    known = {tuple(record["key"]) for record in read_records(path)}
    missing = [(count, method) for count in counts for method in METHODS if (kind, seed, count, method) not in known]
    if not missing:
        return
    model, recipe = NETWORKS[kind]
    data = DataChoice(str(images), limit=POOL)
    start = trained(model, data, recipe=recipe, folder=out / "checkpoints", seed=seed)
    target = Target("ratio", RATIO)
    masks = prune_to_ratios(start, PrunerChoice("l1"), target, layer_ratios(start.net, start.example, target)).masks
    points = features(start)
    for count, method in missing:
        draws = DRAWS if method in DRAWN else 1
        found = [measured(start, masks, METHODS[method](points, count, 1000 * draw + seed)) for draw in range(draws)]
        record = {
            "key": [kind, seed, count, method],
            "unpruned": start.accuracy,
            "validation": float(np.mean([validation for validation, _ in found])),
            "test": float(np.mean([test for _, test in found])),
        }
        append_record(path, record)
        print(*record["key"], f"{100 * record['test']:.1f} %", flush=True)


def measured(start: Start, masks: Any, chosen: Indices) -> tuple[float, float]:
    """Return the accuracies on validation and test images after weight reconstruction with the chosen images."""
    few = start.data.train.tensors[0][torch.from_numpy(np.sort(chosen))]
    solved = nni_topo.compensate(start.net, masks, [few], progress=False)
    dense = nni_topo.to_dense(solved, start.example, masks)
    return start.validated(dense), start.tested(dense)


def features(start: Start) -> Points:
    """Return what enters the last linear layer of the unpruned network, (images, features), of all training images."""
    last = [module for module in start.net.modules() if isinstance(module, nn.Linear)][-1]
    found: list[Tensor] = []

    def note(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        found.append(given[0].double())

    handle = last.register_forward_pre_hook(note)
    with torch.no_grad():
        for batch in start.data.train.tensors[0].split(500):
            start.net(batch)
    handle.remove()
    return torch.cat(found).numpy()


def random_images(points: Points, count: int, seed: int) -> Indices:
    """Draw images, each with the same probability."""
    return np.random.default_rng(seed).choice(len(points), count, replace=False)


def leverage_images(points: Points, count: int, seed: int) -> Indices:
    """Draw images in proportion to their leverage scores: the squared rows of an orthonormal basis of the features."""
    basis, values, _ = np.linalg.svd(points - points.mean(0), full_matrices=False)
    basis = basis[:, values > values[0] * 1e-10]
    scores = np.square(basis).sum(1)
    return np.random.default_rng(seed).choice(len(points), count, replace=False, p=scores / scores.sum())


def kmeans_images(points: Points, count: int, seed: int) -> Indices:
    """Return of each k-means cluster the image that is nearest to its mean."""
    labels = nni_topo.clustering.partition(points, count, seed=seed)
    found = []
    for label in range(int(labels.max()) + 1):
        (members,) = np.nonzero(labels == label)
        off = np.square(points[members] - points[members].mean(0)).sum(1)
        found.append(members[off.argmin()])
    return np.array(found)


def herding_images(points: Points, count: int, seed: int) -> Indices:
    """Return images that keep the mean of the chosen ones nearest to the mean of all, one after the other."""
    mean = points.mean(0)
    total = np.zeros_like(mean)
    chosen: list[int] = []
    for index in range(count):
        off = np.square((total + points) / (index + 1) - mean).sum(1)
        off[chosen] = np.inf
        chosen.append(int(off.argmin()))
        total += points[chosen[-1]]
    return np.array(chosen)


def covering_images(points: Points, count: int, seed: int) -> Indices:
    """Return images that cover the cloud: the one nearest to the mean, then always the farthest from those before."""
    distances = nni_topo.topology.pairwise_distances(points)
    first = int(np.square(points - points.mean(0)).sum(1).argmin())
    return nni_topo.topology.farthest_point_order(distances, first)[0][:count]


def dense_covering_images(points: Points, count: int, seed: int) -> Indices:
    """Return images that cover the cloud without its most isolated fifth.

    An image's component in degree 0 of the Rips filtration is merged into another one at the distance of its nearest
    neighbour; those with the latest mergers are dropped.
    """
    distances = torch.cdist(torch.from_numpy(points), torch.from_numpy(points)).fill_diagonal_(torch.inf)
    merged = distances.amin(1).numpy()
    stay = np.sort(merged.argsort(kind="stable")[: round((1.0 - ISOLATED) * len(points))])
    return stay[covering_images(points[stay], count, seed)]


COVER, DENSE_COVER = "cover", "cover without isolated images"
METHODS: dict[str, Callable[[Points, int, int], Indices]] = {
    "random": random_images,
    "leverage scores": leverage_images,
    "k-means": kmeans_images,
    "herding": herding_images,
    COVER: covering_images,
    DENSE_COVER: dense_covering_images,
}
DRAWN = ("random", "leverage scores")
BASELINES = ("random", "leverage scores", "k-means", "herding")


def tables(records: list[Record]) -> str:
    """Return Markdown: exploration, confirmation, and the differences that the hypothesis is about."""
    blocks = []
    for title, seeds in (("Exploration", EXPLORATION), ("Confirmation", CONFIRMATION)):
        for kind in NETWORKS:
            block = accuracies(records, kind, seeds, title)
            if block:
                blocks += block
    blocks += outcome(records)
    return "\n\n".join(blocks)


def accuracies(records: list[Record], kind: str, seeds: range, title: str) -> list[str]:
    """Return the table of a kind of networks: test accuracy by method and number of images."""
    mine = [record for record in records if record["key"][0] == kind and record["key"][1] in seeds]
    if not mine:
        return []
    unpruned = {record["key"][1]: record["unpruned"] for record in mine}
    rows = []
    for method in METHODS:
        cells = []
        for count in COUNTS:
            by_seed = figures(mine, kind, seeds, count)[method]
            is_whole = by_seed.keys() == set(seeds)
            cells.append(show_accuracies(list(by_seed.values())) if is_whole else "not run")
        rows.append([method, *cells])
    head = ["method", *(f"{count} images, %" for count in COUNTS)]
    caption = f"**{title}: {kind}, {len(unpruned)} networks, unpruned {show_accuracies(list(unpruned.values()))} %**"
    return [caption, markdown_table(head, rows)]


def figures(
    records: list[Record], kind: str, seeds: range, count: int, measure: str = "test"
) -> dict[str, dict[int, float]]:
    """Return accuracies by method, then by seed, of a kind of networks and a number of images."""
    found: dict[str, dict[int, float]] = {method: {} for method in METHODS}
    for record in records:
        kind_of, seed, count_of, method = record["key"]
        if kind_of == kind and seed in seeds and count_of == count:
            found[method][seed] = record[measure]
    return found


def chosen_cover(records: list[Record]) -> str:
    """Return the cover with the higher mean accuracy on the validation images of exploration, over both kinds."""

    def mean(method: str) -> float:
        found = [figures(records, kind, EXPLORATION, PRIMARY, "validation")[method] for kind in NETWORKS]
        return float(np.mean([value for by_seed in found for value in by_seed.values()]))

    return max((COVER, DENSE_COVER), key=mean)


def outcome(records: list[Record]) -> list[str]:
    """Return the table of differences between the chosen cover and each baseline on the fresh networks."""
    rows = []
    for kind in NETWORKS:
        fresh = figures(records, kind, CONFIRMATION, PRIMARY)
        if not all(len(fresh[method]) > 1 for method in METHODS):
            continue
        ours = chosen_cover(records)
        best = best_of(BASELINES, figures(records, kind, EXPLORATION, PRIMARY, "validation"))
        for baseline in sorted(BASELINES, key=lambda name: name != best):
            label = f"{baseline} (best baseline)" if baseline == best else baseline
            rows.append([kind, label, *difference_row(fresh[ours], fresh[baseline])])
    if not rows:
        return []
    head = ["network", f"{ours} against", "difference, points", "p"]
    return [f"**Differences on fresh networks, {PRIMARY} images**", markdown_table(head, rows, text_columns=2)]


if __name__ == "__main__":
    main()
