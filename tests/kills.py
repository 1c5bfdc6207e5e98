"""Long jobs that are killed at random moments and begun again end the same. `python tests/kills.py --kills 20`.

Experiments, which take NNI's manager, only by name: `python tests/kills.py experiment`.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import logging
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from nni_topo import zoo
from nni_topo.cli import main as command
from nni_topo.disk import plain
from nni_topo.runs import choices as plans
from nni_topo.runs.experiment.manager import free_port
from nni_topo.runs.trial import TrialSettings, run_trial
from nni_topo.studies.analysis.rounds import METHODS, RoundsCell, run_rounds
from nni_topo.studies.compare import compare
from nni_topo.studies.plan import ComparisonPlan
from nni_topo.studies.records import read_records

DIGITS = plans.DataChoice("digits", limit=200)
SMALL = ComparisonPlan(
    models=(plans.ModelChoice("small_cnn"),),
    data=(DIGITS,),
    pruners=tuple(map(plans.PrunerChoice, ("random", "l1", "topological"))),
    targets=(plans.Target("flops", 0.5),),
    seeds=2,
    train={"epochs": 2},
    retrain={"epochs": 1},
)
TIMES = ("seconds", "latency", "_ms", "time_shares", "peak_", "revision")


def comparison(out: Path) -> Any:
    """Compare pruners."""
    return compare(SMALL, out)[0]


def recovery(out: Path) -> Any:
    """Compare pruners with compensation and distillation, as the recovery tables do."""
    steps = plans.DistillationChoice(images=128, steps=40, augmentation="none")
    plan = replace(SMALL, retrain={"epochs": 0}, compensate=plans.CompensationChoice(images=128), distill=steps)
    return compare(plan, out)[0]


def rounds(out: Path) -> Any:
    """Prune round by round, T-IMP and its baselines."""
    recipe = zoo.Recipe(epochs=2, batch_size=32)
    model, target = plans.ModelChoice("small_cnn"), plans.Target("ratio", 0.99)
    cell = plans.Cell(model, DIGITS, METHODS["IMP"], target, 0, recipe, recipe.for_retraining(1))
    return run_rounds([RoundsCell(replace(cell, pruner=method), (0.5, 0.99)) for method in METHODS.values()], out)


def trial(out: Path) -> Any:
    """Run a trial of an experiment."""
    return run_trial(TrialSettings(limit=200, train_epochs=2, retrain_epochs=4, ratio=0.5), out)


def zoo_of_networks(out: Path) -> Any:
    """Ask for half of all channels of some networks, as ``benchmarks/zoo/zoo.py`` does."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    names = [f"own/{name}" for name in ("unet", "conv1d", "squeeze_excite", "gru", "shared", "own_attention")]
    importlib.import_module("benchmarks.zoo.zoo").main(["--out", str(out / "zoo.jsonl"), "--only", *names])
    return read_records(out / "zoo.jsonl")


STUDIES = {
    "compression": "--input-size 1 8 8",
    "connectivity": "--ratios 0.5 0.9",
    "deviation": "--pruners connections level --ratios 0.3 0.6 --images 8 --calibration 32",
    "energy": "--thresholds 0.1 0.3 --images 60",
    "evolution": "--population-size 6 --generations 20",
    "persistence": "",
    "retraining": "--ratios 0.5 --images 64 --epochs 3",
    "sensitivity": "--ratios 0.3 0.6",
    "topology": "--ratio 0.5",
}


def study(name: str) -> Callable[[Path], Any]:
    """Return the job of a study by its verb."""

    def job(out: Path) -> Any:
        data = [] if name == "compression" else ["--limit", "200"]
        words = ["--model", "small_cnn", *data, "--out", str(out), *STUDIES[name].split()]
        assert command(["analyze", name, *words]) == 0, f"{name} runs"
        return {path.name: json.loads(path.read_text()) for path in sorted(out.glob("*.json"))}

    job.__name__ = name
    return job


ALONE = (comparison, recovery, rounds, trial, zoo_of_networks)
JOBS: dict[str, Callable[[Path], Any]] = {job.__name__: job for job in (*ALONE, *map(study, STUDIES))}


def digest(value: torch.Tensor) -> str:
    """Return a digest of a tensor's values."""
    return hashlib.sha256(value.detach().contiguous().numpy().tobytes()).hexdigest()


def timeless(value: Any) -> Any:
    """Return what was found without what differs from run to run."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if not any(word in key for word in TIMES)}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def begun(job: Callable[[Path], Any], out: Path) -> int:
    """Begin a job in a process of its own, whose result ends as ``found.json``; return its id."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        out.mkdir(exist_ok=True)
        found = timeless(plain(job(out)))
        (out / "found.json").write_text(json.dumps(found, sort_keys=True))
        status = 0
    finally:
        os._exit(status)


def killed(job: Callable[[Path], Any], kills: int, seed: int) -> tuple[int, int, float]:
    """Kill a job so often, and begin it again till it ends; return kills, ends and seconds of a run that isn't killed.

    Raises AssertionError unless each end is that of a run that wasn't killed.
    """
    draw, done, ends = random.Random(f"{job.__name__} {seed}"), 0, 0
    with tempfile.TemporaryDirectory() as name:
        began = time.monotonic()
        assert os.waitpid(begun(job, Path(name, "whole")), 0)[1] == 0, f"{job.__name__} runs"
        seconds = time.monotonic() - began
        wanted = Path(name, "whole", "found.json").read_text()
        while done < kills or ends == 0:
            out = Path(name, f"killed{ends}")
            process = begun(job, out)
            until = time.monotonic() + draw.uniform(0.0, seconds if done < kills else 1e4)
            while os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                if time.monotonic() >= until:
                    os.kill(process, signal.SIGKILL)
                    break
                time.sleep(0.002)
            status = os.waitpid(process, 0)[1]
            assert os.WIFSIGNALED(status) or status == 0, f"{job.__name__} ends well, or is killed"
            done += os.WIFSIGNALED(status)
            if status == 0:
                ends += 1
                found = (out / "found.json").read_text()
                assert found == wanted, f"{job.__name__}: {found} is {wanted}"
                left = [each.name for each in out.rglob("*") if each.name.endswith(".part")]
                assert len(left) <= done, f"{job.__name__}: {left}"
    return done, ends, seconds


EXPERIMENT = """
searchSpace: {seed: {_type: choice, _value: [0, 1, 2, 3]}}
trialCommand: python -m nni_topo.runs.trial --limit 200 --train-epochs 2 --retrain-epochs 20
trialCodeDirectory: .
trialConcurrency: 2
maxTrialNumber: 4
tuner: {name: GridSearch}
trainingService: {platform: local}
experimentWorkingDirectory: nni-experiments
"""


class Experiment:
    """An experiment of four trials in a home of its own, whose manager and command can be killed."""

    def __init__(self, home: Path) -> None:
        self.home, self.finished = home, dict[str, bytes]()
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.environment = {**os.environ, "HOME": str(home), "PATH": path}
        self.environment["PYTHONPATH"] = os.pathsep.join(filter(None, map(os.path.abspath, sys.path)))
        (home / "config.yml").write_text(EXPERIMENT)

    def known(self) -> str:
        """Return the identifier of the experiment that has begun here, which is in NNI's list; none is empty."""
        path = self.home / "nni-experiments" / ".experiment"
        for name in json.loads(path.read_text() or "{}") if path.exists() else ():
            with closing(sqlite3.connect(self.home / "nni-experiments" / name / "db" / "nni.sqlite")) as database:
                if database.execute("select 1 from ExperimentProfile where id = ?", (name,)).fetchone():
                    return name
        return ""

    def run(self, seconds: float) -> bool:
        """Begin it, or go on with it; after so many seconds kill it. Say whether it came to its end."""
        way = ["--resume", self.known()] if self.known() else ["config.yml"]
        words = ["experiment", "run", *way, "--port", str(free_port()), "--out", "out"]
        log = (self.home / "log").open("ab")
        process = subprocess.Popen(
            [sys.executable, "-m", "nni_topo", *words], cwd=self.home, env=self.environment, stdout=log, stderr=log
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            # the manager has a process group of its own; trials outlive both
            managers = psutil.Process(process.pid).children()
            for each in (process, *managers):
                each.kill()
            process.wait()
            self.finished |= self.results()
            return False
        assert status == 0, (self.home / "log").read_text()
        return True

    def results(self) -> dict[str, bytes]:
        """Return what trials that are finished have written, by their identifiers."""
        return {path.parent.name: path.read_bytes() for path in (self.home / "nni-experiments").rglob("metrics.json")}

    def check(self) -> None:
        """Raise AssertionError unless each trial is there once, and those that were finished are as they were."""
        trials = {each["id"]: each for each in json.loads((self.home / "out" / "trials.json").read_text())}
        assert sorted(each["parameters"]["seed"] for each in trials.values()) == [0, 1, 2, 3], trials
        assert {each["status"] for each in trials.values()} == {"SUCCEEDED"}, trials
        found = self.results()
        assert self.finished.keys() <= trials.keys(), f"no finished trial is lost: {self.finished.keys()}, {trials}"
        assert all(found[name] == before for name, before in self.finished.items()), "no finished trial is repeated"


def experiment(kills: int, seed: int) -> tuple[int, int, float]:
    """Kill an experiment's manager and command so often, and resume it till it ends; as :func:`killed`."""
    draw, done, ends, seconds = random.Random(f"experiment {seed}"), 0, 0, 0.0
    while done < kills or ends < 2:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
            one, began = Experiment(Path(name)), time.monotonic()
            while not one.run(draw.uniform(0.0, seconds) if seconds and done < kills else 1e4):
                done += 1
            one.check()
            ends, seconds = ends + 1, seconds or time.monotonic() - began
    return done, ends, seconds


def main() -> None:
    """Kill each job many times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("jobs", nargs="*", metavar="job", help=f"of {', '.join(JOBS)}; none: these; or experiment")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name in options.jobs or JOBS:
        kill = experiment if name == "experiment" else partial(killed, JOBS[name])
        done, ends, seconds = kill(options.kills, options.seed)
        print(f"{name}: killed {done} times in runs of {seconds:.1f} s, {ends} ends, all the same", flush=True)
    sys.exit(0)


if __name__ == "__main__":
    main()
