"""Prune one trained model by a YAML file: the function that ``nni-topo prune`` calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from nni_topo.disk import LOCK, check_free_disk, only_process, output_folder, write_json, write_tensors
from nni_topo.errors import ConfigError
from nni_topo.network.io import checkpoint as files
from nni_topo.network.runtime.public import public
from nni_topo.network.speedup.dependency import dependency_groups
from nni_topo.network.speedup.reconcile import check_masks, resolve_masks
from nni_topo.pruners.checks import check_request
from nni_topo.pruners.registry import check_pruner_knobs, needs_rule, pruner_info
from nni_topo.runs.choices import DataChoice, ModelChoice, PruneConfig, PrunerChoice, changed_recipe
from nni_topo.runs.provenance import Record, provenance
from nni_topo.runs.run import (
    Start,
    budget_facts,
    costs,
    created,
    latencies,
    made_dense,
    on_cpu,
    prune,
    retrain,
    trained,
)
from nni_topo.zoo import Recipe


@public()
def prune_checkpoint(
    model: ModelChoice,
    checkpoint: str | Path | None,
    config: PruneConfig,
    data: DataChoice,
    out: str | Path,
    *,
    seed: int = 0,
    device: str = "cpu",
    progress: bool | None = None,
) -> Record:
    """Prune a trained model; write ``dense.safetensors``, ``masks.pt``, ``summary.json`` to an empty folder."""
    out = Path(out)
    with empty_folder(out):
        choice = PrunerChoice(config.pruner, knobs=config.knobs, calibration=config.calibration)

        # an invalid request fails before the training, not after it
        def accept(untrained: Start) -> None:
            check_pruner_knobs(config.pruner, config.knobs, "configuration")
            check_request(untrained.net, config.config_list, needs_rule=needs_rule(config.pruner, config.knobs))
            recipe_of(untrained)
            created(untrained, choice, config.config_list)

        def recipe_of(start: Start) -> Recipe:
            return changed_recipe(start.recipe.for_retraining(int(config.retrain.get("epochs", 1))), config.retrain)

        start = trained(model, data, checkpoint=checkpoint, seed=seed, device=device, progress=progress, accept=accept)
        config_list = config.config_list
        if pruner_info(config.pruner).structured:
            config_list = dependency_groups(start.net, start.example, config_list)
        found = prune(start, choice, config_list)
        masks = found.masks
        if config.round_to is not None:
            checked = check_masks(start.net, masks)
            masks = resolve_masks(start.net, start.analysis.flow, checked, config.round_to).masks
        masks = on_cpu(masks)
        dense, _ = made_dense(start, masks)
        record: Record = {
            "model": model.label,
            "data": data.name,
            "pruner": config.pruner,
            "seed": seed,
            "prune_seconds": found.seconds,
            **costs(start, dense),
            "accuracy_before": start.accuracy,
            **(start.figures(start.net, "before") if start.data.is_text else {}),
            **start.figures(dense, "oneshot"),
        }
        if config.compensate is not None:
            dense, report = made_dense(start, masks, config.compensate, progress=progress)
            record |= start.figures(dense, "compensated")
            if report is not None:
                record["compensation"] = report.to_frame().replace({float("nan"): None}).to_dict("records")
        if config.retrain:
            retrain(dense, start.data, recipe_of(start), seed=seed, progress=progress)
            record |= start.figures(dense, "retrained")
        record |= latencies(start, dense) | provenance()
        if found.planned is not None and found.planned.kind == "latency" and config.round_to is None:
            record["budget"] = asdict(found.planned)  # timed for longer, on the requested batch
        elif found.planned is not None:
            why = found.planned.why or f"layers keep a multiple of {config.round_to} channels"
            record |= budget_facts(start, dense, found.planned, record, why)
        output_folder(out)
        files.save(dense, out / "dense.safetensors")
        write_tensors(out / "masks.pt", masks)
        write_json(out / "summary.json", record)
        return record


@contextmanager
def empty_folder(out: Path) -> Iterator[None]:
    """Lock an output folder, which must be new or empty, against other runs; ConfigError or DataError.

    If an error leaves a new folder empty, it is removed.
    """
    _check_empty(out)
    is_new = not out.exists()
    with only_process(out, wait=False):
        _check_empty(out)  # another run may have ended in the meantime
        try:
            yield
        finally:
            with suppress(OSError):
                (out / LOCK).unlink()
                if is_new:
                    out.rmdir()


def _check_empty(out: Path) -> None:
    """Raise ConfigError if an output folder isn't empty, DataError if it can't be written to."""
    check_free_disk(out)
    entries = [each for each in out.iterdir() if each.name != LOCK] if out.exists() else []
    if entries:
        raise ConfigError(f"an output folder must be new or empty, got {len(entries)} entries ({out})")
