"""Iterative magnitude pruning (NNI's LevelPruner) against T-IMP, which keeps each layer's spanning tree.

Trains each net, then prunes every layer to the same share in rounds, retraining after each. "IMP capped" is NNI's
pruner with as many weights per layer as T-IMP has, so that what differs is which ones. A line per finished run: a
stopped benchmark goes on where it was. Prints the tables as Markdown and writes two pictures.

    python benchmarks/trees/bench_timp.py --data-dir DIR --out runs/timp
    python benchmarks/trees/bench_timp.py --data digits --nets lenet300 --seeds 2 --out runs/timp_digits
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from nni_topo import zoo
from nni_topo.runs.choices import Cell, DataChoice, ModelChoice, Target
from nni_topo.studies.analysis.rounds import METHODS, SPARSITIES, RoundsCell, RoundsStudy, rounds_tables, run_rounds
from nni_topo.studies.tables import as_markdown


@dataclass(frozen=True)
class Size:
    """How large a run is: images, test images, changes to the recipe, epochs of each round, seeds."""

    images: int
    test_images: int
    recipe: dict[str, Any]
    retrain_epochs: int
    seeds: int


SIZES = {
    "lenet300": Size(5_000, 5_000, {}, 2, 5),
    "mnist_fcn": Size(5_000, 5_000, {}, 2, 5),
    "mnist_cnn": Size(5_000, 2_000, {}, 2, 5),
    "resnet20": Size(5_000, 2_000, {"epochs": 20, "precision": "bfloat16"}, 2, 3),
}


def cells(options: argparse.Namespace) -> list[RoundsCell]:
    folder = None if options.data_dir is None else str(options.data_dir)
    found = []
    for net in options.nets:
        size = SIZES[net]
        limits = (None, None) if options.data == "digits" else (size.images, size.test_images)
        data = DataChoice(options.data, folder, *limits)
        recipe = replace(zoo.default_recipe(net, options.data), **size.recipe)
        for seed in range(options.seeds or size.seeds):
            for method in METHODS.values():
                cell = Cell(
                    ModelChoice(net),
                    data,
                    method,
                    Target("ratio", SPARSITIES[-1]),
                    seed,
                    train=recipe,
                    retrain=recipe.for_retraining(size.retrain_epochs),
                    device=options.device,
                )
                found.append(RoundsCell(cell))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--seeds", type=int, help="default: 5, for resnet20 3")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(stderr=True)

    def announce(study: RoundsCell, number: int, count: int) -> None:
        console.print(
            f"[{number}/{count}] {study.cell.model.label}, seed {study.cell.seed}: {study.cell.pruner.row}",
            markup=False,
        )

    found = RoundsStudy(run_rounds(cells(options), options.out, announce=announce))
    print(as_markdown(rounds_tables(found.records)))
    console.print("written:", ", ".join(map(str, found.save(options.out))), markup=False)


if __name__ == "__main__":
    main()
