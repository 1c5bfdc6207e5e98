"""The ``nni-topo`` command: it prints help and its version before it loads PyTorch and NNI to run a verb."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata, util
from pathlib import Path

DESCRIPTION = (
    "Make trained PyTorch networks smaller and faster, for people who have the network and some of its inputs, but no "
    "labels."
)
VERBS = {
    "shrink": "Make one model smaller from inputs without labels: select channels, reconstruct weights, distil.",
    "demo": "Train a small network on digits, make it smaller, and compare several pruners.",
    "prune": "Prune one trained model by a YAML file.",
    "compare": "Compare pruners at equal cost; a comparison resumes where it was stopped.",
    "report": "Write report.html in folders of finished or running runs, and print the tables of comparisons.",
    "experiment": "Run NNI's experiments and show their results.",
    "analyze": "Study one model without changing it.",
    "profile": "Measure one model before and after pruning, in turns: time, throughput, memory, MACs, parameters.",
    "list": "List pruners, recovery methods, models and data by name.",
    "doctor": "Check versions, NNI, torch and torchvision, data, GPU, NNI's port and extras; say what to do.",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line as :func:`nni_topo.cli.main` does; print the verbs or the version without loading it."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    chosen("nni-topo", VERBS, words, f"nni_topo {metadata.version('nni_topo')}")
    if not {"-h", "--help"}.isdisjoint(words) and (text := help_of(words)):
        print(text, end="")
        raise SystemExit(0)
    if arguments is None and "" not in sys.path:
        sys.path.append("")  # a model that is named as module:function may lie in the working folder
    # PyTorch's profiler reports a machine without a GPU as an error.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from nni_topo import cli

    return cli.main(words)


def help_of(words: Sequence[str]) -> str:
    """Return the help of the verb that begins a command line; empty if it is unknown. ``tools/help.py`` writes it."""
    spec = util.find_spec("nni_topo")
    if spec is None or spec.origin is None:
        return ""
    file = Path(spec.origin).with_name("cli") / "help.json"
    texts: dict[str, str] = json.loads(file.read_text(encoding="utf-8"))["verbs"]
    return texts.get(" ".join(words[:2])) or texts.get(words[0], "")


def chosen(name: str, choices: Mapping[str, str], words: Sequence[str], version: str) -> str:
    """Return the first word if it is one of the choices, each with a line of help; else print the choices and exit."""
    parser = argparse.ArgumentParser(prog=name, description=DESCRIPTION)
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
