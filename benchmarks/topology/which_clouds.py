"""T7 of HYPOTHESES.md: the functional cloud against the best baseline, on fresh networks and fresh test splits.

    PYTHONPATH=benchmarks python benchmarks/topology/which_clouds.py --images runs/fresh/images.npz --out runs/topology

Trains networks of four kinds, each on a split of its own, removes three quarters of every layer's channels by each row,
reconstructs the weights (``compensate``), and writes a line per network and row to ``which_clouds.jsonl``. The same
command goes on where it was stopped. ``images.npz`` is made by ``benchmarks/fresh_networks/split.py``.

    PYTHONPATH=benchmarks python benchmarks/topology/which_clouds.py --out benchmarks/records/topology \
        --into benchmarks/results/topology.md

writes the tables of the records into a page, between the two comments that name this file.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from sklearn.datasets import load_digits

from benchmarks.tables import holm, outcome
from benchmarks.topology.registered import benchmark
from nni_topo import zoo
from nni_topo.runs.choices import CompensationChoice, DataChoice, ModelChoice, PrunerChoice, Target
from nni_topo.runs.pipeline import Pipeline
from nni_topo.runs.provenance import provenance
from nni_topo.runs.run import Start, made_dense, prune_to_ratios, retrain, trained
from nni_topo.runs.widths import layer_ratios
from nni_topo.studies.baselines import baseline_masks, is_baseline
from nni_topo.studies.records import append_record, read_records
from nni_topo.studies.tables import Interval, interval, markdown_table, show_accuracies
from nni_topo.zoo.sources import class_rank, split_off_test

SOURCE = "benchmarks/topology/which_clouds.py"  # as the comments around a page's tables say
SEEDS = range(400, 415)
RATIO = 0.75  # of every layer, removed
CLASSES = 10
TRAIN, VALIDATION, TEST = 5_000, 1_000, 5_000  # images of Fashion-MNIST

Record = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """A kind of networks: the model, how it is trained, and how many unlabelled images a pruner sees."""

    model: ModelChoice
    recipe: zoo.Recipe
    images: int = 1_024
    is_primary: bool = False  # T7 is decided on it, and the cloud's parts are changed on it
    fine_tuned: int = 0  # epochs with labels


DIGITS = "small CNN, digits"
_RESNET20 = replace(zoo.default_recipe("resnet20", "fashion-mnist"), epochs=10)
KINDS = {
    DIGITS: Kind(ModelChoice("small_cnn"), zoo.default_recipe("small_cnn", "digits"), 512, True, 2),
    "ResNet-20": Kind(ModelChoice("resnet20"), _RESNET20, is_primary=True),
    "LeNet-5-like": Kind(ModelChoice("lenet5_like"), zoo.Recipe(epochs=6)),
    "MobileNetV2, small": Kind(ModelChoice("benchmarks.recovery_nets:mobilenet_like"), zoo.Recipe(epochs=10, lr=0.1)),
}
BASELINES = ("random", "l1", "l2", "fpgm", "torch-pruning")
OURS, SQUARES = "functional cloud", "least squares"


def _genetic(**knobs: Any) -> PrunerChoice:
    return PrunerChoice("topological", knobs={**knobs, "solver": "genetic"})


CRITERIA = {OURS: PrunerChoice("topological"), SQUARES: PrunerChoice("reconstruction")}
VARIANTS = {
    "no origin": PrunerChoice("topological", knobs={"cloud": {"kind": "functional", "origin": False}}),
    "no readers": PrunerChoice("clouds:UnweightedPruner"),
    "Hausdorff, searched": _genetic(criterion="hausdorff"),
    "mean distance, searched": _genetic(criterion="cover"),
    "diagrams, H0": _genetic(criterion="wasserstein"),
    "diagrams, H0 and H1": _genetic(criterion="bottleneck_sum", homology_dimensions=(0, 1)),
    "k-means": PrunerChoice("clouds:MeansPruner"),
    "largest": PrunerChoice("clouds:LargestPruner"),
}
"""The functional cloud with one part changed."""


def main() -> None:
    """Parse the command line; run what is missing and print the tables."""
    benchmark(__doc__, SOURCE, tables, measure)


def measure(images: Path, out: Path, path: Path) -> None:
    """Measure every row on the networks that aren't there yet: the cells that decide, then the cloud's parts."""
    for name, kind in KINDS.items():
        for rows in ((*BASELINES, *CRITERIA), VARIANTS if kind.is_primary else ()):
            for seed in SEEDS:
                run(name, seed, rows, images, out, path)


def run(name: str, seed: int, rows: Any, images: Path, out: Path, path: Path) -> None:
    """Measure rows on the network of a kind and a seed, and keep what isn't there yet."""
    known = {tuple(record["key"]) for record in read_records(path)}
    missing = [row for row in rows if (name, seed, row) not in known]
    if not missing:
        return
    kind = KINDS[name]
    file = split_of(name, seed, images, out)
    data = DataChoice(str(file), limit=None if name == DIGITS else TRAIN)
    start = trained(kind.model, data, recipe=kind.recipe, folder=out / "checkpoints", seed=seed)
    for row in missing:
        began = time.process_time()
        pruned = selected(row, kind, start)
        selecting = time.process_time() - began
        dense, _ = made_dense(start, pruned.masks, CompensationChoice(kind.images), progress=False)
        record = {
            "key": [name, seed, row],
            "unpruned": start.accuracy,
            "validation": start.validated(dense),
            "test": start.tested(dense),
            "select_cpu_seconds": selecting,
            "reconstruct_cpu_seconds": time.process_time() - began - selecting,
            "revision": provenance()["revision"],
            "torch": provenance()["versions"]["torch"],
        }
        if kind.fine_tuned and row not in VARIANTS:
            retrain(dense, start.data, kind.recipe.for_retraining(kind.fine_tuned), seed=seed, progress=False)
            record |= {"validation_fine_tuned": start.validated(dense), "test_fine_tuned": start.tested(dense)}
        append_record(path, record)
        print(*record["key"], f"{100 * record['test']:.1f} %", flush=True)


def selected(row: str, kind: Kind, start: Start) -> Pipeline:
    """Return the masks of a row."""
    target = Target("ratio", RATIO)
    ratios = layer_ratios(start.net, start.example, target)
    if is_baseline(row):
        masks, seconds = baseline_masks(row, start.analysis, ratios)
        return Pipeline(start.analysis, masks=masks, seconds=seconds)
    if row in BASELINES:
        return prune_to_ratios(start, PrunerChoice(row), target, ratios)
    choice = replace({**CRITERIA, **VARIANTS}[row], calibration=kind.images)
    return prune_to_ratios(start, choice, target, ratios)


def split_of(name: str, seed: int, images: Path, out: Path) -> Path:
    """Return the file of a seed's own split, and make it where it isn't there."""
    path = out / "splits" / f"{'digits' if name == DIGITS else 'fashion'}-{seed}.npz"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    if name == DIGITS:
        pixels, labels = load_digits(return_X_y=True)
        digits = (pixels / 16.0).astype(np.float32).reshape(-1, 1, 8, 8)
        raw = split_off_test(digits, labels.astype(np.int64), tuple("0123456789"), seed)
        arrays = raw.train_images, raw.train_labels, raw.test_images, raw.test_labels
    else:
        with np.load(images) as file:
            pixels = np.concatenate([file["x_train"], file["x_test"]])
            labels = np.concatenate([file["y_train"], file["y_test"]])
        generator = np.random.default_rng(seed)
        rank = class_rank(labels, generator)
        # `load_data` takes a tenth for validation and trains on so many of the others.
        ends = TEST // CLASSES, (TEST + 10 * VALIDATION) // CLASSES
        test = generator.permutation(np.flatnonzero(rank < ends[0]))
        train = generator.permutation(np.flatnonzero((rank >= ends[0]) & (rank < ends[1])))
        arrays = pixels[train], labels[train], pixels[test], labels[test]
    unfinished = path.with_suffix(".part.npz")
    np.savez(unfinished, **dict(zip(("x_train", "y_train", "x_test", "y_test"), arrays, strict=True)))
    unfinished.rename(path)
    return path


def figures(records: list[Record], name: str, measure: str) -> dict[str, dict[int, float]]:
    """Return an accuracy of a kind of networks by row, then by seed, of the rows that all fifteen networks have."""
    found: dict[str, dict[int, float]] = {}
    for record in records:
        kind, seed, row = record["key"]
        if kind == name and measure in record:
            found.setdefault(row, {})[seed] = record[measure]
    return {row: by_seed for row, by_seed in found.items() if by_seed.keys() == set(SEEDS)}


def best_baseline(records: list[Record], name: str, measure: str = "validation") -> str | None:
    """Return the baseline with the highest mean accuracy on validation images; None while one isn't complete."""
    found = figures(records, name, measure)
    if not found.keys() >= {*BASELINES, *CRITERIA}:
        return None
    return max(BASELINES, key=lambda row: float(np.mean(list(found[row].values()))))


def compared(ours: Mapping[int, float], theirs: Mapping[int, float]) -> tuple[Interval, float]:
    """Return the mean paired difference in points with its interval, and the p-value."""
    gains = [100.0 * (ours[seed] - theirs[seed]) for seed in SEEDS]
    # Equal networks have no spread, and no test says anything of them.
    p = float(stats.ttest_1samp(gains, 0.0).pvalue) if np.ptp(gains) > 0 else 1.0
    return interval(gains), p


def tables(records: list[Record]) -> str:
    """Return Markdown: how much was run, the cells that decide, fine-tuning, the cloud's parts, and all rows."""
    blocks = ["**How much was run**", markdown_table(["network", "rows", "of"], progress(records), text_columns=1)]
    best = {name: best_baseline(records, name) for name in KINDS}
    done = [name for name in KINDS if best[name] is not None]
    if not done:
        return "\n\n".join(blocks)
    for title, theirs in (("the best baseline", best), ("least squares", dict.fromkeys(KINDS, SQUARES))):
        blocks += [f"**The functional cloud against {title}**", cells(records, done, theirs)]
    for name in done:
        if KINDS[name].fine_tuned:
            blocks += [f"**{name}: after {KINDS[name].fine_tuned} epochs of fine-tuning**", fine_tuning(records, name)]
        parts = figures(records, name, "test")
        if parts.keys() >= VARIANTS.keys():
            blocks += [f"**{name}: the cloud's parts**", changed_parts(parts)]
        title = f"**{name}: differences from each baseline, points, not corrected**"
        blocks += [title, markdown_table(["baseline", *CRITERIA], from_baselines(parts))]
        unpruned = {record["key"][1]: record["unpruned"] for record in records if record["key"][0] == name}
        lines = [[row, show_accuracies(list(by_seed.values()))] for row, by_seed in parts.items()]
        title = f"**{name}: all rows, {len(SEEDS)} networks, unpruned {show_accuracies(list(unpruned.values()))} %**"
        blocks += [title, markdown_table(["row", "after weight reconstruction %"], lines)]
    return "\n\n".join(blocks)


def progress(records: list[Record]) -> list[list[str]]:
    """Return by kind how many rows of networks are there, and how many belong to it."""
    lines = []
    for name, kind in KINDS.items():
        rows = len(BASELINES) + len(CRITERIA) + (len(VARIANTS) if kind.is_primary else 0)
        there = sum(record["key"][0] == name for record in records)
        lines.append([name, str(there), str(rows * len(SEEDS))])
    return lines


def cells(records: list[Record], done: list[str], theirs: Mapping[str, str | None]) -> str:
    """Return the table of the functional cloud against a row of each kind; kinds that aren't complete count as 1."""
    found = {}
    for name in done:
        tested = figures(records, name, "test")
        found[name] = compared(tested[OURS], tested[str(theirs[name])])
    corrected = dict(zip(KINDS, holm([found[name][1] if name in found else 1.0 for name in KINDS]), strict=True))
    lines = []
    for name, (points, p) in found.items():
        cell = [name, "yes" if KINDS[name].is_primary else "no", str(theirs[name]), outcome(points, corrected[name])]
        lines.append([*cell, points.show(sign=True), f"{p:.2g}", f"{corrected[name]:.2g}"])
    head = ["network", "primary", "against", "outcome", "difference, points", "p", "p by Holm"]
    return markdown_table(head, lines, text_columns=4)


def fine_tuning(records: list[Record], name: str) -> str:
    """Return the table of both criteria against the best baseline after fine-tuning."""
    tested = figures(records, name, "test_fine_tuned")
    best = str(best_baseline(records, name, "validation_fine_tuned"))
    lines = []
    for row in CRITERIA:
        points, p = compared(tested[row], tested[best])
        accuracies = [show_accuracies(list(tested[name].values())) for name in (row, best)]
        lines.append([row, best, *accuracies, points.show(sign=True), f"{p:.2g}"])
    head = ["criterion", "best baseline", "criterion %", "baseline %", "difference, points", "p, not corrected"]
    return markdown_table(head, lines, text_columns=2)


def from_baselines(tested: dict[str, dict[int, float]]) -> list[list[str]]:
    """Return the lines of a table: both criteria's differences from each baseline."""
    return [[row, *(compared(tested[own], tested[row])[0].show(sign=True) for own in CRITERIA)] for row in BASELINES]


def changed_parts(tested: dict[str, dict[int, float]]) -> str:
    """Return the table of the cloud with one part changed, against the default."""
    found = {row: compared(tested[row], tested[OURS]) for row in VARIANTS}
    lines = []
    for (row, (points, p)), corrected in zip(found.items(), holm([p for _, p in found.values()]), strict=True):
        word = outcome(points, corrected, "ahead", "behind")
        lines.append([row, word, points.show(sign=True), f"{p:.2g}", f"{corrected:.2g}"])
    return markdown_table(["row", "against the default", "difference, points", "p", "p by Holm"], lines, text_columns=2)


if __name__ == "__main__":
    main()
