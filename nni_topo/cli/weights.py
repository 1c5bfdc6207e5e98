"""``nni-topo analyze compression`` and ``nni-topo analyze persistence``: arguments and output."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from nni_topo.analysis.weights import compression_study, persistence_study, print_compression, print_persistence
from nni_topo.cli.arguments import add_data, add_model, add_out, add_verb, data_choice, hand_over
from nni_topo.runs.plan import ModelChoice


def add_weight_studies(studies: Any) -> None:
    """Add both studies to the parsers of ``nni-topo analyze``."""
    compression = add_verb(studies, "compression", _compression, "how far layers can be pruned with their trees whole")
    add_model(compression, required=True)
    compression.add_argument(
        "--input-size",
        type=int,
        nargs="+",
        required=True,
        metavar="N",
        help="of one input: channels, height and width of an image in pixels",
    )
    compression.add_argument("--classes", type=int, default=10, help="number of outputs (default 10)")
    compression.add_argument("--convention", default="theorem", help="theorem or tables (default theorem)")
    compression.add_argument("--out", type=Path, help="folder for compression.json (default none)")

    persistence = add_verb(studies, "persistence", _persistence, "neural persistence of a model, or along a training")
    add_model(persistence, required=True)
    persistence.add_argument(
        "--checkpoint", type=Path, help="state dict of a trained model; default: train it and watch"
    )
    persistence.add_argument("--p", type=float, default=2.0, help="order of the norm (default 2)")
    persistence.add_argument("--normalized", action="store_true", help="divide each layer by its upper bound")
    persistence.add_argument("--conv-graph", default="channel", help="channel or toeplitz (default channel)")
    persistence.add_argument("--scale", default="layer", help="whose largest weight is 1: layer or model")
    add_data(persistence)
    add_out(persistence, None)


def _compression(options: argparse.Namespace, console: Console) -> int:
    model = ModelChoice(options.model, options.width)
    found = compression_study(model, options.input_size, classes=options.classes, convention=options.convention)
    document = json.dumps(found.to_dict(), indent=1)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "compression.json").write_text(document + "\n", encoding="utf-8")
    if options.json:
        print(document)
    else:
        size = "x".join(map(str, options.input_size))
        print_compression(found, f"{model.label}, {size}, as in the {options.convention}", console)
    return 0


def _persistence(options: argparse.Namespace, console: Console) -> int:
    study = persistence_study(
        ModelChoice(options.model, options.width),
        options.checkpoint,
        data_choice(options),
        seed=options.seed,
        device=options.device,
        p=options.p,
        normalized=options.normalized,
        conv_graph=options.conv_graph,
        scale=options.scale,
    )
    return hand_over(
        study, options, console, lambda: print_persistence(study, f"neural persistence of {options.model}", console)
    )
