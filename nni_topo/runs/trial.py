"""``python -m nni_topo.runs.trial``: one trial of an NNI experiment, or one of its own with ``--params FILE``.

Under NNI the parameters come from the tuner, the results go to it, and the files lie in the trial's folder. Started by
``torchrun``, the processes retrain together.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nni

from nni_topo.errors import ConfigError, NniTopoError
from nni_topo.runs.experiment.pairing import next_parameters
from nni_topo.runs.experiment.pipeline import reported, run_trial
from nni_topo.runs.experiment.settings import TrialSettings, read_parameters, scalar_fields, with_parameters
from nni_topo.runs.processes import broadcast, process_group
from nni_topo.runs.run import resolve_device


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a trial by the words of a command line; return 0, or 2 with the reason on standard error."""
    options = _parser().parse_args(arguments)
    try:
        with process_group(resolve_device(options.device)) as (rank, _):
            _run(options, is_first=rank == 0)
    except NniTopoError as error:
        print(f"nni_topo.runs.trial: {error}", file=sys.stderr)
        return 2
    return 0


def _run(options: argparse.Namespace, *, is_first: bool) -> None:
    alone = options.params is not None
    out = _folder(options)
    cache = options.cache or (None if alone else out.parent.parent / "nets")
    settings = TrialSettings(**{item.name: getattr(options, item.name) for item in scalar_fields()})
    settings = with_parameters(settings, broadcast(_parameters(options) if is_first else {}))
    settings = settings.for_trial(0 if alone else nni.get_sequence_id())
    metrics = run_trial(settings, out, cache=cache, report=_show if alone else _report)
    if not is_first:
        return
    if alone:
        print(json.dumps(reported(metrics)))
    else:
        nni.report_final_result(reported(metrics))


def _folder(options: argparse.Namespace) -> Path:
    """Return the folder for the trial's files: the one given, or the one that NNI made."""
    if options.out is not None:
        return Path(options.out)
    if options.params is not None or "NNI_OUTPUT_DIR" not in os.environ:
        raise ConfigError("a trial outside of NNI must have --params FILE and --out FOLDER, got no folder (trial)")
    return Path(os.environ["NNI_OUTPUT_DIR"])


def _parameters(options: argparse.Namespace) -> dict[str, Any]:
    if options.params is not None:
        return read_parameters(options.params)
    if nni.get_trial_id() == "STANDALONE":
        raise ConfigError("parameters must come from NNI or from --params FILE, got neither (trial)")
    return next_parameters()


def _show(step: int, result: dict[str, float]) -> None:
    print(json.dumps({"step": step, **result}), flush=True)


def _report(step: int, result: dict[str, float]) -> None:
    """Report to NNI; a trial that goes on after a kill goes on counting, too."""
    nni.trial.overwrite_intermediate_seq(step)
    nni.report_intermediate_result(result)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m nni_topo.runs.trial", description="Prune, make dense, compensate, retrain and report to NNI."
    )
    parser.add_argument("--params", type=Path, help="JSON file with the parameters, instead of NNI's tuner")
    parser.add_argument("--out", type=Path, help="folder for the trial's files (default: the one NNI makes)")
    parser.add_argument("--cache", type=Path, help="folder of trained nets (default: the experiment's)")
    for item in scalar_fields():
        parser.add_argument(
            f"--{item.name.replace('_', '-')}",
            type=item.metadata["kind"],
            default=item.default,
            metavar=item.metadata["kind"].__name__.upper(),
            help=item.metadata["summary"] + ("" if item.default is None else f" (default {item.default})"),
        )
    return parser


if __name__ == "__main__":
    sys.exit(main())
