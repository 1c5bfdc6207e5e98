"""The ``nni-topo`` command: it prints its verbs and its version before it loads PyTorch and NNI to run a verb."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata

VERBS = {
    "list": "List pruners, recovery methods, models and data by name.",
    "demo": "Train a small network on digits, prune it by several pruners, and compare.",
    "compare": "Compare pruners at equal cost; a comparison resumes where it was stopped.",
    "report": "Write report.html in folders of finished or running runs, and print the tables of comparisons.",
    "analyze": "Study one model without changing it.",
    "experiment": "Run NNI's experiments and show their results.",
    "prune": "Prune one trained model by a YAML file.",
    "shrink": "Make one model smaller from inputs without labels: select channels, reconstruct weights, distil.",
    "profile": "Measure one model before and after pruning, in turns: time, throughput, memory, MACs, parameters.",
    "doctor": "Check versions, NNI, torch and torchvision, data, GPU, NNI's port and extras; say what to do.",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line as :func:`nni_topo.cli.main` does; print the verbs or the version without loading it."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    chosen("nni-topo", VERBS, words, f"nni_topo {metadata.version('nni_topo')}")
    if arguments is None and "" not in sys.path:
        sys.path.append("")  # a model that is named as module:function may lie in the working folder
    from nni_topo import cli

    return cli.main(words)


def chosen(name: str, choices: Mapping[str, str], words: Sequence[str], version: str) -> str:
    """Return the first word if it is one of the choices, each with a line of help; else print the choices and exit."""
    parser = argparse.ArgumentParser(prog=name, description="Topological pruning for NNI on current PyTorch.")
    parser.add_argument("--version", action="version", version=version)
    known = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, line in choices.items():
        known.add_parser(verb, help=line.replace("%", "%%"), add_help=False)
    if not words:
        parser.print_help()
        parser.exit(2)
    verb = parser.parse_args(words[:1]).verb
    return str(verb)


if __name__ == "__main__":
    sys.exit(main())
