"""Iterative magnitude pruning (IMP) with and without keeping spanning trees, measured after each round."""

from __future__ import annotations

import itertools
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import RenderableType
from torch import nn

from nni_topo import zoo
from nni_topo.disk import only_process
from nni_topo.errors import ConfigError, DataError, unknown_name
from nni_topo.maths.topology.overlap import overlap_bound, tree_overlap
from nni_topo.pruners.hooks import Masks
from nni_topo.pruners.registry import create_pruner
from nni_topo.pruners.rounds import Round, prune_in_rounds
from nni_topo.rules import JOBS, instance, whole
from nni_topo.runs.choices import Cell, PrunerChoice, Target, changed_recipe
from nni_topo.runs.provenance import Record, provenance
from nni_topo.runs.run import build_model, pruner_knobs
from nni_topo.studies.analysis.compression import critical_config_list
from nni_topo.studies.analysis.connectivity import connectivity
from nni_topo.studies.analysis.layers import weight_layers
from nni_topo.studies.analysis.pruned import share_kept
from nni_topo.studies.cells import start_of
from nni_topo.studies.pictures import finish
from nni_topo.studies.records import read_records, run_missing
from nni_topo.studies.study import DataVerb, Findings, Names, Study, Tell
from nni_topo.studies.tables import NumberTable, interval, show_accuracies
from nni_topo.zoo.labelled import subset

METHODS = {
    "IMP": PrunerChoice("level", "IMP"),
    "T-IMP": PrunerChoice("topological_magnitude", "T-IMP", {"on_subcritical": "clip"}),
    "IMP capped": PrunerChoice("level", "IMP capped"),
}
"""IMP: NNI's magnitude pruner. T-IMP: keeps the trees and stops at the critical ratio. IMP capped: IMP that keeps at
least as many weights of each layer as its tree has."""
_COLORS = {"IMP": "C1", "T-IMP": "C0", "IMP capped": "C2"}
_TYPES = ["Linear", "Conv2d"]
SPARSITIES = (0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)


@dataclass(frozen=True)
class RoundsCell:
    """One run of the study: a method and a seed."""

    # its pruner is one of METHODS, its target the last sparsity; `train` and `retrain` are the recipes of training and
    # of fine-tuning after each round
    cell: Cell
    sparsities: tuple[float, ...] = SPARSITIES

    @property
    def training_key(self) -> str:
        """Key of the trained network from which the run starts."""
        return self.cell.training_key

    @property
    def key(self) -> str:
        """Key of the run's record; runs with equal settings have equal keys."""
        return f"{self.cell.key} {','.join(f'{level:g}' for level in self.sparsities)}"


@dataclass(frozen=True)
class RoundsStudy(Findings):
    """The records of all runs."""

    stem = "rounds"
    records: list[Record]

    def figures(self) -> dict[str, Figure]:
        """Return ``rounds``: accuracy and connectivity against target compression, two panels per model."""
        models = _by_model(self.records)
        figure = Figure(figsize=(4.2 * len(models), 6.4), layout="constrained")
        axes = figure.subplots(2, len(models), squeeze=False, sharex="col")
        for (upper, lower), (model, methods) in zip(axes.T, models.items(), strict=True):
            for method, runs in methods.items():
                color: Any = _COLORS.get(method)
                targets = [1.0 / (1.0 - level) for level in runs[0]["sparsities"]]
                for axis, key, label, style in (
                    (upper, "accuracy", method, "-"),
                    (lower, "channels_connected", f"{method}: channels connected", "-"),
                    (lower, "outputs_reached", f"{method}: outputs reached", ":"),
                ):
                    values = 100 * np.array([[round_record[key] for round_record in run["rounds"]] for run in runs])
                    axis.plot(targets, values.mean(0), style, marker=".", label=label, color=color)
                    if len(runs) > 1:
                        axis.fill_between(targets, values.min(0), values.max(0), alpha=0.15, linewidth=0, color=color)
                if method == "T-IMP":
                    critical = 1.0 / min(round_record["kept"] for round_record in runs[0]["rounds"])
                    for axis in (upper, lower):
                        axis.axvline(critical, color="black", linewidth=0.7, linestyle="--")
            finish(upper, "", "accuracy %", title=f"{model}\ndashed: critical compression", xscale="log")
            finish(lower, "target compression (weights / weights kept)", "%")
        return {"rounds": figure}


@dataclass(frozen=True, kw_only=True)
class AnalyzeRounds(DataVerb, Study[RoundsStudy]):
    """Prune by magnitude in rounds, with and without keeping spanning trees.

    "IMP capped" prunes by magnitude only, but keeps as many weights of each layer as T-IMP.
    """

    methods: Names = ("IMP", "T-IMP", "IMP capped")  # one or more of these
    sparsities: tuple[float, ...] = SPARSITIES  # sparsity of each layer after each round, rising, in (0, 1)
    seeds: int = 1  # number of seeds, at least 1
    train_epochs: int | None = None  # epochs of training; None: as in the model's recipe
    retrain_epochs: int = 2  # epochs of fine-tuning after each round, at least 0
    images: int | None = None  # test images used, at least 1; None: all
    n_jobs: int = 1  # runs in parallel, at least 1; -1: one per core; other than 1: each in its own process

    def find(self, tell: Tell) -> RoundsStudy:
        whole(1).check("seeds", self.seeds, self.place)
        steps_to(self.sparsities)
        changes = {}
        if self.train_epochs is not None:
            changes["epochs"] = self.train_epochs
        recipe = changed_recipe(zoo.default_recipe(self.model, self.data), changes)
        cells = []
        for seed, method in itertools.product(range(self.seed, self.seed + self.seeds), self.methods):
            if method not in METHODS:
                raise unknown_name("a method", method, METHODS, "methods")
            cell = Cell(
                self.model_choice,
                self.data_choice(self.images),
                METHODS[method],
                Target("ratio", self.sparsities[-1]),
                seed,
                train=recipe,
                retrain=recipe.for_retraining(self.retrain_epochs),
                device=self.device,
            )
            cells.append(RoundsCell(cell, self.sparsities))

        def announce(cell: RoundsCell, number: int, count: int) -> None:
            tell(f"[{number}/{count}] seed {cell.cell.seed}: {cell.cell.pruner.row}")

        return RoundsStudy(run_rounds(cells, self.out, n_jobs=self.n_jobs, announce=announce))

    def show(self, findings: RoundsStudy) -> Iterator[RenderableType]:
        return rounds_tables(findings.records)


def run_rounds(cells: Sequence[RoundsCell], out: str | Path, *, n_jobs: int = 1, announce: Any = None) -> list[Record]:
    """Run the cells that have no record in ``results.jsonl`` yet, and return all records in order.

    ``n_jobs`` cells run in parallel, -1: one per core. At the end a DataError names failed cells, if any; the same call
    runs them again.
    """
    JOBS.check("n_jobs", n_jobs, "rounds")
    out = Path(out)
    with only_process(out, wait=False):
        done = {record["key"]: record for record in read_records(out / "results.jsonl", {"key": instance(str)})}
        failures = run_missing(cells, done, out, run_rounds_cell, n_jobs=n_jobs, announce=announce)
    if failures:
        failed = "; ".join(f"{job.cell.pruner.row}, seed {job.cell.seed}: {reason}" for job, reason in failures)
        raise DataError(f"all runs must succeed, got {len(failures)} failed: {failed} ({out})")
    return [done[cell.key] for cell in cells]


def run_rounds_cell(study: RoundsCell, out: Path) -> Record:
    """Train, then prune and fine-tune round by round; return the record, with accuracies and shares in [0, 1]."""
    began = time.perf_counter()
    cell = study.cell
    start = start_of(cell, out)
    # without validation images, which saves the evaluation after each epoch
    no_images = subset(start.data.validation, slice(0))
    start = replace(start, data=replace(start.data, validation=no_images))
    net, data = start.net, start.data
    record: Record = {
        "key": study.key,
        "model": cell.model.label,
        "data": cell.data.name,
        "images": len(data.train),
        "method": cell.pruner.row,
        "seed": cell.seed,
        "sparsities": list(study.sparsities),
        "accuracy_before": start.accuracy,
        "overlap": overlaps(net),
    }
    initial, last = build_model(cell.model, data, cell.seed).to(start.device), study.sparsities[-1]
    config: list[dict[str, Any]] = [{"op_types": _TYPES, "sparse_ratio": last}]
    if cell.pruner.row == "IMP capped":  # each layer keeps at least as many weights as its channel tree has
        config = critical_config_list(net, last)
    knobs = {**pruner_knobs(cell.pruner.name, net, start, cell.pruner.calibration), **cell.pruner.knobs}
    pruner = create_pruner(cell.pruner.name, net, config, **knobs)
    rounds: list[Record] = []

    def train() -> None:
        zoo.train(net, data, cell.retrain, seed=cell.seed, device=start.device)

    def note(done: Round) -> None:
        masks: Masks = pruner.get_masks()
        # on the untrained network, because NNI has wrapped `net`; the values of weights don't matter
        flow = connectivity(initial, start.example, masks)
        rounds.append(
            {
                "accuracy": start.tested(net),
                "kept": share_kept(masks),
                "outputs_reached": flow.outputs,
                "channels_connected": flow.channels,
                "channels_reached": min(flow.reached.values()),
                "target": study.sparsities[done.index - 1],
            }
        )

    prune_in_rounds(pruner, steps_to(study.sparsities), train, on_round=note)
    return {**record, "rounds": rounds, "seconds": time.perf_counter() - began, **provenance()}


def overlaps(net: nn.Module) -> dict[str, dict[str, float]]:
    """Return, by linear layer, the measured share of tree weights among its largest weights, and the lower bound."""
    return {
        layer.name: {"measured": tree_overlap(layer.weight), "bound": overlap_bound(*layer.weight.shape)}
        for layer in weight_layers(net)[0]
        if layer.kind == "dense"
    }


def steps_to(sparsities: Sequence[float]) -> list[float]:
    """Return the steps for :func:`~nni_topo.pruners.rounds.prune_in_rounds` that give rising sparsities in (0, 1)."""
    inside = all(0.0 < level < 1.0 for level in sparsities)
    if not sparsities or not inside or sorted(set(sparsities)) != list(sparsities):
        raise ConfigError(f"sparsities must be rising numbers in (0, 1), got {list(sparsities)} (study)")
    # at a step s the share (1 - last) ** s of the weights is kept
    last = math.log(1.0 - sparsities[-1])
    return [math.log(1.0 - level) / last for level in sparsities[:-1]] + [1.0]


def rounds_tables(records: Iterable[Record]) -> Iterator[NumberTable]:
    """Yield a table per model, with differences to T-IMP paired by seed, then a table of linear layers' overlaps."""
    shown = {"kept": "{}: kept %", "accuracy": "accuracy %"}
    shown |= {"channels_connected": "channels connected %", "outputs_reached": "outputs reached %"}
    for model, methods in _by_model(records).items():
        runs = next(iter(methods.values()))
        head = ["target sparsity %", *(name.format(method) for method in methods for name in shown.values())]
        baselines = [name for name in methods if name != "T-IMP"] if "T-IMP" in methods else []
        head += [f"T-IMP - {baseline}" for baseline in baselines]
        rows = []
        for index, first_round in enumerate(runs[0]["rounds"]):
            cells = [f"{100 * first_round['target']:g}"]
            accuracies: dict[str, dict[int, float]] = {}
            for method, method_runs in methods.items():
                accuracies[method] = {run["seed"]: run["rounds"][index]["accuracy"] for run in method_runs}
                for key in shown:
                    values = [run["rounds"][index][key] for run in method_runs]
                    if key == "accuracy":
                        cells.append(show_accuracies(values))
                    else:
                        digits = 2 if key == "kept" else 1
                        cells.append(f"{100 * np.mean(values):.{digits}f}")
            for baseline in baselines:
                ours, baseline_accuracies = accuracies["T-IMP"], accuracies[baseline]
                gains = [
                    ours[seed] - baseline_accuracies[seed] for seed in sorted(ours.keys() & baseline_accuracies.keys())
                ]
                cells.append(interval(gains).show(100, sign=True))
            rows.append(cells)
        before = show_accuracies([run["accuracy_before"] for run in runs])
        size = f"{runs[0]['images']} images, {len(runs)} seed{'s' * (len(runs) > 1)}"
        yield NumberTable(f"{model} on {runs[0]['data']}, {size}; dense {before} %", head, rows)
    overlaps = []
    for model, methods in _by_model(records).items():
        runs = next(iter(methods.values()))
        for name, first in runs[0]["overlap"].items():
            measured = interval([run["overlap"][name]["measured"] for run in runs]).show(100)
            overlaps.append([model, name, measured, f"{100 * first['bound']:.1f}"])
    yield NumberTable(None, ["net", "layer", "overlap measured %", "bound %"], overlaps, text_columns=2)


def _by_model(records: Iterable[Record]) -> dict[str, dict[str, list[Record]]]:
    models: dict[str, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        models[record["model"]][record["method"]].append(record)
    return models
