"""The ``nni-topo`` command: it says what there is at once, and loads PyTorch and NNI only to do it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence

VERBS = {
    "list": "List pruners, models and data by name.",
    "demo": "Train a small net on digits, prune it by every data-free pruner, compare.",
    "compare": "Compare pruners at equal cost; a comparison resumes where it was stopped.",
    "report": "Write report.html again in folders of runs, also while they run, and print the tables of comparisons.",
    "analyze": "Study one model; nothing is changed.",
    "experiment": "Run NNI's experiments, and look at them.",
    "prune": "Prune one trained model as a YAML file says.",
    "shrink": "Make one trained model smaller from unlabelled images: select channels, reconstruct weights, distil.",
    "profile": "Measure one model before and after pruning, in turns: time, throughput, memory, MACs, parameters.",
    "doctor": "Check versions, NNI, PyTorch's pair, data, GPU, NNI's port and optional packages; say what to do.",
    "completion": 'Print a script that completes verbs and flags: eval "$(nni-topo completion bash)".',
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line as :func:`nni_topo.cli.main` does; of help alone, say it without loading that."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        chosen("nni-topo", VERBS, words)
    from nni_topo import cli

    return cli.main(words)


def chosen(name: str, choices: Mapping[str, str], words: Sequence[str], version: str = "") -> str:
    """Return the first word if it is one of the choices, each with a line of help; else say what there is and leave."""
    parser = argparse.ArgumentParser(prog=name, description="Topological pruning for NNI on current PyTorch.")
    parser.add_argument("--version", action="version", version=version)
    known = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, line in choices.items():
        known.add_parser(verb, help=line, add_help=False)
    if not words:
        parser.print_help()
        parser.exit(2)
    verb = parser.parse_args(words[:1]).verb
    return str(verb)


if __name__ == "__main__":
    sys.exit(main())
