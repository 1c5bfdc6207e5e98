"""``nni-topo analyze magnitude`` and ``nni-topo analyze sensitivity``: arguments and output."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch.utils.data import TensorDataset

from nni_topo import zoo
from nni_topo.analysis.magnitude.report import markdown_magnitude, plot_magnitude
from nni_topo.analysis.magnitude.study import MagnitudePlan, MagnitudeStudy, run_magnitude
from nni_topo.analysis.sensitivity import RATIOS, Sensitivity, sensitivity
from nni_topo.cli.arguments import add_data, add_model, add_out, add_verb, data_choice
from nni_topo.pruners.registry import pruner_info
from nni_topo.runs.plan import ModelChoice
from nni_topo.runs.run import pruner_knobs, trained

_CALIBRATION = 512


def add_magnitude_studies(studies: Any) -> None:
    """Add both studies to the parsers of ``nni-topo analyze``."""
    curves = add_verb(studies, "sensitivity", _sensitivity, "accuracy with one layer pruned at a time; a config for it")
    add_model(curves, required=True)
    curves.add_argument("--checkpoint", type=Path, help="state dict of the trained model; default: train it first")
    curves.add_argument("--pruner", default="l1", help="any registered pruner (default l1)")
    curves.add_argument(
        "--ratios", type=float, nargs="+", default=list(RATIOS), help="of each layer (default 0.1 .. 0.9)"
    )
    curves.add_argument("--layers", nargs="+", help="names (default: all that can be pruned)")
    curves.add_argument("--budget", type=float, default=0.01, help="accuracy the suggestion may cost (default 0.01)")
    curves.add_argument("--stop-drop", type=float, help="end a curve so far below the baseline (default never)")
    curves.add_argument(
        "--calibration", type=int, help="training images for the pruner (default 512 where it needs them)"
    )
    curves.add_argument("--images", type=int, help="validation images used (default all)")
    add_data(curves)
    add_out(curves, None)

    study = add_verb(studies, "magnitude", _magnitude, "direct and iterative pruning; bytes and time of zeros")
    add_model(study, required=True)
    study.add_argument("--checkpoint", type=Path, help="state dict of the trained model; default: train it first")
    default = MagnitudePlan()
    study.add_argument("--ratios", type=float, nargs="+", default=list(default.ratios), help="of the pruned layers")
    study.add_argument("--rounds", type=int, default=default.rounds, help="of iterative pruning (default 3)")
    study.add_argument("--epochs", type=int, default=default.epochs, help="of retraining in all (default 3)")
    study.add_argument("--images", type=int, help="test images used (default all)")
    add_data(study)
    add_out(study, None)


def _sensitivity(options: argparse.Namespace, console: Console) -> int:
    model = ModelChoice(options.model, options.width)
    start = trained(
        model, data_choice(options), checkpoint=options.checkpoint, seed=options.seed, device=options.device
    )
    needs = any("calibration" in need for need in pruner_info(options.pruner).needs)
    calibration = _CALIBRATION * needs if options.calibration is None else options.calibration
    images, labels = start.data.validation.tensors
    watched = TensorDataset(images[: options.images], labels[: options.images])

    def announce(layers: str, ratio: float, accuracy: float) -> None:
        console.print(f"{layers} at {ratio:g}: {100 * accuracy:.1f} %", markup=False, highlight=False)

    found = sensitivity(
        start.net,
        start.example,
        lambda pruned: zoo.evaluate(pruned, watched, device=start.device),
        options.ratios,
        options.pruner,
        layers=options.layers,
        knobs=lambda victim: pruner_knobs(options.pruner, victim, start, calibration),
        budget=options.budget,
        stop_drop=options.stop_drop,
        on_progress=announce,
    )
    files = found.save(options.out)
    if options.json:
        print(json.dumps(found.to_dict(), indent=1))
        return 0
    print_sensitivity(found, f"sensitivity of {options.model}, {options.pruner}, validation accuracy in %", console)
    console.print("written:", ", ".join(map(str, files)), markup=False)
    return 0


def print_sensitivity(found: Sensitivity, title: str, console: Console) -> None:
    """Print a row per curve, and the suggestion."""
    ratios = sorted({ratio for curve in found.curves for ratio in curve.accuracy})
    chosen = {tuple(entry["op_names"]): f"{entry['sparse_ratio']:g}" for entry in found.suggested}
    table = Table("layers", title=title, title_justify="left")
    for name in (*(f"{ratio:g}" for ratio in ratios), "suggested"):
        table.add_column(name, justify="right")
    for curve in found.curves:
        values = [100 * curve.accuracy.get(ratio, math.nan) for ratio in ratios]
        shown = ["" if math.isnan(value) else f"{value:.1f}" for value in values]
        table.add_row(" + ".join(curve.layers), *shown, chosen.get(curve.layers, "0"))
    console.print(table)
    before, after = 100 * found.baseline, 100 * found.suggested_accuracy
    console.print(f"unpruned {before:.1f} %, all suggested ratios at once {after:.1f} %, without retraining")


def _magnitude(options: argparse.Namespace, console: Console) -> int:
    model = ModelChoice(options.model, options.width)
    plan = MagnitudePlan(tuple(sorted(set(options.ratios))), options.rounds, options.epochs)
    data = replace(data_choice(options), test_limit=options.images)
    start = trained(model, data, checkpoint=options.checkpoint, seed=options.seed, device=options.device)
    study = MagnitudeStudy(start, plan)
    document = run_magnitude(study, options.out, lambda line: console.print(line, markup=False, highlight=False))
    files = plot_magnitude(document, options.out)
    if options.json:
        print(json.dumps(document, indent=1))
        return 0
    console.print(markdown_magnitude(document), markup=False, highlight=False, soft_wrap=True)
    console.print("written:", ", ".join(map(str, files)), markup=False)
    return 0
