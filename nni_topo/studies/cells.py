"""One cell of a comparison: train, prune, make dense, recover, fine-tune, and record what was measured."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nni_topo.disk import only_process, read_json, write_json
from nni_topo.network.runtime.switches import one_call, seed_torch, torch_random_kept
from nni_topo.pruners.registry import pruner_info
from nni_topo.recovery import recalibrate_batch_norm
from nni_topo.runs.choices import Cell
from nni_topo.runs.pipeline import Pipeline
from nni_topo.runs.provenance import Record, provenance
from nni_topo.runs.run import (
    WHOLE_CHANNELS,
    Start,
    budget_facts,
    costs,
    distilled,
    latencies,
    made_dense,
    prune_to_ratios,
    retrain,
    trained,
)
from nni_topo.runs.widths import layer_ratios
from nni_topo.studies.baselines import baseline_masks, is_baseline
from nni_topo.studies.plan import SCRATCH

_RECALIBRATION_IMAGES = 1024


@one_call()
def run_cell(cell: Cell, out: Path) -> Record:
    """Run a cell and return its record; the trained network is saved in ``checkpoints`` of the output folder."""
    began = time.perf_counter()
    # latencies are measured with one thread on every machine
    torch.set_num_threads(1)
    start = start_of(cell, out)
    ratios = shared_ratios(cell, start, out)
    cpu: dict[str, float] = {}  # CPU seconds by step; other processes affect them less than wall time
    with _measure_cpu(cpu, "prune"):
        pruned = pruned_cell(cell, start, ratios)
    speedup_began = time.perf_counter()
    with _measure_cpu(cpu, "speedup"):
        dense, _ = made_dense(start, pruned.masks)
    text_figures = {}
    if start.data.is_text:
        text_figures = start.figures(start.net, "before")
    # Accuracies are in [0, 1] on the test images, times in seconds, latencies median milliseconds of a batch.
    record: Record = {
        **cell_facts(cell),
        "sparse_ratios": ratios,
        **costs(start, dense),
        "accuracy_before": start.accuracy,
        **text_figures,
        "prune_seconds": pruned.seconds,
        "speedup_seconds": time.perf_counter() - speedup_began,
        **latencies(start, dense),
        "cpu_seconds": cpu,
    }
    name = cell.pruner.name
    if cell.target.kind != "ratio":
        # All pruners use the widths of the target; `why` explains a difference.
        why = WHOLE_CHANNELS
        if pruned.planned is not None:
            why = pruned.planned.why or "the dense network has other widths than planned"
        elif name != SCRATCH and not is_baseline(name) and not pruner_info(name).structured:
            why = "the pruner removes single weights and no channels"
        record |= budget_facts(start, dense, cell.target, record, why)

    def measure(net: nn.Module, step: str) -> None:
        record.update(start.figures(net, step))
        if len(start.data.validation) and not start.data.is_text:
            # Tables choose the best baseline by validation, so that the test images aren't used for choosing.
            record[f"validation_{step}"] = start.validated(net)

    if name == SCRATCH:
        dense, recipe, until = with_new_weights(dense, cell.seed), cell.train, None
    else:
        recipe, until = cell.retrain, cell.until
        measure(dense, "oneshot")
        measure(recalibrate_batch_norm(dense, start.images(_RECALIBRATION_IMAGES)), "recalibrated")
        if cell.compensate is not None:
            with _measure_cpu(cpu, "compensate"):
                dense, report = made_dense(start, pruned.masks, cell.compensate)
            measure(dense, "compensated")
            record["compensate_seconds"] = None if report is None else report.seconds
        if cell.distill is not None:
            with _measure_cpu(cpu, "distill"):
                distillation = distilled(start, dense, cell.distill)
            dense = distillation.model
            measure(dense, "distilled")
            record["distill_seconds"] = distillation.seconds
    if recipe.epochs:
        with _measure_cpu(cpu, "retrain"):
            curve = [start.validated(dense)] if len(start.data.validation) else []
            goal = None
            if until is not None:
                record["until"] = until
                goal = until * start.validation_accuracy
                if curve[0] >= goal:  # the goal is met without fine-tuning
                    recipe = replace(recipe, epochs=0)
            log = retrain(dense, start.data, recipe, seed=cell.seed, until=goal)
            record["retrain_seconds"] = log.seconds
            record["epoch_seconds"] = [epoch.training_seconds for epoch in log.epochs]
            if curve:
                record["validation_before"] = start.validation_accuracy
                record["curve"] = [*curve, *(epoch.validation_accuracy for epoch in log.epochs)]
        measure(dense, "retrained")
    record["seconds"] = time.perf_counter() - began
    return {**record, **provenance()}


@contextmanager
def _measure_cpu(cpu: dict[str, float], step: str) -> Iterator[None]:
    """Record the CPU seconds that this process spends in the block."""
    began = time.process_time()
    yield
    cpu[step] = time.process_time() - began


def start_of(cell: Cell, out: Path) -> Start:
    """Return a cell's trained network; all cells of a model, data set, recipe and seed share it."""
    folder = checkpoint(cell.training_key, out).parent
    return trained(cell.model, cell.data, recipe=cell.train, folder=folder, seed=cell.seed, device=cell.device)


def checkpoint(training_key: str, out: Path) -> Path:
    """Return the file of a trained network."""
    return out / "checkpoints" / f"{training_key}.pt"


def cell_facts(cell: Cell) -> Record:
    """Return the entries of a record that identify its cell."""
    return {
        "key": cell.key,
        "pruner": cell.pruner.row,
        "pruner_name": cell.pruner.name,
        "seed": cell.seed,
        "model": cell.model.label,
        "data": cell.data.name,
        "target": cell.target.label,
    }


def shared_ratios(cell: Cell, start: Start, out: Path) -> dict[str, float]:
    """Return every layer's ``sparse_ratio``; ratios that meet a budget are saved in ``ratios.json``."""
    path = out / "ratios.json"
    # Ratios depend on the architecture only, so all seeds and pruners share them.
    key = f"{cell.model.label}, {tuple(start.example.shape[1:])}, {cell.target.label}"
    with only_process(checkpoint(cell.training_key, out).parent):  # the lock of `out` is held by the comparison
        ratios_by_key = read_json(path) or {}
        if key not in ratios_by_key:
            example = start.timing_batch if cell.target.kind == "latency" else start.example
            ratios_by_key[key] = layer_ratios(start.net, example, cell.target)
            write_json(path, ratios_by_key, sort=False)
    return dict(ratios_by_key[key])


def pruned_cell(cell: Cell, start: Start, ratios: dict[str, float]) -> Pipeline:
    """Run a cell's pruner, ours or Torch-Pruning's, with a ratio for every layer."""
    choice = cell.pruner
    if is_baseline(choice.name):
        masks, seconds = baseline_masks(choice.name, start.analysis, ratios)
        return Pipeline(start.analysis, masks=masks, seconds=seconds)
    if choice.name == SCRATCH:  # training from scratch uses the widths only
        choice = replace(choice, name="random")
    return prune_to_ratios(start, choice, cell.target, ratios)


def with_new_weights(model: nn.Module, seed: int) -> nn.Module:
    """Return a copy of a model with newly drawn weights."""
    fresh = copy.deepcopy(model)
    with torch_random_kept():
        seed_torch(seed)
        for module in fresh.modules():
            reset: Any = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
    return fresh
