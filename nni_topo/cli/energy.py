"""The arguments and the run of ``nni-topo analyze energy``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from nni_topo.analysis.energy.parts import PARTS
from nni_topo.analysis.energy.run import EnergyPlan, energy_study
from nni_topo.analysis.energy.study import THRESHOLDS
from nni_topo.analysis.energy.tables import print_energy
from nni_topo.maths.signals import Chirp
from nni_topo.runs.plan import DataChoice, ModelChoice


def add_energy_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the study's own arguments to a parser that has those of model, data and output."""
    parser.add_argument("--checkpoint", type=Path, help="state dict of the trained model; default: train it first")
    parser.add_argument("--thresholds", type=float, nargs="+", default=list(THRESHOLDS), help="energy shares")
    parser.add_argument("--images", type=int, help="validation and test images used, of each (default all)")
    parser.add_argument("--max-drop", type=float, default=0.01, help="accuracy a layer may cost (default 0.01)")
    parser.add_argument("--parts", nargs="*", default=[], metavar="PART", help=f"further studies: {', '.join(PARTS)}")
    parser.add_argument("--layer", help="of replacement and selection; default: the costliest")
    parser.add_argument("--calibration", type=int, default=0, help="images instead of the chirp")
    parser.add_argument("--sweep", default="nyquist", help="nyquist or thesis (default nyquist)")
    parser.add_argument("--direction", default="mean", help="mean, radial or diagonal (default mean)")
    parser.add_argument("--window", default="none", help="taper of the chirp, none or hann (default none)")
    parser.add_argument("--normalization", default="area", help="none, area or layer (default area); for tied layers")
    parser.add_argument("--batch-norm", action="store_true", help="scale responses as batch norms do")


def run_energy_study(
    options: argparse.Namespace, console: Console, data_choice: Callable[[argparse.Namespace], DataChoice]
) -> int:
    """Run the study that arguments ask for, print it, and return 0."""
    usual = {"signal": {}, "normalization": "area", "batch_norm": False}
    signal = {name: getattr(options, name) for name in ("sweep", "direction", "window")}
    given = {"signal": {name: value for name, value in signal.items() if value != getattr(Chirp(), name)}}
    knobs = {knob: given.get(knob, getattr(options, knob, None)) for knob in usual}
    plan = EnergyPlan(
        thresholds=options.thresholds,
        max_drop=options.max_drop,
        parts=options.parts,
        layer=options.layer,
        calibration=options.calibration,
        knobs={knob: value for knob, value in knobs.items() if value != usual[knob]},
    )
    data = replace(data_choice(options), test_limit=options.images)
    model = ModelChoice(options.model, options.width)
    record = energy_study(model, options.checkpoint, data, plan, options.out, seed=options.seed, device=options.device)
    if options.json:
        print(json.dumps(record, indent=1))
    else:
        print_energy(record, console)
    return 0
