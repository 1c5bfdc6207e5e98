"""T4b of HYPOTHESES.md: at which ratio a segmenter or a detector breaks, told from its outputs alone.

    python benchmarks/topology/which_ratio_scenes.py --images runs/fresh/images.npz --out runs/topology

Trains networks on scenes of garments, removes more and more filters of every convolution by L1, reconstructs the
weights (``compensate``), compares the outputs with the unpruned network's, and writes a line per network and ratio to
``which_ratio_scenes.jsonl``. The same command goes on where it was stopped. ``images.npz`` is made by
``benchmarks/fresh_networks/split.py``.

    python benchmarks/topology/which_ratio_scenes.py --out benchmarks/records/topology \
        --into benchmarks/results/topology.md

writes the tables of the records into a page, between the two comments that name this file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import which_ratio
from registered import CONFIRMATION, EXPLORATION, benchmark
from scenes import DETECTOR, KINDS, SEGMENTER, Scenes, composed, outputs_for, quality, trained_on_scenes, width_of
from torch import Tensor, nn
from which_filters import pruner_masks
from which_ratio import (
    CKA,
    CONSTANT,
    KNEE,
    RTD_LITE,
    RULES,
    SCORES,
    SQUARES,
    difference_rows,
    errors,
    lowest,
    true_ratios,
)

import nni_topo
from nni_topo import zoo
from nni_topo.studies.records import append_record, read_records
from nni_topo.studies.tables import interval, markdown_table

SOURCE = "benchmarks/topology/which_ratio_scenes.py"  # as the comments around a page's tables say
TRAINED, VALIDATED, TESTED = 3_000, 500, 1_000  # scenes
SOLVED, COMPARED = 256, 512  # unlabelled scenes for weight reconstruction, and whose outputs are compared
FLAT, AVERAGED = "", ", averaged over places"
CLOUDS = (FLAT, AVERAGED)
COMPARISONS = tuple(f"{score}{cloud}" for score in SCORES for cloud in CLOUDS)
MEASURES = {SEGMENTER: "mean intersection over union", DETECTOR: "mean average precision"}

Record = dict[str, Any]


def main() -> None:
    """Parse the command line; run what is missing and print the tables."""
    benchmark(__doc__, SOURCE, tables, measure)


def measure(images: Path, out: Path, path: Path) -> None:
    """Measure the networks that aren't there yet."""
    data = zoo.load_data(str(images), limit=5_000)
    scenes = {
        "train": composed(*data.train.tensors, TRAINED, seed=0),
        "unlabelled": composed(*data.train.tensors, SOLVED + COMPARED, seed=1),
        "validation": composed(*data.validation.tensors, VALIDATED, seed=2),
        "test": composed(*data.test.tensors, TESTED, seed=3),
    }
    for seed in (*EXPLORATION, *CONFIRMATION):
        for kind in KINDS:
            run(kind, seed, scenes, out, path)


def run(kind: str, seed: int, scenes: dict[str, Scenes], out: Path, path: Path) -> None:
    """Measure the network of a kind and a seed at the ratios that aren't there yet."""
    known = {tuple(record["key"]) for record in read_records(path)}
    width = width_of(seed)
    missing = [gone for gone in range(width) if (kind, seed, gone) not in known]
    if not missing:
        return
    model = trained_on_scenes(kind, seed, scenes["train"], out)
    solved, compared = scenes["unlabelled"].images.split([SOLVED, COMPARED])
    unpruned = outputs_for(model, compared)
    for gone in missing:
        net = pruned(model, 1.0 - gone / width, solved, seed) if gone else model
        record: Record = {"key": [kind, seed, gone], "ratio": gone / width}
        record["scores"] = scores(unpruned, outputs_for(net, compared)) if gone else dict.fromkeys(COMPARISONS, 0.0)
        for name in ("validation", "test"):
            record[name] = quality(kind, outputs_for(net, scenes[name].images), scenes[name])
        append_record(path, record)
        print(*record["key"], f"{100 * record['test']:.1f} %", flush=True)


def pruned(model: nn.Module, share: float, images: Tensor, seed: int) -> nn.Module:
    """Keep a share of the filters of every convolution but the head by L1, and reconstruct the weights."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d) and name != "head"]
    masks = pruner_masks("l1", share, model, names, images[:2], seed)
    solved = nni_topo.compensate(model, masks, [images], progress=False)
    return nni_topo.to_dense(solved, images[:2], masks)


def scores(before: Tensor, after: Tensor) -> dict[str, float]:
    """Return how far outputs (n, channels, h, w) are from those before, by each score and cloud of scenes."""
    flat = which_ratio.scores(before.flatten(1), after.flatten(1))
    averaged = which_ratio.scores(before.mean((2, 3)), after.mean((2, 3)))
    return flat | {f"{score}{AVERAGED}": value for score, value in averaged.items()}


def of_kind(records: list[Record], kind: str) -> list[Record]:
    """Return the records of a kind's networks that were measured at all ratios, without the kind in their keys."""
    mine = [{**record, "key": record["key"][1:]} for record in records if record["key"][0] == kind]
    seeds = [record["key"][0] for record in mine]
    return [record for record in mine if seeds.count(record["key"][0]) == width_of(record["key"][0])]


def methods(scores_of: tuple[str, ...], rules: tuple[str, ...]) -> list[str]:
    """Return the names of the methods that some scores and rules make, with each cloud."""
    return [f"{score}{cloud}, {rule}" for score in scores_of for cloud in CLOUDS for rule in rules]


OURS = methods((RTD_LITE,), RULES)
BASELINES = methods((CKA,), RULES) + methods((SQUARES,), (KNEE,))


def tables(records: list[Record]) -> str:
    """Return Markdown: the ratios at which networks break, mean errors, and the differences that are asked for."""
    broken, heads, found = [], [], []
    for kind in KINDS:
        mine = of_kind(records, kind)
        for name, seeds in (("exploration", EXPLORATION), ("confirmation", CONFIRMATION)):
            unpruned = [record["test"] for record in mine if record["key"][0] in seeds and not record["key"][1]]
            if not unpruned:
                continue
            ratios = list(true_ratios(mine, seeds, "test").values())
            networks = f"{name}, {len(unpruned)} networks"
            cells = [interval(unpruned).show(100), interval(ratios).show(100)]
            broken.append([f"{kind}, {networks}", MEASURES[kind], *cells])
            heads.append(f"{kind}, {networks}")
            found.append(errors(mine, seeds, "test", COMPARISONS))
    if not found:
        return ""
    head = ["networks", "measure", "unpruned, %", "ratio at which it has fallen by 5 points, %"]
    blocks = ["**Where segmenters and detectors break**", markdown_table(head, broken, text_columns=2)]
    lines = [[name, *(interval(list(each[name].values())).show(100) for each in found)] for name in found[0]]
    blocks += ["**Mean error of the predicted ratio, points**", markdown_table(["method", *heads], lines)]
    return "\n\n".join(blocks + outcome(records))


def outcome(records: list[Record]) -> list[str]:
    """Return the table of differences between RTD-Lite and each other method on the fresh networks."""
    explored = {kind: errors(of_kind(records, kind), EXPLORATION, "validation", COMPARISONS) for kind in KINDS}
    fresh = {kind: errors(of_kind(records, kind), CONFIRMATION, "test", COMPARISONS) for kind in KINDS}
    if any(len(by_method[CONSTANT]) < 2 for by_method in fresh.values()):
        return []
    together = {
        method: {(kind, seed): error for kind in KINDS for seed, error in explored[kind][method].items()}
        for method in OURS
    }
    ours = lowest(OURS, together)
    rows = []
    for kind in KINDS:
        best = lowest(BASELINES, explored[kind])
        networks = f"{kind}, {len(fresh[kind][ours])} networks"
        rows += [[networks, *row] for row in difference_rows(ours, best, fresh[kind])]
    head = ["networks", f"{ours} against", "difference, points", "p"]
    return ["**Differences of the error on fresh networks**", markdown_table(head, rows, text_columns=2)]


if __name__ == "__main__":
    main()
