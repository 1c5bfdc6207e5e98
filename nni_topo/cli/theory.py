"""``nni-topo analyze deviation`` and ``nni-topo analyze retraining``: arguments and output."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from nni_topo.analysis.deviation import deviation_study, print_deviation
from nni_topo.analysis.retraining_study import print_retraining, retraining_study
from nni_topo.cli.arguments import add_data, add_model, add_out, add_verb, data_choice, hand_over
from nni_topo.runs.plan import ModelChoice


def add_theory_studies(studies: Any) -> None:
    """Add both studies to the parsers of ``nni-topo analyze``."""
    deviation = add_verb(studies, "deviation", _deviation, "error of pruned networks against its bound, by pruner")
    _add_pruners(deviation, "connections,level,random,cluster,subcluster", [0.1, 0.3, 0.5, 0.7, 0.9])
    deviation.add_argument("--images", type=int, default=64, help="training images for the deviation (default 64)")

    retraining = add_verb(studies, "retraining", _retraining, "epochs of retraining against their lower bound")
    _add_pruners(retraining, "connections,random", [0.1, 0.5, 0.9])
    retraining.add_argument("--images", type=int, default=2048, help="training images for gradients (default 2048)")
    retraining.add_argument("--epochs", type=int, default=10, help="most epochs of retraining (default 10)")
    retraining.add_argument("--gamma", type=float, default=1.0, help="the theorem's free constant (default 1)")
    retraining.add_argument("--tolerance", type=float, default=0.0, help="accuracy that may be missing (default 0)")


def _add_pruners(parser: argparse.ArgumentParser, pruners: str, ratios: list[float]) -> None:
    add_model(parser, required=True)
    parser.add_argument("--checkpoint", type=Path, help="state dict of the trained model; default: train it first")
    what = f"names, separated by commas; connections: single weights at random (default {pruners})"
    parser.add_argument("--pruners", default=pruners, help=what)
    shown = " ".join(map(str, ratios))
    parser.add_argument("--ratios", type=float, nargs="+", default=ratios, help=f"of every layer (default {shown})")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each pruner (default 1)")
    parser.add_argument("--calibration", type=int, default=512, help="images for pruners that take some (default 512)")
    add_data(parser)
    add_out(parser, None)


def _deviation(options: argparse.Namespace, console: Console) -> int:
    study = deviation_study(
        *_subject(options),
        seeds=options.seeds,
        images=options.images,
        calibration=options.calibration,
        seed=options.seed,
        device=options.device,
    )
    return hand_over(
        study,
        options,
        console,
        lambda: print_deviation(study, f"Net Deviation of {options.model}, {study.images} images", console),
    )


def _retraining(options: argparse.Namespace, console: Console) -> int:
    study = retraining_study(
        *_subject(options),
        seeds=options.seeds,
        most_epochs=options.epochs,
        images=options.images,
        calibration=options.calibration,
        gamma=options.gamma,
        tolerance=options.tolerance,
        seed=options.seed,
        device=options.device,
    )
    return hand_over(
        study, options, console, lambda: print_retraining(study, f"epochs of retraining of {options.model}", console)
    )


def _subject(options: argparse.Namespace) -> tuple[Any, ...]:
    pruners = [name.strip() for name in options.pruners.split(",") if name.strip()]
    model = ModelChoice(options.model, options.width)
    return model, options.checkpoint, data_choice(options), pruners, options.ratios
