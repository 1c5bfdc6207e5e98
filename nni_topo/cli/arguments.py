"""Arguments that the verbs of ``nni-topo`` share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from nni_topo.runs.plan import DataChoice


def add_verb(
    verbs: Any, name: str, run: Callable[[argparse.Namespace, Console], int], summary: str
) -> argparse.ArgumentParser:
    """Add a verb with the arguments that all have; ``run`` gets the parsed arguments and a console."""
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=summary, description=summary)
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    parser.add_argument("--seed", type=int, default=0, help="of a single run; a comparison's first (default 0)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, auto or another of PyTorch (default cpu)")
    return parser


def add_model(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Add the choice of a model."""
    parser.add_argument("--model", required=required, help="a listed name, torchvision/NAME or package.module:factory")
    parser.add_argument("--width", type=float, default=1.0, help="factor on the layers' widths (default 1)")


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add the choice of a data set; :func:`data_choice` reads it."""
    parser.add_argument("--data", default="digits", help="a listed name, an .npz file or a folder (default digits)")
    parser.add_argument("--data-dir", type=Path, help="folder with the data set's files")
    parser.add_argument("--limit", type=int, help="training images used (default all)")
    parser.add_argument("--download", action="store_true", help="let torchvision download CIFAR")


def add_out(parser: argparse.ArgumentParser, default: Path | None) -> None:
    """Add the output folder, which must be given where there is no default."""
    parser.add_argument("--out", type=Path, default=default, required=default is None, help="output folder")


def data_choice(options: argparse.Namespace) -> DataChoice:
    """Return the data set that arguments choose."""
    folder = None if options.data_dir is None else str(options.data_dir)
    return DataChoice(options.data, folder, options.limit, download=options.download)


def hand_over(study: Any, options: argparse.Namespace, console: Console, show: Callable[[], None]) -> int:
    """Write a study's files; put it out as one JSON document, or show it and name the files. Return the exit status."""
    files = study.save(options.out)
    if options.json:
        print(json.dumps(study.to_dict(), indent=1))
        return 0
    show()
    console.print("written:", ", ".join(map(str, files)), markup=False)
    return 0
