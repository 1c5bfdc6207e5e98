"""``python -m nni_topo.runs.trial``: one trial of an NNI experiment, or one of its own with ``--params FILE``.

Under NNI the parameters come from the tuner, the results go to it, and the files lie in the trial's folder. Started by
``torchrun``, the processes retrain together.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nni
import tyro

from nni_topo.errors import ConfigError, NniTopoError
from nni_topo.runs.experiment.pairing import next_parameters
from nni_topo.runs.experiment.pipeline import reported, run_trial
from nni_topo.runs.experiment.settings import Trial, read_parameters, with_parameters
from nni_topo.runs.processes import broadcast, process_group
from nni_topo.runs.run import resolve_device


def parsed(arguments: Sequence[str] | None = None) -> Trial:
    """Return what the words of a command line ask for; by default the words of this process."""
    return tyro.cli(Trial, prog="python -m nni_topo.runs.trial", args=arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a trial by the words of a command line; return 0, or 2 with the reason on standard error."""
    try:
        options = parsed(arguments)
        with process_group(resolve_device(options.device)) as (rank, _):
            _run(options, is_first=rank == 0)
    except NniTopoError as error:
        print(f"nni_topo.runs.trial: {error}", file=sys.stderr)
        return 2
    return 0


def _run(options: Trial, *, is_first: bool) -> None:
    alone = options.params is not None
    if options.out is not None:
        out = options.out
    elif alone or "NNI_OUTPUT_DIR" not in os.environ:
        raise ConfigError("a trial outside of NNI must have --params FILE and --out FOLDER, got no folder (trial)")
    else:
        out = Path(os.environ["NNI_OUTPUT_DIR"])
    cache = options.cache or (None if alone else out.parent.parent / "nets")
    parameters: dict[str, Any] = {}
    if is_first and options.params is not None:
        parameters = read_parameters(options.params)
    elif is_first:
        if nni.get_trial_id() == "STANDALONE":
            raise ConfigError("parameters must come from NNI or from --params FILE, got neither (trial)")
        parameters = next_parameters()
    settings = with_parameters(options.settings(), broadcast(parameters))
    settings = settings.for_trial(0 if alone else nni.get_sequence_id())
    metrics = run_trial(settings, out, cache=cache, report=_show if alone else _report)
    if not is_first:
        return
    if alone:
        print(json.dumps(reported(metrics)))
    else:
        nni.report_final_result(reported(metrics))


def _show(step: int, result: dict[str, float]) -> None:
    print(json.dumps({"step": step, **result}), flush=True)


def _report(step: int, result: dict[str, float]) -> None:
    """Report to NNI; a trial that goes on after a kill goes on counting, too."""
    nni.trial.overwrite_intermediate_seq(step)
    nni.report_intermediate_result(result)


if __name__ == "__main__":
    sys.exit(main())
