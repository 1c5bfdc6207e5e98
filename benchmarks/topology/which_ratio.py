"""T4 of HYPOTHESES.md: at which ratio a network that is no classifier breaks, told from its outputs alone.

    python benchmarks/topology/which_ratio.py --images runs/fresh/images.npz --out runs/topology

Trains encoders of patches, removes more and more filters of every convolution by L1, reconstructs the weights
(``compensate``), compares the outputs with the unpruned encoder's, and writes a line per encoder and ratio to
``which_ratio.jsonl``. The same command goes on where it was stopped. ``images.npz`` is made by
``benchmarks/fresh_networks/split.py``.

    python benchmarks/topology/which_ratio.py --out benchmarks/records/topology --into benchmarks/results/topology.md

writes the tables of the records into a page, between the two comments that name this file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from encoders import (
    SOLVED,
    centre_patches,
    embedded,
    neighbour_accuracy,
    pruned_encoder,
    trained_encoder,
    width_of,
)
from registered import CONFIRMATION, EXPLORATION, benchmark, difference_row
from rtd import rtd_lite
from torch import Tensor
from torch.nn.functional import normalize

import nni_topo
from nni_topo import zoo
from nni_topo.maths.knee import knee
from nni_topo.studies.records import append_record, read_records
from nni_topo.studies.tables import interval, markdown_table

SOURCE = "benchmarks/topology/which_ratio.py"  # as the comments around a page's tables say
FALL = 0.05  # of the accuracy by neighbours, or what else says how good a network is: one that lost so much is broken
COMPARED = 512  # patches whose outputs are compared
MOST_RATIOS = 16

Record = dict[str, Any]
Curve = tuple[list[float], list[float]]
"""Ratios, and what was measured at each."""


def main() -> None:
    """Parse the command line; run what is missing and print the tables."""
    benchmark(__doc__, SOURCE, tables, measure)


def measure(images: Path, out: Path, path: Path) -> None:
    """Measure the encoders that aren't there yet."""
    data = zoo.load_data(str(images), limit=5_000)
    for seed in (*EXPLORATION, *CONFIRMATION):
        run(seed, data, out, path)


def run(seed: int, data: zoo.DataBundle, out: Path, path: Path) -> None:
    """Measure the encoder of a seed at the ratios that aren't there yet."""
    known = {tuple(record["key"]) for record in read_records(path)}
    width = width_of(seed)
    missing = [gone for gone in range(0, width, -(-width // MOST_RATIOS)) if (seed, gone) not in known]
    if not missing:
        return
    model = trained_encoder(seed, data, out)
    parts = {"train": data.train, "validation": data.validation, "test": data.test}
    patches = {name: centre_patches(part.tensors[0]) for name, part in parts.items()}
    labels = {name: part.tensors[1] for name, part in parts.items()}
    compared = patches["train"][SOLVED : SOLVED + COMPARED]
    unpruned = embedded(model, compared)
    for gone in missing:
        net = pruned_encoder(model, 1.0 - gone / width, patches["train"], seed) if gone else model
        gallery = embedded(net, patches["train"])
        record: Record = {"key": [seed, gone], "ratio": gone / width}
        record["scores"] = scores(unpruned, embedded(net, compared)) if gone else dict.fromkeys(SCORES, 0.0)
        for name in ("validation", "test"):
            queries = embedded(net, patches[name])
            record[name] = neighbour_accuracy(queries, labels[name], gallery, labels["train"])
        append_record(path, record)
        print(*record["key"], record["scores"], f"{100 * record['test']:.1f} %", flush=True)


def scores(before: Tensor, after: Tensor) -> dict[str, float]:
    """Return how far outputs (n, features), scaled to length one, are from those before, by each score."""
    one, other = normalize(before.double()), normalize(after.double())
    distances = [nni_topo.topology.pairwise_distances(each.numpy()) for each in (one, other)]
    return {
        RTD_LITE: rtd_lite(*distances) / len(one),
        SQUARES: float((one - other).square().sum(1).mean()),
        CKA: 1.0 - linear_cka(one, other),
    }


def linear_cka(one: Tensor, other: Tensor) -> float:
    """Return the linear centred kernel alignment of two sets of features (n, features) and (n, other features).

    S. Kornblith et al., "Similarity of neural network representations revisited", https://arxiv.org/abs/1905.00414.
    """
    one, other = one - one.mean(0), other - other.mean(0)
    if one.shape[1] > len(one):  # the same from Gram matrices, which are smaller
        first, second = one @ one.T, other @ other.T
        return float((first * second).sum() / (first.norm() * second.norm()))
    across = (other.T @ one).square().sum()
    return float(across / ((one.T @ one).norm() * (other.T @ other).norm()))


RTD_LITE, SQUARES, CKA = "RTD-Lite", "squared distance", "CKA"
SCORES = (RTD_LITE, SQUARES, CKA)
KNEE, THRESHOLD = "knee", "threshold"
RULES = (KNEE, THRESHOLD)
CONSTANT = "mean ratio of exploration"


def curves(records: list[Record], seeds: range, measure: str) -> dict[int, Curve]:
    """Return by seed the ratios, rising, and at each what a score is, or by how much an accuracy has fallen."""
    found: dict[int, Curve] = {}
    for seed in seeds:
        mine = sorted((record for record in records if record["key"][0] == seed), key=lambda each: each["ratio"])
        if mine:
            if measure in mine[0]["scores"]:
                values = [record["scores"][measure] for record in mine]
            else:
                values = [mine[0][measure] - record[measure] for record in mine]
            found[seed] = [record["ratio"] for record in mine], values
    return found


def crossing(curve: Curve, level: float) -> float:
    """Return the first ratio at which a curve reaches a level, between two ratios in proportion; 1 if it never does."""
    ratios, values = curve
    for place, value in enumerate(values):
        if value >= level:
            if not place:
                return ratios[0]
            before = values[place - 1]
            share = (level - before) / (value - before)
            return ratios[place - 1] + share * (ratios[place] - ratios[place - 1])
    return 1.0


def knee_of(curve: Curve) -> float:
    """Return the ratio at the knee of a curve; 1 if it has none."""
    ratios, values = curve
    found = knee([1.0 - ratio for ratio in ratios], values)
    return 1.0 if found is None else ratios[found]


def threshold(found: dict[int, Curve], true: dict[int, float]) -> float:
    """Return the level, among the values of some curves, whose crossings have the lowest mean error."""
    levels = sorted({value for _, values in found.values() for value in values if value > 0.0})
    errors = [float(np.mean([abs(crossing(found[seed], level) - true[seed]) for seed in found])) for level in levels]
    return levels[int(np.argmin(errors))]


def predictions(records: list[Record], seeds: range, scores_of: Sequence[str] = SCORES) -> dict[str, dict[int, float]]:
    """Return the predicted ratio by method, then by seed; what is chosen is chosen on the networks of exploration."""
    true = true_ratios(records, EXPLORATION, "validation")
    found: dict[str, dict[int, float]] = {}
    for score in scores_of:
        mine = curves(records, seeds, score)
        level = threshold(curves(records, EXPLORATION, score), true)
        found[f"{score}, {KNEE}"] = {seed: knee_of(curve) for seed, curve in mine.items()}
        found[f"{score}, {THRESHOLD}"] = {seed: crossing(curve, level) for seed, curve in mine.items()}
    found[CONSTANT] = dict.fromkeys(curves(records, seeds, SQUARES), float(np.mean(list(true.values()))))
    return found


def true_ratios(records: list[Record], seeds: range, measure: str) -> dict[int, float]:
    """Return by seed the ratio at which a network breaks."""
    return {seed: crossing(curve, FALL) for seed, curve in curves(records, seeds, measure).items()}


def errors(
    records: list[Record], seeds: range, measure: str, scores_of: Sequence[str] = SCORES
) -> dict[str, dict[int, float]]:
    """Return the distances of predicted ratios from the true ones by method, then by seed."""
    true = true_ratios(records, seeds, measure)
    found = predictions(records, seeds, scores_of)
    return {method: {seed: abs(at - true[seed]) for seed, at in by_seed.items()} for method, by_seed in found.items()}


def lowest(methods: Sequence[str], explored: Mapping[str, Mapping[Any, float]]) -> str:
    """Return the method with the lowest mean error over the networks of exploration; of equal ones the first."""
    return min(methods, key=lambda method: float(np.mean(list(explored[method].values()))))


def tables(records: list[Record]) -> str:
    """Return Markdown: the ratios at which encoders break, mean errors, and the difference that is asked for."""
    sets = [("exploration", EXPLORATION), ("confirmation", CONFIRMATION)]
    sets = [(name, seeds) for name, seeds in sets if curves(records, seeds, SQUARES)]
    if not sets:
        return ""
    broken = ["unpruned accuracy by neighbours, %", "ratio at which it has fallen by 5 points, %"]
    rows = [[each] for each in broken]
    for _, seeds in sets:
        unpruned = [record["test"] for record in records if record["key"][0] in seeds and not record["key"][1]]
        rows[0].append(interval(unpruned).show(100))
        rows[1].append(interval(list(true_ratios(records, seeds, "test").values())).show(100))
    found = [errors(records, seeds, "test") for _, seeds in sets]
    lines = [[method, *(interval(list(each[method].values())).show(100) for each in found)] for method in found[0]]
    counts = [f"{name}, {len(each[CONSTANT])} encoders" for (name, _), each in zip(sets, found, strict=True)]
    blocks = ["**Where encoders break**", markdown_table(["", *counts], rows)]
    blocks += ["**Mean error of the predicted ratio, points**", markdown_table(["method", *counts], lines)]
    if len(sets) == 2 and len(found[1][CONSTANT]) > 1:
        blocks += outcome(found[1], errors(records, EXPLORATION, "validation"))
    return "\n\n".join(blocks)


def outcome(fresh: dict[str, dict[int, float]], explored: dict[str, dict[int, float]]) -> list[str]:
    """Return the table of differences between the rule for RTD-Lite and each other method on the fresh encoders."""
    ours, cka = (lowest([f"{score}, {rule}" for rule in RULES], explored) for score in (RTD_LITE, CKA))
    best = lowest([f"{SQUARES}, {KNEE}", cka], explored)
    rows = difference_rows(ours, best, fresh)
    title = f"**Differences of the error on {len(fresh[ours])} fresh encoders**"
    return [title, markdown_table([f"{ours} against", "difference, points", "p"], rows)]


def difference_rows(ours: str, best: str, fresh: Mapping[str, Mapping[int, float]]) -> list[list[str]]:
    """Return rows of the difference between a method's error and that of each without RTD-Lite, the best one first."""
    rows = []
    for method in sorted((name for name in fresh if not name.startswith(RTD_LITE)), key=lambda name: name != best):
        label = f"{method} (best baseline)" if method == best else method
        rows.append([label, *difference_row(fresh[ours], fresh[method])])
    return rows


if __name__ == "__main__":
    main()
