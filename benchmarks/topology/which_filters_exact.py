"""T6b of HYPOTHESES.md: the filters of T6 by exact search instead of backward elimination, and on MobileNets.

    PYTHONPATH=benchmarks python benchmarks/topology/which_filters_exact.py --images runs/fresh/images.npz \
        --out runs/topology

Trains the networks of T6 and the MobileNets of T1, keeps the filters whose cloud of contributions has the largest
magnitude, by enumeration where a layer has few subsets, else by exchanges until none helps, recalibrates the batch
norms, and writes a line per network, share and criterion to ``which_filters_exact.jsonl``. The same command goes on
where it was stopped. ``images.npz`` is made by ``benchmarks/fresh_networks/split.py``.

    PYTHONPATH=benchmarks python benchmarks/topology/which_filters_exact.py --out benchmarks/records/topology \
        --into benchmarks/results/topology.md

writes the tables of the records into a page, between the two comments that name this file.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from itertools import combinations, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from metric_magnitude import magnitude_subset
from numpy.typing import NDArray
from registered import CONFIRMATION, EXPLORATION, benchmark, best_of, difference_row
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from which_filters import BASELINES, IMAGES, SHARES, cloud_distances, contributions, pruner_masks
from which_filters import trained as four_trained
from which_images import NETWORKS

import nni_topo
from nni_topo import zoo
from nni_topo.runs.choices import DataChoice
from nni_topo.runs.run import trained as trained_by_recipe
from nni_topo.studies.records import append_record, read_records
from nni_topo.studies.tables import markdown_table, show_accuracies

SOURCE = "benchmarks/topology/which_filters_exact.py"  # as the comments around a page's tables say
FOUR, MOBILE = "four convolutions", "MobileNetV2, small"
KINDS = (MOBILE, FOUR)
SCALE = 0.5  # over the median distance: chosen by the exploration of T6
SUBSETS = 200_000  # at most so many of a layer are enumerated
BATCH = 20_000
TESTED = 2_500  # of the test images
EXACT, GREEDY = "magnitude, exact search", "magnitude, backward elimination"
EXCHANGED = "least squares with exchanges"
ALL_BASELINES = (*BASELINES, EXCHANGED)
ROWS = (EXACT, GREEDY, *ALL_BASELINES)

Record = dict[str, Any]
FloatArray = NDArray[np.float64]
IntArray = NDArray[np.intp]


def main() -> None:
    """Parse the command line; run what is missing and print the tables."""
    benchmark(__doc__, SOURCE, tables, measure)


def measure(images: Path, out: Path, path: Path) -> None:
    """Measure the networks that aren't there yet, the kind that T6 didn't look at first."""
    data = zoo.load_data(str(images), limit=5_000)
    for kind in KINDS:
        for seed in (*EXPLORATION, *CONFIRMATION):
            run(kind, seed, data, images, out, path)


def run(kind: str, seed: int, data: zoo.DataBundle, images: Path, out: Path, path: Path) -> None:
    """Measure every criterion on the network of a kind and a seed, and keep what isn't there yet."""
    known = {tuple(record["key"]) for record in read_records(path)}
    missing = [(share, row) for share in SHARES for row in ROWS if (kind, seed, share, row) not in known]
    if not missing:
        return
    if kind == FOUR:
        model = four_trained(seed, data, out)
    else:
        choice, recipe = NETWORKS[MOBILE]
        given = DataChoice(str(images), limit=5_000)
        model = trained_by_recipe(choice, given, recipe=recipe, folder=out / "checkpoints", seed=seed).net.eval()
    pairs = pruned_and_readers(model)
    calibration = data.train.tensors[0][:IMAGES]
    test = TensorDataset(*data.test[:TESTED])
    unpruned = zoo.evaluate(model, test)
    readers = [model.get_submodule(reader) for _, reader in pairs]
    distances = [cloud_distances(gram) for gram in contributions(model, calibration, readers)]
    for share, row in missing:
        record: Record = {"key": [kind, seed, share, row], "unpruned": unpruned}
        if row in (EXACT, GREEDY):
            masks, record["layers"] = magnitude_masks(row, share, model, pairs, distances)
        else:
            names = [name for name, _ in pairs]
            swaps = {"swaps": 10_000} if row == EXCHANGED else {}
            masks = pruner_masks(row, share, model, names, calibration, seed, **swaps)
        dense = nni_topo.to_dense(model, calibration[:2], masks)
        dense = nni_topo.recalibrate_batch_norm(dense, list(calibration.split(128)))
        record["test"] = zoo.evaluate(dense, test)
        if seed in EXPLORATION:
            record["validation"] = zoo.evaluate(dense, data.validation)
        append_record(path, record)
        print(*record["key"], f"{100 * record['test']:.1f} %", flush=True)


def pruned_and_readers(model: nn.Module) -> list[tuple[str, str]]:
    """Return the layers whose filters are removed, each with the layer that reads what they give.

    Of a MobileNet those are the expansions, whose filters a depth-wise convolution has between them and the projection
    that reads them, and the last convolution. What residual connections couple stays.
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    dense = [(name, layer) for name, layer in layers if getattr(layer, "groups", 1) == 1]
    depthwise_after = {before for (before, _), (_, after) in pairwise(layers) if getattr(after, "groups", 1) > 1}
    pairs = []
    for (name, _), (reader, following) in pairwise(dense):
        if not depthwise_after or name in depthwise_after or isinstance(following, nn.Linear):
            pairs.append((name, reader))
    return pairs


def magnitude_masks(
    row: str, share: float, model: nn.Module, pairs: list[tuple[str, str]], distances: list[FloatArray]
) -> tuple[dict[str, dict[str, Tensor]], list[list[float]]]:
    """Return masks that keep a share of each layer's filters, and of each the magnitude and if it was enumerated."""
    masks, found = {}, []
    for (name, _), matrix in zip(pairs, distances, strict=True):
        weight = model.get_submodule(name).weight
        keep = round(share * len(weight))
        median = float(np.median(matrix[np.triu_indices(len(matrix), 1)]))
        similarities = np.exp(-SCALE / median * matrix)
        kept = magnitude_subset(matrix, keep + 1, SCALE / median, base=0)
        enumerated = row == EXACT and math.comb(len(weight), keep) <= SUBSETS
        if enumerated:
            kept = largest_by_enumeration(similarities, keep)
        elif row == EXACT:
            kept = largest_by_exchange(similarities, kept)
        mask = torch.zeros_like(weight)
        mask[torch.from_numpy(kept[1:] - 1)] = 1.0
        masks[name] = {"weight": mask}
        found.append([magnitude_of(similarities, kept), float(enumerated)])
    return masks, found


def magnitude_of(similarities: FloatArray, kept: IntArray) -> float:
    """Return the magnitude of a subset of points."""
    return float(np.linalg.solve(similarities[np.ix_(kept, kept)], np.ones(len(kept))).sum())


def largest_by_enumeration(similarities: FloatArray, keep: int) -> IntArray:
    """Return point 0 and those others with which it has the largest magnitude, of all subsets of this size."""
    best, largest = np.empty(0, np.intp), -np.inf
    for subsets in batches(combinations(range(1, len(similarities)), keep)):
        index = np.concatenate([np.zeros((len(subsets), 1), np.intp), subsets], 1)
        matrices = similarities[index[:, :, None], index[:, None, :]]
        magnitudes = np.linalg.solve(matrices, np.ones((*index.shape, 1))).sum((1, 2))
        place = int(magnitudes.argmax())
        if magnitudes[place] > largest:
            best, largest = index[place], magnitudes[place]
    return best


def batches(subsets: Iterator[tuple[int, ...]]) -> Iterator[IntArray]:
    """Yield subsets (at most ``BATCH``, points)."""
    while found := list(islice(subsets, BATCH)):
        yield np.array(found, np.intp)


def largest_by_exchange(similarities: FloatArray, start: IntArray) -> IntArray:
    """Return points of which none can be exchanged for another so that the magnitude grows; the first one stays.

    The exchange that adds most is made, again and again. Without a point of weight w the magnitude is less by w^2 over
    the point's entry on the diagonal of the inverse similarities; another point, whose similarities to the kept ones
    are z, adds (1 - z inverse 1)^2 / (1 - z inverse z).
    """
    kept = np.array(start)
    while True:
        others = np.setdiff1d(np.arange(len(similarities)), kept)
        inverse = np.linalg.inv(similarities[np.ix_(kept, kept)])
        weights = inverse.sum(1)
        between = similarities[np.ix_(kept, others)]
        solved = inverse @ between
        residues = 1.0 - weights @ between
        heights = 1.0 - (between * solved).sum(0)
        diagonal = inverse.diagonal()
        lost = weights**2 / diagonal
        # with the inverse after the removal of kept[i], for all i at once: z stays without its entry i
        residues_without = residues[None, :] + weights[:, None] / diagonal[:, None] * solved
        heights_without = heights[None, :] + solved**2 / diagonal[:, None]
        gains = residues_without**2 / heights_without - lost[:, None]
        gains[0] = -np.inf
        leaving, coming = np.unravel_index(int(gains.argmax()), gains.shape)
        if gains[leaving, coming] <= 1e-9 * weights.sum():
            return np.concatenate([kept[:1], np.sort(kept[1:])])
        kept[leaving] = others[coming]


def figures(records: list[Record], kind: str, seeds: range, share: float, measure: str) -> dict[str, dict[int, float]]:
    """Return accuracies by criterion, then by seed."""
    found: dict[str, dict[int, float]] = {}
    for record in records:
        kind_of, seed, share_of, row = record["key"]
        if kind_of == kind and seed in seeds and share_of == share:
            found.setdefault(row, {})[seed] = record[measure]
    return found


def tables(records: list[Record]) -> str:
    """Return Markdown: exploration, confirmation, what the search gains, and the differences that decide.

    A network counts if it was measured with every criterion and share.
    """
    measured = Counter(tuple(record["key"][:2]) for record in records)
    records = [record for record in records if measured[tuple(record["key"][:2])] == len(ROWS) * len(SHARES)]
    blocks = []
    for title, seeds in (("Exploration", EXPLORATION), ("Confirmation", CONFIRMATION)):
        for kind in KINDS:
            mine = {r["key"][1]: r["unpruned"] for r in records if r["key"][0] == kind and r["key"][1] in seeds}
            if not mine:
                continue
            rows = [["unpruned", *[show_accuracies(list(mine.values()))] * len(SHARES)]]
            found = [figures(records, kind, seeds, share, "test") for share in SHARES]
            rows += [[row, *(show_accuracies(list(by_row[row].values())) for by_row in found)] for row in ROWS]
            head = ["criterion", *(f"{100 * share:g} % of every layer kept, %" for share in SHARES)]
            blocks += [f"**{title}: {kind}, {len(mine)} networks**", markdown_table(head, rows)]
    blocks += outcome(records)
    return "\n\n".join(blocks)


def searched(records: list[Record], kind: str, share: float) -> str:
    """Return in how many layers exact search finds a larger magnitude than backward elimination, and by how much."""
    by_row: dict[str, dict[int, list[list[float]]]] = {EXACT: {}, GREEDY: {}}
    for record in records:
        kind_of, seed, share_of, row = record["key"]
        if row in by_row and kind_of == kind and share_of == share:
            by_row[row][seed] = record["layers"]
    gains, layers, enumerated = [], 0, 0
    for seed, exact in by_row[EXACT].items():
        for (ours, was_enumerated), (theirs, _) in zip(exact, by_row[GREEDY][seed], strict=True):
            layers += 1
            enumerated += int(was_enumerated)
            gains.append(ours / theirs - 1.0)
    larger = sum(gain > 1e-9 for gain in gains)
    return f"{larger} of {layers} ({enumerated} enumerated) | {100 * np.mean(gains):.3f} | {100 * max(gains):.3f}"


def outcome(records: list[Record]) -> list[str]:
    """Return what the search gains, and the differences from the baselines and backward elimination."""
    rows, gained = [], []
    for kind in KINDS:
        for share in SHARES:
            fresh = figures(records, kind, CONFIRMATION, share, "test")
            explored = figures(records, kind, EXPLORATION, share, "validation")
            if len(fresh.get(EXACT, {})) < 2 or not explored:
                continue
            gained.append([kind, f"{100 * share:g} %", *searched(records, kind, share).split(" | ")])
            best = best_of(ALL_BASELINES, explored)
            for baseline in (*sorted(ALL_BASELINES, key=lambda row: row != best), GREEDY):
                label = f"{baseline} (best baseline)" if baseline == best else baseline
                row = difference_row(fresh[EXACT], fresh[baseline])
                rows.append([f"{kind}, {len(fresh[EXACT])} networks", f"{100 * share:g} %", label, *row])
    if not rows:
        return []
    found = ["network", "kept", "layers with a larger magnitude", "mean gain, %", "largest gain, %"]
    head = ["network", "kept", f"{EXACT}, against", "difference, points", "p"]
    return [
        "**What exact search finds beyond backward elimination, all networks**",
        markdown_table(found, gained, text_columns=3),
        "**Differences on fresh networks**",
        markdown_table(head, rows, text_columns=3),
    ]


if __name__ == "__main__":
    main()
